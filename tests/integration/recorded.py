"""train.py with a witness: every micro-batch's sample numbers and pixels are noted, and a run can stop itself.

Not a test; test_exact.py starts it. WITNESS is the folder of the notes; STOP_AT=STEP:RANK sends that rank
SIGTERM after that step, as a cluster would; SIGNAL_AT=PLACE:RANK:NUMBER sends it that signal when it comes to one of
the PLACES for the first time, and once more after so many seconds with SIGNAL_AT=PLACE:RANK:NUMBER:SECONDS;
WORKER=WAY:SAMPLE lets the loader worker that makes this sample die in a WAY.
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
from depth_anything.training import lightning, pseudolabel, run, validation  # noqa: E402
from depth_anything.training.callbacks import Checkpoints, StepCallback  # noqa: E402
from depth_anything.training.data import TrainData  # noqa: E402
from depth_anything.training.lightning import AtomicCheckpointIO  # noqa: E402


class Witness(StepCallback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: dict[str, Any], index: int) -> None:
        lines = []
        for n, image in zip(batch["sample"].tolist(), batch["image"].numpy(), strict=True):
            lines.append(f"{trainer.global_step} {n} {hashlib.sha256(image.tobytes()).hexdigest()[:16]}\n")
        with open(Path(os.environ["WITNESS"]) / f"rank-{trainer.global_rank}.txt", "a") as file:
            file.writelines(lines)

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        stop, _, rank = os.environ.get("STOP_AT", "0:0").partition(":")
        if step == int(stop) and trainer.global_rank == int(rank):
            os.kill(os.getpid(), signal.SIGTERM)


PLACES: dict[str, tuple[Any, str]] = {
    "compose": (run, "resolve_config"),
    "scenes": (run, "make_scenes"),
    "open": (TrainData, "open"),
    "network": (run, "network"),
    "setup": (TrainData, "setup"),
    "loader": (TrainData, "train_dataloader"),
    "look": (validation, "check_fits"),
    "train start": (Checkpoints, "on_train_start"),
    "validation": (validation, "evaluate"),
    "save": (AtomicCheckpointIO, "save_checkpoint"),
    "train end": (Checkpoints, "on_train_end"),
    "teardown": (pl.Trainer, "_teardown"),
    "model": (run, "save_model"),
    "label": (pseudolabel.PseudoLabel, "predict_step"),
}


def signal_at(place: str, rank: int, number: int, again: float | None = None) -> None:
    """Send this process a signal when it comes to a place for the first time, if it is of that rank."""
    if rank != int(os.environ.get("LOCAL_RANK", "0")):
        return
    holder, name = PLACES[place]
    original = getattr(holder, name)

    def send() -> None:
        if os.getsid(0) == os.getpid():
            os.killpg(0, number)  # the workers, too, as a terminal does
        else:
            os.kill(os.getpid(), number)

    def replaced(*arguments: Any, **options: Any) -> Any:
        setattr(holder, name, original)
        send()
        if again is not None:
            time.sleep(again)
            send()
        return original(*arguments, **options)

    setattr(holder, name, replaced)


def fail_worker(way: str, sample: int) -> None:
    """Let the loader worker that makes a sample die."""
    original = StreamDataset.__getitems__

    def replaced(self: StreamDataset, numbers: Any) -> Any:
        if sample in numbers and get_worker_info() is not None:
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if way == "numpy":
                np.empty(1 << 60, np.uint8)
            if way == "torch":
                torch.empty(1 << 60, dtype=torch.uint8)
            raise MemoryError
        return original(self, numbers)

    StreamDataset.__getitems__ = replaced  # type: ignore[method-assign]


def follow_environment() -> None:
    """Prepare what SIGNAL_AT and WORKER ask for."""
    if "WORKER" in os.environ:
        way, sample = os.environ["WORKER"].split(":")
        fail_worker(way, int(sample))
    if "SIGNAL_AT" in os.environ:
        place, rank, number, *again = os.environ["SIGNAL_AT"].split(":")
        signal_at(place, int(rank), int(number), *map(float, again))


genuine = lightning.build_callbacks
lightning.build_callbacks = lambda config, folder: [Witness(), *genuine(config, folder)]

if __name__ == "__main__":
    follow_environment()
    hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="train")(run.main)()
