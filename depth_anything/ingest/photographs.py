"""Photographs without labels: a folder, a text file with a path per line, or a tar, written as image shards.

Nothing is known of them but their pixels: a record holds the image and a JSON with `source`, the file's own `name` and
its `original_size`. Every file is tried, whatever its name, and every image that `decode_image` reads is accepted.
Upright RGB files in JPEG, PNG or WebP are stored unchanged; other images become PNG. Nothing is unpacked to disk.
"""

import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from depth_anything.data.image_headers import detect_format, is_image_or_video
from depth_anything.data.sample import decode_image
from depth_anything.data.tars import ShardError, ShardSet
from depth_anything.errors import UserError
from depth_anything.ingest import archive_io
from depth_anything.ingest.file_list import file_list_digest, unescape_field
from depth_anything.ingest.find_files import error_line, file_line, read_image_file, tar_line, walk_files
from depth_anything.ingest.source import DatasetInfo, RawSample, is_disk_failure
from depth_anything.ingest.writer import write_source

_SIGNATURE_BYTES = 512

INFO = DatasetInfo(
    name="images",
    title="photographs",
    records=0,
    layout="files of any kind",
    get="your own",
    licence="",
)


@dataclass(frozen=True)
class Photograph:
    """A file that may be an image.

    Attributes:
        name: Its path inside its folder or tar, or as the text file has it.
        size: Size in bytes, -1 if unknown.
        read: Returns its bytes; raises ValueError with the reason if that fails.
    """

    name: str
    size: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class PhotographSource:
    """A source of photographs for `write_source`.

    Attributes:
        leave_out: A folder inside the raw folder to skip: the folder that is being written.
    """

    leave_out: Path | None = None
    INFO: DatasetInfo = INFO

    def find(self, raw: Path) -> Iterable[str]:
        """List every file; see `list_photographs`. The last field of a line is the size of the file.

        Raises:
            ValueError: Nothing is at `raw`, or it is none of the three, or holds no files.
        """
        line = None
        for line in _list_lines(raw, self.leave_out):
            yield line
        if line is None:
            raise UserError(f"{raw} holds no files", "type the path of a folder, a list of paths, or a tar")

    def read(self, raw: Path, line: str) -> RawSample:
        """Read the file of a line."""
        return RawSample(read_image_file(_base_folder(raw, line), line))


def list_photographs(source: str | Path, *, leave_out: str | Path | None = None) -> list[Photograph]:
    """List every file of a folder (recursively), text file (a path per line, relative to it) or tar, sorted by name.

    The files of a compressed tar keep its order, because it can only be read from the front. A folder that cannot be
    listed counts as one unreadable file.

    Args:
        source: The folder, text file or tar; a single image counts as a list of one.
        leave_out: A folder inside `source` to skip: the folder that is being written.

    Raises:
        ValueError: Nothing is at `source`, or it is none of the three.
    """
    raw = Path(source)
    lines = _list_lines(raw, Path(leave_out) if leave_out else None, tolerant=True)
    return [Photograph(_file_name(line), _file_size(line), partial(_read, raw, line)) for line in lines]


