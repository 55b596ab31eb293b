"""A bounded cache folder for whole shards whose address cannot be read by range, shared by all processes of a machine.

A copy is named by its content (hash and size of the tar), so shards of the same name in two sets never collide. The
copy that was not read for the longest time is deleted first. DEPTH_ANYTHING_CACHE sets the folder,
DEPTH_ANYTHING_CACHE_GB its maximum size.
"""

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from depth_anything.data.tars import StorageUnavailable
from depth_anything.disk import remove_stale, temporary_path
from depth_anything.errors import SAME_COMMAND
from depth_anything.locks import kernel_lock

_DEFAULT_LIMIT_GB = 50.0
_POLL_S = 0.1


def cache_folder() -> Path:
    """Return the cache folder; it may not exist yet."""
    folder = os.environ.get("DEPTH_ANYTHING_CACHE")
    return Path(folder or Path(tempfile.gettempdir(), f"depth-anything-shards-{os.getuid()}"))


def cache_limit_bytes() -> int:
    """Return the maximum size of the cache folder.

    Raises:
        ValueError: DEPTH_ANYTHING_CACHE_GB is not a number above 0.
    """
    return round(1e9 * positive_setting("DEPTH_ANYTHING_CACHE_GB", _DEFAULT_LIMIT_GB))


def positive_setting(name: str, default: float) -> float:
    """Read a number above 0 from an environment variable.

    Raises:
        ValueError: It is something else.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={text} is not a number above 0; unset it for {default:g}")
    return value


def open_shard_copy(
    key: str, size: int, download: Callable[[BinaryIO], None], *, fresh: bool = False
) -> BinaryIO:
    """Open the cached copy of a shard; download it first if there is none. Other processes wait for the download.

    Args:
        key: Identifies the content.
        size: Size of the shard, bytes.
        download: Writes it into an open file; if it raises, nothing is left in the cache.
        fresh: Download even if there is a copy.

    Raises:
        StorageUnavailable: The folder cannot be written, or is too small.
    """
    root = cache_folder()
    path = root / f"{hashlib.sha256(key.encode()).hexdigest()}.tar"
    try:
        file = None if fresh else _open_existing(path, size)
        if file is not None:
            return file
        if size > cache_limit_bytes():
            needed_gb = max(1, -(-size // 10**9)) * 4
            raise StorageUnavailable(
                f"a shard of {size / 1e9:.3f} GB does not fit into {root} with its limit of "
                f"{cache_limit_bytes() / 1e9:g} GB",
                [f"set DEPTH_ANYTHING_CACHE_GB={needed_gb} or more, and ", SAME_COMMAND],
            )
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with kernel_lock(root / f".lock-{path.name[:2]}"):
            file = None if fresh else _open_existing(path, size)
            return file if file is not None else _download(path, size, download)
    except StorageUnavailable:
        raise
    except OSError as error:
        raise StorageUnavailable(
            f"shards cannot be copied to {root} ({error.strerror or error})",
            ["set DEPTH_ANYTHING_CACHE=FOLDER to another folder, and ", SAME_COMMAND],
        ) from error


def _open_existing(path: Path, size: int) -> BinaryIO | None:
    """Open a copy and update its time; None if there is none of this size."""
    try:
        file = open(path, "rb")  # noqa: SIM115, the caller closes it
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        return None
    os.utime(file.fileno())
    return file


def _download(path: Path, size: int, download: Callable[[BinaryIO], None]) -> BinaryIO:
    temporary = _reserve_space(path, size)
    try:
        file = open(temporary, "r+b")  # noqa: SIM115, the caller closes it
        try:
            download(file)
            file.flush()
            with kernel_lock(path.parent / ".lock"):
                # From here on another process may delete it; the open file stays readable.
                os.replace(temporary, path)
        except BaseException:
            file.close()
            raise
        return file
    finally:
        temporary.unlink(missing_ok=True)


def _reserve_space(path: Path, size: int) -> Path:
    """Delete old copies until there is room for another, and allocate a temporary file of its size."""
    root, temporary = path.parent, temporary_path(path)
    while True:
        with kernel_lock(root / ".lock"):
            remove_stale(root)
            files = _stat_files(root)
            free = cache_limit_bytes() - sum(entry.st_size for other, entry in files.items() if other != path)
            copies = [other for other in files if other.suffix == ".tar" and other != path]
            for copy in sorted(copies, key=lambda other: files[other].st_mtime_ns):
                if free < size:
                    free += files[copy].st_size
                    copy.unlink()
            if free >= size:
                with open(temporary, "xb") as file:
                    _allocate(file.fileno(), size)
                return temporary
        time.sleep(
            _POLL_S
        )  # the rest are downloads of other processes, which can be deleted when they are done


def _stat_files(root: Path) -> dict[Path, os.stat_result]:
    files = {}
    for path in root.iterdir():
        with suppress(FileNotFoundError):  # a failed download is deleted without the lock
            files[path] = path.stat()
    return files


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
