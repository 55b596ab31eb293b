"""The bundle of MoGe: ten benchmarks in one format, for everyone to fetch; others reproduce its figures.

Layout: a folder a set (NYUv2, KITTI, ETH3D, iBims-1, GSO, Sintel, DDAD, DIODE, Spring, HAMMER), with
.index.txt, a line a frame, which is the path of a folder with image.jpg, depth.png and meta.json.

Depth: a PNG of 16 bits with two texts, near and far: 0 is not known, 65535 infinite, and v between them
near^(1-t) · far^t with t = (v - 1) / 65533. meta.json has the intrinsics as shares of width and height.

Images and depth are no others than the sets' own, but each is warped to a size of its set before it is shown:
to a camera that looks along the ray of the image's centre, with square pixels and the widest view that the
image fills. The image is first brought to about the size of the target's pixels (Lanczos), then warped
(linear); the depth is made distance, warped with it (nearest), and made depth along the new axis. In the
first step every known depth goes to the pixel that it falls into, the one nearest to that pixel's centre
where several do: sparse depth is not thinned by chance, and where pixels get smaller none counts twice, the
others being unknown. What is farther than 1000 times the nearest hundredth is dropped.

Sizes, counts and figures are therefore others than on the sets' own files: a number of the one says nothing
of the other.

Licences are the sets' own. Get it from
https://huggingface.co/datasets/Ruicheng/monocular-geometry-evaluation; facts from arXiv 2410.19115 and
https://github.com/microsoft/MoGe (MIT), moge/test/dataloader.py.
"""

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

from depth_anything.data.sample import Frame, decode_image
from depth_anything.data.sources.folders import fields
from depth_anything.data.sources.listing import as_field
from depth_anything.data.sources.maps import read_png16
from depth_anything.evaluation.benchmarks.benchmark import Benchmark, Caps
from depth_anything.evaluation.benchmarks.frames import about, make_frame, read_named, root_of

INDEX = ".index.txt"
_GET = "https://huggingface.co/datasets/Ruicheng/monocular-geometry-evaluation"
_DROP = 1000.0
# Name here → folder, width, height, images (0: not published), licence.
_SETS: dict[str, tuple[str, int, int, int, str]] = {
    "moge_nyu": ("NYUv2", 640, 480, 654, "LicenceRef-NYU-Depth-V2"),
    "moge_kitti": ("KITTI", 750, 375, 652, "CC-BY-NC-SA-3.0"),
    "moge_eth3d": ("ETH3D", 2048, 1365, 453, "CC-BY-NC-SA-4.0"),
    "moge_ibims": ("iBims-1", 640, 480, 100, "LicenceRef-iBims-1"),
    "moge_gso": ("GSO", 512, 512, 1030, "CC-BY-4.0"),
    "moge_sintel": ("Sintel", 872, 436, 1064, "LicenceRef-MPI-Sintel"),
    "moge_ddad": ("DDAD", 1400, 700, 1000, "CC-BY-NC-SA-4.0"),
    "moge_diode": ("DIODE", 1024, 768, 771, "MIT"),
    "moge_spring": ("Spring", 1920, 1080, 0, "CC-BY-4.0"),
    "moge_hammer": ("HAMMER", 1664, 832, 0, "LicenceRef-HAMMER"),
}

_SHARP = ("moge_ibims", "moge_sintel", "moge_spring", "moge_hammer")  # where MoGe scores boundaries


def find(root: Path, *, name: str) -> Iterator[str]:
    """List the frames of a set in the order of its index; ValueError if it is not there.

    Args:
        root: The bundle's folder, or the set's own.
        name: One of the sets'.
    """
    folder = _SETS[name][0]
    root = root_of(root, "moge")
    place = next((place for place in (root / folder, root) if (place / INDEX).is_file()), None)
    if place is None or (place == root and root.name != folder and (root / folder).exists()):
        raise ValueError(
            f"{root} does not hold {folder}: looked for {folder}/{INDEX}; get {folder}.zip from {_GET}"
        )
    below = f"{folder}/" if place != root else ""
    for text in (place / INDEX).read_text(encoding="utf-8").splitlines():
        if text.strip():
            yield "\t".join(map(as_field, [text.strip(), f"{below}{text.strip()}"]))


