"""Local copies of model files that `init=` and `teacher=` name in an object store."""

import hashlib
from pathlib import Path

from depth_anything.data.address import file_name
from depth_anything.data.cache import cache_folder
from depth_anything.data.store import ObjectStore, is_object_store, open_store
from depth_anything.data.tars import ShardError
from depth_anything.locks import kernel_lock


def is_in_store(place: str) -> bool:
    """Return whether a file is named by an address in an object store."""
    return "://" in place and is_object_store(place)


def local_weights(place: str) -> Path:
    """Return the path of a model file; of one in an object store that of a local copy, as `fetch_model`."""
    return fetch_model(place) if is_in_store(place) else Path(place)


def fetch_model(address: str) -> Path:
    """Return a local copy of a model file in an object store, in the cache folder; it is fetched if it has changed.

    Raises:
        ShardError: There is no such file.
    """
    prefix, _, name = address.rpartition("/")
    store = open_store(prefix)
    assert isinstance(store, ObjectStore)
    info = store.info(name)
    if info is None:
        raise ShardError(f"there is no model at {address}", "type the address of a model.safetensors")
    digest = hashlib.sha256(f"{address} {info}".encode()).hexdigest()[:16]
    path = cache_folder() / "models" / digest / file_name(prefix) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with kernel_lock(path.parent / ".fetch"):
        if not path.exists():
            store.download(name, path)
    return path
