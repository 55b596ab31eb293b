"""ADE20K, the scene parsing benchmark (ADEChallengeData2016): photographs with class maps of 150 classes.

Layout: images/SPLIT/ADE_train_00000001.jpg and annotations/SPLIT/ADE_train_00000001.png, SPLIT being training or
validation; photographs of any size from 96 pixels. Some photographs are gray.

Classes: 8-bit PNG; 0 is "other objects" and is ignored, 1 to 150 are the classes, which become 0 to 149. Names: the
first of each row of the benchmark's objectInfo150.txt. Colors are this project's own.

Counts: training 20,210, validation 2,000. License: images for research only, annotations BSD-3-Clause. Get it from
http://sceneparsing.csail.mit.edu. The full ADE20K (thousands of classes, other files) is another set, and not read.
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

NAMES = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag""".replace("\n", " ").split(", ")
)
NAMES = tuple(" ".join(name.split()) for name in NAMES)
NUMBERS = {0: IGNORED} | {number + 1: number for number in range(len(NAMES))}
"""Number in the annotation to class."""

INFO = DatasetInfo(
    name="ade20k",
    title="ADE20K scene parsing",
    records=20_210,
    layout="images/training/NAME.jpg with annotations/training/NAME.png",
    get="http://sceneparsing.csail.mit.edu: ADEChallengeData2016.zip (1 GB)",
    licence="LicenseRef-ADE20K",
    classes=make_class_table(NAMES),
)
SPLITS = ("training", "validation", "all")


def _patterns(split: str) -> tuple[FilePattern, FilePattern]:
    folder = "*" if split == "all" else split
    return (
        FilePattern("image", f"images/{folder}", r"(.+)\.jpg"),
        FilePattern("class map", f"annotations/{folder}", r"(.+)\.png"),
    )


def find(raw: Path, *, split: str = "training") -> Iterator[str]:
    """List the photographs as split/NAME, then the paths of the image and of the class map.

    Args:
        raw: Folder of the set.
        split: "training", "validation" or "all".

    Raises:
        ValueError: The split is unknown, or as `find_frames`.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown", f"use one of {', '.join(SPLITS)}")
    return find_frames(raw, INFO, _patterns(split), sequence=lambda parts: join_parts(parts, 1))


def read(raw: Path, line: str) -> RawSample:
    """Read one photograph.

    Raises:
        ValueError: Image or class map is missing or damaged, they differ in size, or a number is above 150.
    """
    return read_class_frame(raw, _patterns("all"), line, NUMBERS)
