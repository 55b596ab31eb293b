"""A tiny network, batches and a Trainer for tests of training; no encoder, no shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import GracefulStop, TrainingMetrics
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.lightning import trainer_arguments
from depth_anything.training.loggers import MetricsCSV
from depth_anything.training.recipes import Recipe

SIDE = 8
STEPS = 6


class PixelNetwork(nn.Module):
    """The attributes of DepthAnything that training reads; each pixel's value is a mix of its colors."""

    def __init__(self, *, max_depth: float | None = None) -> None:
        super().__init__()
        self.pretrained, self.depth_head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1)
        self.pretrained.blocks: Any = []
        self.encoder, self.taps, self.quantity, self.unit = "vitn", (0, 1, 2, 3), "disparity", "relative"
        self.max_depth, self.calibration, self.licence, self.origin = None, None, None, {}
        self.input_size, self.head, self.canonical_focal = SIDE, None, None
        self.scale = max_depth

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output = self.depth_head(self.pretrained(image))[:, 0]
        return output if self.scale is None else output.sigmoid() * self.scale + 0.1

    def encoder_parameters(self) -> Any:
        return self.pretrained.parameters()

    def head_parameters(self) -> Any:
        return self.depth_head.parameters()


def make_module(**changes: Any) -> DepthModule:
    """Build a module of fixed weights; `changes` are numbers of its recipe."""
    torch.manual_seed(0)
    numbers = {"steps": 100, "encoder_lr": 1e-3, "head_lr": 1e-3, "schedule": "constant", **changes}
    network: Any = PixelNetwork()
    return DepthModule(network, Recipe(**numbers))


def make_batch(seed: int = 0, size: int = 2) -> dict[str, Any]:
    """Build a micro-batch of random pixels and disparities, all valid."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (size, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator),
        "target": torch.rand(size, SIDE, SIDE, generator=generator),
        "valid": torch.ones(size, SIDE, SIDE, dtype=torch.bool),
        "sample": torch.arange(size),
        "failed": [],
    }


class BatchList(IterableDataset):
    """Micro-batches in the order of a list."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def make_trainer(
    folder: Path,
    *callbacks: pl.Callback,
    steps: int,
    accumulate: int = 1,
    precision: str = "32-true",
    accelerator: str = "cpu",
) -> pl.Trainer:
    """Build the Trainer as a run does, on one device, with metrics.csv as its logger."""
    arguments = trainer_arguments(callbacks=callbacks, max_steps=steps, run_dir=str(folder), log_every=1)
    arguments |= {"accelerator": accelerator, "devices": 1, "accumulate_grad_batches": accumulate}
    arguments["precision"] = precision
    trainer = pl.Trainer(**arguments)
    trainer.loggers = [MetricsCSV(folder / "metrics.csv")]
    return trainer


def fit(
    folder: Path,
    module: DepthModule,
    batches: Sequence[Any],
    *callbacks: pl.Callback,
    checkpoint: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train on a list of micro-batches and return the Trainer."""
    trainer = make_trainer(folder, *callbacks, **options)
    loader = DataLoader(BatchList(batches), batch_size=None)
    trainer.fit(module, train_dataloaders=loader, ckpt_path=checkpoint)
    return trainer


class Data(pl.LightningDataModule):
    """Two micro-batches."""

    micro_batch = 2

    def train_dataloader(self) -> Any:
        return DataLoader(BatchList([make_batch(0), make_batch(1)]), batch_size=None)


def run_callbacks(folder: Path, *added: pl.Callback, every: int = 2) -> list[pl.Callback]:
    """List the callbacks of a run in its order, without validation and data checks."""
    checkpoints = Checkpoints(folder / "checkpoints", every=every)
    return [TrainingMetrics(every=1, batch_size=2), *added, checkpoints, GracefulStop(checkpoints)]


def train(folder: Path, *added: pl.Callback, steps: int = STEPS, begin: int = 0) -> Any:
    """Train to `steps`, from the checkpoint of step `begin`; return the module."""
    checkpoint = folder / f"checkpoints/step-{begin:09d}.ckpt" if begin else None
    module = make_module()
    batches = [make_batch(seed) for seed in range(begin, steps)]
    fit(folder, module, batches, *run_callbacks(folder, *added), steps=steps, checkpoint=checkpoint)
    return module


def weights(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])
