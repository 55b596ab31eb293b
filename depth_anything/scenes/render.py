"""Render procedural scenes: image and exact depth of a seed, and sets of them as a source of shards."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.tars import ShardSet
from depth_anything.ingest.degrade import DEGRADATION_VERSION, degrade
from depth_anything.ingest.source import DatasetInfo, RawSample
from depth_anything.ingest.writer import write_source
from depth_anything.scenes.captions import CAPTION_VERSION, describe_scene
from depth_anything.scenes.classes import CLASS_VERSIONS, SCENE_CLASSES, class_map
from depth_anything.scenes.layout import SceneLayout, random_layout
from depth_anything.scenes.materials import (
    Material,
    PhiloxRandom,
    color_temperature,
    random_atmosphere,
    random_material,
    vary_material,
)
from depth_anything.scenes.raycast import (
    PinholeView,
    Scene,
    Solid,
    add_reflections,
    cast_rays,
    shade,
    shadow_map,
    tint_glass,
)
from depth_anything.scenes.scene_set import LAYOUTS, LOOKS, SceneSetSpec
from depth_anything.scenes.varied import varied_atmosphere, varied_layout

FOV_STREAM = 100
"""Stream of the random numbers that choose a field of view; the others of a seed do not change with it."""

RENDERER_VERSION = 2
"""Increase it when the image of a seed changes; it is a setting of every set, so old and new images are not mixed."""

INFO = DatasetInfo(
    name="scenes",
    title="procedural scenes",
    records=0,
    layout="no files: they are rendered",
    get="python train.py stage=teacher draws them on first use",
    licence="Apache-2.0",
    sharp=True,
)


def render_scene(
    seed: int,
    *,
    look: str,
    height: int,
    width: int,
    layout: str = "classic",
    fov: tuple[float, float] | None = None,
) -> Frame:
    """Render a scene. A seed always gives the same image, and the same depth in both looks.

    Depth is planar (z), +inf for sky; everything beyond 150 m is sky. Pixel centers are at integers: the ray of column
    x, row y is ((x - cx) / fx, (y - cy) / fy, 1). The depth of glass and of mirrors is that of their surface.

    Args:
        seed: At least 0, below 2**64. Both looks of a seed have the same geometry.
        layout: "classic" (rooms and streets seen at eye level) or "varied" (also close-ups, corridors and bins, by
            cameras of any pitch, height and field of view, in clear air), for networks that see photographs.
        look: "synthetic" (plain materials, simple light) or "photographic" (textures, lamps and shadows, glass and
            mirrors, haze, lens and sensor; JPEG artifacts are added by `SceneSource`).
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        fov: Lowest and highest horizontal field of view in degrees, between which the seed chooses; the camera stays
            where it is. None: that of the layout, 52 to 86 degrees.

    Returns:
        A frame with depth in meters, float32 (H, W), +inf for sky. `meta` holds source, look, seed, unit, sky, the
        intrinsics fx, fy, cx, cy in pixels, and a layout other than "classic".

    Raises:
        ValueError: The look or the layout is unknown.
    """
    if look not in LOOKS:
        raise ValueError(f"look={look} is unknown: use {' or '.join(LOOKS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout} is unknown: use {' or '.join(LAYOUTS)}")
    image, depth, focal = _render_arrays(seed, look=look, layouts=layout, height=height, width=width, fov=fov)
    meta = {
        "source": "scenes",
        "look": look,
        "seed": seed,
        "original_size": [height, width],
        "intrinsics": {"fx": focal, "fy": focal, "cx": (width - 1) / 2, "cy": (height - 1) / 2},
        "unit": "m",
        "sky": "inf",
        **({} if layout == "classic" else {"layout": layout}),
    }
    return Frame(key=f"{look}-{seed}", image=image, meta=meta, depth=depth)


def render_classes(
    seed: int,
    *,
    height: int,
    width: int,
    layout: str = "classic",
    fov: tuple[float, float] | None = None,
) -> np.ndarray:
    """Name the object that each pixel of a scene shows, uint8 (H, W) of `SCENE_CLASSES`; the same in both looks.

    Args:
        seed: Number of the scene.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        layout: "classic" or "varied", as for `render_scene`.
        fov: As for `render_scene`.
    """
    placed, view, _ = _layout_and_view(seed, layouts=layout, height=height, width=width, fov=fov)
    opaque, panes = _split_glass(placed)
    depth, number = cast_rays(opaque, view)
    pane_depth, pane = cast_rays(panes, view)
    in_front = pane_depth < depth
    number = np.where(in_front, pane + np.int16(len(opaque)), number)
    return class_map(placed, view, np.where(in_front, pane_depth, depth), opaque + panes, number)


def write_scenes(root: str | Path, spec: SceneSetSpec, *, per_shard: int = 128, workers: int = 0) -> ShardSet:
    """Write scenes as a set of shards. An interrupted set is continued; a finished one is returned.

    Sets of different seeds share no scene. Several processes may write one set. Synthetic images are PNG, without
    artifacts; photographic images are JPEG with a random quality from 40 to 92.

    Args:
        root: Folder of the set; its name is the name of the set.
        spec: The scenes.
        per_shard: Scenes per shard.
        workers: Processes that render; 0 renders in this process. The bytes are the same.

    Raises:
        ValueError: The folder holds another set.
    """
    shard_set = write_source(SceneSource(spec), Path(), root, per_shard=per_shard, workers=workers)
    assert shard_set is not None, "a single part has every shard"
    return shard_set


@dataclass(frozen=True)
class SceneSource:
    """A source of scenes for `write_source`. A line is the number of a scene in the set."""

    spec: SceneSetSpec

    @property
    def INFO(self) -> DatasetInfo:  # noqa: N802  a constant of the module in other sources
        """Facts for the writer; degraded depth is not sharp."""
        info = replace(INFO, classes=SCENE_CLASSES) if self.spec.classes else INFO
        return replace(info, sharp=False, sky="invalid") if self.spec.degraded else info

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the scenes. Sets from before there were layouts have none in their settings."""
        spec = self.spec
        return {
            "version": RENDERER_VERSION,
            "look": spec.look,
            "count": spec.count,
            "seed": spec.seed,
            "height": spec.height,
            "width": spec.width,
            "labelled": spec.labelled,
            **({} if spec.layout == "classic" else {"layout": spec.layout}),
            **({"classes": CLASS_VERSIONS[spec.layout]} if spec.classes else {}),
            **({"captioned": CAPTION_VERSION} if spec.captioned else {}),
            **({} if spec.fov is None else {"fov": [float(angle) for angle in spec.fov]}),
            **({"degraded": DEGRADATION_VERSION} if spec.degraded else {}),
        }

    def find(self, raw: Path) -> Iterable[str]:
        """List the numbers of the scenes."""
        return map(str, range(self.spec.count))

    def read(self, raw: Path, line: str) -> RawSample:
        """Render a scene and encode its image; include its depth if the set has labels."""
        spec = self.spec
        scene = spec.seed * 10_000_000 + int(line)
        size: Any = {"height": spec.height, "width": spec.width, "layout": spec.layout, "fov": spec.fov}
        frame = render_scene(scene, look=spec.look, **size)
        quality = 40 + PhiloxRandom(scene, 4).integer(53)
        image = encode_frame(replace(frame, depth=None), codec="f32", jpeg_quality=quality).get("jpg", b"")
        if spec.look == "synthetic":
            image = cv2.imencode(".png", frame.image[..., ::-1])[1].tobytes()
        meta = {**frame.meta, "name": None}
        sky = np.isinf(frame.depth) if frame.depth is not None else None
        classes = render_classes(scene, **size) if spec.classes else None
        captions = (describe_scene(scene, layout=spec.layout),) if spec.captioned else ()
        depth = frame.depth if spec.labelled else None
        if depth is not None and spec.degraded:
            depth, sky, meta = degrade(depth, seed=scene), None, {**meta, "sky": None}
        return RawSample(image, meta, depth=depth, sky=sky, classes=classes, captions=captions)


