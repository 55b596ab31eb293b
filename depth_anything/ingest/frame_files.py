"""Find the files of each frame of a labeled set, and read them.

A labeled set has its images in one kind of folder and the maps in another, with different file names. A dataset module
describes each with a `FilePattern`. Files with the same sequence and the same frame name form a frame. A frame with a
missing file is listed too and rejected when it is read, so that it is counted.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from depth_anything.data.class_maps import map_labels, read_label_png
from depth_anything.data.image_headers import estimate_decode_cost
from depth_anything.errors import UserError
from depth_anything.ingest.file_list import escape_field, unescape_field
from depth_anything.ingest.find_files import APPLE_DOUBLE_PREFIX, walk_files
from depth_anything.ingest.maps import read_bytes
from depth_anything.ingest.source import DatasetInfo, RawSample

_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".z01", ".rar")
_AMBIGUOUS = "//"  # stands in the file list where several files match


@dataclass(frozen=True)
class FilePattern:
    """Where one of the files of a frame is.

    Attributes:
        content: What the file holds: "image", "depth" …
        folder: Glob pattern of the end of the folder's path: "image_left", "rgb/Camera_?", "*". Alternatives are
            separated by "|".
        name: Regular expression of the file name; its only group is the name of the frame.
    """

    content: str
    folder: str
    name: str


def find_frames(
    raw: Path,
    info: DatasetInfo,
    patterns: Sequence[FilePattern],
    *,
    sequence: Callable[[tuple[str, ...]], str],
) -> Iterator[str]:
    """List the frames of a set, sorted by sequence and by name.

    Links to folders are followed; each folder is visited once. The "._" files of macOS are ignored.

    Args:
        raw: Folder of the set; the frames may be at any depth below it.
        info: The set, for the error message if nothing is found.
        patterns: The files of a frame, the image first.
        sequence: Maps the parts of a folder's path below `raw` to the name of its sequence.

    Yields:
        sequence/frame, and for each pattern a tab and the path of the file below `raw`, empty if there is none.

    Raises:
        ValueError: The folder does not exist, holds no frame or cannot be listed, or two folders hold the same kind
            of files of one sequence.
    """
    if not raw.is_dir():
        raise UserError(f"{raw} is not a folder", "type the path of the folder that the set was unpacked to")
    found: dict[str, dict[FilePattern, tuple[str, dict[str, str]]]] = {}
    last_folder: str | None = None
    parts: tuple[str, ...] = ()
    matching: list[FilePattern] = []
    has_archives = False
    for path, _ in walk_files(raw, follow=True):
        has_archives |= path.endswith(_ARCHIVE_SUFFIXES)
        folder, _, file = path.rpartition("/")
        if folder != last_folder:
            last_folder, parts = folder, tuple(folder.split("/")) if folder else ()
            matching = [pattern for pattern in patterns if _matches_folder(pattern, parts)]
        for pattern in matching:
            match = re.fullmatch(pattern.name, file)
            if match and not file.startswith(APPLE_DOUBLE_PREFIX):
                name = sequence(parts)
                known, frames = found.setdefault(name, {}).setdefault(pattern, (folder, {}))
                if known != folder:
                    raise UserError(
                        f"{raw / folder} and {raw / known} hold the same {pattern.content} files, of {name}",
                        "type the path of a folder that holds them once",
                    )
                frames[match[1]] = _AMBIGUOUS if match[1] in frames else file
    if not found:
        advice = "unpack the archives in it" if has_archives else f"download it from {info.get}"
        raise UserError(f"{raw} does not hold {info.title}: looked for {info.layout}", advice)
    for name in sorted(found):
        folders = [found[name].get(pattern, ("", {})) for pattern in patterns]
        for frame in sorted({frame for _, frames in folders for frame in frames}):
            paths = [_join_path(folder, frames.get(frame, "")) for folder, frames in folders]
            yield "\t".join(map(escape_field, [f"{name}/{frame}" if name else frame, *paths]))


def split_fields(line: str) -> list[str]:
    """Split a line into the name of the frame and the fields after it."""
    return [unescape_field(text) for text in line.split("\t")]


def join_parts(parts: Sequence[str], last: int | None = None) -> str:
    """Join the parts of a path with "/"; only the `last` parts if given."""
    return "/".join(parts if last is None else parts[-last:])


def read_frame_file(raw: Path, pattern: FilePattern, path: str) -> bytes:
    """Read one file of a frame by its path in the file list.

    Raises:
        ValueError: The frame has no such file, or several, or the file cannot be read.
    """
    if not path:
        raise ValueError(
            f"its {pattern.content} is missing: no file {_glob_text(pattern)} in a folder {pattern.folder}"
        )
    if path == _AMBIGUOUS:
        raise ValueError(
            f"its {pattern.content} is ambiguous: several files {_glob_text(pattern)} have its name"
        )
    try:
        return read_bytes(raw / path)
    except ValueError as error:
        raise ValueError(f"its {pattern.content} cannot be read: {error}") from error


def read_pair(
    raw: Path,
    patterns: tuple[FilePattern, FilePattern],
    paths: Sequence[str],
    decode: Callable[[bytes], np.ndarray],
) -> tuple[bytes, np.ndarray]:
    """Read the image file and the map of a frame.

    Args:
        raw: Folder of the set.
        patterns: Path patterns of the image and of the map.
        paths: Paths of both in the file list.
        decode: Converts the bytes of the map's file to (H, W).

    Returns:
        The bytes of the image file, and the map.

    Raises:
        ValueError: A file is missing or damaged, or the two differ in size.
    """
    image = read_frame_file(raw, patterns[0], paths[0])
    values = decode(read_frame_file(raw, patterns[1], paths[1]))
    check_map_size(image, values, patterns[1].content)
    return image, values


def read_class_frame(
    raw: Path, patterns: tuple[FilePattern, FilePattern], line: str, numbers: Mapping[int, int]
) -> RawSample:
    """Read a photograph and its class map, a PNG of numbers.

    Args:
        raw: Folder of the set.
        patterns: Path patterns of the image and of the class map.
        line: A line of `find_frames`.
        numbers: Number in the PNG to class.

    Raises:
        ValueError: A file is missing or damaged, they differ in size, or a number is not in `numbers`.
    """
    content = patterns[1].content

    def decode(data: bytes) -> np.ndarray:
        try:
            return read_label_png(data)
        except ValueError as error:
            raise ValueError(f"its {content}: {error}") from error

    image, stored = read_pair(raw, patterns, split_fields(line)[1:], decode)
    return RawSample(image, classes=map_labels(stored, numbers, what=content))


def check_map_size(image: bytes, values: np.ndarray, content: str) -> None:
    """Raise ValueError if a map (H, W) does not have the size of its image file, as one belongs to another frame."""
    try:
        cost = estimate_decode_cost(image)
    except ValueError as error:
        raise ValueError(f"its image cannot be read: {error}") from error
    if values.shape != (cost.height, cost.width):
        size = f"{values.shape[1]} x {values.shape[0]}"
        raise ValueError(f"its image has {cost.width} x {cost.height} pixels, its {content} {size}")


def check_mask_size(mask: np.ndarray, values: np.ndarray, content: str) -> None:
    """Raise ValueError if a mask and its map differ in shape."""
    if mask.shape != values.shape:
        raise ValueError(f"its {content} has the shape {mask.shape}, its map {values.shape}")


def _matches_folder(pattern: FilePattern, parts: tuple[str, ...]) -> bool:
    if pattern.folder == "*":
        return True
    for alternative in pattern.folder.split("|"):
        globs = alternative.split("/")
        ends = parts[-len(globs) :]
        if len(ends) == len(globs) and all(map(fnmatchcase, ends, globs)):
            return True
    return False


def _join_path(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder and file not in ("", _AMBIGUOUS) else file


def _glob_text(pattern: FilePattern) -> str:
    """Return the file names of a pattern in the notation of a shell."""
    group = r"\((?:[^()]|\([^()]*\))*\)"  # the frame's group, with other groups in it
    return re.sub(group, "*", pattern.name, count=1).replace("\\", "").replace("(?:", "(")
