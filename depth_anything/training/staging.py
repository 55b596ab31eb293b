"""Copy whole sets to a folder of this machine, as a node's scratch disk, before a training reads them.

Each tar is compared with the hash in its manifest while it is copied, and is renamed to its name when it is complete:
a copy that was interrupted continues with the next tar. One process of a machine copies, the others wait for it.
"""

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from depth_anything.data import remote
from depth_anything.data.address import index_address, is_remote, join_address, redact_secrets
from depth_anything.data.retry import PermanentError, RetryableError, retry, short_reason
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import (
    ShardError,
    ShardInfo,
    ShardSet,
    StorageUnavailable,
    build_index_text,
    parse_index,
)
from depth_anything.disk import atomic_path, atomic_write, remove_stale
from depth_anything.errors import SAME_COMMAND, UserError
from depth_anything.locks import kernel_lock
from depth_anything.progress import ProgressLine
from depth_anything.training.batch_plan import extra_sets
from depth_anything.training.config import RunConfig

T = TypeVar("T")

_THREADS = 8
_CHUNK_BYTES = 1 << 22
_SPARE = 0.01
"""Share of the bytes that must be free in addition: indexes, and what a file system needs itself."""


@dataclass(frozen=True)
class StagedSet:
    """A set and the folder of its copy."""

    source: ShardSet
    root: Path

    def missing(self) -> list[ShardInfo]:
        """List the shards that are not copied yet."""
        return [shard for shard in self.source.shards if not self._has(shard)]

    def _has(self, shard: ShardInfo) -> bool:
        tar = self.root / f"{shard.name}.tar"
        with suppress(FileNotFoundError):
            return tar.stat().st_size == shard.bytes and tar.with_suffix(".idx").is_file()
        return False


def staged_name(shard_set: ShardSet) -> str:
    """Return the name of the folder of a copy; another content of the same set has another name."""
    return f"{shard_set.name}-{shard_set.digest.removeprefix('sha256:')[:16]}"


def stage_sets(folder: Path, sets: Sequence[StagedSet]) -> None:
    """Copy sets to a folder of this machine, unless they are there.

    Args:
        folder: Holds the lock of this machine's processes.
        sets: The sets and the folders of their copies, below `folder`.

    Raises:
        UserError: If the folder cannot be written or has too little space, which is checked before the first byte.
        ShardError: If a tar is not that of its manifest.
        StorageUnavailable: If a set cannot be read for now.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with kernel_lock(folder / ".lock"):
            _stage_sets(folder, sets)
    except StorageUnavailable:
        raise
    except OSError as error:
        raise UserError(
            f"shards cannot be copied to {folder} ({short_reason(error)})",
            "type stage_to=ANOTHER_FOLDER, or leave it out to read them where they are",
        ) from error


def _stage_sets(folder: Path, sets: Sequence[StagedSet]) -> None:
    missing = [(staged, shard) for staged in sets for shard in staged.missing()]
    if missing:
        needed = round(sum(shard.bytes for _, shard in missing) * (1 + _SPARE))
        for staged in sets:
            staged.root.mkdir(parents=True, exist_ok=True)
            remove_stale(staged.root)  # of processes that were killed
        free = shutil.disk_usage(folder).free
        names = ", ".join(dict.fromkeys(staged.source.name for staged, _ in missing))
        if needed > free:
            raise UserError(
                f"{folder} has {free / 1e9:.3f} GB free, and copying {names} needs {needed / 1e9:.3f} GB",
                "type stage_to=ANOTHER_FOLDER, or leave it out to read the shards where they are",
            )
        print(
            f"copying {len(missing)} shards of {names} to {folder}: {needed / 1e9:.3f} GB, "
            f"{free / 1e9:.3f} GB are free",
            file=sys.stderr,
        )
        _copy_shards(folder, missing)
    for staged in sets:
        source = staged.source
        if not (staged.root / "manifest.json").is_file():
            write_manifest(staged.root, name=source.name, shards=source.shards, meta=source.meta)


def _copy_shards(folder: Path, missing: Sequence[tuple[StagedSet, ShardInfo]]) -> None:
    """Copy shards in parallel; an error or a signal stops all copies at once."""
    stop, done_bytes = threading.Event(), 0
    with ProgressLine(f"copying to {folder}", total=len(missing), unit="shard") as progress:
        pool = ThreadPoolExecutor(_THREADS)
        try:
            futures: dict[Future[None], ShardInfo] = {
                pool.submit(_copy_shard, staged, shard, stop): shard for staged, shard in missing
            }
            for future in as_completed(futures):
                future.result()
                done_bytes += futures[future].bytes
                progress.update(values={"copied": f"{done_bytes / 1e9:.3f} GB"})
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another thread failed, or the process received a signal."""


def _copy_shard(staged: StagedSet, shard: ShardInfo, stop: threading.Event) -> None:
    source, target = staged.source.url(shard.name), staged.root / f"{shard.name}.tar"
    with atomic_path(target) as temporary:
        with open(temporary, "wb") as file:
            writer: Any = _Target(file, stop)
            if is_remote(source):
                remote.copy_whole_shard(source, shard, writer)
            else:
                retry(source, lambda: _copy_local(source, shard, writer))
            writer.flush()
        if staged.source.meta.get("kind") == "labels" and not is_remote(source):
            sidecar = Path(source).with_suffix(".json")
            if sidecar.is_file():
                atomic_write(target.with_suffix(".json"), sidecar.read_bytes())
        atomic_write(target.with_suffix(".idx"), _read_index(source, shard, temporary).encode())


