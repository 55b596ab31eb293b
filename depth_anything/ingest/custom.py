"""A user's own images with depth or disparity, as a YAML file declares them (declaration.py, docs/own-data.md).

An image and a map form a pair if the text in place of {stem} in their paths is the same. Nothing is guessed from
pixels. Zero, negative, infinite and NaN values are invalid in every set. `invalid` names further invalid values, `sky`
or `sky_from` those of the sky, as they are stored in the files.
"""

import io
import os
import re
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from depth_anything.data.image_headers import DecodeCost, check_decode_cost, open_image
from depth_anything.ingest.file_list import escape_field, unescape_field
from depth_anything.ingest.find_files import IMAGE_SUFFIXES, walk_files
from depth_anything.ingest.maps import MAP_SUFFIXES, read_bytes, read_map
from depth_anything.ingest.source import DatasetInfo, RawSample, is_disk_failure, same_aspect_ratio

INTRINSIC_KEYS = ("fx", "fy", "cx", "cy")
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class FilePairs:
    """The files that were found, as paths below the folder of the YAML file.

    Attributes:
        matched: Name to (image, map).
        images: Images without a map, by name.
        maps: Maps without an image, by name.
        others: Number of files with another suffix or another name than the pattern, by key of the YAML file.
    """

    matched: dict[str, tuple[str, str]]
    images: dict[str, str]
    maps: dict[str, str]
    others: dict[str, int]


@dataclass(frozen=True)
class CustomSet:
    """A set as its YAML file declares it; a source for `write_source`.

    Attributes:
        folder: Folder of the YAML file, to which paths are relative.
        images: Folder of the images, or a pattern such as rgb/{stem}.jpg.
        depth: Folder or pattern of the maps.
        name: Name of the set. None: the name of the output folder.
        quantity: "depth" or "disparity".
        scale: Meters per stored unit. For disparity any factor, because only ratios matter.
        invalid: Stored values that mean "unknown".
        sky: Stored value that means sky.
        sky_from: Stored values from this one on mean sky.
        intrinsics: fx, fy, cx, cy of all images in pixels; the center of the upper left pixel is (0, 0).
        distance: "planar" (along the axis of the camera) or "ray" (from the center of the camera).
        key: Dataset in HDF5 files.
        channel: Channel in EXR files.
        licence: SPDX identifier.
        leave_out: A folder to skip: the folder that is being written.
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
    def INFO(self) -> DatasetInfo:  # noqa: N802  a constant of the module in other sources
        """Facts for the writer."""
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
        """Everything that determines the pixels."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for key in ("folder", "name", "licence", "leave_out"):
            del values[key]
        return {key: value for key, value in values.items() if value is not None and value != ()}

    def find_pairs(self) -> FilePairs:
        """Find images and maps and match them by name.

        Raises:
            ValueError: A folder does not exist, two images or two maps have one name, or no pair is found.
        """
        images = PathPattern.parse(self.images, "images", IMAGE_SUFFIXES)
        depths = PathPattern.parse(self.depth, "depth", MAP_SUFFIXES)
        if images.groups != depths.groups:
            raise ValueError(f"images: {self.images} and depth: {self.depth} must have the same {{names}}")
        skipped = {os.path.realpath(self.folder / pattern.base) for pattern in (images, depths)}
        skipped |= {str(self.leave_out)} if self.leave_out else set()
        image_files, other_images = images.find(self.folder, skip=skipped)
        map_files, other_maps = depths.find(self.folder, skip=skipped)
        names = sorted(image_files.keys() & map_files.keys())
        if not names:
            raise ValueError(_no_pairs_message(self, image_files, map_files))
        return FilePairs(
            {name: (image_files[name], map_files[name]) for name in names},
            {name: image_files[name] for name in sorted(image_files.keys() - map_files.keys())},
            {name: map_files[name] for name in sorted(map_files.keys() - image_files.keys())},
            {"images": other_images, "depth": other_maps},
        )

    def find(self, raw: Path) -> Generator[str, None, dict[str, int]]:
        """Yield a line per name with its image and its map, either of which may be missing.

        Returns:
            Number of other files by key of the YAML file.
        """
        pairs = self.find_pairs()
        rows = {name: (name, *files) for name, files in pairs.matched.items()}
        rows |= {name: (name, image, "") for name, image in pairs.images.items()}
        rows |= {name: (name, "", depth) for name, depth in pairs.maps.items()}
        for name in sorted(rows):
            yield self.format_line(*rows[name])
        return {f"other files in {key}": count for key, count in pairs.others.items() if count}

    @staticmethod
    def format_line(name: str, image: str, depth: str) -> str:
        """Return the line that `read` takes: a name and its files, one of which may be empty."""
        return "\t".join(map(escape_field, (name, image, depth)))

    def read(self, raw: Path, line: str) -> RawSample:
        """Read the image and the map of a line.

        Raises:
            ValueError: One of them is missing, cannot be read, or has another aspect ratio.
        """
        _, image, depth = map(unescape_field, line.split("\t"))
        if not depth:
            raise ValueError(f"no {self.quantity} of this name in {self.depth}")
        if not image:
            raise ValueError(f"no image of this name in {self.images}")
        try:
            data = read_bytes(self.folder / image)
        except ValueError as error:
            raise ValueError(f"its image: {error}") from error
        try:
            stored = read_map(self.folder / depth, key=self.key, channel=self.channel)
        except ValueError as error:
            raise ValueError(f"its {self.quantity}: {error}") from error
        size = read_image_size(data)
        check_aspect_ratio(size, stored.shape)
        return self._to_sample(data, size, stored)

    def _to_sample(self, data: bytes, size: tuple[int, int], stored: np.ndarray) -> RawSample:
        sky, unknown = None, np.zeros(stored.shape, bool)
        with np.errstate(over="ignore"):  # compared in the file's type, in which 655.35 is another number
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
        """Return planar depth divided by distance for each pixel of a map, float64 (H, W); `size` is the image's."""
        assert self.intrinsics is not None
        fx, fy, cx, cy = self.intrinsics
        if not (0 <= cx < size[1] and 0 <= cy < size[0]):
            raise ValueError(
                f"the principal point {cx:g}, {cy:g} is outside of the {size[1]} x {size[0]} pixels of the image"
            )
        x = ((np.arange(shape[1]) + 0.5) * size[1] / shape[1] - 0.5 - cx) / fx
        y = ((np.arange(shape[0]) + 0.5) * size[0] / shape[0] - 0.5 - cy) / fy
        return 1 / np.sqrt(1 + x**2 + y[:, None] ** 2)


