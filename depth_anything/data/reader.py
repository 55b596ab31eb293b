"""Reading single records out of shards: by offset, checked, from any process.

What is read whole and is wrong is a bad record. What cannot be read for now, here or from afar, is read again, and
then stops the run as an Outage: a failing disk must not change what a network learns from.
"""

import hashlib
import json
import os
import re
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from depth_anything.data import remote
from depth_anything.data.address import index_address, is_remote
from depth_anything.data.sample import LABEL_FIELDS
from depth_anything.data.tar_index import TarIndex, TarMember
from depth_anything.data.tars import (
    BadRecord,
    ShardError,
    ShardInfo,
    ShardSet,
    StorageUnavailable,
    build_index_text,
    parse_index,
)

_MAX_REQUESTS = 16  # requests that a process has under way
_MAX_RECORD_BYTES = 1 << 30  # bytes of a record; no image and label have as many
_HEADER_BYTES = 512  # bytes of a tar's header, which stands right before the data
_LONG_NAME_LENGTH = (
    98  # from here on, with "./" before it, a name may stand in blocks of its own before the header
)
_LONG_HEADER_BYTES = 1 << 13

_fetch_pool: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_fetch_pool.clear)

KeyAndFields = tuple[str, dict[str, bytes]]


class ShardReader:
    """Reads records of shards singly.

    Local files are read by offset, http, https, s3 and gs by range. Other addresses (pipe:, http servers
    without ranges) are copied whole into a cache folder on first use, after one line on stderr that says how
    much disk this takes. Files are opened when needed, and anew in a forked or spawned process; threads may
    share a reader. What comes damaged from afar is fetched once more before it counts as damaged.
    """

    def __init__(
        self, max_open: int = 64, *, max_indexes: int = 2048, total_bytes: int | None = None
    ) -> None:
        """Open nothing yet.

        Args:
            max_open: files open at a time.
            max_indexes: indexes kept in memory, some 70 kB each for a thousand records.
            total_bytes: of all shards that will be read, for the line on stderr.
        """
        self.max_open, self.max_indexes, self.total_bytes = max_open, max_indexes, total_bytes
        self._process, self._lock = os.getpid(), threading.RLock()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._indexes: OrderedDict[str, TarIndex] = OrderedDict()
        self._gone: dict[str, str] = {}  # shards of which nothing can be read, and why

    def read(self, url: str | Path, index: int, *, hash: str | None = None) -> KeyAndFields:
        """Read one record: its key, and its fields (extension to bytes).

        Each field is held against its crc32 and against the name in the tar's header before it.

        Args:
            url: of the shard.
            index: of the record in it.
            hash: of the tar, as the manifest has it.

        Raises:
            BadRecord: the shard is missing, cut short or damaged here, or its index does not fit it.
            IndexError: the shard has no such record.
            Outage: it cannot be had for now, here or from afar.
        """
        url = str(url)
        if url in self._gone:
            table = self._indexes.get(url)
            raise BadRecord(url, index, table.key(index) if table else "", self._gone[url])
        try:
            return self._read(url, index, hash)
        except BadRecord:
            if not is_remote(url):
                raise
        self.forget(url)  # what is wrong may have come on the way
        try:
            return self._read(url, index, hash, fresh=True)
        except BadRecord as error:
            if isinstance(error.__cause__, remote.PermanentError):
                self._gone[url] = error.reason  # its other records need not ask
            raise

    def _read(self, url: str, index: int, hash: str | None, *, fresh: bool = False) -> KeyAndFields:
        key = ""
        try:
            table = self.index(url)
            if hash is not None and table.hash != hash:
                raise ShardError(f"{url} is not the tar that the manifest means: its hash differs")
            key = table.key(index)
            members = table.members(index)
            longest = max(len(key) + 1 + len(member.extension) for member in members)
            start = max(
                0, members[0].offset - (_HEADER_BYTES if longest <= _LONG_NAME_LENGTH else _LONG_HEADER_BYTES)
            )
            end = max(member.offset + member.size for member in members)
            if end - start > _MAX_RECORD_BYTES:
                raise ShardError(
                    f"its {end - start} bytes are more than a record may have, {_MAX_RECORD_BYTES}"
                )
            data = self._bytes(url, start, end - start, table, fresh=fresh)
            fields = {member.extension: _extract_field(data, member, start) for member in members}
            for member in members:
                _check_header_name(data, member, start)
            return key, fields
        except StorageUnavailable:
            raise
        except (ShardError, OSError) as error:
            raise BadRecord(url, index, key, str(error)) from error

    def forget(self, url: str | Path) -> None:
        """Drop a shard's index, so that it is read anew."""
        self._indexes.pop(str(url), None)

    def keys(self, url: str | Path) -> list[str]:
        """Return the keys of a shard in its order; ShardError where there is no index to be had."""
        return self.index(url).keys()

    def find(self, url: str | Path, key: str) -> int:
        """Return the number of the record with this key; KeyError where there is none."""
        found = self.index(url).find(key)
        if found is None:
            raise KeyError(key)
        return found

    def index(self, url: str | Path) -> TarIndex:
        """Return a shard's index: NAME.idx, or, of a local tar without one, made by reading it through.

        Raises:
            ShardError: there is none to be had, or it was made of a tar of another size.
            Outage: it cannot be had for now.
        """
        url = str(url)
        table = self._indexes.get(url)
        if table is None:
            table = remote.retry(url, lambda: _load_index(url))
        with self._lock:
            self._indexes[url] = table
            self._indexes.move_to_end(url)
            if len(self._indexes) > self.max_indexes:
                self._indexes.popitem(last=False)
        return table

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __getstate__(self) -> dict[str, int | None]:
        """Pickle the settings alone."""
        return {
            "max_open": self.max_open,
            "max_indexes": self.max_indexes,
            "total_bytes": self.total_bytes,
        }

    def __setstate__(self, state: dict[str, int | None]) -> None:
        """Begin with nothing open."""
        ShardReader.__init__(self, **state)  # type: ignore[arg-type]

    def __del__(self) -> None:
        """Close all files."""
        self.close()

    def _bytes(self, url: str, start: int, count: int, table: TarIndex, *, fresh: bool) -> bytes:
        if is_remote(url):
            data = remote.retry(  # whose cache lies on a disk of ours
                url,
                lambda: remote.fetch_range(
                    url, start, count, table=table, total_bytes=self.total_bytes, fresh=fresh
                ),
            )
        else:
            data = remote.retry(url, lambda: self._pread(url, start, count))
        if len(data) != count:
            raise ShardError(f"{len(data)} bytes came in place of {count}: the shard is truncated")
        return data

    def _pread(self, path: str, start: int, count: int) -> bytes:
        with self._lock:
            try:
                file, parts, held = self._open(path), [], 0
                while held < count and (part := os.pread(file, count - held, start + held)):
                    parts.append(part)  # a network disk may give less than was asked for
                    held += len(part)
                return parts[0] if len(parts) == 1 else b"".join(parts)
            except OSError:
                self.close()  # a handle may be stale, or too many files open
                raise

    def _open(self, path: str) -> int:
        if self._process != os.getpid():  # a parent's files are its own
            self.close()
            self._process = os.getpid()
        descriptor = self._files.get(path)
        if descriptor is None:
            descriptor = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > self.max_open:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(path)
        return descriptor


