"""An error that ends a run first saves the last complete step, with several ranks if all of them have one."""

import errno
import json
import os
import resource
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fork_server import ForkServer
from saved_runs import BATCHES, TIMEOUT_S, AtStep, resume, saving, steps_in, train
from tiny_training import fit, make_module
from torch import nn

from depth_anything.training import checkpoint_writer, checkpoints
from depth_anything.training.base import DepthModule
from depth_anything.training.checkpoint_writer import AtomicCheckpointIO
from depth_anything.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


class Failure(Exception):
    """An error of a user's code."""


def fail() -> None:
    raise Failure


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_of_a_callback_saves_its_step(
    tmp_path: Path, position: str, asynchronous: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    final = train(tmp_path / "whole")
    callbacks = [AtStep(fail, 4), saving(tmp_path, every=100, asynchronous=asynchronous)]
    with pytest.raises(Failure):
        train(tmp_path, *(callbacks if position == "before" else callbacks[::-1]))
    assert steps_in(tmp_path) == [4] and "step 4 is saved" in capsys.readouterr().err
    assert resume(tmp_path) == final


def test_a_keyboard_interrupt_saves_its_step(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):  # Lightning turns it into exit code 1
        train(tmp_path, AtStep(interrupt, 4), saving(tmp_path, every=100))
    signal.signal(signal.SIGINT, handler)
    assert steps_in(tmp_path) == [4]


class HalfStep(torch.optim.SGD):
    """Fails after the weights have changed, at its fourth step."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.count += 1
        if self.count == 4:
            raise Failure
        return result


def failing_module(*, at: int) -> DepthModule:
    """A module whose forward pass fails at a micro-batch, counted from 0."""
    module, count = make_module(), iter(range(100))
    losses = module.losses

    def losses_or_failure(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if next(count) == at:
            raise Failure
        return losses(batch)

    module.losses = losses_or_failure  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_error_in_the_forward_pass_saves_the_step_before(tmp_path: Path, accumulate: int) -> None:
    module = failing_module(at=5)
    with pytest.raises(Failure):
        train(tmp_path, saving(tmp_path, every=100), module=module, accumulate=accumulate)
    done = 5 // accumulate
    assert steps_in(tmp_path) == [done]
    whole = make_module()
    fit(tmp_path / "whole", whole, BATCHES[: done * accumulate], steps=done, accumulate=accumulate)
    saved = torch.load(tmp_path / "checkpoints" / f"step-{done:09d}.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value)


def test_a_step_that_failed_in_the_optimizer_is_not_saved(tmp_path: Path) -> None:
    module = make_module()
    module.build_optimizer = lambda groups: HalfStep(groups)
    with pytest.raises(Failure):
        train(tmp_path, saving(tmp_path, every=2), module=module)
    assert steps_in(tmp_path) == [2]


def test_running_statistics_of_a_failed_forward_pass_are_not_saved(tmp_path: Path) -> None:
    module = failing_module(at=3)
    module.model.norm = nn.BatchNorm2d(3, affine=False)
    with pytest.raises(Failure):
        train(tmp_path, saving(tmp_path, every=2), module=module)
    assert steps_in(tmp_path) == [2]


def test_an_error_waits_for_the_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, flush = threading.Event(), checkpoint_writer.flush_to_disk

    def wait_and_flush(path: Path) -> None:
        assert opened.wait(TIMEOUT_S)
        flush(path)

    monkeypatch.setattr(checkpoint_writer, "flush_to_disk", wait_and_flush)
    later = AtStep(lambda: threading.Timer(0.2, opened.set).start(), 4)
    with pytest.raises(Failure):
        train(tmp_path, later, saving(tmp_path, every=4, asynchronous=True), module=failing_module(at=4))
    assert steps_in(tmp_path) == [4]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_saves_no_weights_that_are_not_finite(
    tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make_module()

    def spoil_and_fail() -> None:
        with torch.no_grad():
            next(module.parameters())[0] = value
        fail()

    with pytest.raises(Failure):
        train(tmp_path, AtStep(spoil_and_fail, 3), saving(tmp_path, every=2), module=module)
    assert steps_in(tmp_path) == [2] and "step 3 is not saved" in capsys.readouterr().err


def test_an_error_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Failure):
        train(tmp_path, saving(tmp_path), module=failing_module(at=0))
    assert not (tmp_path / "checkpoints").exists()


def test_the_error_of_a_checkpoint_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[Path] = []

    def fail_to_flush(path: Path) -> None:
        tried.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_writer, "flush_to_disk", fail_to_flush)
    with pytest.raises(OSError, match="step-000000002"):
        train(tmp_path, saving(tmp_path, every=2))
    assert len(tried) == 1
    # When the error of a callback cannot be saved, both are reported.
    with pytest.raises(Failure):
        train(tmp_path, AtStep(fail, 3), saving(tmp_path, every=100))
    assert "step 3 is not saved" in (printed := capsys.readouterr().err) and "step-000000003" in printed


# Two ranks


def _two(rank: int, folder: str) -> None:
    """On two ranks: errors of the background thread of rank 0, and errors of the training on one or both."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    io = AtomicCheckpointIO()
    state = {"w": torch.zeros(1000)}

    def save_checkpoint(path: Path) -> None:
        if rank == 0:
            io.save_checkpoint(state, path)
        dist.barrier()

    def make(name: str, asynchronous: bool) -> tuple[Any, Checkpoints]:
        trainer: Any = SimpleNamespace(
            world_size=2,
            is_global_zero=rank == 0,
            global_step=0,
            max_steps=100,
            loggers=[],
            callbacks=[],
            lightning_module=nn.Linear(1, 1),
            strategy=SimpleNamespace(checkpoint_io=io, barrier=dist.barrier),
            save_checkpoint=save_checkpoint,
        )
        trainer.lightning_module.grad_norm = None
        saves = saving(Path(folder, name), every=5, asynchronous=asynchronous)
        saves.on_train_start(trainer, trainer.lightning_module)
        return trainer, saves

    def step(trainer: Any, saves: Checkpoints, number: int) -> None:
        saves.on_train_batch_start(trainer, None, None, 0)
        trainer.global_step = number
        saves.on_step(trainer, trainer.lightning_module, number)

    outcome: dict[str, Any] = {}
    for asynchronous in (False, True):
        trainer, saves = make(f"full-{asynchronous}", asynchronous)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            for number in range(1, 22):
                if number == 6 and rank == 0:
                    if saves._pending is not None:  # step 5 is written before the disk is full
                        saves._pending.result()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
                step(trainer, saves, number)
                if number == 10 and saves._pending is not None:
                    saves._pending.exception()
                    saves.every = 1000  # the ranks compare at step 20
        except Exception as error:
            outcome[f"full-{asynchronous}"] = [number, type(error).__name__, "step-000000010" in str(error)]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for name in ("vanished", "capture"):  # fails on one rank only, before the others wait for it
        trainer, saves = make(name, False)
        if name == "vanished" and rank == 0:
            Path(folder, name).rmdir()
        elif name == "capture" and rank == 1:
            trainer.save_checkpoint = lambda path: fail()
        try:
            step(trainer, saves, 5)
        except Exception as error:
            outcome[name] = type(error).__name__
    checkpoints.RANKS_TIMEOUT_S = 0.5
    for name, steps in (("both", (3, 3)), ("one", (3, None)), ("apart", (3, 4))):
        trainer, saves = make(name, True)
        number = steps[rank]
        if number is not None:
            for i in range(1, number + 1):
                step(trainer, saves, i)
            saves.on_exception(trainer, trainer.lightning_module, Failure())
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def test_two_ranks_report_the_error_of_one_and_save_when_both_have_one(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    fork_server.run_ranks(__file__, "_two", str(tmp_path), timeout=240)
    for rank in (0, 1):
        outcome = json.loads((tmp_path / f"{rank}.json").read_text())
        assert outcome == {
            "full-False": [10, "UserError", True],
            "full-True": [20, "UserError", True],
            "vanished": "UserError",
            "capture": ["UserError", "Failure"][rank],
        }
    assert steps_in(tmp_path / "full-False") == steps_in(tmp_path / "full-True") == [5]
    assert steps_in(tmp_path / "both") == [3]
    assert not (tmp_path / "one" / "checkpoints").exists()
    assert not (tmp_path / "apart" / "checkpoints").exists()
