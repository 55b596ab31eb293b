"""Disk, memory and shared memory are compared with what a run needs, before the first step and now and then."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from depth_anything.training import headroom
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.headroom import (
    CheckpointSchedule,
    Headroom,
    checkpoint_bytes,
    disk_need,
    label_need,
    warn_of,
)

GIB = 2**30


def network() -> nn.Module:
    module = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    module[0].requires_grad_(False)
    return module


def test_the_size_of_a_checkpoint_is_estimated(tmp_path: Path) -> None:
    module = network()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    module(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    state = {"weights": module.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    tensors = [*state["weights"].values()]
    tensors += [
        value for each in state["optimizer"].values() for name, value in each.items() if name != "step"
    ]
    assert checkpoint_bytes(module) == sum(4 * value.numel() for value in tensors)


SCHEDULE = CheckpointSchedule(steps=100, every=10, keep=2)


@pytest.mark.parametrize(("saved", "count"), [(0, 3), (1, 2), (2, 1), (5, 1)])
def test_the_next_checkpoints_need_one_more_than_are_kept(tmp_path: Path, saved: int, count: int) -> None:
    need = disk_need(tmp_path, size=GIB, schedule=SCHEDULE, step=0, present=[*range(10, 10 + saved)])
    assert need.needed == count * GIB and need.free is not None
    assert str(tmp_path) in need.what


@pytest.mark.parametrize("steps", [1, 7, 24, 25])
@pytest.mark.parametrize("keep", [1, 2, 4])
@pytest.mark.parametrize(
    ("every", "keep_every"), [(1, None), (3, None), (3, 6), (4, 6), (5, 5), (30, 7), (2, 50)]
)
def test_the_disk_of_all_checkpoints_to_come_is_that_of_a_run(
    tmp_path: Path, steps: int, keep: int, every: int, keep_every: int | None
) -> None:
    """The reference deletes files as Checkpoints does, and counts them while a new one is written."""
    schedule = CheckpointSchedule(steps, every, keep, keep_every)
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=every, keep=keep, keep_every=keep_every)
    checkpoints.folder.mkdir()

    def present() -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in checkpoints.folder.iterdir())

    counts, written = [(0, 0, schedule.still_needed(0, []))], 0
    for step in range(1, steps + 1):
        if any(period and step % period == 0 for period in (every, keep_every)) or step == steps:
            path = checkpoints.folder / f"step-{step:09d}.ckpt"
            path.touch()
            written += 1
            during = len(present())
            checkpoints._complete(path, step)
            counts.append((during, len(present()), schedule.still_needed(step, present())))
    assert (schedule.count(), schedule.kept_at_end()) == (written, len(present()))
    for number, (_, now, needed) in enumerate(counts[:-1]):
        most = max(during for during, _, _ in counts[number + 1 :])
        assert most <= now + needed <= max(most, counts[-1][1]) + 1


def test_checkpoints_that_are_kept_for_good_are_announced_before_the_first_step(
    tmp_path: Path, machine: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    size = checkpoint_bytes(network())
    for keep_every, enough in ((10, 11), (None, 3)):
        for count in (enough, enough - 1):
            machine["disk"] = count * size
            schedule = replace(SCHEDULE, keep_every=keep_every)
            Headroom(tmp_path / "checkpoints", schedule).on_train_start(fake_trainer(), network())  # type: ignore[arg-type]
            assert bool(capsys.readouterr().err) == (count < enough)
    machine["disk"] = size
    schedule = replace(SCHEDULE, keep_every=10)
    Headroom(tmp_path / "checkpoints", schedule).on_train_start(fake_trainer(), network())  # type: ignore[arg-type]
    printed = capsys.readouterr().err
    assert "11 checkpoints" in printed and "checkpoint.keep_every=N" in printed


def fake_trainer(workers: int = 2) -> Any:
    batch = {"image": np.zeros((1, 1024, 1024), np.uint8)}
    data = SimpleNamespace(
        workers=workers, micro_batch=64, open=lambda: SimpleNamespace(empty_batch=lambda count: batch)
    )
    return SimpleNamespace(
        datamodule=data,
        num_devices=4,
        local_rank=0,
        is_global_zero=True,
        node_rank=0,
        num_nodes=1,
        global_step=0,
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return what is free, which the test may change: all of it is plenty."""
    free = {"disk": 100 * GIB, "shm": 100 * GIB, "memory": 50 * GIB, "total": 64 * GIB}
    monkeypatch.setattr(
        headroom, "free_disk", lambda folder: free["shm" if folder == headroom.SHARED_MEMORY else "disk"]
    )
    monkeypatch.setattr(headroom, "free_memory", lambda: free["memory"])
    monkeypatch.setattr(headroom, "total_memory", lambda: free["total"])
    return free


@pytest.mark.parametrize(
    ("name", "free", "words"),
    [
        ("disk", 1000, ("checkpoints", "checkpoint.keep=1")),
        ("shm", 400 * 2**20, ("/dev/shm", "512.0 MiB", "400.0 MiB", "--shm-size")),  # 8 workers, 64 MiB each
        (
            "memory",
            4 * GIB,
            ("memory", "workers=", "4.0 GiB", "7.2 GiB"),
        ),  # 8 · (250 + 4 · 64) MiB + 5 % of 64 GiB
    ],
)
def test_what_will_not_suffice_is_reported_before_the_first_step(
    tmp_path: Path,
    machine: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    name: str,
    free: float,
    words: tuple[str, ...],
) -> None:
    check = Headroom(tmp_path / "checkpoints", SCHEDULE)
    check.on_train_start(fake_trainer(), network())  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    machine[name] = free
    check = Headroom(tmp_path / "checkpoints", SCHEDULE)
    check.on_train_start(fake_trainer(), network())  # type: ignore[arg-type]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    for word in words:
        assert word in printed


def test_what_becomes_short_later_is_reported_once(
    tmp_path: Path, machine: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    check = Headroom(tmp_path / "checkpoints", SCHEDULE, now=lambda: now[0])
    trainer: Any = fake_trainer()
    check.on_train_start(trainer, network())  # type: ignore[arg-type]
    machine["disk"] = machine["memory"] = 100.0
    check.on_step(trainer, None, 1)
    assert capsys.readouterr().err == ""  # too soon
    for seconds in (400.0, 800.0):
        now[0] = seconds
        check.on_step(trainer, None, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "memory" in lines[0] and "checkpoints" in lines[1]
    other = Headroom(tmp_path / "checkpoints", SCHEDULE)
    trainer.is_global_zero, trainer.local_rank = False, 1  # another rank of the node reports nothing
    other.on_train_start(trainer, network())  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_labels_that_are_missing_are_estimated_from_those_that_exist(
    tmp_path: Path, machine: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [("0", 100), ("1", 100), ("2", 50)]
    first = label_need(tmp_path / "labels/photos", shards, image_size=518)
    assert first.needed == pytest.approx(250 * 139e3, rel=0.02) and not first.is_short
    (tmp_path / "0.json").write_text("{}")
    (tmp_path / "0.tar").write_bytes(bytes(5000))
    need = label_need(tmp_path, shards, image_size=518)
    assert need.needed == 150 * 50
    warn_of(need)
    assert capsys.readouterr().err == ""
    machine["disk"] = 7499
    warn_of(label_need(tmp_path, shards, image_size=518))
    printed = capsys.readouterr().err
    for word in ("150", str(tmp_path), "7.3 KiB", "labels="):
        assert word in printed
