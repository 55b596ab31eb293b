"""Photographs wherever they lie below a folder: files, members of tars, values of lmdb folders, frames of films.

A line of a listing is the name that people see, and after tabs where its bytes are:

    NAME                               a file
    NAME <tab> file <tab> SIZE         likewise, where sizes are looked at
    NAME <tab> tar <tab> TAR <tab> OFFSET <tab> SIZE
    NAME <tab> lmdb <tab> FOLDER       the key is what NAME has behind FOLDER/
    NAME <tab> film <tab> FILM <tab> NUMBER
    NAME <tab> ! <tab> REASON          cannot be read, and why
"""

import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path

from depth_anything.data.sources.archives import (
    check_size,
    lmdb_keys,
    read_lmdb,
    read_member,
    tar_members,
)
from depth_anything.data.sources.films import FILMS, count_frames, read_frame
from depth_anything.data.sources.listing import as_field, from_field
from depth_anything.data.sources.source import is_of_the_disk

IMAGES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".heic",
    ".heif",
    ".avif",
    ".jp2",
    ".j2k",
)
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
KINDS = ("files", "tars", "lmdb", "films")
APPLE_DOUBLE = "._"
"""How the names begin of what macOS keeps beside a file on other disks and in archives; the rest is the file's name."""

_WORDS = {"files": "image files", "tars": "tars", "lmdb": "databases", "films": "films"}


def find_images(
    raw: Path, *, kinds: Collection[str] = ("files", "tars")
) -> Generator[str, None, Counter[str]]:
    """List the images below a folder in the order of their paths; those of a tar in its own order.

    Links to folders are followed, each folder is looked at once. Names that are no image's (annotations, lists,
    checksums) are passed over and counted.

    Args:
        raw: The folder, or a single tar.
        kinds: What to look into: "files", "tars", "lmdb", "films".

    Yields:
        A line an image.

    Returns:
        How many names were passed over, by suffix.

    Raises:
        ValueError: There is no such folder, or it cannot be listed.
    """
    passed_over: Counter[str] = Counter()
    found: Counter[str] = Counter()
    if raw.is_file() and raw.name.lower().endswith(TARS):
        yield from _in_tar(raw, "", passed_over)
        return passed_over
    if not raw.is_dir():
        raise ValueError(f"{raw} is not a folder: type the path of the folder that the set was downloaded to")
    for name, path in walk(raw, follow=True):
        assert path is not None, "links are followed"
        kind = _kind(name, kinds)
        found[kind] += 1
        if kind == "files":
            yield as_field(name)
        elif kind == "tars":
            yield from _in_tar(path, name, passed_over)
        elif kind == "lmdb":
            yield from _in_lmdb(path.parent, name.rpartition("/")[0])
        elif kind == "films":
            yield from _in_film(path, name)
        else:
            passed_over[kind] += 1
    several = [f"{found[kind]} {_WORDS[kind]}" for kind in KINDS if found[kind]]
    if len(several) > 1:
        print(
            f"{raw} holds {' and '.join(several)}, and images are taken from all of them: if some are copies of "
            "others, begin anew and pass them over, as with  --leave-out '*.tar/*'",
            file=sys.stderr,
        )
    return passed_over


def _kind(name: str, kinds: Collection[str]) -> str:
    """Say what a file is by its name: one of `kinds`, or the suffix under which it is counted."""
    low = name.lower()
    if low.rpartition("/")[2].startswith(APPLE_DOUBLE):
        return f"{APPLE_DOUBLE}*"
    for kind, endings in (("files", IMAGES), ("tars", TARS), ("films", FILMS)):
        if kind in kinds and low.endswith(endings):
            return kind
    if "lmdb" in kinds and low.rpartition("/")[2] == "data.mdb":
        return "lmdb"
    return _suffix(low)


def _suffix(name: str) -> str:
    return os.path.splitext(name.lower())[1] or "no suffix"


def read_image(raw: Path, line: str) -> bytes:
    """Read the file that a line of `find_images` means.

    Raises:
        ValueError: It cannot be read as a whole.
        OSError: It is not there, or its disk fails.
    """
    name, *where = line.split("\t")
    if not where or where[0] == "file":
        return read_file(raw / from_field(name))
    kind, place, *numbers = where
    if kind == "tar":
        path = raw / from_field(place) if place else raw
        return read_member(path, *map(int, numbers))
    if kind == "lmdb":
        folder = from_field(place)
        key = from_field(name)[len(folder) + 1 if folder else 0 :]
        return read_lmdb(raw / folder, key.encode("utf-8", "surrogateescape"))
    if kind == "film":
        return read_frame(raw / from_field(place), int(numbers[0]))
    raise ValueError(from_field(place))


