"""Read single records of shards: by offset, with checksums, from any process.

A record that can be read but is wrong is a BadRecord. A disk or server that fails for now is tried again, and then
stops the run as StorageUnavailable: a failing disk must not change what a network is trained on.
"""

import hashlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from depth_anything.data import remote
from depth_anything.data.address import index_address, is_remote
from depth_anything.data.retry import RESUME_HINT, PermanentError, retry
from depth_anything.data.tar_index import TarIndex, TarMember
from depth_anything.data.tars import (
    HEADER_BYTES,
    LONG_HEADER_BYTES,
    LONG_NAME_LENGTH,
    BadRecord,
    ShardError,
    ShardSet,
    StorageUnavailable,
    build_index_text,
    check_header_name,
    parse_index,
)

_MAX_REQUESTS = 16  # simultaneous requests of a process
_MAX_RECORD_BYTES = 1 << 30

_fetch_pool: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_fetch_pool.clear)

KeyAndFields = tuple[str, dict[str, bytes]]


def is_label_field(name: str) -> bool:
    """Tell whether a field of a record belongs to its label, as "disparity.q12" or "crop0.disparity.q12"."""
    first = name.split(".")[0]
    return first in ("depth", "disparity", "confidence", "crops") or (
        first.startswith("crop") and first[4:].isdigit()
    )


class _LoadedIndex(NamedTuple):
    table: TarIndex
    is_remote: bool


