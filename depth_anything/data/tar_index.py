"""The index of a tar: key, offset, size and checksum of each file in it, in memory and as the text of NAME.idx.

The first line of the text holds the format `depth-anything-index 2`, the size of the tar in bytes, its sha256, the
number of records and of files, and the crc32 of the whole text without this last field and its tab. Each other line
is a file: key, extension, offset of its data, size, crc32 of the data. Fields are separated by tabs. The format
`depth-anything-index 1`, which earlier versions wrote, has no checksum of its own and is read as well.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_FORMAT_2 = "depth-anything-index 2"
_FORMAT_1 = "depth-anything-index 1"


class TarMember(NamedTuple):
    """A file in a tar: the offset of its data, its size, and its crc32."""

    key: str
    extension: str
    offset: int
    size: int
    crc: int


class TarIndex:
    """The files of one tar, packed into some 25 bytes per file, because a worker holds thousands of indexes.

    Attributes:
        bytes: Size of the tar.
        hash: "sha256:…" of the tar.
        records: Number of records.
    """

    def __init__(self, members: list[TarMember], *, bytes: int, hash: str) -> None:
        """Pack the files of a tar; consecutive files with the same key are one record."""
        starts = [i for i, member in enumerate(members) if i == 0 or member.key != members[i - 1].key]
        keys = [members[i].key for i in starts]
        self.bytes, self.hash, self.records = bytes, hash, len(keys)
        self._prefix = os.path.commonprefix(keys)
        tails = [key[len(self._prefix) :].encode() + b"\n" for key in keys]
        self._tails = b"\n" + b"".join(tails)
        self._tail_starts = np.cumsum([1, *map(len, tails)]).astype(np.uint32)
        self._starts = np.array([*starts, len(members)], dtype=np.uint32)
        self._extensions = tuple(dict.fromkeys(member.extension for member in members))
        numbers = {extension: i for i, extension in enumerate(self._extensions)}
        self._extension_ids = np.array([numbers[member.extension] for member in members], dtype=np.uint16)
        self._offsets = np.array([member.offset for member in members], dtype=np.int64)
        self._sizes = np.array([member.size for member in members], dtype=np.int64)
        self._crcs = np.array([member.crc for member in members], dtype=np.uint32)

    def key(self, record: int) -> str:
        """Return the key of a record.

        Raises:
            IndexError: There is no such record.
        """
        if not 0 <= record < self.records:
            raise IndexError(f"record {record} of {self.records}")
        start, end = self._tail_starts[record], self._tail_starts[record + 1]
        return self._prefix + self._tails[start : end - 1].decode()

    def keys(self) -> list[str]:
        """Return all keys in the order of the tar."""
        return [self.key(record) for record in range(self.records)]

    def find(self, key: str) -> int | None:
        """Return the number of the record with this key, or None."""
        tail = key[len(self._prefix) :]
        position = self._tails.find(f"\n{tail}\n".encode()) if key.startswith(self._prefix) else -1
        return None if position < 0 else int(np.searchsorted(self._tail_starts, position + 1))

    def members(self, record: int) -> list[TarMember]:
        """Return the files of a record in the order of the tar.

        Raises:
            IndexError: There is no such record.
        """
        key = self.key(record)
        span = slice(self._starts[record], self._starts[record + 1])
        rows = zip(
            self._extension_ids[span].tolist(),
            self._offsets[span].tolist(),
            self._sizes[span].tolist(),
            self._crcs[span].tolist(),
            strict=True,
        )
        return [TarMember(key, self._extensions[i], offset, size, crc) for i, offset, size, crc in rows]


def format_index(members: Sequence[TarMember], *, bytes: int, hash: str) -> str:
    """Return the text of an index.

    Args:
        members: Files of the tar, in its order.
        bytes: Size of the tar.
        hash: "sha256:…" of the tar.
    """
    records = len({member.key for member in members})
    head = "\t".join((_FORMAT_2, str(bytes), hash, str(records), str(len(members))))
    body = "".join(f"{m.key}\t{m.extension}\t{m.offset}\t{m.size}\t{m.crc:08x}\n" for m in members)
    return f"{head}\t{_checksum(head, body)}\n{body}"


def parse_index_text(text: str) -> TarIndex:
    """Parse the text of an index.

    Raises:
        ValueError: It is not an index, is cut short, has a key twice, has wrong counts, or its checksum differs.
        OverflowError: A number in it is too large.
    """
    tar_bytes, digest, records, count = parse_index_header(text)
    *lines, rest = text.split("\n")[1:]
    members = [_parse_line(line) for line in lines]
    index = TarIndex(members, bytes=tar_bytes, hash=digest)
    inside = all(512 <= m.offset and 0 <= m.size <= tar_bytes - m.offset for m in members)
    names, keys = {f"{m.key}.{m.extension}" for m in members}, {m.key for m in members}
    counts = [
        (len(members), index.records),
        (len(names), len(keys)),
    ]  # the second pair counts duplicates once
    if rest or not inside or any(found != (count, records) for found in counts):
        raise ValueError("its counts differ from its lines")
    return index


def parse_index_header(text: str) -> tuple[int, str, int, int]:
    """Return size and hash of the tar, and its numbers of records and of files, from the text of an index.

    Raises:
        ValueError: It is not an index, or its checksum differs.
    """
    head, _, body = text.partition("\n")
    if not head.startswith(_FORMAT_1):
        head, _, checksum = head.rpartition("\t")
        if checksum != _checksum(head, body):
            raise ValueError("its checksum differs")
    version, size, digest, records, members = head.split("\t")
    if version not in (_FORMAT_2, _FORMAT_1):
        raise ValueError(f"its format is {version}")
    return int(size), digest, int(records), int(members)


def is_project_index(path: Path) -> bool:
    """Tell whether a file is an index of this project, damaged or not, by its first bytes."""
    with open(path, "rb") as file:
        return file.read(len(_FORMAT_2)).startswith(_FORMAT_2.rpartition(" ")[0].encode())


def index_matches(text: str, expected: str) -> bool:
    """Tell whether an index equals the one just built of its tar, `expected`, in format 2 or 1."""
    head, _, body = expected.partition("\n")
    return text in (expected, "\t".join((_FORMAT_1, *head.split("\t")[1:-1])) + f"\n{body}")


def _checksum(head: str, body: str) -> str:
    text = f"{head}\n{body}"
    return f"{zlib.crc32(text.encode()):08x}"


def _parse_line(line: str) -> TarMember:
    key, extension, offset, size, crc = line.split("\t")
    return TarMember(key, extension, int(offset), int(size), int(crc, 16))
