"""Callbacks that act once an optimizer step: log metrics, show progress, stop all ranks together.

Lightning calls its batch hooks once a micro-batch. A checkpoint taken there could land in the middle of a gradient
accumulation, so the callbacks here, and those in checkpoints.py, validation.py and valid_pixels.py, derive from
`StepCallback`.
"""

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
from depth_anything.host_memory import free_memory
from depth_anything.progress import ProgressLine
from depth_anything.training.base import DepthModule
from depth_anything.training.data import TrainData
from depth_anything.training.signals import StoppedBySignal, signal_handler
from depth_anything.training.throughput import Throughput, WallTime, device_peak_flops

if TYPE_CHECKING:
    from depth_anything.training.checkpoints import Checkpoints

T = TypeVar("T")


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

    def before_save(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Act on all ranks before a checkpoint of `step` is written."""


class TrainingMetrics(StepCallback):
    """Log losses, learning rates, gradient norm, throughput, memory, samples seen and the share of valid pixels.

    Losses and shares are the mean over all micro-batches of the logged step on all ranks. `LightningModule.log` would
    log the last micro-batch only, and synchronize at every step; this callback synchronizes once a log line.

    Attributes:
        latest: The numbers of the last log line.
    """

    def __init__(
        self,
        *,
        every: int,
        batch_size: int,
        run_dir: Path | None = None,
        flop_per_image: Callable[[], int | None] | None = None,
    ) -> None:
        """Log every `every` steps.

        Args:
            every: In optimizer steps.
            batch_size: Images of a step, over all devices.
            run_dir: The run folder, which keeps the wall time of all starts.
            flop_per_image: Counts the operations of a training step; called where the peak of the device is known.
        """
        self.every, self.batch_size = every, batch_size
        self.latest: dict[str, float] = {}
        self._run_dir, self._count_flop = run_dir, flop_per_image
        self._wall: WallTime | None = None
        self._restored_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, module)
        flop, peak = None, None
        if trainer.is_global_zero:
            self._wall = WallTime(self._run_dir / "time.json") if self._run_dir is not None else None
            peak = device_peak_flops(module.device, str(getattr(trainer, "precision", "")))
            if peak is not None and self._count_flop is not None:
                flop = self._count_flop()
            elif self._count_flop is not None and module.device.type == "cuda":
                name = torch.cuda.get_device_name(module.device)
                print(f"note: no peak is known for {name}, so metrics.csv has no mfu", file=sys.stderr)
        self.throughput = Throughput(
            batch_size=self.batch_size, devices=trainer.world_size, flop_per_image=flop, peak_flops=peak
        )
        if self._wall is not None and self._wall.starts:  # else the seconds belong to another run, of resume=
            self.throughput.useful_s = self._restored_s

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Add the time since the last micro-batch ended, which the step waited for data."""
        self.throughput.receive_batch()
        self._rates = {f"lr_{group['name']}": group["lr"] for group in trainer.optimizers[0].param_groups}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Log at a step boundary; what other callbacks do after it is not part of the step."""
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        self.throughput.end_batch()

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Log when due and clear the losses of the step's micro-batches."""
        self.throughput.count_step()
        if step % self.every == 0 or step == trainer.max_steps:
            self._log(trainer, module, step)
        module.parts.clear()

    def before_save(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Write the wall time, so that the share of lost steps is right after a kill."""
        if self._wall is not None:
            self._wall.write(step, now=True)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the wall time of this start."""
        if self._wall is not None:
            self._wall.write(trainer.global_step, now=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of the steps that led to the current weights; lost steps do not come back with it."""
        return {"useful_s": self.throughput.total_useful_s()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._restored_s = state_dict["useful_s"]

    def effective_time(self) -> float | None:
        """Return the share of the wall time of all starts that went into steps that are kept; None if not measured."""
        if self._wall is None:
            return None
        return min(1.0, self.throughput.total_useful_s() / max(self._wall.seconds(), 1e-9))

    def _log(self, trainer: Any, module: DepthModule, step: int) -> None:
        names = list(module.parts[0])
        values = torch.stack([torch.stack([part[name] for name in names]) for part in module.parts]).mean(0)
        if trainer.world_size > 1:
            dist.all_reduce(values)
            values /= trainer.world_size
        numbers = dict(zip(names, values.double().tolist(), strict=True))
        valid_share = numbers.pop("valid_share", None)
        if module.grad_norm is not None:
            numbers["grad_norm"] = float(module.grad_norm)
        numbers |= {**self._rates, **self.throughput.read(), "samples": step * self.batch_size}
        if isinstance(data := getattr(trainer, "datamodule", None), TrainData):
            numbers["passes"] = numbers["samples"] / data.open().stream.records
        if module.device.type == "cuda":
            numbers["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        if (free := free_memory()) is not None:
            numbers["host_memory_free_gib"] = free / 2**30
        if (effective := self.effective_time()) is not None:
            numbers["effective_time"] = effective
        if valid_share is not None:
            numbers["valid_share"] = valid_share
        self.latest = numbers
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        if self._wall is not None:
            self._wall.write(step)

    def summary(self, steps: int) -> str:
        """Describe this start after its last of `steps` steps in one line."""
        numbers = self.throughput.average()
        parts = [f"{steps * self.batch_size:,} samples"]
        if "passes" in self.latest:
            parts[0] += f" ({self.latest['passes']:.3g} passes)"
        parts.append(f"{numbers['images_per_s']:.1f} images/s")
        if self.throughput.devices > 1:
            parts[-1] += f" ({numbers['images_per_s_device']:.1f} per device)"
        parts += [f"{numbers['step_s']:.3g} s a step", f"data wait {numbers['data_wait']:.0%}"]
        if "mfu" in numbers:
            parts.append(f"MFU {numbers['mfu']:.1%}")
        if (effective := self.effective_time()) is not None:
            parts.append(f"effective time {effective:.1%}")
        return f"step {steps:,}: {', '.join(parts)}"


class PauseEnd(pl.Callback):
    """The last callback of a run: from here on a step waits for data, and not for validation or saving."""

    def __init__(self, metrics: TrainingMetrics) -> None:
        """Tell `metrics`."""
        self.metrics = metrics

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """End the pause."""
        self.metrics.throughput.end_pause()


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
        """Close the bar and print the throughput of this start."""
        if self._bar is not None:
            self._bar.close()
            if self.metrics.latest:
                print(self.metrics.summary(trainer.global_step), file=sys.stderr)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar before the error is printed."""
        if self._bar is not None:
            self._bar.close()


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
        self,
        checkpoints: "Checkpoints",
        *,
        every: int = 1,
        within_s: float = 10.0,
        ceiling: float = 0.01,
        at_least: int = 1000,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Compare the ranks every `every` steps, or more often if the steps are long.

        Args:
            checkpoints: Saves before the run stops for a signal.
            every: Steps between two comparisons, at most; a single process checks its flag at every step.
            within_s: Seconds between two comparisons, at most, unless a single step takes longer.
            ceiling: Share of the records read that may fail.
            at_least: Number of records read before the ceiling applies.
            now: Returns the time in seconds.
        """
        self.checkpoints, self.every, self.within_s, self._now = checkpoints, every, within_s, now
        self.ceiling, self.at_least = ceiling, at_least
        self.agreed_signal = 0
        self._interval = 1
        self._compared_step, self._compared_at = 0, 0.0
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
        self._reduce(trainer.world_size, trainer.global_step)
        self._interval = 1  # the first step shows how long one takes
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
        if trainer.world_size > 1 and step % self._interval:
            return
        failed, read = self._reduce(trainer.world_size, step)
        if self.agreed_signal and step < trainer.max_steps:
            self.checkpoints.save(trainer, step)
            trainer.should_stop = True
        if read >= self.at_least and failed > self.ceiling * read:
            raise UserError(
                f"{failed} of {read} records read are bad, more than {self.ceiling:.0%}: "
                f"{'; '.join(self._last_failures)}",
                ["check the set with `depth-anything verify` and ", SAME_COMMAND],
            )

    def _reduce(self, ranks: int, step: int) -> tuple[int, int]:
        """Set `agreed_signal` to the signal that any rank received; return failed and read records of all ranks.

        All ranks choose the same next comparison, because it follows from the longest step of any of them.
        """
        if ranks == 1:
            self.agreed_signal = signal_handler.received
            return self.failed, self.read
        now = self._now()
        step_s = (now - self._compared_at) / max(step - self._compared_step, 1)
        self._compared_step, self._compared_at = step, now
        counts = torch.tensor([self.failed, self.read], dtype=torch.float64)
        largest = torch.tensor([signal_handler.received, step_s], dtype=torch.float64)
        dist.all_reduce(counts, group=self._group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        received, longest_s = largest.tolist()
        self.agreed_signal = int(received)
        self._interval = min(max(int(self.within_s / max(longest_s, 1e-9)), 1), self.every)
        failed, read = counts.tolist()
        return int(failed), int(read)

    def wait_for_all_ranks(self) -> None:
        """Wait until every rank has called this, or until one has ended: the step is saved, and no rank is needed."""
        if self._group is not None:
            with suppress(RuntimeError):  # gloo: connection closed by peer
                dist.barrier(group=self._group)
