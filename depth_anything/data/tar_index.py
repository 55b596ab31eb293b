"""The index of a tar: what lies where in it, in memory and as the text of NAME.idx.

The first line of the text holds the mark `depth-anything-index 2`, the tar's bytes, its sha256, how many records
and members there are, and the crc32 of the whole text without this last field and its tab; then comes a line a
member: key, extension, offset of the data, size, crc32 of the data. Tabs stand between. Indexes with the mark
`depth-anything-index 1`, which earlier versions wrote, have no checksum of their own and are read as well.
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
    """A file inside a tar: where its data begins, how long it is, and its crc32."""

    key: str
    extension: str
    offset: int
    size: int
    crc: int


class TarIndex:
    """What lies where in one tar, kept small (some 25 bytes a member): a worker holds thousands of these.

    Attributes:
        bytes: of the tar.
        hash: "sha256:…" of the tar.
        records: how many.
    """

    def __init__(self, members: list[TarMember], *, bytes: int, hash: str) -> None:
        """Pack the members of a tar; neighbours with one key are one record."""
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
        place = self._tails.find(f"\n{tail}\n".encode()) if key.startswith(self._prefix) else -1
        return None if place < 0 else int(np.searchsorted(self._tail_starts, place + 1))

    def members(self, record: int) -> list[TarMember]:
        """Return a record's members in the order of the tar."""
        key = self.key(record)
        span = slice(self._starts[record], self._starts[record + 1])
        columns = (self._kinds[span], self._offsets[span], self._sizes[span], self._crcs[span])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [TarMember(key, self._extensions[kind], *numbers) for kind, *numbers in rows]


def format_index(members: Sequence[TarMember], *, bytes: int, hash: str) -> str:
    """Return the text of an index.

    Args:
        members: of the tar, in its order.
        bytes: of the tar.
        hash: "sha256:…" of the tar.
    """
    records = len({member.key for member in members})
    head = "\t".join((_FORMAT_2, str(bytes), hash, str(records), str(len(members))))
    body = "".join(f"{m.key}\t{m.extension}\t{m.offset}\t{m.size}\t{m.crc:08x}\n" for m in members)
    return f"{head}\t{_checksum(head, body)}\n{body}"


def parse_index_text(text: str) -> TarIndex:
    """Parse the text of an index.

    Raises:
        ValueError: it is no index, is cut short, names a key twice, does not add up, or its checksum differs.
        OverflowError: a number in it is too large.
    """
    tar_bytes, digest, records, count = parse_index_header(text)
    *lines, rest = text.split("\n")[1:]
    members = [_parse_line(line) for line in lines]
    index = TarIndex(members, bytes=tar_bytes, hash=digest)
    inside = all(512 <= m.offset and 0 <= m.size <= tar_bytes - m.offset for m in members)
    names, keys = {f"{m.key}.{m.extension}" for m in members}, {m.key for m in members}
    counts = [(len(members), index.records), (len(names), len(keys))]  # what comes twice is counted once
    if rest or not inside or any(found != (count, records) for found in counts):
        raise ValueError("it does not add up")
    return index


def parse_index_header(text: str) -> tuple[int, str, int, int]:
    """Return the tar's bytes and hash, and how many records and members it has, from the text of an index.

    Raises:
        ValueError: it is no index, or its checksum differs.
    """
    head, _, body = text.partition("\n")
    if not head.startswith(_FORMAT_1):
        head, _, checksum = head.rpartition("\t")
        if checksum != _checksum(head, body):
            raise ValueError("its checksum differs")
    mark, size, digest, records, members = head.split("\t")
    if mark not in (_FORMAT_2, _FORMAT_1):
        raise ValueError(f"its mark is {mark}")
    return int(size), digest, int(records), int(members)


def is_project_index(path: Path) -> bool:
    """Tell an index of this project, damaged or not, from another program's, by its mark."""
    with open(path, "rb") as file:
        return file.read(len(_FORMAT_2)).startswith(_FORMAT_2.rpartition(" ")[0].encode())


def index_matches(text: str, made: str) -> bool:
    """Tell whether an index says what `made` says, the text just made of its tar; its mark may be the older one."""
    head, _, body = made.partition("\n")
    return text in (made, "\t".join((_FORMAT_1, *head.split("\t")[1:-1])) + f"\n{body}")


def _checksum(head: str, body: str) -> str:
    text = f"{head}\n{body}"
    return f"{zlib.crc32(text.encode()):08x}"


def _parse_line(line: str) -> TarMember:
    key, extension, offset, size, crc = line.split("\t")
    return TarMember(key, extension, int(offset), int(size), int(crc, 16))
