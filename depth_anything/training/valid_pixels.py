"""Detect training data without valid pixels: report such batches and sets, and stop a run that has nothing else.

The loss of an image without valid pixels is zero, and so is its gradient. A wrong unit or `max_depth` would otherwise
train nothing for the whole run and report success.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from depth_anything.data import codec
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.sample import find_target_field
from depth_anything.errors import UserError
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback

STOP_AFTER_IMAGES, STOP_AFTER_STEPS = 64, 10
"""The run stops after this many images in a row, over at least this many steps, without a valid target."""
MAX_REPORTED_BATCHES = 3
"""Number of batches without a valid target that are printed."""


def has_valid_target(target: Tensor, valid: Tensor, metric: bool | Tensor) -> Tensor:
    """Return which images of a batch the losses can learn from.

    Args:
        target: (B,H,W), disparity or meters.
        valid: (B,H,W) bool.
        metric: Whether targets are meters, for all images or as a bool tensor (B,). In meters two valid pixels are
            enough; disparity is compared up to scale and shift and needs two different values.

    Returns:
        (B,) bool.
    """
    flat, mask = target.flatten(1), valid.flatten(1)
    enough = mask.sum(1) >= 2
    if metric is True:
        return enough
    differ = torch.where(mask, flat, math.inf).amin(1) < torch.where(mask, flat, -math.inf).amax(1)
    return enough & (differ if metric is False else differ | metric)


class ValidPixelCheck(StepCallback):
    """Count images without a valid target, with one synchronization every `every` steps."""

    def __init__(self, open_data: Callable[[pl.Trainer], StreamDataset] | None = None, *, every: int) -> None:
        """Check every `every` optimizer steps and at the end.

        Args:
            open_data: Returns the training data; None: those of the trainer's datamodule.
            every: In optimizer steps.
        """
        self._open_data, self.every = open_data or _open_train_data, every
        self._pending: list[
            tuple[int, Tensor]
        ] = []  # step; (2, B) sample numbers and whether the target is valid
        self._reported = 0
        self._streaks = {
            False: _Streak(),
            True: _Streak(),
        }  # of the sets in meters, and of those in disparity
        self._set_streaks: dict[str, _Streak] = {}
        self._warned_sets: set[str] = set()
        self._start_step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store the current step."""
        super().on_train_start(trainer, module)
        self._start_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Compute on the device which images have a valid target, without waiting for the result."""
        metric: Any = batch["metric"] if "metric" in batch else None
        if metric is None:
            data = self._open_data(trainer)
            metric = data.depth_range is not None or getattr(data, "is_categorical", False)
        valid = has_valid_target(batch["target"], batch["valid"], metric)
        self._pending.append((trainer.global_step + 1, torch.stack([batch["sample"], valid.long()])))

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Report and count when due; stop all ranks at the same step.

        Raises:
            UserError: If no image of many steps, or of the whole run, has a valid target: with a set, a record, and
                the range of values in its map.
        """
        if step % self.every and step != trainer.max_steps:
            return
        data = self._open_data(trainer)
        self._count_pending(
            data, report=trainer.is_global_zero, rank=" on rank 0" if trainer.world_size > 1 else ""
        )
        is_whole_run = self._start_step == 0 and step == trainer.max_steps
        totals = [
            number
            for streak in self._streaks.values()
            for number in (streak.samples, streak.steps, int(not streak.had_valid))
        ]
        if trainer.world_size > 1:
            shared = torch.tensor(totals, device=module.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MIN)
            totals = shared.tolist()
        for number, streak in enumerate(self._streaks.values()):
            samples, steps, never_valid = totals[3 * number : 3 * number + 3]
            samples *= trainer.world_size
            is_long = samples >= STOP_AFTER_IMAGES and steps >= STOP_AFTER_STEPS
            if samples and (is_long or (is_whole_run and never_valid)):
                raise UserError(
                    f"none of the last {samples} images ({steps} steps) has a valid target: "
                    f"{_describe_sample(data, streak.last)}"
                )
        for name, streak in self._set_streaks.items():
            if (
                streak.samples >= STOP_AFTER_IMAGES
                and name not in self._warned_sets
                and trainer.is_global_zero
            ):
                self._warned_sets.add(name)
                print(
                    f"none of the last {streak.samples} images of the set {name} has a valid target: "
                    f"{_describe_sample(data, streak.last)}",
                    file=sys.stderr,
                )

    def _count_pending(self, data: StreamDataset, *, report: bool, rank: str) -> None:
        """Count the batches since the last call, step by step, with one transfer from the device."""
        if not self._pending:
            return
        steps = [step for step, values in self._pending for _ in range(values.shape[1])]
        numbers, valid = torch.cat([values for _, values in self._pending], 1).tolist()
        self._pending.clear()
        by_step: dict[int, list[tuple[int, bool]]] = {}
        for step, number, is_valid in zip(steps, numbers, valid, strict=True):
            by_step.setdefault(step, []).append((number, bool(is_valid)))
        for step, samples in by_step.items():
            places = [data.stream.locate(number) for number, _ in samples]
            names = [shard.split("/")[0] for _, shard, _ in places]
            for name in dict.fromkeys(names):
                of_set = [sample for sample, its_set in zip(samples, names, strict=True) if its_set == name]
                self._set_streaks.setdefault(name, _Streak()).add(of_set)
            for relative, streak in self._streaks.items():
                streak.add(
                    [
                        sample
                        for sample, name in zip(samples, names, strict=True)
                        if (name in data.relative) == relative
                    ]
                )
            if not any(valid for _, valid in samples) and self._reported < MAX_REPORTED_BATCHES and report:
                self._reported += 1
                shown = ", ".join(f"{shard}[{index}]" for _, shard, index in places[:3])
                shown += ", …" if len(places) > 3 else ""
                print(
                    f"no image of step {step}{rank} has a valid target: samples "
                    f"{min(n for n, _ in samples)} to {max(n for n, _ in samples)} ({shown})",
                    file=sys.stderr,
                )


