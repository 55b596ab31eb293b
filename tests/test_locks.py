"""Locks work across processes and hosts, and locks of dead holders are free, with any clock."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from depth_anything import locks
from depth_anything.disk import file_system_time, process_exists
from depth_anything.locks import FileLock, FileWatch, JobStart, LockHeldError, kernel_lock

HOLDER = """
import sys, time
from pathlib import Path
from depth_anything.locks import FileLock
FileLock(Path(sys.argv[1]) / "lock.json", fix="type name=ANOTHER_NAME").acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(LockHeldError, match=f"process {holder.pid} on {socket.gethostname()}.*name="):
        lock_of(tmp_path).acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    lock = lock_of(tmp_path)
    lock.acquire()  # at once: the kernel dropped the dead holder's lock
    lock.release()


def elsewhere(path: Path, *, clock: float = 0.0, written: float = 0.0, **start: Any) -> None:
    """Write the heartbeat of another host `written` seconds ago, whose clock is `clock` seconds ahead."""
    sign = {"host": "elsewhere", "pid": 1, "heartbeat": time.time() + clock - written, **start}
    path.write_text(json.dumps(sign))
    os.utime(path, (time.time() - written, time.time() - written))


def lock_of(folder: Path) -> FileLock:
    return FileLock(folder / "lock.json", fix="type name=ANOTHER_NAME")


@pytest.fixture
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_WATCH_S", 0.2)


YEAR = 365 * 86400.0


