"""MoGe's evaluation bundle: ten public benchmarks in one format.

Layout: a folder per set (NYUv2, KITTI, ETH3D, iBims-1, GSO, Sintel, DDAD, DIODE, Spring, HAMMER), with .index.txt: a
line per frame, the path of a folder with image.jpg, depth.png and meta.json.

Depth: a 16-bit PNG with two texts, near and far: 0 is unknown, 65535 infinite, and v between them is
near^(1-t) · far^t with t = (v - 1) / 65533. A third text, unit, is a factor that older files have. meta.json has the
intrinsics as fractions of width and height.

Images and depth are the sets' own, but each frame is warped to a size of its set before it is shown: to a camera that
looks along the ray of the image center, with square pixels and the widest view that the image fills. The image is first
resized to about the pixel size of the target (Lanczos), then warped (linear). The depth is resized first, too: each
pixel takes the known depth nearest to its center from a window of source pixels as large as itself, so sparse depth is
not thinned by chance; then it is converted to distance, warped (nearest) and converted to depth along the new axis.
Depth more than 1000 times the nearest percentile is dropped.

The compared pixels are exactly those of MoGe's loader (commit 0744441, with utils3d 3fab839): arithmetic that decides
them has the same precision and order, since whether 640 pixels become 640 or 639 depends on rounding.

Sizes, counts and figures thus differ from those on the sets' own files and cannot be compared with them.

Licenses are the sets' own. Get it from https://huggingface.co/datasets/Ruicheng/monocular-geometry-evaluation; facts
from arXiv 2410.19115 and https://github.com/microsoft/MoGe (MIT), moge/test/dataloader.py.
"""

import io
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

from depth_anything.data.sample import Frame, decode_image
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    read_file,
    resolve_root,
)
from depth_anything.ingest.file_list import escape_field
from depth_anything.ingest.frame_files import split_fields
from depth_anything.ingest.maps import read_png16

INDEX_FILE = ".index.txt"
_GET = "https://huggingface.co/datasets/Ruicheng/monocular-geometry-evaluation"
_MAX_RELATIVE_DEPTH = 1000.0
# Name → folder, width, height, images (0: not published), license.
_SETS: dict[str, tuple[str, int, int, int, str]] = {
    "moge_nyu": ("NYUv2", 640, 480, 654, "LicenseRef-NYU-Depth-V2"),
    "moge_kitti": ("KITTI", 750, 375, 652, "CC-BY-NC-SA-3.0"),
    "moge_eth3d": ("ETH3D", 2048, 1365, 453, "CC-BY-NC-SA-4.0"),
    "moge_ibims": ("iBims-1", 640, 480, 100, "LicenseRef-iBims-1"),
    "moge_gso": ("GSO", 512, 512, 1030, "CC-BY-4.0"),
    "moge_sintel": ("Sintel", 872, 436, 1064, "LicenseRef-MPI-Sintel"),
    "moge_ddad": ("DDAD", 1400, 700, 1000, "CC-BY-NC-SA-4.0"),
    "moge_diode": ("DIODE", 1024, 768, 771, "MIT"),
    "moge_spring": ("Spring", 1920, 1080, 0, "CC-BY-4.0"),
    "moge_hammer": ("HAMMER", 1664, 832, 0, "LicenseRef-HAMMER"),
}

_SETS_WITH_BOUNDARIES = ("moge_ibims", "moge_sintel", "moge_spring", "moge_hammer")  # as MoGe scores them


def find(root: Path, *, name: str) -> Iterator[str]:
    """List the frames of a set in the order of its index; ValueError if it is not there.

    Args:
        root: folder of the bundle, or of the set.
        name: of the set, a key of `_SETS`.
    """
    folder = _SETS[name][0]
    root = resolve_root(root, "moge")
    place = next((place for place in (root / folder, root) if (place / INDEX_FILE).is_file()), None)
    if place is None or (place == root and root.name != folder and (root / folder).exists()):
        raise UserError(
            f"{root} does not hold {folder}: looked for {folder}/{INDEX_FILE}",
            f"get {folder}.zip from {_GET}",
        )
    below = f"{folder}/" if place != root else ""
    for text in (place / INDEX_FILE).read_text(encoding="utf-8").splitlines():
        if text.strip():
            yield "\t".join(map(escape_field, [text.strip(), f"{below}{text.strip()}"]))


def read(root: Path, line: str, *, name: str) -> Frame:
    """Read a frame and warp it to its set's size; ValueError if a file is missing or damaged."""
    frame, place = split_fields(line)
    _, width, height, _, _ = _SETS[name]
    root = resolve_root(root, "moge")
    with prefix_errors(f"{name}/{frame}"):
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            raise ValueError("its path is outside of the bundle")
        image = decode_image(read_file(root, f"{place}/image.jpg"))
        depth = read_depth(read_file(root, f"{place}/depth.png"))
        camera = _parse_intrinsics(read_file(root, f"{place}/meta.json"))
        if image.shape[:2] != depth.shape:
            raise ValueError(f"its image is {image.shape[:2]}, its depth {depth.shape}")
        image, depth, camera = warp(image, depth, camera, width=width, height=height)
        meters = np.where(np.isfinite(depth), depth, np.nan)
        known = (
            meters <= np.nanquantile(meters, 0.01) * _MAX_RELATIVE_DEPTH
            if np.isfinite(meters).any()
            else None
        )
        return make_frame(f"{name}/{frame}", image, meters, known=known, meta={"intrinsics": camera.tolist()})


