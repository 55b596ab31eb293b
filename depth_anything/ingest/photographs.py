"""Anyone's photographs: a folder, a list file or a tar, made into image shards.

Facts: nothing is known but the pixels, so that a record holds the image and a json with `source`, the file's
own `name` and its `original_size`. Whatever `decode_image` reads is welcome: JPEG, PNG, WebP, TIFF, BMP, GIF, HEIC,
AVIF, JPEG 2000; any EXIF orientation, grey, CMYK, 16-bit, alpha. Upright RGB files of JPEG, PNG or WebP are kept
byte for byte, others become PNG as they are seen. Nothing is unpacked to disk. Every file is tried, whatever it is
called.
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
        name: Its path inside its folder or tar, or as the list has it.
        size: Bytes, -1 if unknown.
        read: Returns its bytes; raises ValueError with the reason why it cannot.
    """

    name: str
    size: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class PhotographSource:
    """Photographs as a source.

    Attributes:
        leave_out: A folder inside the raw one to pass over: the one that is being written.
    """

    leave_out: Path | None = None
    INFO: DatasetInfo = INFO

    def find(self, raw: Path) -> Iterable[str]:
        """List every file; see `list_photographs`. A line's last field is the file's size, by which a listing tells
        a folder from what it was later.

        Raises:
            ValueError: If there is nothing at `raw`, it is none of these, or it holds nothing.
        """
        line = None
        for line in _list_lines(raw, self.leave_out):
            yield line
        if line is None:
            raise ValueError(f"{raw} holds no files: type the path of a folder, a list of paths, or a tar")

    def read(self, raw: Path, line: str) -> RawSample:
        """Read the file of a line."""
        return RawSample(read_image_file(_base_folder(raw, line), line))


def list_photographs(source: str | Path, *, leave_out: str | Path | None = None) -> list[Photograph]:
    """List every file of a folder (recursively), list file (a path a line, relative to it) or tar, by name.

    A compressed tar keeps its own order: it can only be read from the front. A folder inside that cannot be listed is
    one file that cannot be read.

    Args:
        source: The folder, list or tar; a single image counts as a list of one.
        leave_out: A folder inside `source` to pass over: the one that is being written.

    Raises:
        ValueError: If there is nothing at `source`, or it is none of these.
    """
    raw = Path(source)
    lines = _list_lines(raw, Path(leave_out) if leave_out else None, tolerant=True)
    return [
        Photograph(_display_name(line), _file_size(line), partial(_read_photograph, raw, line))
        for line in lines
    ]


def iterate_images(source: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Decode the photographs of a folder, list file or tar in order; what is no image is passed over.

    Yields:
        The file's name and its image, uint8 (H, W, 3) RGB, upright.

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
    """Write photographs as a set of image shards, or return the set if it is there already.

    What is no image, or a broken one, is left out; the manifest counts it by reason and names the first
    hundred, NAME.skipped.json beside each shard names all. May be killed and started again.

    Args:
        source: Folder, list file or tar (see `list_photographs`).
        root: Folder of the set.
        name: Of the set; None: the folder's.
        per_shard: Files a shard.
        part: (k, n): the k-th of n parts, from 1.
        workers: Processes; 0: this one.
        short_side: See `to_record`; None leaves every image as it is.
        licence: Of the photographs, an SPDX name; kept in the manifest, and may be given later.

    Returns:
        The set; None while shards of other parts are missing.

    Raises:
        ValueError: If there is nothing at `source`, not one readable image, or `root` holds another set.
    """
    photographs = PhotographSource(leave_out=Path(root))
    made = write_source(
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
    if made is not None:
        _check_unchanged(photographs, Path(source), made)
    return made


def _check_unchanged(photographs: PhotographSource, raw: Path, made: ShardSet) -> None:
    """Refuse a finished set whose folder of photographs has changed: who adds some expects them in it."""
    count, digest = file_list_digest(photographs.find(raw))
    if "listing" in made.meta and made.meta["listing"] != digest:
        before = made.meta["settings"]["count"]
        what = f"count {before} in place of {count}" if before != count else "other files, or of other sizes"
        raise ShardError(
            f"{made.root} is a finished set of what {raw} held before ({what}): "
            f"name another folder, or remove it with  rm -r {made.root}"
        )


def _sort_key(line: str) -> bytes:
    return os.fsencode(unescape_field(line.partition("\t")[0]))


def _display_name(line: str) -> str:
    return unescape_field(line.partition("\t")[0])


def _file_size(line: str) -> int:
    last = line.rpartition("\t")[2]
    return int(last) if "\t" in line and "\t!\t" not in line else -1


def _base_folder(raw: Path, line: str) -> Path:
    return raw if raw.is_dir() or "\ttar\t" in line else raw.parent


def _read_photograph(raw: Path, line: str) -> bytes:
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
        raise ValueError(f"{raw} does not exist: type the path of a folder, a list of paths, or a tar")
    if tarfile.is_tarfile(raw):
        members = _list_tar(raw)
        return members if archive_io.is_compressed(raw) else sorted(members, key=_sort_key)
    return sorted(_list_text_file(raw), key=_sort_key)


def _list_folder(folder: Path, leave_out: Path | None, *, tolerant: bool) -> Iterator[str]:
    faults: list[str] = []

    def note(name: str, error: OSError) -> None:
        faults.append(error_line(name, f"a folder that cannot be listed: {error.strerror}"))

    for name, path in walk_files(
        folder, follow=False, leave_out=leave_out, unlisted=note if tolerant else None
    ):
        if path is None:
            yield error_line(name, "a link to a folder, which is not followed")
        else:
            yield file_line(name, path)
    yield from faults


def _list_text_file(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        head = file.read(_SIGNATURE_BYTES)
    if is_image_or_video(head):
        try:
            detect_format(head)
        except ValueError as error:  # a film, a raw file: what to do is said
            raise ValueError(f"{path}: {error}") from None
        yield file_line(path.name, path)
        return
    data = path.read_bytes()
    if b"\0" in data:
        raise ValueError(f"{path} is neither a tar nor a list of paths, one a line")
    for line in os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).splitlines():
        if line.strip():
            yield file_line(line.strip(), path.parent / line.strip())


def _list_tar(path: Path) -> Iterator[str]:
    for member in archive_io.list_tar_members(path):
        if member.fault:
            yield error_line(member.name or path.name, member.fault)
        else:
            yield tar_line(member.name, "", member.offset, member.size)