class ShardReader:
    """Reads single records of shards.

    Local files are read by offset, http, https, s3 and gs by range. Other addresses (pipe:, http servers without
    ranges) are copied whole into a cache folder on first use, after one line on stderr that names the disk space.
    Files are opened when they are needed, and opened again in a forked or spawned process; threads may share a
    reader. A remote record that arrives damaged is fetched once more before it counts as damaged.
    """

    def __init__(
        self, max_open: int = 64, *, max_indexes: int = 2048, total_bytes: int | None = None
    ) -> None:
        """Open nothing yet.

        Args:
            max_open: Files open at a time.
            max_indexes: Indexes kept in memory, some 70 kB each per thousand records.
            total_bytes: Size of all shards that will be read, for the line on stderr.
        """
        self.max_open, self.max_indexes, self.total_bytes = max_open, max_indexes, total_bytes
        self._process, self._lock = os.getpid(), threading.RLock()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._indexes: OrderedDict[str, _LoadedIndex] = OrderedDict()
        self._unreadable: dict[str, str] = {}  # remote shards that gave a permanent error, and its reason

    def read(self, url: str | Path, index: int, *, hash: str | None = None) -> KeyAndFields:
        """Read one record: its key, and its fields (extension to bytes).

        Each field is checked against its crc32 and against the name in the tar header before it.

        Args:
            url: URL of the shard.
            index: Index of the record in the shard.
            hash: Hash of the tar, from the manifest.

        Raises:
            BadRecord: The shard is missing, truncated or damaged, or its index is not its own.
            IndexError: The shard has no such record.
            StorageUnavailable: It cannot be read for now.
        """
        url = str(url)
        if url in self._unreadable:
            loaded = self._indexes.get(url)
            raise BadRecord(url, index, loaded.table.key(index) if loaded else "", self._unreadable[url])
        try:
            return self._read_once(url, index, hash)
        except BadRecord:
            if not is_remote(url):
                raise
        self.forget(url)  # it may have been damaged on the way
        try:
            return self._read_once(url, index, hash, fresh=True)
        except BadRecord as error:
            if isinstance(error.__cause__, PermanentError):
                self._unreadable[url] = error.reason  # do not ask again for its other records
            raise

    def _read_once(self, url: str, index: int, hash: str | None, *, fresh: bool = False) -> KeyAndFields:
        key = ""
        try:
            table, far = self._load(url)
            if hash is not None and table.hash != hash:
                raise ShardError(f"{url} is not the tar of the manifest: its hash differs")
            members = table.members(index)
            key = members[0].key
            longest = end = 0
            for member in members:
                longest = max(longest, len(key) + 1 + len(member.extension))
                end = max(end, member.offset + member.size)
            header = HEADER_BYTES if longest <= LONG_NAME_LENGTH else LONG_HEADER_BYTES
            start = max(0, members[0].offset - header)
            if end - start > _MAX_RECORD_BYTES:
                raise ShardError(f"its {end - start} bytes are more than the limit of {_MAX_RECORD_BYTES}")
            if far:
                data = self._fetch_range(url, start, end - start, table, fresh=fresh)
            else:
                data = self._read_local(url, start, end - start)
            if len(data) != end - start:
                raise ShardError(f"the shard is truncated: {len(data)} bytes in place of {end - start}")
            fields = {}
            for member in members:
                fields[member.extension] = _extract_field(data, member, start)
            return key, fields
        except StorageUnavailable:
            raise
        except (ShardError, OSError) as error:
            raise BadRecord(url, index, key, str(error)) from error

    def forget(self, url: str | Path) -> None:
        """Drop the index of a shard, so that it is read again."""
        self._indexes.pop(str(url), None)

    def keys(self, url: str | Path) -> list[str]:
        """Return the keys of a shard in the order of its records.

        Raises:
            ShardError: It has no readable index.
        """
        return self.index(url).keys()

    def find(self, url: str | Path, key: str) -> int:
        """Return the number of the record with this key.

        Raises:
            KeyError: There is none.
        """
        number = self.index(url).find(key)
        if number is None:
            raise KeyError(key)
        return number

    def index(self, url: str | Path) -> TarIndex:
        """Return the index of a shard: NAME.idx, or, for a local tar without one, built by reading the tar.

        Raises:
            ShardError: There is no readable index, or it is that of a tar of another size.
            StorageUnavailable: It cannot be read for now.
        """
        return self._load(str(url)).table

    def _load(self, url: str) -> _LoadedIndex:
        loaded = self._indexes.get(url)
        if loaded is None:
            loaded = _LoadedIndex(retry(url, lambda: _load_index(url)), is_remote(url))
        with self._lock:
            self._indexes[url] = loaded
            self._indexes.move_to_end(url)
            if len(self._indexes) > self.max_indexes:
                self._indexes.popitem(last=False)
        return loaded

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __getstate__(self) -> dict[str, int | None]:
        """Pickle the settings only."""
        return {name: getattr(self, name) for name in ("max_open", "max_indexes", "total_bytes")}

    def __setstate__(self, state: dict[str, int | None]) -> None:
        """Start with no open files."""
        ShardReader.__init__(self, **state)  # type: ignore[arg-type]

    def __del__(self) -> None:
        """Close all files."""
        self.close()

    def _fetch_range(self, url: str, start: int, count: int, table: TarIndex, *, fresh: bool) -> bytes:
        # retried once more here, because the cache of whole shards is on a local disk
        return retry(
            url,
            lambda: remote.fetch_range(
                url, start, count, table=table, total_bytes=self.total_bytes, fresh=fresh
            ),
        )

    def _read_local(self, path: str, start: int, count: int) -> bytes:
        try:
            return self._pread(path, start, count)
        except OSError as error:
            return retry(path, lambda: self._pread(path, start, count), failed=error)

    def _pread(self, path: str, start: int, count: int) -> bytes:
        with self._lock:
            try:
                file, parts, received = self._open(path), [], 0
                while received < count and (part := os.pread(file, count - received, start + received)):
                    parts.append(part)  # a network disk may return less than was requested
                    received += len(part)
                return parts[0] if len(parts) == 1 else b"".join(parts)
            except OSError:
                self.close()  # a handle may be stale, or too many files may be open
                raise

    def _open(self, path: str) -> int:
        if self._process != os.getpid():  # after a fork: the files belong to the parent
            self.close()
            self._process = os.getpid()
        descriptor = self._files.get(path)
        if descriptor is None:
            descriptor = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > self.max_open:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(path)
        return descriptor


class _ShardEntry(NamedTuple):
    """A shard of a set: where it is, and what the manifest says of it."""

    url: str
    root: str
    hash: str
    records: int


