"""A run folder that is mirrored to an S3 server: order, locks, lost nodes, outages."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_servers import FaultyServer

from depth_anything.data.store import ObjectStore
from depth_anything.errors import UserError
from depth_anything.locks import LockHeldError
from depth_anything.model.integrity import save_with_digest
from depth_anything.training import run_mirror
from depth_anything.training.run_mirror import MirrorOptions, RunMirror


@pytest.fixture
def place(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "1")
    return ObjectStore(s3_prefix)


@pytest.fixture(autouse=True)
def kills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that this process sends to itself."""
    sent: list[int] = []
    kill = os.kill

    def record(pid: int, number: int) -> None:
        if pid == os.getpid() and number:
            sent.append(number)
        else:
            kill(pid, number)

    monkeypatch.setattr(os, "kill", record)
    return sent


@pytest.fixture
def mirrors(place: ObjectStore, tmp_path: Path) -> Iterator[Any]:
    """Make mirrors that never upload by themselves; `node` is a machine with a disk of its own."""
    made: list[RunMirror] = []

    def make(node: str = "a", **options: Any) -> RunMirror:
        settings = {"every": 1000.0, "patience": 0.0, "keep": 2, **options}
        made.append(RunMirror(tmp_path / node / "run", place, MirrorOptions(**settings)))
        return made[-1]

    yield make
    for mirror in made:
        lose(mirror)


def checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "loops": {}, "state_dict": {}}
    save_with_digest(state, folder / "checkpoints" / f"step-{step:09d}.ckpt")
    (folder / "saved.json").write_text(json.dumps({"step": step}))


def train_to(mirror: RunMirror, step: int) -> None:
    """Write what a run has written at a step."""
    mirror.folder.mkdir(parents=True, exist_ok=True)
    (mirror.folder / "config.yaml").write_text("stage: teacher\n")
    (mirror.folder / "metrics.csv").write_text(f"step\n{step}\n")
    checkpoint(mirror.folder, step)


def lose(mirror: RunMirror) -> None:
    """End the threads of a mirror as a kill does, without a last upload or release."""
    for event in (mirror._stop, mirror._wake, mirror._closed):
        event.set()
    for thread in mirror._threads:
        thread.join()


def puts(server: FaultyServer) -> list[str]:
    return ["/".join(path.split("/")[3:]) for method, path in server.writes if method == "PUT"]


def test_files_are_uploaded_in_an_order_from_which_a_run_can_continue(
    mirrors: Any, place: ObjectStore, faulty_s3: FaultyServer
) -> None:
    mirror = mirrors()
    mirror.open()
    train_to(mirror, 5)
    checkpoint(mirror.folder, 10)
    (mirror.folder / "saved.json").write_text(json.dumps({"step": 5}))  # 10 is written and not verified yet
    (mirror.folder / ".tmp.half.host.1.ab").write_text("half")
    faulty_s3.writes.clear()
    mirror.sync()
    uploaded = ["config.yaml", "metrics.csv", "checkpoints/step-000000005.ckpt", "saved.json"]
    assert puts(faulty_s3) == uploaded
    faulty_s3.writes.clear()
    mirror.sync()
    assert not faulty_s3.writes  # nothing has changed
    for step in (10, 15):
        train_to(mirror, step)
    (mirror.folder / "model.safetensors").write_bytes(b"model")
    (mirror.folder / "finished.json").write_text("{}")
    mirror.close(complete=True)
    kept = {name for name in place.names() if name.startswith("checkpoints/")}
    assert kept == {"checkpoints/step-000000010.ckpt", "checkpoints/step-000000015.ckpt"}
    last = [name for name in puts(faulty_s3) if name != "lock.json"]
    assert last[-1] == "finished.json" and last.index("checkpoints/step-000000015.ckpt") < last.index(
        "saved.json"
    )
    assert not {"lock.json", "launch.json"} & place.names()


def test_the_best_model_is_never_described_by_the_note_of_another(
    mirrors: Any, place: ObjectStore, faulty_s3: FaultyServer
) -> None:
    mirror = mirrors()
    mirror.open()
    for value in ("1", "2"):
        (mirror.folder / "best.safetensors").write_text(value * int(value))
        (mirror.folder / "best.json").write_text(value)
        faulty_s3.writes.clear()
        mirror.sync()
        names = [(method, path.rpartition("/")[2]) for method, path in faulty_s3.writes]
        assert names[-2:] == [("PUT", "best.safetensors"), ("PUT", "best.json")]
    assert ("DELETE", "best.json") in names and place.read("best.json") == b"2"
    (mirror.folder / "best.json").unlink()
    (mirror.folder / "best.safetensors").unlink()
    mirror.sync()
    assert not {"best.json", "best.safetensors"} & place.names()


