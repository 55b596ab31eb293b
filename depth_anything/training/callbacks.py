"""What happens at a step boundary: numbers, checkpoints, and stopping together; validation.py adds to it.

Lightning's batch hooks fire once a micro-batch. Everything here happens once an optimizer step, so that a
checkpoint never lands in the middle of an accumulation, and every rank does the same things at the same step.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from depth_anything.data.loader import WorkerError
from depth_anything.data.tars import StorageUnavailable
from depth_anything.disk import atomic_write
from depth_anything.errors import SAME_COMMAND, UserError, UserMessage
from depth_anything.progress import ProgressLine
from depth_anything.training.base import DepthModule
from depth_anything.training.signals import StoppedBySignal, signal_handler

T = TypeVar("T")

NON_FINITE_ADVICE = (
    "the last checkpoint is from before it: "
    "lower recipe.encoder_lr and recipe.head_lr, under name=ANOTHER_NAME"
)
CHECKPOINT_NAME = "step-{:09d}.ckpt"


class StepCallback(pl.Callback):
    """A callback whose `on_step` runs once an optimizer step, after the last of its micro-batches."""

    _last = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remember where the run stands, so that the step it resumed from is not handled twice."""
        self._last = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Call `on_step` when the optimizer has stepped."""
        if trainer.global_step != self._last:
            self._last = trainer.global_step
            self.on_step(trainer, module, trainer.global_step)

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Act after optimizer step number `step`, counted from 1."""


