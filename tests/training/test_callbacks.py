"""Ranks act together at a step boundary: gathered results and errors, signals, bad records, non-finite losses."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from fork_server import ForkServer

from depth_anything.training.callbacks import GracefulStop, gather_or_raise
from depth_anything.training.signals import HANDLED_SIGNALS, signal_handler


def _rank(rank: int, folder: str, failing: str) -> None:
    """Call gather_or_raise on one rank of two and write its outcome to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def work() -> int:
        if str(rank) == failing:
            raise ValueError(f"record {rank} is damaged")
        return 10 + rank

    try:
        outcome = str(gather_or_raise(2, work))
    except ValueError as error:
        outcome = f"ValueError: {error}"
    Path(folder, f"{rank}.txt").write_text(outcome)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("failing", "outcome"),
    [(None, "[10, 11]"), (0, "ValueError: record 0 is damaged"), (1, "ValueError: record 1 is damaged")],
)
def test_ranks_gather_results_or_all_raise_the_same_error(
    tmp_path: Path, failing: int | None, outcome: str, fork_server: ForkServer
) -> None:
    fork_server.run_ranks(__file__, "_rank", str(tmp_path), str(failing))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [outcome, outcome]


def test_a_single_process_needs_no_process_group() -> None:
    assert gather_or_raise(1, lambda: 3) == [3]
    with pytest.raises(KeyError):
        gather_or_raise(1, lambda: {}["a"])


class FakeCheckpoints:
    """Stores the steps that it is asked to save."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save(self, trainer: Any, step: int) -> None:
        self.steps.append(step)


def trainer_at(step: int, *, ranks: int = 1, steps: int = 20) -> Any:
    return SimpleNamespace(global_step=step, max_steps=steps, world_size=ranks, should_stop=False)


def train(
    stop: GracefulStop, saves: FakeCheckpoints, *, signal_at: int, ranks: int, steps: int = 20
) -> tuple[Any, ...]:
    """Train with a signal after a step (0: before the first, -1: none); return last step, saved steps, signal."""
    trainer = trainer_at(0, ranks=ranks, steps=steps)
    if signal_at == 0:
        signal.raise_signal(signal.SIGTERM)
    stop.on_train_start(trainer, None)
    while not trainer.should_stop and trainer.global_step < steps:
        trainer.global_step += 1
        if trainer.global_step == signal_at:
            signal.raise_signal(signal.SIGTERM)
        stop.on_step(trainer, None, trainer.global_step)
    return trainer.global_step, saves.steps, stop.agreed_signal


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    signal_handler.reset()
    yield
    signal_handler.reset()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("signal_at", "outcome"),
    [(3, (3, [3], 15)), (1, (1, [1], 15)), (20, (20, [], 15)), (-1, (20, [], 0))],
)
def test_one_process_stops_at_the_step_of_the_signal(
    handlers: None, signal_at: int, outcome: tuple[Any, ...]
) -> None:
    saves = FakeCheckpoints()
    assert train(GracefulStop(saves, every=10), saves, signal_at=signal_at, ranks=1) == outcome


def test_a_signal_before_the_first_step_ends_the_run_without_one(
    handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # one of several ranks, so the signal is only recorded
    signal_handler.install()
    saves = FakeCheckpoints()
    assert train(GracefulStop(saves, every=10), saves, signal_at=0, ranks=1) == (0, [], 15)


@pytest.mark.parametrize(("failed", "stops"), [(9, False), (11, True)])
def test_more_bad_records_than_the_ceiling_stop_the_run(handlers: None, failed: int, stops: bool) -> None:
    stop = GracefulStop(FakeCheckpoints(), ceiling=0.01, at_least=1000)
    stop.read, stop.failed, stop._last_failures = 1000, failed, ["set/a[1]"]
    if stops:
        with pytest.raises(ValueError, match=r"11 of 1000.*set/a\[1\]"):
            stop.on_step(trainer_at(5), None, 5)
    else:
        stop.on_step(trainer_at(5), None, 5)
    stop.read, stop.failed = 999, 999
    stop.on_step(trainer_at(6), None, 6)  # fewer than at_least


def _two(rank: int, folder: str) -> None:
    """On two ranks of which one gets a signal: train, then call gather_or_raise."""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    outcomes: list[Any] = []
    for signaled_rank, step in ((0, 3), (1, 3), (1, 4), (0, 0), (1, 0), (0, 19)):
        signal_handler.reset()
        signal_handler.install()
        saves = FakeCheckpoints()
        outcomes.append(
            train(
                GracefulStop(saves, every=4),
                saves,
                signal_at=step if rank == signaled_rank else -1,
                ranks=2,
                steps=20,
            )
        )
    signal_handler.reset()

    def work() -> None:
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("not interrupted")

    def fail() -> None:
        if rank == 1:
            raise KeyError("a")

    for task in (work, fail):
        try:
            gather_or_raise(2, task)
        except BaseException as error:
            outcomes.append([type(error).__name__, str(error)])
        signal_handler.reset()
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


def test_two_ranks_stop_at_the_same_step_when_one_gets_a_signal(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    fork_server.run_ranks(__file__, "_two", str(tmp_path), timeout=240)  # a bug would make both wait for ever
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[:6] == second[:6]
    assert first[:6] == [[4, [4], 15], [4, [4], 15], [4, [4], 15], [0, [], 15], [0, [], 15], [20, [], 15]]
    assert first[6] == second[6] == ["StoppedBySignal", "143"]
    assert second[7] == ["KeyError", "'a'"]  # the failing rank raises its own error
    assert first[7][0] == "UserError" and "rank 1" in first[7][1] and "KeyError" in first[7][1]


def _slow(rank: int, folder: str) -> None:
    """On two ranks, of which rank 1 has long steps: at which steps do they compare?"""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    compared: list[list[int]] = []
    for step_s in (0.1, 3.0, 60.0):
        step, steps = 0, []
        stop = GracefulStop(FakeCheckpoints(), every=10, now=lambda: step * (step_s if rank else 0.01))  # noqa: B023
        stop.on_train_start(trainer_at(0, ranks=2), None)
        reduce = stop._reduce
        stop._reduce = lambda ranks, at: steps.append(at) or reduce(ranks, at)  # type: ignore[assignment] # noqa: B023
        for step in range(1, 25):
            stop.on_step(trainer_at(step, ranks=2), None, step)
        compared.append(steps)
    signal_handler.reset()
    Path(folder, f"{rank}.json").write_text(json.dumps(compared))
    dist.destroy_process_group()


def test_ranks_compare_every_ten_steps_or_ten_seconds(tmp_path: Path, fork_server: ForkServer) -> None:
    fork_server.run_ranks(__file__, "_slow", str(tmp_path), timeout=240)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first == [[1, 10, 20], [1, *range(3, 25, 3)], [*range(1, 25)]]


def test_failed_records_are_printed_if_their_file_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = GracefulStop(FakeCheckpoints(), every=1)
    stop.failed = 1000
    (tmp_path / "failed-records-0.txt").mkdir()  # a folder cannot be opened for writing
    stop._report(tmp_path, 0, ["a/0[3]"])
    assert "a/0[3]" in capsys.readouterr().err
