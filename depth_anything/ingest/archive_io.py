"""Read images from tars and LMDB folders without unpacking them.

A plain tar is scanned header by header, and a member is one read at its offset. A compressed tar, which is recognized
by its first bytes, is read from the front: offsets then refer to the decompressed tar, and reading members in order
decompresses it once.
"""

import bz2
import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from depth_anything.data.tars import BoundedHeaderFile
from depth_anything.ingest.source import is_disk_failure

_CHUNK = 1 << 20
MAX_FILE_BYTES = 1 << 29
"""Size limit of one file, so that a video or an archive among the photographs does not fill the memory."""

ARCHIVE_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)
"""What reading a damaged archive may raise."""

_DECOMPRESSORS: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
)


class ArchiveMember(NamedTuple):
    """A file in a tar: offset and size in the decompressed tar; `error` says why it cannot be read, else it is ""."""

    name: str
    offset: int
    size: int
    error: str


def is_compressed(path: Path) -> bool:
    """Return whether a tar is compressed, according to its first bytes."""
    return _decompressor(path) is not None


def list_tar_members(path: Path) -> Iterator[ArchiveMember]:
    """List the files of a tar in its order, holding one of them in memory.

    If the tar is damaged or truncated, the last member has no name, and its `error` is the reason.

    Raises:
        OSError: The disk fails, which is not damage.
    """
    last = "its beginning"
    try:
        with open_tar(path) as stream:
            recorder = _TailRecorder(stream)
            with tarfile.open(fileobj=recorder, mode="r:") as tar:  # type: ignore[call-overload]
                while (info := tar.next()) is not None:
                    tar.members.clear()  # tarfile would keep all members of a large tar in memory
                    if not info.isdir():
                        last = info.name.removeprefix("./")
                        error = "" if info.isreg() and not info.issparse() else "not a regular file"
                        yield ArchiveMember(last, info.offset_data, info.size, error)
            # tarfile takes a truncated header, or a header of garbage, for the end of the tar.
            if len(recorder.last) < tarfile.BLOCKSIZE or any(recorder.last):
                raise EOFError("no mark of the end follows")
            while is_compressed(path) and stream.read(_CHUNK):
                pass  # the checksum is at the end of the stream
    except ARCHIVE_ERRORS as error:
        if is_disk_failure(error):
            raise
        # These reasons are part of the file list, which is hashed: do not change them.
        reason = f"the tar is damaged, and nothing after {last} can be found: {error}"
        if isinstance(error, gzip.BadGzipFile) and "CRC" in str(error):
            reason = f"the tar is damaged, nobody can tell where: {error}"
        yield ArchiveMember("", -1, -1, reason)


def read_tar_member(path: Path, offset: int, size: int) -> bytes:
    """Read a file of a tar by its offset.

    Raises:
        ValueError: The tar is damaged or truncated there, or the file is too large for an image.
        OSError: The disk fails.
    """
    check_file_size(size)
    tar = _cached_tar(str(path), os.getpid())
    try:
        if tar.compressed:
            tar.stream.seek(offset)
            data = tar.stream.read(size)
        else:
            data = os.pread(tar.stream.fileno(), size, offset)
    except ARCHIVE_ERRORS as error:
        _cached_tar.cache_clear()  # the handle may be stale, and data decompressed after damage would look whole
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"the tar is damaged at offset {offset}: {error}") from error
    if len(data) != size:
        raise ValueError(f"the tar is truncated: {len(data)} of {size} bytes at offset {offset}")
    return data


def open_tar(path: Path) -> IO[bytes]:
    """Open a tar for reading; it is decompressed while it is read."""
    return (_decompressor(path) or open)(path, "rb")


def check_file_size(size: int) -> None:
    """Raise ValueError for a file that is too large to be an image, before it is read."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes are more than the limit of {MAX_FILE_BYTES >> 20} MiB for an image")


def list_lmdb_keys(folder: Path) -> Iterator[bytes]:
    """List the keys of an LMDB folder in order, without reading values.

    Raises:
        ValueError: The folder is not an LMDB folder or is damaged, or the package `lmdb` is missing.
    """
    environment = _open_lmdb(str(folder), os.getpid())
    try:
        with environment.begin() as transaction:
            yield from transaction.cursor().iternext(keys=True, values=False)
    except _lmdb_error_class() as error:
        raise ValueError(f"{folder} is damaged: {error}") from error


def read_lmdb_value(folder: Path, key: bytes) -> bytes:
    """Read a value of an LMDB folder; raises ValueError if it is missing, damaged or too large for an image."""
    try:
        with _open_lmdb(str(folder), os.getpid()).begin(buffers=True) as transaction:
            value = transaction.get(key)  # a view of the mapped file, not yet a copy
            if value is None:
                raise ValueError(f"{folder} does not have the key {key!r} anymore")
            check_file_size(len(value))
            return bytes(value)
    except _lmdb_error_class() as error:
        raise ValueError(f"{folder} is damaged at the key {key!r}: {error}") from error


class _TailRecorder(BoundedHeaderFile):
    """A file that stores the bytes that were read last."""

    last = b""

    def read(self, size: int) -> bytes:
        self.last = super().read(size)
        return self.last


class _OpenTar:
    """A tar that stays open until it is garbage collected."""

    def __init__(self, path: str) -> None:
        self.compressed = is_compressed(Path(path))
        self.stream = open_tar(Path(path))

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            self.stream.close()


def _decompressor(path: Path) -> Any:
    with open(path, "rb") as file:
        head = file.read(6)
    return next((opener for signature, opener in _DECOMPRESSORS if head.startswith(signature)), None)


@lru_cache(maxsize=8)
def _cached_tar(path: str, process: int) -> _OpenTar:
    """Keep tars open. The process id is a key because a forked process would share the file position."""
    return _OpenTar(path)


@lru_cache(maxsize=4)
def _open_lmdb(folder: str, process: int) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ValueError("lmdb is not installed: type  pip install 'depth-anything-train[lsun]'") from error
    try:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(f"{folder} is not an LMDB folder, or is damaged: {error}") from error
    size = os.path.getsize(os.path.join(folder, "data.mdb"))
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < needed:  # reading beyond the end of a mapped file kills the process
        environment.close()
        raise ValueError(f"{folder} is truncated: it has {size} of {needed} bytes; download it again")
    return environment


def _lmdb_error_class() -> Any:
    import lmdb

    return lmdb.Error
