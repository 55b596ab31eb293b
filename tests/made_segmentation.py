"""Sets for semantic segmentation in their true formats, and tiny models, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from depth_anything.classes import make_class_table
from depth_anything.ingest.source import DatasetInfo, RawSample
from depth_anything.ingest.writer import write_source

CLASSES = make_class_table(["red", "green", "blue"], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])
HEAD_OPTIONS = {
    "linear": None,
    "dpt": None,
    "mask2former": {"channels": 32, "queries": 6, "encoder_layers": 1, "decoder_layers": 2, "points": 49},
    "eomt": {"queries": 5, "blocks": 2, "points": 49},
}


def class_map(seed, size=(36, 48), classes=3, ignored=True):
    """Return large random rectangles of classes, uint8, with a border of ignored pixels."""
    draw = np.random.default_rng(seed)
    found = np.full(size, draw.integers(classes), np.uint8)
    for _ in range(5):
        top, left = (int(draw.integers(side - 4)) for side in size)
        found[top : top + int(draw.integers(6, 20)), left : left + int(draw.integers(6, 20))] = draw.integers(
            classes
        )
    if ignored:
        found[:2] = 255
    return found


def colored(found):
    """Return an image in the exact colors of the classes; ignored pixels are black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(CLASSES)] = [row.color for row in CLASSES]
    return colors[found]


class ColorSource:
    """Images in the colors of their classes, as a source of shards."""

    INFO = DatasetInfo("colors", "colors", 0, "nothing", "nowhere", "CC0-1.0", classes=CLASSES)
    settings = {"version": 1}

    def __init__(self, count, size=(36, 48)):
        self.count, self.size = count, size

    def find(self, raw):
        return map(str, range(self.count))

    def read(self, raw, line):
        found = class_map(int(line), self.size)
        return RawSample(colored(found), classes=found)


def write_colors(root, count=10, size=(36, 48), per_shard=5):
    """Write a set of colored images."""
    return write_source(ColorSource(count, size), Path(), root, per_shard=per_shard)


def save(path, array, mode=None):
    """Write a PNG or JPEG by Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)


CITYSCAPES_TRAIN_IDS = [255] * 7 + [
    0,
    1,
    255,
    255,
    2,
    3,
    4,
    255,
    255,
    255,
    5,
    255,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    255,
    255,
    16,
    17,
    18,
]
"""Number in labelIds (0 to 33) to trainId, copied from the authors' documentation as a list of its own."""


def make_cityscapes(raw, *, city="aachen", split="train", frames=2, size=(16, 32)):
    """Write frames as Cityscapes does; return key to labelIds."""
    truth = {}
    for frame in range(frames):
        ids = np.random.default_rng(frame).integers(0, 34, size).astype(np.uint8)
        stem = f"{city}_{frame:06d}_000019"
        image = np.random.default_rng(100 + frame).integers(0, 256, (*size, 3)).astype(np.uint8)
        save(raw / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", image)
        save(raw / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", ids)
        save(raw / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", ids.astype(np.uint16))
        truth[f"{split}/{city}/{stem}"] = ids
    return truth


def make_ade20k(raw, *, split="training", frames=2, size=(20, 30)):
    """Write photographs as ADEChallengeData2016 does, the last one gray; return key to stored numbers."""
    truth = {}
    for frame in range(frames):
        stored = np.random.default_rng(frame).integers(0, 151, size).astype(np.uint8)
        name = f"ADE_{'train' if split == 'training' else 'val'}_{frame + 1:08d}"
        shape = size if frame == frames - 1 else (*size, 3)
        save(raw / "images" / split / f"{name}.jpg", np.full(shape, 90 + frame, np.uint8))
        save(raw / "annotations" / split / f"{name}.png", stored)
        truth[f"{split}/{name}"] = stored
    return truth
