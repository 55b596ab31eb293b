"""Whole shards kept on local disk, for addresses that cannot be read in parts: one folder, bounded, shared by all
processes of a machine.

A copy goes by what it holds (the tar's hash and bytes), so that two sets with a shard of one name never meet.
Who has waited longest for a reader goes first. DEPTH_ANYTHING_CACHE names the folder, DEPTH_ANYTHING_CACHE_GB
what it may hold.
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
    """Return the folder of the copies; it need not exist."""
    given = os.environ.get("DEPTH_ANYTHING_CACHE")
    return Path(given or Path(tempfile.gettempdir(), f"depth-anything-shards-{os.getuid()}"))


def cache_limit_bytes() -> int:
    """Return how many bytes the folder may hold.

    Raises:
        ValueError: DEPTH_ANYTHING_CACHE_GB is no number above 0.
    """
    return round(1e9 * positive_setting("DEPTH_ANYTHING_CACHE_GB", _DEFAULT_LIMIT_GB))


def positive_setting(name: str, default: float) -> float:
    """Return a number above 0 from the environment.

    Raises:
        ValueError: it is something else.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={text} is no number above 0; leave it out for {default:g}")
    return value


def open_shard_copy(
    key: str, size: int, fill: Callable[[BinaryIO], None], *, fresh: bool = False
) -> BinaryIO:
    """Open the copy of a shard for reading; bring it first, if it is not there. One process brings, others wait.

    Args:
        key: what it holds.
        size: its bytes.
        fill: writes it into an open file; what it raises leaves nothing behind.
        fresh: bring it even though it is there.

    Raises:
        Outage: the folder cannot be written, or has no room.
    """
    root = cache_folder()
    place = root / f"{hashlib.sha256(key.encode()).hexdigest()}.tar"
    try:
        file = None if fresh else _open_existing(place, size)
        if file is not None:
            return file
        if size > cache_limit_bytes():
            raise StorageUnavailable(
                f"a shard of {size / 1e9:.3f} GB is more than the {cache_limit_bytes() / 1e9:g} GB that {root} may "
                "hold",
                [f"set DEPTH_ANYTHING_CACHE_GB={max(1, -(-size // 10**9)) * 4} or more, and ", SAME_COMMAND],
            )
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with kernel_lock(root / f".lock-{place.name[:2]}"):
            file = None if fresh else _open_existing(place, size)
            return file if file is not None else _download(place, size, fill)
    except StorageUnavailable:
        raise
    except OSError as error:
        raise StorageUnavailable(
            f"shards cannot be copied to {root} ({error.strerror or error})",
            ["set DEPTH_ANYTHING_CACHE=FOLDER to another folder, and ", SAME_COMMAND],
        ) from error


def _open_existing(place: Path, size: int) -> BinaryIO | None:
    """Open a copy and note that it is wanted; None where there is none."""
    try:
        file = open(place, "rb")  # noqa: SIM115, the caller closes it
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        return None
    os.utime(file.fileno())
    return file


def _download(place: Path, size: int, fill: Callable[[BinaryIO], None]) -> BinaryIO:
    temporary = _reserve_space(place, size)
    try:
        file = open(temporary, "r+b")  # noqa: SIM115, the caller closes it
        try:
            fill(file)
            file.flush()
            with kernel_lock(place.parent / ".lock"):
                os.replace(
                    temporary, place
                )  # from here on another may push it out; the open file stays readable
        except BaseException:
            file.close()
            raise
        return file
    finally:
        temporary.unlink(missing_ok=True)


def _reserve_space(place: Path, size: int) -> Path:
    """Make room for a copy and hold it by a temporary file of its size."""
    root, temporary = place.parent, temporary_path(place)
    while True:
        with kernel_lock(root / ".lock"):
            remove_stale(root)
            there = _stat_files(root)
            spare = cache_limit_bytes() - sum(entry.st_size for path, entry in there.items() if path != place)
            copies = [path for path in there if path.suffix == ".tar" and path != place]
            for copy in sorted(copies, key=lambda path: there[path].st_mtime_ns):
                if spare < size:
                    spare += there[copy].st_size
                    copy.unlink()
            if spare >= size:
                with open(temporary, "xb") as file:
                    _allocate(file.fileno(), size)
                return temporary
        time.sleep(_POLL_S)  # what others are copying will be done soon, and may go then


def _stat_files(root: Path) -> dict[Path, os.stat_result]:
    found = {}
    for path in root.iterdir():
        with suppress(FileNotFoundError):  # copies that fail go without asking
            found[path] = path.stat()
    return found


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
