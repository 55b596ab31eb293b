"""Find the images below a folder: plain files, members of tars, values of LMDB folders, frames of videos.

Each image is a line of a file list. The line holds the name of the image and, after tabs, the place of its bytes:

    NAME                               a file
    NAME <tab> file <tab> SIZE         a file, with its size in bytes
    NAME <tab> tar <tab> TAR <tab> OFFSET <tab> SIZE
    NAME <tab> lmdb <tab> FOLDER       the key is NAME without the leading FOLDER/
    NAME <tab> film <tab> VIDEO <tab> NUMBER
    NAME <tab> ! <tab> REASON          a file that cannot be read

A set stores the hash of its file list, so the words and the reasons of these lines are part of the file format.
"""

import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path

from depth_anything.errors import UserError
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

IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .webp .bmp .tif .tiff .gif .heic .heif .avif .jp2 .j2k".split())
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
CONTAINER_KINDS = ("files", "tars", "lmdb", "videos")
APPLE_DOUBLE_PREFIX = "._"
"""Prefix of the metadata files that macOS writes next to each file on foreign disks and in archives."""

_KIND_NAMES = {"files": "image files", "tars": "tars", "lmdb": "databases", "videos": "videos"}


def find_images(
    raw: Path, *, kinds: Collection[str] = ("files", "tars")
) -> Generator[str, None, Counter[str]]:
    """List the images below a folder in the order of their paths, and those of a tar in the order of the tar.

    Links to folders are followed; each folder is visited once. Files that are not images, such as annotations, lists
    and checksums, are skipped and counted.

    Args:
        raw: The folder, or a single tar.
        kinds: Where to look for images; any of `CONTAINER_KINDS`.

    Yields:
        One line per image; see the module docstring.

    Returns:
        Number of skipped files by suffix.

    Raises:
        ValueError: The folder does not exist or cannot be listed.
    """
    skipped: Counter[str] = Counter()
    found: Counter[str] = Counter()
    if raw.is_file() and raw.name.lower().endswith(TAR_SUFFIXES):
        yield from _find_in_tar(raw, "", skipped)
        return skipped
    if not raw.is_dir():
        raise UserError(
            f"{raw} is not a folder", "type the path of the folder that the set was downloaded to"
        )
    for name, path in walk_files(raw, follow=True):
        assert path is not None, "links are followed"
        kind = _classify(name, kinds)
        found[kind] += 1
        if kind == "files":
            yield escape_field(name)
        elif kind == "tars":
            yield from _find_in_tar(path, name, skipped)
        elif kind == "lmdb":
            yield from _find_in_lmdb(path.parent, name.rpartition("/")[0])
        elif kind == "videos":
            yield from _find_in_video(path, name)
        else:
            skipped[kind] += 1
    several = [f"{found[kind]} {_KIND_NAMES[kind]}" for kind in CONTAINER_KINDS if found[kind]]
    if len(several) > 1:
        print(
            f"{raw} holds {' and '.join(several)}, and images are read from all of them. If some are copies of "
            "others, start again in a new folder and skip them, for example with  --leave-out '*.tar/*'",
            file=sys.stderr,
        )
    return skipped


def read_image_file(raw: Path, line: str) -> bytes:
    """Read the image file of a line of `find_images`.

    Raises:
        ValueError: The file is damaged, incomplete or cannot be read.
        OSError: The file does not exist, or its disk fails.
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
    skip_folder: Callable[[Path], bool] | None = None,
    on_error: Callable[[str, OSError], None] | None = None,
    files_first: bool = False,
) -> Iterator[tuple[str, Path | None]]:
    """List the files below a folder in the byte order of their names, holding one folder at a time in memory.

    Args:
        folder: Where to start.
        follow: Follow links to folders; each real folder is visited once.
        skip_folder: Returns whether a folder below `folder` is skipped.
        on_error: Called with the relative path of a folder below `folder` that cannot be listed; the walk continues.
            None raises instead.
        files_first: List the files of a folder before its subfolders.

    Yields:
        The path relative to `folder` with "/" as separator, and the path to open, which is None for a link to a
        folder that is not followed.

    Raises:
        ValueError: A folder cannot be listed.
    """
    visited = {os.path.realpath(folder)}

    def walk(here: Path, prefix: str) -> Iterator[tuple[str, Path | None]]:
        try:
            with os.scandir(here) as entries:
                names = [entry.name + "/" if _is_folder(entry) else entry.name for entry in entries]
        except OSError as error:
            if on_error is None or not prefix:
                raise ValueError(f"{here} cannot be listed: {error.strerror}") from error
            on_error(prefix, error)
            return
        names.sort(key=lambda name: (files_first and name.endswith("/"), os.fsencode(name)))
        for name in names:
            path = here / name
            if not name.endswith("/"):
                yield prefix + name, path
            elif not follow and path.is_symlink():
                yield prefix + name[:-1], None
            elif skip_folder is None or not skip_folder(path):
                real = os.path.realpath(path) if follow else ""
                if real not in visited:
                    if follow:
                        visited.add(real)
                    yield from walk(path, prefix + name)

    yield from walk(folder, "")


def read_regular_file(path: Path) -> bytes:
    """Read a file.

    Raises:
        ValueError: It is not a regular file, or too large for an image.
        OSError: It does not exist, or its disk fails.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("not a regular file")
    check_file_size(about.st_size)
    return path.read_bytes()


def error_line(name: str, reason: str) -> str:
    """Return the line of a file that cannot be read."""
    return f"{escape_field(name)}\t!\t{escape_field(reason)}"


def file_line(name: str, path: Path) -> str:
    """Return the line of a file and its size in bytes, -1 if the file has none. Raises OSError if the disk fails."""
    try:
        size = path.stat().st_size
    except OSError as error:
        if is_disk_failure(error):
            raise
        size = -1
    return f"{escape_field(name)}\tfile\t{size}"


def tar_line(name: str, place: str, offset: int, size: int) -> str:
    """Return the line of a member of a tar."""
    return f"{escape_field(name)}\ttar\t{escape_field(place)}\t{offset}\t{size}"


def _classify(name: str, kinds: Collection[str]) -> str:
    """Return which of `kinds` a file is according to its name, or else the suffix to count it under."""
    low = name.lower()
    base = low.rpartition("/")[2]
    if base.startswith(APPLE_DOUBLE_PREFIX):
        return f"{APPLE_DOUBLE_PREFIX}*"
    for kind, suffixes in (("files", IMAGE_SUFFIXES), ("tars", TAR_SUFFIXES), ("videos", VIDEO_SUFFIXES)):
        if kind in kinds and low.endswith(suffixes):
            return kind
    if "lmdb" in kinds and base == "data.mdb":
        return "lmdb"
    return os.path.splitext(low)[1] or "no suffix"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if is_disk_failure(error):
            raise
        return False  # a link that points to itself: reading it as a file gives the better message


def _find_in_tar(path: Path, place: str, skipped: Counter[str]) -> Iterator[str]:
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if is_disk_failure(error):
            raise
        yield error_line(place or path.name, error.strerror or type(error).__name__)
        return
    if not is_regular:  # opening a named pipe would block
        yield error_line(place or path.name, "not a regular file")
        return
    for member in list_tar_members(path):
        name = f"{place}/{member.name}" if place else member.name
        if not member.name:
            yield error_line(place or path.name, member.error)
        elif _classify(member.name, ("files",)) != "files":
            skipped[_classify(member.name, ())] += 1
        elif member.error:
            yield error_line(name, member.error)
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
