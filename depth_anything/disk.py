"""Atomic writes: a file or folder appears under its name complete, or not at all.

All temporary names follow one scheme, `.tmp.NAME.HOST.PID.RANDOM` in the folder of the target, so that `remove_stale`
can tell the temporaries of dead processes from those of running ones.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from depth_anything.errors import SAME_COMMAND, Text, UserMessage, error_reason

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_MAX_NAME_BYTES = 255
_STALE_S = 86_400.0
_TEMPORARY = re.compile(r"\.tmp\..*\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>\d+)\.[0-9a-f]+")
_CLOCK = ".tmp.clock."


class WriteError(UserMessage, OSError):
    """A file cannot be written; `errno` is the system's, where it is known."""


def write_error(path: Path, error: BaseException) -> WriteError:
    """Build the error that names the file that could not be written.

    Args:
        path: The final path.
        error: The cause. Libraries that fail to write often raise an error of their own and keep the system's as its
            context, or quote its number as "(os error 28)".
    """
    code, reason = _system_error(error)
    fix: Text = ""
    if code in _FULL:
        fix = (f"make space in {path.parent} and ", SAME_COMMAND)
    elif code in _FORBIDDEN:
        fix = (f"make {path.parent} writable and ", SAME_COMMAND)
    elif code == errno.ENOENT:
        fix = (f"bring {path.parent} back and ", SAME_COMMAND)
    named = WriteError(f"{path} cannot be written ({reason})", fix)
    named.errno = code
    return named


def explain_write_error(error: BaseException) -> BaseException:
    """Return a WriteError for a system's error that only writing can raise, on a full or read-only disk.

    Returns:
        The error itself for others, and where it names no file.
    """
    if not isinstance(error, OSError) or isinstance(error, UserMessage):
        return error
    if error.errno not in (*_FULL, errno.EROFS) or not error.filename:
        return error
    return write_error(Path(os.fsdecode(error.filename)), error)


