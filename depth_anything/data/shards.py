"""A set of shards: a folder or URL prefix of tars with manifest.json, which says what they are and what made them.

The manifest comes last, so that a set with one is finished. Its digest, over the shards' names, sizes and hashes, is
what a run remembers of its data.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from depth_anything.data import remote
from depth_anything.data.reader import ShardReader
from depth_anything.data.sample import decode_record
from depth_anything.data.tars import (
    BadRecord,
    ShardError,
    ShardInfo,
    index_shard,
    index_text,
    write_atomically,
    write_shard,
)

__all__ = [
    "BadRecord",
    "JoinedRecords",
    "Records",
    "ShardError",
    "ShardInfo",
    "ShardReader",
    "ShardSet",
    "index_set",
    "index_shard",
    "open_set",
    "verify_set",
    "write_manifest",
    "write_shard",
]

_VERSION = 1
_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class ShardSet:
    """A set of shards as its manifest has it.

    Attributes:
        name: unique within a run.
        root: folder or URL prefix.
        shards: sorted by name.
        meta: what made the set.
        digest: "sha256:…" of the shards.
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

    def url(self, shard: str) -> str:
        """Return the address of a shard's tar."""
        return f"{self.root}/{shard}.tar"


def write_manifest(
    root: str | Path, *, name: str, shards: Iterable[ShardInfo], meta: Mapping[str, Any]
) -> ShardSet:
    """Write manifest.json, which finishes a set, atomically and with the same bytes for the same set.

    Args:
        root: the folder of the tars.
        name: of the set, of A-Z a-z 0-9 _ -.
        shards: in any order.
        meta: what made the set: tool, version, settings, licence, unit, what is sky; JSON.
    """
    if not _SET_NAME.fullmatch(name):
        raise ShardError(f'"{name}" cannot name a set: use A-Z a-z 0-9 _ -')
    rows = sorted(shards, key=lambda shard: shard.name)
    made = ShardSet(name, str(root), tuple(rows), dict(meta), _digest(rows))
    content = {
        "version": _VERSION,
        "name": name,
        "digest": made.digest,
        "records": made.records,
        "meta": made.meta,
        "shards": [asdict(row) for row in rows],
    }
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(Path(root, "manifest.json"), text.encode())
    return made


def open_set(root: str | Path, *, name: str | None = None, check: bool = True) -> ShardSet:
    """Open a finished set.

    Args:
        root: a folder, or a URL prefix that "/manifest.json" can be appended to.
        name: to call the set by another name than its own.
        check: hold existence and size of local shards against the manifest.

    Raises:
        ShardError: missing folder, no manifest, no records, a missing shard or one of another size.
    """
    root = str(root).rstrip("/").removeprefix("file://")
    made = _parse_manifest(_read_manifest(root), root=root, name=name)
    if check and not remote.is_remote(root):
        _check_files(made)
    return made


def index_set(
    root: str | Path, *, name: str | None = None, meta: Mapping[str, Any] | None = None
) -> ShardSet:
    """Index the tars of a folder, anyone's, and write their manifest.

    Raises:
        ShardError: no tars, or one that `index_shard` refuses.
    """
    root = Path(root)
    tars = sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        raise ShardError(f"{root} holds no .tar files: nothing to index")
    for path in tars:
        if not _SHARD_NAME.fullmatch(path.stem):
            raise ShardError(f'"{path.name}" cannot name a shard: rename it to A-Z a-z 0-9 _ . -')
    rows = [index_shard(path) for path in tars]
    return write_manifest(root, name=name or root.resolve().name, shards=rows, meta=meta or {})


def verify_set(root: str | Path, *, decode: bool = False) -> list[str]:
    """Read a whole local set and return what is wrong with it, a sentence each; [] is a clean set.

    Args:
        root: folder.
        decode: decode every record, too.
    """
    try:
        made = open_set(root)
    except ShardError as error:
        return [str(error)]
    problems, reader, owners = [], ShardReader(), {}
    for shard in made.shards:
        path = Path(made.url(shard.name))
        try:
            text = index_text(path)
            if not path.with_suffix(".idx").exists():
                problems.append(f"{path} has no index: type  depth-anything shard index {root}")
            elif path.with_suffix(".idx").read_text() != text:
                problems.append(f"{path.with_suffix('.idx')} does not fit its tar")
            index = reader.index(str(path))
            if (index.hash, index.records) != (shard.hash, shard.records):
                problems.append(f"{path} is not the tar the manifest means: its hash differs")
            for number, key in enumerate(index.keys()):
                if owners.setdefault(key, shard.name) != shard.name:
                    problems.append(f'the key "{key}" is in {owners[key]} and in {shard.name}')
                if decode:
                    decode_record(*reader.read(path, number))
        except ValueError as error:
            problems.append(str(error))
    reader.close()
    return problems


