"""What is asked of Lightning, and what is taken from it: callbacks, checkpoints in place, stopping and requeueing."""

import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.plugins.environments import SLURMEnvironment

from depth_anything.model.files import write_whole
from depth_anything.model.integrity import save_checked
from depth_anything.training.callbacks import Agreement, Checkpoints, Metrics, Progress
from depth_anything.training.folder import RunFolder
from depth_anything.training.valid_pixels import ValidPixels
from depth_anything.training.validation import Validation, trial_of


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final name and rename it: Lightning's own goes through the system's /tmp."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write with a digest, flush to the disk, rename; a kill at any moment leaves the older checkpoints alone."""
        write_whole(Path(path), lambda temporary: save_checked(checkpoint, temporary))


def trainer_arguments(*, callbacks: list[pl.Callback], max_steps: int, run_dir: str) -> dict[str, Any]:
    """Collect the arguments of Lightning's Trainer that are no matter of configuration.

    Everything this project does itself is off; Slurm's signals are ours (callbacks.Agreement).
    """
    torch.set_float32_matmul_precision("high")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its advice and advertisements
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec", module="pytorch_lightning"
    )  # its own debt to torch
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return {
        "callbacks": callbacks,
        "plugins": plugins,
        "max_steps": max_steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "logger": False,
        "default_root_dir": run_dir,
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def fit_callbacks(config: Mapping[str, Any], folder: RunFolder) -> list[pl.Callback]:
    """Build the callbacks of a fitting stage, in the order they act in at a step boundary."""
    metrics = Metrics(every=config["logging"]["every"], batch_size=config["batch_size"])
    validation = Validation(
        partial(trial_of, config),
        folder,
        every=config["validation"]["every"],
        input_size=config["image_size"],
    )
    checkpoints = Checkpoints(folder.checkpoints, **config["checkpoint"])
    valid_pixels = ValidPixels(every=config["logging"]["every"])
    return [
        metrics,
        valid_pixels,
        validation,
        checkpoints,
        Progress(metrics),
        Agreement(checkpoints, every=10),
    ]


def stop_if_signalled(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """End the process when a signal ended the run before its last step.

    Slurm's warning of the time limit (SIGUSR1, see slurm/train.sbatch) also queues the job again. SIGTERM does
    not: it comes from `scancel`, or from a preemption that requeues by itself.

    Raises:
        SystemExit: With 128 + the signal's number on rank 0, 0 on the others, so that no launcher that ends a job
            at the first bad exit cuts rank 0 short.
    """
    number = next(c.signalled for c in callbacks if isinstance(c, Agreement))
    if not number or trainer.global_step >= trainer.max_steps:
        return
    if not trainer.is_global_zero:
        sys.exit(0)
    print(
        f"stopped by signal {number} at step {trainer.global_step}; the same command goes on", file=sys.stderr
    )
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and number == signal.SIGUSR1:
        subprocess.run(["scontrol", "requeue", job], check=False)  # says itself why it would not
    sys.exit(128 + number)
