"""Writing to a disk: errors that name the file and, where it is full, the folder to clear; renames that last."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_error(path: Path, error: BaseException) -> OSError:
    """Build the error that says that `path` cannot be written, and why.

    Args:
        path: What was being written, under its final name.
        error: What the system or a library raised. Libraries that fail to write often complain of something else
            and keep the system's error as their context, or cite its number as "(os error 28)".

    Returns:
        An OSError with the system's `errno` where it is known.
    """
    code, said = _system_error(error)
    advice = ""
    if code in _FULL:
        advice = f"; make space in {path.parent} and start the same command again"
    named = OSError(f"{path} cannot be written ({said}){advice}")
    named.errno = code
    return named


@contextmanager
def name_write_errors(path: Path) -> Iterator[None]:
    """Name `path` where the disk is full: a write or fsync that fails names no file.

    Other errors go through: what is written may be read from a failing disk meanwhile.

    Raises:
        OSError: As `write_error` builds it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*_FULL, errno.EFBIG) or error.strerror is None:
            raise
        raise write_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, as a rename needs it to outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: BaseException) -> tuple[int | None, str]:
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, OSError) and first.strerror:
            return first.errno, first.strerror
        first = first.__context__
    text = str(error).strip().partition("\n")[0][:120] or type(error).__name__
    number = re.search(r"\(os error (\d+)\)", text)
    return (int(number[1]) if number else None), text
