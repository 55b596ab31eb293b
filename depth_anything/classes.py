"""The classes of semantic segmentation: the table of a set or model, and the colors of class maps.

A class map is uint8 (H, W): the number of each pixel's class, 0 to K - 1, or 255 for a pixel that is ignored.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depth_anything.errors import UserError

IGNORED = 255
"""Value of the pixels that no loss and no metric uses."""

MAX_CLASSES = 255
_GOLDEN_RATIO = 0.618033988749895
_MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class SegmentationClass:
    """A class of a segmentation set: its name, and its color in pictures, RGB from 0 to 255."""

    name: str
    color: tuple[int, int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the class as manifests and model files store it."""
        return {"name": self.name, "color": list(self.color)}


ClassTable = tuple[SegmentationClass, ...]
"""The classes of a set; the place in the table is the number of the class."""


def make_class_table(
    names: Sequence[str], colors: Sequence[Sequence[int]] | Mapping[str, Sequence[int]] | None = None
) -> ClassTable:
    """Make a table from names and colors; classes without a color get distinct ones, always the same.

    Raises:
        ValueError: No or too many classes, a name that is empty or double, or a color that is not three bytes.
    """
    if not 1 <= len(names) <= MAX_CLASSES:
        raise ValueError(f"{len(names)} classes: a set has 1 to {MAX_CLASSES}")
    if colors is not None and not isinstance(colors, Mapping) and len(colors) != len(names):
        raise ValueError(f"{len(colors)} colors for {len(names)} classes")
    table = []
    for number, name in enumerate(names):
        if (
            not isinstance(name, str)
            or not name.strip()
            or len(name) > _MAX_NAME_LENGTH
            or not name.isprintable()
        ):
            raise ValueError(f"{name!r:.80} is not the name of a class: write a short text")
        given = (
            colors.get(name)
            if isinstance(colors, Mapping)
            else colors[number]
            if colors is not None
            else None
        )
        color = default_color(number) if given is None else tuple(given)
        if len(color) != 3 or any(
            isinstance(v, bool) or not isinstance(v, int) or not 0 <= v <= 255 for v in color
        ):
            raise ValueError(f"the color of {name} is {given!r:.80}: write three numbers from 0 to 255")
        table.append(SegmentationClass(name, (color[0], color[1], color[2])))
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"the class {twice[0]} is there twice")
    return tuple(table)


def parse_class_table(value: Any) -> ClassTable:
    """Read a table from a manifest or a model file, which may come from anyone.

    Raises:
        ValueError: It is not a list of {"name": text, "color": [r, g, b]}.
    """
    if not isinstance(value, list) or not all(
        isinstance(row, dict) and {"name", "color"} <= row.keys() for row in value
    ):
        raise ValueError("its classes are not a list of {name, color}")
    if not all(isinstance(row["color"], list) for row in value):
        raise ValueError("a color of its classes is not a list")
    return make_class_table([row["name"] for row in value], [row["color"] for row in value])


def table_to_list(table: ClassTable) -> list[dict[str, Any]]:
    """Return a table as JSON holds it."""
    return [row.to_dict() for row in table]


def read_class_table(meta: Mapping[str, Any], where: str) -> ClassTable:
    """Return the classes of a set from the `meta` of its manifest.

    Raises:
        UserError: The set has none, or they are damaged; `where` names it.
    """
    if "classes" not in meta:
        raise UserError(
            f"{where} holds no classes",
            "write a set for segmentation, as  depth-anything shard cityscapes  or  shard custom-segmentation",
        )
    try:
        return parse_class_table(meta["classes"])
    except ValueError as error:
        raise UserError(f"the manifest of {where} is damaged: {error}", "write the set again") from error


def default_color(number: int) -> tuple[int, int, int]:
    """Return a color for class `number`: hues at steps of the golden ratio, alternating in brightness."""
    hue = (0.02 + number * _GOLDEN_RATIO) % 1.0
    value, saturation = (0.95, 0.62, 0.8)[number % 3], (0.85, 0.75, 0.5)[number // 3 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def palette(table: ClassTable) -> np.ndarray:
    """Return the colors of all 256 values of a class map, uint8 (256, 3); ignored pixels are black."""
    colors = np.zeros((256, 3), np.uint8)
    for number, row in enumerate(table):
        colors[number] = row.color
    return colors


def paint_classes(classes: np.ndarray, table: ClassTable) -> np.ndarray:
    """Paint a class map in the colors of its classes, uint8 (H, W, 3); ignored pixels are black."""
    return palette(table)[classes]
