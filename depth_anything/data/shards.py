"""A set of shards: a folder or URL prefix of tars with manifest.json, which says what they are and what made
them.

The manifest is written last, so that a set with one is finished. Its digest, over the shards' names, records,
bytes and hashes, is what a run remembers of its data. The names of data.tars and data.reader are here, too.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.data import remote
from depth_anything.data.address import is_remote, join_address, redact_secrets
from depth_anything.data.reader import JoinedRecords, Records, ShardReader
from depth_anything.data.sample import Frame, decode_labels, decode_record
from depth_anything.data.tar_index import index_matches, is_project_index
from depth_anything.data.tars import (
    PATH_ERRNOS,
    BadRecord,
    ShardError,
    ShardInfo,
    ShardSet,
    StorageUnavailable,
    build_index_text,
    index_shard,
    parse_index,
    write_shard,
)
from depth_anything.disk import atomic_write, remove_stale
from depth_anything.preprocess import resize_shape

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
_OUT_OF_MEMORY = "it needs more memory than there is"
_THREADS = 16
_SETTINGS_FILE = "settings.json"  # lies in the folder of a set from the first moment it is written
_PATCH_SIZES = (1, 8, 14, 16, 32)  # of a patch: sides that images are resized to
_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def build_set(
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
    made = build_set(root, name=name, shards=shards, meta=meta)
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
    atomic_write(Path(root, "manifest.json"), text.encode())
    return made


def open_set(root: str | Path, *, name: str | None = None, check: bool = True) -> ShardSet:
    """Open a finished set.

    Args:
        root: a folder, or a URL prefix that "/manifest.json" can follow.
        name: to call the set otherwise than it calls itself.
        check: hold existence and size of local shards against the manifest.

    Raises:
        ShardError: no such folder, no manifest, no records, a shard that is missing or of another size.
        Outage: the address does not answer, or the disk fails, for now.
    """
    root = str(root).removeprefix("file://").rstrip("/")
    try:
        made = _parse_manifest(_read_manifest(root), root, name)
    except ShardError as error:
        if not is_remote(root) or isinstance(error, remote.PermanentError):
            raise
        made = _parse_manifest(_read_manifest(root), root, name)  # it may have come damaged
    if not made.records:
        raise ShardError(f"{root} holds no records: write shards there with  depth-anything shard")
    if check and not is_remote(root):
        for problem in remote.retry(root, lambda: _find_missing_shards(made)):
            raise ShardError(
                f"{problem}: copy it again; for the whole list type  depth-anything verify {root}"
            )
    return made


def _parse_manifest(data: bytes, root: str, name: str | None) -> ShardSet:
    where = join_address(root, "manifest.json")
    try:
        content = json.loads(data)
        rows = [
            ShardInfo(str(r["name"]), int(r["records"]), int(r["bytes"]), str(r["hash"]))
            for r in content["shards"]
        ]
        made = build_set(root, name=name or content["name"], shards=rows, meta=content["meta"])
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

    What an older manifest says of the set beside its shards stays said.

    Raises:
        ShardError: no tars, one that `index_shard` refuses, a set that is not finished, or an index or manifest of
            another program, which would be replaced.
    """
    root = Path(root)
    tars = sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        raise ShardError(f"{root} holds no .tar: give the folder that the shards lie in")
    before = _read_previous_manifest(root)
    for path in tars:
        if (place := path.with_suffix(".idx")).exists() and not is_project_index(place):
            raise _foreign_file_error(place)
    rows = [index_shard(path) for path in tars]
    name = name or before.get("name") or root.resolve().name
    return write_manifest(root, name=name, shards=rows, meta={**before.get("meta", {}), **(meta or {})})


def _read_previous_manifest(root: Path) -> dict[str, Any]:
    """Return what a manifest that will be replaced has said; ShardError if the set is still being written."""
    path = root / "manifest.json"
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except FileNotFoundError:
        if (root / _SETTINGS_FILE).exists():
            raise ShardError(_unfinished_message(root)) from None
        return {}
    except ValueError:
        if not data.startswith(b'{\n "digest"'):  # as a damaged one of ours does
            raise _foreign_file_error(path) from None
        return {}
    if not isinstance(content, dict) or not content.keys() >= {"version", "digest", "shards"}:
        raise _foreign_file_error(path)
    return content


def _foreign_file_error(path: Path) -> ShardError:
    return ShardError(
        f"{path} is not of depth-anything and would be replaced: move it, or link the tars into another folder"
    )


