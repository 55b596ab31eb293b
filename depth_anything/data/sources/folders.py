"""Raw sets as they lie in folders: which files make a frame, and their bytes.

A labelled set keeps its images in one kind of folder and their maps in another, under names that differ by more
than the suffix. A source says how with a `Kind` for each; a frame is then what has the same sequence and the same
name in all of them. A frame that lacks a file is listed like any other and refused when it is read, so that nothing
is lost in silence.
"""

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from PIL import Image

from depth_anything.data.sources.maps import read_bytes
from depth_anything.data.sources.source import Facts

_SEVERAL = "//"  # in place of a path: more than one file could be the one


@dataclass(frozen=True)
class Kind:
    """One of the files that make a frame.

    Attributes:
        what: It is: "image", "depth" …
        folder: The last names of its folder's path, with wildcards: "image_left", "rgb/Camera_0", "*".
        name: Regular expression of its own name; the one group is the frame's.
    """

    what: str
    folder: str
    name: str


def find_frames(
    raw: Path, facts: Facts, kinds: Sequence[Kind], *, sequence: Callable[[tuple[str, ...]], str]
) -> Iterator[str]:
    """List the frames of a set, sequence by sequence, both in the order of their names.

    Links to folders are followed, each folder is looked at once.

    Args:
        raw: Folder of the set; its frames may lie at any depth below.
        facts: Of the set, for what is told if nothing is found.
        kinds: Of files; the image first.
        sequence: Makes a folder's path below `raw`, in parts, the name that its frames have in common.

    Yields:
        sequence/frame, then for each kind after a tab the path of its file below `raw`, empty if it has none.

    Raises:
        ValueError: If there is no such folder, or nothing of this layout in it, a folder cannot be listed, two folders
            hold the same kind of the same sequence, or a name has a tab or a line break.
    """
    found: dict[str, dict[Kind, tuple[str, dict[str, str]]]] = {}
    for here, files in _walk(raw):
        parts = Path(here).parts
        for kind in kinds:
            frames = _frames(parts, files, kind)
            if frames:
                name = sequence(parts)
                other = found.setdefault(name, {}).setdefault(kind, (here, frames))
                if other[0] != here:
                    raise ValueError(
                        f"{raw / here} and {raw / other[0]} hold the same {kind.what}s, of {name}: "
                        "type the path of a folder that holds them once"
                    )
    if not found:
        raise ValueError(
            f"{raw} does not hold {facts.title}: looked for {facts.layout}; get it from {facts.get}"
        )
    for name in sorted(found):
        yield from _lines(name, [found[name].get(kind) for kind in kinds])


def relative_name(parts: Sequence[str], last: int | None = None) -> str:
    """Join the parts of a path to a name; the `last` of them only, if given."""
    return "/".join(parts if last is None else parts[-last:])


def read_kind(raw: Path, kind: Kind, path: str) -> bytes:
    """Read a frame's file of a kind by its path in the listing.

    Raises:
        ValueError: If the frame has none, or it cannot be read.
    """
    if not path:
        raise ValueError(f"its {kind.what} is missing: no file {_shown(kind)} in a folder {kind.folder}")
    if path.endswith(_SEVERAL):
        raise ValueError(f"its {kind.what} is not known: several files {_shown(kind)} have its name")
    try:
        return read_bytes(raw / path)
    except ValueError as error:
        raise ValueError(f"its {kind.what} cannot be read: {error}") from error


def check_size(image: bytes, values: np.ndarray, what: str) -> None:
    """Refuse a map that is not of its image's size: one of the two belongs to another frame.

    Args:
        image: An image file; its header is enough.
        values: (H, W).
        what: The map is.

    Raises:
        ValueError: If the sizes differ, or the image has none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decompressed
        try:
            width, height = Image.open(io.BytesIO(image)).size
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"its image cannot be read: {error}") from error
    if values.shape != (height, width):
        theirs = f"{values.shape[1]} x {values.shape[0]}"
        raise ValueError(f"its image has {width} x {height} pixels, its {what} {theirs}")


def _walk(raw: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below, by its path, and the files in it; in the order of names, each real folder once."""
    if not raw.is_dir():
        raise ValueError(f"{raw} is no folder: type the path of the folder that the set was unpacked to")
    seen = set()
    for here, folders, files in os.walk(raw, followlinks=True, onerror=_cannot_list):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield Path(here).relative_to(raw).as_posix(), files


def _cannot_list(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be listed: {error.strerror}")


def _frames(parts: Sequence[str], files: Sequence[str], kind: Kind) -> dict[str, str]:
    """The names of a folder's frames, and of their files, if it is one for this kind."""
    patterns = kind.folder.split("/")
    ends = parts[-len(patterns) :]
    if kind.folder != "*" and (
        len(ends) < len(patterns) or not all(fnmatchcase(*pair) for pair in zip(ends, patterns, strict=True))
    ):
        return {}
    frames: dict[str, str] = {}
    for file in files:
        match = re.fullmatch(kind.name, file)
        if match:
            frames[match[1]] = _SEVERAL if match[1] in frames else file
    return frames


def _lines(name: str, kinds: Sequence[tuple[str, dict[str, str]] | None]) -> Iterator[str]:
    for frame in sorted({frame for kind in kinds if kind for frame in kind[1]}):
        paths = [_path(kind[0], kind[1][frame]) if kind and frame in kind[1] else "" for kind in kinds]
        line = "\t".join([f"{name}/{frame}" if name else frame, *paths])
        if line.count("\t") != len(kinds) or "\n" in line or "\r" in line:
            raise ValueError(f"{line!r} has a tab or a line break in a name: rename it")
        yield line


def _path(folder: str, file: str) -> str:
    return file if folder == "." else f"{folder}/{file}"


def _shown(kind: Kind) -> str:
    """The pattern of a kind's names as people write them."""
    return re.sub(r"\(.*?\)", "*", kind.name, count=1).replace("\\", "")
