"""HR-WSI: stereo photographs from the web with matched disparity; used by V1.

Layout: train/{imgs/NAME.jpg, gts/NAME.png, valid_masks/NAME.png} and val; about 830 pixels wide. Instance masks and
other files are not read.

Disparity: gray 8-bit PNG (16 bits are read too), known up to scale and shift, larger is nearer; stored unchanged. A
pixel is invalid where the mask is 0, because the left and right images disagree. A valid 0 is the farthest value; the
authors assign it to the sky, so it is marked as sky, whose disparity is 0 anyway.

Counts: 20,378 and 400; --split chooses, train by default. V2 does not use the set, because it visibly degrades fine
detail (its paper, B.9).

License: none is known. Get it from https://kexianhust.github.io/Structure-Guided-Ranking-Loss. Facts from public
readers of the set (nndepth, UniDepth) and its paper (CVPR 2020); not checked against the files.
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
from depth_anything.ingest.maps import png_bit_depth, read_png16
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="hrwsi",
    title="HR-WSI",
    records=20_378,
    layout="train/imgs/NAME.jpg with train/gts/NAME.png and train/valid_masks/NAME.png",
    get="https://kexianhust.github.io/Structure-Guided-Ranking-Loss",
    licence="LicenseRef-HR-WSI",
)
SPLITS = {"train": "train", "val": "val", "all": "*"}
_PATTERNS = (
    FilePattern("image", "imgs", r"(.+)\.jpg"),
    FilePattern("disparity", "gts", r"(.+)\.png"),
)
_MASK = FilePattern("mask", "valid_masks", r"(.+)\.png")


def find(raw: Path, *, split: str = "train") -> Iterator[str]:
    """List the frames as train/NAME, then the paths of image, disparity and mask.

    Args:
        raw: Folder of the set.
        split: "train", "val" or "all".

    Raises:
        ValueError: The split is unknown, or as `find_frames`.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split} is unknown: use one of {', '.join(SPLITS)}")
    patterns = [
        FilePattern(pattern.content, f"{SPLITS[split]}/{pattern.folder}", pattern.name)
        for pattern in (*_PATTERNS, _MASK)
    ]
    return find_frames(raw, INFO, patterns, sequence=lambda parts: join_parts(parts[:-1]))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image, disparity or mask is missing or damaged, or they differ in size.
    """
    _, *paths = split_fields(line)
    image, disparity = read_pair(raw, _PATTERNS, paths, _decode_disparity)
    valid = decode_image(read_frame_file(raw, _MASK, paths[2]))[..., 0] > 0
    check_mask_size(valid, disparity, _MASK.content)
    return RawSample(
        image,
        {"unit": "relative"},
        disparity=disparity,
        sky=valid & (disparity == 0),
        invalid={"masked": ~valid},
    )


def _decode_disparity(data: bytes) -> np.ndarray:
    values = read_png16(data) if png_bit_depth(data) == 16 else decode_image(data)[..., 0]
    return values.astype(np.float32)
