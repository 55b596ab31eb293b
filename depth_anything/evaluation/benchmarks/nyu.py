"""NYU Depth V2, Eigen's 654 test frames: indoor scenes, Kinect.

Layouts, tried in this order:
    nyu_depth_v2_labeled.mat    the original file, MATLAB 7.3 (HDF5), arrays transposed, meters:
                                images (1449, 3, 640, 480), rawDepths and depths (1449, 640, 480)
    rgb_00045.jpg, sync_depth_00045.png             extracted by BTS: rawDepths, counted from 0
    rgb_0046.png, depth_0046.png, filled_0046.png   by Marigold: rawDepths and depths, counted from 1
    val/official/00046.h5                           by FastDepth: rgb (3, 480, 640) and depth, from 1
The PNGs have 16 bits, millimeters.

Depth: rawDepths is the Kinect's measurement, 0 where it is missing: that is `nyu`, and that of the published figures.
depths is inpainted with the colors: that is `nyu_filled`, on which the same model has at least a fifth more error. Rows
45 to 471 and columns 41 to 601 are compared. Marigold's figures are on the measured depth, and its download has it
under both names (prs-eth/Marigold, issue 114): a PNG named filled that has holes is refused.

BTS's extraction blackens the image outside rows 7 to 474 and columns 7 to 632, which the network sees.

License: none stated by the authors. Get it from https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html (2.8 GB). The
654 are testNdxs of their splits.mat.
"""

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from depth_anything.data.sample import Frame
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
from depth_anything.ingest.find_files import walk_files
from depth_anything.ingest.frame_files import split_fields
from depth_anything.ingest.maps import check_hdf5_cost, find_hdf5_dataset, read_hdf5, read_png16

MATLAB_FILE = "nyu_depth_v2_labeled.mat"
_TEST_FRAMES = (
    "0-1 8 13-17 20 27-42 45-46 55-56 58-62 75-78 83-90 116-118 124-128 130-133 136 152-154 166-168 170-175 179-201 "
    "206-211 219-221 249 263 270-272 278-284 295-301 309-311 314-316 324-334 350-351 354-363 383-389 394-396 410-413 "
    "429-434 440-447 461-465 468-476 507-512 514-525 530-532 536-538 548-550 554-570 578-582 590-593 602-606 611-612 "
    "616-620 632-637 643-644 649-650 655-657 662-663 667-672 675-680 685-689 692-693 696-698 705-712 716-717 723-727 "
    "730-733 742-743 758-786 799-803 809-813 820-822 832-845 849-851 856-861 868-870 905-907 916-918 925-927 931-934 "
    "944-946 958-961 964-966 969-976 990-994 1000-1003 1009-1011 1020-1022 1031-1033 1037-1038 1047-1048 1051-1052 "
    "1056-1057 1074-1083 1087-1095 1097-1103 1105-1108 1116-1118 1122-1130 1134-1135 1143-1157 1161-1166 1169-1170 "
    "1173-1175 1178-1183 1191-1195 1200-1211 1215-1219 1225-1229 1232-1234 1246-1249 1253-1264 1274-1279 1284-1294 "
    "1296-1298 1301-1307 1313-1314 1328-1331 1334-1339 1346-1348 1352-1355 1363-1364 1367-1368 1383-1390 1393-1400 "
    "1406-1413 1420-1423 1429-1432 1440-1448"
)
_MATLAB_FIELDS = {"raw": "rawDepths", "filled": "depths"}
# Name of the depth file → its field, the offset of its number from the .mat file's, and possible names of the image.
_EXTRACTED_LAYOUTS = (
    (re.compile(r"sync_depth_(\d{5})\.png"), "raw", 0, ("rgb_{}.jpg", "rgb_{}.png")),
    (re.compile(r"depth_(\d{4})\.png"), "raw", 1, ("rgb_{}.png", "rgb_{}.jpg")),
    (re.compile(r"filled_(\d{4})\.png"), "filled", 1, ("rgb_{}.png", "rgb_{}.jpg")),
    (re.compile(r"(\d{5})\.h5"), "filled", 1, ("{}.h5",)),
)
_GET = f"https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html ({MATLAB_FILE}, 2.8 GB)"


@lru_cache(maxsize=1)
def eigen_test_frames() -> tuple[int, ...]:
    """The numbers of Eigen's 654 test frames in the original file, from 0."""
    runs = (run.partition("-") for run in _TEST_FRAMES.split())
    return tuple(number for first, _, last in runs for number in range(int(first), int(last or first) + 1))


_META = {"intrinsics": {"fx": 518.85790, "fy": 519.46961, "cx": 325.58245, "cy": 253.73617}}
"""Of the color camera, pixels at 640 x 480: camera_params.m of the authors' toolbox."""


