"""Cityscapes: street scenes of 50 cities with fine class maps; a set for semantic segmentation.

Layout: leftImg8bit/SPLIT/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png and
gtFine/SPLIT/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png, all 2048 x 1024.

Classes: labelIds holds the numbers of all 34 labels; the benchmark evaluates 19 of them (trainId 0 to 18) and ignores
the others: unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, parking, rail track,
guard rail, bridge, tunnel, polegroup, caravan, trailer, and license plate (-1, stored as 255). The files labelTrainIds
that the authors' scripts can make are not read. Source of numbers and colors: the authors' table
(cityscapesScripts, helpers/labels.py).

Counts: train 2,975, val 500, test 1,525, whose labels are withheld (its maps are all ignored, so its frames are
rejected). License: the authors' own terms, research only. Get it from https://www.cityscapes-dataset.com.
"""

from collections.abc import Iterator
from pathlib import Path

from depth_anything.classes import IGNORED, make_class_table
from depth_anything.errors import UserError
from depth_anything.ingest.frame_files import (
    FilePattern,
    find_frames,
    join_parts,
    read_class_frame,
)
from depth_anything.ingest.source import DatasetInfo, RawSample

# Name, number in labelIds, color; the place is the trainId.
LABELS = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
NUMBERS = {stored: IGNORED for stored in (*range(34), 255)} | {
    stored: number for number, (_, stored, _) in enumerate(LABELS)
}
"""Number in labelIds to class; the benchmark's ignored labels and 255 to `IGNORED`."""

INFO = DatasetInfo(
    name="cityscapes",
    title="Cityscapes",
    records=2_975,
    layout="leftImg8bit/train/CITY/*_leftImg8bit.png with gtFine/train/CITY/*_gtFine_labelIds.png",
    get="https://www.cityscapes-dataset.com: leftImg8bit_trainvaltest.zip (11 GB), gtFine_trainvaltest.zip",
    licence="LicenseRef-Cityscapes",
    classes=make_class_table([name for name, _, _ in LABELS], [color for _, _, color in LABELS]),
)
SPLITS = ("train", "val", "test", "all")


def _patterns(split: str) -> tuple[FilePattern, FilePattern]:
    folder = "*" if split == "all" else split
    return (
        FilePattern("image", f"leftImg8bit/{folder}/*", r"(.+)_leftImg8bit\.png"),
        FilePattern("class map", f"gtFine/{folder}/*", r"(.+)_gtFine_labelIds\.png"),
    )


def find(raw: Path, *, split: str = "train") -> Iterator[str]:
    """List the frames as split/city/NAME, then the paths of the image and of the class map.

    Args:
        raw: Folder of the set.
        split: "train", "val", "test" or "all".

    Raises:
        ValueError: The split is unknown, or as `find_frames`.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown", f"use one of {', '.join(SPLITS)}")
    return find_frames(raw, INFO, _patterns(split), sequence=lambda parts: join_parts(parts, 2))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image or class map is missing or damaged, they differ in size, or a number is no label.
    """
    return read_class_frame(raw, _patterns("all"), line, NUMBERS)
