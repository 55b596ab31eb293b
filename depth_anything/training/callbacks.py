"""Callbacks that act once an optimizer step: log metrics, show progress, stop all ranks together.

Lightning calls its batch hooks once a micro-batch. A checkpoint taken there could land in the middle of a gradient
accumulation, so the callbacks here, and those in checkpoints.py, validation.py and valid_pixels.py, derive from
`StepCallback`.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from depth_anything.errors import SAME_COMMAND, UserError, UserMessage
from depth_anything.progress import ProgressLine
from depth_anything.training.base import DepthModule
from depth_anything.training.signals import StoppedBySignal, signal_handler

if TYPE_CHECKING:
    from depth_anything.training.checkpoints import Checkpoints

T = TypeVar("T")

NON_FINITE_ADVICE = (
    "lower recipe.encoder_lr and recipe.head_lr (in stage=controlnet recipe.lr), and type name=ANOTHER_NAME: what is "
    "saved is older"
)


class StepCallback(pl.Callback):
    """Base class of callbacks whose `on_step` runs once an optimizer step, after its last micro-batch."""

    _last_step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store the current step, so that the step from which a run resumes is not handled again."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Call `on_step` if the optimizer has stepped."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step(trainer, module, trainer.global_step)

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Act after optimizer step number `step`, counted from 1."""