def verify_set(
    root: str | Path,
    *,
    decode: bool = False,
    images: str | Path | None = None,
    workers: int = 1,
    tick: Callable[[int], object] | None = None,
) -> list[str]:
    """Read a whole set and say what is wrong with it.

    Names, sizes, hashes, checksums, indexes, keys that come twice, and counts: what was listed is what is there
    and what was skipped. Of a set behind an address: the indexes, and of each tar its size and its last record;
    all records with `decode`.

    Args:
        root: folder, or URL prefix.
        decode: decode every record, too, and hold its label's size against its image's.
        images: of a label set the set it was made from: every label must have its image there, and with
            `decode` be of a size that this image is resized to.
        workers: threads.
        tick: is called with the records of a shard when it is done.

    Returns:
        A sentence a problem; none for a sound set.

    Raises:
        Outage: an address does not answer for now.
    """
    try:
        made = open_set(root, check=False)
        joined = None if images is None else JoinedRecords(open_set(images), made)
    except ShardError as error:
        return [str(error)]
    far = is_remote(made.root)
    problems = [*([] if far else _find_missing_shards(made)), *_check_listed_count(made)]
    known = {f"{shard.name}{ending}" for shard in made.shards for ending in (".tar", ".idx")}
    for entry in [] if far else sorted(os.listdir(made.root)):
        if entry.endswith((".tar", ".idx")) and entry not in known and not entry.startswith("."):
            problems.append(f"{made.root}/{entry} is not in the manifest")
    present = [shard for shard in made.shards if far or Path(made.url(shard.name)).is_file()]
    verify_one = _verify_remote_shard if far else _verify_local_shard

    def verify(shard: ShardInfo) -> tuple[list[str], np.ndarray]:
        found: list[str] = []
        try:
            keys = verify_one(made, shard, found, decode=decode, joined=joined)
        except (ShardError, OSError) as error:
            if far and not isinstance(error, ShardError):
                raise
            found.append(
                str(error)
                if isinstance(error, ShardError | StorageUnavailable)
                else f"{made.url(shard.name)}: {error}"
            )
            keys = np.empty(0, np.uint64)
        if tick is not None:
            tick(shard.records)
        return found, keys

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(verify, present))
    problems += chain.from_iterable(found for found, _ in results)
    problems = [redact_secrets(problem) for problem in problems]
    return problems + _find_repeated_keys(
        made, [shard.name for shard in present], [keys for _, keys in results]
    )


def _verify_local_shard(
    made: ShardSet,
    shard: ShardInfo,
    problems: list[str],
    *,
    decode: bool,
    joined: JoinedRecords | None,
) -> np.ndarray:
    """Verify a shard; return a 64-bit hash of each key."""
    path = Path(made.url(shard.name))
    text, place = build_index_text(path), path.with_suffix(".idx")
    if not place.is_file():
        problems.append(f"{place} is missing: type  depth-anything shard index {made.root}")
    elif not index_matches(place.read_text(errors="replace"), text):
        problems.append(f"{place} is not the index of its tar: type  depth-anything shard index {made.root}")
    table = parse_index(text, where=path)
    if (table.hash, table.records) != (shard.hash, shard.records):
        problems.append(f"{path} is not the tar that the manifest means: its hash differs")
    keys, labels, reader = table.keys(), made.meta.get("kind") == "labels", ShardReader()
    if labels and not _sidecar_matches(path, shard):
        problems.append(f"{path.with_suffix('.json')} is missing, or is not that of its tar")
    mine = None if joined is None else JoinedRecords(joined.images, made)  # a thread needs its own reader
    for index, key in enumerate(keys if decode or joined else ()):
        try:
            if mine is not None:
                _check_joined_size(*mine.read(f"{made.name}/{shard.name}", index), decode=decode)
                continue
            fields = reader.read(path, index)[1]
            if not labels:
                _check_label_size(decode_record(key, fields))
            elif not decode_labels(fields):
                raise ValueError(f"no label among the fields {sorted(fields)}")
        except (ValueError, MemoryError) as error:
            reason = error.reason if isinstance(error, BadRecord) else str(error) or _OUT_OF_MEMORY
            problems.append(f"{path}[{index}] {key}: {reason}")
    return _hash_keys(keys)


def _verify_remote_shard(
    made: ShardSet,
    shard: ShardInfo,
    problems: list[str],
    *,
    decode: bool,
    joined: JoinedRecords | None,
) -> np.ndarray:
    """Verify a shard behind an address; return a 64-bit hash of each key."""
    keys, labels = ShardReader().keys(made.url(shard.name)), made.meta.get("kind") == "labels"
    if len(keys) != shard.records:
        problems.append(f"{made.url(shard.name)} has {len(keys)} records in place of {shard.records}")
    records = Records(made) if joined is None else JoinedRecords(joined.images, made)
    for index in range(len(keys)) if decode or joined else (len(keys) - 1,):  # the last tells the tar's size
        try:
            key, fields = records.read(f"{made.name}/{shard.name}", index)
            if joined is not None:
                _check_joined_size(key, fields, decode=decode)
            elif decode and not labels:
                _check_label_size(decode_record(key, fields))
            elif decode and not decode_labels(fields):
                raise ValueError(f"no label among the fields {sorted(fields)}")
        except (ValueError, MemoryError) as error:
            reason = error.reason if isinstance(error, BadRecord) else str(error) or _OUT_OF_MEMORY
            problems.append(f"{made.url(shard.name)}[{index}] {keys[index]}: {reason}")
    return _hash_keys(keys)