def iterate_images(source: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Decode the photographs of a folder, text file or tar in order; files that are not images are skipped.

    Yields:
        The name of the file and its image, uint8 (H, W, 3) RGB, upright.

    Raises:
        ValueError: As `list_photographs`.
    """
    for photograph in list_photographs(source):
        try:
            image = decode_image(photograph.read())
        except ValueError:
            continue
        yield photograph.name, image


def write_images(
    source: str | Path,
    root: str | Path,
    *,
    name: str | None = None,
    per_shard: int = 1000,
    part: tuple[int, int] = (1, 1),
    workers: int = 0,
    short_side: int | None = None,
    licence: str | None = None,
) -> ShardSet | None:
    """Write photographs as a set of image shards. An interrupted set is continued; a finished one is returned.

    Files that are not images, or damaged, are rejected. The manifest counts them by reason and names the first
    hundred; NAME.skipped.json next to each shard names all.

    Args:
        source: Folder, text file or tar; see `list_photographs`.
        root: Folder of the set.
        name: Name of the set. None: the name of the folder.
        per_shard: Files per shard.
        part: (k, n) writes the k-th of n parts, starting at 1.
        workers: Number of worker processes; 0 writes in this process.
        short_side: See `encode_sample`. None keeps every image as it is.
        licence: SPDX identifier of the photographs for the manifest; may be given by a later call.

    Returns:
        The set, or None while shards of other parts are missing.

    Raises:
        ValueError: Nothing is at `source`, no image can be read, or `root` holds another set.
    """
    photographs = PhotographSource(leave_out=Path(root))
    shard_set = write_source(
        photographs,
        source,
        root,
        name=name,
        per_shard=per_shard,
        part=part,
        workers=workers,
        short_side=short_side,
        licence=licence,
    )
    if shard_set is not None:
        _check_unchanged(photographs, Path(source), shard_set)
    return shard_set


def _check_unchanged(photographs: PhotographSource, raw: Path, shard_set: ShardSet) -> None:
    """Raise ShardError if photographs were added or changed since the set was written; the set would lack them."""
    count, digest = file_list_digest(photographs.find(raw))
    if "listing" in shard_set.meta and shard_set.meta["listing"] != digest:
        before = shard_set.meta["settings"]["count"]
        change = (
            f"count {before} in place of {count}" if before != count else "other files, or of other sizes"
        )
        raise ShardError(
            f"{shard_set.root} is a finished set, and {raw} has changed since ({change})",
            f"name another folder, or remove it with  rm -r {shard_set.root}",
        )


def _file_name(line: str) -> str:
    return unescape_field(line.partition("\t")[0])


def _sort_key(line: str) -> bytes:
    return os.fsencode(_file_name(line))


def _file_size(line: str) -> int:
    last = line.rpartition("\t")[2]
    return int(last) if "\t" in line and "\t!\t" not in line else -1


def _base_folder(raw: Path, line: str) -> Path:
    """Return what the name in a line is relative to."""
    return raw if raw.is_dir() or "\ttar\t" in line else raw.parent


def _read(raw: Path, line: str) -> bytes:
    try:
        return read_image_file(_base_folder(raw, line), line)
    except OSError as error:
        if is_disk_failure(error):
            raise
        raise ValueError(error.strerror or type(error).__name__) from error


def _list_lines(raw: Path, leave_out: Path | None, *, tolerant: bool = False) -> Iterable[str]:
    if raw.is_dir():
        return _list_folder(raw, leave_out.resolve() if leave_out else None, tolerant=tolerant)
    if not raw.is_file():
        problem = "is not a regular file" if raw.exists() else "does not exist"
        raise UserError(f"{raw} {problem}", "type the path of a folder, a list of paths, or a tar")
    if tarfile.is_tarfile(raw):
        members = _list_tar(raw)
        return members if archive_io.is_compressed(raw) else sorted(members, key=_sort_key)
    return sorted(_list_text_file(raw), key=_sort_key)


def _list_folder(folder: Path, leave_out: Path | None, *, tolerant: bool) -> Iterator[str]:
    errors: list[str] = []

    def note(name: str, error: OSError) -> None:
        errors.append(error_line(name, f"a folder that cannot be listed: {error.strerror}"))

    def skip_folder(path: Path) -> bool:
        return leave_out is not None and path.resolve() == leave_out

    on_error = note if tolerant else None
    for name, path in walk_files(folder, follow=False, skip_folder=skip_folder, on_error=on_error):
        if path is None:
            yield error_line(name, "a link to a folder, which is not followed")
        else:
            yield file_line(name, path)
    yield from errors


def _list_text_file(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        head = file.read(_SIGNATURE_BYTES)
    if is_image_or_video(head):
        try:
            detect_format(head)
        except ValueError as error:  # a video or a raw file of a camera; the message says what to do
            raise ValueError(f"{path}: {error}") from None
        yield file_line(path.name, path)
        return
    data = path.read_bytes()
    if b"\0" in data:
        raise ValueError(f"{path} is neither a tar nor a text file with a path per line")
    for line in os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).splitlines():
        if line.strip():
            yield file_line(line.strip(), path.parent / line.strip())


def _list_tar(path: Path) -> Iterator[str]:
    for member in archive_io.list_tar_members(path):
        if member.error:
            yield error_line(member.name or path.name, member.error)
        else:
            yield tar_line(member.name, "", member.offset, member.size)