@contextmanager
def name_write_errors(path: Path, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Name the file when the disk is full or read-only: the system's error for a failed write or fsync names none.

    Args:
        path: The final path.
        also: Other exceptions that mean a failed write here. By default only a full or read-only disk does, because the
            code may also read from a disk that fails.

    Raises:
        WriteError: As `write_error`.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        failed = error.errno in (*_FULL, errno.EFBIG, errno.EROFS) and error.strerror is not None
        if not failed and not isinstance(error, also):
            raise
        raise write_error(path, error) from error
    except also as error:
        raise write_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, so that a rename survives a power failure."""
    _sync(folder)


def temporary_path(path: Path) -> Path:
    """Return an unused temporary path next to `path` that names the host and process."""
    suffix = f".{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
    room = _MAX_NAME_BYTES - len(f".tmp.{suffix}")
    name = os.fsencode(path.name)[:room].decode("utf-8", "ignore")
    return path.with_name(f".tmp.{name}{suffix}")


def remove_stale(folder: Path, *, exclusive: bool = False) -> None:
    """Remove the temporary files and folders of dead writers.

    A writer of this host is dead when its process is gone. One of another host counts as dead after a day.

    Args:
        folder: Where to look; subfolders are not searched.
        exclusive: The caller holds the folder's lock, so no other host writes here. Also removes names of earlier
            versions, .NAME.PID.tmp and .NAME.tmp.
    """
    for path in folder.glob(".tmp.*"):
        with suppress(OSError):  # the writer may have finished in the meantime
            if _is_stale(path, exclusive=exclusive):
                _remove(path)
    for path in folder.glob(".*.tmp") if exclusive else ():
        _remove(path)


def _is_stale(path: Path, *, exclusive: bool) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None and not path.name.startswith(_CLOCK):
        return False
    if match is not None and match["host"] == _host() and not process_exists(int(match["pid"])):
        return True
    if match is not None and exclusive and match["host"] != _host():
        return True
    return file_system_time(path.parent) - path.stat().st_mtime > _STALE_S


@contextmanager
def atomic_path(
    path: Path, *, make_folder: bool = False, sync: bool = True, also: tuple[type[Exception], ...] = ()
) -> Iterator[Path]:
    """Yield a temporary path to write a file to; on success it is renamed to `path`.

    Args:
        path: The final path; an existing file is replaced.
        make_folder: Create the parent folders.
        sync: Flush the file and its name to the disk.
        also: As `name_write_errors`.

    Raises:
        OSError: If the file cannot be written; the temporary is removed and an existing file stays.
    """
    temporary = temporary_path(path)
    try:
        with name_write_errors(path, also):
            if make_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if sync:
                _sync(temporary)
            os.replace(temporary, path)
            if sync:
                sync_folder(path.parent)
    finally:
        _remove(temporary)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: As `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_new(path: Path, data: bytes) -> bool:
    """Write a file atomically unless there is one of this name; return whether it was written.

    Raises:
        OSError: As `atomic_path`.
    """
    temporary = temporary_path(path)
    try:
        with name_write_errors(path):
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                try:
                    with open(path, "xb") as file:
                        file.write(data)
                except FileExistsError:
                    return False
    finally:
        _remove(temporary)
    sync_folder(path.parent)
    return True


@contextmanager
def atomic_folder(
    path: Path, *, keep_others: bool = False, sync: bool = True, also: tuple[type[Exception], ...] = ()
) -> Iterator[Path]:
    """Yield a temporary folder to write files to; on success it replaces `path`.

    Args:
        path: The final path; an existing folder is removed.
        keep_others: Carry over the files of an existing folder that the new one lacks.
        sync: Flush each file to the disk.
        also: As `name_write_errors`.

    Raises:
        OSError: If the folder cannot be written; the temporary is removed and an existing folder stays.
    """
    temporary = temporary_path(path)
    try:
        with name_write_errors(path, also):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir() if sync else ():
                _sync(file)
            publish_folder(temporary, path, keep_others=keep_others)
    finally:
        _remove(temporary)


def publish_folder(temporary: Path, path: Path, *, keep_others: bool = False) -> None:
    """Give a temporary folder its final name; its files must be on the disk already.

    Args:
        temporary: A folder next to `path`.
        path: The final path; an existing folder is removed.
        keep_others: Carry over the files of an existing folder that the new one lacks.
    """
    sync_folder(temporary)  # its names
    if path.exists():
        _exchange(temporary, path, keep_others=keep_others)
    else:
        os.replace(temporary, path)
    sync_folder(path.parent)


def _exchange(temporary: Path, path: Path, *, keep_others: bool) -> None:
    for other in path.iterdir() if keep_others else ():
        if not (temporary / other.name).exists():
            (shutil.copytree if other.is_dir() else shutil.copy2)(other, temporary / other.name)
    # A kill between the two renames leaves the older folder under this name, which `remove_stale` never removes.
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_files(path: Path, *, also: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield a temporary folder for a file and its companions; on success all move to the folder of `path`.

    Args:
        path: The main file. It is moved last, so it never appears without its companions.
        also: As `name_write_errors`.

    Raises:
        OSError: If a file cannot be written; the temporary is removed and existing files stay.
    """
    temporary = temporary_path(path)
    try:
        with name_write_errors(path, also):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == path.name):
                _sync(file)
                os.replace(file, path.with_name(file.name))
            sync_folder(path.parent)
    finally:
        _remove(temporary)


def remove_atomically(path: Path) -> None:
    """Remove a file or folder, which is there whole or not at all for those who look at its name.

    A kill leaves a temporary, which `remove_stale` removes.

    Raises:
        OSError: If it cannot be renamed, as on a read-only disk.
    """
    temporary = temporary_path(path)
    with suppress(FileNotFoundError):
        os.replace(path, temporary)
    _remove(temporary)


def process_exists(pid: int) -> bool:
    """Return whether a process of this host is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def file_system_time(folder: Path) -> float:
    """Return the modification time, in seconds, that the file system of `folder` gives to a file written now."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=_CLOCK) as file:
        return os.fstat(file.fileno()).st_mtime


def parse_json_object(data: bytes | None) -> dict[str, Any]:
    """Parse a JSON object; {} for None and for what is none, as a file that a power failure has damaged."""
    try:
        content = json.loads(data or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file that a run wrote; {} if it is missing, or damaged."""
    try:
        return parse_json_object(path.read_bytes())
    except FileNotFoundError:
        return {}


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _system_error(error: BaseException) -> tuple[int | None, str]:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.errno, cause.strerror
        cause = cause.__context__
    text = error_reason(error)
    number = re.search(r"\(os error (\d+)\)", text)
    return (int(number[1]) if number else None), text
