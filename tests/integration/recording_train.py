"""train.py that records every sample it trains on, and sends itself signals.

Not a test; test_exact.py and others start it. Environment variables:

- SAMPLE_LOG: folder of the records: step, sample number and hash of the pixels.
- STOP_AT=STEP:RANK[:NUMBER] sends that rank SIGTERM, or another signal, after that step, as a cluster would.
- SIGNAL_AT=PLACE:RANK:NUMBER[:SECONDS] sends that rank, or each if RANK is "all", the signal when it first reaches one
  of the PLACES, and again after SECONDS.
- HANG_AT=STEP:RANK:WAY makes that rank hang in the forward pass after that step: "stop" (SIGSTOP) or "loop" in Python.
- DIE_AT=STEP:RANK kills that rank in the forward pass after that step, at the first start; LOSE_NODE_AT=STEP:RANK also
  kills its parent, the agent of torchrun, as if the node were lost.
- WORKER=WAY:SAMPLE makes the loader worker that reads this sample die; "once" of the WAYS kills only the first.
- SPOIL=SAMPLE:STEP:FACTOR makes the target of this sample NaN, and multiplies the loss of this step.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
import numpy as np  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import get_worker_info  # noqa: E402

from depth_anything.data.dataset import StreamDataset  # noqa: E402
from depth_anything.training import initialization, lightning, provenance, pseudolabel, run, validation  # noqa: E402
from depth_anything.training.base import DepthModule  # noqa: E402
from depth_anything.training.callbacks import GracefulStop, StepCallback  # noqa: E402
from depth_anything.training.checkpoints import Checkpoints  # noqa: E402
from depth_anything.training.data import TrainData  # noqa: E402
from depth_anything.training.lightning import AtomicCheckpointIO  # noqa: E402
from depth_anything.training.metric import Metric  # noqa: E402
from depth_anything.training.signals import SignalHandler, signal_handler  # noqa: E402
from depth_anything.training.validation import ValidationCallback  # noqa: E402


class SampleRecorder(StepCallback):
    """Writes a line for each sample, and obeys STOP_AT."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: dict[str, Any], index: int) -> None:
        lines = []
        for n, image in zip(batch["sample"].tolist(), batch["image"].numpy(), strict=True):
            lines.append(f"{trainer.global_step} {n} {hashlib.sha256(image.tobytes()).hexdigest()[:16]}\n")
        with open(Path(os.environ["SAMPLE_LOG"]) / f"rank-{trainer.global_rank}.txt", "a") as file:
            file.writelines(lines)

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        stop, rank, *number = map(int, os.environ.get("STOP_AT", "0:0").split(":"))
        if step == stop and trainer.global_rank == rank:
            os.kill(os.getpid(), *number or [signal.SIGTERM])


PLACES: dict[str, tuple[Any, str]] = {
    "compose": (run, "resolve_config"),
    "scenes": (run, "write_missing_scenes"),
    "open sets": (TrainData, "open"),
    "build model": (initialization, "build_model"),
    "setup": (TrainData, "setup"),
    "loader": (TrainData, "train_dataloader"),
    "read validation": (ValidationCallback, "_read_share"),
    "train start": (Checkpoints, "on_train_start"),
    "forward": (DepthModule, "training_step"),
    "backward": (DepthModule, "backward"),
    "validation": (validation, "score_lines"),
    "save": (AtomicCheckpointIO, "save_checkpoint"),
    "train end": (Checkpoints, "on_train_end"),
    "teardown": (pl.Trainer, "_teardown"),
    "model": (provenance, "save_model"),
    "exit": (SignalHandler, "ignore"),
    "last barrier": (GracefulStop, "wait_for_all_ranks"),
    "label": (pseudolabel.PseudoLabel, "predict_step"),
}


