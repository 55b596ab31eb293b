"""Images where they were published: members of tars by their offset, values of lmdb folders. Nothing is unpacked.

A plain tar is walked from header to header and a member is one read. A compressed one (told by its bytes, not by
its name) can only be read from the front: offsets then are those of the unpacked tar, and a process that goes
forward reads it once.
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
MAX_FILE_BYTES = (
    1 << 29
)  # of one file; a video or an archive among the photographs should not fill the memory
ARCHIVE_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)
"""What reading a broken archive may raise."""

_DECOMPRESSORS: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
)


class ArchiveMember(NamedTuple):
    """A file inside a tar: where it lies in the unpacked tar; `fault` is why it cannot be read, if so."""

    name: str
    offset: int
    size: int
    fault: str


def is_compressed(path: Path) -> bool:
    """Say by its first bytes whether a tar is compressed."""
    with open(path, "rb") as file:
        head = file.read(6)
    return any(head.startswith(mark) for mark, _ in _DECOMPRESSORS)


def list_tar_members(path: Path) -> Iterator[ArchiveMember]:
    """List the files of a tar in its order, in memory for one of them.

    Where the tar is damaged or cut short, a last member without a name says so.

    Raises:
        OSError: Its disk fails, which is no damage.
    """
    last = "its beginning"
    try:
        with open_tar(path) as stream:
            watched = _TailRecorder(stream)
            with tarfile.open(fileobj=watched, mode="r:") as tar:  # type: ignore[call-overload]
                while (info := tar.next()) is not None:
                    tar.members.clear()  # or a tar of millions of files would be kept in memory
                    if not info.isdir():
                        last = info.name.removeprefix("./")
                        yield ArchiveMember(last, info.offset_data, info.size, _member_error(info))
            # tarfile takes a header cut in two, or one of garbage, for the end.
            if len(watched.last) < tarfile.BLOCKSIZE or any(watched.last):
                raise EOFError("no mark of the end follows")
            while is_compressed(path) and stream.read(_CHUNK):
                pass  # a checksum is looked at where it stands, at the end
    except ARCHIVE_ERRORS as error:
        if is_disk_failure(error):
            raise
        reason = f"the tar is damaged, and nothing after {last} can be found: {error}"
        if isinstance(error, gzip.BadGzipFile) and "CRC" in str(error):
            reason = f"the tar is damaged, nobody can tell where: {error}"
        yield ArchiveMember("", -1, -1, reason)


def read_tar_member(path: Path, offset: int, size: int) -> bytes:
    """Read a file of a tar by its place; ValueError if it is not whole, OSError if its disk fails."""
    check_file_size(size)
    tar = _cached_tar(str(path), os.getpid())
    try:
        if tar.compressed:
            tar.stream.seek(offset)
            data = tar.stream.read(size)
        else:
            data = os.pread(tar.stream.fileno(), size, offset)
    except ARCHIVE_ERRORS as error:
        _cached_tar.cache_clear()  # the handle may be stale; data read behind the damage could look complete
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"the tar is damaged here: {error}") from error
    if len(data) != size:
        raise ValueError("the tar is cut short inside this file")
    return data


def open_tar(path: Path) -> IO[bytes]:
    """Open a tar for reading, unpacked as it is read."""
    with open(path, "rb") as file:
        head = file.read(6)
    opener = next((opener for mark, opener in _DECOMPRESSORS if head.startswith(mark)), open)
    return opener(path, "rb")


def check_file_size(size: int) -> None:
    """Refuse what is too large to be an image, before it is read."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES >> 20} MiB, which no photograph has")


def list_lmdb_keys(folder: Path) -> Iterator[bytes]:
    """List the keys of an lmdb folder in their order, without their values.

    Raises:
        ValueError: It is none, or damaged, or the package is missing.
    """
    environment = _open_lmdb(str(folder), os.getpid())
    try:
        with environment.begin() as transaction:
            yield from transaction.cursor().iternext(keys=True, values=False)
    except _lmdb_error_class() as error:
        raise ValueError(f"{folder} is damaged: {error}") from error


def read_lmdb_value(folder: Path, key: bytes) -> bytes:
    """Read a value of an lmdb folder; ValueError if there is none."""
    try:
        with _open_lmdb(str(folder), os.getpid()).begin(buffers=True) as transaction:
            found = transaction.get(key)  # where it lies in the file
            if found is not None:
                check_file_size(len(found))
            value = None if found is None else bytes(found)
    except _lmdb_error_class() as error:
        raise ValueError(f"the database is damaged here: {error}") from error
    if value is None:
        raise ValueError("the database does not have this key any more")
    return value


class _TailRecorder(BoundedHeaderFile):
    """A file that remembers the last bytes read."""

    last = b""

    def read(self, size: int) -> bytes:
        self.last = super().read(size)
        return self.last


def _member_error(info: tarfile.TarInfo) -> str:
    return "" if info.isreg() and not info.issparse() else "not a regular file"


class _OpenTar:
    """A tar kept open; it is closed when nobody keeps it any more."""

    def __init__(self, path: str) -> None:
        self.compressed = is_compressed(Path(path))
        self.stream = open_tar(Path(path))

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            self.stream.close()


@lru_cache(maxsize=8)
def _cached_tar(path: str, process: int) -> _OpenTar:
    """Keep tars open; a forked process opens its own, as two would share one position."""
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
        raise ValueError(f"{folder} is no lmdb folder, or is damaged: {error}") from error
    held = os.path.getsize(os.path.join(folder, "data.mdb"))
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if held < needed:  # to read behind the end of a file that is mapped kills the process
        environment.close()
        raise ValueError(f"{folder} is cut short: {held} of {needed} bytes are there; get it whole first")
    return environment


def _lmdb_error_class() -> Any:
    import lmdb

    return lmdb.Error
