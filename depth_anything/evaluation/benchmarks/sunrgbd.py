"""SUN RGB-D, its test split: indoor scenes, four depth sensors.

Layout: SUNRGBD/kv1/NYUdata/NYU0001/ (and kv2, realsense, xtion), a folder per frame, with one JPEG in image, one PNG in
depth and one in depth_bfx, sometimes under another name; 561 x 427 to 730 x 530 pixels. The split is allsplit.mat of
the authors' toolbox; it is read from a text with a line per test image, in the folder of SUNRGBD, the first of:
    sunrgbd_testing_images.txt      of https://github.com/ankurhanda/sunrgbd-meta-data
    SUNRGBD_val_splits.txt          of https://github.com/zhyever/Monocular-Depth-Estimation-Toolbox, splits/

Depth: 16 bits, millimeters rotated left by three bits: mm = v >> 3 | v << 13, as read3dPoints.m of that toolbox; 0 is
unknown. depth is the sensor's measurement (`sunrgbd`), depth_bfx is inpainted (`sunrgbd_filled`). Few papers say which
they use: Monocular-Depth-Estimation-Toolbox uses the measured one, github.com/kmatzen/plumbline the inpainted one, with
which it comes close to Depth Pro's figure. The toolbox sets depth beyond 8 m to 8 m, where nobody compares it.

Depth Anything V1 used other files (its issue 38): `sunrgbd_v1`, rgb/img-000001.jpg with depth/1.png, linked as "test
data for depth" by sunrgbd-meta-data, and divides them by 10,000 (metric_depth/zoedepth/data/sun_rgbd_loader.py). By
plumbline's measurement these are the original values, not rotated back: v / 8,000 would be meters, so the ground truth
of V1's figures is 1.25 times too near (and ZoeDepth's .520 in V1's table is .119 in ZoeDepth's own). They are read as
V1 reads them, only to compare with its figures. Not confirmed: whether they are of depth or of depth_bfx, and whether
their images are stretched to 730 x 530, as plumbline says.

Counts: 5,050 of 10,335. `zoedepth` compares 0 to 8 m in ZoeDepth's crop (zoedepth/utils/config.py); the range of `da2`
is our choice.

License: none stated. Get it from https://rgbd.cs.princeton.edu (SUNRGBD.zip). Paper: Song et al., CVPR 2015.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    require_lines,
    resolve_root,
)
from depth_anything.ingest.file_list import escape_field
from depth_anything.ingest.frame_files import split_fields
from depth_anything.ingest.maps import read_bytes, read_png16

LIST_FILES = ("sunrgbd_testing_images.txt", "SUNRGBD_val_splits.txt")
_FOLDER = "SUNRGBD"
_LIST_FROM = "https://github.com/ankurhanda/sunrgbd-meta-data"
_GET = f"https://rgbd.cs.princeton.edu (SUNRGBD.zip), and {LIST_FILES[0]} from {_LIST_FROM}"
_IMAGE = re.compile(r"img-(\d{6})\.jpg")
_V1_GET = f"{_LIST_FROM} (SUNRGBD-test_images.tgz as rgb, sunrgb_test_depth.tgz as depth)"


def find(root: Path, *, depth: str) -> Iterator[str]:
    """List the frames of the test split that are there, in the list's order.

    Args:
        root: folder of SUNRGBD and the list.
        depth: "depth" or "depth_bfx".

    Raises:
        ValueError: the list is missing or damaged, or none of its frames is there.
    """
    root = resolve_root(root, "sunrgbd")
    path = next((root / name for name in LIST_FILES if (root / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{root} does not hold {LIST_FILES[0]}, the list of the compared frames",
            f"get it from {_LIST_FROM}",
        )
    listed = (line for image in _read_list(path) for line in _frame_line(root, image, depth))
    return require_lines(
        listed,
        f"{root} holds none of the frames of {path.name}: looked for {_FOLDER}/kv1",
        f"get it from {_GET}",
    )


def read(root: Path, line: str, *, depth: str) -> Frame:
    """Read a frame; ValueError if image or depth is missing or damaged, or sizes differ."""
    name, image, path = split_fields(line)
    root = resolve_root(root, "sunrgbd")
    key = f"sunrgbd{'' if depth == 'depth' else '_filled'}/{name}"
    with prefix_errors(key):
        if not path:
            raise ValueError(f"its depth is missing or ambiguous: its folder {depth} needs exactly one PNG")
        meters = decode_millimeters(read_png16(root / path)).astype(np.float32) / 1000
        return make_frame(key, read_bytes(root / image), meters)


def decode_millimeters(values: np.ndarray) -> np.ndarray:
    """Decode the values of the original PNGs to millimeters, uint16: the three lowest bits become the highest."""
    return (values >> 3) | (values << 13)


def find_v1(root: Path) -> Iterator[str]:
    """List V1's frames sorted by number; ValueError if there is none."""
    root = resolve_root(root)
    names = sorted(path.name for path in (root / "rgb").glob("img-*.jpg"))
    numbers = [match[1] for name in names if (match := _IMAGE.fullmatch(name))]
    lines = (f"{number}\trgb/img-{number}.jpg\tdepth/{int(number)}.png" for number in numbers)
    return require_lines(
        lines, f"{root} does not hold V1's SUN RGB-D: looked for rgb/img-000001.jpg", f"get it from {_V1_GET}"
    )


