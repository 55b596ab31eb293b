"""Report optimizer steps that were skipped, and losses far above the usual, with the samples they come from."""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from depth_anything.data.dataset import StreamDataset
from depth_anything.disk import atomic_write
from depth_anything.errors import SAME_COMMAND, UserError
from depth_anything.training.callbacks import gather_or_raise
from depth_anything.training.prediction_watch import PredictionCallback, bad_images
from depth_anything.training.run_dir import step_from_name
from depth_anything.training.spikes import LossWindow
from depth_anything.training.step_guard import mean_over_ranks, use_fused_kernel
from depth_anything.training.whole_network import averaging_callbacks, find_ema

MAX_READ_INTERVAL = 50
"""The host learns of skipped steps at every log line, and at least every 50 steps."""
MAX_REWINDS = 2
"""How often the run returns to the same checkpoint."""
MAX_PRINTED, MAX_NAMED = 20, 3
"""Number of steps that are printed, and of records that a line names; the file has all."""
CAUSES = ("target", "prediction", "gradient")
"""What was not finite for an image: its target, the network's output, or the gradient there."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of a step that was skipped or had a spike.

    Attributes:
        step: Optimizer step, counted from 1.
        rank: The rank that computed it.
        loss: Its loss.
        samples: Numbers of its samples.
        bad: For each of CAUSES, the numbers of the samples for which that was not finite.
    """

    step: int
    rank: int
    loss: float
    samples: list[int]
    bad: list[list[int]]

    @property
    def is_suspect(self) -> bool:
        """Whether something in it was not finite."""
        return not math.isfinite(self.loss) or any(self.bad)

    @property
    def cause(self) -> str:
        """The first of CAUSES that was not finite, else "loss"; "unknown" if nothing was."""
        for cause, numbers in zip(CAUSES, self.bad, strict=True):
            if numbers and (cause != "gradient" or math.isfinite(self.loss)):  # else the loss made it so
                return cause
        return "unknown" if math.isfinite(self.loss) else "loss"

    @property
    def named(self) -> list[int]:
        """The samples to look at: those for which the cause was not finite, else all."""
        cause = self.cause
        return self.bad[CAUSES.index(cause)] if cause in CAUSES else self.samples


@dataclass(frozen=True)
class UnusualStep:
    """A step that is reported.

    Attributes:
        number: Optimizer step, counted from 1.
        loss: Mean over all ranks.
        usual: Median of the losses before it; None before the first one.
        finite: Whether loss and gradient are finite.
        skipped: Whether it was skipped.
        begins_spike: Whether its loss is a spike and the one before was none.
    """

    number: int
    loss: float
    usual: float | None
    finite: bool
    skipped: bool
    begins_spike: bool


@dataclass(frozen=True)
class _Pending:
    """A micro-batch whose values are on the device; `flags` bool (3, B) for CAUSES."""

    step: int
    loss: Tensor
    samples: Tensor
    flags: Tensor


