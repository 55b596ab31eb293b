"""The use of PyTorch Lightning: Trainer arguments, callbacks, ranks, checkpoint files, stopping and requeueing."""

import atexit
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Checkpoint, ProgressBar, Timer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment

from depth_anything.data.address import is_remote
from depth_anything.data.loader import largest_divisor
from depth_anything.errors import SAME_COMMAND, UserError
from depth_anything.training.callbacks import (
    GracefulStop,
    PauseEnd,
    TrainingMetrics,
    TrainingProgress,
    gather_or_raise,
)
from depth_anything.training.checkpoint_writer import AtomicCheckpointIO
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.config import RunConfig
from depth_anything.training.config_schema import DEPTH_STAGES
from depth_anything.training.controlnet_validation import ControlNetValidation
from depth_anything.training.data import TrainData
from depth_anything.training.fsdp import ShardedStrategy, StrategyWriter
from depth_anything.training.guards import StepGuards
from depth_anything.training.headroom import CheckpointSchedule, Headroom
from depth_anything.training.loggers import build_loggers, logger_nodes, read_latest
from depth_anything.training.prediction_scale import PredictionScale
from depth_anything.training.pretrain import ReconstructionPictures
from depth_anything.training.pseudolabel import ShardData
from depth_anything.training.run_dir import RunDir, step_from_name
from depth_anything.training.sharded_writer import require_shared_folder
from depth_anything.training.signals import (
    MAIN_PID_VARIABLE,
    StoppedBySignal,
    batch_script_requeues,
    how_to_continue,
    is_launched_by_lightning,
    print_on_rank0,
    signal_handler,
    signal_name,
    slurm_job,
)
from depth_anything.training.stage_networks import StageNetworks
from depth_anything.training.staging import stage_data
from depth_anything.training.throughput import count_flop_per_image
from depth_anything.training.valid_pixels import ValidPixelCheck
from depth_anything.training.validation import ValidationCallback, open_validation_task
from depth_anything.training.watchdog import Watchdog
from depth_anything.training.whole_network import averaging_callbacks, find_ema, whole_network

T = TypeVar("T")


def trainer_arguments(
    *, callbacks: Sequence[pl.Callback], max_steps: int, run_dir: str, log_every: int = 50
) -> dict[str, Any]:
    """Collect the arguments of Lightning's Trainer that no config key sets.

    Lightning's checkpoints, progress bar, summary, loggers, validation loop and sampler are off: this project has its
    own, for the reasons that their docstrings give. A ModelCheckpoint or ProgressBar among `callbacks` turns
    Lightning's on again. Signals are handled in signals.py.

    Args:
        callbacks: In the order in which they act.
        max_steps: Optimizer steps of the run.
        run_dir: The run folder.
        log_every: Steps between two log lines of Lightning's own callbacks, as LearningRateMonitor.
    """
    torch.set_float32_matmul_precision("high")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # hides tips and advertisements
    # Lightning uses a class that torch has deprecated.
    warnings.filterwarnings("ignore", message=".*LeafSpec", module="pytorch_lightning")
    # Of stage=controlnet, whose module prepares the batches of the DataModule.
    warnings.filterwarnings("ignore", message=".*on_before_batch_transfer", module="pytorch_lightning")
    # Of trainer=fsdp: the losses change no output of a network in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    if slurm_job() is None:  # a login node, where no srun is missing
        warnings.filterwarnings("ignore", message="The .srun. command is available")
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return {
        "callbacks": list(callbacks),
        "plugins": plugins,
        "max_steps": max_steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "logger": False,
        "log_every_n_steps": log_every,
        "default_root_dir": run_dir,
        "use_distributed_sampler": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "enable_model_summary": False,
    }


@contextmanager
def translate_trainer_errors() -> Iterator[None]:
    """Turn an error of Lightning's Trainer, as a device that this machine does not have, into a UserError.

    Raises:
        UserError: With Lightning's message.
    """
    try:
        yield
    except (MisconfigurationException, ImportError) as error:
        raise UserError(f"Lightning's Trainer rejects the keys of trainer or callbacks: {error}") from error


