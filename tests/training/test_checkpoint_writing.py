"""Checkpoints are verified before older ones go, written in the background, and saved before an error ends a run."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fork_server import ForkServer
from made_configs import make_config
from tiny_training import fit, make_batch, make_module
from torch import nn

from depth_anything.model import integrity
from depth_anything.model.integrity import find_damage
from depth_anything.training import checkpoint_writer, checkpoints
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import GracefulStop, StepCallback, TrainingMetrics
from depth_anything.training.checkpoint_writer import AtomicCheckpointIO, SingleFileWriter, copy_to_cpu
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.loggers import read_metrics
from depth_anything.training.run_dir import RunDir
from depth_anything.training.signals import signal_handler

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = [make_batch(seed) for seed in range(8)]
TIMEOUT_S = 60.0
"""A bug would let an event be waited for without end."""


class AtStep(StepCallback):
    """Does something at step boundaries, of one step or of all."""

    def __init__(self, work: Callable[[], Any], step: int | None = None) -> None:
        self.work, self.step = work, step

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        if self.step in (None, step):
            self.work()


def saving(folder: Path, *, asynchronous: bool = False, **settings: Any) -> Checkpoints:
    writer = SingleFileWriter(asynchronous=asynchronous)
    return Checkpoints(folder / "checkpoints", writer=writer, **{"every": 1, **settings})


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint; nothing else may be in their folder."""
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert all(re.fullmatch(r"step-\d{9}\.ckpt", name) for name in names), names
    assert not any(find_damage(folder / "checkpoints" / name) for name in names)
    return [int(name[5:14]) for name in names]


def weights(module: nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in module.state_dict().values())


def train(
    folder: Path, *callbacks: Any, steps: int = 6, module: DepthModule | None = None, **options: Any
) -> bytes:
    """Train the tiny network and return its weights."""
    module = make_module() if module is None else module
    fit(folder, module, BATCHES, *callbacks, steps=steps, **options)
    return weights(module)


def resume(folder: Path, steps: int = 6) -> bytes:
    """Continue from the newest checkpoint on the remaining batches and return the weights."""
    newest = steps_in(folder)[-1]
    module = make_module()
    path = folder / "checkpoints" / f"step-{newest:09d}.ckpt"
    fit(folder, module, BATCHES[newest:], saving(folder), steps=steps, checkpoint=path)
    return weights(module)


# Which ones are kept


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"every": 1, "keep": 2}, [7, 8]),
        ({"every": 1, "keep": 1, "keep_every": 3}, [3, 6, 8]),
        ({"every": 1, "keep": 3, "keep_every": 4}, [4, 6, 7, 8]),
        ({"every": 4, "keep": 1, "keep_every": 3}, [3, 6, 8]),  # also saved at 3 and 6
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_and_every_nth_are_kept(
    tmp_path: Path, settings: dict[str, int], kept: list[int], asynchronous: bool
) -> None:
    train(tmp_path, saving(tmp_path, asynchronous=asynchronous, **settings), steps=8)
    assert steps_in(tmp_path) == kept
    assert json.loads((tmp_path / "saved.json").read_text()) == {"step": 8}


def test_complete_checkpoints_are_reported(tmp_path: Path) -> None:
    seen: list[tuple[Path, str, int]] = []
    saves = saving(
        tmp_path,
        keep=1,
        on_complete=lambda path: seen.append((path, find_damage(path), len(steps_in(tmp_path)))),
    )
    train(tmp_path, saves, steps=2)
    path = tmp_path / "checkpoints" / "step-00000000{}.ckpt"
    assert seen == [(Path(str(path).format(step)), "", 1) for step in (1, 2)]


# Read back before an older one is deleted


