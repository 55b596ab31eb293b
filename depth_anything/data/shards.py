"""A set of shards: a folder or URL prefix of tars with manifest.json, which lists them and records what made them.

The manifest is written last, so a set with a manifest is complete. Its digest, over names, records, sizes and hashes of
the shards, identifies the data of a run.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.data import remote
from depth_anything.data.address import (
    SET_NAME_RULE,
    is_remote,
    is_set_name,
    join_address,
    redact_secrets,
)
from depth_anything.data.reader import JoinedRecords, ShardReader
from depth_anything.data.retry import PermanentError, retry
from depth_anything.data.sample import Frame, decode_labels, decode_record
from depth_anything.data.store import FolderStore, Store, open_store
from depth_anything.data.tar_index import index_matches, is_project_index, parse_index_header
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
    read_shard_info,
)
from depth_anything.disk import remove_stale
from depth_anything.preprocess import resize_shape

_VERSION = 1
_OUT_OF_MEMORY = "it needs more memory than there is"
_THREADS = 16
_SETTINGS_FILE = "settings.json"  # in the folder of a set from the start of writing
_PATCH_SIZES = (1, 8, 14, 16, 32)  # sides of resized images are multiples of one of these
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def build_set(
    root: str | Path, *, name: str, shards: Iterable[ShardInfo], meta: Mapping[str, Any]
) -> ShardSet:
    """Build a set from shards, sorted by name.

    Raises:
        ShardError: A name is invalid, or two shards have the same name.
    """
    rows = sorted(shards, key=lambda shard: shard.name)
    if not is_set_name(name):
        raise ShardError(f'"{name}" is not a valid name of a set: {SET_NAME_RULE}')
    for row in rows:
        if not _SHARD_NAME.fullmatch(row.name):
            raise ShardError(
                f'{root}: "{row.name}" is not a valid name of a shard: use A-Z a-z 0-9 _ - and dots between'
            )
    for before, row in pairwise(rows):
        if before.name == row.name:
            raise ShardError(f"{root}: two shards have the name {row.name}")
    text = json.dumps([vars(row) for row in rows], sort_keys=True, separators=(",", ":"))
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return ShardSet(name, str(root), tuple(rows), dict(meta), digest)


def write_manifest(
    root: str | Path, *, name: str, shards: Iterable[ShardInfo], meta: Mapping[str, Any]
) -> ShardSet:
    """Write manifest.json, which completes a set: atomically, and with the same bytes for the same set.

    Args:
        root: Folder of the tars.
        name: Name of the set: A-Z a-z 0-9 _ -.
        shards: In any order.
        meta: What made the set, as JSON: tool, version, settings, licence, unit, encoding of the sky.

    Raises:
        ShardError: A name is invalid, or two shards have the same name.
    """
    shard_set = build_set(root, name=name, shards=shards, meta=meta)
    head = {
        "version": _VERSION,
        "name": name,
        "digest": shard_set.digest,
        "records": shard_set.records,
        "meta": shard_set.meta,
    }
    text = json.dumps(head, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    rows = ",\n".join(json.dumps(vars(shard)) for shard in shard_set.shards)
    text = f'{text.removesuffix("}").rstrip()},\n "shards": [\n{rows}\n]}}\n'
    store = open_store(root)
    if isinstance(store, FolderStore):
        remove_stale(store.path)
    store.write("manifest.json", text.encode())
    return shard_set


def read_stored_shard(store: Store, name: str) -> ShardInfo:
    """Read the info of a shard from its index; in a folder the index is built if there is none.

    Raises:
        ShardError: Tar or index is missing, damaged, or of another shard.
    """
    if isinstance(store, FolderStore):
        return read_shard_info(store.path / f"{name}.tar")
    index, size = join_address(store.root, f"{name}.idx"), store.size(f"{name}.tar")
    try:
        tar_bytes, digest, records, _ = parse_index_header(store.read(f"{name}.idx").decode())
    except (FileNotFoundError, ValueError) as error:
        raise ShardError(f"{index} is missing or damaged", "delete it, and write the shard again") from error
    if size != tar_bytes:
        raise ShardError(
            f"{index} is the index of {tar_bytes} bytes, and its tar has {size or 0}",
            "delete both, and write the shard again",
        )
    return ShardInfo(name, records, tar_bytes, digest)


def open_set(root: str | Path, *, name: str | None = None, check: bool = True) -> ShardSet:
    """Open a complete set.

    Args:
        root: Folder, or URL prefix of "/manifest.json".
        name: Another name for the set than that of its manifest.
        check: Check that local shards exist and have the size of the manifest.

    Raises:
        ShardError: There is no such folder, no manifest or no records, or a shard is missing or has another size.
        StorageUnavailable: The server does not answer, or the disk fails, for now.
    """
    root = str(root).removeprefix("file://").rstrip("/")
    try:
        shard_set = _parse_manifest(_read_manifest(root), root, name)
    except ShardError as error:
        if not is_remote(root) or isinstance(error, PermanentError):
            raise
        shard_set = _parse_manifest(_read_manifest(root), root, name)  # it may have been damaged on the way
    if not shard_set.records:
        raise ShardError(f"{root} has no records: write shards there with  depth-anything shard")
    if check and not is_remote(root):
        for problem in retry(root, lambda: _find_missing_shards(shard_set)):
            raise ShardError(
                f"{problem}: copy it again; for a list of all problems type  depth-anything verify {root}"
            )
    return shard_set


def _parse_manifest(data: bytes, root: str, name: str | None) -> ShardSet:
    path = join_address(root, "manifest.json")
    try:
        content = json.loads(data)
        rows = [
            ShardInfo(str(r["name"]), int(r["records"]), int(r["bytes"]), str(r["hash"]))
            for r in content["shards"]
        ]
        shard_set = build_set(root, name=name or content["name"], shards=rows, meta=content["meta"])
        intact = shard_set.digest == content["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged ({error!r}): copy it again") from error
    if not intact:
        raise ShardError(f"{path} is damaged (its digest differs): copy it again")
    return shard_set


def index_set(
    root: str | Path, *, name: str | None = None, meta: Mapping[str, Any] | None = None
) -> ShardSet:
    """Index the tars of a folder, from any program, and write their manifest.

    Metadata of an existing manifest is kept.

    Raises:
        ShardError: There are no tars, one cannot be indexed, the set is still being written, or an index or manifest of
            another program would be replaced.
    """
    if is_remote(str(root)):
        raise ShardError(f"{root} is not a folder: index the tars in a folder, and copy it there")
    root = Path(root)
    tars = sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        raise ShardError(f"{root} has no .tar: type the folder of the shards")
    before = _read_previous_manifest(root)
    for path in tars:
        if (index := path.with_suffix(".idx")).exists() and not is_project_index(index):
            raise _foreign_file_error(index)
    rows = [index_shard(path) for path in tars]
    name = name or before.get("name") or root.resolve().name
    return write_manifest(root, name=name, shards=rows, meta={**before.get("meta", {}), **(meta or {})})


def _read_previous_manifest(root: Path) -> dict[str, Any]:
    """Return the content of a manifest that will be replaced, {} if there is none or it is damaged.

    Raises:
        ShardError: The set is still being written, or the manifest is of another program.
    """
    path = root / "manifest.json"
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except FileNotFoundError:
        if (root / _SETTINGS_FILE).exists():
            raise ShardError(_unfinished_message(root)) from None
        return {}
    except ValueError:
        if not data.startswith(b'{\n "digest"'):  # the start of every manifest of this project
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
    """Read a whole set and list what is wrong with it.

    Checks names, sizes, hashes, checksums, indexes, duplicate keys, and that listed files = records + skipped files.
    For a remote set: the indexes, and the size and last record of each tar; with `decode` all records.

    Args:
        root: Folder, or URL prefix.
        decode: Also decode every record, and compare the size of its label with that of its image.
        images: For a label set, the set of its images: every label must have its image there, and with `decode` a size
            to which that image can be resized.
        workers: Threads.
        tick: Called with the number of records of each shard when it is done.

    Returns:
        One sentence per problem.

    Raises:
        StorageUnavailable: A server does not answer for now.
    """
    try:
        shard_set = open_set(root, check=False)
        joined = None if images is None else JoinedRecords(open_set(images), shard_set)
    except ShardError as error:
        return [str(error)]
    far = is_remote(shard_set.root)
    problems = [*([] if far else _find_missing_shards(shard_set)), *_check_listed_count(shard_set)]
    known = {f"{shard.name}{ending}" for shard in shard_set.shards for ending in (".tar", ".idx")}
    for entry in [] if far else sorted(os.listdir(shard_set.root)):
        if entry.endswith((".tar", ".idx")) and entry not in known and not entry.startswith("."):
            problems.append(f"{shard_set.root}/{entry} is not in the manifest")
    present = [shard for shard in shard_set.shards if far or Path(shard_set.url(shard.name)).is_file()]

    def verify(shard: ShardInfo) -> tuple[list[str], np.ndarray]:
        found: list[str] = []
        try:
            keys = _verify_shard(shard_set, shard, found, decode=decode, joined=joined)
        except (ShardError, OSError) as error:
            if far and not isinstance(error, ShardError):
                raise
            named = isinstance(error, ShardError | StorageUnavailable)
            found.append(str(error) if named else f"{shard_set.url(shard.name)}: {error}")
            keys = []
        if tick is not None:
            tick(shard.records)
        return found, _hash_keys(keys)

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(verify, present))
    problems += chain.from_iterable(found for found, _ in results)
    problems = [redact_secrets(problem) for problem in problems]
    return problems + _find_repeated_keys(
        shard_set, [shard.name for shard in present], [hashes for _, hashes in results]
    )


def _verify_shard(
    shard_set: ShardSet,
    shard: ShardInfo,
    problems: list[str],
    *,
    decode: bool,
    joined: JoinedRecords | None,
) -> list[str]:
    """Verify a shard; return its keys."""
    url, labels = shard_set.url(shard.name), shard_set.meta.get("kind") == "labels"
    if is_remote(url):
        keys = ShardReader().keys(url)
        if len(keys) != shard.records:
            problems.append(f"{url} has {len(keys)} records in place of {shard.records}")
        numbers: Iterable[int] = (len(keys) - 1,)  # reading the last one checks the size of the tar
    else:
        keys, numbers = _verify_local_files(shard_set, shard, problems, labels=labels), ()
    # Each thread needs readers of its own. The hash of a local tar has been compared already.
    reader, pairs = ShardReader(), None if joined is None else JoinedRecords(joined.images, shard_set)
    for index in range(len(keys)) if decode or joined else numbers:
        try:
            if pairs is None:
                key, fields = reader.read(url, index, hash=shard.hash if is_remote(url) else None)
            else:
                key, fields = pairs.read(f"{shard_set.name}/{shard.name}", index)
            if decode:
                _check_decoded(key, fields, labels=labels, joined=joined is not None)
        except (ValueError, MemoryError) as error:
            reason = error.reason if isinstance(error, BadRecord) else str(error) or _OUT_OF_MEMORY
            problems.append(f"{url}[{index}] {keys[index]}: {reason}")
    return keys


def _verify_local_files(
    shard_set: ShardSet, shard: ShardInfo, problems: list[str], *, labels: bool
) -> list[str]:
    """Verify a tar, its index and, for labels, its sidecar; return the keys."""
    path = Path(shard_set.url(shard.name))
    text, index = build_index_text(path), path.with_suffix(".idx")
    if not index.is_file():
        problems.append(f"{index} is missing: type  depth-anything shard index {shard_set.root}")
    elif not index_matches(index.read_text(errors="replace"), text):
        problems.append(
            f"{index} is not the index of its tar: type  depth-anything shard index {shard_set.root}"
        )
    table = parse_index(text, where=path)
    if (table.hash, table.records) != (shard.hash, shard.records):
        problems.append(f"{path} is not the tar of the manifest: its hash differs")
    if labels and not _sidecar_matches(path, shard):
        problems.append(f"{path.with_suffix('.json')} is missing, or does not match its tar")
    return table.keys()


def _hash_keys(keys: Sequence[str]) -> np.ndarray:
    """Return a 64-bit hash of each key, because the keys of a large set do not fit into memory."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _check_decoded(key: str, fields: Mapping[str, bytes], *, labels: bool, joined: bool) -> None:
    """Decode a record; ValueError if it has no label where one is needed, or label and image differ in size."""
    from depth_anything.data.label_fields import check_label_fields  # imports torch

    if labels and not joined:  # a label set without its images
        if not decode_labels(fields):
            raise ValueError(f"no label among the fields {sorted(fields)}")
        check_label_fields(fields, None)
        return
    frame = decode_record(key, fields)
    check_label_fields(fields, (frame.image.shape[0], frame.image.shape[1]))
    label = frame.depth if frame.disparity is None else frame.disparity
    if joined:
        if label is None:
            raise ValueError(f"no label among the fields {sorted(fields)}")
        _check_joined_size(frame, label)
    elif label is not None and label.shape != frame.image.shape[:2]:
        if list(label.shape) != frame.meta.get("label_size"):
            raise ValueError(f"its label has {_pixels(label)} pixels and its image {_pixels(frame.image)}")
    if frame.classes is not None and frame.classes.shape != frame.image.shape[:2]:
        raise ValueError(
            f"its classes have {_pixels(frame.classes)} pixels, its image {_pixels(frame.image)}"
        )