def build_callbacks(
    config: RunConfig, run_dir: RunDir, added: Sequence[pl.Callback] = ()
) -> list[pl.Callback]:
    """Build the callbacks of a fitting stage, in the order in which they act at a step boundary.

    Args:
        config: The resolved config.
        run_dir: The run folder.
        added: Callbacks of the config's `callbacks`. They act before validation and checkpoints, so that both see what
            they did at this step, as an average of the weights.
    """
    metrics = TrainingMetrics(
        every=config.logging.every,
        batch_size=config.batch_size,
        run_dir=run_dir.path,
        flop_per_image=partial(count_flop_per_image, config),
    )
    guards = StepGuards(
        run_dir.path,
        every=config.logging.every,
        max_skipped=config.guards.max_skipped,
        spike=config.guards.spike,
        advice=advise_lower_rates(config),
    )
    checks: list[pl.Callback] = []
    if config.stage in DEPTH_STAGES:
        checks.append(PredictionScale(every=config.logging.every))
    if config.stage == "controlnet":
        validation: pl.Callback = ControlNetValidation(config, run_dir)
        checks = [ValidPixelCheck(every=config.logging.every)]
    elif config.stage == "pretrain":
        validation = ReconstructionPictures(run_dir, every=config.validation.every)
    else:
        checks.append(ValidPixelCheck(every=config.logging.every))
        validation = ValidationCallback(
            partial(open_validation_task, config),
            run_dir,
            every=config.validation.every,
            input_size=config.image_size,
        )
    saving = config.checkpoint
    checkpoints = Checkpoints(
        run_dir.checkpoints,
        every=saving.every,
        keep=saving.keep,
        keep_every=saving.keep_every,
        writer=StrategyWriter(asynchronous=saving.asynchronous),
    )
    has_bar = any(isinstance(callback, ProgressBar) for callback in added)
    watchdogs = []
    if config.hang_timeout is not None:
        release, requeue = lambda: run_dir.lock.release(), requeue_slurm_job
        watchdogs = [Watchdog(config.hang_timeout, run_dir.path, release=release, requeue=requeue)]
    return [
        guards,
        metrics,
        Headroom(run_dir.checkpoints, CheckpointSchedule.of_run(config)),
        *checks,
        *added,
        validation,
        checkpoints,
        *([] if has_bar else [TrainingProgress(metrics)]),
        GracefulStop(checkpoints, every=10),
        PauseEnd(metrics),
        *watchdogs,
    ]


def advise_lower_rates(config: RunConfig) -> str:
    """Return what to type to continue a run with half its learning rates."""
    rates = {"encoder_lr": config.recipe.encoder_lr, "head_lr": config.recipe.head_lr}
    if config.stage == "controlnet":
        rates = {"lr": config.recipe.lr}
    keys = ",".join(f"recipe.{name}" for name in rates)
    values = " ".join(f"recipe.{name}={rate / 2:g}" for name, rate in rates.items())
    return f"type 'resume_with=[{keys}]' {values} for lower rates"


def join_process_group(trainer: pl.Trainer) -> None:
    """Disable Lightning's signal handlers, and connect the ranks that are already running.

    Lightning's handlers broadcast wherever the process is. With a process group, a rank that fails while it prepares
    the run tells the others; without one they would wait for it. Ranks that Lightning launches come later, in `fit`.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    assert hasattr(connector, "register_signal_handlers"), "Lightning renamed what this replaces"
    assert hasattr(loop, "_broadcast_sigterm_tensor"), "Lightning renamed what this replaces"
    connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if trainer.world_size == 1 or is_launched_by_lightning():
        return
    if not trainer._accelerator_connector.cluster_environment.creates_processes_externally:
        require_launcher(trainer.num_nodes)
        os.environ[MAIN_PID_VARIABLE] = str(os.getpid())
        if trainer.strategy.launcher is not None:  # the other ranks would wait for a rank 0 that has failed
            atexit.register(trainer.strategy.launcher.kill, signal.SIGKILL)
        return
    _warn_of_shared_store()
    try:
        trainer.strategy.setup_environment()
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ.get('MASTER_PORT')} of this machine, at which the ranks would meet, is in use",
            "export MASTER_PORT=ANOTHER_PORT on all machines, and start the same command again",
        ) from error


def require_launcher(nodes: int) -> None:
    """Refuse several nodes where no launcher has started this process: it would wait for the others for half an hour.

    Raises:
        UserError: If no variable says where the other nodes are.
    """
    if nodes > 1 and not {"MASTER_ADDR", "NODE_RANK", "GROUP_RANK"} & os.environ.keys():
        raise UserError(
            f"trainer.num_nodes={nodes}, but neither srun nor torchrun has started this process",
            "start it on every node (docs/clusters.md), or leave out trainer.num_nodes",
        )


def _warn_of_shared_store() -> None:
    """Print a note if torchrun may restart the ranks and keeps their old addresses, as torch 2.14 does."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        print_on_rank0(
            "note: restarts by torchrun may fail, because it keeps the addresses of the processes before; type  "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  before torchrun"
        )


