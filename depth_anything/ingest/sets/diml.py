"""DIML/CVL RGB-D: photographs with measured depth, indoors from a Kinect v2 and outdoors from stereo; used by V1.

Layout, as its archives unpack: indoor/PLACE/DATE/NUMBER/{col/NAME_c.png, up_png/NAME_*.png}, where up_png holds the
Kinect's depth at the resolution of the color image; outdoor/DATE/NUMBER/{left/NAME_left.png, depth/NAME_depth.png,
conf/NAME_conf.png}. The sample edition names the indoor folders color/NAME_c.png and
depth_filled/NAME_depth_filled.png. Folders of these names are read at any depth.

Depth: 16-bit PNG, millimeters, planar; 0 is invalid. Outdoor depth comes from stereo matching, and conf (8 bits) is the
confidence of each pixel: below 0.6 of 255 the pixel is invalid here. One public reader uses 0.6 and quotes 0.9 from the
authors' report; neither is a rule. Sky is not marked; stereo gives no depth there, and its low confidence makes most of
it invalid.

Counts: the authors announce two million frames; V1 uses 927 K. V2 does not use the set, because labels of a teacher are
far better (table 6 of its paper).

License: research; it has no known identifier. Get it from https://dimlrgbd.github.io. Facts from its abstract (arXiv
2110.11590) and from public readers of the set (nndepth); not checked against the files.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.data.sample import decode_image
from depth_anything.ingest.frame_files import (
    FilePattern,
    check_mask_size,
    find_frames,
    join_parts,
    read_frame_file,
    read_pair,
    split_fields,
)
from depth_anything.ingest.maps import read_png16
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="diml",
    title="DIML/CVL RGB-D",
    records=927_000,
    layout="PLACE/DATE/1/col/NAME_c.png with up_png/NAME_ud.png (indoor; or color/NAME_c.png with "
    "depth_filled/NAME_depth_filled.png), "
    "DATE/1/left/NAME_left.png with depth/NAME_depth.png and conf/NAME_conf.png (outdoor)",
    get="https://dimlrgbd.github.io",
    licence="LicenseRef-DIML",
    sky="invalid",
)
MIN_CONFIDENCE = 0.6
_INDOOR = (
    FilePattern("image", "col|color", r"(.+)_c\.png"),
    FilePattern("depth", "up_png|depth_filled", r"(.+?)_(?:depth_filled|[^_]+)\.png"),
)
_OUTDOOR = (
    FilePattern("image", "left", r"(.+)_left\.png"),
    FilePattern("depth", "depth", r"(.+)_depth\.png"),
)
_CONFIDENCE = FilePattern("confidence", "conf", r"(.+)_conf\.png")


def find(raw: Path) -> Iterator[str]:
    """List the frames as folder/name, then five paths: image and depth indoors; image, depth and confidence outdoors.

    Raises:
        ValueError: As `find_frames`.
    """
    patterns = (*_INDOOR, *_OUTDOOR, _CONFIDENCE)
    return find_frames(raw, INFO, patterns, sequence=lambda parts: join_parts(parts[:-1]))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image, depth or confidence is missing or damaged, or they differ in size.
    """
    _, *paths = split_fields(line)
    outdoor = any(paths[2:])
    patterns, paths = (_OUTDOOR, paths[2:]) if outdoor else (_INDOOR, paths)
    image, millimeters = read_pair(raw, patterns, paths, read_png16)
    invalid = {}
    if outdoor:
        confidence = decode_image(read_frame_file(raw, _CONFIDENCE, paths[2]))[..., 0]
        check_mask_size(confidence, millimeters, _CONFIDENCE.content)
        invalid = {"not to be trusted": confidence < np.ceil(MIN_CONFIDENCE * 255)}
    return RawSample(image, {"unit": "m"}, depth=millimeters / np.float32(1000), invalid=invalid)
