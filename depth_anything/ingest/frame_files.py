"""Raw sets as they lie in folders: which files make a frame, and their bytes.

A labelled set keeps its images in one kind of folder and their maps in another, under names that differ by more
than the suffix. A source says how with a `Kind` for each; a frame is then what has the same sequence and the same
name in all of them. A frame that lacks a file is listed like any other and refused when it is read, so that nothing
is lost in silence.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from depth_anything.data.image_headers import estimate_decode_cost
from depth_anything.errors import UserError
from depth_anything.ingest.file_list import escape_field, unescape_field
from depth_anything.ingest.find_files import APPLE_DOUBLE_PREFIX, walk_files
from depth_anything.ingest.maps import read_bytes
from depth_anything.ingest.source import DatasetInfo

_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".z01", ".rar")
_AMBIGUOUS = "//"  # in place of a path: more than one file could be the one


@dataclass(frozen=True)
class FilePattern:
    """One of the files that make a frame.

    Attributes:
        what: It is: "image", "depth" …
        folder: The last names of its folder's path, with wildcards: "image_left", "rgb/Camera_?", "*"; of several
            that may be, "col|color".
        name: Regular expression of its own name; the one group is the frame's.
    """

    what: str
    folder: str
    name: str


def find_frames(
    raw: Path, facts: DatasetInfo, kinds: Sequence[FilePattern], *, sequence: Callable[[tuple[str, ...]], str]
) -> Iterator[str]:
    """List the frames of a set, sequence by sequence, both in the order of their names.

    Links to folders are followed, each folder is looked at once. The "._" files of macOS are none of the set's.

    Args:
        raw: Folder of the set; its frames may lie at any depth below.
        facts: Of the set, for what is told if nothing is found.
        kinds: Of files; the image first.
        sequence: Makes a folder's path below `raw`, in parts, the name that its frames have in common.

    Yields:
        sequence/frame, then for each kind after a tab the path of its file below `raw`, empty if it has none.

    Raises:
        ValueError: If there is no such folder, or nothing of this layout in it, a folder cannot be listed, or two
            hold the same kind of the same sequence.
    """
    if not raw.is_dir():
        raise ValueError(f"{raw} is not a folder: type the path of the folder that the set was unpacked to")
    found: dict[str, dict[FilePattern, tuple[str, dict[str, str]]]] = {}
    here: str | None = None
    parts: tuple[str, ...] = ()
    fitting: list[FilePattern] = []
    packed = False
    for path, _ in walk_files(raw, follow=True):
        packed |= path.endswith(_ARCHIVE_SUFFIXES)
        folder, _, file = path.rpartition("/")
        if folder != here:
            here, parts = folder, tuple(folder.split("/")) if folder else ()
            fitting = [kind for kind in kinds if _matches_folder(kind, parts)]
        for kind in fitting:
            match = re.fullmatch(kind.name, file)
            if match and not file.startswith(APPLE_DOUBLE_PREFIX):
                name = sequence(parts)
                known, frames = found.setdefault(name, {}).setdefault(kind, (folder, {}))
                if known != folder:
                    raise ValueError(
                        f"{raw / folder} and {raw / known} hold the same {kind.what}s, of {name}: "
                        "type the path of a folder that holds them once"
                    )
                frames[match[1]] = _AMBIGUOUS if match[1] in frames else file
    if not found:
        fix = "unpack the archives that lie there" if packed else f"get it from {facts.get}"
        raise UserError(f"{raw} does not hold {facts.title}: looked for {facts.layout}", fix)
    for name in sorted(found):
        held = [found[name].get(kind, ("", {})) for kind in kinds]
        for frame in sorted({frame for _, frames in held for frame in frames}):
            paths = [_join_path(folder, frames.get(frame, "")) for folder, frames in held]
            yield "\t".join(map(escape_field, [f"{name}/{frame}" if name else frame, *paths]))


def split_fields(line: str) -> list[str]:
    """Take a line apart: the frame's name, then what stands after the tabs."""
    return [unescape_field(text) for text in line.split("\t")]


def join_parts(parts: Sequence[str], last: int | None = None) -> str:
    """Join the parts of a path to a name; the `last` of them only, if given."""
    return "/".join(parts if last is None else parts[-last:])


def read_frame_file(raw: Path, kind: FilePattern, path: str) -> bytes:
    """Read a frame's file of a kind by its path in the listing.

    Raises:
        ValueError: If the frame has none, or it cannot be read.
    """
    if not path:
        raise ValueError(f"its {kind.what} is missing: no file {_glob_text(kind)} in a folder {kind.folder}")
    if path == _AMBIGUOUS:
        raise ValueError(f"its {kind.what} is not known: several files {_glob_text(kind)} have its name")
    try:
        return read_bytes(raw / path)
    except ValueError as error:
        raise ValueError(f"its {kind.what} cannot be read: {error}") from error


def check_map_size(image: bytes, values: np.ndarray, what: str) -> None:
    """Refuse a map that is not of its image's size: one of the two belongs to another frame.

    Args:
        image: An image file; its header is enough.
        values: (H, W).
        what: The map is.

    Raises:
        ValueError: If the sizes differ, or the image has none.
    """
    try:
        cost = estimate_decode_cost(image)
    except ValueError as error:
        raise ValueError(f"its image cannot be read: {error}") from error
    width, height = cost.width, cost.height
    if values.shape != (height, width):
        theirs = f"{values.shape[1]} x {values.shape[0]}"
        raise ValueError(f"its image has {width} x {height} pixels, its {what} {theirs}")


def _matches_folder(kind: FilePattern, parts: tuple[str, ...]) -> bool:
    """Whether a kind's files may lie in the folder of this path."""
    if kind.folder == "*":
        return True
    for folder in kind.folder.split("|"):
        patterns = folder.split("/")
        ends = parts[-len(patterns) :]
        if len(ends) == len(patterns) and all(map(fnmatchcase, ends, patterns)):
            return True
    return False


def _join_path(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder and file not in ("", _AMBIGUOUS) else file


def _glob_text(kind: FilePattern) -> str:
    """The pattern of a kind's names as people write them."""
    frame = r"\((?:[^()]|\([^()]*\))*\)"  # the group, with others in it
    return re.sub(frame, "*", kind.name, count=1).replace("\\", "").replace("(?:", "(")