def _layout_and_view(
    seed: int, *, layouts: str, height: int, width: int, fov: tuple[float, float] | None
) -> tuple[SceneLayout, PinholeView, float]:
    """Return the layout of a seed, the rays of its camera, and its focal length in pixels."""
    layout = random_layout(seed) if layouts == "classic" else varied_layout(seed)
    focal = (width / 2) / math.tan(layout.field)
    if fov is not None:  # evenly distributed in the logarithm of the focal length
        wide, narrow = (math.log(math.tan(math.radians(degrees) / 2)) for degrees in fov[::-1])
        focal = (width / 2) / math.exp(PhiloxRandom(seed, FOV_STREAM).uniform(narrow, wide))
    u = ((np.arange(width) - (width - 1) / 2) / focal).astype(np.float32)
    v = ((np.arange(height) - (height - 1) / 2) / focal).astype(np.float32)
    return layout, PinholeView(layout.origin, layout.rotation, u, v), focal


def _split_glass(layout: SceneLayout) -> tuple[list[Solid], list[Solid]]:
    """Return the opaque solids and the panes of glass."""
    opaque = [s for s in layout.solids if s.role != "glass"]
    return opaque, [s for s in layout.solids if s.role == "glass"]


def _render_arrays(
    seed: int, *, look: str, layouts: str, height: int, width: int, fov: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the image, uint8 (H, W, 3), the depth, float32 (H, W) in meters, and the focal length in pixels."""
    layout, view, focal = _layout_and_view(seed, layouts=layouts, height=height, width=width, fov=fov)
    opaque, panes = _split_glass(layout)
    behind = cast_rays(opaque, view)
    depth, number = cast_rays(panes, view)
    in_front = depth < behind[0]
    number = np.where(in_front, number + np.int16(len(opaque)), np.int16(-1))
    depth = np.where(in_front, depth, behind[0])
    draw = PhiloxRandom(seed, 2 + LOOKS.index(look))
    if layouts == "classic":
        air = random_atmosphere(look, indoors=layout.indoors, height=layout.height, draw=draw)
    else:
        air = varied_atmosphere(layout, draw)
    solids = opaque + panes
    roles = [("wall", "ceiling", "floor") if s.shape == "shell" else (s.role,) for s in solids]

    def material(role: str) -> Material:
        if layouts == "classic":
            return random_material(role, look=look, draw=draw)
        # Rendered training sets have textures, too: half of the surfaces are as in the photographic look.
        found = random_material(role, look=draw.choice((look, "photographic")), draw=draw)
        return vary_material(found, role, detail=layout.detail, draw=draw)

    scene = Scene(
        solids,
        [tuple(material(role) for role in r) for r in roles],
        air,
    )
    if layouts == "classic" and look == "synthetic":
        radiance = shade(scene, view, depth, np.where(in_front, number, behind[1]))
        return synthetic_camera(radiance), depth, focal
    if air.lights:
        center = (layout.origin + layout.rotation[:, 2] * (3.0 if layout.indoors else 12.0)) * np.array(
            [1, 0, 1]
        )
        if layouts == "classic":
            first = replace(air.lights[0], shadow=shadow_map(solids, air.lights[0], center))
        else:
            center = layout.origin + layout.rotation[:, 2] * layout.reach
            first = replace(
                air.lights[0], shadow=shadow_map(solids, air.lights[0], center, reach=layout.reach)
            )
        scene = replace(scene, air=replace(air, lights=(first, *air.lights[1:])))
    if look == "synthetic":
        radiance = shade(scene, view, depth, np.where(in_front, number, behind[1]))
        return synthetic_camera(radiance * exposure_gain(radiance, draw)), depth, focal
    image = shade(scene, view, *behind)
    add_reflections(image, scene, view, *behind)
    tint_glass(image, scene, number)
    return photographic_camera(image, depth, draw), depth, focal


# Cameras of the two looks


def _translate(image: np.ndarray, offset: int, axis: int) -> np.ndarray:
    """Return the image translated by offset pixels along an axis, with its border repeated."""
    length = image.shape[axis]
    return np.take(image, np.clip(np.arange(length) - offset, 0, length - 1), axis)


def binomial_blur(image: np.ndarray, passes: int) -> np.ndarray:
    """Apply a binomial 1-2-1 blur to the last two axes; each pass adds 0.5 px² of variance."""
    for _ in range(passes):
        for axis in (-1, -2):
            image = (_translate(image, 1, axis) + _translate(image, -1, axis)) * np.float32(
                0.25
            ) + image * np.float32(0.5)
    return image


def motion_blur(image: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Apply motion blur: the mean of the image translated along a line of (dx, dy) pixels."""
    steps = max(abs(dx), abs(dy))
    total = image
    for k in range(1, steps + 1):
        total = total + _translate(_translate(image, round(dx * k / steps), -1), round(dy * k / steps), -2)
    return total / np.float32(steps + 1)


def apply_tone_curve(image: np.ndarray, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a tone curve to linear RGB (3, H, W) by table lookup; return uint8 (H, W, 3)."""
    table = np.clip(np.round(255 * curve(np.linspace(0, 1, 4096))), 0, 255).astype(np.uint8)
    codes = (np.clip(image, 0, 1) * np.float32(4095) + np.float32(0.5)).astype(np.int16)
    return np.ascontiguousarray(np.moveaxis(table[codes], 0, -1))


def synthetic_camera(image: np.ndarray) -> np.ndarray:
    """Apply the camera of the synthetic look: only gamma."""
    return apply_tone_curve(image * np.float32(0.9), lambda x: x ** (1 / 2.2))


def exposure_gain(image: np.ndarray, draw: PhiloxRandom) -> float:
    """Return the factor that gives linear RGB (3, H, W) a random mean between 0.25 and 0.5."""
    # a sum of integers is exact
    gray = int((image[1] * 4096).astype(np.int64).sum()) / (4096 * image[1].size) + 0.02
    return draw.uniform(0.25, 0.5) / gray


def photographic_camera(image: np.ndarray, depth: np.ndarray, draw: PhiloxRandom) -> np.ndarray:
    """Apply the camera of the photographic look: exposure, white balance, focus, motion, vignette, noise, tone curve.

    Args:
        image: Linear RGB, float32 (3, H, W).
        depth: Meters, float32 (H, W), +inf for sky; used for the focus only.
        draw: Random numbers.
    """
    height, width = depth.shape
    gain = exposure_gain(image, draw)
    balance = color_temperature(draw.uniform(-0.6, 0.6))
    image = image * np.array([gain * c for c in balance], np.float32)[:, None, None]
    if draw.bernoulli(0.35):  # blur grows with the distance from the focal plane
        focus = 1 / np.float32(draw.uniform(1.5, 10))
        away = np.clip(np.abs(1 / depth - focus) * np.float32(draw.uniform(2, 6)), 0, 1)
        image = image + (binomial_blur(image, 1 + width // 64) - image) * away
    if draw.bernoulli(0.25):
        reach = max(1, width // 50)
        image = motion_blur(image, draw.integer(2 * reach + 1) - reach, draw.integer(2 * reach + 1) - reach)
    if draw.bernoulli(0.6):
        image = binomial_blur(image, 1)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    image = image * (1 - np.float32(draw.uniform(0, 0.3)) * (x * x + y * y))
    read, shot = draw.uniform(0.002, 0.012), draw.uniform(0.005, 0.03)
    level = np.sqrt(np.maximum(image, 0)) * np.float32(shot) + np.float32(read)
    image = image + draw.approx_normal(3, height, width) * level
    mean = (image[0] + image[1] + image[2]) * np.float32(1 / 3)
    image = mean + (image - mean) * np.float32(draw.uniform(0.4, 1.3))
    gamma, contrast = draw.uniform(1.7, 2.6), draw.uniform(-0.3, 0.6)

    def curve(x: np.ndarray) -> np.ndarray:
        tone = x ** (1 / gamma)
        return tone + contrast * (tone * tone * (3 - 2 * tone) - tone)

    return apply_tone_curve(image, curve)
