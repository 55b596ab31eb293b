"""KITTI, Eigen's test frames with the improved ground truth: drives, sparse LiDAR.

Layout: raw data as 2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png (or jpg) and annotated depth as
2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png, at any depth below the root, in one tree or
in two. Some 1242 x 375 pixels.

Depth: planar, 16 bits, meters × 256; 0 is unknown, which is four of five pixels.

Frames: 652 of Eigen's 697 (arXiv 1406.2283) have improved ground truth (Uhrig et al., arXiv 1708.06500), 491 of them in
its folder train and 161 in val. The list is `EIGEN_FRAMES`, that of monodepth2's splits/eigen_benchmark.

License: CC BY-NC-SA 3.0. Get it from https://www.cvlibs.net/datasets/kitti: the raw drives of the list and
data_depth_annotated.zip (14 GB); the listed frames alone are some 6 GB.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    require_lines,
    resolve_root,
)
from depth_anything.ingest.frame_files import FilePattern, find_frames, read_frame_file, split_fields
from depth_anything.ingest.maps import read_png16
from depth_anything.ingest.source import DatasetInfo

EIGEN_FRAMES = {
    "2011_09_26_drive_0002_sync": "6-63/3 69",
    "2011_09_26_drive_0009_sync": "16-176/16 196-388/16",
    "2011_09_26_drive_0013_sync": "5-10/5 20 30-50/5 60-70/5 80-135/5",
    "2011_09_26_drive_0020_sync": "6-21/3 27 33-36/3 42-78/3",
    "2011_09_26_drive_0023_sync": "18-216/18 252-468/18",
    "2011_09_26_drive_0027_sync": "7-98/7 112-147/7 161-182/7",
    "2011_09_26_drive_0029_sync": "14-196/14 268 296-408/14",
    "2011_09_26_drive_0036_sync": "32-704/32 768",
    "2011_09_26_drive_0046_sync": "5-115/5",
    "2011_09_26_drive_0048_sync": "5-16/1",
    "2011_09_26_drive_0052_sync": "6-22/2 26-32/2 36-52/2",
    "2011_09_26_drive_0056_sync": "11-121/11 143-286/11",
    "2011_09_26_drive_0059_sync": "14-154/14 182-238/14 274-358/14",
    "2011_09_26_drive_0064_sync": "22-110/22 154-550/22",
    "2011_09_26_drive_0084_sync": "49-153/13 179-374/13",
    "2011_09_26_drive_0086_sync": "7-520/27 574-682/27",
    "2011_09_26_drive_0093_sync": "16-256/16 305-417/16",
    "2011_09_26_drive_0096_sync": "19-456/19",
    "2011_09_26_drive_0101_sync": "80-216/34 284-930/34",
    "2011_09_26_drive_0106_sync": "15 35-219/8",
    "2011_09_26_drive_0117_sync": "26-494/26 546-650/26",
    "2011_09_28_drive_0002_sync": "6-12/3 18-24/3 30-39/3 45-63/3 72 78-90/3",
    "2011_09_29_drive_0071_sync": "36-612/36 735-807/36 879-951/36",
    "2011_09_30_drive_0016_sync": "11-88/11 110-264/11",
    "2011_09_30_drive_0018_sync": "107-214/107 428-2247/107 2419-2740/107",
    "2011_09_30_drive_0027_sync": "41-656/41 753-958/41 1040-1081/41",
    "2011_10_03_drive_0027_sync": "181-543/181 734-2001/181 2363-4535/181",
    "2011_10_03_drive_0047_sync": "32-224/32 288-800/32",
}
"""Drive → the numbers of its frames: FIRST-LAST/STEP, or a single number."""

FOCAL_PX = {
    "2011_09_26": 721.5377,
    "2011_09_28": 707.0493,
    "2011_09_29": 718.3351,
    "2011_09_30": 707.0912,
    "2011_10_03": 718.856,
}
"""Day → focal length of the rectified color images: P_rect_02 of its calib_cam_to_cam.txt."""

_DRIVE = re.compile(r"\d{4}_\d\d_\d\d_drive_\d{4}_sync")
_IMAGE = FilePattern("image", "image_02/data", r"(\d{10})\.(?:png|jpg)")
_DEPTH = FilePattern("depth", "proj_depth/groundtruth/image_02", r"(\d{10})\.png")
_INFO = DatasetInfo(
    name="kitti",
    title="KITTI, Eigen's 652 frames",
    records=652,
    layout="2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png with "
    "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png",
    get="https://www.cvlibs.net/datasets/kitti (raw drives and data_depth_annotated.zip; 6 GB for the frames alone)",
    licence="CC-BY-NC-SA-3.0",
)


def frame_numbers(drive: str) -> list[int]:
    """The frame numbers of a drive in the list, ascending; empty for other drives."""
    numbers: list[int] = []
    for run in EIGEN_FRAMES.get(drive, "").split():
        first, _, rest = run.partition("-")
        last, _, step = rest.partition("/")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return numbers


def find(root: Path) -> Iterator[str]:
    """List those of the 652 frames that are there, sorted by drive and number; ValueError if none is."""
    wanted = {f"{drive}/{number:010d}" for drive in EIGEN_FRAMES for number in frame_numbers(drive)}
    lines = find_frames(resolve_root(root), _INFO, (_IMAGE, _DEPTH), sequence=_drive_name)
    listed = (line for line in lines if line.partition("\t")[0] in wanted)
    return require_lines(
        listed, f"{root} has KITTI frames, but none of the 652 of Eigen's test", f"get it from {_INFO.get}"
    )


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if image or depth is missing or damaged."""
    name, image, depth = split_fields(line)
    with prefix_errors(f"kitti/{name}"):
        meters = read_png16(read_frame_file(Path(root), _DEPTH, depth)).astype(np.float32) / 256
        focal = FOCAL_PX[name[:10]]
        meta = {"intrinsics": {"fx": focal, "fy": focal}}
        return make_frame(f"kitti/{name}", read_frame_file(Path(root), _IMAGE, image), meters, meta=meta)


def _drive_name(parts: tuple[str, ...]) -> str:
    return next((part for part in parts if _DRIVE.fullmatch(part)), "")


KITTI = Benchmark.from_info(
    _INFO,
    find=find,
    read=read,
    depth_limits={
        "da2": DepthLimits(1e-3, 80, eval_crop="garg"),
        "marigold": DepthLimits(1e-5, 80, view_crop="kb", eval_crop="eigen_kitti"),
        "zoedepth": DepthLimits(1e-3, 80, view_crop="kb", eval_crop="garg"),
    },
)
