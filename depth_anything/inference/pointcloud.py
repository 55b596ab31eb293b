"""Coloured points from an image and its map: where the focal length comes from, what is left out, ply and glb.

The camera looks along +z, x points right, y down, as in OpenCV and in the authors' depth_to_pointcloud.py; a ply
keeps that. In glTF y points up and the camera looks along -z, so a glb has y and z with the other sign.
"""

import math
from dataclasses import dataclass

import numpy as np

from depth_anything.data.image_headers import open_image

DEFAULT_FOCAL_PX = 470.4
"""Of the authors' depth_to_pointcloud.py."""

DEFAULT_FOCAL_WIDTH_PX = 640
"""Longer side of the images that `FOCAL_PX` belongs to; the field of view is then 68 degrees."""

MAX_POINTS = 1_000_000
POINT_FORMATS = ("ply", "glb")

MAX_DEPTH_MEDIANS = 10.0
"""Without metres, what lies farther than so many times the median depth is taken for sky."""

SATURATED_DEPTH_SHARE = 0.99
"""A metric network that is sure of nothing, as of the sky, comes close to its largest depth."""

_FULL_FRAME_MM = math.hypot(36, 24)
_EXIF_IFD = 0x8769
_FOCAL_LENGTH, _FOCAL_35MM = 0x920A, 0xA405
_PLANE_X_RESOLUTION, _PLANE_UNIT = 0xA20E, 0xA210
_PIXEL_X, _PIXEL_Y = 0xA002, 0xA003
_UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 1e-3}


@dataclass(frozen=True)
class PointCloud:
    """Points before a camera.

    Attributes:
        points: float32 (N, 3): x right, y down, z forward.
        colors: uint8 (N, 3), RGB.
        unit: "m", or "relative" where depth is known up to scale at best.
        focal_px: with which they were made.
    """

    points: np.ndarray
    colors: np.ndarray
    unit: str
    focal_px: float


def choose_focal_length(
    data: bytes, shape: tuple[int, ...], *, focal_px: float | None = None
) -> tuple[float, str]:
    """Choose a focal length: the one given, else that of the photograph's EXIF, else the authors'.

    Args:
        data: the image file.
        shape: (H, W, …) of the image.
        focal_px: the user's word.

    Returns:
        pixels, and in words where they come from.
    """
    if focal_px is not None:
        return focal_px, "given"
    found = _focal_from_exif(data, shape)
    if found is not None:
        return found
    default = DEFAULT_FOCAL_PX * max(shape[:2]) / DEFAULT_FOCAL_WIDTH_PX
    return (
        default,
        f"assumed: {DEFAULT_FOCAL_PX} px for a longer side of {DEFAULT_FOCAL_WIDTH_PX} px; EXIF says nothing, "
        "--focal would",
    )


def unproject(
    image: np.ndarray,
    map: np.ndarray,
    *,
    quantity: str,
    focal_px: float,
    far: float | None = None,
    max_points: int = MAX_POINTS,
) -> PointCloud:
    """Give every pixel its place in space, the principal point in the middle of the image.

    Of disparity only the ratio of depths is known, and that only if its zero is infinitely far, which is what
    the networks are taught and nothing guarantees. So it is assumed here, and the median depth is made 1.

    Args:
        image: uint8 (H, W, 3), RGB.
        map: float (H, W).
        quantity: "depth" (metres) or "disparity".
        focal_px: focal length, pixels.
        far: leave out what is farther; metres, or medians for disparity, where None is `FAR_MEDIANS`.
        max_points: take every second, third … pixel of each row and column, until there are no more.

    Raises:
        ValueError: if no focal length or number of points is above 0.
    """
    if not focal_px > 0 or max_points < 1:
        raise ValueError(f"focal={focal_px} and max_points={max_points} must be above 0")
    depth, unit = _to_depth(map, quantity)
    limit = MAX_DEPTH_MEDIANS if far is None and unit == "relative" else far or math.inf
    kept = np.isfinite(depth) & (depth > 0) & (depth <= limit)
    step = max(1, math.ceil(math.sqrt(kept.sum() / max_points)))
    while kept[::step, ::step].sum() > max_points:
        step += 1
    kept, depth = kept[::step, ::step], depth[::step, ::step]
    y, x = np.nonzero(kept)
    z = depth[kept]
    height, width = map.shape
    points = np.stack(
        [(x * step + 0.5 - width / 2) / focal_px * z, (y * step + 0.5 - height / 2) / focal_px * z, z], axis=1
    )
    return PointCloud(points.astype(np.float32), image[::step, ::step][kept], unit, focal_px)


def encode_points(cloud: PointCloud, format: str) -> bytes:
    """Make a ply (binary) or a glb; either says its unit and its axes.

    Args:
        cloud: the points.
        format: "ply" or "glb".

    Raises:
        ValueError: if there are none.
    """
    import trimesh

    if not len(cloud.points):
        raise ValueError("no point is near enough to be drawn: the map is all sky")
    if format == "glb":
        turned = cloud.points * np.array([1, -1, -1], np.float32)
        scene = trimesh.Scene(trimesh.PointCloud(turned, colors=_srgb_to_linear(cloud.colors)))
        scene.metadata.update(unit=cloud.unit, axes="x right, y up, z back", focal_px=cloud.focal_px)
        return bytes(scene.export(file_type="glb"))
    data = bytes(trimesh.PointCloud(cloud.points, colors=cloud.colors).export(file_type="ply"))
    comment = f"comment unit {cloud.unit}; x right, y down, z forward; focal {cloud.focal_px:g} px\n"
    end = data.index(b"\nelement") + 1
    return data[:end] + comment.encode() + data[end:]


def _srgb_to_linear(colors: np.ndarray) -> np.ndarray:
    """Turn sRGB bytes into linear ones, as glTF 2.0 has them in COLOR_0; viewers show others pale."""
    share = np.arange(256) / 255
    light = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.rint(light * 255).astype(np.uint8)[colors]


def _to_depth(map: np.ndarray, quantity: str) -> tuple[np.ndarray, str]:
    values = map.astype(np.float64)
    if quantity == "depth":
        return values, "m"
    near = values[values > 1e-6 * max(float(values.max()), 1e-12)]
    scale = float(np.median(near)) if near.size else 1.0
    with np.errstate(divide="ignore"):
        return np.where(values > 0, scale / np.where(values > 0, values, 1), np.inf), "relative"


def _focal_from_exif(data: bytes, shape: tuple[int, ...]) -> tuple[float, str] | None:
    try:
        exif = open_image(data).getexif().get_ifd(_EXIF_IFD)
        equivalent, length = (float(exif.get(tag, 0)) for tag in (_FOCAL_35MM, _FOCAL_LENGTH))
        resolution = float(exif.get(_PLANE_X_RESOLUTION, 0))
        sides = [int(exif.get(tag, 0)) for tag in (_PIXEL_X, _PIXEL_Y)]
        unit_mm = _UNIT_MM.get(int(exif.get(_PLANE_UNIT, 2)), 0.0)
    except Exception:  # damaged EXIF is no reason to lose a picture
        return None
    if equivalent > 0:
        focal = equivalent / _FULL_FRAME_MM * math.hypot(*shape[:2])
        return focal, f"EXIF: {equivalent:g} mm on 35 mm film"
    if length > 0 and resolution > 0 and unit_mm > 0:
        taken = max(sides) or max(shape[:2])  # the photograph may have been resized since
        focal = length * resolution / unit_mm * max(shape[:2]) / taken
        return focal, f"EXIF: {length:g} mm, {resolution / unit_mm:.0f} px a mm of the sensor"
    return None