def _shard_entries(shard_set: ShardSet) -> dict[str, _ShardEntry]:
    root = shard_set.root
    return {s.name: _ShardEntry(shard_set.url(s.name), root, s.hash, s.records) for s in shard_set.shards}


class RecordSource:
    """Base of `Records` and `JoinedRecords`: the list of shards, the reader, and prefetching.

    Attributes:
        name: Name of the set.
        digest: Digest of the shards that are read.
        is_remote: Whether reading sends requests to a server, so that `prefetch` saves time.
    """

    def __init__(self, shard_set: ShardSet, *, digest: str, is_remote: bool, total_bytes: int) -> None:
        """Open nothing yet."""
        self.name, self.digest, self.is_remote = shard_set.name, digest, is_remote
        self._shards = {f"{self.name}/{name}": entry for name, entry in _shard_entries(shard_set).items()}
        self._reader = ShardReader(total_bytes=total_bytes)
        self._prefetched: dict[tuple[str, int], Future[KeyAndFields]] = {}
        self._prefetch_process = 0

    def __getstate__(self) -> dict[str, object]:
        """Pickle without the records that are being fetched."""
        return {**self.__dict__, "_prefetched": {}}

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(set/shard, records) of every shard."""
        return [(name, entry.records) for name, entry in self._shards.items()]

    def share_reader(self, reader: ShardReader) -> None:
        """Read with a reader that other sets use as well, so that its limits hold for all of them together."""
        reader.total_bytes = (reader.total_bytes or 0) + (self._reader.total_bytes or 0)
        self._reader = reader

    def prefetch(self, records: Iterable[tuple[str, int]]) -> None:
        """Start to fetch records (shard, index) in parallel; forget those of the last call that were not read."""
        if not _fetch_pool:
            _fetch_pool.append(ThreadPoolExecutor(_MAX_REQUESTS, thread_name_prefix="fetch"))
        self._prefetch_process = os.getpid()  # the threads do not exist in a forked process
        self._prefetched = {
            record: _fetch_pool[0].submit(self._fetch, *record) for record in dict.fromkeys(records)
        }

    def read(self, shard: str, index: int) -> KeyAndFields:
        """Read a record: its key, and its fields (extension to bytes).

        Args:
            shard: set/shard, as in `shards`.
            index: Index of the record in the shard.

        Raises:
            BadRecord: It cannot be read, is not the one of the manifest, or its image and label do not match.
            StorageUnavailable: It cannot be read for now.
        """
        if self._prefetched and self._prefetch_process == os.getpid():
            future = self._prefetched.pop((shard, index), None)
            if future is not None:
                return future.result()
        return self._fetch(shard, index)

    def _fetch(self, shard: str, index: int) -> KeyAndFields:
        raise NotImplementedError  # Records and JoinedRecords fetch differently

    def _read_record(self, entry: _ShardEntry, shard: str, index: int, *, side: str = "") -> KeyAndFields:
        try:
            return self._reader.read(entry.url, index, hash=entry.hash)
        except BadRecord as error:
            if not is_remote(entry.root) and not os.path.exists(os.path.join(entry.root, "manifest.json")):
                raise StorageUnavailable(
                    f"{entry.root} is missing", ["mount its disk, then ", *RESUME_HINT]
                ) from error
            raise BadRecord(shard, index, error.key, side + error.reason) from error


class Records(RecordSource):
    """The records of a set; cheap to create and to send to other processes.

    Attributes:
        set: The set.
    """

    def __init__(self, shard_set: ShardSet) -> None:
        """Open nothing yet."""
        far = is_remote(shard_set.root)
        super().__init__(shard_set, digest=shard_set.digest, is_remote=far, total_bytes=shard_set.bytes)
        self.set = shard_set

    def _fetch(self, shard: str, index: int) -> KeyAndFields:
        return self._read_record(self._shards[shard], shard, index)


class JoinedRecords(RecordSource):
    """Label records, each joined by its key with the image record that it labels.

    A record has all fields of the image except labels, and those of the label.

    Attributes:
        images: The set of images.
        labels: The set of labels, whose name and shards these are.
        digest: Digest of the labels and of the image shards that they label.
    """

    def __init__(self, images: ShardSet, labels: ShardSet) -> None:
        """Open nothing yet.

        Raises:
            ShardError: The manifest of the labels does not name their images.
        """
        if "images" not in labels.meta:
            raise ShardError(
                f"{labels.root} is not a label set, whose manifest names its images: read it without an image set, "
                "or make labels with  python train.py stage=pseudolabel"
            )
        self._image_hashes: dict[str, str] = labels.meta["images"]["hashes"]
        labeled = sorted((shard.name, self._image_hashes[shard.name]) for shard in labels.shards)
        digest = hashlib.sha256(json.dumps([labels.digest, labeled]).encode()).hexdigest()
        super().__init__(
            labels,
            digest=f"sha256:{digest}",
            is_remote=is_remote(images.root) or is_remote(labels.root),
            total_bytes=images.bytes + labels.bytes,
        )
        self.images, self.labels = images, labels
        self._image_shards = _shard_entries(images)

    def _fetch(self, shard: str, index: int) -> KeyAndFields:
        try:
            return self._read_pair(shard, index)
        except _KeyNotInImages:
            name = shard.partition("/")[2]
            urls = self._shards[shard].url, self._image_shards[name].url
            if not any(map(is_remote, urls)):
                raise
            for url in urls:  # either index may have been damaged on the way
                self._reader.forget(url)
            return self._read_pair(shard, index)

    def _read_pair(self, shard: str, index: int) -> KeyAndFields:
        key, label = self._read_record(self._shards[shard], shard, index, side="label: ")
        name = shard.partition("/")[2]
        entry, images = self._image_shards.get(name), f"{self.images.name}/{name}"
        if entry is None or entry.hash != self._image_hashes[name]:
            problem = "is missing" if entry is None else "is not the one that this label was made from"
            raise BadRecord(shard, index, key, f"image: the shard {images} {problem}")
        try:
            number = self._reader.find(entry.url, key)
        except KeyError:
            raise _KeyNotInImages(
                shard, index, key, f"image: the shard {images} does not have this key"
            ) from None
        except ShardError as error:
            raise BadRecord(shard, index, key, f"image: {error}") from error
        _, image = self._read_record(entry, shard, number, side="image: ")
        fields = {name: data for name, data in image.items() if not is_label_field(name)}
        return key, {**label, **fields}


class _KeyNotInImages(BadRecord):
    """The image shard does not have the key of a label."""


def _load_index(url: str) -> TarIndex:
    if is_remote(url):
        address = index_address(url)
        try:
            return parse_index(remote.fetch(address).decode(errors="replace"), where=address)
        except PermanentError:
            raise
        except ShardError:  # it may have been damaged on the way
            return parse_index(remote.fetch(address).decode(errors="replace"), where=address)
    path = Path(url)
    size = path.stat().st_size if path.is_file() else None
    if not size:
        raise ShardError(f"{url} is missing" if size is None else f"{url} is empty")
    index = path.with_suffix(".idx")
    if not index.exists():
        return parse_index(build_index_text(path), where=path)
    table = parse_index(index.read_text(errors="replace"), where=index)
    if table.bytes != size:
        raise ShardError(f"{url} has {size} bytes, its index says {table.bytes}: truncated, or another tar")
    return table


def _extract_field(data: bytes, member: TarMember, start: int) -> bytes:
    """Return the data of a file, checked by its crc32 and by the name in its tar header.

    Args:
        data: Bytes of the tar.
        member: The file.
        start: Offset of `data` in the tar.

    Raises:
        ShardError: Checksum or name differ from the index.
    """
    offset = member.offset - start
    field = data[offset : offset + member.size]
    if zlib.crc32(field) != member.crc:
        raise ShardError(
            f"the checksum of its {member.extension} differs: damaged, or the index of another tar"
        )
    name = f"{member.key}.{member.extension}"
    if not data.startswith(name.encode() + b"\0", max(0, offset - HEADER_BYTES)):
        check_header_name(data[max(0, offset - LONG_HEADER_BYTES) : offset], member.extension, name)
    return field
