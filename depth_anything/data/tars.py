"""One shard: a tar, and beside it an index of what lies where.

NAME.idx is text. Its first line says `depth-anything-index 1`, the tar's bytes and sha256, and the numbers of records
and members; then one line a member, split by tabs: key, extension, offset of the data, size, crc32. It makes a
record one read, and every damage visible: tar readers end a truncated tar without a word.
"""

import hashlib
import os
import re
import secrets
import socket
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

_MARK = "depth-anything-index 1"
_KEY = re.compile(r"[A-Za-z0-9_/-]+")
_EXTENSION = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_MEMBER = re.compile(r"(?:\./)?((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset's rule: the key ends at the first dot
_MAX_NAME = 100  # what a plain tar header holds
_CHUNK = 1 << 20


class ShardError(ValueError):
    """A set or shard that cannot be used as it is; the sentence says what to do."""


class BadRecord(ValueError):
    """A record that cannot be read.

    Attributes:
        shard: set and shard, or the shard's address.
        index: the record's number in the shard.
        key: its key, "" where the index itself cannot be read.
        reason: what is wrong with it.
    """

    def __init__(self, shard: str, index: int, key: str, reason: str) -> None:
        super().__init__(shard, index, key, reason)
        self.shard, self.index, self.key, self.reason = shard, index, key, reason

    def __str__(self) -> str:
        return f"{self.shard}, record {self.index} ({self.key or 'key unknown'}): {self.reason}"


@dataclass(frozen=True)
class ShardInfo:
    """A shard's line in the manifest: name without .tar, number of records, bytes and "sha256:…" of the tar."""

    name: str
    records: int
    bytes: int
    hash: str


class Member(NamedTuple):
    """A file inside a tar: where its data begins, how long it is, and its crc32."""

    key: str
    extension: str
    offset: int
    size: int
    crc: int


class Index:
    """What lies where in one tar, kept small: a reader holds thousands of these.

    Attributes:
        bytes: of the tar.
        hash: "sha256:…" of the tar.
        records: their number.
    """

    def __init__(self, members: list[Member], *, bytes: int, hash: str) -> None:
        starts = [i for i, member in enumerate(members) if i == 0 or member.key != members[i - 1].key]
        keys = [members[i].key for i in starts]
        self.bytes, self.hash, self.records = bytes, hash, len(keys)
        self._prefix = os.path.commonprefix(keys)
        tails = [key[len(self._prefix) :].encode() + b"\n" for key in keys]
        self._tails = b"\n" + b"".join(tails)
        self._tail_starts = np.cumsum([1, *map(len, tails)], dtype=np.uint32)
        self._starts = np.array([*starts, len(members)], dtype=np.uint32)
        self._extensions = tuple(dict.fromkeys(member.extension for member in members))
        numbers = {extension: i for i, extension in enumerate(self._extensions)}
        self._kinds = np.array([numbers[member.extension] for member in members], dtype=np.uint16)
        self._offsets = np.array([member.offset for member in members], dtype=np.int64)
        self._sizes = np.array([member.size for member in members], dtype=np.int64)
        self._crcs = np.array([member.crc for member in members], dtype=np.uint32)

    def key(self, record: int) -> str:
        """Return the key of a record; IndexError where there is none."""
        if not 0 <= record < self.records:
            raise IndexError(f"record {record} of {self.records}")
        start, end = self._tail_starts[record], self._tail_starts[record + 1]
        return self._prefix + self._tails[start : end - 1].decode()

    def keys(self) -> list[str]:
        """Return all keys in the order of the tar."""
        return [self.key(record) for record in range(self.records)]

    def find(self, key: str) -> int | None:
        """Return the record with this key, None where there is none."""
        tail = key[len(self._prefix) :]
        if not key.startswith(self._prefix) or "\n" in tail:
            return None
        place = self._tails.find(f"\n{tail}\n".encode())
        return None if place < 0 else int(np.searchsorted(self._tail_starts, place + 1))

    def members(self, record: int) -> list[Member]:
        """Return a record's members in the order of the tar."""
        key = self.key(record)
        return [
            Member(
                key,
                self._extensions[self._kinds[i]],
                int(self._offsets[i]),
                int(self._sizes[i]),
                int(self._crcs[i]),
            )
            for i in range(self._starts[record], self._starts[record + 1])
        ]


def write_shard(path: str | Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> ShardInfo:
    """Write a shard and its index.

    Atomic: a crash at any instant leaves nothing to see (temporary names begin with a dot) or a whole shard; where it
    falls between tar and index, the index is made when it is needed. The same records give the same bytes. A shard of
    this name is replaced.

    Args:
        path: NAME.tar; its folder is made.
        records: key (of A-Z a-z 0-9 _ / -, unique) and fields: extension, as "jpg" or "disparity.q12", to bytes.

    Raises:
        ValueError: a key or an extension that the format does not allow, a key twice, a record without fields, no
            record at all; nothing is left behind.
    """
    path = Path(path)
    if path.suffix != ".tar":
        raise ShardError(f"a shard's name ends in .tar, {path} does not")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            written = _write_members(file, path, records)
            file.flush()
            os.fsync(file.fileno())
        index = index_text(temporary)
        records_seen = int(index.split("\n", 1)[0].split("\t")[3])
        if records_seen != written:
            raise ShardError(f"{path}: {written} records went in and {records_seen} came out")
        return _publish(temporary, path, index)
    finally:
        temporary.unlink(missing_ok=True)


def index_shard(path: str | Path) -> ShardInfo:
    """Make NAME.idx beside a tar, anyone's, by reading it once.

    Raises:
        ShardError: the tar is missing, truncated or damaged, or a name in it cannot be a key; the name is given.
    """
    path = Path(path)
    text = index_text(path)
    write_atomically(path.with_suffix(".idx"), text.encode())
    return _info(path, text)


def parse_index(text: str, *, where: str) -> Index:
    """Parse the text of an index.

    Raises:
        ShardError: it is not one, or its lines do not add up.
    """
    head, _, rest = text.partition("\n")
    try:
        mark, tar_bytes, digest, records, count = head.split("\t")
        lines = rest.split("\n")
        members = [_parse_line(line, int(tar_bytes)) for line in lines[:-1]]
        index = Index(members, bytes=int(tar_bytes), hash=digest)
        if mark != _MARK or lines[-1] or len(members) != int(count) or index.records != int(records):
            raise ValueError("counts differ")
    except ValueError as error:
        raise ShardError(f"{where} is not a whole index: type  depth-anything shard index FOLDER") from error
    return index


def scan_index(path: str | Path) -> Index:
    """Read a tar through and make its index in memory; ShardError as `index_shard`."""
    return parse_index(index_text(Path(path)), where=str(path))


def index_text(path: Path) -> str:
    """Read a tar through and return the text of its index; ShardError as `index_shard`."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            members = list(_members(file, path, size))
            file.seek(0)
            digest = _sha256(file)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing") from None
    records = len({member.key for member in members})
    head = "\t".join((_MARK, str(size), digest, str(records), str(len(members))))
    lines = (f"{m.key}\t{m.extension}\t{m.offset}\t{m.size}\t{m.crc:08x}" for m in members)
    return "\n".join((head, *lines, ""))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is seen whole or not at all, also after a power cut."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Name a temporary file in the folder of `path`; it says who writes it, so that a dead one's can be removed."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
    return path.with_name(f".tmp.{path.name}.{host}.{os.getpid()}.{secrets.token_hex(4)}")


def _write_members(file: BinaryIO, path: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> int:
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
        raise ShardError(f"{path}: no records to write")
    return len(seen)


def _check_record(key: str, fields: dict[str, bytes], *, where: Path) -> None:
    _check_key(key, where=where)
    if not fields:
        raise ShardError(f'{where}: the record "{key}" has no fields')
    for extension in fields:
        if not _EXTENSION.fullmatch(extension) or extension.startswith("_"):
            raise ShardError(
                f'{where}: "{extension}" cannot be a field: use a-z 0-9 _ - and dots between them'
            )
        if len(key) + 1 + len(extension) > _MAX_NAME:
            raise ShardError(f'{where}: the name "{key}.{extension}" is longer than {_MAX_NAME} characters')


def _check_key(key: str, *, where: Path) -> None:
    if not _KEY.fullmatch(key) or key.startswith("/"):
        raise ShardError(
            f'{where}: "{key}" cannot be a key, which has only A-Z a-z 0-9 _ / - and no / in front'
        )


def _publish(temporary: Path, path: Path, text: str) -> ShardInfo:
    # Of a new shard the index comes first: the tar's rename shows both at once. When a shard is replaced the old
    # index goes first: a tar without an index is whole, a tar with another's is not.
    index = path.with_suffix(".idx")
    if path.exists():
        index.unlink(missing_ok=True)
        os.replace(temporary, path)
        write_atomically(index, text.encode())
    else:
        write_atomically(index, text.encode())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    return _info(path, text)


def _info(path: Path, text: str) -> ShardInfo:
    _, size, digest, records, _ = text.split("\n", 1)[0].split("\t")
    return ShardInfo(path.stem, int(records), int(size), digest)


def _parse_line(line: str, tar_bytes: int) -> Member:
    key, extension, offset, size, crc = line.split("\t")
    member = Member(key, extension, int(offset), int(size), int(crc, 16))
    if member.offset < 512 or member.size < 0 or member.offset + member.size > tar_bytes:
        raise ValueError("a member outside the tar")
    return member


def _members(file: BinaryIO, path: Path, size: int) -> Iterator[Member]:
    """Walk a tar's members; tarfile itself ends a truncated one in silence, hence the look at the end."""
    if size == 0:
        raise ShardError(f"{path} is empty (0 bytes)")
    seen: dict[str, set[str]] = {}
    last, end = "", 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // 512) * 512 if info.isreg() else info.offset_data
                if end > size:
                    raise ShardError(f'{path} is truncated inside "{info.name}"')
                parts = _MEMBER.fullmatch(info.name)
                if info.isdir() or parts is None:  # without a key WebDataset leaves it out, too
                    continue
                if not info.isreg() or info.issparse():
                    raise ShardError(f'{path}: "{info.name}" is not a plain file')
                key, extension = parts[1], parts[2].lower()
                _check_key(key, where=path)
                if not _EXTENSION.fullmatch(extension):
                    raise ShardError(f'{path}: "{info.name}" has an ending that cannot be a field')
                if (key in seen and key != last) or extension in seen.get(key, ()):
                    raise ShardError(f'{path}: the key "{key}" comes twice, and keys are unique')
                seen.setdefault(key, set()).add(extension)
                last = key
                yield Member(key, extension, info.offset_data, info.size, _crc32(file, info))
    except (tarfile.TarError, OverflowError, UnicodeError) as error:
        raise ShardError(f"{path} is damaged or not a tar: {error}") from error
    file.seek(end)
    tail = file.read(_CHUNK)
    if len(tail) < 512 or any(tail):
        raise ShardError(f'{path} is truncated: after "{last}" it ends without the mark of a tar\'s end')
    if not seen:
        raise ShardError(f"{path} holds no records")


def _crc32(file: BinaryIO, info: tarfile.TarInfo) -> int:
    crc, left = 0, info.size
    file.seek(info.offset_data)
    while left:
        chunk = file.read(min(left, _CHUNK))
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
        if not chunk:
            raise tarfile.ReadError("the file became shorter while it was read")
    return crc


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
