"""Checkpoints of a run: when one is written, and which older ones are kept."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden

from depth_anything.data.loader import WorkerError
from depth_anything.data.tars import StorageUnavailable
from depth_anything.disk import atomic_write
from depth_anything.errors import UserError
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback, gather_or_raise
from depth_anything.training.resume import data_state
from depth_anything.training.step_guard import require_finite_weights

CHECKPOINT_NAME = "step-{:09d}.ckpt"
CHECKPOINT_VERSION = 2
"""1: no "run_format"; the state of the DataModule is under "TrainData". 2: "run_format" says under which key it is."""


class Checkpoints(StepCallback):
    """Save the newest checkpoints of a run, each complete or absent.

    Lightning's ModelCheckpoint may save in the middle of an accumulation and lets the ranks wait for each other for
    ever when one of them cannot write; this callback saves at step boundaries and all ranks report the error.
    """

    def __init__(self, folder: Path, *, every: int, keep: int = 2) -> None:
        """Save into `folder` every `every` steps and at the end; keep the newest `keep`."""
        self.folder, self.every, self.keep = folder, every, keep
        self._saved_step = -1
        self._start_step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store the current step: it has a checkpoint already."""
        super().on_train_start(trainer, module)
        self._start_step = trainer.global_step

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
        """Save if the training ended without a signal and before its last step."""
        if trainer.global_step > self._start_step:
            self.save(trainer, trainer.global_step)

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Save when due."""
        if step % self.every == 0 or step == trainer.max_steps:
            self.save(trainer, step)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Save the last step if the next batch cannot be loaded; with several ranks not all of them get here."""
        if (
            isinstance(exception, StorageUnavailable | WorkerError)
            and trainer.world_size == 1
            and trainer.global_step
        ):
            self.save(trainer, trainer.global_step)

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
        """Save now, unless this step is saved already. Every rank must call this at the same step.

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
        gather_or_raise(trainer.world_size, lambda: require_finite_weights(module, step))
        gather_or_raise(trainer.world_size, lambda: self._write(trainer, step))
        self._saved_step = step

    def _write(self, trainer: pl.Trainer, step: int) -> None:
        try:
            for logger in trainer.loggers:
                logger.save()  # a resumed run does not write the rows before its checkpoint again
            trainer.save_checkpoint(self.folder / CHECKPOINT_NAME.format(step))
        except OSError:
            if trainer.world_size > 1:
                trainer.strategy.barrier()  # the other ranks wait for the checkpoint here
            raise
        if trainer.is_global_zero:
            atomic_write(self.folder.parent / "saved.json", json.dumps({"step": step}).encode())
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink(missing_ok=True)