def move_timers_first(trainer: Any) -> None:
    """Let a Timer, which Lightning appends for +trainer.max_time, end the run before Checkpoints saves at that step."""
    trainer.callbacks.sort(key=lambda callback: not isinstance(callback, Timer))


def start_run(trainer: pl.Trainer, run_dir: RunDir, config: RunConfig) -> Path | None:
    """Claim the run folder on rank 0 and return the checkpoint from which every rank continues.

    Raises:
        UserError: On all ranks, with rank 0's message; or if checkpoints are sharded and the nodes share no folder.
    """
    move_timers_first(trainer)
    join_process_group(trainer)
    if not dist.is_initialized():  # one process, or ranks that Lightning starts on this node
        return run_dir.begin(config, main=trainer.is_global_zero)
    begun = run_on_all_ranks(lambda: run_dir.begin(config, main=True) if trainer.is_global_zero else None)
    if isinstance(trainer.strategy, ShardedStrategy):
        key = "mirror.folder" if is_remote(config.run_dir) else "output_dir"
        fix = f"type {key}=FOLDER of a file system that all nodes mount, or trainer=ddp"
        require_shared_folder(run_dir.checkpoints, fix=fix)
    return begun[0]


def set_loggers(
    trainer: pl.Trainer,
    config: RunConfig,
    run_dir: RunDir,
    checkpoint: Path | None,
    *,
    build: Callable[..., Logger],
) -> None:
    """Give the Trainer metrics.csv, continued at the step of a checkpoint, and the loggers of the config.

    Args:
        trainer: Lightning's.
        config: The resolved config.
        run_dir: The run folder.
        checkpoint: Where the run continues.
        build: Hydra's `instantiate`, which only run.py imports.

    Raises:
        UserError: On all ranks, if rank 0 cannot build a logger or read metrics.csv.
    """

    def set_on_rank() -> None:
        main, step = trainer.is_global_zero, step_from_name(checkpoint)
        added = [build(node, _convert_="all") for node in logger_nodes(config.logger) if main]
        trainer.loggers = build_loggers(run_dir.metrics, added, step=step, main=main)

    run_on_all_ranks(set_on_rank)


def run_on_all_ranks(work: Callable[[], T], *, group: Any = None) -> list[T]:
    """Call `work` on every rank that is running by now; see `gather_or_raise`."""
    return gather_or_raise(dist.get_world_size() if dist.is_initialized() else 1, work, group=group)


def stage_on_all_ranks(config: RunConfig) -> dict[str, Any]:
    """Return the arguments of the DataModule, after the sets were copied to `stage_to` if there is one.

    Ranks wait for each other for up to a week: the timeout of the process group may be shorter than a copy.

    Raises:
        UserError: On all ranks, if one cannot copy.
    """
    arguments = config.data.as_dict()
    if config.stage_to is None:
        return arguments
    ranks = dist.is_initialized()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if ranks else None
    copies = run_on_all_ranks(lambda: stage_data(config, arguments), group=group)
    return copies[dist.get_rank() if ranks else 0]