@dataclass(frozen=True)
class PathPattern:
    """A pattern of paths with named parts, such as rgb/{stem}.jpg.

    Attributes:
        key: Key of the YAML file, for messages.
        base: Folder to search, the parts of the path before the first "{".
        groups: Sorted names of the parts in braces.
        expression: Matches a path below `base`.
    """

    key: str
    base: str
    groups: tuple[str, ...]
    expression: re.Pattern

    @classmethod
    def parse(cls, pattern: str, key: str, suffixes: tuple[str, ...]) -> "PathPattern":
        """Parse the value of `key`. A folder means FOLDER/{stem}; without a suffix any of `suffixes` matches."""
        pattern = os.path.expanduser(pattern)
        if "{" not in pattern:
            pattern = os.path.join(pattern, "{stem}")
        parts = pattern.split("/")
        fixed = next(number for number, part in enumerate(parts) if "{" in part)
        base, rest = "/".join(parts[:fixed]) or ("/" if fixed else ""), "/".join(parts[fixed:])
        base = "" if base == "." else base
        pieces = re.split(r"\{([a-z]\w*)\}", rest)
        groups = pieces[1::2]
        if len(set(groups)) != len(groups) or "stem" not in groups or "{" in "".join(pieces[::2]):
            raise ValueError(
                f"{key}: {pattern}: it must have {{stem}} once, as in  {key}: folder/{{stem}}{suffixes[0]}"
            )
        text = "".join(
            f"(?P<{piece}>{'.+' if piece == 'stem' else '[^/]+'})" if number % 2 else re.escape(piece)
            for number, piece in enumerate(pieces)
        )
        if not rest.lower().endswith(suffixes):
            text += f"(?i:{'|'.join(map(re.escape, suffixes))})"
        return cls(key, base, tuple(sorted(groups)), re.compile(text, re.DOTALL))

    def find(self, folder: Path, *, skip: set[str]) -> tuple[dict[str, str], int]:
        """Find the matching files below `folder`.

        Hidden files and folders, such as the ._ files of macOS, are ignored.

        Args:
            folder: Folder of the YAML file.
            skip: Real paths of folders to skip.

        Returns:
            The path of each file by name, and the number of files that do not match.

        Raises:
            ValueError: The folder does not exist or cannot be listed, or several files have one name.
        """
        top = folder / self.base
        if not top.is_dir():
            raise ValueError(f"{self.key}: {top} is not a folder")
        found: dict[str, list[str]] = {}
        others = 0

        def skip_folder(path: Path) -> bool:
            return path.name.startswith(".") or os.path.realpath(path) in skip

        for file, _ in walk_files(top, follow=True, skip_folder=skip_folder, files_first=True):
            if file.rpartition("/")[2].startswith("."):
                continue
            match = self.expression.fullmatch(file)
            if match is None:
                others += 1
                continue
            name = "/".join(match[group] for group in self.groups)
            found.setdefault(name, []).append(os.path.join(self.base, file))
        repeated = [paths for paths in found.values() if len(paths) > 1]
        if repeated:
            names = "; ".join(" and ".join(map(printable_path, paths)) for paths in repeated[:3])
            raise ValueError(
                f"{self.key}: {len(repeated)} names belong to several files each ({names}): choose one of them, "
                f"as in  {self.key}: {os.path.join(self.base, '{stem}')}{Path(repeated[0][0]).suffix}"
            )
        return {name: paths[0] for name, paths in found.items()}, others


