"""Whether the process that holds a file is alive. Clocks of two machines are never compared.

A process of this host is looked up. One of another host shows that it is alive by changing its file: what counts is
whether the file changes while this process watches, or the time of the file system, which stamps both their files.
"""

import os
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path


def process_exists(pid: int) -> bool:
    """Tell whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def file_system_time(folder: Path) -> float:
    """Return the time, in seconds, that the file system of `folder` gives to a file written now."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp.clock.") as file:
        return os.fstat(file.fileno()).st_mtime


class FileWatch:
    """Watches files whose holders may die, and remembers how long each has stayed the same."""

    def __init__(self) -> None:
        """Begin with no file."""
        self._seen: dict[Path, tuple[tuple[int, bytes], float]] = {}

    def seconds_unchanged(self, path: Path) -> float:
        """Return for how many seconds of this process's clock a file has been seen unchanged; 0 at the first look.

        Content and modification time count, and a file that is opened is read anew from a network disk.

        Raises:
            FileNotFoundError: It is gone.
        """
        now = time.monotonic()
        try:
            with open(path, "rb") as file:
                state = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            self._seen.pop(path, None)
            raise
        before, since = self._seen.get(path, (None, now))
        if before != state:
            since = now
        self._seen[path] = state, since
        return now - since

    def is_dead(self, path: Path, *, host: str, pid: int, still: float) -> bool:
        """Tell whether the holder of a file is dead, as far as this process has seen.

        Args:
            path: Of the file, which its holder changes now and then.
            host: Of the holder.
            pid: Of the holder, on that host.
            still: Seconds after which a file that has not changed has lost its holder, as a process of that number
                may be another one by now.
        """
        if host == socket.gethostname() and not process_exists(pid):
            return True
        with suppress(FileNotFoundError):
            return self.seconds_unchanged(path) > still
        return True
