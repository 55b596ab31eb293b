"""Signals at named places of real runs, of one process and of two: no run hangs, and no unfinished run exits with 0.

recording_train.py lists the PLACES.
"""

import os
import signal
from pathlib import Path

import pytest

from depth_anything import DepthAnything, save_model

from .conftest import StartRanks

BEFORE_FIRST_STEP = [
    "compose", "scenes", "open sets", "build model", "setup", "loader", "read validation", "train start",
]  # fmt: skip
AFTER_LAST_STEP = ["train end", "teardown", "model"]


@pytest.fixture(scope="module")
def start(start_ranks: StartRanks) -> StartRanks:
    """Return the function that starts the ranks of a stage."""
    return start_ranks


@pytest.mark.parametrize(
    ("place", "number"),
    [
        *((place, signal.SIGTERM) for place in BEFORE_FIRST_STEP),
        ("open sets", signal.SIGINT),
        ("read validation", signal.SIGUSR1),
    ],
)
def test_a_signal_before_the_first_step_ends_the_run_at_once(
    start: StartRanks, tmp_path: Path, place: str, number: int
) -> None:
    (run,) = start(tmp_path, "stage=teacher", "steps=6", SIGNAL_AT=f"{place}:0:{number}")
    assert run.code == 128 + number and run.steps == []
    assert run.stderr.count(f"signal {number}") == 1 and "start the same command again" in run.stderr


@pytest.mark.parametrize(
    ("place", "number", "step"),
    [
        ("validation", signal.SIGINT, 3),
        ("validation", signal.SIGTERM, 3),
        ("save", signal.SIGINT, 5),
        ("save", signal.SIGUSR1, 5),
    ],
)
def test_a_signal_during_training_saves_the_step(
    start: StartRanks, tmp_path: Path, place: str, number: int, step: int
) -> None:
    """The whole process group gets the signal, as with Ctrl-C, and the workers continue until the step is saved."""
    given = ("stage=teacher", "steps=8", "validation.every=3")
    if number == signal.SIGUSR1:  # the checkpoint that is being written is the one that the signal asks for
        given = (*given, "checkpoint.asynchronous=true")
    (run,) = start(tmp_path, *given, SIGNAL_AT=f"{place}:0:{number}")
    assert run.code == 128 + number and run.steps == [step], run.stderr
    assert f"step {step}" in run.stderr and "start the same command again" in run.stderr
    if number == signal.SIGINT:  # the checkpoint does not depend on the number
        (run,) = start(tmp_path, *given)
        assert run.code == 0 and run.steps[-1] == 8


def test_a_second_ctrl_c_ends_the_run_at_once(start: StartRanks, tmp_path: Path) -> None:
    (run,) = start(tmp_path, "stage=teacher", "steps=8", SIGNAL_AT=f"save:0:{signal.SIGINT}:0.5")
    assert run.code == 130 and run.steps == []
    (run,) = start(tmp_path, "stage=teacher", "steps=8")
    assert run.code == 0


