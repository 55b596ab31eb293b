"""One optimizer step: what it does with the recipe, what it logs, and which failures stop the run."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import SIDE, fit, make_batch, make_module

from depth_anything.training.callbacks import (
    GracefulStop,
    StepCallback,
    TrainingMetrics,
    TrainingProgress,
)
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.lightning import raise_if_incomplete
from depth_anything.training.loggers import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


class GradientNorms(StepCallback):
    """Stores the norm of the gradient before and after clipping."""

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        self.after = math.hypot(*(float(p.grad.norm()) for p in module.parameters()))
        self.before = float(module.grad_norm)


@pytest.mark.parametrize("clip_norm", [None, 1e-3, 1e6])
def test_gradients_are_clipped_to_clip_norm(tmp_path: Path, clip_norm: float | None) -> None:
    norms, module = GradientNorms(), make_module(clip_norm=clip_norm)
    module.zero_grad = lambda *_, **__: None  # type: ignore[method-assign]
    fit(tmp_path, module, [make_batch()], norms, steps=1)
    assert norms.before > 0.01
    expected = min(norms.before, clip_norm or math.inf)
    assert norms.after == pytest.approx(expected, rel=1e-3)


def test_weight_decay_is_decoupled(tmp_path: Path) -> None:
    """A step with decay equals the step without, minus rate × decay × weight."""
    weights = {}
    for decay in (0.0, 0.5):
        module = make_module(weight_decay=decay, encoder_lr=1e-2, head_lr=1e-3)
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        fit(tmp_path, module, [make_batch()], steps=1)
        weights[decay] = dict(module.named_parameters())
    for name, plain in weights[0.0].items():
        rate = 1e-2 if "pretrained" in name else 1e-3
        torch.testing.assert_close(weights[0.5][name], plain - rate * 0.5 * start[name])
        assert not torch.equal(weights[0.5][name], plain)


def test_the_logged_loss_is_the_mean_over_all_micro_batches(tmp_path: Path) -> None:
    batches = [make_batch(seed) for seed in range(6)]
    batches[4]["valid"] = batches[4]["valid"].clone()
    batches[4]["valid"][:, :, : SIDE // 2] = False
    module = make_module(encoder_lr=0.0, head_lr=0.0)
    with torch.no_grad():
        separate = [module.losses(one) for one in batches]
    fit(tmp_path, module, batches, TrainingMetrics(every=1, batch_size=6), steps=2, accumulate=3)
    rows = read_metrics(tmp_path / "metrics.csv").rows
    assert [row["step"] for row in rows] == ["1", "2"]
    for row, parts in zip(rows, (separate[:3], separate[3:]), strict=True):
        for name in ("loss", "ssi", "gm"):
            mean = sum(float(part[name]) for part in parts) / 3
            assert float(row[name]) == pytest.approx(mean, rel=1e-5)
            assert float(row[name]) != pytest.approx(float(parts[-1][name]), rel=1e-3)
    assert float(rows[1]["valid_share"]) == pytest.approx((1 + 0.5 + 1) / 3)
    assert module.parts == []


@pytest.mark.parametrize(("every", "steps", "logged"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 2, [2])])
def test_metrics_are_logged_every_n_steps_and_at_the_last(
    tmp_path: Path, every: int, steps: int, logged: list[int]
) -> None:
    metrics = TrainingMetrics(every=every, batch_size=2)
    fit(tmp_path, make_module(), [make_batch(seed) for seed in range(steps)], metrics, steps=steps)
    rows = read_metrics(tmp_path / "metrics.csv").rows
    assert [int(row["step"]) for row in rows] == logged
    for name in ("loss", "grad_norm", "lr_encoder", "lr_head", "images_per_s", "data_wait", "valid_share"):
        assert math.isfinite(float(rows[0][name])), name
    assert {"loss": metrics.latest["loss"]} == {"loss": float(rows[-1]["loss"])}


def test_logged_learning_rates_are_those_of_the_step(tmp_path: Path) -> None:
    module = make_module(schedule="linear", steps=4, encoder_lr=0.5, head_lr=1.0)
    fit(
        tmp_path,
        module,
        [make_batch(seed) for seed in range(4)],
        TrainingMetrics(every=1, batch_size=2),
        steps=4,
    )
    rows = read_metrics(tmp_path / "metrics.csv").rows
    assert [float(row["lr_encoder"]) for row in rows] == [0.5, 0.375, 0.25, 0.125]
    assert [float(row["lr_head"]) for row in rows] == [1.0, 0.75, 0.5, 0.25]


class Stderr(io.StringIO):
    """Standard error without a terminal."""


def test_progress_starts_at_the_current_step_and_shows_the_last_logged_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Stderr()
    monkeypatch.setattr("sys.stderr", shown)
    metrics = TrainingMetrics(every=1, batch_size=2)
    progress = TrainingProgress(metrics, seconds=0.0)
    trainer: Any = SimpleNamespace(is_global_zero=True, max_steps=10, global_step=4)
    module: Any = None
    progress.on_train_start(trainer, module)
    progress.on_step(trainer, module, 5)  # nothing is logged yet
    metrics.latest = {"loss": 1.23456, "images_per_s": 78.9, "valid_share": 0.0421}
    progress.on_step(trainer, module, 6)
    progress.on_exception(trainer, module, ValueError())
    for word in ("5 of 10", "6 of 10", "loss=1.235", "images/s=78.9", "valid=4.2%"):
        assert word in shown.getvalue(), word


def test_only_rank_0_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Stderr()
    monkeypatch.setattr("sys.stderr", shown)
    progress = TrainingProgress(TrainingMetrics(every=1, batch_size=2), seconds=0.0)
    trainer: Any = SimpleNamespace(is_global_zero=False, max_steps=10, global_step=0)
    progress.on_train_start(trainer, trainer)
    progress.on_step(trainer, trainer, 1)
    progress.on_train_end(trainer, trainer)
    assert shown.getvalue() == ""


def read_records(stop: GracefulStop, folder: Path, *, records: int, failed: int) -> None:
    """Pass a micro-batch with failed records to the callback, then end the step."""
    trainer: Any = SimpleNamespace(
        default_root_dir=str(folder), global_rank=0, world_size=1, max_steps=100, should_stop=False
    )
    names = [f"own/0[{i}] own/0/{i}: no image" for i in range(failed)]
    stop.on_train_batch_start(trainer, None, {"sample": torch.arange(records - failed), "failed": names}, 0)
    stop.on_step(trainer, trainer, 1)


def test_more_than_1_percent_bad_records_stop_the_run(tmp_path: Path) -> None:
    saver: Any = SimpleNamespace()
    stop = GracefulStop(saver)
    read_records(stop, tmp_path, records=500, failed=400)  # fewer than at_least
    stop = GracefulStop(saver)
    for _ in range(5):
        read_records(stop, tmp_path, records=1000, failed=10)  # 1 %
    with pytest.raises(ValueError) as raised:
        read_records(stop, tmp_path, records=1000, failed=11)
    for word in ("61 of 6000", "1%", "own/0[10]", "verify"):
        assert word in str(raised.value)
    assert len((tmp_path / "failed-records-0.txt").read_text().splitlines()) == 400 + 61


class StopAtStep2(StepCallback):
    """Ends the training early, as Lightning's Timer does."""

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        trainer.should_stop = step == 2


def test_a_run_that_ends_early_is_saved_and_fails(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=100)
    callbacks = [checkpoints, GracefulStop(checkpoints), StopAtStep2()]
    trainer = fit(tmp_path, make_module(), [make_batch(seed) for seed in range(4)], *callbacks, steps=4)
    with pytest.raises(ValueError, match="step 2 of 4"):
        raise_if_incomplete(trainer, callbacks)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000000002.ckpt"]