def _hash_keys(keys: Sequence[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _check_label_size(frame: Frame) -> None:
    """Hold sizes against each other: label and image are of one size, or the json states the label's."""
    label = frame.depth if frame.disparity is None else frame.disparity
    size = frame.image.shape[:2]
    if label is not None and label.shape != size and list(label.shape) != frame.meta.get("label_size"):
        raise ValueError(
            f"its label has {label.shape[0]} x {label.shape[1]} pixels and its image {size[0]} x {size[1]}"
        )


def _check_joined_size(key: str, fields: Mapping[str, bytes], *, decode: bool) -> None:
    """Hold a label against its image: of one size, or of one that the image is resized to."""
    if not decode:
        return
    frame = decode_record(key, fields)
    label = frame.depth if frame.disparity is None else frame.disparity
    if label is None:
        raise ValueError(f"no label among the fields {sorted(fields)}")
    (height, width), size = frame.image.shape[:2], label.shape
    if not any(resize_shape(height, width, min(size), multiple) == size for multiple in _PATCH_SIZES):
        raise ValueError(
            f"its label has {size[0]} x {size[1]} pixels, to which no image of {height} x {width} is resized"
        )


def _check_listed_count(made: ShardSet) -> list[str]:
    """Hold the records of a set that was listed against its listing: nothing is lost between the two."""
    try:
        listed, skipped = made.meta["settings"]["count"], made.meta.get("skipped", {"count": 0})["count"]
    except (KeyError, TypeError):
        return []
    if made.records + skipped == listed:
        return []
    return [
        f"{made.root}: {listed} were listed, but {made.records} records and {skipped} skipped make not so many"
    ]


def _sidecar_matches(tar: Path, shard: ShardInfo) -> bool:
    try:
        content = json.loads(tar.with_suffix(".json").read_bytes())
        found = ShardInfo(content["name"], content["records"], content["bytes"], content["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == shard


def _find_repeated_keys(made: ShardSet, names: Sequence[str], hashes: Sequence[np.ndarray]) -> list[str]:
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
        shared = set(_read_keys(made, names[one])) & set(_read_keys(made, names[other]))
        problems += [f'the key "{key}" is in {names[one]} and in {names[other]}' for key in sorted(shared)]
    return problems


def _read_keys(made: ShardSet, shard: str) -> list[str]:
    url = made.url(shard)
    if is_remote(url):
        return ShardReader().keys(url)
    return parse_index(build_index_text(Path(url)), where=url).keys()


def _read_manifest(root: str) -> bytes:
    if is_remote(root):
        return remote.fetch(join_address(root, "manifest.json"))
    mode = remote.retry(root, lambda: _file_mode(root))
    if stat.S_ISREG(mode):
        raise ShardError(f"{root} is not a folder: give the one that the shards and manifest.json lie in")
    if not stat.S_ISDIR(mode):
        raise ShardError(f"{root} is not a folder: write shards there with  depth-anything shard")
    try:
        return remote.retry(root, Path(root, "manifest.json").read_bytes)
    except FileNotFoundError:
        if os.path.exists(os.path.join(root, _SETTINGS_FILE)):
            raise ShardError(_unfinished_message(root)) from None
        raise ShardError(
            f"{root} has no manifest.json: finish writing the set, "
            f"or, if its tars are whole, type  depth-anything shard index {root}"
        ) from None


def _file_mode(path: str) -> int:
    """What a path is, 0 if it is nothing; OSError if its disk fails."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno not in PATH_ERRNOS:
            raise
        return 0


def _unfinished_message(root: str | Path) -> str:
    return (
        f"{root} is not finished: go on writing it with the command that it was begun with, "
        "or bring its parts together with  depth-anything merge OUT FOLDER FOLDER …"
    )


def _find_missing_shards(made: ShardSet) -> list[str]:
    # One listing says which are there; their sizes are asked for side by side, as a network disk takes its time
    # over each and a set has up to 60,000.
    listed = set(os.listdir(made.root))
    there = [shard for shard in made.shards if f"{shard.name}.tar" in listed]
    parts = [there[i::_THREADS] for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(
            chain.from_iterable(pool.map(lambda part: [(s.name, _tar_size(made, s)) for s in part], parts))
        )
    problems = []
    for shard in made.shards:
        size = sizes.get(shard.name)
        if size is None:
            problems.append(f"{made.url(shard.name)} is missing")
        elif size != shard.bytes:
            problems.append(f"{made.url(shard.name)} has {size} bytes in place of {shard.bytes}")
    return problems


def _tar_size(made: ShardSet, shard: ShardInfo) -> int:
    return os.stat(made.url(shard.name)).st_size
