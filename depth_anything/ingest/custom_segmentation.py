"""A user's own images with class maps, declared in a YAML file (docs/segmentation.md), as a source for the writer."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.classes import IGNORED, ClassTable, make_class_table, table_to_list
from depth_anything.data.class_maps import map_labels, read_label_png
from depth_anything.data.sample import decode_image
from depth_anything.ingest.declaration import (
    declared_name_and_license,
    declared_text,
    read_declaration,
)
from depth_anything.ingest.file_pairs import PairedFiles
from depth_anything.ingest.frame_files import check_map_size
from depth_anything.ingest.maps import read_bytes
from depth_anything.ingest.source import DatasetInfo, RawSample

DECLARATION_KEYS = ("name", "images", "masks", "classes", "colors", "values", "ignore", "licence")
_MAX_STORED = 65535


@dataclass(frozen=True)
class CustomSegmentation:
    """A user's images with class maps, matched by name.

    Attributes:
        folder: Folder of the YAML file; paths are relative to it.
        images: Pattern of the images: a folder, or a path with {stem}.
        masks: Pattern of the masks, PNG.
        classes: The classes.
        numbers: Stored number of a pixel to class, or to `IGNORED`. With `by_color` red · 65536 + green · 256 + blue.
        by_color: Masks are RGB pictures in the colors of the classes, in place of numbers.
        name: Name of the set.
        licence: SPDX identifier.
        leave_out: A folder to skip: the folder that is being written.
    """

    folder: Path
    images: str
    masks: str
    classes: ClassTable
    numbers: Mapping[int, int]
    by_color: bool = False
    name: str | None = None
    licence: str | None = None
    leave_out: Path | None = None

    @property
    def INFO(self) -> DatasetInfo:  # noqa: N802  a constant of the module in other sources
        """Facts for the writer."""
        return DatasetInfo(
            name="custom-segmentation",
            title="a user's own set",
            records=0,
            layout=f"images {self.images}, masks {self.masks}",
            get="from its owner",
            licence=self.licence or "",
            classes=self.classes,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the class maps."""
        numbers = {str(stored): number for stored, number in sorted(self.numbers.items())}
        classes = table_to_list(self.classes)
        return {"images": self.images, "masks": self.masks, "classes": classes, "numbers": numbers} | (
            {"by_color": True} if self.by_color else {}
        )

    @property
    def files(self) -> PairedFiles:
        """The patterns of the images and the masks."""
        return PairedFiles(
            self.folder,
            self.images,
            self.masks,
            key="masks",
            suffixes=(".png",),
            noun="mask",
            example="images: rgb/{stem}.jpg  and  masks: masks/{stem}_mask.png",
            leave_out=self.leave_out,
        )

    def find(self, raw: Path) -> Generator[str, None, dict[str, int]]:
        """Yield a line per name with its image and its mask; as `PairedFiles.lines`."""
        return self.files.lines()

    def read(self, raw: Path, line: str) -> RawSample:
        """Read the image and the mask of a line.

        Raises:
            ValueError: One of them is missing or damaged, they differ in size, or a value is no class.
        """
        data, stored = self.files.read(line, lambda path: self._decode(read_bytes(path)), content="mask")
        check_map_size(data, stored, "mask")
        return RawSample(data, classes=self._to_classes(stored))

    def _decode(self, data: bytes) -> np.ndarray:
        if not self.by_color:
            return read_label_png(data)
        if not data.startswith(b"\x89PNG"):
            raise ValueError("it is not a PNG: other formats may change the colors")
        colors = decode_image(data).astype(np.int32)
        return (colors[..., 0] << 16) | (colors[..., 1] << 8) | colors[..., 2]

    def _to_classes(self, stored: np.ndarray) -> np.ndarray:
        if not self.by_color:
            return map_labels(stored, self.numbers, what="mask")
        found, places = np.unique(stored, return_inverse=True)
        for color in found.tolist():
            if color not in self.numbers:
                raise ValueError(
                    f"its mask has the color {[color >> 16, color >> 8 & 255, color & 255]}, of no class"
                )
        classes = np.array([self.numbers[color] for color in found.tolist()], np.uint8)
        return classes[places].reshape(stored.shape)