class _Prefetcher:
    """Records that are being fetched, each by a thread, before they are asked for."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._under_way: dict[tuple[str, int], Future[KeyAndFields]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Prefetcher, ()

    def begin(self, fetch: Callable[[str, int], KeyAndFields], places: Iterable[tuple[str, int]]) -> None:
        """Fetch these, and forget what was never asked for."""
        if not _fetch_pool:
            _fetch_pool.append(ThreadPoolExecutor(_MAX_REQUESTS, thread_name_prefix="fetch"))
        self._process = os.getpid()
        self._under_way = {place: _fetch_pool[0].submit(fetch, *place) for place in dict.fromkeys(places)}

    def take(self, shard: str, index: int) -> Future[KeyAndFields] | None:
        """Return what was begun of a record, if it was, and by this process."""
        return self._under_way.pop((shard, index), None) if self._process == os.getpid() else None


class Records:
    """The records of a set, read singly; cheap to make and to send to other processes.

    Attributes:
        set: the set.
        name: its name.
        digest: its digest.
    """

    def __init__(self, shard_set: ShardSet) -> None:
        """Open nothing yet."""
        self.set, self.name, self.digest = shard_set, shard_set.name, shard_set.digest
        self._infos = {f"{self.name}/{shard.name}": shard for shard in shard_set.shards}
        self._reader, self._ahead = ShardReader(total_bytes=shard_set.bytes), _Prefetcher()

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(set/shard, records) of every shard."""
        return [(name, info.records) for name, info in self._infos.items()]

    def share_reader(self, reader: ShardReader) -> None:
        """Read through a reader that other sets read through, too: its files and indexes are counted once."""
        reader.total_bytes = (reader.total_bytes or 0) + (self._reader.total_bytes or 0)
        self._reader = reader

    @property
    def is_remote(self) -> bool:
        """Whether reading means asking a server, so that `expect` pays."""
        return is_remote(self.set.root)

    def prefetch(self, places: Iterable[tuple[str, int]]) -> None:
        """Begin to fetch records that will be read next, side by side."""
        self._ahead.begin(self._fetch, places)

    def read(self, shard: str, index: int) -> KeyAndFields:
        """Read a record: key and fields.

        Args:
            shard: set/shard, as in `shards`.
            index: of the record in it.

        Raises:
            BadRecord: it cannot be read, or is not what the manifest means.
            Outage: it cannot be had for now.
        """
        begun = self._ahead.take(shard, index)
        return begun.result() if begun else self._fetch(shard, index)

    def _fetch(self, shard: str, index: int) -> KeyAndFields:
        return _read_record(self._reader, self.set, self._infos[shard], shard, index)