def find(root: Path, *, depth: str) -> Iterator[str]:
    """List those of the 654 frames that are there, sorted by number.

    Args:
        root: folder of the file, or of the extracted frames at any depth below.
        depth: "raw" or "filled".

    Raises:
        ValueError: no such folder, or no file of these layouts in it.
    """
    root = resolve_root(root, "nyu")
    wanted = set(eigen_test_frames())
    if (root / MATLAB_FILE).is_file():
        return (f"{number:05d}\t{MATLAB_FILE}" for number in eigen_test_frames())
    found: dict[int, str] = {}
    names = [
        (name, folder)
        for path, _ in walk_files(root, follow=True)
        for folder, _, name in [path.rpartition("/")]
    ]
    for pattern, kind, offset, images in _EXTRACTED_LAYOUTS:
        for name, folder in names:
            match = pattern.fullmatch(name) if kind == depth and not found.keys() >= wanted else None
            number = int(match[1]) - offset if match else -1
            if match and number in wanted and number not in found and "train" not in folder.split("/"):
                candidates = [f"{folder}/{image.format(match[1])}".lstrip("/") for image in images]
                image = next((path for path in candidates if (root / path).is_file()), candidates[0])
                found[number] = "\t".join(
                    map(escape_field, [f"{number:05d}", f"{folder}/{name}".lstrip("/"), image])
                )
        if found:
            break
    if not found:
        raise UserError(
            f"{root} does not hold NYU Depth V2: looked for {MATLAB_FILE}, or {_example_files(depth)} below it",
            f"get it from {_GET}",
        )
    return iter([found[number] for number in sorted(found)])


def read(root: Path, line: str, *, depth: str) -> Frame:
    """Read a frame; ValueError if it is missing or damaged."""
    name, path, *image = split_fields(line)
    root = resolve_root(root, "nyu")
    key = f"nyu{'' if depth == 'raw' else '_filled'}/{name}"
    with prefix_errors(f"{key} ({path})"):
        if path == MATLAB_FILE:
            image_and_depth = _read_matlab(str(Path(root, path)), int(name), _MATLAB_FIELDS[depth])
            return make_frame(key, *image_and_depth, meta=dict(_META))
        if path.endswith(".h5"):
            meters = read_hdf5(Path(root, path), "depth")
            return make_frame(key, _read_rgb(Path(root, path)), meters, meta=dict(_META))
        meters = read_png16(Path(root, path)).astype(np.float32) / 1000
        if depth == "filled" and not meters.all():
            raise ValueError(
                "it has holes, so it is the measured depth under another name: use the benchmark nyu"
            )
        return make_frame(key, read_file(root, image[0]), meters, meta=dict(_META))


@lru_cache(maxsize=1)
def _open_matlab(path: str) -> Any:
    return h5py.File(path, "r", locking=False)


def _read_matlab(path: str, number: int, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Image and depth of the original file, upright."""
    try:
        file = _open_matlab(path)
        images, depths = (find_hdf5_dataset(file, name) for name in ("images", field))
        for dataset in (images, depths):
            check_hdf5_cost(dataset, number)
        image, depth = images[number], depths[number]
    except Exception as error:  # damage makes the library raise a dozen types
        raise ValueError(f"the file cannot be read: {error.args[0] if error.args else error!r}") from error
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != np.uint8 or depth.shape != image.shape[1:]:
        raise ValueError(f"images {image.shape} and {field} {depth.shape} do not have the published shapes")
    return np.ascontiguousarray(image.transpose(2, 1, 0)), np.ascontiguousarray(depth.T)


def _read_rgb(path: Path) -> np.ndarray:
    """The image of an HDF5 file with a single frame."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            dataset = find_hdf5_dataset(file, "rgb")
            check_hdf5_cost(dataset)
            image = dataset[()]
    except Exception as error:
        raise ValueError(f"its rgb cannot be read: {error.args[0] if error.args else error!r}") from error
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != np.uint8:
        raise ValueError(f"its rgb of shape {image.shape} is not 3 x H x W bytes")
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def _example_files(depth: str) -> str:
    names = {"raw": "sync_depth_00045.png or depth_0046.png", "filled": "filled_0046.png or 00046.h5"}
    return names[depth]


def _make_benchmark(name: str, title: str, depth: str, depth_limits: dict[str, DepthLimits]) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        images=654,
        layout=f"{MATLAB_FILE}, or {_example_files(depth)} with its image",
        get=_GET,
        licence="LicenseRef-NYU-Depth-V2",
        find=partial(find, depth=depth),
        read=partial(read, depth=depth),
        depth_limits=depth_limits,
    )


_INDOOR_LIMITS = DepthLimits(1e-3, 10, eval_crop="eigen_nyu")
NYU = _make_benchmark(
    "nyu",
    "NYU Depth V2, as measured",
    "raw",
    {"da2": _INDOOR_LIMITS, "marigold": _INDOOR_LIMITS, "zoedepth": _INDOOR_LIMITS},
)
NYU_FILLED = _make_benchmark("nyu_filled", "NYU Depth V2, filled in", "filled", {"da2": _INDOOR_LIMITS})
