"""Bytes from addresses that are no folders: http and https by range, all else by whole files in a cache."""

import hashlib
import os
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from depth_anything.data.tars import ShardError, temporary_name

_TIMEOUT_S = 60
_CHUNK = 1 << 20


def is_remote(address: str) -> bool:
    """Say whether an address is a URL or a command in place of a path; file:// is taken for remote, too."""
    return "://" in address or address.startswith("pipe:")


def read(address: str) -> bytes:
    """Read a whole small file; ShardError where it cannot be had."""
    try:
        if address.startswith(("http://", "https://")):
            with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:
                return response.read()
        with _open(address) as file:
            return file.read()
    except Exception as error:  # openers raise what they like
        raise ShardError(f"{address} cannot be read: {error}") from error


def read_range(address: str, start: int, count: int, *, shard_bytes: int, total_bytes: int | None) -> bytes:
    """Read part of a file of known size.

    Args:
        address: of the shard.
        start: first byte.
        count: bytes.
        shard_bytes: of the whole file.
        total_bytes: of all files that will be read, for the line that announces whole copies.
    """
    cached = _cache_path(address)
    if not cached.exists() or cached.stat().st_size != shard_bytes:
        if address.startswith(("http://", "https://")):
            data = _http_range(address, start, count)
            if data is not None:
                return data
        _copy(address, cached, shard_bytes=shard_bytes, total_bytes=total_bytes)
    with open(cached, "rb") as file:
        file.seek(start)
        return file.read(count)


def _http_range(address: str, start: int, count: int) -> bytes | None:
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-{start + count - 1}"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            return response.read() if response.status == 206 else None
    except OSError as error:
        raise ShardError(f"{address} cannot be read: {error}") from error


def _cache_path(address: str) -> Path:
    folder = os.environ.get("DEPTH_ANYTHING_CACHE") or Path(tempfile.gettempdir(), "depth-anything-shards")
    return Path(folder, f"{hashlib.sha256(address.encode()).hexdigest()[:24]}.tar")


def _copy(address: str, cached: Path, *, shard_bytes: int, total_bytes: int | None) -> None:
    try:
        cached.parent.mkdir(parents=True)
        need = f"{total_bytes / 1e9:.1f} GB" if total_bytes else "as much disk as the shards have"
        print(
            f"{address} cannot be read in parts: whole shards are copied to {cached.parent}, up to {need}; "
            "DEPTH_ANYTHING_CACHE=FOLDER puts them elsewhere",
            file=sys.stderr,
        )
    except FileExistsError:
        pass
    temporary = temporary_name(cached)
    try:
        with open(temporary, "xb") as file, _open(address) as source:
            while chunk := source.read(_CHUNK):
                file.write(chunk)
        if temporary.stat().st_size != shard_bytes:
            raise ShardError(f"{address} ended after {temporary.stat().st_size} of {shard_bytes} bytes")
        os.replace(temporary, cached)
    finally:
        temporary.unlink(missing_ok=True)


def _open(address: str):
    if address.startswith(("http://", "https://")):
        return urllib.request.urlopen(address, timeout=_TIMEOUT_S)
    if address.startswith("pipe:"):
        from webdataset import gopen

        return gopen(address)
    import fsspec

    return fsspec.open(address, "rb").open()
