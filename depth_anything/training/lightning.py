"""What is asked of Lightning, and what is taken from it: callbacks, checkpoints in place, stopping and requeueing."""

import atexit
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.plugins.environments import SLURMEnvironment

from depth_anything.data.loader import largest_divisor
from depth_anything.disk import atomic_path
from depth_anything.model.integrity import save_with_digest
from depth_anything.model.tensor_files import WRITE_ERRORS
from depth_anything.training.callbacks import (
    Checkpoints,
    GracefulStop,
    TrainingMetrics,
    TrainingProgress,
    gather_or_raise,
)
from depth_anything.training.data import TrainData
from depth_anything.training.pseudolabel import ShardData
from depth_anything.training.run_dir import RunDir
from depth_anything.training.signals import (
    MAIN_PID_VARIABLE,
    StoppedBySignal,
    is_launched_by_lightning,
    signal_handler,
    signal_name,
)
from depth_anything.training.valid_pixels import ValidPixelCheck
from depth_anything.training.validation import ValidationCallback, open_validation_task

T = TypeVar("T")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final name and rename it: Lightning's own goes through the system's /tmp."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write with a digest, flush to the disk, rename; a kill at any moment leaves the older checkpoints alone."""
        with atomic_path(Path(path), make_folder=True, also=WRITE_ERRORS) as temporary:
            save_with_digest(checkpoint, temporary)


def trainer_arguments(*, callbacks: list[pl.Callback], max_steps: int, run_dir: str) -> dict[str, Any]:
    """Collect the arguments of Lightning's Trainer that are no matter of configuration.

    Everything this project does itself is off; signals are ours (training/signals.py).
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


@contextmanager
def translate_trainer_errors() -> Iterator[None]:
    """Turn what Lightning's Trainer refuses, as a device that this machine does not have, into one sentence.

    Raises:
        ValueError: Naming what the Trainer says.
    """
    try:
        yield
    except (MisconfigurationException, ImportError) as error:
        raise ValueError(f"Lightning's Trainer refuses the keys of trainer: {error}") from error


def build_callbacks(config: Mapping[str, Any], folder: RunDir) -> list[pl.Callback]:
    """Build the callbacks of a fitting stage, in the order they act in at a step boundary."""
    metrics = TrainingMetrics(every=config["logging"]["every"], batch_size=config["batch_size"])
    validation = ValidationCallback(
        partial(open_validation_task, config),
        folder,
        every=config["validation"]["every"],
        input_size=config["image_size"],
    )
    checkpoints = Checkpoints(folder.checkpoints, **config["checkpoint"])
    valid_pixels = ValidPixelCheck(every=config["logging"]["every"])
    return [
        metrics,
        valid_pixels,
        validation,
        checkpoints,
        TrainingProgress(metrics),
        GracefulStop(checkpoints, every=10),
    ]


def join_process_group(trainer: pl.Trainer) -> None:
    """Keep Lightning's signal handlers away, and let ranks that are all started already form their group.

    Lightning's handlers broadcast wherever the process stands. With a group a rank that fails while it prepares the
    run tells the others; without one they would wait for it. Ranks that Lightning launches come later, in `fit`.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    assert hasattr(connector, "register_signal_handlers"), "Lightning renamed what this replaces"
    assert hasattr(loop, "_broadcast_sigterm_tensor"), "Lightning renamed what this replaces"
    connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if trainer.world_size == 1 or is_launched_by_lightning():
        return
    if not trainer._accelerator_connector.cluster_environment.creates_processes_externally:
        os.environ[MAIN_PID_VARIABLE] = str(os.getpid())
        if trainer.strategy.launcher is not None:  # they would wait for a rank 0 that has failed
            atexit.register(trainer.strategy.launcher.kill, signal.SIGKILL)
        return
    trainer.strategy.setup_environment()


def start_run(trainer: pl.Trainer, folder: RunDir, config: Mapping[str, Any]) -> Path | None:
    """Claim the run folder on rank 0 and return the checkpoint that every rank goes on from.

    Raises:
        ValueError: On all ranks, with rank 0's sentence.
    """
    join_process_group(trainer)
    if not dist.is_initialized():
        return folder.begin(config, main=trainer.is_global_zero)
    return run_on_all_ranks(lambda: folder.begin(config, main=True) if trainer.is_global_zero else None)[0]


def run_on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Prepare something on every rank that is there by now; see `together`."""
    return gather_or_raise(dist.get_world_size() if dist.is_initialized() else 1, work)


@contextmanager
def translate_memory_errors(smaller: str) -> Iterator[None]:
    """Turn what Python, torch or a GPU raise for lack of memory into a sentence that says what to type.

    Raises:
        ValueError: If there is too little memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", said):
            raise
        raise ValueError(
            f"there is too little memory ({said or type(error).__name__}); type {smaller}, and the same command goes on"
        ) from error


def run_fit(
    trainer: pl.Trainer, module: pl.LightningModule, data: TrainData, checkpoint: Path | None
) -> None:
    """Train from a checkpoint, or from the first step."""
    with translate_memory_errors(f"micro_batch={largest_divisor(data.micro_batch)}"):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)


def run_predict(trainer: pl.Trainer, module: pl.LightningModule, data: ShardData) -> None:
    """Label; a signal ends it at once, on all ranks that Lightning launched, and gives back the shards under way.

    Raises:
        Stopped: For a signal.
    """
    join_process_group(trainer)
    try:
        with (
            signal_handler.interruptible(),
            translate_memory_errors(f"batch_size={max(1, data.batch_size // 2)}"),
        ):
            trainer.predict(module, datamodule=data, return_predictions=False)
    except StoppedBySignal as stop:
        if is_launched_by_lightning():
            signal_handler.ignore()  # rank 0 sends it to all others
            os.kill(os.getppid(), stop.number)
        elif trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.Signals(stop.number))
        raise
    finally:
        data.release_leases()


def raise_if_incomplete(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """End the process when the run ended before its last step, as it does for a signal.

    Slurm's warning of the time limit (SIGUSR1, see slurm/train.sbatch) also queues the job again. SIGTERM does
    not: it comes from `scancel`, or from a preemption that requeues by itself.

    Raises:
        Stopped: For a signal, on all ranks once rank 0 has queued the job again, as a launcher may end the job at
            the first bad exit.
        ValueError: If something else ended the run, as +trainer.max_time does; it is saved.
    """
    if trainer.global_step >= trainer.max_steps:
        return
    agreement = next(c for c in callbacks if isinstance(c, GracefulStop))
    number, step = agreement.agreed_signal, trainer.global_step
    if not number:
        raise ValueError(
            f"Lightning ended the run at step {step} of {trainer.max_steps}, which is saved; the same command goes on"
        )
    if trainer.is_global_zero:
        saved = f"saved at step {step}" if step else "before the first step"
        print(f"stopped by {signal_name(number)} {saved}; the same command goes on", file=sys.stderr)
        if number == signal.SIGUSR1:
            requeue_slurm_job(saved=step > 0)
    agreement.wait_for_all_ranks()
    raise StoppedBySignal(number)


def requeue_slurm_job(*, saved: bool = True) -> None:
    """Let Slurm queue this job again, or say that it is not; without Slurm do nothing.

    Args:
        saved: Whether there is a checkpoint; before the first step there is nothing to save.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        reason = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except FileNotFoundError:
        reason = "there is no scontrol on this machine"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        what = "saved" if saved else "nothing to save"
        print(
            f"{what}, not queued again ({reason}); submit the same command again, or type  scontrol requeue {job}",
            file=sys.stderr,
        )
