"""IRS: rendered homes, offices, restaurants and stores as stereo pairs.

Layout: Home/ArchVizInterior03Data/{l_00001.png, r_00001.png, d_00001.exr, n_00001.exr}, and so on below Home, Office,
Restaurant and Store; 540 x 960. The left image l_ and its disparity d_ are read; the right image and the normals are
not. In the first edition the numbers are not padded (l_1960.png); nothing else differs.

Disparity: OpenEXR, in pixels, in one channel (G) or equal in R, G and B; larger is nearer, which is what the network
predicts, so it is stored unchanged. Depth in meters is 48 / disparity (baseline 0.1 m, focal length 480 px), but the
baseline differs between scenes (issue 2 of the repository), so no unit is stored. Invalid: zero, negative, NaN,
infinite, and below 0.24 px, which is farther than 200 m indoors, as seen through a window or a hole. There is no sky.
The principal point is not documented; the center of the image is assumed.

Counts: 31,145 + 43,417 + 22,058 + 6,696 = 103,316, training and test together, as the paper uses them. Some frames have
a disparity of another size than the image and are rejected; a few have a disparity of another scene.

License: that of the repository, Apache 2.0. Get it from https://github.com/HKBU-HPML/IRS (links to OneDrive and Google
Drive). Facts from that repository.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.ingest.frame_files import FilePattern, find_frames, join_parts, read_pair, split_fields
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
_PATTERNS = (FilePattern("image", "*", r"l_(\d+)\.png"), FilePattern("disparity", "*", r"d_(\d+)\.exr"))


def find(raw: Path) -> Iterator[str]:
    """List the frames as Home/SCENE/number, then the paths of left image and disparity.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, INFO, _PATTERNS, sequence=join_parts)


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image or disparity is missing or damaged, or the two differ in size.
    """
    _, *paths = split_fields(line)
    image, disparity = read_pair(raw, _PATTERNS, paths, read_exr)
    height, width = disparity.shape
    center = {"cx": (width - 1) / 2, "cy": (height - 1) / 2}
    meta = {"unit": "px", "intrinsics": {"fx": FOCAL_PX, "fy": FOCAL_PX, **center}}
    far = (disparity > 0) & (disparity < np.float32(FOCAL_PX * _BASELINE_M / MAX_DEPTH_M))
    return RawSample(image, meta, disparity=disparity, invalid={"beyond 200 m": far})