def test_a_fresh_heartbeat_of_another_host_refuses_and_an_old_one_does_not(tmp_path: Path) -> None:
    elsewhere(tmp_path / "lock.json")
    with pytest.raises(LockHeldError, match="process 1 on elsewhere"):
        lock_of(tmp_path).acquire()
    elsewhere(tmp_path / "lock.json", written=300)
    lock = lock_of(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize(
    ("clock", "written"),
    [(YEAR, 0.0), (0.0, -YEAR), (YEAR, 300.0), (-120.0, 0.0), (-YEAR, 300.0), (120.0, 300.0)],
)
def test_a_dead_holder_is_detected_with_any_clock(
    tmp_path: Path, short_watch: None, clock: float, written: float
) -> None:
    """A lock from a clock a year ahead once refused for a year."""
    elsewhere(tmp_path / "lock.json", clock=clock, written=written)
    lock = lock_of(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("clock", [-120.0, 120.0, YEAR, -YEAR])
def test_a_living_holder_is_detected_with_any_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    """Two hosts with clocks two minutes apart once wrote at the same time."""
    elsewhere(tmp_path / "lock.json", clock=clock)
    # It beats while this process sleeps between two looks.
    monkeypatch.setattr(locks.time, "sleep", lambda s: elsewhere(tmp_path / "lock.json", clock=clock + 10))
    with pytest.raises(LockHeldError, match="process 1 on elsewhere.*name="):
        lock_of(tmp_path).acquire()


def test_without_kernel_locks_the_process_decides(
    tmp_path: Path, short_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    first = lock_of(tmp_path)
    first.acquire()
    with pytest.raises(LockHeldError, match=f"process {os.getpid()} on"):
        lock_of(tmp_path).acquire()
    sign = json.loads((tmp_path / "lock.json").read_text())
    first.release()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "lock.json").write_text(json.dumps(sign | {"pid": dead.pid}))
    lock = lock_of(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize(
    "torn", ["", "{", "[1]", '{"host": "elsewhere"}', '{"host": "x", "pid": "y", "heartbeat": 0}']
)
def test_an_invalid_lock_file_is_free(tmp_path: Path, torn: str) -> None:
    (tmp_path / "lock.json").write_text(torn)
    lock = lock_of(tmp_path)
    lock.acquire()
    lock.release()


def test_a_process_releases_the_lock_at_exit(tmp_path: Path) -> None:
    """A job that is requeued on another host need not wait until the heartbeat is stale."""
    code = HOLDER.replace("time.sleep(600)", "sys.exit(143)")
    assert (
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL).returncode
        == 143
    )
    assert (tmp_path / "lock.json").read_text() == ""


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Loader workers outlive a killed run by seconds; the run must be able to start again at once."""
    code = HOLDER.replace(
        "time.sleep(600)", "import os\nif os.fork():\n    os.kill(os.getpid(), 9)\ntime.sleep(5)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    holder.wait()
    lock = lock_of(tmp_path)
    lock.acquire()
    lock.release()


STARTS = """
import sys, time
from pathlib import Path
from depth_anything import locks
locks.HEARTBEAT_INTERVAL_S = 0.05
start = locks.JobStart(sys.argv[2], int(sys.argv[3]))
lock = locks.FileLock(Path(sys.argv[1]) / "lock.json", fix="type name=ANOTHER_NAME", start=start)
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def start_of_job(folder: Path, job: str, number: int) -> "subprocess.Popen[str]":
    """Start a process that holds the lock until it is killed, and wait until it does."""
    command = [sys.executable, "-c", STARTS, str(folder), job, str(number)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


@pytest.fixture
def short_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = time.sleep
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: sleep(0.02))


def test_an_earlier_start_of_the_job_is_asked_to_stop(
    tmp_path: Path, short_sleep: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Slurm has lost its node and started the job again elsewhere: SIGTERM saves the run, then the lock is free."""
    holder = start_of_job(tmp_path, "7_1", 1)
    lock = FileLock(tmp_path / "lock.json", fix="", start=JobStart("7_1", 2))
    lock.acquire()
    assert holder.wait() == -signal.SIGTERM
    _, printed = holder.communicate()
    assert printed.count("job 7_1 was started again elsewhere") == 1
    assert f"process {holder.pid} on" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
    content = json.loads((tmp_path / "lock.json").read_text())
    assert (content["job"], content["start"]) == ("7_1", 2)
    lock.release()


@pytest.mark.parametrize("start", [("7_1", 1), ("7_1", 0), ("8", 2), ("", 2)])
def test_other_jobs_and_later_starts_are_not_asked(
    tmp_path: Path, short_sleep: None, start: tuple[str, int]
) -> None:
    holder = start_of_job(tmp_path, "7_1", 1)
    with pytest.raises(LockHeldError):
        FileLock(tmp_path / "lock.json", fix="", start=JobStart(*start)).acquire()
    (tmp_path / "lock-request.json").write_text(json.dumps(start))
    before = (tmp_path / "lock.json").read_text()
    while (tmp_path / "lock.json").read_text() in ("", before):  # until it has looked at the request
        pass
    before = (tmp_path / "lock.json").read_text()
    while (tmp_path / "lock.json").read_text() in ("", before):
        pass
    assert holder.poll() is None
    holder.kill()
    holder.communicate()


def test_only_jobs_are_started_again() -> None:
    assert JobStart("7", 1).follows(JobStart("7", 0))
    assert not JobStart("", 1).follows(JobStart("", 0))


def test_a_start_waits_for_an_earlier_one_only_so_long(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on another host, writes its heartbeat and does not stop."""
    beat = lambda: elsewhere(tmp_path / "lock.json", job="7", start=0)  # noqa: E731
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        waited.append(seconds)
        beat()

    monkeypatch.setattr(locks.time, "sleep", sleep)
    monkeypatch.setattr(locks, "TAKEOVER_WAIT_S", 30.0)
    beat()
    with pytest.raises(LockHeldError, match="process 1 on elsewhere"):
        FileLock(tmp_path / "lock.json", fix="", start=JobStart("7", 1)).acquire()
    assert locks.TAKEOVER_WAIT_S <= sum(waited) <= locks.TAKEOVER_WAIT_S + 2


def test_a_start_takes_the_lock_of_an_earlier_one_whose_node_is_dead(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last heartbeat is recent; another job is refused at once, a later start waits until it is stale."""
    written = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        written[0] += seconds
        elsewhere(tmp_path / "lock.json", written=written[0], job="7", start=0)

    monkeypatch.setattr(locks.time, "sleep", sleep)
    sleep(5.0)
    with pytest.raises(LockHeldError):
        FileLock(tmp_path / "lock.json", fix="", start=JobStart("8", 1)).acquire()
    lock = FileLock(tmp_path / "lock.json", fix="", start=JobStart("7", 1))
    lock.acquire()
    lock.release()
    assert written[0] >= locks.LOCK_STALE_S


def test_a_holder_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    """It was suspended on a file system without locks, and another process took over."""
    holder = start_of_job(tmp_path, "", 0)
    elsewhere(tmp_path / "new.json", pid=holder.pid)  # numbers of two hosts may be equal
    (tmp_path / "lock.json").write_text((tmp_path / "new.json").read_text())
    _, printed = holder.communicate(timeout=60)
    assert holder.returncode == 1 and f"process {holder.pid} on elsewhere writes to" in printed
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "elsewhere"  # and keeps its lock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of this process, set by the test."""
    now = [1000.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    return now


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("stamp", [0, 4_000_000_000], ids=["1970", "2096"])
def test_a_holder_on_another_host_is_dead_if_its_file_does_not_change(
    tmp_path: Path, clock: list[float], stamp: int
) -> None:
    path, watch = tmp_path / "lease", FileWatch()
    path.write_text("a")
    os.utime(path, (stamp, stamp))
    holder: dict[str, Any] = {"host": "elsewhere", "pid": 1, "timeout_s": 60.0}
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


def test_a_holder_on_this_host_is_looked_up(tmp_path: Path, clock: list[float]) -> None:
    path, watch = tmp_path / "lease", FileWatch()
    path.write_text("a")
    here = socket.gethostname()
    assert process_exists(os.getpid())
    assert watch.is_dead(path, host=here, pid=dead_pid(), timeout_s=60.0)
    assert not watch.is_dead(path, host=here, pid=os.getpid(), timeout_s=60.0)
    clock[0] += 61
    assert watch.is_dead(
        path, host=here, pid=os.getpid(), timeout_s=60.0
    )  # the number is another process's by now


def test_a_missing_file_has_no_holder(tmp_path: Path, clock: list[float]) -> None:
    watch = FileWatch()
    assert watch.is_dead(tmp_path / "lease", host="elsewhere", pid=1, timeout_s=60.0)
    with pytest.raises(FileNotFoundError):
        watch.seconds_unchanged(tmp_path / "lease")


def test_the_file_systems_time_is_that_of_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this host's clock has no part in it
    before = file_system_time(tmp_path)
    (tmp_path / "new").touch()
    assert before <= (tmp_path / "new").stat().st_mtime < before + 60
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_heartbeat_is_faster_than_its_timeout() -> None:
    assert locks.LOCK_STALE_S > locks.HEARTBEAT_INTERVAL_S * 3


def test_a_kernel_lock_lets_one_thread_in_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []

    def work() -> None:
        for _ in range(20):
            with kernel_lock(tmp_path / ".lock"):
                inside.append(1)
                assert sum(inside) == 1
                inside.append(-1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 160


def test_kernel_lock_works_without_support_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with kernel_lock(tmp_path / ".lock"):
        pass
