"""Lightning's own callbacks and loggers in a run: averaged weights, monitors, timers, TensorBoard, progress bars."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    DeviceStatsMonitor,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import TensorBoardLogger
from tiny_training import (
    STEPS,
    Data,
    fit,
    make_batch,
    make_module,
    make_trainer,
    run_callbacks,
    train,
    weights,
)

from depth_anything.errors import UserError
from depth_anything.training.lightning import (
    _warn_of_shared_store,
    explain_lost_rank,
    join_process_group,
    move_timers_first,
    require_launcher,
    run_fit,
)
from depth_anything.training.loggers import MetricsCSV, SafeLogger, build_loggers, logger_nodes
from depth_anything.training.whole_network import evaluation_network

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's advice to those who shard a model's layers.
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning"),
]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_ema_weight_averaging_saves_the_average_and_continues_exactly(tmp_path: Path) -> None:
    decay = 0.5
    average = weights(make_module())
    for step in range(1, STEPS + 1):
        plain = train(tmp_path / f"plain-{step}", steps=step)
        average = weights(plain) if step == 1 else decay * average + (1 - decay) * weights(plain)
    unbroken = train(tmp_path / "unbroken", EMAWeightAveraging(decay=decay))
    torch.testing.assert_close(weights(unbroken), average)
    assert not torch.equal(weights(unbroken), weights(plain))
    for begin, steps in ((0, 4), (4, STEPS)):
        resumed = train(tmp_path / "resumed", EMAWeightAveraging(decay=decay), begin=begin, steps=steps)
    assert torch.equal(weights(resumed), weights(unbroken))


def test_a_run_killed_after_its_last_checkpoint_ends_with_the_average(tmp_path: Path) -> None:
    unbroken = train(tmp_path, EMAWeightAveraging(decay=0.5))
    checkpoint = tmp_path / f"checkpoints/step-{STEPS:09d}.ckpt"
    module, data = make_module(), Data()
    trainer = make_trainer(tmp_path, *run_callbacks(tmp_path, EMAWeightAveraging(decay=0.5)), steps=STEPS)
    run_fit(trainer, module, data, checkpoint)  # type: ignore[arg-type]
    assert torch.equal(weights(module), weights(unbroken))


def test_validation_scores_the_evaluation_network(tmp_path: Path) -> None:
    module, averaging = make_module(), EMAWeightAveraging(decay=0.5)
    trainer = fit(tmp_path, module, [make_batch(0), make_batch(1)], averaging, steps=2)
    assert averaging._average_model is not None
    averaging._average_model.module.model.depth_head.bias.data.fill_(7.0)
    current = weights(module)
    with evaluation_network(trainer, module):
        assert module.model.depth_head.bias.item() == 7.0
    assert torch.equal(weights(module), current)


@pytest.mark.parametrize("last", [True, False])
def test_a_run_that_a_timer_ends_is_saved_with_its_current_weights(tmp_path: Path, last: bool) -> None:
    """EMAWeightAveraging replaces the weights when training ends; the checkpoint must hold both kinds.

    Lightning appends the Timer of +trainer.max_time as the last callback.
    """
    averaging, timer = EMAWeightAveraging(decay=0.5), Timer(duration={"microseconds": 1})
    callbacks = run_callbacks(tmp_path, averaging, *([] if last else [timer]))
    trainer = make_trainer(tmp_path, *callbacks, *([timer] if last else []), steps=STEPS)
    move_timers_first(trainer)
    trainer.fit(make_module(), datamodule=Data())
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert path.name == "step-000000001.ckpt"
    resumed = train(tmp_path, EMAWeightAveraging(decay=0.5), Timer(duration={"hours": 1}), begin=1)
    unbroken = train(tmp_path / "unbroken", EMAWeightAveraging(decay=0.5))
    assert torch.equal(weights(resumed), weights(unbroken))


def test_monitors_of_lightning_share_the_rows_of_metrics_csv(tmp_path: Path) -> None:
    train(tmp_path, LearningRateMonitor(), DeviceStatsMonitor(cpu_stats=True))
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(STEPS + 1))
    for row in rows[1:-1]:
        for name in ("loss", "lr-AdamW/head", "DeviceStatsMonitor.on_train_batch_end/cpu_percent"):
            assert math.isfinite(float(row[name])), (name, row)


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, *run_callbacks(tmp_path), steps=2)
    board = SafeLogger(TensorBoardLogger(tmp_path, name="", version="tensorboard"))
    trainer.loggers = [*trainer.loggers, board]
    trainer.fit(make_module(), datamodule=Data())
    board.log_image("depth", [np.zeros((4, 6, 3), np.uint8)], step=2)
    board.save()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [float(row["loss"]) for row in rows_of(tmp_path)]
    )
    assert [(event.step, event.width) for event in events.Images("depth")] == [(2, 6)]


def test_a_model_checkpoint_and_a_progress_bar_of_lightning_may_be_added(tmp_path: Path) -> None:
    added = ModelCheckpoint(tmp_path / "own", every_n_train_steps=3, save_top_k=-1)
    train(tmp_path, added, TQDMProgressBar())
    assert len(list((tmp_path / "own").glob("*.ckpt"))) == 2
    assert len(list((tmp_path / "checkpoints").glob("step-*.ckpt"))) == 2


WANDB = {
    "_target_": "depth_anything.training.loggers.wandb_logger",
    "project": "p",
    "name": "n",
    "folder": "f",
}
BOARD = {"_target_": "pytorch_lightning.loggers.TensorBoardLogger", "save_dir": "f"}


@pytest.mark.parametrize(
    ("config", "nodes"),
    [
        (None, []),
        ({}, []),
        (WANDB, [WANDB]),  # the only form before there were several
        ({"project": "p", "wandb": WANDB, "tensorboard": BOARD}, [WANDB, BOARD]),
    ],
)
def test_the_logger_key_is_one_node_or_named_nodes(config: Any, nodes: list[Any]) -> None:
    assert logger_nodes(config) == nodes


def test_ranks_other_than_0_write_nothing(tmp_path: Path) -> None:
    (dummy,) = build_loggers(tmp_path / "metrics.csv", [TensorBoardLogger(tmp_path)], step=0, main=False)
    dummy.log_metrics({"loss": 1.0}, step=1)
    dummy.save()
    assert not list(tmp_path.iterdir())
    first, second = build_loggers(tmp_path / "metrics.csv", [TensorBoardLogger(tmp_path)], step=0, main=True)
    assert isinstance(first, MetricsCSV) and isinstance(second, SafeLogger)


@pytest.mark.parametrize(
    ("restarts", "shared", "warned"), [("0", "True", False), ("3", "False", False), ("3", "True", True)]
)
def test_torchrun_that_keeps_old_addresses_is_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, restarts: str, shared: str, warned: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    _warn_of_shared_store()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capfd.readouterr().err) == warned


def test_several_nodes_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    require_launcher(1)
    trainer = pl.Trainer(accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", logger=False)
    with pytest.raises(UserError, match=r"trainer\.num_nodes=2.*docs/clusters\.md"):
        join_process_group(trainer)
    monkeypatch.setenv(
        "MASTER_ADDR", "127.0.0.1"
    )  # typed by hand on each node, as Lightning's documentation says
    require_launcher(2)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:545] Read error: Connection reset by peer"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("Connection reset by peer"), False),
    ],
)
def test_an_error_of_a_lost_rank_is_told_from_others(error: Exception, lost: bool) -> None:
    explained = explain_lost_rank(error)
    assert isinstance(explained, UserError) == lost and (lost or explained is error)


def test_a_port_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup_environment() -> None:
        raise RuntimeError("The server socket has failed to listen: port: 15777, name: EADDRINUSE")

    monkeypatch.setenv("MASTER_PORT", "15777")
    trainer: Any = make_trainer(tmp_path, steps=1)
    monkeypatch.setattr(trainer.strategy, "setup_environment", setup_environment)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    environment = SimpleNamespace(creates_processes_externally=True)
    monkeypatch.setattr(trainer._accelerator_connector, "cluster_environment", environment)
    with pytest.raises(UserError, match="15777.*MASTER_PORT="):
        join_process_group(trainer)