def _check_joined_size(frame: Frame, label: np.ndarray) -> None:
    """Check that an image can be resized to the size of its label."""
    (height, width), size = frame.image.shape[:2], label.shape
    if not any(resize_shape(height, width, min(size), patch) == size for patch in _PATCH_SIZES):
        raise ValueError(
            f"its label has {_pixels(label)} pixels, and an image of {_pixels(frame.image)} is never resized to that"
        )


def _pixels(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"


def _check_listed_count(shard_set: ShardSet) -> list[str]:
    """Check that no listed file was lost: listed = records + skipped."""
    try:
        listed = shard_set.meta["settings"]["count"]
        skipped = shard_set.meta.get("skipped", {"count": 0})["count"]
    except (KeyError, TypeError):
        return []
    if shard_set.records + skipped == listed:
        return []
    return [
        f"{shard_set.root}: {listed} files were listed, but there are {shard_set.records} records and {skipped} skipped"
    ]


def _sidecar_matches(tar: Path, shard: ShardInfo) -> bool:
    try:
        content = json.loads(tar.with_suffix(".json").read_bytes())
        found = ShardInfo(content["name"], content["records"], content["bytes"], content["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == shard


def _find_repeated_keys(shard_set: ShardSet, names: Sequence[str], hashes: Sequence[np.ndarray]) -> list[str]:
    if not hashes:
        return []
    owner = np.repeat(np.arange(len(names)), [len(column) for column in hashes])
    column = np.concatenate(hashes)
    order = np.argsort(column, kind="stable")
    twice = np.flatnonzero(column[order][1:] == column[order][:-1])
    pairs = {(int(owner[order[i]]), int(owner[order[i + 1]])) for i in twice}
    problems = []
    for one, other in sorted(pairs):
        shared = set(_read_keys(shard_set, names[one])) & set(_read_keys(shard_set, names[other]))
        problems += [f'the key "{key}" is in {names[one]} and in {names[other]}' for key in sorted(shared)]
    return problems


def _read_keys(shard_set: ShardSet, shard: str) -> list[str]:
    url = shard_set.url(shard)
    if is_remote(url):
        return ShardReader().keys(url)
    return parse_index(build_index_text(Path(url)), where=url).keys()


def _read_manifest(root: str) -> bytes:
    if is_remote(root):
        return remote.fetch(join_address(root, "manifest.json"))
    mode = retry(root, lambda: _file_mode(root))
    if stat.S_ISREG(mode):
        raise ShardError(f"{root} is not a folder: type the folder of the shards and manifest.json")
    if not stat.S_ISDIR(mode):
        raise ShardError(f"{root} is not a folder: write shards there with  depth-anything shard")
    try:
        return retry(root, Path(root, "manifest.json").read_bytes)
    except FileNotFoundError:
        if os.path.exists(os.path.join(root, _SETTINGS_FILE)):
            raise ShardError(_unfinished_message(root)) from None
        raise ShardError(
            f"{root} has no manifest.json: finish writing the set, "
            f"or, if its tars are complete, type  depth-anything shard index {root}"
        ) from None


def _file_mode(path: str) -> int:
    """Return the mode of a path, 0 if it does not exist; OSError if its disk fails."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno not in PATH_ERRNOS:
            raise
        return 0


def _unfinished_message(root: str | Path) -> str:
    return (
        f"{root} is not finished: continue with the command that started it, "
        "or merge its parts with  depth-anything merge OUT FOLDER FOLDER …"
    )


def _find_missing_shards(shard_set: ShardSet) -> list[str]:
    # One listing finds the missing ones. Sizes are read in parallel, because a network disk takes milliseconds for each
    # file and a set has up to 60,000.
    files = set(os.listdir(shard_set.root))
    present = [shard for shard in shard_set.shards if f"{shard.name}.tar" in files]
    parts = [present[i::_THREADS] for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(chain.from_iterable(pool.map(lambda part: _tar_sizes(shard_set, part), parts)))
    problems = []
    for shard in shard_set.shards:
        size = sizes.get(shard.name)
        if size is None:
            problems.append(f"{shard_set.url(shard.name)} is missing")
        elif size != shard.bytes:
            problems.append(f"{shard_set.url(shard.name)} has {size} bytes in place of {shard.bytes}")
    return problems


def _tar_sizes(shard_set: ShardSet, shards: Sequence[ShardInfo]) -> list[tuple[str, int]]:
    return [(shard.name, os.stat(shard_set.url(shard.name)).st_size) for shard in shards]
