"""IRS: rendered homes, offices, restaurants and stores as stereo pairs.

Layout: Home/ArchVizInterior03Data/{l_00001.png, r_00001.png, d_00001.exr, n_00001.exr}, and so on below Home, Office,
Restaurant and Store; 540 x 960. The left image l_ and its disparity d_ are taken; the right image and the normals are
not read. In the first edition the numbers are not padded (l_1960.png), and nothing else differs.

Disparity: OpenEXR, in pixels, in one channel (G) or the same in R, G and B; larger is nearer, which is what the
network learns, so it is kept as it is stored and never inverted. Depth in metres is 48 / disparity (0.1 m between the
cameras, a focal length of 480 px), but the distance of the cameras is not the same in all scenes (issue 2 of the
repository), so that no unit is promised. Invalid: not positive, no number, infinite, and below 0.24 px, which is
farther than 200 m in a room: what shows through a window or a hole. There is no sky.
The principal point is not documented; the middle is assumed.

Counts: 31,145 + 43,417 + 22,058 + 6,696 = 103,316, training and test together, as the paper takes them. Known to be
bad: frames whose disparity has another size than the image, and a few of no matching disparity; the former are refused.

Licence: the repository's, Apache 2.0. Get it from https://github.com/HKBU-HPML/IRS (links to OneDrive and Google
Drive). Facts from that repository.
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
from depth_anything.ingest.maps import read_exr
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="irs",
    title="IRS (Indoor Robotics Stereo)",
    records=103_316,
    layout="Home/SCENE/l_00001.png with Home/SCENE/d_00001.exr",
    get="https://github.com/HKBU-HPML/IRS",
    licence="Apache-2.0",
    sky="invalid",
)
FOCAL_PX = 480.0
MAX_DEPTH_M = 200.0
_BASELINE_M = 0.1
_IMAGE = FilePattern("image", "*", r"l_(\d+)\.png")
_DISPARITY = FilePattern("disparity", "*", r"d_(\d+)\.exr")


def find(raw: Path) -> Iterator[str]:
    """List the frames, Home/SCENE/number each, then the paths of left image and disparity.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, INFO, (_IMAGE, _DISPARITY), sequence=join_parts)


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If image or disparity are missing or damaged, or differ in size.
    """
    _, image_path, disparity_path = split_fields(line)
    image = read_frame_file(raw, _IMAGE, image_path)
    disparity = read_exr(read_frame_file(raw, _DISPARITY, disparity_path))
    check_map_size(image, disparity, _DISPARITY.what)
    height, width = disparity.shape
    middle = {"cx": (width - 1) / 2, "cy": (height - 1) / 2}
    meta = {"unit": "px", "intrinsics": {"fx": FOCAL_PX, "fy": FOCAL_PX, **middle}}
    far = (disparity > 0) & (disparity < np.float32(FOCAL_PX * _BASELINE_M / MAX_DEPTH_M))
    return RawSample(image, meta, disparity=disparity, invalid={"beyond 200 m": far})
