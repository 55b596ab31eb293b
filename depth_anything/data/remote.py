"""Bytes from addresses that are no folders: http and https by range, all else by whole files in a cache."""

import hashlib
import os
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from depth_anything.data.tars import ShardError, temporary_name

_TIMEOUT_S = 60
_CHUNK = 1 << 20


def is_remote(address: str) -> bool:
    """Say whether an address is a URL or a command, in place of a path."""
    return "://" in address or address.startswith("pipe:")


def read(address: str) -> bytes:
    """Read a whole small file.

    Raises:
        ShardError: it cannot be had.
    """
    try:
        with _open(address) as file:
            return file.read()
    except Exception as error:  # openers raise what they like
        raise _failure(address, error) from error


def read_range(address: str, start: int, count: int, *, shard_bytes: int, total_bytes: int | None) -> bytes:
    """Read part of a shard.

    Args:
        address: of the tar.
        start: first byte.
        count: bytes; fewer come where the file ends.
        shard_bytes: of the whole tar.
        total_bytes: of all shards that will be read, for the line that announces whole copies.

    Raises:
        ShardError: it cannot be had.
    """
    cached = _cache_path(address)
    try:
        if not cached.exists() or cached.stat().st_size != shard_bytes:
            data = _http_range(address, start, count) if _is_http(address) else None
            if data is not None:
                return data
            _copy(address, cached, shard_bytes=shard_bytes, total_bytes=total_bytes)
        with open(cached, "rb") as file:
            file.seek(start)
            return file.read(count)
    except Exception as error:  # openers raise what they like
        raise _failure(address, error) from error


def _is_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _failure(address: str, error: Exception) -> ShardError:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it holds the connection
    return ShardError(f"{address} cannot be read: {error or type(error).__name__}")


def _open(address: str, headers: dict[str, str] | None = None) -> Any:
    if _is_http(address):
        return urllib.request.urlopen(
            urllib.request.Request(address, headers=headers or {}), timeout=_TIMEOUT_S
        )
    if address.startswith("pipe:"):
        from webdataset import gopen  # takes 1.5 s, and most reading does without

        return gopen(address)
    import fsspec  # likewise

    return fsspec.open(address, "rb").open()


def _http_range(address: str, start: int, count: int) -> bytes | None:
    """Ask for a part; None from a server that only has wholes."""
    with _open(address, {"Range": f"bytes={start}-{start + count - 1}"}) as response:
        return response.read() if response.status == 206 else None


def _cache_path(address: str) -> Path:
    folder = os.environ.get("DEPTH_ANYTHING_CACHE") or Path(tempfile.gettempdir(), "depth-anything-shards")
    prefix, _, name = address.rpartition("/")
    return Path(folder, *(hashlib.sha256(part.encode()).hexdigest()[:24] for part in (prefix, name)))


def _copy(address: str, cached: Path, *, shard_bytes: int, total_bytes: int | None) -> None:
    try:
        cached.parent.mkdir(parents=True)
    except FileExistsError:
        pass
    else:  # whoever makes the set's folder, of all workers, says what for
        size = f"{total_bytes / 1e9:.3f} GB" if total_bytes else "as much as the shards have"
        print(
            f"{address} cannot be read in parts: whole shards are copied to {cached.parent}, in all {size}; "
            "DEPTH_ANYTHING_CACHE=FOLDER puts them elsewhere",
            file=sys.stderr,
        )
    temporary = temporary_name(cached)
    try:
        with open(temporary, "xb") as file, _open(address) as source:
            while chunk := source.read(_CHUNK):
                file.write(chunk)
        if temporary.stat().st_size != shard_bytes:
            raise ShardError(f"it ended after {temporary.stat().st_size} of {shard_bytes} bytes")
        os.replace(temporary, cached)
    finally:
        temporary.unlink(missing_ok=True)
