"""One shard: a tar, and beside it an index of what lies where (index.py).

The index makes a record one read, and shows damage: tar readers end a truncated tar in silence.
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
_MEMBER = re.compile(r"(?:\./)?((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset's rule: the key ends at the first dot
_MAX_NAME = 100  # what a plain tar header holds
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 20  # bytes of a tar's header, with a long name

PATH_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Numbers of errors that say what a shard's path is; any other says that it cannot be read for now."""


class BoundedHeaderFile:
    """A file for tarfile, which would read as much into memory as a header claims that a long name has."""

    def __init__(self, file: IO[bytes]) -> None:
        """Read from a file, whose position is kept."""
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read so many bytes; ReadError where that is no header."""
        if size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class ShardError(UserError):
    """A set or shard that cannot be used as it is. Secrets of addresses are removed from the message."""

    def __init__(self, what: Text, fix: Text = "") -> None:
        """Remove the secrets of addresses from the message."""
        super().__init__(redact_parts(what), redact_parts(fix))


class StorageUnavailable(UserMessage, OSError):
    """Shards cannot be read for now.

    This stops a run, and no other record replaces one that cannot be read: an outage must not change the training.
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
    """A record that cannot be read.

    Attributes:
        shard: set/shard, or the shard's address.
        index: the record's number in the shard.
        key: its key, "" where the index cannot be read.
        reason: what is wrong.
    """

    def __init__(self, shard: str, index: int, key: str, reason: str) -> None:
        """Hold the four; they survive pickling, as workers send their errors."""
        shard, reason = redact_secrets(shard), redact_secrets(reason)
        super().__init__(shard, index, key, reason)
        self.shard, self.index, self.key, self.reason = shard, index, key, reason

    def __str__(self) -> str:
        """Say all four in one sentence."""
        return f"{self.shard}[{self.index}] {self.key or '(key unknown)'}: {self.reason}"


@dataclass(frozen=True)
class ShardInfo:
    """A shard's line in the manifest: name without .tar, records, bytes and "sha256:…" of the tar."""

    name: str
    records: int
    bytes: int
    hash: str


@dataclass(frozen=True)
class ShardSet:
    """A set of shards as its manifest has it.

    Attributes:
        name: unique within a run.
        root: folder or URL prefix.
        shards: sorted by name.
        meta: what made the set.
        digest: "sha256:…" over the shards.
    """

    name: str
    root: str
    shards: tuple[ShardInfo, ...]
    meta: dict[str, Any] = field(hash=False)
    digest: str

    @property
    def records(self) -> int:
        """Records of all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.bytes for shard in self.shards)

    def url(self, shard: str) -> str:
        """Return the address of a shard's tar."""
        return join_address(self.root, f"{shard}.tar")