def read_depth(data: bytes) -> np.ndarray:
    """Decode a depth.png to float32 (H,W), NaN where unknown, or +inf; ValueError if it is damaged."""
    values = read_png16(data)
    text = PngImagePlugin.PngImageFile(io.BytesIO(data)).text
    try:
        near, far, unit = float(text["near"]), float(text["far"]), float(text.get("unit", 1))
    except (KeyError, ValueError):
        raise ValueError("its depth.png has no near and far, or they or its unit are not numbers") from None
    if not 0 < near <= far < float("inf"):
        raise ValueError(f"its depth.png has near {near} and far {far}")
    if not 0 < unit < float("inf"):
        raise ValueError(f"its depth.png has the unit {unit}")
    share = (values.astype(np.float32) - 1) / 65533
    depth = near ** (1 - share) * far**share * unit
    return np.select([values == 0, values == 65535], [np.nan, np.inf], depth).astype(np.float32)


def warp(
    image: np.ndarray, depth: np.ndarray, camera: np.ndarray, *, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Warp an image and its depth to a camera that looks along the ray of the image center.

    Args:
        image: uint8 (H,W,3).
        depth: float (H,W), planar; not finite where unknown.
        camera: float (3,3), intrinsics as fractions of width and height.
        width: of the result.
        height: of the result.

    Returns:
        uint8 (height,width,3); float32 (height,width), NaN where unknown; and the new intrinsics, float32 (3,3).

    Raises:
        ValueError: the new camera sees nothing of the image.
    """
    camera = camera.astype(np.float32)
    inverse = np.linalg.inv(camera)
    turn = _rotation_to_z(inverse @ np.array([0.5, 0.5, 1.0], np.float32))
    wide, high = _view_size(camera, inverse, turn, width / height)
    new = np.array([[1 / wide, 0, 0.5], [0, 1 / high, 0.5], [0, 0, 1]], np.float32)
    # The size at which the old camera has pixels of about the target's size.
    raw_height, raw_width = image.shape[:2]
    near_width = int(raw_width * (abs(1 / camera[0, 0]) / raw_width) / (wide / width))
    near_height = int(raw_height * (abs(1 / camera[1, 1]) / raw_height) / (high / height))
    if min(near_width, near_height) < 1:
        raise ValueError("its camera sees nothing")
    image = np.asarray(Image.fromarray(image).resize((near_width, near_height), Image.Resampling.LANCZOS))
    resized = resize_nearest_valid(depth.astype(np.float32), width=near_width, height=near_height)
    distance = resized * _ray_lengths(inverse, near_width, near_height)
    seen = _pixel_rays(width, height) @ (camera @ np.linalg.inv(turn) @ np.linalg.inv(new)).T
    pixels = seen[..., :2] / (seen[..., 2:] + 1e-12) * np.array([near_width, near_height], np.float32) - 0.5
    x, y = pixels[..., 0], pixels[..., 1]
    warped = cv2.remap(image, x, y, cv2.INTER_LINEAR)
    lost = float("nan")
    far = cv2.remap(distance, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=lost)
    return warped, far / (_ray_lengths(np.linalg.inv(new), width, height) + 1e-12), new


def resize_nearest_valid(depth: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Resize a sparse map: each pixel takes the known value nearest to its center.

    Only a window of source pixels about as large as the new pixel, and at least one, is searched.

    Args:
        depth: float32 (H,W); not finite where unknown.
        width: of the result.
        height: of the result.

    Returns:
        float32 (height,width), NaN where the window has no known value.
    """
    rows, first_row, tall = _source_windows(depth.shape[0], height)
    columns, first_column, broad = _source_windows(depth.shape[1], width)
    out = np.full((height, width), np.nan, np.float32)
    nearest = np.full((height, width), np.inf, np.float32)
    for down in range(tall):
        for across in range(broad):  # of equally near values the first in row-major order counts
            i, j = first_row + down, first_column + across
            inside = ((i >= 0) & (i < depth.shape[0]))[:, None] & ((j >= 0) & (j < depth.shape[1]))
            value = depth[np.ix_(i.clip(0, depth.shape[0] - 1), j.clip(0, depth.shape[1] - 1))]
            gap_y = (i + np.float32(0.5) - rows).astype(np.float32)
            gap_x = (j + np.float32(0.5) - columns).astype(np.float32)
            squared = np.square(gap_x) + np.square(gap_y)[:, None]
            better = inside & np.isfinite(value) & (squared < nearest)
            out[better], nearest[better] = value[better], squared[better]
    return out


def _source_windows(length: int, wanted: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Per axis: the new pixels' centers in source pixels (float32), the start of each window, and its length."""
    size = max(1, length / wanted)
    centers = _pixel_centers(wanted) * np.float32(length)
    return centers, np.round(centers - np.float32(size / 2)).astype(np.int64), math.ceil(size)


def _pixel_centers(count: int) -> np.ndarray:
    """Pixel centers as fractions of a side, float32 (count,)."""
    return np.linspace(0.5 / count, 1 - 0.5 / count, count, dtype=np.float32)


def _pixel_rays(width: int, height: int) -> np.ndarray:
    """Pixel centers as homogeneous fractions of the sides, float32 (height,width,3)."""
    u, v = np.meshgrid(_pixel_centers(width), _pixel_centers(height))
    return np.stack([u, v, np.ones_like(u)], -1)


def _rotation_to_z(axis: np.ndarray) -> np.ndarray:
    """The smallest rotation that maps a direction to (0, 0, 1), float32 (3,3)."""
    x, y, z = axis / np.linalg.norm(axis)
    if z <= -1 + 1e-6:
        raise ValueError("its camera looks backwards")
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]], np.float32)  # of the cross product (y, -x, 0)
    return np.eye(3, dtype=np.float32) + cross + (1 / (1 + z)) * (cross @ cross)


