"""What a step does with the recipe's numbers, what is logged of it, and which records may fail."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import (
    Checkpoints,
    GracefulStop,
    StepCallback,
    TrainingMetrics,
    TrainingProgress,
)
from depth_anything.training.config import Recipe
from depth_anything.training.lightning import raise_if_incomplete, trainer_arguments
from depth_anything.training.loggers import MetricsCSV, read_metrics

SIDE = 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The work is small: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pixelwise(nn.Module):
    """As much of a network as training asks for: each pixel's value is a mix of its colors."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained, self.depth_head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1)
        self.pretrained.blocks: Any = []
        self.encoder, self.taps, self.quantity, self.unit = "vitn", (0, 1, 2, 3), "disparity", "relative"
        self.max_depth, self.calibration, self.licence, self.origin = None, None, None, {}
        self.input_size = SIDE

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.depth_head(self.pretrained(image))[:, 0]

    def encoder_parameters(self) -> Any:
        return self.pretrained.parameters()

    def head_parameters(self) -> Any:
        return self.depth_head.parameters()


def module_of(**changes: Any) -> DepthModule:
    torch.manual_seed(0)
    numbers = {"steps": 100, "encoder_lr": 1e-3, "head_lr": 1e-3, "schedule": "constant", **changes}
    model: Any = Pixelwise()
    return DepthModule(model, Recipe(**numbers))


def batch(seed: int = 0, size: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (size, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator),
        "target": torch.rand(size, SIDE, SIDE, generator=generator),
        "valid": torch.ones(size, SIDE, SIDE, dtype=torch.bool),
        "sample": torch.arange(size),
        "failed": [],
    }


def trainer_of(folder: Path, *callbacks: pl.Callback, steps: int, accumulate: int = 1) -> pl.Trainer:
    arguments = trainer_arguments(callbacks=list(callbacks), max_steps=steps, run_dir=str(folder))
    arguments |= {"accelerator": "cpu", "devices": 1, "accumulate_grad_batches": accumulate}
    trainer = pl.Trainer(**arguments)
    trainer.loggers = [MetricsCSV(folder / "metrics.csv")]
    return trainer