def test_another_node_continues_and_the_first_one_notices(mirrors: Any, place: ObjectStore) -> None:
    """A is lost after step 10, B continues to 15 and is lost, and A is back with its old disk."""
    first = mirrors("a")
    first.open()
    train_to(first, 10)
    first.sync()
    checkpoint(first.folder, 11)  # not uploaded any more
    lose(first)
    place.delete("lock.json")
    second = mirrors("b")
    second.open()
    assert [path.name for path in second.folder.glob("checkpoints/*")] == ["step-000000010.ckpt"]
    assert (second.folder / "metrics.csv").read_text() == "step\n10\n"
    train_to(second, 15)
    second.close(complete=False)
    back = mirrors("a")
    back.open()
    assert [path.name for path in back.folder.glob("checkpoints/*")] == ["step-000000015.ckpt"]
    train_to(back, 20)
    lose(back)
    place.delete("lock.json")
    again = mirrors("a")  # nobody else ran in between: what is not uploaded yet is kept
    again.open()
    assert (again.folder / "checkpoints/step-000000020.ckpt").exists()
    again.close(complete=True)
    assert "checkpoints/step-000000020.ckpt" in place.names()


def test_a_run_that_is_lost_before_its_first_checkpoint_is_uploaded_starts_again(
    mirrors: Any, place: ObjectStore
) -> None:
    """Its metrics alone would look as if a checkpoint had been lost."""
    first = mirrors("a")
    first.open()
    train_to(first, 10)
    (first.folder / "saved.json").unlink()
    first.sync()
    assert place.names() >= {"config.yaml", "metrics.csv"}
    lose(first)
    place.delete("lock.json")
    second = mirrors("b")
    second.open()
    assert sorted(path.name for path in second.folder.iterdir()) == ["config.yaml", "mirror.json"]