def _view_size(
    camera: np.ndarray, inverse: np.ndarray, turn: np.ndarray, aspect: float
) -> tuple[np.floating[Any], np.floating[Any]]:
    """Width and height, at distance 1, of the widest view of this aspect ratio that the rotated image fills."""
    raw_wide, raw_high = abs(1 / camera[0, 0]), abs(1 / camera[1, 1])
    wide = min(raw_wide, raw_high * aspect)
    high = wide / aspect
    corners = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]], np.float32) @ (inverse.T @ turn.T)
    if (corners[:, 2] <= 0).any():
        raise ValueError("its camera has a field of view of 180 degrees or more")
    corners = corners[:, :2] / corners[:, 2:]
    for number, end in enumerate(corners):
        begin = corners[number - 1]
        for diagonal in (np.array([aspect, 1.0]), np.array([aspect, -1.0])):
            x, y = _intersection(diagonal, begin, end - begin)
            wide, high = min(wide, 2 * abs(x)), min(high, 2 * abs(y))
    if not (0 < wide < float("inf") and 0 < high < float("inf")):
        raise ValueError("its camera sees nothing")
    return wide, high


def _intersection(diagonal: np.ndarray, begin: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Intersect the line along `diagonal` through the origin with the line along `edge` through `begin`, float64 (2,).

    By damped least squares, as MoGe's loader: the damping changes last digits that decide the size of the image.
    """
    lines = np.zeros((4, 4))
    lines[:2, :2] = lines[2:, :2] = np.eye(2)
    lines[:2, 2], lines[2:, 3] = -diagonal, -edge.astype(np.float64)
    offset = np.array([0, 0, *begin], np.float64)
    return np.linalg.solve(lines.T @ lines + 1e-12 * np.eye(4), lines.T @ offset)[:2]


def _ray_lengths(inverse: np.ndarray, width: int, height: int) -> np.ndarray:
    """Length of the ray through each pixel center at depth 1, float32 (height,width)."""
    return np.sqrt(np.square(_pixel_rays(width, height) @ inverse.T).sum(-1))


def _parse_intrinsics(data: bytes) -> np.ndarray:
    """Read the intrinsics of a meta.json, float64 (3,3)."""
    try:
        camera = np.array(json.loads(data)["intrinsics"], np.float64)
    except (ValueError, KeyError, TypeError):
        raise ValueError("its meta.json has no intrinsics") from None
    good = camera.shape == (3, 3) and np.isfinite(camera).all() and min(camera[0, 0], camera[1, 1]) > 0
    if not good or camera[2].tolist() != [0, 0, 1]:
        raise ValueError(f"its meta.json has the intrinsics {camera.tolist()}")
    return camera


def _make_benchmark(name: str) -> Benchmark:
    folder, width, height, images, licence = _SETS[name]
    return Benchmark(
        name=name,
        title=f"{folder} of MoGe's bundle, {width} x {height}",
        images=images,
        layout=f"{folder}/{INDEX_FILE} and image.jpg, depth.png, meta.json in the folders it names",
        get=f"{_GET} ({folder}.zip)",
        licence=licence,
        find=partial(find, name=name),
        read=partial(read, name=name),
        depth_limits={"moge": DepthLimits(0.0, float("inf"))},
        sharp=name in _SETS_WITH_BOUNDARIES,
    )


(
    MOGE_NYU,
    MOGE_KITTI,
    MOGE_ETH3D,
    MOGE_IBIMS,
    MOGE_GSO,
    MOGE_SINTEL,
    MOGE_DDAD,
    MOGE_DIODE,
    MOGE_SPRING,
    MOGE_HAMMER,
) = map(_make_benchmark, _SETS)
