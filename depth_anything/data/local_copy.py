"""Local copies of models and checkpoints that are named by an address in an object store (s3://, gs://).

An address is that of a file, or a prefix that holds a finished run, a transformers folder or a sharded checkpoint. A
copy is made once and again when the objects change. It keeps the last parts of its address as folders, because names
say what a model is, and lies beside the config.yaml of its run, which says whether it is a teacher.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from depth_anything.data.address import is_remote, redact_secrets, remember_copy, with_addresses
from depth_anything.data.cache import cache_folder
from depth_anything.data.store import ObjectInfo, ObjectStore, is_object_store
from depth_anything.data.tars import ShardError
from depth_anything.errors import Part, UserError, UserMessage
from depth_anything.locks import kernel_lock

UNUSED_S = 24 * 3600.0
"""Seconds after which the copy of an older version is deleted."""

_SHARDED = "state.ckpt"  # model/sharded_files.py
_TRANSFORMERS = (".json", ".safetensors", ".bin", ".md")
_COMPLETE = ".complete"

_copies: dict[str, Path] = {}  # address → copy that this process uses, also if the object changes meanwhile


def is_in_store(place: str | Path) -> bool:
    """Return whether a place is an address in an object store.

    Raises:
        ShardError: It is, and needs a package that is not installed.
    """
    remote = isinstance(place, str) and is_remote(place) and not place.startswith("file://")
    return remote and is_object_store(str(place))


def check_readable(place: str, key: str) -> None:
    """Check that a model or checkpoint can be read from such a place, without looking for it.

    Raises:
        UserError: It is an address, and not in an object store.
    """
    if is_remote(place) and not place.startswith("file://") and not is_in_store(place):
        raise UserError(
            f"{key}{redact_secrets(place)}: models are read from files and object stores (s3://, gs://) only",
            "download it, and type the file",
        )


def local_path(place: str | Path) -> Path:
    """Return the path of a model or checkpoint, a file or a folder; of an address that of a local copy.

    Raises:
        ShardError: There is nothing at the address, it cannot be read, or it holds no model.
        StorageUnavailable: The store does not answer, or nothing can be written to the cache folder.
    """
    if isinstance(place, Path):
        return place
    check_readable(place, "")
    if not is_in_store(place):
        return Path(place.removeprefix("file://"))
    address = place.rstrip("/")
    if address not in _copies:
        _copies[address] = _fetch(address)
        remember_copy(_copies[address], address)
    return _copies[address]


@contextmanager
def errors_with_addresses() -> Iterator[None]:
    """Name addresses in place of local copies in the errors of the block."""
    try:
        yield
    except UserMessage as error:
        error.what_parts, error.fix_parts = _replace_parts(error.what_parts), _replace_parts(error.fix_parts)
        error.args = (with_addresses(str(error)),)
        raise
    except ValueError as error:
        raise ValueError(with_addresses(str(error))) from error


def _replace_parts(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(with_addresses(part) if isinstance(part, str) else part for part in parts)


def _fetch(address: str) -> Path:
    """Copy what `address` names, unless there is a copy of it; return its path."""
    root, files = _find_files(address)
    place = address.removeprefix(root.root).strip("/")
    listing = f"{root.root} {sorted(files.items(), key=lambda item: item[0])}"
    versions = cache_folder() / "models" / _digest(address)
    copy = versions / _digest(listing)
    path = copy / root.root.rpartition("/")[2] / place
    cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    copy.mkdir(parents=True, exist_ok=True)
    with kernel_lock(versions / ".lock"):
        if not (copy / _COMPLETE).exists():
            for name in files:
                try:
                    root.download(name, copy / root.root.rpartition("/")[2] / name)
                except FileNotFoundError:
                    raise ShardError(f"{root.address(name)} was deleted while it was read") from None
            (copy / _COMPLETE).touch()
        os.utime(copy)
        _delete_old_versions(versions, copy)
    return path


def _find_files(address: str) -> tuple[ObjectStore, dict[str, ObjectInfo]]:
    """Return a prefix that holds what an address names, and the objects to copy, named relative to it."""
    prefix, _, name = address.rpartition("/")
    if prefix.endswith("/"):  # s3://bucket
        raise ShardError(f"there is no model at {address}", "type the address of a file or of a finished run")
    run, _, folder = prefix.rpartition("/")
    if folder == "checkpoints" and not run.endswith("/"):
        prefix, name = run, f"{folder}/{name}"
    store = ObjectStore(prefix)
    info = store.info(name)
    if info is not None:
        files = {name: info}
    else:
        found = ObjectStore(address).list()
        files = {f"{name}/{each}": found[each] for each in _model_files(address, found)}
    config = f"{name}/config.yaml" if f"{name}/model.safetensors" in files else "config.yaml"
    if (about := store.info(config)) is not None:
        files[config] = about
    return store, files


def _model_files(address: str, names: dict[str, ObjectInfo]) -> list[str]:
    """Choose the objects below an address that make up a model or checkpoint.

    Raises:
        ShardError: There are none.
    """
    if _SHARDED in names:
        return sorted(names)
    if "config.json" in names:  # transformers
        return sorted(name for name in names if "/" not in name and name.endswith(_TRANSFORMERS))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if "config.yaml" in names:
        raise ShardError(
            f"the run {address} is not finished and has no model.safetensors yet",
            f"start it again to continue, or type a file of {address}/checkpoints",
        )
    if not names:
        raise ShardError(f"there is no model at {address}", "type the address of a file or of a finished run")
    raise ShardError(
        f"{address} holds no model; it has {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}",
        "type the address of a file or of a finished run",
    )


def _delete_old_versions(versions: Path, current: Path) -> None:
    for folder in versions.iterdir():
        with suppress(FileNotFoundError):
            if folder != current and folder.is_dir() and time.time() - folder.stat().st_mtime > UNUSED_S:
                shutil.rmtree(folder, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
