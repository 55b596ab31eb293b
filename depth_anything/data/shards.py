"""A set of shards: a folder or URL prefix of tars with manifest.json, which says what they are and what made
them.

The manifest is written last, so that a set with one is finished. Its digest, over the shards' names, records,
bytes and hashes, is what a run remembers of its data. The names of data.tars and data.reader are here, too.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.data import remote
from depth_anything.data.address import is_remote, join
from depth_anything.data.reader import JoinedRecords, Records, ShardReader
from depth_anything.data.sample import decode_labels, decode_record
from depth_anything.data.tars import (
    BadRecord,
    ShardError,
    ShardInfo,
    ShardSet,
    index_shard,
    index_text,
    parse_index,
    remove_stale,
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
_THREADS = 16
_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def make_set(
    root: str | Path, *, name: str, shards: Iterable[ShardInfo], meta: Mapping[str, Any]
) -> ShardSet:
    """Put shards together to a set, in the order of their names.

    Raises:
        ShardError: a name that cannot be one, or two shards of one name.
    """
    rows = sorted(shards, key=lambda shard: shard.name)
    if not _SET_NAME.fullmatch(name):
        raise ShardError(f'"{name}" cannot name a set: use A-Z a-z 0-9 _ -')
    for before, row in zip([None, *rows], rows, strict=False):
        if not _SHARD_NAME.fullmatch(row.name):
            raise ShardError(
                f'{root}: "{row.name}" cannot name a shard: use A-Z a-z 0-9 _ - and dots between'
            )
        if before and before.name == row.name:
            raise ShardError(f"{root}: two shards are called {row.name}")
    text = json.dumps([vars(row) for row in rows], sort_keys=True, separators=(",", ":"))
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return ShardSet(name, str(root), tuple(rows), dict(meta), digest)


def write_manifest(
    root: str | Path, *, name: str, shards: Iterable[ShardInfo], meta: Mapping[str, Any]
) -> ShardSet:
    """Write manifest.json, which finishes a set: atomically, and the same bytes for the same set.

    Args:
        root: the folder of the tars.
        name: of the set: A-Z a-z 0-9 _ -.
        shards: in any order.
        meta: what made the set, as JSON: tool, version, settings, licence, unit, what is sky.

    Raises:
        ShardError: a name that cannot be one, or two shards of one name.
    """
    made = make_set(root, name=name, shards=shards, meta=meta)
    head = {
        "version": _VERSION,
        "name": name,
        "digest": made.digest,
        "records": made.records,
        "meta": made.meta,
    }
    text = json.dumps(head, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    rows = ",\n".join(json.dumps(vars(shard)) for shard in made.shards)
    text = f'{text.removesuffix("}").rstrip()},\n "shards": [\n{rows}\n]}}\n'
    remove_stale(Path(root))
    write_atomically(Path(root, "manifest.json"), text.encode())
    return made


def open_set(root: str | Path, *, name: str | None = None, check: bool = True) -> ShardSet:
    """Open a finished set.

    Args:
        root: a folder, or a URL prefix that "/manifest.json" can follow.
        name: to call the set otherwise than it calls itself.
        check: hold existence and size of local shards against the manifest.

    Raises:
        ShardError: no such folder, no manifest, no records, a shard that is missing or of another size.
        Outage: the address does not answer for now.
    """
    root = str(root).removeprefix("file://").rstrip("/")
    try:
        made = _parse_manifest(_read_manifest(root), root, name)
    except ShardError as error:
        if not is_remote(root) or isinstance(error, remote.Gone):
            raise
        made = _parse_manifest(_read_manifest(root), root, name)  # it may have come damaged
    if not made.records:
        raise ShardError(f"{root} holds no records: write shards there with  depth-anything shard")
    if check and not is_remote(root):
        for problem in _missing(made):
            raise ShardError(
                f"{problem}: copy it again; for the whole list type  depth-anything verify {root}"
            )
    return made


def _parse_manifest(data: bytes, root: str, name: str | None) -> ShardSet:
    where = join(root, "manifest.json")
    try:
        content = json.loads(data)
        rows = [
            ShardInfo(str(r["name"]), int(r["records"]), int(r["bytes"]), str(r["hash"]))
            for r in content["shards"]
        ]
        made = make_set(root, name=name or content["name"], shards=rows, meta=content["meta"])
        intact = made.digest == content["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where} is damaged ({error!r}): copy it again") from error
    if not intact:
        raise ShardError(f"{where} is damaged (its digest differs): copy it again")
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
        raise ShardError(f"{root} holds no .tar: give the folder that the shards lie in")
    rows = [index_shard(path) for path in tars]
    return write_manifest(root, name=name or root.resolve().name, shards=rows, meta=meta or {})


def verify_set(root: str | Path, *, decode: bool = False) -> list[str]:
    """Read a whole local set and say what is wrong with it.

    Args:
        root: folder.
        decode: decode every record, too.

    Returns:
        A sentence a problem; none for a sound set.
    """
    try:
        made = open_set(root, check=False)
    except ShardError as error:
        return [str(error)]
    if is_remote(made.root):
        return [f"{root} is not a local folder: verify it where it lies"]
    problems, hashes = _missing(made), []
    known = {f"{shard.name}{ending}" for shard in made.shards for ending in (".tar", ".idx")}
    for entry in sorted(os.listdir(made.root)):
        if entry.endswith((".tar", ".idx")) and entry not in known and not entry.startswith("."):
            problems.append(f"{made.root}/{entry} is not in the manifest")
    present = [shard for shard in made.shards if Path(made.url(shard.name)).is_file()]
    for shard in present:
        try:
            hashes.append(_verify_shard(made, shard, problems, decode=decode))
        except ShardError as error:
            hashes.append(np.empty(0, np.uint64))
            problems.append(str(error))
    return problems + _repeated_keys(made, [shard.name for shard in present], hashes)


def _verify_shard(made: ShardSet, shard: ShardInfo, problems: list[str], *, decode: bool) -> np.ndarray:
    """Verify a shard; return a 64-bit hash of each key."""
    path = Path(made.url(shard.name))
    text, place = index_text(path), path.with_suffix(".idx")
    if not place.is_file():
        problems.append(f"{place} is missing: type  depth-anything shard index {made.root}")
    elif place.read_text(errors="replace") != text:
        problems.append(f"{place} is not the index of its tar: type  depth-anything shard index {made.root}")
    table = parse_index(text, where=path)
    if (table.hash, table.records) != (shard.hash, shard.records):
        problems.append(f"{path} is not the tar that the manifest means: its hash differs")
    keys, labels, reader = table.keys(), made.meta.get("kind") == "labels", ShardReader()
    if labels and not _sidecar_fits(path, shard):
        problems.append(f"{path.with_suffix('.json')} is missing, or is not that of its tar")
    for index, key in enumerate(keys if decode else ()):
        try:
            fields = reader.read(path, index)[1]
            if not labels:
                decode_record(key, fields)
            elif not decode_labels(fields):
                raise ValueError(f"no label among the fields {sorted(fields)}")
        except ValueError as error:
            reason = error.reason if isinstance(error, BadRecord) else error
            problems.append(f"{path}[{index}] {key}: {reason}")
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _sidecar_fits(tar: Path, shard: ShardInfo) -> bool:
    try:
        content = json.loads(tar.with_suffix(".json").read_bytes())
        found = ShardInfo(content["name"], content["records"], content["bytes"], content["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == shard


def _repeated_keys(made: ShardSet, names: Sequence[str], hashes: Sequence[np.ndarray]) -> list[str]:
    # Eight bytes a record stand for the keys, which would not fit in memory.
    if not hashes:
        return []
    owner = np.repeat(np.arange(len(names)), [len(column) for column in hashes])
    column = np.concatenate(hashes)
    order = np.argsort(column, kind="stable")
    twice = np.flatnonzero(column[order][1:] == column[order][:-1])
    pairs = {(int(owner[order[i]]), int(owner[order[i + 1]])) for i in twice}
    problems = []
    for one, other in sorted(pairs):
        paths = [Path(made.url(names[i])) for i in (one, other)]
        shared = set.intersection(*(set(parse_index(index_text(p), where=p).keys()) for p in paths))
        problems += [f'the key "{key}" is in {names[one]} and in {names[other]}' for key in sorted(shared)]
    return problems


def _read_manifest(root: str) -> bytes:
    if is_remote(root):
        return remote.read(join(root, "manifest.json"))
    if not os.path.isdir(root):
        raise ShardError(f"{root} is not a folder: write shards there with  depth-anything shard")
    try:
        return Path(root, "manifest.json").read_bytes()
    except FileNotFoundError:
        raise ShardError(
            f"{root} has no manifest.json: finish writing the set, "
            f"or, if its tars are whole, type  depth-anything shard index {root}"
        ) from None


def _missing(made: ShardSet) -> list[str]:
    # One listing says which are there; their sizes are asked for side by side, as a network disk takes its time
    # over each and a set has up to 60,000.
    listed = set(os.listdir(made.root))
    there = [shard for shard in made.shards if f"{shard.name}.tar" in listed]
    parts = [there[i::_THREADS] for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(
            chain.from_iterable(pool.map(lambda part: [(s.name, _size(made, s)) for s in part], parts))
        )
    problems = []
    for shard in made.shards:
        size = sizes.get(shard.name)
        if size is None:
            problems.append(f"{made.url(shard.name)} is missing")
        elif size != shard.bytes:
            problems.append(f"{made.url(shard.name)} has {size} bytes in place of {shard.bytes}")
    return problems


def _size(made: ShardSet, shard: ShardInfo) -> int:
    return os.stat(made.url(shard.name)).st_size
