"""Checkpoints are verified before older ones go, and written in the background; disks that fail."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from made_configs import make_config
from saved_runs import TIMEOUT_S, AtStep, resume, saving, steps_in, train
from tiny_training import make_module
from torch import nn

from depth_anything.model import integrity
from depth_anything.model.integrity import find_damage
from depth_anything.training import checkpoint_writer
from depth_anything.training.callbacks import GracefulStop
from depth_anything.training.checkpoint_writer import copy_to_cpu
from depth_anything.training.run_dir import RunDir
from depth_anything.training.signals import signal_handler

pytestmark = pytest.mark.usefixtures("one_thread")


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
    modules = make_module(), make_module()  # they keep all losses: there is no TrainingMetrics
    final = train(plain, saving(plain, every=3), module=modules[0])
    gate = Gate(monkeypatch)
    present: list[bool] = []

    def look_and_open() -> None:
        present.append((behind / "checkpoints" / "step-000000003.ckpt").exists())
        gate.opened.set()

    saves = saving(behind, every=3, asynchronous=True)
    assert train(behind, saves, AtStep(look_and_open, 5), module=modules[1]) == final
    assert gate.in_background and present == [False]
    assert steps_in(behind) == steps_in(plain) == [3, 6]
    for name in ("step-000000003.ckpt", "step-000000006.ckpt"):
        assert (behind / "checkpoints" / name).read_bytes() == (plain / "checkpoints" / name).read_bytes()
    losses = [[float(part["loss"]) for part in module.parts] for module in modules]
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

    def fill_after_step_2() -> None:
        if saves._pending is not None:
            saves._pending.result(TIMEOUT_S)
        fill(small_disk, leave=leave)

    with pytest.raises(OSError) as raised:
        train(folder, AtStep(fill_after_step_2, 3), saves)
    assert raised.value.errno == errno.ENOSPC
    for word in ("step-000000003.ckpt", str(folder), "make space", "start the same command again"):
        assert word in str(raised.value)
    assert steps_in(folder) == [2]
    (small_disk / "filler").unlink()
    assert resume(folder) == final


def test_an_error_in_the_background_ends_the_run_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_ended = threading.Event()

    def fail(path: Path) -> None:
        assert step_ended.wait(TIMEOUT_S)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_writer, "flush_to_disk", fail)
    saves, reached = saving(tmp_path, every=100, keep_every=2, asynchronous=True), []

    def wait() -> None:
        if saves._pending is not None:
            step_ended.set()
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