def walk(
    folder: Path,
    *,
    follow: bool,
    leave_out: Path | None = None,
    unlisted: Callable[[str, OSError], None] | None = None,
) -> Iterator[tuple[str, Path | None]]:
    """List the files below a folder in the order of their names' bytes, with one folder at a time in memory.

    Args:
        folder: To begin in.
        follow: Links to folders; each real folder is looked at once.
        leave_out: A folder to pass over, resolved.
        unlisted: Is told of a folder inside that cannot be listed, and the rest goes on; None refuses it.

    Yields:
        The path below `folder` with "/" between, and the path to open; None for a link that is not followed.

    Raises:
        ValueError: A folder cannot be listed.
    """
    yield from _walk(folder, "", {os.path.realpath(folder)} if follow else None, leave_out, unlisted)


def _walk(
    folder: Path,
    prefix: str,
    seen: set[str] | None,
    leave_out: Path | None,
    unlisted: Callable[[str, OSError], None] | None,
) -> Iterator[tuple[str, Path | None]]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name + "/" if _is_folder(entry) else entry.name for entry in entries]
    except OSError as error:
        if unlisted is None or not prefix:
            raise ValueError(f"{folder} cannot be listed: {error.strerror}") from error
        unlisted(prefix, error)
        return
    names.sort(key=os.fsencode)
    for name in names:
        path = folder / name
        if not name.endswith("/"):
            yield prefix + name, path
        elif seen is None and path.is_symlink():
            yield prefix + name[:-1], None
        elif leave_out is None or path.resolve() != leave_out:
            real = os.path.realpath(path) if seen is not None else ""
            if seen is not None and real in seen:
                continue
            if seen is not None:
                seen.add(real)
            yield from _walk(path, prefix + name, seen, leave_out, unlisted)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if is_of_the_disk(error):
            raise
        return False  # a link that leads in a circle, as a file tells better when it is read


def read_file(path: Path) -> bytes:
    """Read a plain file; ValueError if it is none or too large, OSError if it is not there."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("not a regular file")
    check_size(about.st_size)
    return path.read_bytes()


def fault_line(name: str, reason: str) -> str:
    """Return the line of what cannot be read."""
    return f"{as_field(name)}\t!\t{as_field(reason)}"


def file_line(name: str, path: Path) -> str:
    """Return the line of a file with its size, -1 if it cannot be told; OSError if its disk fails."""
    try:
        size = path.stat().st_size
    except OSError as error:
        if is_of_the_disk(error):
            raise
        size = -1
    return f"{as_field(name)}\tfile\t{size}"


def tar_line(name: str, place: str, offset: int, size: int) -> str:
    """Return the line of a tar's member."""
    return f"{as_field(name)}\ttar\t{as_field(place)}\t{offset}\t{size}"


def _in_tar(path: Path, place: str, passed_over: Counter[str]) -> Iterator[str]:
    try:
        plain = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if is_of_the_disk(error):
            raise
        yield fault_line(place or path.name, error.strerror or type(error).__name__)
        return
    if not plain:  # to open a pipe is to wait for ever
        yield fault_line(place or path.name, "not a regular file")
        return
    for member in tar_members(path):
        name = f"{place}/{member.name}" if place else member.name
        if not member.name:
            yield fault_line(place or path.name, member.fault)
        elif _kind(member.name, ("files",)) != "files":
            passed_over[_kind(member.name, ())] += 1
        elif member.fault:
            yield fault_line(name, member.fault)
        else:
            yield tar_line(name, place, member.offset, member.size)


def _in_film(path: Path, place: str) -> Iterator[str]:
    try:
        count = count_frames(path)
    except ValueError as error:
        yield fault_line(place, str(error))
        return
    for number in range(count):
        yield f"{as_field(place)}/{number:06d}\tfilm\t{as_field(place)}\t{number}"


def _in_lmdb(folder: Path, place: str) -> Iterator[str]:
    for key in lmdb_keys(folder):
        name = key.decode("utf-8", "surrogateescape")
        yield f"{as_field(f'{place}/{name}' if place else name)}\tlmdb\t{as_field(place)}"