class JoinedRecords:
    """Label records, each joined by its key with the image record it was made from.

    Attributes:
        images: the set of images.
        labels: the set of labels.
        name: of the labels.
        digest: of the labels and the image shards they were made from.
    """

    def __init__(self, images: ShardSet, labels: ShardSet) -> None:
        """Open nothing yet.

        Raises:
            ShardError: the labels do not say which images they were made from.
        """
        if "images" not in labels.meta:
            raise ShardError(
                f"{labels.root} is not a label set, which would say what images it was made from: "
                "it is read without an image set, or made by  python train.py stage=pseudolabel"
            )
        self.images, self.labels, self.name = images, labels, labels.name
        self._hashes: dict[str, str] = labels.meta["images"]["hashes"]
        made_from = sorted((shard.name, self._hashes[shard.name]) for shard in labels.shards)
        text = json.dumps([labels.digest, made_from])
        self.digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        self._label_infos = {f"{labels.name}/{shard.name}": shard for shard in labels.shards}
        self._image_infos = {shard.name: shard for shard in images.shards}
        self._reader, self._ahead = ShardReader(total_bytes=images.bytes + labels.bytes), _Prefetcher()

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(set/shard, records) of every label shard."""
        return [(name, info.records) for name, info in self._label_infos.items()]

    def share_reader(self, reader: ShardReader) -> None:
        """Read through a reader that other sets read through, too: its files and indexes are counted once."""
        reader.total_bytes = (reader.total_bytes or 0) + (self._reader.total_bytes or 0)
        self._reader = reader

    @property
    def is_remote(self) -> bool:
        """Whether reading means asking a server, so that `expect` pays."""
        return is_remote(self.images.root) or is_remote(self.labels.root)

    def prefetch(self, places: Iterable[tuple[str, int]]) -> None:
        """Begin to fetch records that will be read next, side by side."""
        self._ahead.begin(self._fetch, places)

    def read(self, shard: str, index: int) -> KeyAndFields:
        """Read a label and its image: the key they share; all fields of the image but labels, and the
        label's.

        Raises:
            BadRecord: either cannot be read, or they do not belong together.
            Outage: either cannot be had for now.
        """
        begun = self._ahead.take(shard, index)
        return begun.result() if begun else self._fetch(shard, index)

    def _fetch(self, shard: str, index: int) -> KeyAndFields:
        try:
            return self._pair(shard, index)
        except _KeyNotInImages:
            info = self._label_infos[shard]
            addresses = self.labels.url(info.name), self.images.url(info.name)
            if not any(map(is_remote, addresses)):
                raise
            for address in addresses:  # either index may have come damaged
                self._reader.forget(address)
            return self._pair(shard, index)

    def _pair(self, shard: str, index: int) -> KeyAndFields:
        info = self._label_infos[shard]
        key, label = _read_record(self._reader, self.labels, info, shard, index, what="label: ")
        image_info = self._image_infos.get(info.name)
        if image_info is None or image_info.hash != self._hashes[info.name]:
            wrong = "is missing" if image_info is None else "is not the one this label was made from"
            raise BadRecord(shard, index, key, f"image: the shard {self.images.name}/{info.name} {wrong}")
        try:
            number = self._reader.find(self.images.url(info.name), key)
        except KeyError:
            reason = f"image: the shard {self.images.name}/{info.name} has no such key"
            raise _KeyNotInImages(shard, index, key, reason) from None
        except ShardError as error:
            raise BadRecord(shard, index, key, f"image: {error}") from error
        _, image = _read_record(self._reader, self.images, image_info, shard, number, what="image: ")
        kept = {name: data for name, data in image.items() if name.split(".")[0] not in LABEL_FIELDS}
        return key, {**label, **kept}


class _KeyNotInImages(BadRecord):
    """A label whose key its image shard does not have."""


def _read_record(
    reader: ShardReader, shards: ShardSet, info: ShardInfo, shard: str, index: int, *, what: str = ""
) -> KeyAndFields:
    try:
        return reader.read(shards.url(info.name), index, hash=info.hash)
    except BadRecord as error:
        if not is_remote(shards.root) and not os.path.exists(os.path.join(shards.root, "manifest.json")):
            raise StorageUnavailable(
                f"{shards.root} is gone, or its disk is", (*remote.RESUME_HINT, " when it is there again")
            ) from error
        raise BadRecord(shard, index, error.key, what + error.reason) from error


def _load_index(url: str) -> TarIndex:
    if is_remote(url):
        address = index_address(url)
        try:
            return parse_index(remote.fetch(address).decode(errors="replace"), where=address)
        except remote.PermanentError:
            raise
        except ShardError:  # it may have come damaged
            return parse_index(remote.fetch(address).decode(errors="replace"), where=address)
    path = Path(url)
    size = path.stat().st_size if path.is_file() else None
    if not size:
        raise ShardError(f"{url} is missing" if size is None else f"{url} is empty")
    place = path.with_suffix(".idx")
    if not place.exists():
        return parse_index(build_index_text(path), where=path)
    table = parse_index(place.read_text(errors="replace"), where=place)
    if table.bytes != size:
        raise ShardError(f"{url} has {size} bytes, its index says {table.bytes}: truncated, or another tar")
    return table


def _extract_field(data: bytes, member: TarMember, start: int) -> bytes:
    field = data[member.offset - start : member.offset - start + member.size]
    if zlib.crc32(field) != member.crc:
        raise ShardError(f"the checksum of its {member.extension} differs: damaged, or another tar's index")
    return field


def _check_header_name(data: bytes, member: TarMember, start: int) -> None:
    """Hold a member's key and extension against the tar's own header, in the bytes from `start` on."""
    place = member.offset - start
    before = data[max(0, place - _LONG_HEADER_BYTES) : place]
    if not _header_has_name(before, f"{member.key}.{member.extension}"):
        try:
            tarfile.TarInfo.frombuf(before[-_HEADER_BYTES:], "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise ShardError(
                f"the header checksum of its {member.extension} differs: damaged, or another tar's index"
            ) from error
        raise ShardError(
            f"its {member.extension} has another name in the tar: its index is damaged, or another tar's; "
            "type  depth-anything shard index FOLDER"
        )


def _header_has_name(before: bytes, name: str) -> bool:
    """Whether the header at the end of the bytes before a member's data has this name."""
    header = before[-_HEADER_BYTES:]
    wanted = name.encode()
    if header.startswith(wanted + b"\0"):
        return True
    stored = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        stored = header[345:500].partition(b"\0")[0] + b"/" + stored
    spelled = _name_pattern(name)
    if re.fullmatch(spelled, stored):
        return True
    # The names of others' tars may be longer than a header holds: a pax record or a block of GNU's has them then.
    return len(name) > _LONG_NAME_LENGTH and bool(
        re.search(b"(?:path=|\0)" + spelled + b"[\n\0]", before[:-_HEADER_BYTES])
    )


def _name_pattern(name: str) -> bytes:
    """A pattern of the ways to write a member's name: "./" may stand before it; the extension may have capitals."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    key, end = (re.escape(part.encode()) for part in (f"{folder}{slash}{stem}", extension))
    return b"(?:\\./)?" + key + b"\\.(?i:" + end + b")"