def _no_pairs_message(custom: CustomSet, images: Mapping[str, str], depths: Mapping[str, str]) -> str:
    for key, found, suffixes in (("images", images, IMAGE_SUFFIXES), ("depth", depths, MAP_SUFFIXES)):
        if not found:
            pattern = getattr(custom, key)
            return f"{key}: {pattern} holds no matching file (looked for {' '.join(suffixes)})"
    image, depth = min(images), min(depths)
    return (
        f"no image and map have the same name: there are {len(images)} images, such as "
        f"{printable_path(images[image])}, and {len(depths)} maps, such as {printable_path(depths[depth])}; mark the "
        "name in their paths, as in  images: rgb/img_{stem}.jpg  and  depth: depth/depth_{stem}.png"
    )


def printable_path(path: str) -> str:
    """Return a path as valid Unicode, whatever bytes it consists of."""
    return path.encode("utf-8", "backslashreplace").decode()


def read_image_size(source: bytes | Path) -> tuple[int, int]:
    """Return the height and width of an image from its header, after its EXIF rotation.

    Raises:
        ValueError: The header cannot be read, or the image is too large.
        OSError: The disk fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the decoder reports damage and large sizes
        try:
            try:
                opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            except Image.DecompressionBombError:  # the limit of Pillow is lower than that of `open_image`
                opened = open_image(source if isinstance(source, bytes) else read_bytes(source))
            with opened as picture:
                width, height = picture.size
                rotated = picture.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
                check_decode_cost(DecodeCost("", width, height, 1, 0))
        except Exception as error:  # Pillow raises a dozen types for damaged files
            if is_disk_failure(error):
                raise
            reason = "of no known kind" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"its image cannot be decoded: {reason}") from error
    return (width, height) if rotated else (height, width)


def check_aspect_ratio(size: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Raise ValueError if a map does not have the aspect ratio of its image; their sizes may differ."""
    if not same_aspect_ratio(size, shape):
        rotated = same_aspect_ratio(size[::-1], shape)
        raise ValueError(
            f"its map has {shape[1]} x {shape[0]} pixels, its image {size[1]} x {size[0]}: the aspect ratios differ"
            + ("; rotate one of them (see the EXIF tag Orientation)" if rotated else "")
        )
