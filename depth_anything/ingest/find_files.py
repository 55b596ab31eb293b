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

from depth_anything.ingest.archive_io import (
    check_file_size,
    list_lmdb_keys,
    list_tar_members,
    read_lmdb_value,
    read_tar_member,
)
from depth_anything.ingest.file_list import escape_field, unescape_field
from depth_anything.ingest.source import is_disk_failure
from depth_anything.ingest.video_frames import VIDEO_SUFFIXES, count_frames, read_frame

IMAGE_SUFFIXES = (
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
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
CONTAINER_KINDS = ("files", "tars", "lmdb", "films")
APPLE_DOUBLE_PREFIX = "._"
"""How the names begin of what macOS keeps beside a file on other disks and in archives; the rest is the file's name."""

_KIND_NAMES = {"files": "image files", "tars": "tars", "lmdb": "databases", "films": "films"}


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
    if raw.is_file() and raw.name.lower().endswith(TAR_SUFFIXES):
        yield from _find_in_tar(raw, "", passed_over)
        return passed_over
    if not raw.is_dir():
        raise ValueError(f"{raw} is not a folder: type the path of the folder that the set was downloaded to")
    for name, path in walk_files(raw, follow=True):
        assert path is not None, "links are followed"
        kind = _classify(name, kinds)
        found[kind] += 1
        if kind == "files":
            yield escape_field(name)
        elif kind == "tars":
            yield from _find_in_tar(path, name, passed_over)
        elif kind == "lmdb":
            yield from _find_in_lmdb(path.parent, name.rpartition("/")[0])
        elif kind == "films":
            yield from _find_in_video(path, name)
        else:
            passed_over[kind] += 1
    several = [f"{found[kind]} {_KIND_NAMES[kind]}" for kind in CONTAINER_KINDS if found[kind]]
    if len(several) > 1:
        print(
            f"{raw} holds {' and '.join(several)}, and images are taken from all of them: if some are copies of "
            "others, begin anew and pass them over, as with  --leave-out '*.tar/*'",
            file=sys.stderr,
        )
    return passed_over


def _classify(name: str, kinds: Collection[str]) -> str:
    """Say what a file is by its name: one of `kinds`, or the suffix under which it is counted."""
    low = name.lower()
    if low.rpartition("/")[2].startswith(APPLE_DOUBLE_PREFIX):
        return f"{APPLE_DOUBLE_PREFIX}*"
    for kind, endings in (("files", IMAGE_SUFFIXES), ("tars", TAR_SUFFIXES), ("films", VIDEO_SUFFIXES)):
        if kind in kinds and low.endswith(endings):
            return kind
    if "lmdb" in kinds and low.rpartition("/")[2] == "data.mdb":
        return "lmdb"
    return _suffix_of(low)


def _suffix_of(name: str) -> str:
    return os.path.splitext(name.lower())[1] or "no suffix"


def read_image_file(raw: Path, line: str) -> bytes:
    """Read the file that a line of `find_images` means.

    Raises:
        ValueError: It cannot be read as a whole.
        OSError: It is not there, or its disk fails.
    """
    name, *where = line.split("\t")
    if not where or where[0] == "file":
        return read_regular_file(raw / unescape_field(name))
    kind, place, *numbers = where
    if kind == "tar":
        path = raw / unescape_field(place) if place else raw
        return read_tar_member(path, *map(int, numbers))
    if kind == "lmdb":
        folder = unescape_field(place)
        key = unescape_field(name)[len(folder) + 1 if folder else 0 :]
        return read_lmdb_value(raw / folder, key.encode("utf-8", "surrogateescape"))
    if kind == "film":
        return read_frame(raw / unescape_field(place), int(numbers[0]))
    raise ValueError(unescape_field(place))


def walk_files(
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
    yield from _walk_folder(folder, "", {os.path.realpath(folder)} if follow else None, leave_out, unlisted)


def _walk_folder(
    folder: Path,
    prefix: str,
    seen: set[str] | None,
    leave_out: Path | None,
    unlisted: Callable[[str, OSError], None] | None,
) -> Iterator[tuple[str, Path | None]]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name + "/" if _is_dir_entry(entry) else entry.name for entry in entries]
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
            yield from _walk_folder(path, prefix + name, seen, leave_out, unlisted)


def _is_dir_entry(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if is_disk_failure(error):
            raise
        return False  # a link that leads in a circle, as a file tells better when it is read


def read_regular_file(path: Path) -> bytes:
    """Read a plain file; ValueError if it is none or too large, OSError if it is not there."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("not a regular file")
    check_file_size(about.st_size)
    return path.read_bytes()


def error_line(name: str, reason: str) -> str:
    """Return the line of what cannot be read."""
    return f"{escape_field(name)}\t!\t{escape_field(reason)}"


def file_line(name: str, path: Path) -> str:
    """Return the line of a file with its size, -1 if it cannot be told; OSError if its disk fails."""
    try:
        size = path.stat().st_size
    except OSError as error:
        if is_disk_failure(error):
            raise
        size = -1
    return f"{escape_field(name)}\tfile\t{size}"


def tar_line(name: str, place: str, offset: int, size: int) -> str:
    """Return the line of a tar's member."""
    return f"{escape_field(name)}\ttar\t{escape_field(place)}\t{offset}\t{size}"


def _find_in_tar(path: Path, place: str, passed_over: Counter[str]) -> Iterator[str]:
    try:
        plain = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if is_disk_failure(error):
            raise
        yield error_line(place or path.name, error.strerror or type(error).__name__)
        return
    if not plain:  # to open a pipe is to wait for ever
        yield error_line(place or path.name, "not a regular file")
        return
    for member in list_tar_members(path):
        name = f"{place}/{member.name}" if place else member.name
        if not member.name:
            yield error_line(place or path.name, member.fault)
        elif _classify(member.name, ("files",)) != "files":
            passed_over[_classify(member.name, ())] += 1
        elif member.fault:
            yield error_line(name, member.fault)
        else:
            yield tar_line(name, place, member.offset, member.size)


def _find_in_video(path: Path, place: str) -> Iterator[str]:
    try:
        count = count_frames(path)
    except ValueError as error:
        yield error_line(place, str(error))
        return
    for number in range(count):
        yield f"{escape_field(place)}/{number:06d}\tfilm\t{escape_field(place)}\t{number}"


def _find_in_lmdb(folder: Path, place: str) -> Iterator[str]:
    for key in list_lmdb_keys(folder):
        name = key.decode("utf-8", "surrogateescape")
        yield f"{escape_field(f'{place}/{name}' if place else name)}\tlmdb\t{escape_field(place)}"