def read(root: Path, line: str, *, name: str) -> Frame:
    """Read a frame and warp it to its set's size; ValueError if a file is missing or damaged."""
    frame, place = fields(line)
    _, width, height, _, _ = _SETS[name]
    root = root_of(root, "moge")
    with about(f"{name}/{frame}"):
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            raise ValueError("its path leads out of the bundle")
        image = decode_image(read_named(root, f"{place}/image.jpg"))
        depth = read_depth(read_named(root, f"{place}/depth.png"))
        camera = _intrinsics(read_named(root, f"{place}/meta.json"))
        if image.shape[:2] != depth.shape:
            raise ValueError(f"its image is {image.shape[:2]}, its depth {depth.shape}")
        image, depth, camera = warp(image, depth, camera, width=width, height=height)
        metres = np.where(np.isfinite(depth), depth, np.nan)
        known = metres <= np.nanquantile(metres, 0.01) * _DROP if np.isfinite(metres).any() else None
        return make_frame(f"{name}/{frame}", image, metres, known=known, meta={"intrinsics": camera.tolist()})


def read_depth(data: bytes) -> np.ndarray:
    """Decode the bundle's depth to float32 (H, W), NaN where it is not known and +inf; ValueError if it is damaged."""
    values = read_png16(data)
    text = PngImagePlugin.PngImageFile(io.BytesIO(data)).text
    try:
        near, far = float(text["near"]), float(text["far"])
    except (KeyError, ValueError):
        raise ValueError("its depth.png has no near and far") from None
    if not 0 < near <= far < float("inf"):
        raise ValueError(f"its depth.png lies between {near} and {far}")
    share = (values.astype(np.float64) - 1) / 65533
    depth = near ** (1 - share) * far**share
    return np.select([values == 0, values == 65535], [np.nan, np.inf], depth).astype(np.float32)