def signal_at(place: str, rank: str, number: int, again: float | None = None) -> None:
    """Send this process a signal when it first reaches a place, if it has that rank."""
    if rank not in (os.environ.get("LOCAL_RANK", "0"), "all"):
        return
    holder, name = PLACES[place]
    original = getattr(holder, name)

    def send() -> None:
        if os.getsid(0) == os.getpid():
            os.killpg(0, number)  # also to the workers, as a terminal does
        else:
            os.kill(os.getpid(), number)

    def replaced(*arguments: Any, **options: Any) -> Any:
        setattr(holder, name, original)
        if place == "backward":
            arguments[1].register_hook(lambda gradient: send())  # runs inside of torch's backward pass
        else:
            send()
        if again is not None:
            time.sleep(again)
            send()
        return original(*arguments, **options)

    setattr(holder, name, replaced)


def fail_worker(way: str, sample: int) -> None:
    """Make the loader worker that reads a sample die."""
    original = StreamDataset.__getitems__

    def replaced(self: StreamDataset, numbers: Any) -> Any:
        if sample in numbers and get_worker_info() is not None:
            if way == "once":
                try:
                    (Path(os.environ["SAMPLE_LOG"]) / "killed").mkdir()
                except FileExistsError:
                    return original(self, numbers)
            if way in ("killed", "once"):
                os.kill(os.getpid(), signal.SIGKILL)
            if way == "numpy":
                np.empty(1 << 60, np.uint8)
            if way == "torch":
                torch.empty(1 << 60, dtype=torch.uint8)
            raise MemoryError
        return original(self, numbers)

    StreamDataset.__getitems__ = replaced  # type: ignore[method-assign]


def hang_at(step: int, rank: int, way: str) -> None:
    """Make a rank hang when it computes the losses after a step."""
    original = DepthModule.training_step

    def replaced(self: DepthModule, batch: Any, index: int) -> Any:
        if self.trainer.global_step == step and self.trainer.global_rank == rank:
            if way == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if way in ("die", "lose node") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                if way == "lose node":
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            while way == "loop":
                time.sleep(0.01)
        return original(self, batch, index)

    DepthModule.training_step = replaced  # type: ignore[method-assign]


def spoil(sample: int, step: int, factor: float) -> None:
    """Make the target of a sample NaN, and multiply the loss of a step."""
    read, weigh, compute = StreamDataset.__getitems__, DepthModule.weighted_sum, Metric.losses

    def read_spoiled(self: StreamDataset, numbers: Any) -> Any:
        batch = read(self, numbers)
        if sample in numbers:
            batch["target"][list(numbers).index(sample), :5] = torch.nan
        return batch

    def weigh_spoiled(self: DepthModule, parts: Any) -> Any:
        return weigh(self, parts) * (factor if self.trainer.global_step == step - 1 else 1.0)

    def compute_spoiled(self: Metric, batch: dict[str, Any]) -> dict[str, Any]:
        parts = compute(self, batch)  # without weighted_sum
        return {**parts, "loss": parts["loss"] * (factor if self.trainer.global_step == step - 1 else 1.0)}

    Metric.losses = compute_spoiled  # type: ignore[method-assign]
    StreamDataset.__getitems__ = read_spoiled  # type: ignore[method-assign]
    DepthModule.weighted_sum = weigh_spoiled  # type: ignore[method-assign]


def obey_environment() -> None:
    """Prepare what the environment variables ask for."""
    for name, default in {"HANG_AT": "", "DIE_AT": "die", "LOSE_NODE_AT": "lose node"}.items():
        if name in os.environ:
            step, rank, *way = os.environ[name].split(":")
            hang_at(int(step), int(rank), *way or [default])
    if "SPOIL" in os.environ:
        sample, step, factor = os.environ["SPOIL"].split(":")
        spoil(int(sample), int(step), float(factor))
    if "WORKER" in os.environ:
        way, sample = os.environ["WORKER"].split(":")
        fail_worker(way, int(sample))
    if "SIGNAL_AT" in os.environ:
        place, rank, number, *again = os.environ["SIGNAL_AT"].split(":")
        signal_at(place, rank, int(number), *map(float, again))


original_build = lightning.build_callbacks
lightning.build_callbacks = lambda *arguments: [SampleRecorder(), *original_build(*arguments)]

if __name__ == "__main__":
    obey_environment()
    try:
        hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="train")(run.main)()
    finally:
        signal_handler.ignore()  # as train.py