@pytest.mark.parametrize("place", AFTER_LAST_STEP)
def test_a_signal_after_the_last_step_does_not_stop_the_run(
    start: StartRanks, tmp_path: Path, place: str
) -> None:
    (run,) = start(tmp_path, "stage=teacher", "steps=2", SIGNAL_AT=f"{place}:0:{signal.SIGTERM}")
    assert run.code == 0
    assert len(list(tmp_path.glob("outputs/*/model.safetensors"))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_labeling_stops_at_once_and_releases_its_leases(
    start: StartRanks, tmp_path: Path, number: int
) -> None:
    save_model(DepthAnything("vitt"), tmp_path / "teacher.safetensors")
    teacher = f"teacher={tmp_path / 'teacher.safetensors'}"
    given = ("stage=pseudolabel", teacher, f"labels={tmp_path / 'labels'}")
    (run,) = start(tmp_path, *given, SIGNAL_AT=f"label:0:{number}")
    assert run.code == 128 + number
    assert not list(tmp_path.glob("labels/*/.*.lease"))
    (run,) = start(tmp_path, *given)
    assert run.code == 0, run.stderr


def test_a_job_that_cannot_be_requeued_is_saved(start: StartRanks, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    at = {"SIGNAL_AT": f"save:0:{signal.SIGUSR1}", "SLURM_JOB_ID": "777", "PATH": str(tmp_path / "bin")}
    (run,) = start(tmp_path, "stage=teacher", "steps=8", **at)
    assert run.code == 138 and run.steps == [5]
    assert "not queued again" in run.stderr and "Errno" not in run.stderr


@pytest.mark.parametrize(
    ("place", "rank", "number", "during"),
    [
        ("compose", 1, signal.SIGTERM, False),
        ("open sets", 0, signal.SIGINT, False),
        ("setup", 1, signal.SIGTERM, False),
        ("read validation", 1, signal.SIGINT, False),
        ("train start", 0, signal.SIGTERM, False),
        ("validation", 1, signal.SIGTERM, True),
        ("save", 0, signal.SIGINT, True),
    ],
)
def test_two_ranks_stop_together_when_one_gets_a_signal(
    start: StartRanks, tmp_path: Path, place: str, rank: int, number: int, during: bool
) -> None:
    given = ("stage=teacher", "steps=32", "validation.every=3")
    runs = start(tmp_path, *given, ranks=2, SIGNAL_AT=f"{place}:{rank}:{number}")
    assert [run.code for run in runs] == [128 + number, 128 + number], [run.stderr for run in runs]
    assert bool(runs[0].steps) == during
    assert (
        not during or runs[0].steps[-1] <= 15
    )  # the signal comes by step 5; they compare every tenth, at least
    assert f"signal {number}" in runs[0].stderr and "start the same command again" in runs[0].stderr


@pytest.mark.parametrize("place", ["train end", "teardown"])
def test_a_signal_after_the_last_step_does_not_stop_two_ranks(
    start: StartRanks, tmp_path: Path, place: str
) -> None:
    given = ("stage=teacher", "steps=2")
    runs = start(tmp_path, *given, ranks=2, SIGNAL_AT=f"{place}:1:{signal.SIGTERM}")
    assert [run.code for run in runs] == [0, 0]
    assert len(list(tmp_path.glob("outputs/*/model.safetensors"))) == 1


def test_a_rank_that_is_killed_after_saving_changes_nothing(start: StartRanks, tmp_path: Path) -> None:
    """srun ends the other ranks as soon as one has ended, and they may still be waiting for it."""
    at = {"STOP_AT": "10:0", "SIGNAL_AT": f"last barrier:1:{signal.SIGKILL}"}
    runs = start(tmp_path, "stage=teacher", "steps=32", ranks=2, **at)
    assert [run.code for run in runs] == [143, -signal.SIGKILL]
    assert 10 <= runs[0].steps[-1] <= 20 and runs[0].stderr.count("start the same command again") == 1


@pytest.mark.parametrize("why", ["read-only", "locked"])
def test_an_error_of_rank_0_stops_the_other_rank(start: StartRanks, tmp_path: Path, why: str) -> None:
    """Rank 1 must not wait two minutes for a rank 0 that cannot write to the run folder."""
    folder = tmp_path / "outputs" / "teacher-vitt-tiny"
    if why == "read-only":  # also for root
        folder.parent.mkdir()
        folder.write_text("a file")
    else:
        from depth_anything.locks import FileLock

        lock = FileLock(folder / "lock.json", fix="")
        lock.acquire()
    runs = start(tmp_path, "stage=teacher", "steps=2", ranks=2)
    if why == "locked":
        lock.release()
    for run in runs:
        assert run.code != 0
        assert str(folder) in run.stderr and "two minutes" not in run.stderr
        assert why == "read-only" or f"process {os.getpid()}" in run.stderr


@pytest.mark.parametrize("way", ["killed", "numpy", "torch", "python"])
def test_a_dead_worker_is_named_and_the_step_saved(start: StartRanks, tmp_path: Path, way: str) -> None:
    """Sample 29 is in the batch of step 8, which Lightning fetches before step 7; a kill may lose one more batch.

    Killed workers are replaced three times.
    """
    given = ("stage=teacher", "steps=9", "workers=2", "checkpoint.every=100")
    (run,) = start(tmp_path, *given, WORKER=f"{way}:29")
    assert run.code == 1, run.stderr
    assert run.steps == [6] or (way == "killed" and run.steps in ([2], [4]))
    for word in ("worker ", "memory", "workers=1", "micro_batch=2"):
        assert word in run.stderr
    assert run.stderr.count("SIGKILL") == (4 if way == "killed" else 0)
    if way == "killed":  # the only one that ends outside of Python
        (run,) = start(tmp_path, *given)
        assert run.code == 0