def write_shard(path: str | Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardInfo:
    """Write a shard and its index; one of this name is replaced.

    A crash at any instant leaves nothing to be seen (temporary names begin with a dot) or a whole shard; one
    that is being replaced may be left without its index, which is then made when it is needed. The same
    records give the same bytes.

    Args:
        path: FOLDER/NAME.tar; the folder is made.
        records: key (A-Z a-z 0-9 _ - and / between; unique), and fields: extension, as "jpg", to bytes.

    Raises:
        ShardError: a key or extension that the format does not allow, a key that comes twice, a record
            without fields, no records. Nothing is left behind.
    """
    path = Path(path)
    if path.suffix != ".tar":
        raise ShardError(f"a shard's name ends in .tar, and {path} does not")
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
            raise ShardError(f"{path}: {written} records went in, {info.records} came out")
        _publish(temporary, path, text.encode())
        return info
    finally:
        temporary.unlink(missing_ok=True)


def index_shard(path: str | Path) -> ShardInfo:
    """Make NAME.idx beside a tar, anyone's, by reading it once.

    Raises:
        ShardError: the tar is missing, truncated or damaged, or a name in it cannot be a key; it is named.
    """
    path = Path(path)
    text = build_index_text(path)
    atomic_write(path.with_suffix(".idx"), text.encode())
    return _parse_shard_info(path, text)


def read_shard_info(path: Path) -> ShardInfo:
    """Return what the index of a local tar says of it, without reading the tar; made first if there is none.

    Raises:
        ShardError: the tar is missing, or its index is damaged or another one's.
    """
    place = path.with_suffix(".idx")
    if not place.exists():
        return index_shard(path)
    try:
        info = _parse_shard_info(path, place.read_text(errors="replace"))
    except ValueError as error:
        raise ShardError(_damaged_index_message(place)) from error
    if not path.is_file() or path.stat().st_size != info.bytes:
        raise ShardError(
            f"{path} is missing, or is not the tar of {place.name}: remove both and make it again"
        )
    return info


def build_index_text(path: Path) -> str:
    """Read a tar through and return the text of its index; ShardError as `index_shard`."""
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
        ShardError: it is no index, is cut short, names a key twice, does not add up, or its checksum differs.
    """
    try:
        return parse_index_text(text)
    except (ValueError, OverflowError) as error:
        raise ShardError(_damaged_index_message(where)) from error


def _write_members(file: BinaryIO, path: Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    from webdataset import TarWriter  # takes 1.5 s, and reading shards does without

    seen = set()
    with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for key, fields in records:
            _check_record(key, fields, where=path)
            if key in seen:
                raise ShardError(f'{path}: the key "{key}" comes twice, and keys are unique')
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
            raise ShardError(f'{where}: "{extension}" cannot name a field: use a-z 0-9 _ - and dots between')
        if len(key) + 1 + len(extension) > _MAX_NAME:
            raise ShardError(f'{where}: the name "{key}.{extension}" has over {_MAX_NAME} characters')


def _check_key(key: str, *, where: Path) -> None:
    if not _KEY.fullmatch(key):
        raise ShardError(f'{where}: "{key}" cannot be a key: use A-Z a-z 0-9 _ - and / between')


def _publish(temporary: Path, path: Path, text: bytes) -> None:
    # Of a new shard the index comes first, and the tar's rename shows both. Of one that is replaced the old
    # index goes first: a tar without an index is whole, a tar with another's is not. One that is there already
    # is left alone, as others may be reading it.
    index, mine = path.with_suffix(".idx"), temporary.stat().st_ino
    if _is_published(path, text):
        return
    if path.exists():
        index.unlink(missing_ok=True)
    else:
        atomic_write(index, text)
    os.replace(temporary, path)
    sync_folder(path.parent)
    # Another writer of this very shard may have come between; whoever's tar is seen sees to its index.
    if path.stat().st_ino == mine and not (index.exists() and index.read_bytes() == text):
        atomic_write(index, text)


def _is_published(path: Path, text: bytes) -> bool:
    try:
        made = build_index_text(path)
        return made.encode() == text and index_matches(path.with_suffix(".idx").read_text(), made)
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
                if info.isdir() or name is None:  # WebDataset leaves out what has no key
                    continue
                key, extension = name[1], name[2].lower()
                _check_member(info, key, extension, path)
                if extension in seen.get(key, ()) or (key in seen and key != last):
                    raise ShardError(f'{path}: the key "{key}" comes twice, and keys are unique')
                seen.setdefault(key, set()).add(extension)
                last = key
                yield TarMember(key, extension, info.offset_data, info.size, _crc32(file, info))
    except (tarfile.TarError, OverflowError, UnicodeError, EOFError) as error:
        raise ShardError(f"{path} is damaged, or is no tar: {error}") from error
    # tarfile takes a header cut in two, or one of garbage, for the end.
    file.seek(end)
    tail = file.read(_CHUNK)
    if len(tail) < 512 or any(tail):
        raise ShardError(f'{path} is truncated or damaged: no mark of the end follows "{last}"')
    if not seen:
        raise ShardError(f"{path} holds no records")


def _check_member(info: tarfile.TarInfo, key: str, extension: str, path: Path) -> None:
    if not info.isreg() or info.issparse():
        raise ShardError(f'{path}: "{info.name}" is no plain file')
    _check_key(key, where=path)
    if not _EXTENSION.fullmatch(extension):
        raise ShardError(f'{path}: "{info.name}" ends in what cannot name a field')


def _crc32(file: BinaryIO, info: tarfile.TarInfo) -> int:
    crc, left = 0, info.size
    file.seek(info.offset_data)
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise EOFError("it became shorter while it was read")
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    return crc