class StepGuards(PredictionCallback):
    """Report skipped steps and loss spikes; stop all ranks after too many skipped steps in a row.

    `StepGuard` decides on the device whether a step is skipped. This callback reads the decisions and the losses of
    all steps at every log line, with one synchronization, and at every checkpoint. The files skipped-steps.jsonl and
    loss-spikes.jsonl of the run folder have a line for each micro-batch concerned.

    Attributes:
        failure: Why the run must stop; `should_stop` of the Trainer is then set, and the step is saved.
        skipped: Number of steps of the run that were skipped.
    """

    def __init__(
        self, folder: Path, *, every: int, max_skipped: int = 3, spike: str = "warn", advice: str = ""
    ) -> None:
        """Set what is reported.

        Args:
            folder: The run folder.
            every: Steps between two log lines.
            max_skipped: So many skipped steps in a row stop the run.
            spike: "warn"; "skip": also skip steps whose loss is a spike; "rewind": return to the last checkpoint.
            advice: What to type if the run stops a second time.
        """
        self.folder, self.every = folder, min(every, MAX_READ_INTERVAL)
        self.max_skipped, self.spike, self.advice = max_skipped, spike, advice
        self.failure: UserError | None = None
        self.skipped = self._in_a_row = self._printed = 0
        self._last_good = 0
        self._rewinds: list[int] = []  # steps of the checkpoints that the run has returned to
        self._limit: float | None = None
        self._window = LossWindow()
        self._micro: list[_Pending] = []
        self._steps: list[
            tuple[int, Tensor, Tensor, Tensor]
        ] = []  # step; mean loss of this rank; skipped; norm
        self._bad_target: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Prepare the optimizer and observe the network; drop what was reported after the current step."""
        super().on_train_start(trainer, module)
        if self.spike == "rewind" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise UserError(
                f"guards.spike=rewind does not work with {type(trainer.strategy).__name__}",
                "type guards.spike=skip",
            )
        if self.spike == "rewind" and averaging_callbacks(trainer):  # their checkpoints hold the average
            raise UserError(
                "guards.spike=rewind does not work with Lightning's weight averaging",
                "type callbacks=ema in its place",
            )
        loss_scaled = str(trainer.precision) == "16-mixed"
        if not module.step_guard.prepare(trainer.optimizers[0], loss_scaled=loss_scaled):
            if trainer.is_global_zero and not loss_scaled:
                print(
                    f"note: {type(trainer.optimizers[0]).__name__} has no fused kernel that can skip a step, so every "
                    "step waits for its gradient norm",
                    file=sys.stderr,
                )
        self._set_limit(module, self._limit)
        if trainer.is_global_zero:
            for name in ("skipped-steps", "loss-spikes"):
                _rewind(self.folder / f"{name}.jsonl", trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Find targets that are not finite where they are valid."""
        samples, target, valid = batch["sample"], batch.get("target"), batch.get("valid")
        self._bad_target = torch.zeros_like(samples, dtype=torch.bool)
        if target is not None and valid is not None and target.is_floating_point():
            self._bad_target = bad_images(torch.where(valid, target, 0.0))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Keep the loss of the micro-batch, and what was not finite in it."""
        watch, none = self._watch, torch.zeros_like(batch["sample"], dtype=torch.bool)
        assert watch is not None
        flags = [self._bad_target, none, none]
        if watch.prediction is not None and len(watch.prediction) == len(none):
            flags[1] = bad_images(watch.prediction)
        if watch.bad_gradient is not None and len(watch.bad_gradient) == len(none):
            flags[2] = watch.bad_gradient
        watch.prediction = watch.bad_gradient = None
        step = trainer.global_step + (trainer.global_step == self._last_step)  # the step it belongs to
        loss = module.parts[-1]["loss"]
        samples = batch["sample"].clone()  # the batch's own would keep its shared memory in use
        self._micro.append(_Pending(step, loss, samples, torch.stack(flags)))  # type: ignore[arg-type]
        super().on_train_batch_end(trainer, module, outputs, batch, index)

    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Keep the decision of the step, and read all of them when due."""
        losses = torch.stack([part["loss"] for part in module.parts])
        self._steps.append((step, losses.mean(), module.step_guard.skipped, module.grad_norm))
        if step % self.every == 0 or step == trainer.max_steps:
            self._read(trainer, module)
            self._limit = self._window.limit() if self.spike == "skip" else None
            self._set_limit(module, self._limit)

    def before_save(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Read the steps since the last log line, so that the checkpoint has them."""
        self._read(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the recent losses, for the checkpoint."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "last_good": self._last_good,
            "rewinds": list(self._rewinds),
            "limit": self._limit,
            "window": self._window.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._last_good, self._limit = state_dict["last_good"], state_dict["limit"]
        self._rewinds = list(state_dict["rewinds"])
        self._window.load_state_dict(state_dict["window"])

    def _set_limit(self, module: Any, limit: float | None) -> None:
        known = limit is not None and self.spike == "skip"
        module.step_guard.loss_limit = torch.tensor(limit, device=module.device) if known else None

    def _read(self, trainer: pl.Trainer, module: Any) -> None:
        """Read the pending steps; the values, and so what follows from them, are equal on all ranks."""
        if not self._steps:
            return
        numbers, losses, skips, norms = zip(*self._steps, strict=True)
        mean = mean_over_ranks(torch.stack(losses).float())
        rows = torch.stack([mean, torch.stack(skips).to(mean.dtype), torch.stack(norms).to(mean.dtype)])
        pending = [micro for micro in self._micro if micro.step <= numbers[-1]]
        self._micro = [micro for micro in self._micro if micro.step > numbers[-1]]
        self._steps.clear()
        unusual = [
            self._judge(trainer, step, *values)
            for step, *values in zip(numbers, *rows.tolist(), strict=True)  # the one synchronization
        ]
        found = [step for step in unusual if step is not None]
        if found:
            self._report(trainer, pending, found)
        if self.spike == "rewind" and any(step.begins_spike for step in found):
            self._return_to_checkpoint(trainer, numbers[-1])

    def _judge(
        self, trainer: pl.Trainer, step: int, loss: float, skipped: float, norm: float
    ) -> UnusualStep | None:
        """Count a step; return it if it is to be reported."""
        usual, before = self._window.usual(), self._window.spikes_in_a_row
        is_spike = math.isfinite(loss) and self._window.add(loss)
        finite = math.isfinite(loss) and math.isfinite(norm)
        begins = is_spike and before == 0
        if not skipped:
            self._in_a_row, self._last_good = 0, step
            return UnusualStep(step, loss, usual, finite, False, begins) if begins else None
        self.skipped += 1
        if not finite and _is_loss_scale_search(trainer, loss):
            return None
        self._in_a_row += 1
        if self._in_a_row >= self.max_skipped and self.failure is None:
            self.failure = self._too_many(step)
            trainer.should_stop = True
        return UnusualStep(step, loss, usual, finite, True, begins)

    def _return_to_checkpoint(self, trainer: pl.Trainer, step: int) -> None:
        """Return to weights, average and optimizer's state of the last checkpoint; schedule and position stay.

        Checkpoints are written after the steps before them were read, so the last one is older than the spike.
        """
        saved = sorted((self.folder / "checkpoints").glob("step-*.ckpt"))
        if not saved:
            if trainer.is_global_zero:
                self._print("there is no checkpoint to return to")
            return
        begin = step_from_name(saved[-1])
        checkpoint = torch.load(saved[-1], weights_only=True, map_location="cpu")
        trainer.strategy.load_model_state_dict(checkpoint, strict=True)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        if ema := find_ema(trainer):
            ema.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
        for scheduler in trainer.lr_scheduler_configs:
            rates: Any = scheduler.scheduler.get_last_lr()
            for group, rate in zip(trainer.optimizers[0].param_groups, rates, strict=True):
                group["lr"] = rate
        module: Any = trainer.lightning_module
        if module.step_guard.on_device:
            use_fused_kernel(trainer.optimizers[0])
        self._rewinds.append(begin)
        if trainer.is_global_zero:
            self._print(
                f"returned to the weights of step {begin}; steps {begin + 1} to {step} count as skipped"
            )
        if self._rewinds.count(begin) > MAX_REWINDS:
            self.failure = UserError(
                f"the loss rose far above the usual again by step {step}, after {MAX_REWINDS} returns to step {begin}; "
                "the run is saved with its weights",
                ["type guards.spike=warn to continue", *(["; or ", self.advice] if self.advice else [])],
            )
            trainer.should_stop = True

    def _too_many(self, step: int) -> UserError:
        lower = ["; if it stops again, ", self.advice] if self.advice else []
        return UserError(
            f"{self._in_a_row} steps in a row were skipped, up to step {step}, because their loss or gradient was "
            f"not finite{' or the loss a spike' if self.spike == 'skip' else ''} "
            f"({self.folder / 'skipped-steps.jsonl'} names their records); no weight was changed since step "
            f"{self._last_good}, and the run is saved",
            [SAME_COMMAND, " to continue with the samples after these", *lower],
        )

    def _report(self, trainer: Any, pending: Sequence[_Pending], unusual: Sequence[UnusualStep]) -> None:
        """Write and print the micro-batches of unusual steps, of all ranks, on rank 0."""
        steps = {step.number for step in unusual}
        own = [_read_micro_batch(micro, trainer.global_rank) for micro in pending if micro.step in steps]
        gathered = gather_or_raise(trainer.world_size, lambda: own)
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule.open() if getattr(trainer, "datamodule", None) is not None else None
        for step in unusual:
            batches = [micro for rank in gathered for micro in rank if micro.step == step.number]
            if not step.finite:
                suspects = [micro for micro in batches if micro.is_suspect] or batches
                names = self._write("skipped-steps", suspects, data)
                self._print(
                    f"step {step.number} was skipped on all ranks: its loss ({step.loss:.4g}) or its gradient is not "
                    f"finite; first not finite: {suspects[0].cause} on rank {suspects[0].rank}: {names}"
                )
                continue
            worst = max(batches, key=lambda micro: micro.loss)
            names = self._write("loss-spikes", [worst], data)
            if step.begins_spike:
                done = "; such steps are skipped" if step.skipped else ""
                self._print(
                    f"the loss of step {step.number} is {step.loss:.4g}, and its median was {step.usual:.4g}{done}; "
                    f"its largest part ({worst.loss:.4g}) is from rank {worst.rank}: {names}"
                )

    def _write(self, name: str, batches: Sequence[MicroBatch], data: StreamDataset | None) -> str:
        """Append lines to a file of the run folder; return the first records as text."""
        lines, named = [], []
        for micro in batches:
            records = [describe_record(data, number) for number in micro.named]
            named += records
            content = {
                "step": micro.step,
                "rank": micro.rank,
                "loss": micro.loss if math.isfinite(micro.loss) else str(micro.loss),
                "cause": micro.cause,
                "samples": micro.samples,
                "records": records,
            }
            lines.append(f"{json.dumps(content)}\n")
        with (
            suppress(OSError),
            open(self.folder / f"{name}.jsonl", "a") as file,
        ):  # the next save reports a full disk
            file.writelines(lines)
        return ", ".join(named[:MAX_NAMED]) + (", …" if len(named) > MAX_NAMED else "")

    def _print(self, line: str) -> None:
        self._printed += 1
        if self._printed <= MAX_PRINTED:
            more = " (further ones are in the run folder only)" if self._printed == MAX_PRINTED else ""
            print(f"{line}{more}", file=sys.stderr)


def describe_record(data: StreamDataset | None, number: int) -> str:
    """Return "sample N (set/shard[index] key)", as much of it as can be read."""
    if data is None:
        return f"sample {number}"
    _, shard, index = data.stream.locate(number)
    source = next(source for source in data.sources if source.name == shard.split("/")[0])
    try:
        key = f" {source.read(shard, index)[0]}"
    except (ValueError, OSError):
        key = ""
    return f"sample {number} ({shard}[{index}]{key})"


def _is_loss_scale_search(trainer: Any, loss: float) -> bool:
    """Return whether a skipped step of 16-mixed only lowered the scale of the loss, as the first steps do."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and math.isfinite(loss) and scaler.get_scale() >= 1.0


def _read_micro_batch(micro: _Pending, rank: int) -> MicroBatch:
    samples = micro.samples.tolist()
    bad = [
        [number for number, is_bad in zip(samples, flags, strict=True) if is_bad]
        for flags in micro.flags.tolist()
    ]
    return MicroBatch(micro.step, rank, float(micro.loss), samples, bad)


def _rewind(path: Path, step: int) -> None:
    """Drop the lines after a step, which the resumed run will write again, and damaged lines."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    atomic_write(path, "".join(kept).encode())
