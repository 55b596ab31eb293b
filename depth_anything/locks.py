"""File locks: one process at a time, on one host by the kernel, on several by a heartbeat.

Clocks of two machines are never compared. A holder on another host is alive while its file changes, as this process
observes or as the file system, which stamps both hosts' files, says.
"""

import atexit
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from depth_anything.disk import atomic_write, file_system_time, name_write_errors, process_exists
from depth_anything.errors import UserError

HEARTBEAT_INTERVAL_S = 10.0
LOCK_STALE_S = 60.0
LOCK_WATCH_S = 2.5 * HEARTBEAT_INTERVAL_S
TAKEOVER_WAIT_S = 900.0
"""How long a later start of a job waits for an earlier one, which may be writing a large checkpoint."""

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class JobStart(NamedTuple):
    """A start of a job that a cluster may start again while an earlier start still runs on a node it has lost."""

    job: str = ""
    number: int = 0

    def follows(self, other: "JobStart") -> bool:
        """Return whether this is a later start of the same job."""
        return self.job == other.job != "" and self.number > other.number


NO_JOB = JobStart()
"""Of a process that no cluster starts again."""


class LockHolder(NamedTuple):
    """The content of a lock file: the process, its clock's time at the last heartbeat, and the start of its job."""

    host: str
    pid: int
    heartbeat: float
    start: JobStart = NO_JOB

    def is_process_of(self, other: "LockHolder") -> bool:
        """Return whether both name the same process."""
        return (self.host, self.pid, self.start) == (other.host, other.pid, other.start)


class LockHeldError(UserError):
    """Another process holds a lock."""


