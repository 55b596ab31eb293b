"""Write and index one shard: a tar, and its index in a file next to it (tar_index.py).

With the index, a record is one read, and damage is found: tar readers stop at the end of a truncated tar without an
error.
"""

import errno
import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from depth_anything.data.address import join_address, redact_secrets
from depth_anything.data.tar_index import (
    TarIndex,
    TarMember,
    format_index,
    index_matches,
    parse_index_header,
    parse_index_text,
)
from depth_anything.disk import atomic_write, name_write_errors, sync_folder, temporary_path
from depth_anything.errors import Argument, Command, Text, UserError, UserMessage

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_/-]*")
_EXTENSION = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*")
_MEMBER = re.compile(r"(?:\./)?((?:.*/)?[^./]+)\.([^/]+)")  # as WebDataset: the key ends at the first dot
HEADER_BYTES = 512  # of a tar header, which is right before the data
LONG_NAME_LENGTH = 98  # a longer name, with "./" before it, may be in blocks of its own before the header
LONG_HEADER_BYTES = 1 << 13

_MAX_NAME = 100  # characters, in a plain tar header
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 20  # bytes of a tar's header, with a long name

PATH_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of the path itself; any other OSError means that the disk cannot be read for now."""


class BoundedHeaderFile:
    """A file for tarfile with bounded reads: a damaged header may claim a long name of any size."""

    def __init__(self, file: IO[bytes]) -> None:
        """Read from a file at its current position."""
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read `size` bytes.

        Raises:
            tarfile.ReadError: No header is that long.
        """
        if size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class ShardError(UserError):
    """A set or shard that cannot be used. Secrets of addresses are removed from the message."""

    def __init__(self, what: Text, fix: Text = "") -> None:
        """Remove the secrets of addresses from the message."""
        super().__init__(redact_parts(what), redact_parts(fix))


class StorageUnavailable(UserMessage, OSError):
    """A disk, a server or the memory fails for now.

    No record is at fault, so none is replaced, and the run stops: otherwise an outage would change the training.
    """

    def __init__(self, what: Text, fix: Text = "") -> None:
        """Remove the secrets of addresses from the message."""
        super().__init__(redact_parts(what), redact_parts(fix))


def redact_parts(text: Text) -> Text:
    """Remove the secrets of addresses from the text of a message."""
    if isinstance(text, str):
        return redact_secrets(text)
    if isinstance(text, Argument | Command):
        return text
    return [redact_secrets(part) if isinstance(part, str) else part for part in text]


class BadRecord(ValueError):
    """A record that cannot be read or decoded.

    Attributes:
        shard: set/shard, or the address of the shard.
        index: Index of the record in the shard.
        key: Key of the record, "" if the index cannot be read.
        reason: What is wrong.
    """

    def __init__(self, shard: str, index: int, key: str, reason: str) -> None:
        """Store the four values; they survive pickling, because workers send their errors."""
        shard, reason = redact_secrets(shard), redact_secrets(reason)
        super().__init__(shard, index, key, reason)
        self.shard, self.index, self.key, self.reason = shard, index, key, reason

    def __str__(self) -> str:
        """Join the four values into one message."""
        return f"{self.shard}[{self.index}] {self.key or '(key unknown)'}: {self.reason}"


@dataclass(frozen=True)
class ShardInfo:
    """A shard in the manifest: its name without .tar, number of records, size in bytes and "sha256:…" of the tar."""

    name: str
    records: int
    bytes: int
    hash: str


@dataclass(frozen=True)
class ShardSet:
    """A set of shards, from its manifest.

    Attributes:
        name: Unique within a run.
        root: Folder or URL prefix.
        shards: Sorted by name.
        meta: What made the set, license, unit and so on, as JSON.
        digest: "sha256:…" over the shards.
    """

    name: str
    root: str
    shards: tuple[ShardInfo, ...]
    meta: dict[str, Any] = field(hash=False)
    digest: str

    @property
    def records(self) -> int:
        """Number of records of all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all tars."""
        return sum(shard.bytes for shard in self.shards)

    def url(self, shard: str) -> str:
        """Return the address of the tar of a shard."""
        return join_address(self.root, f"{shard}.tar")