def read_v1(root: Path, line: str) -> Frame:
    """Read a frame with its depth as V1 reads it; ValueError if image or depth is missing or damaged."""
    name, image, depth = split_fields(line)
    with prefix_errors(f"sunrgbd_v1/{name}"):
        meters = read_png16(Path(root, depth)).astype(np.float32) / 10_000
        return make_frame(f"sunrgbd_v1/{name}", read_bytes(Path(root, image)), meters, same_size=False)


def _read_list(path: Path) -> Iterator[PurePosixPath]:
    """The images of a list, relative to SUNRGBD."""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        image = PurePosixPath((text.split() or [""])[0])
        if image.parts[:1] != (_FOLDER,) or image.parts[-2:-1] != ("image",) or ".." in image.parts:
            raise ValueError(f"{path}, line {number}: {text!r:.200} is not {_FOLDER}/…/image/….jpg")
        yield image.relative_to(_FOLDER)


def _frame_line(root: Path, image: PurePosixPath, depth: str) -> Iterator[str]:
    """The line of a frame, if its folder is there."""
    inside = f"{_FOLDER}/" if (root / _FOLDER).is_dir() else ""
    folder = f"{inside}{image.parent.parent}"
    if (root / folder).is_dir():
        maps = sorted(path.name for path in (root / folder / depth).glob("*.png"))
        names = [f"{image.stem}.png"] if f"{image.stem}.png" in maps else maps
        place = f"{folder}/{depth}/{names[0]}" if len(names) == 1 else ""
        yield "\t".join(map(escape_field, [str(image.parent.parent), f"{inside}{image}", place]))


def _make_benchmark(name: str, title: str, depth: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        images=5050,
        layout=f"{_FOLDER}/kv1/NYUdata/NYU0001/ with image and {depth}, and {LIST_FILES[0]}",
        get=_GET,
        licence="LicenseRef-SUN-RGB-D",
        find=partial(find, depth=depth),
        read=partial(read, depth=depth),
        depth_limits={"da2": DepthLimits(1e-3, 8), "zoedepth": _ZOEDEPTH_LIMITS},
    )


_ZOEDEPTH_LIMITS = DepthLimits(0, 8, eval_crop="eigen_pixels")
SUNRGBD = _make_benchmark("sunrgbd", "SUN RGB-D, as measured", "depth")
SUNRGBD_FILLED = _make_benchmark("sunrgbd_filled", "SUN RGB-D, filled in", "depth_bfx")
SUNRGBD_V1 = Benchmark(
    name="sunrgbd_v1",
    title="SUN RGB-D as Depth Anything V1 reads it",
    images=5050,
    layout="rgb/img-000001.jpg with depth/1.png",
    get=_V1_GET,
    licence="LicenseRef-SUN-RGB-D",
    find=find_v1,
    read=read_v1,
    depth_limits={"zoedepth": _ZOEDEPTH_LIMITS},
)
