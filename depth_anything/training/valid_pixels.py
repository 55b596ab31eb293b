"""Training data without a valid pixel: batches and sets of that kind are named, and a run of nothing else stops.

The losses of an image without valid pixels are zero, and so is their gradient: a wrong unit or `max_depth` would
otherwise train nothing, to the end, and report success.
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
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback

STOP_AFTER_IMAGES, STOP_AFTER_STEPS = 64, 10
"""So many images in a row, over so many steps, have nothing to learn from before the run stops."""
MAX_REPORTED_BATCHES = 3
"""So many batches are named."""


def has_valid_target(target: Tensor, valid: Tensor, metric: bool | Tensor) -> Tensor:
    """Tell which images of a batch the losses can learn from.

    Args:
        target: (B,H,W), disparity or metres.
        valid: (B,H,W) bool.
        metric: Whether targets are metres, for all or bool (B,). In metres two valid pixels are enough; disparity
            is compared up to scale and shift, and needs two different values.

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
    """Watch how many images have valid pixels, with one synchronization every `every` steps."""

    def __init__(self, open_data: Callable[[pl.Trainer], StreamDataset] | None = None, *, every: int) -> None:
        """Check every `every` steps and at the end.

        Args:
            open_data: Finds the data that is trained on; None: the datamodule's.
            every: In optimizer steps.
        """
        self._open_data, self.every = open_data or _open_train_data, every
        self._pending: list[tuple[int, Tensor]] = []  # step; (2, B) sample numbers and whether there is truth
        self._named = 0
        self._runs = {False: _Streak(), True: _Streak()}  # of the sets in metres, and of those in disparity
        self._sets: dict[str, _Streak] = {}
        self._warned: set[str] = set()
        self._began = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remember where the run goes on."""
        super().on_train_start(trainer, module)
        self._began = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Note on the device which images have truth; nothing waits for it."""
        metric = batch["metric"] if "metric" in batch else self._open_data(trainer).depth_range is not None
        truth = has_valid_target(batch["target"], batch["valid"], metric)
        self._pending.append((trainer.global_step + 1, torch.stack([batch["sample"], truth.long()])))

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Name and count when due; stop all ranks at the same step.

        Raises:
            ValueError: If no image of many steps, or of the whole run, has a pixel to learn from: with a set, a
                record, and what lies in its map.
        """
        if step % self.every and step != trainer.max_steps:
            return
        data = self._open_data(trainer)
        self._count(data, tell=trainer.is_global_zero, whose=" on rank 0" if trainer.world_size > 1 else "")
        whole = self._began == 0 and step == trainer.max_steps
        totals = [n for run in self._runs.values() for n in (run.samples, run.steps, int(not run.seen))]
        if trainer.world_size > 1:
            shared = torch.tensor(totals, device=module.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MIN)
            totals = shared.tolist()
        for number, run in enumerate(self._runs.values()):
            samples, steps, never = totals[3 * number : 3 * number + 3]
            samples *= trainer.world_size
            if samples and (
                (samples >= STOP_AFTER_IMAGES and steps >= STOP_AFTER_STEPS) or (whole and never)
            ):
                raise ValueError(
                    f"none of the last {samples} images ({steps} steps) has a pixel to learn from: "
                    f"{_describe_sample(data, run.last)}"
                )
        for name, run in self._sets.items():
            if run.samples >= STOP_AFTER_IMAGES and name not in self._warned and trainer.is_global_zero:
                self._warned.add(name)
                print(
                    f"none of the last {run.samples} images of the set {name} has a pixel to learn from: "
                    f"{_describe_sample(data, run.last)}",
                    file=sys.stderr,
                )

    def _count(self, data: StreamDataset, *, tell: bool, whose: str) -> None:
        """Count what came since the last time, step by step; one transfer from the device."""
        if not self._pending:
            return
        steps = [step for step, noted in self._pending for _ in range(noted.shape[1])]
        numbers, truth = torch.cat([noted for _, noted in self._pending], 1).tolist()
        self._pending.clear()
        by_step: dict[int, list[tuple[int, bool]]] = {}
        for step, number, has in zip(steps, numbers, truth, strict=True):
            by_step.setdefault(step, []).append((number, bool(has)))
        for step, samples in by_step.items():
            places = [data.stream.locate(number) for number, _ in samples]
            names = [shard.split("/")[0] for _, shard, _ in places]
            for name in dict.fromkeys(names):
                of_set = [sample for sample, its in zip(samples, names, strict=True) if its == name]
                self._sets.setdefault(name, _Streak()).add(of_set)
            for relative, run in self._runs.items():
                group = [
                    sample
                    for sample, name in zip(samples, names, strict=True)
                    if (name in data.relative) == relative
                ]
                run.add(group)
            if not any(has for _, has in samples) and self._named < MAX_REPORTED_BATCHES and tell:
                self._named += 1
                shown = ", ".join(f"{shard}[{index}]" for _, shard, index in places[:3])
                shown += ", …" if len(places) > 3 else ""
                print(
                    f"no image of step {step}{whose} has a pixel to learn from: samples "
                    f"{min(n for n, _ in samples)} to {max(n for n, _ in samples)} ({shown})",
                    file=sys.stderr,
                )


class _Streak:
    """Images in a row without truth.

    Attributes:
        samples: How many.
        steps: Over how many steps.
        seen: Whether any image had truth before.
        last: Number of the last sample without.
    """

    def __init__(self) -> None:
        self.samples, self.steps, self.seen, self.last = 0, 0, False, 0

    def add(self, samples: list[tuple[int, bool]]) -> None:
        """Add a step's sample numbers, each with whether it has truth."""
        if any(has for _, has in samples):
            self.samples, self.steps, self.seen = 0, 0, True
        elif samples:
            self.samples, self.steps, self.last = self.samples + len(samples), self.steps + 1, samples[-1][0]


def _open_train_data(trainer: pl.Trainer) -> StreamDataset:
    data: Any = trainer
    return data.datamodule.open()


def _describe_sample(data: StreamDataset, number: int) -> str:
    """Say of a sample without truth where it lies, what its map holds, and what the likely cause is."""
    _, shard, index = data.stream.locate(number)
    name = shard.split("/")[0]
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
            f"{place}no finite {quantity}, all is {other}; look at the set with  depth-anything view , and make it "
            "again if its values or its sky are not what they should be"
        )
    least, most = float(known.min()), float(known.max())
    if depth_range is None:
        what = (
            f"{quantity} {least:.4g} everywhere" if least == most else f"{quantity} {least:.4g} to {most:.4g}"
        )
        return (
            f"{place}{what}, of which a crop has no two different valid values; make the set again if that is not "
            f"what it should be, or type sky=far if what is left out is sky (now sky={data.sky[name]})"
        )
    near, far = depth_range
    cause = (
        f"type max_depth={math.ceil(least) + 1} or more"
        if least > far
        else "type another min_depth or max_depth"
    )
    return (
        f"{place}depth {least:.4g} to {most:.4g} m, and only {near:g} to {far:g} m is valid (min_depth, max_depth); if "
        f"its unit is not meters (millimeters?), make the set again with the right unit; else {cause}, under "
        "name=ANOTHER_NAME"
    )