def write_shard(path: str | Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardInfo:
    """Write a shard and its index; an existing shard of this name is replaced.

    After a crash there is either a complete shard or none (temporary names start with a dot). A shard that was being
    replaced may be left without an index, which readers then build. The same records give the same bytes.

    Args:
        path: FOLDER/NAME.tar; the folder is created.
        records: Key (A-Z a-z 0-9 _ - and / between; unique), and fields: extension, as "jpg", to bytes.

    Raises:
        ShardError: A key or extension is not allowed, a key is duplicated, a record has no fields, or there are no
            records. Nothing is left behind.
    """
    path = Path(path)
    if path.suffix != ".tar":
        raise ShardError(f"the name of a shard ends in .tar, not as in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with name_write_errors(path), open(temporary, "xb") as file:
            written = _write_members(file, path, records)
            file.flush()
            os.fsync(file.fileno())
        text = build_index_text(temporary)
        info = _parse_shard_info(path, text)
        if info.records != written:
            raise ShardError(f"{path}: {written} records were written, {info.records} were read back")
        _publish(temporary, path, text.encode())
        return info
    finally:
        temporary.unlink(missing_ok=True)


def index_shard(path: str | Path) -> ShardInfo:
    """Write NAME.idx next to a tar, of any program, by reading it once.

    Raises:
        ShardError: The tar is missing, truncated or damaged, or a name in it cannot be a key.
    """
    path = Path(path)
    text = build_index_text(path)
    atomic_write(path.with_suffix(".idx"), text.encode())
    return _parse_shard_info(path, text)


def read_shard_info(path: Path) -> ShardInfo:
    """Read the info of a local shard from its index, which is built first if there is none.

    Raises:
        ShardError: The tar is missing, or its index is damaged or of another tar.
    """
    index = path.with_suffix(".idx")
    if not index.exists():
        return index_shard(path)
    try:
        info = _parse_shard_info(path, index.read_text(errors="reindex"))
    except ValueError as error:
        raise ShardError(_damaged_index_message(index)) from error
    if not path.is_file() or path.stat().st_size != info.bytes:
        raise ShardError(
            f"{path} is missing, or is not the tar of {index.name}: remove both and write the shard again"
        )
    return info


def build_index_text(path: Path) -> str:
    """Read a tar and return the text of its index.

    Raises:
        ShardError: As in `index_shard`.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            members = list(_read_members(file, path, size))
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing") from None
    return format_index(members, bytes=size, hash=f"sha256:{digest.hexdigest()}")


def parse_index(text: str, *, where: str | Path) -> TarIndex:
    """Parse the text of an index.

    Raises:
        ShardError: It is not an index, is truncated, has a key twice, has wrong counts, or its checksum differs.
    """
    try:
        return parse_index_text(text)
    except (ValueError, OverflowError) as error:
        raise ShardError(_damaged_index_message(where)) from error


def check_header_name(before: bytes, extension: str, name: str) -> None:
    """Check the name of a file against the tar header at the end of the bytes before its data.

    Raises:
        ShardError: The header has another name, or is damaged.
    """
    if not _header_has_name(before, name):
        try:
            tarfile.TarInfo.frombuf(before[-HEADER_BYTES:], "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise ShardError(
                f"the header checksum of its {extension} differs: damaged, or the index of another tar"
            ) from error
        raise ShardError(
            f"its {extension} has another name in the tar: the index is damaged, or of another tar; "
            "type  depth-anything shard index FOLDER"
        )


def _header_has_name(before: bytes, name: str) -> bool:
    header = before[-HEADER_BYTES:]
    stored = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        stored = header[345:500].partition(b"\0")[0] + b"/" + stored
    pattern = _name_pattern(name)
    if re.fullmatch(pattern, stored):
        return True
    # In tars of other programs a name may be longer than a header holds: it is then in a pax record or in a block of
    # GNU tar before the header.
    return len(name) > LONG_NAME_LENGTH and bool(
        re.search(b"(?:path=|\0)" + pattern + b"[\n\0]", before[:-HEADER_BYTES])
    )


def _name_pattern(name: str) -> bytes:
    """Return a pattern of how tars write a name: with "./" before it or not, the extension in any case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    key, end = (re.escape(part.encode()) for part in (f"{folder}{slash}{stem}", extension))
    return b"(?:\\./)?" + key + b"\\.(?i:" + end + b")"


def _write_members(file: BinaryIO, path: Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    from webdataset import TarWriter  # takes 1.5 s to import, and reading shards does not need it

    seen = set()
    with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for key, fields in records:
            _check_record(key, fields, where=path)
            if key in seen:
                raise ShardError(f'{path}: the key "{key}" is duplicated')
            seen.add(key)
            tar.write({"__key__": key, **fields})
    if not seen:
        raise ShardError(f"{path}: there are no records to write")
    return len(seen)


def _check_record(key: str, fields: Mapping[str, bytes], *, where: Path) -> None:
    _check_key(key, where=where)
    if not fields:
        raise ShardError(f'{where}: the record "{key}" has no fields')
    for extension in fields:
        if not _EXTENSION.fullmatch(extension):
            raise ShardError(
                f'{where}: "{extension}" is not a valid field name: use a-z 0-9 _ - and dots between'
            )
        if len(key) + 1 + len(extension) > _MAX_NAME:
            raise ShardError(f'{where}: the name "{key}.{extension}" has over {_MAX_NAME} characters')


def _check_key(key: str, *, where: Path) -> None:
    if not _KEY.fullmatch(key):
        raise ShardError(f'{where}: "{key}" is not a valid key: use A-Z a-z 0-9 _ - and / between')


def _publish(temporary: Path, path: Path, text: bytes) -> None:
    # A new shard: the index is written first, and renaming the tar publishes both. A replaced shard: the old index is
    # deleted first, because a tar without an index is readable and a tar with a wrong index is not. An identical shard
    # is left alone, because other processes may be reading it.
    index, inode = path.with_suffix(".idx"), temporary.stat().st_ino
    if _is_published(path, text):
        return
    if path.exists():
        index.unlink(missing_ok=True)
    else:
        atomic_write(index, text)
    os.replace(temporary, path)
    sync_folder(path.parent)
    # Another process may write this shard at the same time: the one whose tar was renamed last writes the index.
    if path.stat().st_ino == inode and not (index.exists() and index.read_bytes() == text):
        atomic_write(index, text)


def _is_published(path: Path, text: bytes) -> bool:
    try:
        current = build_index_text(path)
        return current.encode() == text and index_matches(path.with_suffix(".idx").read_text(), current)
    except (OSError, ValueError):
        return False


def _parse_shard_info(path: Path, text: str) -> ShardInfo:
    size, digest, records, _ = parse_index_header(text)
    return ShardInfo(path.stem, records, size, digest)


def _damaged_index_message(index: str | Path) -> str:
    return f"{index} is damaged: type  depth-anything shard index {str(index).rpartition('/')[0] or '.'}"


def _read_members(file: BinaryIO, path: Path, size: int) -> Iterator[TarMember]:
    if size == 0:
        raise ShardError(f"{path} is empty")
    seen: dict[str, set[str]] = {}
    last, end = "", 0
    try:
        with tarfile.open(fileobj=BoundedHeaderFile(file), mode="r:") as tar:  # type: ignore[call-overload]
            for info in tar:
                end = info.offset_data + (-(-info.size // 512) * 512 if info.isreg() else 0)
                if end > size:
                    raise ShardError(f'{path} is truncated inside "{info.name}"')
                name = _MEMBER.fullmatch(info.name)
                if info.isdir() or name is None:  # as WebDataset
                    continue
                key, extension = name[1], name[2].lower()
                _check_member(info, key, extension, path)
                if extension in seen.get(key, ()) or (key in seen and key != last):
                    raise ShardError(f'{path}: the key "{key}" is duplicated')
                seen.setdefault(key, set()).add(extension)
                last = key
                yield TarMember(key, extension, info.offset_data, info.size, _crc32(file, info))
    except (tarfile.TarError, OverflowError, UnicodeError, EOFError) as error:
        raise ShardError(f"{path} is damaged, or is not a tar: {error}") from error
    # tarfile treats a truncated or damaged header as the end of the tar.
    file.seek(end)
    tail = file.read(_CHUNK)
    if len(tail) < 512 or any(tail):
        raise ShardError(f'{path} is truncated or damaged: no end-of-archive block follows "{last}"')
    if not seen:
        raise ShardError(f"{path} has no records")


def _check_member(info: tarfile.TarInfo, key: str, extension: str, path: Path) -> None:
    if not info.isreg() or info.issparse():
        raise ShardError(f'{path}: "{info.name}" is not a regular file')
    _check_key(key, where=path)
    if not _EXTENSION.fullmatch(extension):
        raise ShardError(f'{path}: the extension of "{info.name}" is not a valid field name')


def _crc32(file: BinaryIO, info: tarfile.TarInfo) -> int:
    crc, left = 0, info.size
    file.seek(info.offset_data)
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise EOFError("the file was truncated while it was read")
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    return crc
