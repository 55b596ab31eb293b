"""Write a set of shards from any source. Writing can be interrupted, continued, and divided among machines.

A set is written to a folder or into an object store. There each shard is written to a local temporary folder first and
uploaded: notes, tar and last the index, so that a shard with an index is complete.

Besides the shards, the folder of a set holds settings.json (what determines its bytes), about.json (facts for the
manifest), the file list (file_list.py), and for each shard NAME.skipped.json if records were rejected and
NAME.pixels.json if it has labels. When every shard exists, manifest.json is written.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from depth_anything.classes import table_to_list
from depth_anything.data.address import SET_NAME_RULE, file_name, is_set_name, join_address, redact_secrets
from depth_anything.data.shards import open_set, read_stored_shard, write_manifest
from depth_anything.data.store import FolderStore, Store, open_store
from depth_anything.data.tars import ShardError, ShardSet
from depth_anything.disk import remove_stale
from depth_anything.errors import UserError
from depth_anything.ingest.file_list import FILE_LIST, FILE_LIST_INFO, FileList, write_file_list
from depth_anything.ingest.pool import run_jobs
from depth_anything.ingest.shard_job import NOTE_SUFFIXES, ShardJob, format_json, run_job, shard_name
from depth_anything.ingest.source import DatasetInfo, RawSample
from depth_anything.licenses import check_license
from depth_anything.progress import ProgressLine

SETTINGS_FILE, ABOUT_FILE = "settings.json", "about.json"
SIDECAR_SUFFIXES = (".idx", *NOTE_SUFFIXES)
SKY_POLICIES = ("far", "invalid")

_SET_FILES = (ABOUT_FILE, FILE_LIST, FILE_LIST_INFO, "manifest.json")
_MAX_NAMED_FILES = 100  # rejected files that the manifest names; NAME.skipped.json names all
_MAX_REASONS = 50  # reasons that the manifest counts separately
_READ_THREADS = 16


class Source(Protocol):
    """A reader of raw data: a module of `ingest.sets`, or an object that can be pickled.

    An object may also have `settings`, a JSON mapping that determines the bytes of the set in addition to the options.
    """

    @property
    def INFO(self) -> DatasetInfo:
        """Facts about the dataset."""

    @property
    def find(self) -> Callable[..., Iterable[str]]:
        """Returns a line per record of a raw folder; takes the options of the set as keywords."""

    @property
    def read(self) -> Callable[[Path, str], RawSample]:
        """Reads the record of a line. Raises ValueError with the reason if the record must be rejected."""


def write_source(
    source: Source | ModuleType,
    raw: str | Path,
    root: str | Path,
    *,
    name: str | None = None,
    per_shard: int = 1000,
    part: tuple[int, int] = (1, 1),
    workers: int = 0,
    short_side: int | None = None,
    sky: str | None = None,
    leave_out: Sequence[str] | None = None,
    licence: str | None = None,
    **options: Any,
) -> ShardSet | None:
    """Write a set, or a part of it. An interrupted set is continued; a finished one is returned as it is.

    Shard k holds the lines [k * per_shard, (k + 1) * per_shard) of the file list, without rejected records. So each
    shard can be written alone, and its bytes do not depend on who writes it.

    Args:
        source: Reads the raw data.
        raw: Folder or file of the raw data.
        root: Folder of the set, created if needed, or an address as s3://bucket/set; parts may share it.
        name: Name of the set, required with parts. None: the name of the folder.
        per_shard: Lines per shard.
        part: (k, n) writes the k-th of n parts, starting at 1.
        workers: Number of worker processes; 0 writes in this process.
        short_side: See `encode_sample`.
        sky: "far" or "invalid", the default treatment of sky in training. None: the source's.
        leave_out: Glob patterns of names that are left out. None: the source's.
        licence: SPDX identifier. None: the source's. This and `sky` may be changed by a later call.
        options: Options of the source's `find`. For a Path, the content of the file counts as the setting.

    Returns:
        The set, or None while shards of other parts are missing.

    Raises:
        ValueError: An argument is invalid, the folder holds another set, `raw` holds no record, or all are rejected.
    """
    raw, store, info = Path(raw), open_store(root), source.INFO
    # The name is in every key, and the folders of parts may have different names.
    if name is None and part[1] > 1:
        raise UserError("parts of a set need the same name, wherever they are written", "add --name")
    name = name or default_set_name(store)
    _validate_arguments(name, per_shard=per_shard, part=part, workers=workers, sky=sky, short_side=short_side)
    leave_out = list(info.leave_out if leave_out is None else leave_out)
    settings = {
        "source": info.name,
        **getattr(source, "settings", {}),
        **{key: _option_value(value) for key, value in options.items()},
        **({"leave_out": leave_out} if leave_out else {}),
        **({"short_side": short_side} if short_side is not None else {}),
        "name": name,
        "per_shard": per_shard,
    }
    check_same_settings(store, settings)
    changes = {"licence": check_license(licence)} if licence else {}
    changes |= {"sky_policy": sky} if sky else {}
    if store.exists("manifest.json") and not _has_missing_shards(store):
        if store.exists(ABOUT_FILE):
            _write_about(store, info, changes)
        return _update_manifest(open_set(store.root), changes)
    with store.staging() as folder:
        if not store.exists(FILE_LIST_INFO):
            found = _require_first_line(source.find(raw, **options), raw, info)
            claim_store(store, settings)
            write_file_list(folder, found, leave_out=leave_out)
        claim_store(store, settings)
        _write_about(store, info, changes)
        file_list = _share_file_list(store, folder, per_shard=per_shard)
        remove_stale(folder)
        missing = list_missing_shards(store, file_list, among=file_list.part(*part))
        jobs = (
            ShardJob(source, raw, store, name, short_side, k, file_list.numbers(k), file_list.lines(k))
            for k in missing
        )
        total = sum(len(file_list.numbers(k)) for k in missing)
        _run_all(jobs, store.root, total=total, workers=workers if len(missing) > 1 else 0)
        return finish_set(store, file_list)


def _share_file_list(store: Store, folder: Path, *, per_shard: int) -> FileList:
    """Publish the file list that this process has just written to `folder`, or fetch it, and open it."""
    for file in (FILE_LIST, FILE_LIST_INFO):
        if store.is_remote and (folder / file).exists():
            store.publish(folder / file)
        else:
            store.fetch(file, folder)
    return FileList(folder, per_shard=per_shard)


def default_set_name(store: Store) -> str:
    """Return the name of a set that is given none: that of its folder, or the last part of its address."""
    return store.path.resolve().name if isinstance(store, FolderStore) else file_name(store.root)


def _run_all(jobs: Iterator[ShardJob], root: str, *, total: int, workers: int) -> None:
    with ProgressLine(f"writing {redact_secrets(root)}", total=total) as progress:
        if workers:
            run_jobs(jobs, workers=workers, tick=progress.update)
        else:
            for job in jobs:
                run_job(job, progress.update)


def finish_set(store: Store, file_list: FileList) -> ShardSet | None:
    """Write the manifest of a set if all its shards exist, else return None.

    Raises:
        ShardError: Every record was rejected.
    """
    if list_missing_shards(store, file_list):
        return None
    settings, about = (json.loads(store.read(file)) for file in (SETTINGS_FILE, ABOUT_FILE))
    names = [shard_name(shard) for shard in range(file_list.shards)]
    existing = store.names()
    with_tar, with_rejected, with_labels = (
        [name for name in names if f"{name}{suffix}" in existing] for suffix in (".tar", *NOTE_SUFFIXES)
    )
    with ThreadPoolExecutor(_READ_THREADS) as pool:  # a network disk has a high latency per file
        shards = list(pool.map(lambda name: read_stored_shard(store, name), with_tar))
        rejected = RejectedFiles(
            pool.map(lambda name: _read_json(store, f"{name}{NOTE_SUFFIXES[0]}"), with_rejected)
        )
        label_summary = _summarize_labels(
            pool.map(lambda name: _read_json(store, f"{name}{NOTE_SUFFIXES[1]}"), with_labels)
        )
    if not shards:
        why = "; ".join(f"{file}: {reason}" for file, reason in rejected.named[:3])
        raise ShardError(
            f"{store.root}: all {file_list.count} records were rejected ({why})",
            f"correct this, then start again with  {store.remove_command}",
        )
    if label_summary.get("quantity") == "classes":
        about.pop("sky_policy", None)  # of depth
    elif "quantity" not in label_summary:  # images without labels
        del about["sky_policy"]
        about.pop("sharp", None)
    meta = {**about, "settings": {**settings, "count": file_list.count}, "listing": file_list.digest}
    meta |= {**label_summary, **rejected.manifest_summary()}
    if file_list.left_out:
        meta["left_out"] = file_list.left_out
    return write_manifest(store.root, name=settings["name"], shards=shards, meta=meta)


def list_missing_shards(store: Store, file_list: FileList, *, among: range | None = None) -> list[int]:
    """Return the numbers of the shards that are neither written nor fully rejected."""
    existing = store.names()
    shards = range(file_list.shards) if among is None else among
    return [
        shard
        for shard in shards
        if not is_shard_complete(store, shard_name(shard), existing)
        and not _is_fully_rejected(store, shard, len(file_list.numbers(shard)), existing)
    ]


def is_shard_complete(store: Store, name: str, existing: set[str]) -> bool:
    """Return whether a shard is written: in a folder if it has a tar, in an object store if it also has an index."""
    return f"{name}.tar" in existing and (not store.is_remote or f"{name}.idx" in existing)


def _is_fully_rejected(store: Store, shard: int, count: int, existing: set[str]) -> bool:
    notes = f"{shard_name(shard)}.skipped.json"
    return notes in existing and len(_read_json(store, notes)) == count


def _has_missing_shards(store: Store) -> bool:
    """Return whether tars were removed from a finished set, perhaps because they were damaged."""
    existing = store.names()
    return not all(
        is_shard_complete(store, each.name, existing) for each in open_set(store.root, check=False).shards
    )


def check_same_settings(store: Store, settings: Mapping[str, Any]) -> None:
    """Check that a folder is free, or holds a set with these settings.

    Raises:
        ShardError: It holds another set, or files of another program that would be replaced.
    """
    if not store.exists(SETTINGS_FILE):
        check_unclaimed(store)
        return
    differences = describe_differences(_read_settings(store), json.loads(json.dumps(settings)))
    if differences:
        raise ShardError(
            f"{store.root} holds a set written with other settings ({differences})",
            f"name another folder, or remove it with  {store.remove_command}",
        )


def describe_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the keys with different values, as "KEY FOUND in place of EXPECTED"; "" if there are none."""
    return ", ".join(
        f"{key} {found.get(key)} in place of {expected.get(key)}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    )


def check_unclaimed(store: Store) -> None:
    """Check that a folder without settings.json, which is always written first, holds no files of a set.

    Raises:
        ShardError: It does; the file is named.
    """
    foreign = [
        name
        for name in sorted(store.names())
        if name in _SET_FILES or name.endswith((".tar", *SIDECAR_SUFFIXES))
    ]
    if not foreign or store.exists(SETTINGS_FILE):  # another process has claimed the folder meanwhile
        return
    if any(name == "manifest.json" or name.endswith(".tar") for name in foreign):
        raise ShardError(f"{store.root} holds shards that this command did not write", "name another folder")
    raise _foreign_file_error(join_address(store.root, foreign[0]))


def _foreign_file_error(path: str) -> ShardError:
    return ShardError(
        f"{path} was not written by this command and would be replaced", "name another folder, or move it"
    )


def _read_settings(store: Store) -> dict[str, Any]:
    """Read settings.json. Raises ShardError if it belongs to another program."""
    try:
        content = json.loads(store.read(SETTINGS_FILE))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content.keys() >= {"source", "name", "per_shard"}:
        raise _foreign_file_error(join_address(store.root, SETTINGS_FILE))
    return content


def claim_store(store: Store, settings: Mapping[str, Any]) -> None:
    """Write settings.json. Raises ShardError if another process has just claimed the folder for another set."""
    if isinstance(store, FolderStore):
        store.path.mkdir(parents=True, exist_ok=True)
    if not store.write_new(SETTINGS_FILE, json.dumps(settings, indent=1, sort_keys=True).encode()):
        check_same_settings(store, settings)


def _write_about(store: Store, info: DatasetInfo, changes: Mapping[str, str]) -> None:
    """Write about.json, or apply the user's changes to it."""
    about = json.loads(store.read(ABOUT_FILE)) if store.exists(ABOUT_FILE) else None
    new = about or {
        "licence": info.licence or None,
        "source": {"title": info.title, "get": info.get},
        "sky_policy": info.sky,
        **({"sharp": True} if info.sharp else {}),
        **({"classes": table_to_list(info.classes)} if info.classes else {}),
    }
    new = {**new, **changes}
    if new != about:
        store.write(ABOUT_FILE, format_json(new))


def _update_manifest(shard_set: ShardSet, changes: Mapping[str, str]) -> ShardSet:
    """Apply the user's changes to the manifest of a finished set; no shard changes."""
    labeled = "quantity" in shard_set.meta
    new = {key: value for key, value in changes.items() if labeled or key != "sky_policy"}
    if all(shard_set.meta.get(key) == value for key, value in new.items()):
        return shard_set
    return write_manifest(
        shard_set.root, name=shard_set.name, shards=shard_set.shards, meta={**shard_set.meta, **new}
    )


class RejectedFiles:
    """Rejected records, counted by reason.

    Attributes:
        named: Name and reason of the first hundred.
    """

    def __init__(self, notes: Iterable[Iterable[Sequence[str]]]) -> None:
        """Count the rows of each NAME.skipped.json."""
        self._reasons: Counter[str] = Counter()
        self.named: list[list[str]] = []
        for name, reason in chain.from_iterable(notes):
            self._reasons[reason] += 1
            if len(self.named) < _MAX_NAMED_FILES:
                self.named.append([name, reason])

    def manifest_summary(self) -> dict[str, Any]:
        """Return the entry of the manifest; empty if nothing was rejected."""
        if not self._reasons:
            return {}
        reasons = dict(self._reasons.most_common(_MAX_REASONS))
        count = self._reasons.total()
        if len(self._reasons) > _MAX_REASONS:
            reasons["other"] = count - sum(reasons.values())
        return {"skipped": {"count": count, "reasons": reasons, "files": self.named}}


def _summarize_labels(labels: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the NAME.pixels.json files: quantity, unit, value of the sky, pixels by kind."""
    kinds: Counter[tuple[str, str | None]] = Counter()
    pixels: Counter[str] = Counter()
    for label in labels:
        kinds.update({(quantity, unit): count for quantity, unit, count in label["labels"]})
        pixels.update(label["pixels"])
    if not kinds:
        return {}
    quantities, units = ({kind[i] for kind in kinds} for i in (0, 1))
    meta: dict[str, Any] = {"pixels": dict(sorted(pixels.items()))}
    if len(quantities) == 1:
        (meta["quantity"],) = quantities
        if meta["quantity"] != "classes":
            meta["sky"] = "inf" if meta["quantity"] == "depth" else "zero"
    if len(units) == 1 and None not in units:
        (meta["unit"],) = units
    return meta


def _validate_arguments(
    name: str, *, per_shard: int, part: tuple[int, int], workers: int, sky: str | None, short_side: int | None
) -> None:
    if not is_set_name(name):
        raise ValueError(f'"{name}" is not a valid name of a set: {SET_NAME_RULE}, or pass another --name')
    if per_shard < 1 or workers < 0:
        raise ValueError(f"per_shard={per_shard} workers={workers}: must be at least 1 and 0")
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]} is invalid: of 4 parts the first is 1/4 and the last 4/4")
    if sky not in (None, *SKY_POLICIES):
        raise ValueError(f'sky="{sky}" is unknown: use {" or ".join(SKY_POLICIES)}')
    if short_side is not None and short_side < 1:
        raise ValueError(f"short_side={short_side} must be positive; training uses 518")


def _require_first_line(found: Iterable[str], raw: Path, info: DatasetInfo) -> Iterator[str]:
    """Look for the first line before anything is written, so that a wrong folder is reported at once."""
    lines = iter(found)
    try:
        first = next(lines)
    except StopIteration:
        raise ValueError(f"{raw} holds nothing of {info.title}: looked for {info.layout}") from None

    def prepend() -> Generator[str, None, Any]:
        yield first
        return (yield from lines)

    return prepend()


def _option_value(value: Any) -> Any:
    """Return an option for settings.json; a file counts by its hash, because its path differs between machines."""
    if not isinstance(value, Path):
        return value
    try:
        data = value.read_bytes()
    except OSError as error:
        raise ValueError(f"{value} cannot be read: {error.strerror}") from error
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _read_json(store: Store, name: str) -> Any:
    try:
        return json.loads(store.read(name))
    except ValueError as error:
        path = join_address(store.root, name)
        raise ShardError(f"{path} is damaged ({error})", "remove it and the tar of the same name") from error
