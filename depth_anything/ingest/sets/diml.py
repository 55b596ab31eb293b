"""DIML/CVL RGB-D: photographs with measured depth, rooms by a Kinect v2 and streets by stereo; one of V1's sets.

Layout, as its archives unpack: indoor/PLACE/DATE/NUMBER/{col/NAME_c.png, up_png/NAME_*.png}, where up_png holds the
Kinect's depth brought to the size of the colours; outdoor/DATE/NUMBER/{left/NAME_left.png, depth/NAME_depth.png,
conf/NAME_conf.png}. The sample edition calls the former color/NAME_c.png and depth_filled/NAME_depth_filled.png. What
lies below folders of these names is taken, at any depth.

Depth: 16-bit PNG, millimetres, planar; 0 is invalid. Outdoors it comes from matched stereo images, and conf, 8 bits,
says how far each pixel is to be trusted: below 0.6 of 255 it is invalid here (one public reader uses 0.6 and quotes
0.9 from the makers' report; neither is a rule). Sky is not marked; stereo knows nothing of it, so that it is invalid
mostly by its confidence.

Counts: two million frames are announced; V1 takes 927 K. V2 does not take the set: labels made by a teacher were far
better than these (table 6 of its paper).

Licence: research; no name is known. Get it from https://dimlrgbd.github.io. Facts from its abstract (arXiv 2110.11590)
and from public readers of the set (nndepth): not checked against the files.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.data.sample import decode_image
from depth_anything.ingest.frame_files import (
    FilePattern,
    check_map_size,
    find_frames,
    join_parts,
    read_frame_file,
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
    """List the frames, by the folder above theirs and the name, then the paths of images, depth and confidence.

    The paths are five: of image and depth as they lie indoors, and of image, depth and confidence as outdoors.

    Raises:
        ValueError: As `find_frames`.
    """
    kinds = (*_INDOOR, *_OUTDOOR, _CONFIDENCE)
    return find_frames(raw, INFO, kinds, sequence=lambda parts: join_parts(parts[:-1]))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If image, depth or confidence are missing or damaged, or differ in size.
    """
    paths = split_fields(line)[1:]
    outdoors = any(paths[2:])
    (image_kind, depth_kind), paths = (_OUTDOOR, paths[2:]) if outdoors else (_INDOOR, paths)
    image = read_frame_file(raw, image_kind, paths[0])
    millimeters = read_png16(read_frame_file(raw, depth_kind, paths[1]))
    check_map_size(image, millimeters, depth_kind.what)
    invalid = {}
    if outdoors:
        trust = decode_image(read_frame_file(raw, _CONFIDENCE, paths[2]))[..., 0]
        if trust.shape != millimeters.shape:
            raise ValueError(f"its confidence has the shape {trust.shape}, its depth {millimeters.shape}")
        invalid = {"not to be trusted": trust < np.ceil(MIN_CONFIDENCE * 255)}
    return RawSample(image, {"unit": "m"}, depth=millimeters / np.float32(1000), invalid=invalid)