class FileLock:
    """A lock on a folder, held by one process of any host until `release` or until the process dies.

    A POSIX record lock keeps out processes of the same host: the kernel drops it when its process dies, and forked
    workers do not inherit it. A heartbeat in the file keeps out processes of other hosts, because network file
    systems may not carry locks.

    A holder whose job was started again elsewhere gets SIGTERM when the later start asks for the lock. One that was
    suspended until another process took the lock for dead ends at once: two must not write.
    """

    def __init__(self, path: Path, *, fix: str, start: JobStart = NO_JOB) -> None:
        """Name the lock; nothing is created yet.

        Args:
            path: The lock file. Its folder is what the lock protects.
            fix: What a user can do while another process holds it, for the error.
            start: The start of the job of this process.
        """
        self.path, self._fix, self._start = path, fix, start
        self._request = path.with_name(f"{path.stem}-request{path.suffix}")
        self._file: int | None = None
        self._stop = threading.Event()
        self._asked = False

    def acquire(self) -> None:
        """Take the lock and start the heartbeat; wait while an earlier start of the same job holds it.

        Raises:
            LockHeldError: If another process holds it.
        """
        deadline, waiting = time.monotonic() + TAKEOVER_WAIT_S, False
        while True:
            try:
                self._acquire()
                break
            except LockHeldError:
                holder = self._read_holder()
                if time.monotonic() > deadline or holder is None or not self._start.follows(holder.start):
                    raise
            if not waiting:
                waiting = True
                print(
                    f"{self.path.parent} is written by an earlier start of job {self._start.job}, process "
                    f"{holder.pid} on {holder.host}: asking it to stop, and waiting for it",
                    file=sys.stderr,
                )
                atomic_write(self._request, json.dumps(self._start).encode())
            time.sleep(1.0)
        if self._start.number:
            self._request.unlink(missing_ok=True)

    def _acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        free: bool | None = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # None: a file system without locks
            free = False if error.errno in (errno.EACCES, errno.EAGAIN) else None
        holder = self._read(file)
        held = free is False
        if holder is not None and not held:
            here = holder.host == socket.gethostname()
            held = not (here and (free or not process_exists(holder.pid))) and self._is_alive(holder)
        if held:
            os.close(file)
            process = f"process {holder.pid} on {holder.host}" if holder else "another process"
            raise LockHeldError(f"{self.path.parent} is being written by {process}", self._fix)
        self._file, self._process = file, os.getpid()
        try:
            self._beat()
        except OSError:
            self._file = None
            os.close(file)
            raise
        atexit.register(self.release)  # then a run on another host need not wait until the heartbeat is stale
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back. A process forked from the holder does nothing here."""
        if self._file is not None and self._process == os.getpid():
            self._stop.set()
            self._thread.join()
            file, self._file = self._file, None
            os.ftruncate(file, 0)
            os.close(file)

    @staticmethod
    def _read(file: int) -> LockHolder | None:
        try:
            holder = dict(json.loads(os.pread(file, 4096, 0)))
            start = JobStart(str(holder.get("job", "")), int(holder.get("start", 0)))
            return LockHolder(str(holder["host"]), int(holder["pid"]), float(holder["heartbeat"]), start)
        except (ValueError, KeyError, TypeError):
            return None

    def _read_holder(self) -> LockHolder | None:
        file = os.open(self.path, os.O_RDONLY)
        try:
            return self._read(file)
        finally:
            os.close(file)

    def _is_alive(self, holder: LockHolder) -> bool:
        """Return whether a holder still writes its heartbeat: by the times in the file, else by watching it."""
        now = file_system_time(self.path.parent)
        ages = now - self.path.stat().st_mtime, now - holder.heartbeat
        if all(-HEARTBEAT_INTERVAL_S < age < LOCK_STALE_S for age in ages):
            return True
        if all(age >= LOCK_STALE_S for age in ages):
            return False
        print(
            f"waiting {LOCK_WATCH_S:.0f} s to see whether process {holder.pid} on {holder.host} still writes to "
            f"{self.path.parent}",
            file=sys.stderr,
        )
        watch, deadline = FileWatch(), time.monotonic() + LOCK_WATCH_S
        watch.seconds_unchanged(self.path)
        while time.monotonic() < deadline:
            time.sleep(min(1.0, LOCK_WATCH_S / 4))
            if watch.seconds_unchanged(self.path) == 0.0:
                return True
        return False

    def _me(self) -> LockHolder:
        return LockHolder(socket.gethostname(), os.getpid(), time.time(), self._start)

    def _beat(self) -> None:
        file = self._file
        if file is not None:
            host, pid, heartbeat, (job, number) = self._me()
            content = {"host": host, "pid": pid, "heartbeat": heartbeat, "job": job, "start": number}
            text = json.dumps(content).encode()
            with name_write_errors(self.path):
                os.pwrite(file, text, 0)
                os.ftruncate(file, len(text))

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_INTERVAL_S):
            with suppress(OSError):  # the disk may be full or unreachable for a moment
                self._end_if_lost()
                self._beat()
                self._stop_if_asked()

    def _end_if_lost(self) -> None:
        """End this process if another one has taken the lock, which waits until the heartbeat is stale."""
        holder = None if self._file is None else self._read(self._file)
        if holder is not None and not holder.is_process_of(self._me()):
            print(
                f"error: process {holder.pid} on {holder.host} writes to {self.path.parent} now, because this one "
                "showed no sign of life; it ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def _stop_if_asked(self) -> None:
        """Send this process SIGTERM, once, if a later start of its job waits for the lock."""
        if self._asked or not self._start.job:
            return
        with suppress(FileNotFoundError, ValueError, TypeError):
            asking = JobStart(*json.loads(self._request.read_bytes()))
            if asking.follows(self._start):
                self._asked = True
                print(
                    f"job {self._start.job} was started again elsewhere and waits for {self.path.parent}: stopping",
                    file=sys.stderr,
                    flush=True,
                )
                os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def kernel_lock(path: Path) -> Iterator[None]:
    """Wait for a lock between processes and threads of this host; the kernel drops it when its process dies.

    Args:
        path: The lock file; it is created and stays. On a file system without locks nothing is locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        yield
    finally:
        os.close(descriptor)


class FileWatch:
    """Watches files whose holders may die, and remembers for how long each has stayed the same."""

    def __init__(self) -> None:
        """Start with no file."""
        self._seen: dict[Path, tuple[tuple[int, bytes], float]] = {}

    def seconds_unchanged(self, path: Path) -> float:
        """Return for how many seconds this process has seen a file unchanged; 0 at the first look.

        Content and modification time count. Opening a file makes network file systems read it again.

        Raises:
            FileNotFoundError: If it does not exist.
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

    def is_dead(self, path: Path, *, host: str, pid: int, timeout_s: float) -> bool:
        """Return whether the holder of a file is dead, as far as this process has seen.

        Args:
            path: A file that its holder changes regularly.
            host: Host of the holder.
            pid: Process of the holder on that host.
            timeout_s: Seconds without a change after which the holder counts as dead. Also on this host, since
                another process may have the number by now.
        """
        if host == socket.gethostname() and not process_exists(pid):
            return True
        with suppress(FileNotFoundError):
            return self.seconds_unchanged(path) > timeout_s
        return True