@pytest.mark.parametrize("how", ["flipped", "cut", "head"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_is_read_back_wrong_is_reported_and_no_older_one_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, asynchronous: bool
) -> None:
    saves = saving(tmp_path, asynchronous=asynchronous, keep=1)
    train(tmp_path, saves, steps=1)
    flush = checkpoint_writer.flush_to_disk

    def flush_and_damage(path: Path) -> None:
        flush(path)
        content = bytearray(path.read_bytes())
        if how == "cut":
            content = content[:-100]
        else:
            content[0 if how == "head" else len(content) // 2] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint_writer, "flush_to_disk", flush_and_damage)
    with pytest.raises(OSError, match=r"step-000000002\.ckpt was read back with other bytes"):
        train(tmp_path, saves, steps=3)
    assert steps_in(tmp_path) == [1]


# Written in the background


class Gate:
    """Holds the background thread before it writes a step, until the training has gone on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.in_background = threading.Event(), False
        save = checkpoint_writer.save_with_digest

        def wait_and_save(content: Any, path: Path) -> str:
            self.in_background |= threading.current_thread() is not threading.main_thread()
            assert self.opened.wait(TIMEOUT_S)
            return save(content, path)

        monkeypatch.setattr(checkpoint_writer, "save_with_digest", wait_and_save)


def test_a_checkpoint_written_during_later_steps_has_the_bytes_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 3 is written while steps 4 and 5 change the weights."""
    plain, behind = tmp_path / "plain", tmp_path / "behind"
    final = train(plain, TrainingMetrics(every=1, batch_size=2), saving(plain, every=3))
    gate = Gate(monkeypatch)
    present: list[bool] = []

    def look_and_open() -> None:
        present.append((behind / "checkpoints" / "step-000000003.ckpt").exists())
        gate.opened.set()

    saves = saving(behind, every=3, asynchronous=True)
    metrics = TrainingMetrics(every=1, batch_size=2)
    assert train(behind, metrics, saves, AtStep(look_and_open, 5)) == final
    assert gate.in_background and present == [False]
    assert steps_in(behind) == steps_in(plain) == [3, 6]
    for name in ("step-000000003.ckpt", "step-000000006.ckpt"):
        assert (behind / "checkpoints" / name).read_bytes() == (plain / "checkpoints" / name).read_bytes()
    losses = [
        [row["loss"] for row in read_metrics(folder / "metrics.csv").rows] for folder in (plain, behind)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_copy_on_the_cpu_keeps_views_types_and_bytes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(4, 8)).sum().backward()
    optimizer.step()
    numbers = torch.rand(100)
    state = {
        "weights": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [numbers[10:20], numbers[15:30], numbers.view(10, 10).t()],
        "parameter": network[0].weight,
        "empty": torch.empty(0),
        "other": {"list": [1, 2], "none": None},
    }
    integrity.save_with_digest(state, tmp_path / "state")
    copied = copy_to_cpu(state)
    with torch.no_grad():
        numbers += 1
        network[0].weight += 1
    state["other"]["list"].append(3)
    integrity.save_with_digest(copied, tmp_path / "copy")
    del copied["parameter"]  # a parameter becomes a plain tensor
    before = torch.load(tmp_path / "state", weights_only=False)
    after = torch.load(tmp_path / "copy", weights_only=False)
    assert torch.equal(before.pop("parameter"), after.pop("parameter"))
    for folder, content in (("a", before), ("b", after)):
        torch.save(content, tmp_path / folder)
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size
    assert after["views"][0].untyped_storage().data_ptr() == after["views"][2].untyped_storage().data_ptr()
    assert str(before) == str(after)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_pinned_and_complete() -> None:
    values = torch.rand(1 << 20, device="cuda")
    copied = copy_to_cpu({"all": values, "part": values[5:9]})
    assert copied["all"].is_pinned() and torch.equal(copied["all"], values.cpu())
    assert copied["part"].untyped_storage().data_ptr() == copied["all"].untyped_storage().data_ptr()


def test_a_signal_uses_the_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes at the step whose checkpoint has just begun; the run waits for it and writes no other."""
    signal_handler.reset()
    gate = Gate(monkeypatch)
    saves = saving(tmp_path, every=3, asynchronous=True)
    stop = GracefulStop(saves)

    def arrive() -> None:
        signal_handler.received = signal.SIGUSR1
        threading.Timer(0.2, gate.opened.set).start()

    train(tmp_path, AtStep(arrive, 3), saves, stop)
    signal_handler.reset()
    assert stop.agreed_signal == signal.SIGUSR1 and steps_in(tmp_path) == [3]


def test_a_signal_waits_for_an_older_checkpoint_and_saves_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_handler.reset()
    gate = Gate(monkeypatch)
    saves = saving(tmp_path, every=3, asynchronous=True)

    def arrive() -> None:
        signal_handler.received = signal.SIGTERM
        threading.Timer(0.2, gate.opened.set).start()

    train(tmp_path, AtStep(arrive, 4), saves, GracefulStop(saves))
    signal_handler.reset()
    assert steps_in(tmp_path) == [3, 4]


KILLED = """
import os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_training import fit, make_batch, make_module
from depth_anything.training import checkpoint_writer
from depth_anything.training.callbacks import StepCallback
from depth_anything.training.checkpoint_writer import SingleFileWriter
from depth_anything.training.checkpoints import Checkpoints
import torch
torch.set_num_threads(1)
folder, halfway, calls = Path(sys.argv[1]), threading.Event(), []
save = checkpoint_writer.save_with_digest

def save_half(content, path):
    calls.append(path)
    digest = save(content, path)
    if len(calls) == 2:
        os.truncate(path, path.stat().st_size // 2)
        halfway.set()
        threading.Event().wait()
    return digest

class Kill(StepCallback):
    def on_step(self, trainer, module, step):
        if step == 7:
            assert halfway.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)

checkpoint_writer.save_with_digest = save_half
saves = Checkpoints(folder / "checkpoints", every=3, writer=SingleFileWriter(asynchronous=True))
fit(folder, make_module(), [make_batch(seed) for seed in range(8)], Kill(), saves, steps=8)
"""


def test_a_kill_during_a_background_write_leaves_the_older_checkpoint(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    """The write of step 6 is half done while step 7 ends, and the process is killed."""
    folder = RunDir(tmp_path / "run")
    config = make_config("stage=teacher", steps=30, checkpoint__every=3)
    folder.claim(config)
    folder.lock.release()
    code = KILLED.format(tests=str(Path(__file__).parents[1]))
    run = fork_server.run([sys.executable, "-c", code, str(folder.path)], timeout=TIMEOUT_S)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert sorted(path.name[:5] for path in folder.checkpoints.iterdir()) == [".tmp.", "step-"]
    assert folder.begin(config, main=True) == folder.checkpoints / "step-000000003.ckpt"
    folder.lock.release()
    assert steps_in(folder.path) == [3]


# Disks that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a test disk cannot be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Fill a disk but for some bytes; return the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, max(filler.stat().st_size - leave, 0))
    return filler


@pytest.mark.parametrize("leave", [0, 4096], ids=["full", "almost full"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_and_the_same_command_continues(
    small_disk: Path, leave: int, asynchronous: bool
) -> None:
    final = train(small_disk / "whole", saving(small_disk / "whole"))
    folder = small_disk / "run"
    saves = saving(folder, asynchronous=asynchronous, keep=1)
    with pytest.raises(OSError) as raised:
        train(folder, AtStep(lambda: fill(small_disk, leave=leave), 3), saves)
    assert raised.value.errno == errno.ENOSPC
    for word in ("step-000000003.ckpt", str(folder), "make space", "start the same command again"):
        assert word in str(raised.value)
    assert steps_in(folder) == [2]
    (small_disk / "filler").unlink()
    assert resume(folder) == final


def test_an_error_in_the_background_ends_the_run_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_writer, "flush_to_disk", fail)
    saves, reached = saving(tmp_path, every=100, keep_every=2, asynchronous=True), []

    def wait() -> None:
        if saves._pending is not None:
            saves._pending.exception(TIMEOUT_S)

    with pytest.raises(OSError, match=r"step-000000002\.ckpt"):
        train(tmp_path, saves, AtStep(lambda: reached.append(1)), AtStep(wait))
    assert len(reached) == 2 and not steps_in(tmp_path)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_read_only_disk_is_named(small_disk: Path, asynchronous: bool) -> None:
    folder = small_disk / "run"

    def remount() -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with pytest.raises(OSError) as raised:
        train(folder, AtStep(remount, 3), saving(folder, asynchronous=asynchronous, keep=1))
    assert str(folder / "checkpoints" / "step-000000003.ckpt") in str(raised.value)
    assert os.strerror(errno.EROFS) in str(raised.value)
    assert steps_in(folder) == [2]


def test_a_folder_of_checkpoints_that_vanished_is_created_again(tmp_path: Path) -> None:
    train(tmp_path, AtStep(lambda: shutil.rmtree(tmp_path / "checkpoints"), 4), saving(tmp_path))
    assert steps_in(tmp_path) == [5, 6]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_folder_that_vanished_is_named_and_not_created_again(
    tmp_path: Path, asynchronous: bool
) -> None:
    """The mount point of a disk that was unmounted would be filled instead."""
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=rf"{folder} has vanished.*step 3 "):
        train(folder, AtStep(lambda: shutil.move(folder, tmp_path / "away"), 3), saving(folder))
    assert not folder.exists() and steps_in(tmp_path / "away") == [1, 2]


# Errors that end a run


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


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_an_error_after_a_non_finite_gradient_saves_nothing(
    tmp_path: Path, norm: float, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make_module()

    def fail_with_norm() -> None:
        module.grad_norm = torch.tensor(norm)
        fail()

    with pytest.raises(Failure):
        train(tmp_path, AtStep(fail_with_norm, 3), saving(tmp_path, every=2), module=module)
    assert steps_in(tmp_path) == [2] and "saved" not in capsys.readouterr().err


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
