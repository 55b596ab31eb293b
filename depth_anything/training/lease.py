"""Leases of label shards: a shard is labeled by one process at a time, unless that process dies."""

import json
import os
import socket
from pathlib import Path
from typing import Union

from depth_anything.data.labels import LabelSetWriter
from depth_anything.data.object_lease import ObjectLease
from depth_anything.data.store import ObjectStore
from depth_anything.disk import write_new
from depth_anything.locks import FileWatch

LEASE_STALE_S = 120.0
OBJECT_STALE_S = 600.0
"""In an object store: each renewal is a request, and a lease is taken before the first batch of its shard is due."""
_SUFFIX = ".lease"


ShardLease = Union["Lease", ObjectLease]


def shard_lease(labels: LabelSetWriter, shard: str, *, pid: int) -> ShardLease:
    """Return the lease of a label shard; it expires when the process `pid` of this host dies."""
    name = f".{shard}{_SUFFIX}"
    if isinstance(labels.store, ObjectStore):
        return ObjectLease(labels.store, name, stale_s=OBJECT_STALE_S, pid=pid)
    return Lease(Path(labels.root) / name, pid=pid)


def release_leases(labels: LabelSetWriter, *, pid: int) -> None:
    """Release the leases of a label set that a process holds."""
    for name in _lease_names(labels):
        shard_lease(labels, name[1 : -len(_SUFFIX)], pid=pid).release()


def remove_leases(labels: LabelSetWriter) -> None:
    """Remove all leases of a label set that is finished; a process that was killed leaves one."""
    for name in _lease_names(labels):
        labels.store.delete(name)


def _lease_names(labels: LabelSetWriter) -> list[str]:
    return [name for name in labels.store.names(".") if name.endswith(_SUFFIX)]


class Lease:
    """A file in the label folder that names the process labeling a shard; it expires when that process dies."""

    _watch = FileWatch()  # of all lease files that this process has seen

    def __init__(self, path: Path, *, pid: int) -> None:
        """Name the file; the lease expires when the process `pid` of this host dies."""
        self.path, self.pid = path, pid

    def acquire(self) -> bool:
        """Take the lease and return True, unless a living process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if write_new(self.path, self._content().encode()):
            return True
        if not self._is_expired():
            return False
        self.path.unlink(missing_ok=True)
        return write_new(self.path, self._content().encode())

    def renew(self, *, force: bool = False) -> bool:
        """Update the modification time, which shows that the holder is alive.

        Returns True in any case: a rename publishes a shard as a whole, so a lost lease does no harm.
        """
        if self._is_mine():
            os.utime(self.path)
        return True

    def release(self) -> None:
        """Remove the file, unless another process has taken the lease over."""
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _content(self) -> str:
        return json.dumps({"host": socket.gethostname(), "pid": self.pid})

    def _is_mine(self) -> bool:
        try:
            return self.path.read_text() == self._content()
        except FileNotFoundError:
            return False

    def _is_expired(self) -> bool:
        try:
            holder = json.loads(self.path.read_text())
            host, pid = str(holder["host"]), int(holder["pid"])
        except FileNotFoundError:
            return True
        except (ValueError, KeyError, TypeError):
            host, pid = "", 0
        # On this host the process can be looked up, but its number may belong to another process by now.
        timeout_s = LEASE_STALE_S if host != socket.gethostname() else 10 * LEASE_STALE_S
        return self._watch.is_dead(self.path, host=host, pid=pid, timeout_s=timeout_s)
