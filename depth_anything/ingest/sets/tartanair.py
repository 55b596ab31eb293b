"""TartanAir, the first edition: camera flights through 18 rendered environments.

Layout: ENV/ENV/Easy/P000/{image_left/000000_left.png, depth_left/000000_left_depth.npy} and Hard; 480 x 640. Images and
depth come in separate zips and may be unpacked to one folder, or to two folders below the same one. The left camera is
read; right images, segmentation, flow and poses are not.

Depth: NPY, float32 (the set's page says 16 bits, the files have 32), meters, planar. Sky: 1000 m and more (mostly about
10,000), with disparity 0 by default. 0 occurs rarely and is invalid. The segmentation label of the sky also marks trees
in places and is not used. Intrinsics: focal length 320 px, principal point (320, 240).

Left out by default: amusement (13,595 frames), whose sky is a dome at a finite depth and so looks like a building
(issue 46 of the repository).

Counts: 306,637 left images, as in the paper; 293,042 without amusement.

License: CC BY 4.0 (from memory). Get it from https://github.com/castacks/tartanair_tools: image_left 141 GB, depth_left
69 GB. Facts from that repository.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.ingest.frame_files import FilePattern, find_frames, join_parts, read_pair, split_fields
from depth_anything.ingest.maps import read_npy
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="tartanair",
    title="TartanAir",
    records=306_637,
    layout="ENV/Easy/P000/image_left/000000_left.png with ENV/Easy/P000/depth_left/000000_left_depth.npy",
    get="https://github.com/castacks/tartanair_tools (210 GB)",
    licence="CC-BY-4.0",
    leave_out=("amusement/*",),
)
MIN_SKY_DEPTH_M = 1000.0
_INTRINSICS = {"fx": 320.0, "fy": 320.0, "cx": 320.0, "cy": 240.0}
_PATTERNS = (
    FilePattern("image", "image_left", r"(\d+)_left\.png"),
    FilePattern("depth", "depth_left", r"(\d+)_left_depth\.npy"),
)


def find(raw: Path) -> Iterator[str]:
    """List the frames as ENV/Easy/P000/number, then the paths of image and depth.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, INFO, _PATTERNS, sequence=lambda parts: join_parts(parts[:-1], 3))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image or depth is missing or damaged, or the two differ in size.
    """
    _, *paths = split_fields(line)
    image, depth = read_pair(raw, _PATTERNS, paths, read_npy)
    sky = (depth >= MIN_SKY_DEPTH_M) & np.isfinite(depth)
    return RawSample(image, {"unit": "m", "intrinsics": _INTRINSICS}, depth=depth, sky=sky)
