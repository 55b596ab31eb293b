"""HR-WSI: photographs from the web as stereo pairs, whose disparity was matched; one of V1's sets.

Layout: train/{imgs/NAME.jpg, gts/NAME.png, valid_masks/NAME.png} and val; some 830 pixels wide. Instance masks and what
else may lie there are not read.

Disparity: grey PNG of 8 bits (16 are read, too), known up to scale and shift, larger is nearer; kept as it is stored.
Invalid where the mask is 0: where left and right did not agree. What is valid and 0 is farthest; the set's makers put
the sky there, so that it is told as sky, which in a disparity is 0, and nothing changes.

Counts: 20,378 and 400; --split chooses, train unless told otherwise. V2 does not take the set, since it visibly ruins
fine detail (its paper, B.9).

Licence: none is known. Get it from https://kexianhust.github.io/Structure-Guided-Ranking-Loss. Facts from public
readers of the set (nndepth, UniDepth) and its paper (CVPR 2020): not checked against the files.
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
    name="hrwsi",
    title="HR-WSI",
    records=20_378,
    layout="train/imgs/NAME.jpg with train/gts/NAME.png and train/valid_masks/NAME.png",
    get="https://kexianhust.github.io/Structure-Guided-Ranking-Loss",
    licence="LicenseRef-HR-WSI",
)
SPLITS = {"train": "train", "val": "val", "all": "*"}
_IMAGE = FilePattern("image", "imgs", r"(.+)\.jpg")
_DISPARITY = FilePattern("disparity", "gts", r"(.+)\.png")
_MASK = FilePattern("mask", "valid_masks", r"(.+)\.png")
_BIT_DEPTH_OFFSET = 24  # where a PNG's header has the bits of a channel


def find(raw: Path, *, split: str = "train") -> Iterator[str]:
    """List the frames, train/NAME each, then the paths of image, disparity and mask.

    Args:
        raw: Folder of the set.
        split: "train", "val" or "all".

    Raises:
        ValueError: If there is no such split, or as `find_frames`.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split} is unknown: type one of {', '.join(SPLITS)}")
    kinds = [FilePattern(k.what, f"{SPLITS[split]}/{k.folder}", k.name) for k in (_IMAGE, _DISPARITY, _MASK)]
    return find_frames(raw, INFO, kinds, sequence=lambda parts: join_parts(parts[:-1]))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If image, disparity or mask are missing or damaged, or differ in size.
    """
    _, image_path, disparity_path, mask_path = split_fields(line)
    image = read_frame_file(raw, _IMAGE, image_path)
    data = read_frame_file(raw, _DISPARITY, disparity_path)
    deep = data[_BIT_DEPTH_OFFSET : _BIT_DEPTH_OFFSET + 1] == b"\x10"
    disparity = (read_png16(data) if deep else decode_image(data)[..., 0]).astype(np.float32)
    check_map_size(image, disparity, _DISPARITY.what)
    known = decode_image(read_frame_file(raw, _MASK, mask_path))[..., 0] > 0
    if known.shape != disparity.shape:
        raise ValueError(f"its mask has the shape {known.shape}, its disparity {disparity.shape}")
    return RawSample(
        image,
        {"unit": "relative"},
        disparity=disparity,
        sky=known & (disparity == 0),
        invalid={"masked": ~known},
    )