def _copy_local(source: str, shard: ShardInfo, target: "_Target") -> None:
    """Copy a tar once."""
    digest, size = sha256(), 0
    target.seek(0)
    with open(source, "rb") as tar:
        while chunk := tar.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += target.write(chunk)
    if (size, f"sha256:{digest.hexdigest()}") != (shard.bytes, shard.hash):
        raise ShardError(
            f"{source} is not the tar of its manifest: its size or hash differs", "copy the set again"
        )


class _Target:
    """The file of a copy. Writing ends when another copy has failed, and its errors are not retried."""

    def __init__(self, file: BinaryIO, stop: threading.Event) -> None:
        self._file, self._stop = file, stop

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise _Stopped
        return self._translated(lambda: self._file.write(data))

    def flush(self) -> None:
        self._translated(self._file.flush)

    def _translated(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except OSError as error:
            raise UserError(
                f"{self._file.name} cannot be written ({short_reason(error)})",
                ["free some space and ", SAME_COMMAND, ", or type stage_to=ANOTHER_FOLDER"],
            ) from error


def _read_index(source: str, shard: ShardInfo, copy: Path) -> str:
    """Return the index of a tar if it has a valid one, else build it from the copy."""
    with suppress(ShardError, OSError, RetryableError):
        address = index_address(source)
        text = (remote.fetch(address) if is_remote(source) else Path(address).read_bytes()).decode()
        table = parse_index(text, where=address)
        if (table.bytes, table.hash, table.records) == (shard.bytes, shard.hash, shard.records):
            return text
    return build_index_text(copy)


@dataclass(frozen=True)
class StagingPlan:
    """Where the sets of a run are copied to.

    Attributes:
        sets: All copies.
        folders: Each root, a folder or URL prefix, and the folder of its copy.
        labels: The folder of the copied label sets; None if no label set is copied.
        unfinished: Label sets without a manifest, with which no copy could be compared: they stay where they are.
    """

    sets: list[StagedSet]
    folders: dict[str, str]
    labels: str | None
    unfinished: list[str]


def plan_staging(folder: Path, roots: Mapping[str, str], labels: str | None) -> StagingPlan:
    """Decide where the sets of a run are copied to.

    Args:
        folder: The folder of the copies.
        roots: Name and root of each set.
        labels: Folder of the label sets, each with the name of its image set, if the run has any.

    Raises:
        ShardError: If a set cannot be used.
    """
    folders, staged = {}, []
    opened: dict[str, ShardSet] = {}
    unfinished = []
    for name, root in roots.items():
        source = open_set(root)
        folders[root] = str(folder / staged_name(source))
        staged.append(StagedSet(source, Path(folders[root])))
        address = "" if labels is None else join_address(labels, name)
        if address and (is_remote(address) or Path(address, "manifest.json").is_file()):
            with suppress(PermanentError):  # there is none: a set with its own labels
                opened[name] = open_set(address)
        elif address and Path(address).is_dir():
            unfinished.append(redact_secrets(address))
    if unfinished or not opened:
        return StagingPlan(staged, folders, None, unfinished)
    digest = sha256(" ".join(each.digest for each in opened.values()).encode()).hexdigest()[:16]
    place = folder / f"labels-{digest}"
    staged += [StagedSet(source, place / name) for name, source in opened.items()]
    return StagingPlan(staged, folders, str(place), [])


def expand_folder(typed: str) -> Path:
    """Replace variables of this machine's environment in `stage_to`, as $TMPDIR, whose values differ between nodes.

    Raises:
        UserError: Naming a variable that is not set.
    """
    for name in re.findall(r"\$(\w+)", typed):
        if not os.environ.get(name):
            raise UserError(
                f"stage_to={typed}: the variable {name} is not set on this machine",
                "set it (on Slurm, SCRATCH in slurm/cluster.env sets TMPDIR), or type stage_to=FOLDER",
            )
    return Path(os.path.expandvars(typed))


def stage_data(config: RunConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Copy the sets that a training reads to `stage_to`, and return the arguments of its DataModule with the copies.

    Validation sets stay where they are.

    Args:
        config: The resolved config.
        arguments: Of the DataModule.

    Raises:
        UserError: As `stage_sets`.
    """
    assert config.stage_to is not None
    folder = expand_folder(config.stage_to)
    extra = [sets for sets in extra_sets(config).values()]
    roots = {name: root for sets in [config.data.sets, *extra] for name, root in sets.items()}
    plan = plan_staging(folder, roots, arguments.get("labels"))
    for root in plan.unfinished:
        print(f"note: {root} is not finished, and the labels are read from where they are", file=sys.stderr)
    stage_sets(folder, plan.sets)
    staged = dict(arguments)
    for key in ("sets", "labelled", "images"):
        if staged.get(key):
            staged[key] = {name: plan.folders.get(root, root) for name, root in staged[key].items()}
    if plan.labels is not None:
        staged["labels"] = plan.labels
    return staged
