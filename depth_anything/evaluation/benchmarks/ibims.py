"""iBims-1: a hundred views of rooms, each with a laser scan.

Layout: ibims1_core_raw/rgb/corridor_01.png with depth/corridor_01.png, mask_invalid/corridor_01.png and
mask_transp/corridor_01.png, 640 x 480 pixels. The edges, planes and calibrations beside are not used. The other
edition, ibims1_core_mat, is not read: its .mat files are those of MATLAB before 7.3, not HDF5.

Depth: 16 bits, metres × 65535 / 50; 0 is not known. Both masks are above 0 where the depth can be trusted:
mask_invalid leaves out what the scan missed, mask_transp what is transparent. So Depth Anything V1 reads it,
metric_depth/zoedepth/data/ibims.py of LiheYoung/Depth-Anything; and more than 10 m are of no account there, and
what lies outside of Eigen's crop (zoedepth/utils/config.py there, zoedepth/utils/misc.py of isl-org/ZoeDepth).

Not verified on the files themselves: whether the masks have one bit or eight; both are read.

Licence: not verified. Get ibims1_core_raw.zip from https://www.bgu.tum.de/lmf/ibims1 (now, as others have it,
ftp://dataserv.ub.tum.de, user and password m1455541).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import Benchmark, DepthLimits
from depth_anything.evaluation.benchmarks.frames import (
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
    FilePattern("mask of what the scan missed", "mask_invalid", _NAME),
    FilePattern("mask of what is transparent", "mask_transp", _NAME),
)
_FACTS = DatasetInfo(
    name="ibims",
    title="iBims-1",
    records=100,
    layout="ibims1_core_raw/rgb/corridor_01.png with the same in depth, mask_invalid and mask_transp",
    get="https://www.bgu.tum.de/lmf/ibims1 (ibims1_core_raw.zip)",
    licence="LicenseRef-iBims-1",
)


def find(root: Path) -> Iterator[str]:
    """List the frames in the order of their names; ValueError if there is none."""
    return find_frames(resolve_root(root), _FACTS, _FILES, sequence=lambda parts: "")


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if a file is missing or damaged, or sizes differ."""
    name, *paths = split_fields(line)
    with prefix_errors(f"ibims/{name}"):
        image, depth, *masks = map(read_frame_file, [Path(root)] * len(_FILES), _FILES, paths)
        scanned, opaque = (read_label_image(mask) > 0 for mask in masks)
        if scanned.shape != opaque.shape:
            raise ValueError("its two masks differ in size")
        metres = read_png16(depth).astype(np.float64) * 50 / 65535
        return make_frame(f"ibims/{name}", image, metres, known=scanned & opaque)


IBIMS = Benchmark(
    name=_FACTS.name,
    title=_FACTS.title,
    images=_FACTS.records,
    layout=_FACTS.layout,
    get=_FACTS.get,
    licence=_FACTS.licence,
    find=find,
    read=read,
    sharp=True,
    depth_limits={"da2": DepthLimits(1e-3, 50), "zoedepth": DepthLimits(0.0, 10, crop="eigen_nyu")},
)
