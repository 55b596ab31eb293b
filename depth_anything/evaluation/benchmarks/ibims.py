"""iBims-1: a hundred indoor views with a laser scan each.

Layout: ibims1_core_raw/rgb/corridor_01.png with depth/corridor_01.png, mask_invalid/corridor_01.png and
mask_transp/corridor_01.png, 640 x 480 pixels. Edges, planes and calibrations are not used. The other edition,
ibims1_core_mat, is not read: its .mat files are of MATLAB before 7.3, not HDF5.

Depth: 16 bits, meters × 65535 / 50; 0 is unknown. Both masks are above 0 where the depth is reliable: mask_invalid
excludes pixels that the scan missed, mask_transp transparent objects. Depth Anything V1 reads it in the same way
(metric_depth/zoedepth/data/ibims.py of LiheYoung/Depth-Anything), compares up to 10 m and within Eigen's crop
(zoedepth/utils/config.py there, zoedepth/utils/misc.py of isl-org/ZoeDepth).

Not verified on the files themselves: whether the masks have one bit or eight; both are read.

License: not verified. Get ibims1_core_raw.zip from https://www.bgu.tum.de/lmf/ibims1 (now reported at
ftp://dataserv.ub.tum.de, user and password m1455541).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    read_label_image,
    resolve_root,
)
from depth_anything.ingest.frame_files import FilePattern, find_frames, read_frame_file, split_fields
from depth_anything.ingest.maps import read_png16
from depth_anything.ingest.source import DatasetInfo

_NAME = r"(\w+)\.png"
_FILES = (
    FilePattern("image", "rgb", _NAME),
    FilePattern("depth", "depth", _NAME),
    FilePattern("mask of invalid pixels", "mask_invalid", _NAME),
    FilePattern("mask of transparent pixels", "mask_transp", _NAME),
)
_INFO = DatasetInfo(
    name="ibims",
    title="iBims-1",
    records=100,
    layout="ibims1_core_raw/rgb/corridor_01.png with the same in depth, mask_invalid and mask_transp",
    get="https://www.bgu.tum.de/lmf/ibims1 (ibims1_core_raw.zip)",
    licence="LicenseRef-iBims-1",
)


def find(root: Path) -> Iterator[str]:
    """List the frames sorted by name; ValueError if there is none."""
    return find_frames(resolve_root(root), _INFO, _FILES, sequence=lambda parts: "")


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if a file is missing or damaged, or sizes differ."""
    name, *paths = split_fields(line)
    with prefix_errors(f"ibims/{name}"):
        image, depth, *masks = map(read_frame_file, [Path(root)] * len(_FILES), _FILES, paths)
        scanned, opaque = (read_label_image(mask) > 0 for mask in masks)
        if scanned.shape != opaque.shape:
            raise ValueError("its two masks differ in size")
        meters = read_png16(depth).astype(np.float64) * 50 / 65535
        return make_frame(f"ibims/{name}", image, meters, known=scanned & opaque)


IBIMS = Benchmark.from_info(
    _INFO,
    find=find,
    read=read,
    sharp=True,
    depth_limits={"da2": DepthLimits(1e-3, 50), "zoedepth": DepthLimits(0.0, 10, eval_crop="eigen_nyu")},
)