def load_segmentation_declaration(path: str | Path) -> CustomSegmentation:
    """Read the YAML declaration of a custom set for segmentation.

    Raises:
        ValueError: If the file does not exist, is not YAML, has an unknown key (the nearest key is named) or an invalid
            value (its key is named).
    """
    return read_declaration(path, DECLARATION_KEYS, _parse)


def _parse(values: Mapping[Any, Any], folder: Path) -> CustomSegmentation:
    for key, example in (("images", "photos"), ("masks", "masks"), ("classes", "[road, car]")):
        if values.get(key) is None:
            raise ValueError(f"{key} is missing: write for example  {key}: {example}")
    images, masks = (declared_text(values, key) or "" for key in ("images", "masks"))
    name, licence = declared_name_and_license(values)
    by_color = values.get("values", "numbers")
    if by_color not in ("numbers", "colors"):
        raise ValueError(f"values: {by_color!r:.40} is unknown: write numbers or colors")
    names, numbers = _parse_classes(values["classes"])
    classes = make_class_table(names, _parse_colors(values.get("colors"), names))
    custom = CustomSegmentation(folder, images, masks, classes, numbers, name=name, licence=licence)
    if by_color == "colors":
        return replace(custom, by_color=True, numbers=_color_numbers(values, classes))
    for stored in _parse_ignore(values.get("ignore", IGNORED)):
        if isinstance(stored, list):
            raise ValueError(
                f"ignore: {stored} is a color, but the masks hold numbers (values: colors changes that)"
            )
        if numbers.get(stored, IGNORED) != IGNORED:
            raise ValueError(f"ignore: {stored} is also the class {names[numbers[stored]]}")
        numbers[stored] = IGNORED
    return custom


def _parse_classes(value: Any) -> tuple[list[str], dict[int, int]]:
    """Return the names, and stored number to class: of a list of names, or of {NAME: NUMBER or [NUMBERS]}."""
    if isinstance(value, list):
        return value, {number: number for number in range(len(value))}
    if not isinstance(value, dict) or not value:
        raise ValueError(
            "classes: write a list of names, or  {road: 7, car: [26, 27]}  with the numbers in the masks"
        )
    numbers: dict[int, int] = {}
    for place, (name, stored) in enumerate(value.items()):
        for number in stored if isinstance(stored, list) else [stored]:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _MAX_STORED:
                raise ValueError(f"classes: {name}: {number!r:.40} is not a number from 0 to {_MAX_STORED}")
            if number in numbers:
                raise ValueError(f"classes: the number {number} belongs to two classes")
            numbers[number] = place
    return list(value), numbers


def _parse_colors(value: Any, names: list[str]) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(color, list) for color in value.values()):
        raise ValueError("colors: write  {road: [128, 64, 128], car: [0, 0, 142]}")
    for name in value:
        if name not in names:
            raise ValueError(f"colors: {name} is none of the classes ({', '.join(map(str, names))})")
    return value


def _parse_ignore(value: Any) -> list[Any]:
    """Return the ignored values: numbers, or colors as lists."""
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        is_number = isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry <= _MAX_STORED
        if not is_number and not _is_color(entry):
            raise ValueError(
                f"ignore: {entry!r:.40} is not a number from 0 to {_MAX_STORED}, or a color in brackets"
            )
    return entries


def _is_color(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in value)
    )


def _color_numbers(values: Mapping[Any, Any], classes: ClassTable) -> dict[int, int]:
    """Return color (as a number) to class, for masks that are pictures in the colors of the classes."""
    given = values.get("colors") or {}
    numbers: dict[int, int] = {}
    for place, row in enumerate(classes):
        if row.name not in given:
            raise ValueError(f"colors: {row.name} has none, and  values: colors  needs one for every class")
        color = (row.color[0] << 16) | (row.color[1] << 8) | row.color[2]
        if color in numbers:
            raise ValueError(f"colors: {list(row.color)} belongs to two classes")
        numbers[color] = place
    ignore = values.get("ignore", [])
    for entry in [ignore] if _is_color(ignore) else _parse_ignore(ignore):
        if not isinstance(entry, list):
            raise ValueError(f"ignore: {entry} is a number, but the masks hold colors: write  [[0, 0, 0]]")
        color = (entry[0] << 16) | (entry[1] << 8) | entry[2]
        if numbers.get(color, IGNORED) != IGNORED:
            raise ValueError(f"ignore: {entry} is also the color of {classes[numbers[color]].name}")
        numbers[color] = IGNORED
    return numbers
