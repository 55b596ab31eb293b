"""Trainings of a tiny network that save checkpoints, for tests."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_training import fit, make_batch, make_module
from torch import nn

from depth_anything.model.integrity import find_damage
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback
from depth_anything.training.checkpoint_writer import SingleFileWriter
from depth_anything.training.checkpoints import Checkpoints

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
