"""Holders of files are told alive or dead without comparing clocks."""

import os
import socket
import subprocess
import sys

import pytest

from depth_anything import locks
from depth_anything.locks import FileWatch, file_system_time, process_exists


@pytest.fixture
def clock(monkeypatch):
    """This process's own clock, which the test turns."""
    now = [1000.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    return now


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("stamp", [0, 4_000_000_000], ids=["1970", "2096"])
def test_a_holder_elsewhere_is_dead_when_its_file_stays_the_same(tmp_path, clock, stamp):
    path, watch = tmp_path / "lease", FileWatch()
    path.write_text("a")
    os.utime(path, (stamp, stamp))
    holder = {"host": "elsewhere", "pid": 1, "still": 60.0}
    assert not watch.is_dead(path, **holder)
    clock[0] += 59
    assert not watch.is_dead(path, **holder)
    os.utime(path, (stamp + 1, stamp + 1))  # a sign of life
    clock[0] += 59
    assert not watch.is_dead(path, **holder)
    path.write_text("b")
    os.utime(path, (stamp + 1, stamp + 1))  # of the same time: a coarse clock
    clock[0] += 60
    assert not watch.is_dead(path, **holder)
    clock[0] += 61
    assert watch.is_dead(path, **holder)


def test_a_holder_of_this_host_is_looked_up(tmp_path, clock):
    path, watch = tmp_path / "lease", FileWatch()
    path.write_text("a")
    here = socket.gethostname()
    assert process_exists(os.getpid())
    assert watch.is_dead(path, host=here, pid=dead_pid(), still=60.0)
    assert not watch.is_dead(path, host=here, pid=os.getpid(), still=60.0)
    clock[0] += 61
    assert watch.is_dead(
        path, host=here, pid=os.getpid(), still=60.0
    )  # the number is another process's by now


def test_a_file_that_is_gone_is_held_by_nobody(tmp_path, clock):
    watch = FileWatch()
    assert watch.is_dead(tmp_path / "lease", host="elsewhere", pid=1, still=60.0)
    with pytest.raises(FileNotFoundError):
        watch.seconds_unchanged(tmp_path / "lease")


def test_the_file_systems_time_is_that_of_a_new_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.time, "time", lambda: 0.0)  # this host's clock has no part in it
    before = file_system_time(tmp_path)
    (tmp_path / "new").touch()
    assert before <= (tmp_path / "new").stat().st_mtime < before + 60
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
