"""A rank that hangs is told from those that wait for it, and slow phases are no hangs."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from depth_anything.training import watchdog
from depth_anything.training.heartbeat import Beat, Heartbeat
from depth_anything.training.watchdog import (
    HANG_EXIT_CODE,
    Diagnosis,
    Peer,
    RankStore,
    Watchdog,
    diagnose,
    format_report,
    kill_process,
    process_state,
)


def beat(number: int, *, batch: int = 7, phase: str = "backward", ratio: float = 1.0, **more: Any) -> Beat:
    values: dict[str, Any] = {"step": 7, "collective": False, "place": "a.py:3 in f", **more}
    return Beat(number=number, batch=batch, phase=phase, ratio=ratio, **values)


ALIVE, LATER = beat(1), beat(4)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # A process that does not run publishes the same beat; its position does not matter.
        ([ALIVE, ALIVE], [LATER, ALIVE], Diagnosis([1], [], [0], 0)),
        ([ALIVE, beat(9, batch=9)], [LATER, beat(9, batch=9)], Diagnosis([1], [], [0], 0)),
        ([None, ALIVE, None], [None, LATER, None], Diagnosis([0, 2], [], [1], 1)),
        # The rank with the smallest batch, then the earliest phase.
        ([ALIVE, ALIVE], [LATER, beat(4, batch=6)], Diagnosis([], [1], [0], 0)),
        ([ALIVE, ALIVE], [LATER, beat(4, phase="forward")], Diagnosis([], [1], [0], 0)),
        ([ALIVE, ALIVE], [beat(4, phase="forward"), LATER], Diagnosis([], [0], [1], 0)),
        # At the same place, the rank that is in no collective; without any, nobody knows.
        ([ALIVE, ALIVE], [beat(4, collective=True), LATER], Diagnosis([], [1], [0], 0)),
        ([ALIVE, ALIVE], [LATER, LATER], Diagnosis([], [], [0, 1], 0)),
        # A rank makes progress: in a slow phase, or since the first look. Ranks that have ended do not count.
        ([ALIVE, ALIVE], [LATER, beat(4, ratio=0.1)], None),
        ([ALIVE, beat(1, phase="ended", ratio=0)], [LATER, beat(1, phase="ended", ratio=0)], Diagnosis([], [], [0], 0)),
        ([ALIVE, ALIVE], [ALIVE, ALIVE], None),
    ],
)  # fmt: skip
def test_the_rank_that_hangs_is_silent_or_behind(
    first: list[Beat | None], second: list[Beat | None], expected: Diagnosis | None
) -> None:
    assert diagnose(first, second) == expected


def at_step(step: int, phase: str) -> Heartbeat:
    """Return the heartbeat of a run that began at step 5."""
    heart = Heartbeat()
    heart.first_step = 5
    heart.enter(phase, step=step)
    return heart


def observe(heart: Heartbeat, times: int) -> None:
    """Observe it once a second, always from the same line."""
    for _ in range(times):
        heart.observe(1.0)


@pytest.mark.parametrize(
    ("step", "phase", "allowed"),
    [
        (6, "forward", 1),
        (6, "backward", 1),
        (6, "optimizer step", 1),
        (6, "data", 4),
        (6, "validation", 4),
        (6, "saving", 4),
        (5, "start", 4),
        (5, "forward", 4),  # compiles
    ],
)
def test_slow_phases_may_take_four_times_as_long(step: int, phase: str, allowed: float) -> None:
    heart = at_step(step, phase)
    observe(heart, 11)  # the first sees that the phase was entered
    assert heart.stalled_s == 10
    assert heart.beat(10.0).ratio == pytest.approx(1 / allowed)


@pytest.mark.parametrize(
    ("step", "phase", "moves"),
    [(6, "validation", True), (6, "saving", True), (5, "forward", True), (6, "forward", False), (6, "data", False)],
)  # fmt: skip
def test_a_stack_that_changes_is_progress_in_a_slow_phase_only(step: int, phase: str, moves: bool) -> None:
    """In a forward pass it may be an endless loop."""
    heart = at_step(step, phase)
    observe(heart, 3)
    heart.observe(1.0)
    assert (heart.stalled_s == 0.0) == moves


def test_progress_ends_a_stall() -> None:
    heart = at_step(6, "forward")
    observe(heart, 3)
    assert heart.stalled_s == 2.0
    heart.enter("backward")
    observe(heart, 1)
    assert heart.stalled_s == 0.0
    with heart.during("validation"):
        assert heart.phase == "validation"
    assert heart.phase == "backward"


def test_a_beat_survives_the_store() -> None:
    assert Beat.from_json(LATER.to_json()) == LATER


PEERS = [Peer("node1", 11, "1"), Peer("node1", 12, "2"), Peer("node2", 13, "3")]


def test_the_report_names_rank_host_process_place_and_stacks() -> None:
    beats = [LATER, beat(4, phase="forward", place="b.py:9 in g"), LATER]
    text = format_report(
        Diagnosis([], [1], [0, 2], 0), PEERS, beats, [None] * 3, ["wait", "loop", "wait"], seconds=300.0
    )
    assert "300 s" in text and "rank 1, process 12 on node1" in text and "b.py:9 in g" in text
    assert "ranks 0, 2 at step 7, backward, a.py:3 in f" in text
    assert text.count("loop") == text.count("wait\n") + text.endswith("wait") == 1


def test_the_state_of_a_stopped_and_of_a_dead_process_is_told() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peer = Peer("here", process.pid, watchdog._read_stat(process.pid)[19])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert "SIGSTOP" in process_state(peer)
        assert "died" in process_state(
            Peer("here", process.pid, "0")
        )  # another process has the number by now
        kill_process(Peer("here", process.pid, "0"))
        assert process.poll() is None
    finally:
        kill_process(peer)
        assert process.wait() == -signal.SIGKILL
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def store_process() -> Any:
    """A process that serves a store; its port."""
    code = (
        "import torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False);"
        "print(s.port, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def test_a_store_that_is_stopped_does_not_block(store_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dist.is_available()
    store = RankStore("127.0.0.1", int(store_process.stdout.readline()), ranks=2)
    store.publish("beat", 1, "text")
    assert store.read("beat") == [None, "text"]
    monkeypatch.setattr(watchdog, "_ANSWER_S", 0.3)
    os.kill(store_process.pid, signal.SIGSTOP)
    assert store.read("beat") is None
    store.publish("beat", 0, "lost")
    assert store.read("beat") is None


def test_the_exit_code_is_above_those_of_signals() -> None:
    """srun returns the largest exit code of its tasks, and a rank that is stopped ends by SIGKILL."""
    assert 128 + max(signal.valid_signals()) < HANG_EXIT_CODE < 256


def test_a_run_that_hangs_again_before_it_saves_is_not_queued_again(tmp_path: Path) -> None:
    guard = Watchdog(300.0, tmp_path)
    assert [guard._record("first"), guard._record("second")] == [False, True]
    (tmp_path / "saved.json").write_text('{"step": 10}')
    assert [guard._record("third"), guard._record("fourth")] == [False, True]
    assert (tmp_path / "hang.txt").read_text() == "fourth\n"


@pytest.mark.parametrize("repeated", [False, True])
def test_the_report_queues_the_job_again_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], repeated: bool
) -> None:
    """A single process has no store."""
    queued: list[int] = []
    guard = Watchdog(300.0, tmp_path, requeue=lambda: queued.append(1))
    if repeated:
        guard._record("before")
    code = guard._report(Diagnosis([], [], [0], 0), [LATER], reachable=False)
    assert (code, len(queued)) == ((1, 0) if repeated else (HANG_EXIT_CODE, 1))
    printed = capfd.readouterr().err
    assert f"exit code {code}" in printed and "test_the_report_queues" in printed  # this stack
