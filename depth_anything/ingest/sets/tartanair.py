"""TartanAir, the first edition: flights through 18 rendered environments.

Layout: ENV/ENV/Easy/P000/{image_left/000000_left.png, depth_left/000000_left_depth.npy} and Hard; 480 x 640. Images
and depth come as zips of their own and may be unpacked to one folder or to two below the same one. The left camera is
taken; right images, segmentation, flow and poses are not read.

Depth: NPY, float32 (the set's page says 16 bits, the files have 32), metres, planar. Sky: 1000 m and more (mostly about
10,000), given disparity 0 unless told otherwise. 0 occurs, rarely, and is invalid. The segmentation's number for sky
also stands for trees in places and is not used. Intrinsics: focal length 320 px, principal point (320, 240).

Not taken unless asked for: amusement (13,595 frames), whose sky is a dome at a finite depth, and so looks like
something built (issue 46 of the repository).

Counts: 306,637 left images, which is what the paper says it takes; 293,042 without amusement.

Licence: CC BY 4.0 (from memory). Get it from https://github.com/castacks/tartanair_tools: image_left 141 GB, depth_left
69 GB. Facts from that repository.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.ingest.frame_files import (
    FilePattern,
    check_map_size,
    find_frames,
    join_parts,
    read_frame_file,
    split_fields,
)
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
_IMAGE = FilePattern("image", "image_left", r"(\d+)_left\.png")
_DEPTH = FilePattern("depth", "depth_left", r"(\d+)_left_depth\.npy")


def find(raw: Path) -> Iterator[str]:
    """List the frames, ENV/Easy/P000/number each, then the paths of image and depth.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, INFO, (_IMAGE, _DEPTH), sequence=lambda parts: join_parts(parts[:-1], 3))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If image or depth are missing or damaged, or differ in size.
    """
    _, image_path, depth_path = split_fields(line)
    image = read_frame_file(raw, _IMAGE, image_path)
    depth = read_npy(read_frame_file(raw, _DEPTH, depth_path))
    check_map_size(image, depth, _DEPTH.what)
    sky = (depth >= MIN_SKY_DEPTH_M) & np.isfinite(depth)
    return RawSample(image, {"unit": "m", "intrinsics": _INTRINSICS}, depth=depth, sky=sky)