class Records:
    """The records of a set, read singly; cheap to make, to pickle and to fork."""

    def __init__(self, shard_set: ShardSet) -> None:
        self.set = shard_set
        self.name = shard_set.name
        self.digest = shard_set.digest
        self._infos = {f"{self.name}/{shard.name}": shard for shard in shard_set.shards}
        self._reader = ShardReader(total_bytes=sum(shard.bytes for shard in shard_set.shards))

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(set/shard, records) of every shard."""
        return [(name, info.records) for name, info in self._infos.items()]

    def read(self, shard: str, index: int) -> tuple[str, dict[str, bytes]]:
        """Read a record: key and fields.

        Args:
            shard: set/shard, as in `shards`.
            index: of the record in it.

        Raises:
            BadRecord: it cannot be read as the manifest has it.
        """
        url = check_index(self._reader, self.set, self._infos[shard], shard, index)
        try:
            return self._reader.read(url, index)
        except BadRecord as error:
            raise BadRecord(shard, index, error.key, error.reason) from error


class JoinedRecords:
    """Label records, each joined by its key with the image record it was made from."""

    def __init__(self, images: ShardSet, labels: ShardSet) -> None:
        self.images, self.labels = images, labels
        self.name = labels.name
        text = json.dumps([labels.digest, images.digest])
        self.digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        self._label_infos = {f"{labels.name}/{shard.name}": shard for shard in labels.shards}
        self._image_infos = {shard.name: shard for shard in images.shards}
        self._reader = ShardReader(total_bytes=sum(s.bytes for s in (*images.shards, *labels.shards)))

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(set/shard, records) of every label shard."""
        return [(name, info.records) for name, info in self._label_infos.items()]

    def read(self, shard: str, index: int) -> tuple[str, dict[str, bytes]]:
        """Read a label and its image: the key they share, and the fields of both; the label's own win.

        Raises:
            BadRecord: either cannot be read, or the image shard has no such key.
        """
        info = self._label_infos[shard]
        url = check_index(self._reader, self.labels, info, shard, index)
        try:
            key, label = self._reader.read(url, index)
        except BadRecord as error:
            raise BadRecord(shard, index, error.key, f"label: {error.reason}") from error
        image_info = self._image_infos.get(info.name)
        if image_info is None:
            raise BadRecord(shard, index, key, f"the image set {self.images.name} has no shard {info.name}")
        url = check_index(self._reader, self.images, image_info, shard, index)
        try:
            number = self._reader.find(url, key)
            _, image = self._reader.read(url, number)
        except KeyError:
            raise BadRecord(
                shard, index, key, "a label without its image: the image shard lacks the key"
            ) from None
        except BadRecord as error:
            raise BadRecord(shard, index, key, f"image: {error.reason}") from error
        kept = {
            name: data for name, data in image.items() if name.split(".")[0] not in ("depth", "disparity")
        }
        return key, {**label, **kept}


def check_index(reader: ShardReader, made: ShardSet, info: ShardInfo, shard: str, index: int) -> str:
    """Return a shard's address once its index is the one the manifest means; BadRecord else."""
    url = made.url(info.name)
    try:
        table = reader.index(url)
    except ShardError as error:
        raise BadRecord(shard, index, "", str(error)) from error
    if table.hash != info.hash:
        raise BadRecord(shard, index, "", f"{url} is not the tar the manifest means: its hash differs")
    return url


def _digest(rows: Sequence[ShardInfo]) -> str:
    text = json.dumps([asdict(row) for row in rows], sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _read_manifest(root: str) -> bytes:
    if remote.is_remote(root):
        return remote.read(f"{root}/manifest.json")
    if not os.path.isdir(root):
        raise ShardError(f"{root} is not a folder: write shards there with  depth-anything shard")
    try:
        return Path(root, "manifest.json").read_bytes()
    except FileNotFoundError:
        raise ShardError(
            f"{root} has no manifest.json: type  depth-anything shard index {root}  "
            "if its tars are whole, or finish writing the set"
        ) from None


def _parse_manifest(data: bytes, *, root: str, name: str | None) -> ShardSet:
    try:
        content = json.loads(data)
        rows = [ShardInfo(**row) for row in content["shards"]]
        made = ShardSet(name or content["name"], root, tuple(rows), content["meta"], content["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{root}/manifest.json is damaged: {error!r}") from error
    if _digest(rows) != made.digest:
        raise ShardError(f"{root}/manifest.json is damaged: its digest differs")
    if not made.records:
        raise ShardError(f"{root} holds no records")
    return made


def _check_files(made: ShardSet) -> None:
    with os.scandir(made.root) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".tar")}
    for shard in made.shards:
        size = sizes.get(f"{shard.name}.tar")
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes in place of {shard.bytes}"
            raise ShardError(f"{made.url(shard.name)} {found}: copy it again or write the set anew")
