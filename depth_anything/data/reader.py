"""Reading single records out of shards: by offset, checked, from any process."""

import os
import zlib
from collections import OrderedDict
from pathlib import Path

from depth_anything.data import remote
from depth_anything.data.tars import BadRecord, Index, Member, ShardError, parse_index, scan_index


class ShardReader:
    """Reads records of shards singly; nothing is opened before the first read, and anew in every process.

    Local files are read by offset (pread), http and https by range. Other addresses (pipe:, s3://, http servers
    without ranges) are copied whole into the cache folder on first use, after one line on stderr that says how much
    disk this takes.

    Args:
        max_open: files open at a time, and indexes kept are 32 times as many.
        total_bytes: of all shards that will be read, for that line; None: unknown.
    """

    def __init__(self, max_open: int = 64, *, total_bytes: int | None = None) -> None:
        self.max_open = max_open
        self.total_bytes = total_bytes
        self._forget()

    def read(self, url: str | Path, index: int) -> tuple[str, dict[str, bytes]]:
        """Read one record: its key, and its fields (extension to bytes), each held against its crc32.

        Raises:
            BadRecord: the shard is missing, cut short or damaged at this place, or its index does not fit it.
            IndexError: the shard has no such record.
        """
        url, key = str(url), ""
        try:
            table = self.index(url)
            key = table.key(index)
            members = table.members(index)
            start = members[0].offset
            end = max(member.offset + member.size for member in members)
            data = self._bytes(url, start, end - start, table)
            return key, {member.extension: _cut(data, member, start) for member in members}
        except (ShardError, OSError) as error:
            raise BadRecord(url, index, key, str(error)) from error

    def keys(self, url: str | Path) -> list[str]:
        """Return the keys of a shard in its order; ShardError where it cannot be indexed."""
        return self.index(str(url)).keys()

    def find(self, url: str | Path, key: str) -> int:
        """Return the number of the record with this key; KeyError where there is none."""
        found = self.index(str(url)).find(key)
        if found is None:
            raise KeyError(key)
        return found

    def index(self, url: str) -> Index:
        """Return a shard's index: NAME.idx, or of a local tar without one the tar read through.

        Raises:
            ShardError: there is neither, or the index does not fit the tar's size.
        """
        self._check_process()
        table = self._indexes.get(url)
        if table is None:
            table = self._indexes[url] = self._load_index(url)
            if len(self._indexes) > 32 * self.max_open:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(url)
        return table

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __getstate__(self) -> dict[str, int | None]:
        return {"max_open": self.max_open, "total_bytes": self.total_bytes}

    def __setstate__(self, state: dict[str, int | None]) -> None:
        self.__init__(state["max_open"], total_bytes=state["total_bytes"])

    def _forget(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._indexes: OrderedDict[str, Index] = OrderedDict()

    def _check_process(self) -> None:
        if self._process != os.getpid():  # forked: the parent's files share their positions and its fate
            self.close()
            self._forget()

    def _load_index(self, url: str) -> Index:
        if remote.is_remote(url):
            address = url.removesuffix(".tar") + ".idx"
            return parse_index(remote.read(address).decode(), where=address)
        path = Path(url)
        size = path.stat().st_size if path.exists() else 0
        if size == 0:
            raise ShardError(f"{url} is empty" if path.exists() else f"{url} is missing")
        try:
            table = parse_index(path.with_suffix(".idx").read_text(), where=str(path.with_suffix(".idx")))
        except FileNotFoundError:
            return scan_index(path)
        if table.bytes != size:
            raise ShardError(
                f"{url} has {size} bytes, its index was made of {table.bytes}: truncated or replaced"
            )
        return table

    def _bytes(self, url: str, start: int, count: int, table: Index) -> bytes:
        if remote.is_remote(url):
            data = remote.read_range(url, start, count, shard_bytes=table.bytes, total_bytes=self.total_bytes)
        else:
            data = os.pread(self._open(url), count, start)
        if len(data) != count:
            raise ShardError(f"{len(data)} bytes in place of {count}: truncated")
        return data

    def _open(self, path: str) -> int:
        descriptor = self._files.get(path)
        if descriptor is None:
            descriptor = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > self.max_open:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(path)
        return descriptor


def _cut(data: bytes, member: Member, start: int) -> bytes:
    field = data[member.offset - start : member.offset - start + member.size]
    if zlib.crc32(field) != member.crc:
        raise ShardError(f"the checksum of {member.extension} differs: damaged, or another shard's index")
    return field