class TrainingMetrics(StepCallback):
    """Log losses, learning rates, gradient norm, images/s, time waited for data, memory and the share of valid pixels.

    Losses and shares are the mean over all micro-batches of the logged step on all ranks. `LightningModule.log` would
    log the last micro-batch only, and synchronize at every step; this callback synchronizes once a log line.
    """

    def __init__(self, *, every: int, batch_size: int) -> None:
        """Log every `every` steps of `batch_size` images."""
        self.every, self.batch_size = every, batch_size
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, module)
        self._logged_at = self._batch_ended_at = time.perf_counter()
        self._wait_s, self._steps = 0.0, 0
        self._loss_sum: Any = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Add the time since the last micro-batch ended, which the step waited for data."""
        self._wait_s += time.perf_counter() - self._batch_ended_at
        self._rates = {f"lr_{group['name']}": group["lr"] for group in trainer.optimizers[0].param_groups}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Log at a step boundary, then start to measure the wait for data."""
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        self._batch_ended_at = time.perf_counter()

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Log when due and clear the losses of the step's micro-batches."""
        self._steps += 1
        for part in module.parts:  # a NaN or infinite loss makes the sum NaN or infinite for good
            self._loss_sum = part["loss"] + self._loss_sum
        if step % self.every == 0 or step == trainer.max_steps:
            self._log(trainer, module, step)
        module.parts.clear()

    def _log(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        names = list(module.parts[0])
        values = torch.stack([torch.stack([part[name] for name in names]) for part in module.parts]).mean(0)
        values = torch.cat([values, self._loss_sum.to(values.dtype)[None]])
        if trainer.world_size > 1:
            dist.all_reduce(values)
            values /= trainer.world_size
        *means, loss_sum = values.double().tolist()
        numbers = dict(zip(names, means, strict=True))
        valid_share = numbers.pop("valid_share", None)
        if module.grad_norm is not None:
            numbers["grad_norm"] = float(module.grad_norm)
        if not math.isfinite(numbers["loss"]):
            raise UserError(f"the loss is {numbers['loss']} at step {step}", NON_FINITE_ADVICE)
        if not math.isfinite(loss_sum):
            raise UserError(
                f"the loss was {loss_sum} in one of the last {self._steps} steps up to step {step}",
                NON_FINITE_ADVICE,
            )
        numbers.update(self._rates)
        elapsed = time.perf_counter() - self._logged_at
        numbers["images_per_s"] = self._steps * self.batch_size / elapsed
        numbers["data_wait"] = self._wait_s / elapsed
        if module.device.type == "cuda":
            numbers["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        if valid_share is not None:
            numbers["valid_share"] = valid_share
        self.latest = numbers
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        self._logged_at, self._wait_s, self._steps, self._loss_sum = time.perf_counter(), 0.0, 0, 0.0


class TrainingProgress(StepCallback):
    """Show a progress bar with the remaining time on rank 0; without a terminal, print a line now and then.

    Lightning's progress bars count micro-batches of an epoch; this one counts optimizer steps of the run.
    """

    def __init__(self, metrics: TrainingMetrics, *, seconds: float = 20.0) -> None:
        """Show `metrics.latest`; without a terminal print at most every `seconds`."""
        self.metrics, self.seconds = metrics, seconds
        self._bar: ProgressLine | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the bar at the current step."""
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
        """Advance the bar and show the numbers logged last."""
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
        """Close the bar before the error is printed."""
        self.on_train_end(trainer, module)


def gather_or_raise(ranks: int, work: Callable[[], T], *, group: Any = None) -> list[T]:
    """Call `work` on every rank and gather the results; if one rank fails, all ranks raise its error.

    A rank that stopped alone would leave the others waiting for it until a timeout. Before the first step a signal
    ends `work` at once on the rank that receives it.

    Args:
        ranks: Number of processes; 1 calls `work` directly.
        work: Takes no arguments; its result must be picklable.
        group: The process group that gathers; None for the default one.

    Returns:
        The results in the order of ranks.

    Raises:
        UserError: With the message of the first rank on which `work` raised a ValueError or an OSError.
        Exception: Any other error that `work` raised on this rank; the other ranks raise a UserError that names it.
        StoppedBySignal: If a signal ended `work` on any rank.
    """
    if ranks == 1:
        return [work()]
    result, failure, number, own = None, None, 0, None
    try:
        with signal_handler.interruptible():
            result = work()
    except (ValueError, OSError) as error:  # StorageUnavailable is an OSError
        failure = UserError(error.parts if isinstance(error, UserMessage) else str(error))
    except StoppedBySignal as stop:
        number = stop.number
    except Exception as error:
        failure, own = UserError(f"rank {dist.get_rank()} failed: {error!r}"), error
    shares: list[Any] = [None] * ranks
    dist.all_gather_object(shares, (result, failure, number), group=group)
    if number := max(number for _, _, number in shares):
        signal_handler.stop(number)
    if own is not None:
        raise own
    for _, failure, _ in shares:
        if failure is not None:
            raise failure
    return [result for result, _, _ in shares]


class GracefulStop(StepCallback):
    """Stop all ranks at the same step boundary when one received a signal or too many records failed to load.

    Records that failed and were replaced are listed in failed-records-RANK.txt of the run folder.

    The signal handlers only set a flag (signals.py). Lightning 2.6 saves inside its handler, which deadlocks when
    ranks are at different places, and broadcasts from the device at every step (docs/architecture.md).

    Attributes:
        agreed_signal: The signal on which the ranks agreed, 0 for none.
    """

    def __init__(
        self, checkpoints: "Checkpoints", *, every: int = 1, ceiling: float = 0.01, at_least: int = 1000
    ) -> None:
        """Compare the ranks every `every` steps.

        Args:
            checkpoints: Saves before the run stops for a signal.
            every: Steps between two comparisons; a single process checks its flag at every step.
            ceiling: Share of the records read that may fail.
            at_least: Number of records read before the ceiling applies.
        """
        self.checkpoints, self.every, self.ceiling, self.at_least = checkpoints, every, ceiling, at_least
        self.agreed_signal = 0
        self.failed = self.read = 0
        self._last_failures: list[str] = []
        self._group: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open a CPU process group, so that comparing never waits for the GPU; stop if a signal came before."""
        super().on_train_start(trainer, module)
        signal_handler.install()  # again: a library may have replaced the handlers
        signal_handler.defer()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._reduce(trainer.world_size)
        if self.agreed_signal and trainer.global_step < trainer.max_steps:
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Count the records of a micro-batch, and report those that failed and were replaced."""
        failed = batch["failed"]
        self.read += len(batch["sample"]) + len(failed)
        self.failed += len(failed)
        if failed:
            self._report(Path(trainer.default_root_dir), trainer.global_rank, failed)

    def _report(self, folder: Path, rank: int, failed: list[str]) -> None:
        written = False
        with suppress(OSError):  # may be one rank of several; the next checkpoint reports a full disk
            with open(folder / f"failed-records-{rank}.txt", "a") as file:
                file.writelines(f"{name}\n" for name in failed)
            written = True
        self._last_failures = (self._last_failures + failed)[-3:]
        if self.failed <= 20 or not written:
            for name in failed:
                print(f"replaced a bad record: {name}", file=sys.stderr)

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Sum the counts and signals of all ranks, and stop all of them or none.

        Raises:
            UserError: If more than `ceiling` of the records read have failed.
        """
        if trainer.world_size > 1 and step % self.every:
            return
        failed, read = self._reduce(trainer.world_size)
        if self.agreed_signal and step < trainer.max_steps:
            self.checkpoints.save(trainer, step)
            trainer.should_stop = True
        if read >= self.at_least and failed > self.ceiling * read:
            raise UserError(
                f"{failed} of {read} records read are bad, more than {self.ceiling:.0%}: "
                f"{'; '.join(self._last_failures)}",
                ["check the set with `depth-anything verify` and ", SAME_COMMAND],
            )

    def _reduce(self, ranks: int) -> tuple[int, int]:
        """Set `agreed_signal` to the signal that any rank received; return failed and read records of all ranks."""
        totals = [signal_handler.received, self.failed, self.read]
        if ranks > 1:
            shared = torch.tensor([float(n) for n in totals], dtype=torch.float64)
            dist.all_reduce(shared[1:], group=self._group)
            dist.all_reduce(shared[:1], op=dist.ReduceOp.MAX, group=self._group)
            totals = [int(n) for n in shared.tolist()]
        self.agreed_signal, failed, read = totals
        return failed, read

    def wait_for_all_ranks(self) -> None:
        """Wait until every rank has called this, or until one has ended: the step is saved, and no rank is needed."""
        if self._group is not None:
            with suppress(RuntimeError):  # gloo: connection closed by peer
                dist.barrier(group=self._group)