def warp(
    image: np.ndarray, depth: np.ndarray, camera: np.ndarray, *, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Show an image and its depth to a camera that looks along the ray of the image's centre.

    Args:
        image: uint8 (H, W, 3).
        depth: float (H, W), along the axis; NaN and inf stay what they are.
        camera: float64 (3, 3), intrinsics as shares of width and height.
        width: Of the result.
        height: Of the result.

    Returns:
        uint8 (height, width, 3), float32 (height, width) and the new intrinsics, float64 (3, 3).

    Raises:
        ValueError: If the camera sees nothing.
    """
    inverse = np.linalg.inv(camera)
    turn = _turn(inverse @ [0.5, 0.5, 1.0])
    wide, high = _view(inverse, turn, width / height)
    new = np.array([[1 / wide, 0, 0.5], [0, 1 / high, 0.5], [0, 0, 1]])
    # Pixels of about the target's size, seen from the old camera.
    near_width = max(1, int(width * inverse[0, 0] / wide + 1e-6))
    near_height = max(1, int(height * inverse[1, 1] / high + 1e-6))
    image = np.asarray(Image.fromarray(image).resize((near_width, near_height), Image.Resampling.LANCZOS))
    distance = _resize_known(depth, near_width, near_height) * _ray_lengths(inverse, near_width, near_height)
    u, v = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    rays = np.stack([*np.meshgrid(u, v), np.ones((height, width))], -1)
    seen = rays @ (camera @ turn.T @ np.linalg.inv(new)).T
    x = (seen[..., 0] / seen[..., 2] * near_width - 0.5).astype(np.float32)
    y = (seen[..., 1] / seen[..., 2] * near_height - 0.5).astype(np.float32)
    warped = cv2.remap(image, x, y, cv2.INTER_LINEAR)
    lost = float("nan")
    far = cv2.remap(
        distance.astype(np.float32), x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=lost
    )
    return warped, (far / _ray_lengths(np.linalg.inv(new), width, height)).astype(np.float32), new


def _turn(axis: np.ndarray) -> np.ndarray:
    """The rotation that brings a direction to (0, 0, 1) by the shortest way, float64 (3, 3)."""
    x, y, z = axis / np.linalg.norm(axis)
    if z <= -1 + 1e-9:
        raise ValueError("its camera looks backwards")
    return np.array(
        [[1 - x * x / (1 + z), -x * y / (1 + z), -x], [-x * y / (1 + z), 1 - y * y / (1 + z), -y], [x, y, z]]
    )


def _view(inverse: np.ndarray, turn: np.ndarray, aspect: float) -> tuple[float, float]:
    """Width and height, at distance 1, of the widest view of this aspect that the turned image fills."""
    wide = min(inverse[0, 0], inverse[1, 1] * aspect)
    corners = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]]) @ (turn @ inverse).T
    if (corners[:, 2] <= 0).any():
        raise ValueError("its camera sees more than half of everything")
    corners = corners[:, :2] / corners[:, 2:]
    for begin, end in zip(corners, np.roll(corners, -1, 0), strict=True):
        edge = end - begin
        for diagonal in (np.array([aspect, 1.0]), np.array([aspect, -1.0])):
            # Where the diagonal of the view meets the edge's line: t · diagonal = begin + s · edge.
            across = diagonal[0] * edge[1] - diagonal[1] * edge[0]
            if across:
                t = (begin[0] * edge[1] - begin[1] * edge[0]) / across
                wide = min(wide, 2 * abs(t) * aspect)
    if not 0 < wide < float("inf"):
        raise ValueError("its camera sees nothing")
    return wide, wide / aspect


def _ray_lengths(inverse: np.ndarray, width: int, height: int) -> np.ndarray:
    """Length of the ray through each pixel's centre to where its depth is 1, float64 (height, width)."""
    u, v = (np.arange(width) + 0.5) / width, (np.arange(height)[:, None] + 0.5) / height
    rows = [row[0] * u + row[1] * v + row[2] for row in inverse]
    return np.sqrt(sum(row * row for row in rows)) / rows[2]


def _resize_known(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bring each finite value to the pixel it falls into; the nearest to its centre wins, others are NaN."""
    rows, columns = np.nonzero(np.isfinite(values))
    y = (rows + 0.5) * (height / values.shape[0])
    x = (columns + 0.5) * (width / values.shape[1])
    i, j = np.minimum(y.astype(int), height - 1), np.minimum(x.astype(int), width - 1)
    order = np.argsort(-((y - i - 0.5) ** 2 + (x - j - 0.5) ** 2), kind="stable")
    out = np.full((height, width), np.nan)
    out[i[order], j[order]] = values[rows[order], columns[order]]  # the last one written stays
    return out


def _intrinsics(data: bytes) -> np.ndarray:
    """Intrinsics of a meta.json, float64 (3, 3)."""
    try:
        camera = np.array(json.loads(data)["intrinsics"], np.float64)
    except (ValueError, KeyError, TypeError):
        raise ValueError("its meta.json has no intrinsics") from None
    good = camera.shape == (3, 3) and np.isfinite(camera).all() and min(camera[0, 0], camera[1, 1]) > 0
    if not good or camera[2].tolist() != [0, 0, 1]:
        raise ValueError(f"its meta.json has the intrinsics {camera.tolist()}")
    return camera


def _benchmark(name: str) -> Benchmark:
    folder, width, height, images, licence = _SETS[name]
    return Benchmark(
        name=name,
        title=f"{folder} of MoGe's bundle, {width} x {height}",
        images=images,
        layout=f"{folder}/{INDEX} and image.jpg, depth.png, meta.json in the folders it names",
        get=f"{_GET} ({folder}.zip)",
        licence=licence,
        find=partial(find, name=name),
        read=partial(read, name=name),
        caps={"moge": Caps(0.0, float("inf"))},
        sharp=name in _SHARP,
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
) = map(_benchmark, _SETS)