def test_a_fetch_that_was_interrupted_begins_again(mirrors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mirrors("a")
    first.open()
    train_to(first, 10)
    first.close(complete=True)
    second = mirrors("b")
    with monkeypatch.context() as patched:
        patched.setattr(second.store, "download", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            second.open()
    third = mirrors("b")
    third.open()
    assert (third.folder / "checkpoints/step-000000010.ckpt").exists()


def test_a_start_that_ends_between_its_two_marks_keeps_what_is_not_uploaded(
    mirrors: Any, place: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mirrors()
    first.open()
    train_to(first, 10)
    first.close(complete=True)
    train_to(first, 15)
    write = ObjectStore.write

    def interrupt(store: ObjectStore, name: str, data: bytes) -> None:
        if name == "mirror.json":
            raise KeyboardInterrupt
        write(store, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mirrors().open()
    again = mirrors()
    again.open()
    assert (again.folder / "checkpoints/step-000000015.ckpt").exists()


def test_checkpoints_that_the_run_keeps_for_good_stay_in_the_store(mirrors: Any, place: ObjectStore) -> None:
    mirror = mirrors(keep_every=10)
    mirror.open()
    for step in (5, 10, 15, 20, 25):
        train_to(mirror, step)
        mirror.sync()
    kept = sorted(int(name[17:-5]) for name in place.names("checkpoints/"))
    assert kept == [10, 20, 25]


def test_a_damaged_checkpoint_in_the_store_is_passed_over(
    mirrors: Any, place: ObjectStore, capfd: pytest.CaptureFixture[str]
) -> None:
    first = mirrors("a")
    first.open()
    train_to(first, 5)
    train_to(first, 10)
    first.close(complete=True)
    name = "checkpoints/step-000000010.ckpt"
    place.write(name, place.read(name)[:-20])
    second = mirrors("b")
    second.open()
    assert [path.name for path in second.folder.glob("checkpoints/*")] == ["step-000000005.ckpt"]
    assert f"{place.root}/{name} is " in capfd.readouterr().err
    train_to(second, 10)
    second.close(complete=True)
    assert place.holds(name, second.folder / name)  # replaced by the repeated step


def test_a_checkpoint_may_be_a_folder(
    mirrors: Any, place: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sharded ones are. A folder that saved.json does not name yet may be incomplete, and is passed over."""
    monkeypatch.setattr(run_mirror, "find_checkpoint_problem", lambda path: "")
    first = mirrors("a")
    first.open()
    for step in (5, 10, 15):
        train_to(first, step)
        (first.folder / f"checkpoints/step-{step:09d}.ckpt").unlink()
        folder = first.folder / f"checkpoints/step-{step:09d}.ckpt/part"
        folder.mkdir(parents=True)
        (folder / "0.distcp").write_text(str(step))
        first.sync()
    first.close(complete=True)
    kept = sorted(name for name in place.names() if name.startswith("checkpoints/"))
    assert kept == [f"checkpoints/step-{step:09d}.ckpt/part/0.distcp" for step in (10, 15)]
    place.write("checkpoints/step-000000020.ckpt/part/0.distcp", b"20")
    second = mirrors("b")
    second.open()
    assert [path.read_text() for path in second.folder.glob("checkpoints/*/part/*")] == ["15"]


def test_a_second_job_is_refused(mirrors: Any, place: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mirrors("a")
    first.open()
    lose(first)
    with pytest.raises(LockHeldError, match=f"{place.root} is being written by process {os.getpid()} "):
        mirrors("b").open()
    beats = iter(range(100))

    def elsewhere(seconds: float) -> None:
        holder = {"host": "far", "pid": 7, "process": "far/b/n/7.1", "beat": next(beats)}
        place.write("lock.json", json.dumps(holder).encode())

    elsewhere(0)
    monkeypatch.setattr(time, "sleep", elsewhere)
    with pytest.raises(LockHeldError, match="process 7 on far"):
        mirrors("b").open()
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    mirrors("b").open()  # it is not renewed any more


def test_a_later_start_of_the_job_takes_over(
    mirrors: Any, place: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm has lost the node of the earlier start, which lives on and notices when it renews the lock."""
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    slept: list[float] = []

    def elsewhere(seconds: float) -> None:
        """Renew the lock, also once after it was taken."""
        slept.append(seconds)
        if len(slept) < 5:
            holder = {
                "host": "far",
                "pid": 7,
                "process": "far/b/n/7.1",
                "start": ["7", 1],
                "beat": len(slept),
            }
            place.write("lock.json", json.dumps(holder).encode())

    monkeypatch.setattr(time, "sleep", elsewhere)
    for restart in ("0", "1"):
        slept.clear()
        elsewhere(0)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        with pytest.raises(LockHeldError):
            mirrors("b").open()
    slept.clear()
    elsewhere(0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    mirrors("b").open()
    assert slept[-1] >= 2 * run_mirror.LOCK_STALE_S / 4 and len(slept) == 5
    assert json.loads(place.read("lock.json"))["start"] == ["7", 2]


def test_the_run_of_a_killed_process_of_this_machine_is_free_at_once(
    mirrors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    mirror = mirrors("a")
    mirror._lease.pid = dead.pid
    mirror.open()
    lose(mirror)
    dead.kill()
    dead.wait()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    mirrors("b").open()


def test_a_run_that_is_taken_over_uploads_nothing_more_and_stops(
    mirrors: Any, place: ObjectStore, kills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_mirror, "LOCK_STALE_S", 0.04)
    mirror = mirrors()
    mirror.open()
    while mirror._threads[0].is_alive():  # more than once: a renewal may replace it
        place.write("lock.json", json.dumps({"host": "far", "pid": 7, "process": "far/b/n/7.1"}).encode())
    train_to(mirror, 5)
    with pytest.raises(UserError, match="taken over"):
        mirror.sync()
    with pytest.raises(UserError, match="complete in .*, but not in"):
        mirror.close(complete=True)
    assert kills == [signal.SIGTERM] and "metrics.csv" not in place.names() and "lock.json" in place.names()


def test_an_outage_is_reported_once_and_ends_the_run_only_after_the_patience(
    mirrors: Any,
    place: ObjectStore,
    faulty_s3: FaultyServer,
    kills: list[int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    mirror = mirrors(every=0.01, patience=1000.0)
    mirror.open()
    faulty_s3.write_fault = lambda request, times: "503"
    train_to(mirror, 5)
    while sum("config.yaml" in path for _, path in faulty_s3.writes) < 4:
        time.sleep(0.01)
    assert not kills
    faulty_s3.write_fault = lambda request, times: None
    mirror.close(complete=True)
    errors = capfd.readouterr().err
    assert errors.count("cannot be written (") == 1 and "up to date again" in errors
    assert "checkpoints/step-000000005.ckpt" in place.names()

    impatient = mirrors(every=0.01)
    impatient.open()
    faulty_s3.write_fault = lambda request, times: "503"
    train_to(impatient, 10)
    impatient._threads[1].join(60)
    assert kills == [signal.SIGTERM]
    with pytest.raises(UserError, match="is complete in .*, but not in"):
        impatient.close(complete=True)
    faulty_s3.write_fault = lambda request, times: None
    place.delete("lock.json")
    after = mirrors()
    after.open()
    after.close(complete=True)  # the same command uploads the rest
    assert "checkpoints/step-000000010.ckpt" in place.names()


def test_a_complete_run_waits_until_the_store_answers_again(
    mirrors: Any, place: ObjectStore, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_mirror, "_FIRST_RETRY_S", 0.01)
    mirror = mirrors(patience=1000.0)
    mirror.open()
    train_to(mirror, 5)
    faulty_s3.write_fault = lambda request, times: "503" if "config.yaml" in request and times < 5 else None
    mirror.close(complete=True)
    assert {"config.yaml", "checkpoints/step-000000005.ckpt"} <= place.names()


def test_nothing_is_replaced(mirrors: Any, place: ObjectStore) -> None:
    mirror = mirrors("a")
    mirror.open()
    train_to(mirror, 5)
    mirror.close(complete=True)
    with pytest.raises(UserError, match="name=ANOTHER_NAME.*aws s3 rm"):
        mirrors("b").open(overwrite=True)
    foreign = mirrors("c")
    train_to(foreign, 7)
    with pytest.raises(UserError, match="mirror.folder=FOLDER"):
        foreign.open()
    assert (foreign.folder / "checkpoints/step-000000007.ckpt").exists()
    assert "lock.json" not in place.names()
