"""Checkpoints of a run: when one is written, which older ones are kept, and what an error or a signal saves."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.nn.modules.batchnorm import _BatchNorm

from depth_anything.disk import atomic_write, remove_atomically
from depth_anything.errors import SAME_COMMAND, UserError
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback, gather_or_raise
from depth_anything.training.checkpoint_writer import CheckpointWriter, SingleFileWriter
from depth_anything.training.resume import data_state
from depth_anything.training.run_dir import step_from_name
from depth_anything.training.step_guard import require_finite_weights

CHECKPOINT_NAME = "step-{:09d}.ckpt"
CHECKPOINT_VERSION = 2
"""1: no "run_format"; the state of the DataModule is under "TrainData". 2: "run_format" says under which key it is."""
COMPARE_EVERY = 10
"""Steps between two comparisons of the ranks: whether the checkpoint that is being written is complete."""
RANKS_TIMEOUT_S = 20.0
"""How long a rank with an error waits for the others to have one at the same step."""


class Checkpoints(StepCallback):
    """Save the newest checkpoints of a run, each complete or absent.

    Lightning's ModelCheckpoint may save in the middle of an accumulation and lets the ranks wait for each other for
    ever when one of them cannot write; this callback saves at step boundaries and all ranks report the error.

    A checkpoint is read back before an older one is deleted. At most one is being written at a time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        keep: int = 2,
        keep_every: int | None = None,
        writer: CheckpointWriter | None = None,
        on_complete: Callable[[Path], None] | None = None,
    ) -> None:
        """Save into `folder`, of the run folder, every `every` steps and at the end.

        Args:
            folder: It is created at the first save.
            every: In optimizer steps.
            keep: How many of the newest checkpoints are kept.
            keep_every: In optimizer steps; checkpoints of its multiples are saved too, and never deleted.
            writer: Writes the files; by default `SingleFileWriter()`.
            on_complete: Called on rank 0 with the path of each complete and verified checkpoint, after older ones are
                deleted, perhaps in another thread. An error counts as a checkpoint that cannot be written.
        """
        self.folder, self.every, self.keep, self.keep_every = folder, every, keep, keep_every
        self.writer: CheckpointWriter = SingleFileWriter() if writer is None else writer
        self._notify = on_complete
        self._saved_step, self._start_step = -1, -1
        self._pending: Future[None] | None = None
        self._failed = self._optimizer_started = False
        self._batch_step: int | None = None
        self._group: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store the current step: it has a checkpoint already. Open a CPU group, which never waits for the GPU."""
        super().on_train_start(trainer, module)
        self._start_step = trainer.global_step
        if trainer.is_global_zero:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Store at which step the micro-batch begins."""
        self._batch_step, self._optimizer_started = trainer.global_step, False

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        """Record that the weights are about to change."""
        self._optimizer_started = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Save when due, and when another callback ends the training early, as +trainer.max_time does.

        At `on_train_end` a weight-averaging callback may have replaced the weights already.
        """
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        if trainer.should_stop and trainer.global_step > self._start_step:
            self.save(trainer, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save if the training ended without a signal and before its last step, and wait for the last checkpoint."""
        if trainer.global_step > self._start_step:
            self.save(trainer, trainer.global_step)
        self.wait(trainer)

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Raise the error of a checkpoint that could not be written, and save when due."""
        if self._pending is not None and self._all_done(trainer, step):
            self.wait(trainer)
        periods = (self.every, self.keep_every)
        if any(period and step % period == 0 for period in periods) or step == trainer.max_steps:
            self.save(trainer, step)

    def _all_done(self, trainer: pl.Trainer, step: int) -> bool:
        """Return whether every rank has finished writing; several ranks compare every COMPARE_EVERY steps."""
        assert self._pending is not None
        if trainer.world_size == 1:
            return self._pending.done()
        if step % COMPARE_EVERY:
            return False
        done = torch.tensor(int(self._pending.done()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._group)
        return bool(done)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Save the last complete step; with several ranks if all of them get here at the same step.

        The error that ends the training is the one to report, so one of saving is only printed.
        """
        step = trainer.global_step
        try:
            if self._can_save(trainer, module) and self._all_ranks_arrive(trainer):
                self.save(trainer, step)
                self.wait(trainer)
                if trainer.is_global_zero:
                    print(f"step {step} is saved, and then the run ends for an error", file=sys.stderr)
            elif self._pending is not None:
                self._pending.result()
        except Exception as error:
            print(f"step {step} is not saved: {error}", file=sys.stderr)

    def _can_save(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Return whether the state after an error is that of a complete step that is not saved yet.

        Between `on_train_batch_start` and the optimizer, the weights are still those of the last step. With several
        ranks an error there comes to one of them alone, and running statistics of batch norm have changed.
        """
        step = trainer.global_step
        if self._failed or step in (self._start_step, self._saved_step) or self._batch_step is None:
            return False
        if step > self._batch_step:
            return True
        unchanged = not any(isinstance(layer, _BatchNorm) for layer in module.modules())
        return trainer.world_size == 1 and not self._optimizer_started and unchanged

    def _all_ranks_arrive(self, trainer: pl.Trainer) -> bool:
        """Wait until all ranks have an error; return whether they have it at the same step."""
        if trainer.world_size == 1:
            return True
        steps = [0] * trainer.world_size
        try:
            dist.monitored_barrier(self._group, timeout=timedelta(seconds=RANKS_TIMEOUT_S))
            dist.all_gather_object(steps, trainer.global_step, group=self._group)
        except RuntimeError:  # a rank is missing, or has ended
            return False
        return len(set(steps)) == 1

    def on_save_checkpoint(
        self, trainer: Any, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record the version of the checkpoint, and the key under which Lightning stores the DataModule's state."""
        key = type(trainer.datamodule).__qualname__ if trainer.datamodule is not None else None
        checkpoint["run_format"] = {"version": CHECKPOINT_VERSION, "data_state": key}

    def on_load_checkpoint(
        self, trainer: Any, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the DataModule if its class had another name when the checkpoint was written.

        Lightning looks the state up by the class name of today. Where it is missing, Lightning skips it silently, and
        the run would continue without comparing its sets with those of the checkpoint.

        Raises:
            UserError: If the checkpoint is of a newer version, or has no state for a DataModule that needs one.
        """
        version, data = checkpoint.get("run_format", {}).get("version", 1), trainer.datamodule
        if version > CHECKPOINT_VERSION:
            raise UserError(
                f"the checkpoint has version {version}, and this code reads versions up to {CHECKPOINT_VERSION}",
                "use the version of this project that wrote it, or type name=ANOTHER_NAME",
            )
        if data is None or type(data).__qualname__ in checkpoint or not is_overridden("state_dict", data):
            return
        state = data_state(checkpoint)
        if state is None:
            raise UserError(
                f"the checkpoint has no state of {type(data).__qualname__}, so its data cannot be compared",
                "type name=ANOTHER_NAME for a new run",
            )
        data.load_state_dict(state)

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Save now, unless this step is saved or being saved already. Every rank must call this at the same step.

        Wait for an older checkpoint that is being written. On return the state is captured; `wait` waits for the file.

        Raises:
            UserError: If a weight is not finite; with several ranks also if the disk is full, on all ranks.
            OSError: If the disk is full or cannot be written; older checkpoints are unchanged.
        """
        if step == self._saved_step:
            return
        run: Any = trainer
        module = run.lightning_module
        for callback in run.callbacks:
            if isinstance(callback, StepCallback):
                callback.before_save(trainer, module, step)
        with self._remember_failure():
            gather_or_raise(trainer.world_size, lambda: require_finite_weights(module, step))
        self.wait(trainer)
        with self._remember_failure():
            gather_or_raise(trainer.world_size, lambda: self._prepare(trainer, step))
            if all(gather_or_raise(trainer.world_size, lambda: self._write(trainer, step))):
                self._pending = None
        self._saved_step = step

    def wait(self, trainer: pl.Trainer) -> None:
        """Wait until the checkpoint that is being written is complete. Every rank must call this at the same step.

        Raises:
            UserError: With several ranks, on all of them, if one could not write.
            OSError: If the disk is full or cannot be written; older checkpoints are unchanged.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._remember_failure():
                gather_or_raise(trainer.world_size, pending.result)

    @contextmanager
    def _remember_failure(self) -> Iterator[None]:
        """Let `on_exception` not try again what has just failed."""
        self._failed = True
        yield
        self._failed = False

    def _prepare(self, trainer: pl.Trainer, step: int) -> None:
        """Look for the run folder, and write the rows of metrics.csv, which a resumed run does not write again."""
        # An unmounted disk must not be replaced by a folder of this name.
        if trainer.is_global_zero and not self.folder.parent.is_dir():
            raise UserError(
                f"{self.folder.parent} has vanished, so step {step} is not saved",
                ["bring it back and ", SAME_COMMAND],
            )
        for logger in trainer.loggers:
            logger.save()

    def _write(self, trainer: pl.Trainer, step: int) -> bool:
        """Begin to write on this rank; return whether that is done."""
        path = self.folder / CHECKPOINT_NAME.format(step)
        self._pending = self.writer.write(trainer, path, on_complete=lambda: self._complete(path, step))
        if not self._pending.done():
            return False
        self._pending.result()
        return True

    def _complete(self, path: Path, step: int) -> None:
        """Record that a step is saved, and delete older checkpoints."""
        atomic_write(self.folder.parent / "saved.json", json.dumps({"step": step}).encode())
        for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
            if not self.keep_every or step_from_name(old) % self.keep_every:
                remove_atomically(old)
        if self._notify is not None:
            self._notify(path)
