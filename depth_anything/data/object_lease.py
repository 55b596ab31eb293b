"""Leases in an object store: one process at a time does a piece of work, until it dies or stops renewing.

A lease is a small object that is created only if there is none. Its holder rewrites it now and then. Clocks are never
compared: a lease is stale when this process has seen it unchanged for long enough. On the holder's own machine its
process is looked up, so that the lease of a killed process is free at once. A process that slept through its lease
notices at the next `renew`, and must then leave the work to its successor.
"""

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from depth_anything.data.store import ObjectStore
from depth_anything.disk import process_exists
from depth_anything.locks import NO_JOB, JobStart


class LeaseHolder(NamedTuple):
    """Who holds a lease: host and process id, for messages, the identity of the process, and the start of its job."""

    host: str
    pid: int
    process: str
    start: JobStart = NO_JOB


_seen: dict[tuple[str, str], tuple[bytes, float]] = {}  # lease → content and when it was first seen
_renewed: dict[tuple[str, str], float] = {}  # lease → when this process renewed it


class ObjectLease:
    """A lease object. Any number of instances may name the same one."""

    def __init__(
        self,
        store: ObjectStore,
        name: str,
        *,
        stale_s: float,
        pid: int | None = None,
        start: JobStart = NO_JOB,
    ) -> None:
        """Name the object; no request is sent.

        Args:
            store: Where it is.
            name: Its name there.
            stale_s: Seconds without a renewal after which others may take it over. It is renewed four times as often.
            pid: The process of this host that holds it; None: this one.
            start: The start of the job of that process.
        """
        self.store, self.name, self.stale_s, self.start = store, name, stale_s, start
        self.pid = os.getpid() if pid is None else pid
        self._key = (store.root, name)

    def acquire(self) -> bool:
        """Take the lease and return True, unless a living process holds it.

        Without conditional writes in the store, two processes that ask at the same time may both get it.
        """
        if self.store.write_new(self.name, self._content()):
            return self._take()
        return self._is_stale() and self.take_over()

    def take_over(self) -> bool:
        """Take the lease from its holder, which notices at its next renewal; False if another process was faster."""
        self.store.delete(self.name)
        return self.store.write_new(self.name, self._content()) and self._take()

    def renew(self, *, force: bool = False) -> bool:
        """Show that the holder is alive; return whether it still holds the lease.

        Args:
            force: Ask the store now; otherwise only when a quarter of `stale_s` has passed.
        """
        now = time.monotonic()
        if not force and now - _renewed.get(self._key, -float("inf")) < self.stale_s / 4:
            return True
        holder = self.holder()
        if holder is None or holder.process != process_identity(self.pid):
            return False
        self.store.write(self.name, self._content())
        return self._take()

    def release(self) -> None:
        """Delete the object, unless another process has taken it over."""
        holder = self.holder()
        if holder is not None and holder.process == process_identity(self.pid):
            self.store.delete(self.name)
        _renewed.pop(self._key, None)

    def holder(self) -> LeaseHolder | None:
        """Return who holds the lease; None if nobody does."""
        content = self.read()
        return None if content is None else _parse_holder(content)

    def seconds_unchanged(self) -> float:
        """Return for how many seconds this process has seen the object unchanged; infinity if there is none."""
        content, now = self.read(), time.monotonic()
        if content is None:
            return float("inf")
        before, since = _seen.get(self._key, (b"", now))
        if before != content:
            since = now
        _seen[self._key] = content, since
        return now - since

    def _is_stale(self) -> bool:
        holder = self.holder()
        if holder is None or is_dead_here(holder):
            return True
        return self.seconds_unchanged() > self.stale_s

    def _take(self) -> bool:
        _seen.pop(self._key, None)
        _renewed[self._key] = time.monotonic()
        return True

    def read(self) -> bytes | None:
        """Return the content, which changes with every renewal; None if there is no lease."""
        with suppress(FileNotFoundError):
            return self.store.read(self.name)
        return None

    def _content(self) -> bytes:
        holder = LeaseHolder(socket.gethostname(), self.pid, process_identity(self.pid), self.start)
        return json.dumps({**holder._asdict(), "beat": secrets.token_hex(8)}).encode()


def _parse_holder(content: bytes) -> LeaseHolder:
    try:
        fields = json.loads(content)
        job, number = fields.get("start", NO_JOB)
        start = JobStart(str(job), int(number))
        return LeaseHolder(str(fields["host"]), int(fields["pid"]), str(fields["process"]), start)
    except (ValueError, KeyError, TypeError):
        return LeaseHolder("", 0, "")


def is_dead_here(holder: LeaseHolder) -> bool:
    """Return whether the holder is a process of this machine that does not run any more."""
    machine, _, _ = holder.process.rpartition("/")
    return machine == _machine() and process_identity(holder.pid) != holder.process


def is_alive_here(holder: LeaseHolder) -> bool:
    """Return whether the holder is a running process of this machine."""
    return bool(holder.process) and process_identity(holder.pid) == holder.process


def process_identity(pid: int) -> str:
    """Return a text that no other process has: host, boot, process namespace, number and start time; "" if it is gone.

    The number alone is not enough: containers on one host have namespaces of their own, and numbers are used again.
    """
    if not process_exists(pid):
        return ""
    start = ""
    with suppress(OSError, IndexError):  # without /proc the number has to do
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{_machine()}/{pid}.{start}"


def _machine() -> str:
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{boot}/{namespace}"