class Batches(IterableDataset):
    """Micro-batches in their order."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def fit(folder: Path, module: DepthModule, batches: list[Any], *callbacks: pl.Callback, **more: Any) -> None:
    loader = DataLoader(Batches(batches), batch_size=None)
    trainer_of(folder, *callbacks, **more).fit(module, train_dataloaders=loader)


class Clipped(StepCallback):
    """Keeps what is left of the gradient when the optimizer has stepped, and its norm before clipping."""

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        self.left = math.hypot(*(float(p.grad.norm()) for p in module.parameters()))
        self.before = float(module.grad_norm)


@pytest.mark.parametrize("clip_norm", [None, 1e-3, 1e6])
def test_gradients_are_clipped_to_the_recipes_norm(tmp_path: Path, clip_norm: float | None) -> None:
    seen, module = Clipped(), module_of(clip_norm=clip_norm)
    module.zero_grad = lambda *_, **__: None  # type: ignore[method-assign]
    fit(tmp_path, module, [batch()], seen, steps=1)
    assert seen.before > 0.01
    expected = min(seen.before, clip_norm or math.inf)
    assert seen.left == pytest.approx(expected, rel=1e-3)


def test_weight_decay_is_the_recipes_and_decoupled(tmp_path: Path) -> None:
    """A step of AdamW with decay is the one without, less rate × decay × weight."""
    made = {}
    for decay in (0.0, 0.5):
        module = module_of(weight_decay=decay, encoder_lr=1e-2, head_lr=1e-3)
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        fit(tmp_path, module, [batch()], steps=1)
        made[decay] = dict(module.named_parameters())
    for name, plain in made[0.0].items():
        rate = 1e-2 if "pretrained" in name else 1e-3
        torch.testing.assert_close(made[0.5][name], plain - rate * 0.5 * start[name])
        assert not torch.equal(made[0.5][name], plain)


def test_the_logged_loss_is_the_mean_over_all_micro_batches(tmp_path: Path) -> None:
    batches = [batch(seed) for seed in range(6)]
    batches[4]["valid"] = batches[4]["valid"].clone()
    batches[4]["valid"][:, :, : SIDE // 2] = False
    module = module_of(encoder_lr=0.0, head_lr=0.0)
    with torch.no_grad():
        alone = [module.losses(one) for one in batches]
    fit(tmp_path, module, batches, TrainingMetrics(every=1, batch_size=6), steps=2, accumulate=3)
    rows = read_metrics(tmp_path / "metrics.csv").rows
    assert [row["step"] for row in rows] == ["1", "2"]
    for row, parts in zip(rows, (alone[:3], alone[3:]), strict=True):
        for name in ("loss", "ssi", "gm"):
            mean = sum(float(part[name]) for part in parts) / 3
            assert float(row[name]) == pytest.approx(mean, rel=1e-5)
            assert float(row[name]) != pytest.approx(float(parts[-1][name]), rel=1e-3)
    assert float(rows[1]["valid_share"]) == pytest.approx((1 + 0.5 + 1) / 3)
    assert module.parts == []


@pytest.mark.parametrize(("every", "steps", "logged"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 2, [2])])
def test_metrics_come_when_due_and_at_the_end(
    tmp_path: Path, every: int, steps: int, logged: list[int]
) -> None:
    metrics = TrainingMetrics(every=every, batch_size=2)
    fit(tmp_path, module_of(), [batch(seed) for seed in range(steps)], metrics, steps=steps)
    rows = read_metrics(tmp_path / "metrics.csv").rows
    assert [int(row["step"]) for row in rows] == logged
    for name in ("loss", "grad_norm", "lr_encoder", "lr_head", "images_per_s", "data_wait", "valid_share"):
        assert math.isfinite(float(rows[0][name])), name
    assert {"loss": metrics.latest["loss"]} == {"loss": float(rows[-1]["loss"])}


def test_the_rates_that_are_logged_are_those_the_step_used(tmp_path: Path) -> None:
    module = module_of(schedule="linear", steps=4, encoder_lr=0.5, head_lr=1.0)
    fit(tmp_path, module, [batch(seed) for seed in range(4)], TrainingMetrics(every=1, batch_size=2), steps=4)
    rows = read_metrics(tmp_path / "metrics.csv").rows
    assert [float(row["lr_encoder"]) for row in rows] == [0.5, 0.375, 0.25, 0.125]
    assert [float(row["lr_head"]) for row in rows] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_unsaved(tmp_path: Path, value: float) -> None:
    good, bad = batch(), {**batch(1), "bad": torch.tensor(True)}

    def failing() -> DepthModule:
        module = module_of()
        losses = module.losses

        def multiplied(given: dict[str, Any]) -> dict[str, torch.Tensor]:
            return {name: part * (value if "bad" in given else 1) for name, part in losses(given).items()}

        module.losses = multiplied  # type: ignore[method-assign]
        return module

    with pytest.raises(ValueError, match=rf"{value} at step 2\b.*recipe\.encoder_lr.*name="):
        fit(tmp_path, failing(), [good, bad, good], TrainingMetrics(every=1, batch_size=2), steps=3)
    # nor where the step is not one that is logged
    checkpoints = Checkpoints(tmp_path / "others", every=1)
    with pytest.raises(ValueError, match=r"gradient is not finite at step 2\b"):
        fit(
            tmp_path,
            failing(),
            [good, bad, good],
            TrainingMetrics(every=3, batch_size=2),
            checkpoints,
            steps=3,
        )
    assert [path.name for path in (tmp_path / "others").iterdir()] == ["step-000000001.ckpt"]


class Terminal(io.StringIO):
    """Standard error that is no terminal."""


def test_progress_shows_the_last_logged_numbers_from_where_the_run_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    metrics = TrainingMetrics(every=1, batch_size=2)
    progress = TrainingProgress(metrics, seconds=0.0)
    trainer: Any = SimpleNamespace(is_global_zero=True, max_steps=10, global_step=4)
    module: Any = None
    progress.on_train_start(trainer, module)
    progress.on_step(trainer, module, 5)  # before there is a log line
    metrics.latest = {"loss": 1.23456, "images_per_s": 78.9, "valid_share": 0.0421}
    progress.on_step(trainer, module, 6)
    progress.on_exception(trainer, module, ValueError())
    for word in ("5 of 10", "6 of 10", "loss=1.235", "images/s=78.9", "valid=4.2%"):
        assert word in shown.getvalue(), word


def test_progress_is_rank_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    progress = TrainingProgress(TrainingMetrics(every=1, batch_size=2), seconds=0.0)
    trainer: Any = SimpleNamespace(is_global_zero=False, max_steps=10, global_step=0)
    progress.on_train_start(trainer, trainer)
    progress.on_step(trainer, trainer, 1)
    progress.on_train_end(trainer, trainer)
    assert shown.getvalue() == ""


def read(agreement: GracefulStop, folder: Path, *, records: int, failed: int) -> None:
    """Let a micro-batch come of which so many records failed, and agree on it."""
    trainer: Any = SimpleNamespace(
        default_root_dir=str(folder), global_rank=0, world_size=1, max_steps=100, should_stop=False
    )
    names = [f"own/0[{i}] own/0/{i}: no image" for i in range(failed)]
    agreement.on_train_batch_start(
        trainer, None, {"sample": torch.arange(records - failed), "failed": names}, 0
    )
    agreement.on_step(trainer, trainer, 1)


def test_more_than_one_in_a_hundred_bad_records_stop_the_run(tmp_path: Path) -> None:
    saver: Any = SimpleNamespace()
    agreement = GracefulStop(saver)
    read(agreement, tmp_path, records=500, failed=400)  # too few to tell
    agreement = GracefulStop(saver)
    for _ in range(5):
        read(agreement, tmp_path, records=1000, failed=10)  # 1 %
    with pytest.raises(ValueError) as raised:
        read(agreement, tmp_path, records=1000, failed=11)
    for word in ("61 of 6000", "1%", "own/0[10]", "verify"):
        assert word in str(raised.value)
    assert len((tmp_path / "failed-records-0.txt").read_text().splitlines()) == 400 + 61


class StopsEarly(StepCallback):
    """Ends the training after a step, as Lightning's Timer does."""

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        trainer.should_stop = step == 2


def test_a_run_that_lightning_ends_early_is_saved_and_no_success(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=100)
    callbacks = [checkpoints, GracefulStop(checkpoints), StopsEarly()]
    trainer = trainer_of(tmp_path, *callbacks, steps=4)
    loader = DataLoader(Batches([batch(seed) for seed in range(4)]), batch_size=None)
    trainer.fit(module_of(), train_dataloaders=loader)
    with pytest.raises(ValueError, match="step 2 of 4"):
        raise_if_incomplete(trainer, callbacks)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000000002.ckpt"]
