"""Leases of label shards: one holder at a time; the lease of a dead process is free."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from depth_anything import locks
from depth_anything.locks import FileWatch
from depth_anything.training.lease import LEASE_STALE_S, Lease


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Lease, "_watch", FileWatch())
    return now


def test_one_process_holds_a_shard(tmp_path: Path, clock: list[float]) -> None:
    lease = Lease(tmp_path / ".a.lease", pid=os.getpid())
    assert lease.acquire() and not Lease(tmp_path / ".a.lease", pid=os.getpid()).acquire()
    lease.release()
    assert not list(tmp_path.iterdir()) and lease.acquire()


def test_the_lease_of_a_dead_process_of_this_host_is_free(tmp_path: Path, clock: list[float]) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert Lease(tmp_path / ".a.lease", pid=dead.pid).acquire()
    assert Lease(tmp_path / ".a.lease", pid=os.getpid()).acquire()


@pytest.mark.parametrize("ahead", [0.0, -120.0, 120.0, 365 * 86400.0])
@pytest.mark.parametrize("content", [json.dumps({"host": "elsewhere", "pid": 1}), "", "[]"])
def test_the_clock_of_another_host_does_not_matter(
    tmp_path: Path, clock: list[float], ahead: float, content: str
) -> None:
    """A clock a year ahead must not hold a lease for a year, nor one two minutes behind lose it."""
    path = tmp_path / ".a.lease"
    path.write_text(content)
    stamp = path.stat().st_mtime + ahead
    os.utime(path, (stamp, stamp))
    mine = Lease(path, pid=os.getpid())
    assert not mine.acquire()
    clock[0] += LEASE_STALE_S - 1
    os.utime(path, (stamp + 1, stamp + 1))  # its holder renews it
    assert not mine.acquire()
    clock[0] += LEASE_STALE_S + 1
    assert mine.acquire()


def test_a_lease_that_another_process_has_taken_over_is_unchanged(tmp_path: Path, clock: list[float]) -> None:
    lease = Lease(tmp_path / ".a.lease", pid=os.getpid())
    assert lease.acquire()
    other = json.dumps({"host": "elsewhere", "pid": os.getpid()})
    lease.path.write_text(other)
    os.utime(lease.path, (1, 1))
    lease.renew()
    lease.release()
    assert lease.path.read_text() == other and lease.path.stat().st_mtime == 1
    assert socket.gethostname() != "elsewhere"
