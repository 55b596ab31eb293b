"""A user's own photographs with depth or disparity: images and maps of one name, as a yaml declares them.

Facts: what the yaml says (declaration.py reads it; docs/own-data.md has every key); nothing is guessed from
pixels. An image and a map belong together if what stands for {stem} in their paths is the same. Zero, negative,
infinite and NaN are unknown in any set; `invalid` names what else is, `sky` or `sky_from` what is sky, all as
the files store it.
"""

import io
import os
import re
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from depth_anything.data.image_headers import DecodeCost, check_decode_cost, open_image
from depth_anything.ingest import maps
from depth_anything.ingest.file_list import escape_field, unescape_field
from depth_anything.ingest.source import DatasetInfo, RawSample, is_disk_failure

INTRINSIC_KEYS = ("fx", "fy", "cx", "cy")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class FilePairs:
    """What was found in the folders.

    Attributes:
        both: Name to (image, map), paths below the yaml's folder.
        images: Images without a map, by name.
        maps: Maps without an image, by name.
        others: How many files are of no known kind, or do not fit the pattern, by key of the yaml.
    """

    both: dict[str, tuple[str, str]]
    images: dict[str, str]
    maps: dict[str, str]
    others: dict[str, int]


@dataclass(frozen=True)
class CustomSet:
    """A set as its yaml declares it: a source like those of the published sets.

    Attributes:
        folder: Where paths begin: that of the yaml.
        images: Folder of the images, or a pattern as rgb/{stem}.jpg.
        depth: Likewise of the maps.
        name: Of the set; None: the output folder's.
        quantity: "depth" or "disparity".
        scale: Metres a stored unit; of disparity, whatever a stored unit is, as only ratios count.
        invalid: Stored values that mean "unknown".
        sky: Stored value that means sky.
        sky_from: Stored value from which on it is sky.
        intrinsics: fx, fy, cx, cy of all images, pixels; the centre of the upper left pixel is at 0, 0.
        distance: "planar" (z, along the axis of the camera) or "ray" (from the camera's centre).
        key: Dataset in HDF5 files.
        channel: Channel in EXR files.
        licence: SPDX name.
        leave_out: A folder to pass over: the one that is being written.
    """

    folder: Path
    images: str
    depth: str
    name: str | None = None
    quantity: str = "depth"
    scale: float = 1.0
    invalid: tuple[float, ...] = ()
    sky: float | None = None
    sky_from: float | None = None
    intrinsics: tuple[float, ...] | None = None
    distance: str = "planar"
    key: str | None = None
    channel: str | None = None
    licence: str | None = None
    leave_out: Path | None = None

    @property
    def INFO(self) -> DatasetInfo:  # noqa: N802  a module's constant, in the other sources
        """What the writer wants to know of any set."""
        return DatasetInfo(
            name="custom",
            title="a user's own set",
            records=0,
            layout=f"images {self.images}, {self.quantity} {self.depth}",
            get="from its owner",
            licence=self.licence or "",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the pixels."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        for key in ("folder", "name", "licence", "leave_out"):
            del kept[key]
        return {key: value for key, value in kept.items() if value is not None and value != ()}

    def pair(self) -> FilePairs:
        """Look for images and maps and put those of one name together.

        Raises:
            ValueError: A folder is not there, two images or two maps have one name, or nothing fits.
        """
        images, depths = (
            _PathPattern.parse(pattern, key, endings)
            for key, pattern, endings in (
                ("images", self.images, IMAGE_SUFFIXES),
                ("depth", self.depth, maps.MAP_SUFFIXES),
            )
        )
        if images.places != depths.places:
            raise ValueError(f"images: {self.images} and depth: {self.depth} must have the same {{names}}")
        taken = {(self.folder / pattern.base).resolve() for pattern in (images, depths)}
        taken |= {self.leave_out} if self.leave_out else set()
        found, other_images = images.list(self.folder, leave_out=taken)
        truth, other_maps = depths.list(self.folder, leave_out=taken)
        both = {name: (found[name], truth[name]) for name in sorted(found.keys() & truth.keys())}
        if not both:
            raise ValueError(_no_pairs_message(self, found, truth))
        alone = {name: found[name] for name in sorted(found.keys() - truth.keys())}
        without = {name: truth[name] for name in sorted(truth.keys() - found.keys())}
        return FilePairs(both, alone, without, {"images": other_images, "depth": other_maps})

    def find(self, raw: Path) -> Generator[str, None, dict[str, int]]:
        """Yield every name, with its image and its map where it has them; return how many files are neither."""
        pairs = self.pair()
        rows = {name: (name, *files) for name, files in pairs.both.items()}
        rows |= {name: (name, image, "") for name, image in pairs.images.items()}
        rows |= {name: (name, "", depth) for name, depth in pairs.maps.items()}
        for name in sorted(rows):
            yield self.line(*rows[name])
        return {f"other files in {key}": count for key, count in pairs.others.items() if count}

    @staticmethod
    def line(name: str, image: str, depth: str) -> str:
        """What `read` takes: a name and its files, one of which may be empty."""
        return "\t".join(map(escape_field, (name, image, depth)))

    def read(self, raw: Path, line: str) -> RawSample:
        """Read the image and the map of a line of `find`.

        Raises:
            ValueError: One of them is missing, cannot be read, or is of another shape.
        """
        _, image, depth = map(unescape_field, line.split("\t"))
        if not depth:
            raise ValueError(f"no {self.quantity} of this name in {self.depth}")
        if not image:
            raise ValueError(f"no image of this name in {self.images}")
        try:
            data = maps.read_bytes(self.folder / image)
        except ValueError as error:
            raise ValueError(f"its image: {error}") from error
        try:
            stored = maps.read_map(self.folder / depth, key=self.key, channel=self.channel)
        except ValueError as error:
            raise ValueError(f"its {self.quantity}: {error}") from error
        size = read_image_size(data)
        check_aspect_ratio(size, stored.shape)
        return self._raw(data, size, stored)

    def _raw(self, data: bytes, size: tuple[int, int], stored: np.ndarray) -> RawSample:
        sky, unknown = None, np.zeros(stored.shape, bool)
        with np.errstate(over="ignore"):  # numpy compares in the file's type, where 655.35 is another number
            if self.sky is not None:
                sky = stored == self.sky
            elif self.sky_from is not None:
                sky = stored >= self.sky_from
            for value in self.invalid:
                unknown |= stored == value
        invalid = {"declared invalid": unknown} if self.invalid else {}
        values = stored.astype(np.float64) * self.scale
        meta: dict[str, Any] = {}
        if self.intrinsics is not None:
            meta["intrinsics"] = dict(zip(INTRINSIC_KEYS, self.intrinsics, strict=True))
        if self.quantity == "disparity":
            return RawSample(data, meta, disparity=values, sky=sky, invalid=invalid)
        meta["unit"] = "m"
        if self.distance == "ray":
            values *= self._depth_per_distance(size, stored.shape)
        return RawSample(data, meta, depth=values, sky=sky, invalid=invalid)

    def _depth_per_distance(self, size: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
        """Planar depth over distance, for each pixel of a map of an image of `size`."""
        assert self.intrinsics is not None
        fx, fy, cx, cy = self.intrinsics
        if not (0 <= cx < size[1] and 0 <= cy < size[0]):
            raise ValueError(
                f"the principal point {cx:g}, {cy:g} lies outside of {size[1]} x {size[0]} pixels"
            )
        x = ((np.arange(shape[1]) + 0.5) * size[1] / shape[1] - 0.5 - cx) / fx
        y = ((np.arange(shape[0]) + 0.5) * size[0] / shape[0] - 0.5 - cy) / fy
        return 1 / np.sqrt(1 + x**2 + y[:, None] ** 2)


@dataclass(frozen=True)
class _PathPattern:
    """Where files lie and what is the name in their paths: rgb/{stem}.jpg, or a folder, where all of it is."""

    key: str
    base: str
    places: tuple[str, ...]
    expression: re.Pattern

    @classmethod
    def parse(cls, pattern: str, key: str, endings: tuple[str, ...]) -> "_PathPattern":
        """Read what the yaml says under `key`; without an ending any of `endings` fits."""
        pattern = os.path.expanduser(pattern)
        if "{" not in pattern:
            pattern = os.path.join(pattern, "{stem}")
        parts = pattern.split("/")
        fixed = next(number for number, part in enumerate(parts) if "{" in part)
        base, rest = "/".join(parts[:fixed]) or ("/" if fixed else ""), "/".join(parts[fixed:])
        base = "" if base == "." else base
        pieces = re.split(r"\{([a-z]\w*)\}", rest)
        places = pieces[1::2]
        if len(set(places)) != len(places) or "stem" not in places or "{" in "".join(pieces[::2]):
            raise ValueError(
                f"{key}: {pattern}: it must have {{stem}} once, as  {key}: folder/{{stem}}{endings[0]}"
            )
        text = "".join(
            f"(?P<{piece}>{'.+' if piece == 'stem' else '[^/]+'})" if number % 2 else re.escape(piece)
            for number, piece in enumerate(pieces)
        )
        if not rest.lower().endswith(endings):
            text += f"(?i:{'|'.join(map(re.escape, endings))})"
        return cls(key, base, tuple(sorted(places)), re.compile(text, re.DOTALL))

    def list(self, folder: Path, *, leave_out: set[Path]) -> tuple[dict[str, str], int]:
        """The files that fit, by name, and how many others lie there."""
        top = folder / self.base
        if not top.is_dir():
            raise ValueError(f"{self.key}: {top} is not a folder")
        found: dict[str, list[str]] = {}
        others = 0
        for file in _list_files(top, leave_out):
            match = self.expression.fullmatch(file)
            if match is None:
                others += 1
                continue
            name = "/".join(match[place] for place in self.places)
            found.setdefault(name, []).append(os.path.join(self.base, file))
        twice = [paths for paths in found.values() if len(paths) > 1]
        if twice:
            named = "; ".join(" and ".join(map(printable_path, paths)) for paths in twice[:3])
            raise ValueError(
                f"{self.key}: {len(twice)} names stand for several files each ({named}): say which are meant, "
                f"as  {self.key}: {os.path.join(self.base, '{stem}')}{Path(twice[0][0]).suffix}"
            )
        return {name: paths[0] for name, paths in found.items()}, others


def _list_files(top: Path, leave_out: set[Path]) -> Iterator[str]:
    """Files below a folder, in order, through links, each folder once; hidden ones, as a Mac's ._files, are none."""

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error

    seen = {os.path.realpath(top)}
    for here, folders, files in os.walk(top, onerror=fail, followlinks=True):
        kept = []
        for name in sorted(folders):
            place = os.path.realpath(os.path.join(here, name))
            if not name.startswith(".") and place not in seen and Path(place) not in leave_out:
                seen.add(place)
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(here, name), top)


def _no_pairs_message(custom: CustomSet, images: Mapping[str, str], depths: Mapping[str, str]) -> str:
    for key, found, endings in (("images", images, IMAGE_SUFFIXES), ("depth", depths, maps.MAP_SUFFIXES)):
        if not found:
            return f"{key}: {getattr(custom, key)} holds no file that fits (looked for {' '.join(endings)})"
    one, other = min(images), min(depths)
    return (
        f"no image has a map of its name: there are {len(images)} images, as {printable_path(images[one])}, "
        f"and {len(depths)} maps, as {printable_path(depths[other])}; say what of their paths is the name, "
        "as  images: rgb/img_{stem}.jpg  and  depth: depth/depth_{stem}.png"
    )


def printable_path(path: str) -> str:
    """A path as it can be printed, whatever bytes it is made of."""
    return path.encode("utf-8", "backslashreplace").decode()


def read_image_size(source: bytes | Path) -> tuple[int, int]:
    """Height and width of an image, upright, from its header; ValueError if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it is too large or damaged is for whoever decodes it
        try:
            try:
                opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            except Image.DecompressionBombError:  # Pillow's limit is lower than ours
                opened = open_image(source if isinstance(source, bytes) else maps.read_bytes(source))
            with opened as picture:
                width, height = picture.size
                turned = picture.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
                check_decode_cost(DecodeCost("", width, height, 1, 0))
        except Exception as error:  # hostile bytes make Pillow raise a dozen types
            if is_disk_failure(error):
                raise
            why = "of no known kind" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"its image cannot be decoded: {why}") from error
    return (width, height) if turned else (height, width)


def check_aspect_ratio(size: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Refuse a map that cannot be of this image: sizes may differ, the ratio of sides may not."""
    if not _same_aspect_ratio(size, shape):
        why = (
            "; one is to be turned (see the EXIF tag Orientation)"
            if _same_aspect_ratio(size[::-1], shape)
            else ""
        )
        raise ValueError(
            f"its map is {shape[1]} x {shape[0]} pixels, its image {size[1]} x {size[0]}: not of one shape{why}"
        )


def _same_aspect_ratio(size: tuple[int, int], shape: tuple[int, ...]) -> bool:
    scale = max(shape[0] / size[0], shape[1] / size[1])
    return abs(shape[0] - size[0] * scale) <= 1 and abs(shape[1] - size[1] * scale) <= 1