class _Streak:
    """Images in a row without a valid target.

    Attributes:
        samples: Number of images.
        steps: Number of steps they come from.
        had_valid: Whether any earlier image had a valid target.
        last: Sample number of the last image.
    """

    def __init__(self) -> None:
        self.samples, self.steps, self.had_valid, self.last = 0, 0, False, 0

    def add(self, samples: list[tuple[int, bool]]) -> None:
        """Add a step's sample numbers, each with whether its target is valid."""
        if any(valid for _, valid in samples):
            self.samples, self.steps, self.had_valid = 0, 0, True
        elif samples:
            self.samples, self.steps, self.last = self.samples + len(samples), self.steps + 1, samples[-1][0]


def _open_train_data(trainer: pl.Trainer) -> StreamDataset:
    with_datamodule: Any = trainer
    return with_datamodule.datamodule.open()


def _describe_sample(data: StreamDataset, number: int) -> str:
    """Describe a sample without a valid target: its shard and key, the values of its map, and the likely cause."""
    _, shard, index = data.stream.locate(number)
    name = shard.split("/")[0]
    if getattr(data, "is_categorical", False):
        return f"in {shard}[{index}] of the set {name}, as in all others, every pixel is ignored; write the set again"
    depth_range = None if name in data.relative else data.depth_range
    source = next(source for source in data.sources if source.name == name)
    try:
        key, fields = source.read(shard, index)
        field = find_target_field(fields, meters=depth_range is not None)
        values = codec.decode(fields[field])
    except (ValueError, OSError) as error:
        return f"{shard}[{index}] of the set {name} ({error})"
    quantity = field.partition(".")[0]
    place = f"{shard}[{index}] {key} of the set {name} has "
    known = values[np.isfinite(values) & ((values > 0) | (quantity == "disparity"))]
    if not known.size:
        other = "sky" if np.isposinf(values).any() else "unknown"
        return (
            f"{place}no finite {quantity}, all pixels are {other}; look at the set with  depth-anything view , and "
            "write it again if its values or its sky are wrong"
        )
    least, most = float(known.min()), float(known.max())
    if depth_range is None:
        value_range = (
            f"{quantity} {least:.4g} everywhere" if least == most else f"{quantity} {least:.4g} to {most:.4g}"
        )
        return (
            f"{place}{value_range}, and a crop of it has no two different valid values; write the set again if that is "
            f"wrong, or type sky=far if the pixels left out are sky (now sky={data.sky[name]})"
        )
    near, far = depth_range
    advice = (
        f"type max_depth={math.ceil(least) + 1} or more"
        if least > far
        else "type another min_depth or max_depth"
    )
    return (
        f"{place}depth {least:.4g} to {most:.4g} m, and only {near:g} to {far:g} m is valid (min_depth, max_depth); if "
        f"its unit is not meters (millimeters?), write the set again with the right unit; else {advice}, and "
        "name=ANOTHER_NAME"
    )