@contextmanager
def translate_memory_errors(smaller: str) -> Iterator[None]:
    """Turn an out-of-memory error of Python, torch or a GPU into a UserError that says what to type.

    Args:
        smaller: What to type for smaller batches.

    Raises:
        UserError: If there is too little memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|can't allocate memory", message
        ):
            raise
        raise UserError(
            f"not enough memory ({message or type(error).__name__})",
            f"add {smaller} to the same command to continue",
        ) from error


def explain_lost_rank(error: Exception) -> Exception:
    """Return a UserError for an error that only says that another rank is gone; else the error itself."""
    message = (str(error).splitlines() or [""])[0]
    if not isinstance(error, RuntimeError) or not re.search(
        "[Cc]onnection (closed|reset) by peer|[Bb]roken pipe|remote process exited", str(error)
    ):
        return error
    return UserError(
        f"another rank has ended, or its node cannot be reached ({message})",
        ["read the first error in the logs of all ranks; ", SAME_COMMAND, " to continue"],
    )


def run_fit(
    trainer: pl.Trainer, module: pl.LightningModule, data: TrainData, checkpoint: Path | None
) -> None:
    """Train from a checkpoint, or from the first step."""
    with translate_memory_errors(f"micro_batch={largest_divisor(data.micro_batch)}"):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    if step_from_name(checkpoint) >= trainer.max_steps:
        # No step was left, as after a kill between the last checkpoint and model.safetensors, and Lightning has not
        # called `on_train_end`, where averaging callbacks replace the weights.
        for callback in averaging_callbacks(trainer):
            callback.on_train_end(trainer, module)


def save_networks(
    trainer: pl.Trainer, module: Any, networks: StageNetworks, folder: RunDir, *, title: str
) -> None:
    """Write the trained network on rank 0, and with callbacks=ema its average as a second file. All ranks must call it.

    The card of the network that was validated has the results of the last validation.
    """
    average = find_ema(trainer)
    measured = read_latest(folder.metrics, "val_") if trainer.is_global_zero else {}
    with whole_network(module):
        if trainer.is_global_zero:
            networks.save(module, folder.model, title=title, measured={} if average else measured)
    if average:
        title = f"{title}, moving average of the weights"
        with whole_network(module, average.weights):
            if trainer.is_global_zero:
                networks.save(module, folder.average, title=title, measured=measured)


def run_predict(trainer: pl.Trainer, module: pl.LightningModule, data: ShardData) -> None:
    """Label images; a signal stops all ranks that Lightning launched at once, and releases unfinished shards.

    Raises:
        StoppedBySignal: For a signal.
    """
    join_process_group(trainer)
    if trainer.is_global_zero:
        data.check_disk()
    try:
        smaller = f"batch_size={max(1, data.batch_size // 2)}"
        with signal_handler.interruptible(), translate_memory_errors(smaller):
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


def raise_if_incomplete(trainer: pl.Trainer, callbacks: Sequence[pl.Callback]) -> None:
    """End the process if the run ended before its last step, for a signal or for another reason.

    Slurm's warning before the time limit (SIGUSR1, see slurm/README.md) also requeues the job. SIGTERM does not: it
    comes from `scancel`, or from a preemption that requeues by itself.

    Raises:
        StoppedBySignal: For a signal, on all ranks, after rank 0 has requeued the job: a launcher may end the job at
            the first nonzero exit code.
        UserError: If something else ended the run, as +trainer.max_time does, or too many skipped steps in a row; its
            last step is saved.
    """
    for guards in callbacks:
        if isinstance(guards, StepGuards) and guards.failure is not None:
            raise guards.failure
    if trainer.global_step >= trainer.max_steps:
        return
    stop = next(callback for callback in callbacks if isinstance(callback, GracefulStop))
    number, step = stop.agreed_signal, trainer.global_step
    if not number:
        raise UserError(
            f"a callback or Lightning ended the run at step {step} of {trainer.max_steps}, which is saved",
            [SAME_COMMAND, " to continue"],
        )
    if trainer.is_global_zero:
        saved = f"saved at step {step}" if step else "before the first step"
        print(
            f"stopped by {signal_name(number)} {saved}; {how_to_continue(number)}",
            file=sys.stderr,
        )
        if number == signal.SIGUSR1:
            requeue_slurm_job(saved=step > 0)
    stop.wait_for_all_ranks()
    raise StoppedBySignal(number)


def requeue_slurm_job(*, saved: bool = True) -> None:
    """Ask Slurm to queue this job again and print if it does not.

    Do nothing without Slurm, or where the batch script does so after exit code 138, as ours do: a script also reaches
    Slurm from outside a container, and also requeues a job that got the signal while it was starting.

    Args:
        saved: Whether there is a checkpoint; before the first step there is nothing to save.
    """
    job = slurm_job()
    if job is None or batch_script_requeues():
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