class TrainingMetrics(StepCallback):
    """Log losses, rates, gradient norm, images/s, data wait, memory and the share of valid pixels.

    Losses and shares are those of the logged step: the mean over all its micro-batches on all ranks. There is one
    synchronization a log line.
    """

    def __init__(self, *, every: int, batch_size: int) -> None:
        """Log every `every` steps of `batch_size` images."""
        self.every, self.batch_size = every, batch_size
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, module)
        self._since = self._idle = time.perf_counter()
        self._wait, self._steps = 0.0, 0
        self._sum: Any = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Add the time since the last micro-batch ended: what the step waited for data."""
        self._wait += time.perf_counter() - self._idle
        self._rates = {f"lr_{group['name']}": group["lr"] for group in trainer.optimizers[0].param_groups}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Log on a step boundary, then start waiting for data."""
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        self._idle = time.perf_counter()

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Log when due and forget the step's parts."""
        self._steps += 1
        for part in module.parts:  # one loss that is no number makes the sum none, whatever comes after it
            self._sum = part["loss"] + self._sum
        if step % self.every == 0 or step == trainer.max_steps:
            self._log(trainer, module, step)
        module.parts.clear()

    def _log(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        names = list(module.parts[0])
        values = torch.stack([torch.stack([part[name] for name in names]) for part in module.parts]).mean(0)
        values = torch.cat([values, self._sum.to(values.dtype)[None]])
        if trainer.world_size > 1:
            dist.all_reduce(values)
            values /= trainer.world_size
        *means, total = values.double().tolist()
        numbers = dict(zip(names, means, strict=True))
        valid_share = numbers.pop("valid_share", None)
        if module.grad_norm is not None:
            numbers["grad_norm"] = float(module.grad_norm)
        if not math.isfinite(numbers["loss"]):
            raise ValueError(f"the loss is {numbers['loss']} at step {step}; {NON_FINITE_ADVICE}")
        if not math.isfinite(total):
            raise ValueError(
                f"the loss was {total} in one of the last {self._steps} steps up to {step}; {NON_FINITE_ADVICE}"
            )
        numbers.update(self._rates)
        elapsed = time.perf_counter() - self._since
        numbers["images_per_s"] = self._steps * self.batch_size / elapsed
        numbers["data_wait"] = self._wait / elapsed
        if module.device.type == "cuda":
            numbers["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        if valid_share is not None:
            numbers["valid_share"] = valid_share
        self.latest = numbers
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        self._since, self._wait, self._steps, self._sum = time.perf_counter(), 0.0, 0, 0.0


class TrainingProgress(StepCallback):
    """A bar with ETA on a terminal, a line now and then elsewhere; rank 0 alone."""

    def __init__(self, metrics: TrainingMetrics, *, seconds: float = 20.0) -> None:
        """Show `metrics.latest`; without a terminal print at most every `seconds`."""
        self.metrics, self.seconds = metrics, seconds
        self._bar: ProgressLine | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the bar where the run stands."""
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            self._bar = ProgressLine(
                "training",
                total=trainer.max_steps,
                initial=trainer.global_step,
                unit="step",
                interval_s=self.seconds,
                keep=True,
            )

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Advance the bar; show the numbers of the last log line."""
        if self._bar is None:
            return
        latest, shown = self.metrics.latest, {}
        if latest:
            shown = {"loss": f"{latest['loss']:.3f}", "images/s": f"{latest['images_per_s']:.1f}"}
            if "valid_share" in latest:
                shown["valid"] = f"{latest['valid_share']:.1%}"
        self._bar.update(values=shown)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar before the message."""
        self.on_train_end(trainer, module)


def gather_or_raise(ranks: int, work: Callable[[], T]) -> list[T]:
    """Do something on every rank and share what came out; where one fails, all stop with its sentence.

    A rank that stopped alone would leave the others waiting for it until a timeout. Before the first step a signal
    ends `work` at once on the rank that receives it.

    Raises:
        ValueError: As the first rank on which `work` raised it, or an OSError.
        Exception: Anything else that `work` raised on this rank; the other ranks raise a ValueError that names it.
        Stopped: If a signal ended `work` on any rank.
    """
    if ranks == 1:
        return [work()]
    result, failure, number, own = None, None, 0, None
    try:
        with signal_handler.interruptible():
            result = work()
    except (ValueError, OSError) as error:
        failure = UserError(error.parts if isinstance(error, UserMessage) else str(error))
    except StoppedBySignal as stop:
        number = stop.number
    except Exception as error:
        failure, own = UserError(f"rank {dist.get_rank()} failed: {error!r}"), error
    shares: list[Any] = [None] * ranks
    dist.all_gather_object(shares, (result, failure, number))
    if number := max(number for _, _, number in shares):
        signal_handler.stop(number)
    if own is not None:
        raise own
    for _, failure, _ in shares:
        if failure is not None:
            raise failure
    return [result for result, _, _ in shares]


class Checkpoints(StepCallback):
    """Keep the newest checkpoints of a run, each complete or absent."""

    def __init__(self, folder: Path, *, every: int, keep: int = 2) -> None:
        """Save into `folder` every `every` steps and at the end; keep the newest `keep`."""
        self.folder, self.every, self.keep = folder, every, keep
        self._saved = -1
        self._began = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remember where the run stands: of that step there is a checkpoint."""
        super().on_train_start(trainer, module)
        self._began = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save where something else than a signal ended the training early, as +trainer.max_time does."""
        if trainer.global_step > self._began:
            self.save(trainer, trainer.global_step)

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Save when due."""
        if step % self.every == 0 or step == trainer.max_steps:
            self.save(trainer, step)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Save what is done when the next batch cannot be had; several ranks are not all here to do so."""
        if (
            isinstance(exception, StorageUnavailable | WorkerError)
            and trainer.world_size == 1
            and trainer.global_step
        ):
            self.save(trainer, trainer.global_step)

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Save now, unless this step is saved already. Every rank must call it at the same step.

        Raises:
            ValueError: If the gradient is not finite, or on several ranks, alike on all, if the disk is full.
            OSError: If the disk is full or cannot be written; older checkpoints stay as they are.
        """
        if step == self._saved:
            return
        norm: Any = trainer.lightning_module.grad_norm
        if norm is not None and not bool(torch.isfinite(norm)):  # alike on all ranks: gradients are averaged
            raise ValueError(
                f"the gradient is not finite at step {step}, which is not saved; {NON_FINITE_ADVICE}"
            )
        gather_or_raise(trainer.world_size, lambda: self._write(trainer, step))
        self._saved = step

    def _write(self, trainer: pl.Trainer, step: int) -> None:
        try:
            for logger in trainer.loggers:
                logger.save()  # a row that a kill took would not be written again
            trainer.save_checkpoint(self.folder / CHECKPOINT_NAME.format(step))
        except OSError:
            if trainer.world_size > 1:
                trainer.strategy.barrier()  # where the other ranks wait for the checkpoint
            raise
        if trainer.is_global_zero:
            atomic_write(self.folder.parent / "saved.json", json.dumps({"step": step}).encode())
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink(missing_ok=True)


class GracefulStop(StepCallback):
    """Stop all ranks at the same step boundary: a signal was caught on one, or too many records are bad.

    Signal handlers only set a flag (training/signals.py). Lightning 2.6 instead saves inside the handler, which
    deadlocks when ranks stand at different places, and broadcasts from the device at every step (engine notes §1).

    Attributes:
        signalled: The signal on which the ranks have agreed, 0 for none.
    """

    def __init__(
        self, checkpoints: Checkpoints, *, every: int = 1, ceiling: float = 0.01, at_least: int = 1000
    ) -> None:
        """Agree every `every` steps.

        Args:
            checkpoints: Saves before the run stops for a signal.
            every: Steps between agreements; one rank alone agrees with itself at every step.
            ceiling: Share of the records read that may fail.
            at_least: Records read before the ceiling counts.
        """
        self.checkpoints, self.every, self.ceiling, self.at_least = checkpoints, every, ceiling, at_least
        self.agreed_signal = 0
        self.failed = self.read = 0
        self._here: list[str] = []
        self._group: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open a CPU group, so that agreeing never waits for the GPU, and stop here if a signal came before."""
        super().on_train_start(trainer, module)
        signal_handler.install()  # again, where a library has put handlers of its own in place
        signal_handler.hold()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._agree(trainer.world_size)
        if self.agreed_signal and trainer.global_step < trainer.max_steps:
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Count the records of a micro-batch, and name the ones that failed."""
        failed = batch["failed"]
        self.read += len(batch["sample"]) + len(failed)
        self.failed += len(failed)
        if failed:
            self._name(Path(trainer.default_root_dir), trainer.global_rank, failed)

    def _name(self, folder: Path, rank: int, failed: list[str]) -> None:
        written = False
        with suppress(OSError):  # on one rank of several; a full disk is told at the next checkpoint
            with open(folder / f"failed-records-{rank}.txt", "a") as file:
                file.writelines(f"{name}\n" for name in failed)
            written = True
        self._here = (self._here + failed)[-3:]
        if self.failed <= 20 or not written:
            for name in failed:
                print(f"replaced a bad record: {name}", file=sys.stderr)

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Add the ranks' counts and signals up and act on them, all at once."""
        if trainer.world_size > 1 and step % self.every:
            return
        failed, read = self._agree(trainer.world_size)
        if self.agreed_signal and step < trainer.max_steps:
            self.checkpoints.save(trainer, step)
            trainer.should_stop = True
        if read >= self.at_least and failed > self.ceiling * read:
            raise UserError(
                f"{failed} of {read} records read are bad, more than {self.ceiling:.0%}: {'; '.join(self._here)}",
                ["look at the set with `depth-anything verify` and ", SAME_COMMAND],
            )

    def _agree(self, ranks: int) -> tuple[int, int]:
        """Find the signal that any rank has received; return the failed and the read records of all ranks."""
        totals = [signal_handler.caught, self.failed, self.read]
        if ranks > 1:
            shared = torch.tensor([float(n) for n in totals], dtype=torch.float64)
            dist.all_reduce(shared[1:], group=self._group)
            dist.all_reduce(shared[:1], op=dist.ReduceOp.MAX, group=self._group)
            totals = [int(n) for n in shared.tolist()]
        self.agreed_signal, failed, read = totals
        return failed, read

    def wait_for_all_ranks(self) -> None:
        """Wait until every rank has called this."""
        if self._group is not None:
            dist.barrier(group=self._group)
