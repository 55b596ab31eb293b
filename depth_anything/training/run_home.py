"""Where a run works: in its run folder, or, if `output_dir` is an address, in a local copy that is mirrored there."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from depth_anything.data.address import is_remote
from depth_anything.data.local_copy import is_in_store, local_path
from depth_anything.data.store import ObjectStore, open_store
from depth_anything.locks import kernel_lock
from depth_anything.training.config import RunConfig
from depth_anything.training.run_dir import is_requeued
from depth_anything.training.run_mirror import MirrorOptions, RunMirror, checkpoint_files
from depth_anything.training.signals import is_main_rank


@dataclass(frozen=True)
class RunHome:
    """The places of a run.

    Attributes:
        typed: The config as it was typed, with addresses; a run folder stores and compares this one.
        config: The same with local paths.
        store: Where the run folder is mirrored to; None for a run on a disk.
        mirror: Uploads it, on the main rank of a run that trains.
    """

    typed: RunConfig
    config: RunConfig
    store: ObjectStore | None = None
    mirror: RunMirror | None = None

    def local_checkpoint(self, checkpoint: Path | None) -> Path | None:
        """Return the checkpoint that rank 0 has chosen; on another node it is fetched first."""
        folder = Path(self.config.run_dir)
        if checkpoint is None or checkpoint.exists():
            return checkpoint
        if not checkpoint.is_relative_to(folder) and self.config.resume is not None:
            return local_path(self.config.resume)
        if self.store is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with kernel_lock(folder / ".fetch"):
                if not checkpoint.exists():
                    name = checkpoint.relative_to(folder).as_posix()
                    for file in checkpoint_files(self.store.names(name), name):
                        self.store.download(file, folder / file)
        return checkpoint

    def upload(self) -> None:
        """Begin to upload now what is new."""
        if self.mirror is not None:
            self.mirror.wake()

    def report(self, message: str) -> None:
        """Print how the run has ended, unless the message is empty."""
        if message:
            print(self.describe(message))

    def describe(self, message: str) -> str:
        """Replace the local folder in a message by the address of the run."""
        return message if self.store is None else message.replace(self.config.run_dir, self.store.root)


@contextmanager
def open_home(config: RunConfig) -> Iterator[RunHome]:
    """Prepare the places of a run; at the end everything is uploaded.

    Raises:
        UserError: As `RunMirror.open` and `RunMirror.close`.
    """
    local, store = localize(config), None
    if is_remote(config.run_dir):
        found = open_store(config.run_dir)
        assert isinstance(found, ObjectStore), "open_store refuses other addresses"
        store = found
    if store is None:
        yield RunHome(config, local)
        return
    if config.stage == "pseudolabel":  # any number of processes; only config.yaml is written
        yield RunHome(config, local, store)
        if is_main_rank():
            store.write("config.yaml", Path(local.run_dir, "config.yaml").read_bytes())
        return
    mirror = None
    if is_main_rank():
        mirror = RunMirror(Path(local.run_dir), store, mirror_options(config))
        mirror.open(overwrite=config.overwrite and not is_requeued())
    try:
        yield RunHome(config, local, store, mirror)
    except BaseException:
        if mirror is not None:
            mirror.close(complete=False)
        raise
    if mirror is not None:
        mirror.close(complete=True)


def mirror_options(config: RunConfig) -> MirrorOptions:
    """Return how a run is uploaded: the store keeps the checkpoints that the run keeps."""
    checkpoint, mirror = config.checkpoint, config.mirror
    keep, keep_every = checkpoint.keep, checkpoint.keep_every
    return MirrorOptions(every=mirror.every, patience=mirror.patience, keep=keep, keep_every=keep_every)


def localize(config: RunConfig) -> RunConfig:
    """Return a config whose run folder and starting weights are local; weights in an object store are fetched.

    What `teacher` and `resume` name is fetched when it is needed.
    """
    changes: dict[str, Any] = {}
    if is_remote(config.run_dir):
        changes["run_dir"] = str(local_run_dir(config))
        if config.data.has("run_dir"):
            changes["data"] = replace(config.data, run_dir=changes["run_dir"])
        for group in ("logger", "callbacks"):  # nodes name the run folder as ${run_dir}
            nodes = getattr(config, group)
            changes[group] = _replace_prefix(nodes, config.run_dir, changes["run_dir"])
    if config.init is not None and is_in_store(config.init):
        changes["init"] = str(local_path(config.init))
    return replace(config, **changes) if changes else config


def _replace_prefix(value: Any, old: str, new: str) -> Any:
    """Replace the beginning of each text in nested mappings and lists."""
    if isinstance(value, str):
        return new + value[len(old) :] if value.startswith(old) else value
    if isinstance(value, Mapping):
        return {name: _replace_prefix(item, old, new) for name, item in value.items()}
    return [_replace_prefix(item, old, new) for item in value] if isinstance(value, list) else value


def local_run_dir(config: RunConfig) -> Path:
    """Return the local folder of a run whose `output_dir` is an address."""
    folder = config.mirror.folder
    root = Path(folder) if folder else Path(tempfile.gettempdir(), f"depth-anything-runs-{os.getuid()}")
    digest = hashlib.sha256(config.run_dir.encode()).hexdigest()[:12]
    return (root / digest / config.name).absolute()
