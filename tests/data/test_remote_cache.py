"""Addresses without ranges: whole shards in a bounded cache that processes share."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_servers import FaultyServer
from shard_builders import make, records

from depth_anything.data import cache, remote, retry
from depth_anything.data.reader import Records, ShardReader
from depth_anything.data.shards import open_set
from depth_anything.data.tars import BadRecord, ShardError, StorageUnavailable, write_shard

SIZE = 20480  # of each shard, bytes


@pytest.fixture(autouse=True)
def environment(clean_remote_state, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE_GB", str(3 * SIZE / 1e9))
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "1")


@pytest.fixture
def command(tmp_path):
    """A set of eight shards behind a command that logs its requests."""
    made = make(tmp_path / "set", shards=8, size=2000)
    assert {shard.bytes for shard in made.shards} == {SIZE}
    script = tmp_path / "bring"
    script.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/asked\nexec cat "{tmp_path}$1"\n')
    script.chmod(0o755)
    return f"pipe:{script} /set"


def asked(tmp_path):
    return [line for line in (tmp_path / "asked").read_text().split() if line.endswith(".tar")]


def kept(tmp_path):
    return sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())


def test_pipe_is_run_once_per_shard(tmp_path, command, capfd):
    read = Records(open_set(command))
    for index in (3, 0, 4):
        assert read.read("set/000001", index) == records("000001", size=2000)[index]
    assert read.read("set/000002", 1) == records("000002", size=2000)[1]
    assert asked(tmp_path) == ["/set/000001.tar", "/set/000002.tar"]
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        str(tmp_path / "cache") in line and f"{8 * SIZE / 1e9:.3f} GB" in line and "again and again" in line
    )
    assert str(tmp_path) not in line.split("whole shards")[0]  # a command may hold secrets


def test_least_recently_read_copy_is_deleted(tmp_path, command):
    read = Records(open_set(command))
    for number in (0, 1, 2, 0, 3):  # reading 3 deletes 1
        read.read(f"set/{number:06d}", 0)
        assert kept(tmp_path) <= 3 * SIZE
        time.sleep(0.01)
    for number in (0, 2, 3):
        read.read(f"set/{number:06d}", 0)
    assert len(asked(tmp_path)) == 4
    read.read("set/000001", 0)
    assert len(asked(tmp_path)) == 5


def test_shards_of_the_same_name_do_not_collide(tmp_path, command):
    other = Path(tmp_path, "other")
    write_shard(other / "000001.tar", records("000007", size=2000))
    one, two = ShardReader(), ShardReader()
    assert one.read(f"{command}/000001.tar", 0) == records("000001", size=2000)[0]
    assert two.read(f"pipe:cat {other}/000001.tar", 0) == records("000007", size=2000)[0]
    assert two.read(f"pipe:cat {tmp_path}/set/000001.tar", 0) == records("000001", size=2000)[0]
    assert len(asked(tmp_path)) == 1  # the same tar from another address is in the cache
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def read_all(read, number):
    found = [read.read(f"set/{(number + i) % 8:06d}", i % 5) for i in range(16)]
    return found == [records(f"{(number + i) % 8:06d}", size=2000)[i % 5] for i in range(16)]


@pytest.mark.parametrize(("method", "processes"), [("fork", 4), ("spawn", 2)])  # a spawned one takes seconds
def test_processes_share_the_cache(tmp_path, command, method, processes):
    """They read more shards than the cache may hold: all can read, and the limit holds."""
    read = Records(open_set(command))
    context = multiprocessing.get_context(method)
    with context.Pool(processes) as pool:
        running = pool.map_async(functools.partial(read_all, read), range(0, 8, 2))
        most = 0
        done = False
        while not done:
            done = running.ready()  # one more look after the last read
            if (tmp_path / "cache").exists():
                sizes = [p.stat().st_size for p in existing(tmp_path / "cache")]
                most = max(most, sum(sizes))
            time.sleep(0.002)
        assert running.get() == [True] * 4
    assert 0 < most <= 3 * SIZE
    assert not list((tmp_path / "cache").glob(".tmp.*"))


def existing(folder):
    """List files of a folder while other processes delete some."""

    class Found:
        def __init__(self, size):
            self.st_size = size

        def stat(self):
            return self

    found = []
    for path in folder.iterdir():
        try:
            found.append(Found(path.stat().st_size))
        except FileNotFoundError:
            pass
    return found


def test_one_process_downloads_and_the_others_wait(tmp_path, command, monkeypatch):
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE_GB", "1")
    read = Records(open_set(command))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(read.read, [("set/000001", i) for i in (0, 1, 2, 3)], chunksize=1)
    assert asked(tmp_path) == ["/set/000001.tar"]


def test_limit_smaller_than_a_shard(command, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE_GB", str((SIZE - 1) / 1e9))
    with pytest.raises(StorageUnavailable, match="DEPTH_ANYTHING_CACHE_GB=4 "):
        Records(open_set(command)).read("set/000001", 0)
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE_GB", "-1")
    with pytest.raises(ValueError, match="DEPTH_ANYTHING_CACHE_GB=-1 "):
        Records(open_set(command)).read("set/000001", 0)


def test_full_disk_stops_the_run(command, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageUnavailable, match="No space left on device.*DEPTH_ANYTHING_CACHE=FOLDER"):
        Records(open_set(command)).read("set/000001", 0)
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_file_system_without_fallocate(command, tmp_path, monkeypatch):
    def unknown(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    assert Records(open_set(command)).read("set/000001", 0) == records("000001", size=2000)[0]


@pytest.mark.parametrize("damage", ["bytes", "size", "gone"])
def test_damaged_copy_is_downloaded_again(tmp_path, command, damage):
    read = Records(open_set(command))
    read.read("set/000001", 0)
    (copy,) = (tmp_path / "cache").glob("*.tar")
    {
        "bytes": lambda: copy.write_bytes(bytes(SIZE)),
        "size": lambda: copy.write_bytes(b"x"),
        "gone": copy.unlink,
    }[damage]()
    assert read.read("set/000001", 2) == records("000001", size=2000)[2]
    assert len(asked(tmp_path)) == 2


PROGRAM = """
import os, signal, sys
from depth_anything.data.reader import ShardReader
from depth_anything.data import cache
replace = os.replace
os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
ShardReader().read(sys.argv[1], 0)
"""


def test_killed_while_copying(tmp_path, command):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{command}/000001.tar"],
        env={**os.environ, "PYTHONPATH": str(root)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache").glob(".tmp.*"))) == 1 and not list(
        (tmp_path / "cache").glob("*.tar")
    )
    read = Records(open_set(command))
    assert read.read("set/000001", 0) == records("000001", size=2000)[0]
    assert not list((tmp_path / "cache").glob(".tmp.*"))


def test_failing_commands(tmp_path, command, monkeypatch, capfd):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    good = f"{tmp_path}/set"
    cases = {
        f"pipe:TOKEN=sesame; head -c 3000 {good}/000001.tar; exit 3; cat ": "exited with 3",
        f"pipe:TOKEN=sesame; head -c 3000 {good}/000001.tar; sleep 120; cat ": "0.2 s",
        "pipe:TOKEN=sesame; no-such-program ": "exited with 127",
    }  # the last one keeps the timeout of a minute
    table = ShardReader().index(f"{good}/000001.tar")
    for address, said in cases.items():
        monkeypatch.setenv("DEPTH_ANYTHING_TIMEOUT", "0.2" if "sleep" in address else "60")
        with pytest.raises(StorageUnavailable, match=said) as error:
            remote.fetch_range(f"{address}/000001.tar", 512, 10, table=table, total_bytes=None)
        assert "000001.tar" in str(error.value)
        assert "sesame" not in str(error.value)
    assert "sesame" not in capfd.readouterr().err
    short = f"pipe:head -c 3000 {good}/000001.tar; true "
    with pytest.raises(ShardError, match=f"3000 of {SIZE} bytes"):
        remote.fetch_range(f"{short}/000001.tar", 512, 10, table=table, total_bytes=None)
    other = f"pipe:cat {good}/000002.tar; true "
    with pytest.raises(ShardError, match="000001.tar"):
        remote.fetch_range(f"{other}/000001.tar", 512, 10, table=table, total_bytes=None)
    longer = f"pipe:cat {good}/000001.tar {good}/000002.tar; true "
    with pytest.raises(ShardError, match=f"{SIZE} bytes"):
        remote.fetch_range(f"{longer}/000001.tar", 512, 10, table=table, total_bytes=None)
    assert not list((tmp_path / "cache").glob("*.tar")) and not list((tmp_path / "cache").glob(".tmp.*"))


def test_unknown_openers():
    with pytest.raises(ShardError, match="quux.*http, https, s3, gs or pipe"):
        open_set("quux://host/set")


def test_http_failure_while_a_shard_is_copied(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    make(tmp_path / "set", size=2000)

    def fault(path, times):
        return {0: "whole", 1: "cut"}.get(times, "whole") if path.endswith("1.tar") else None

    with FaultyServer(tmp_path) as server:
        server.fault = fault
        read = Records(open_set(f"{server.address}/set"))
        assert [read.read("set/000001", i) for i in range(5)] == records("000001", size=2000)
        assert len([path for path, _ in server.seen if path.endswith("1.tar")]) == 3
        stderr = capfd.readouterr().err
        assert "cut short" in stderr and str(tmp_path / "cache") in stderr
        server.fault = lambda path, times: "whole"
        data = bytearray((tmp_path / "set" / "000002.tar").read_bytes())
        data[700] ^= 1
        (tmp_path / "set" / "000002.tar").write_bytes(data)
        with pytest.raises(BadRecord, match="000002.tar"):
            read.read("set/000002", 0)
    assert cache.cache_folder() == tmp_path / "cache"
