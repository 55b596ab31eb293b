"""train.py with a witness: every micro-batch's sample numbers and pixels are noted, and a run can stop itself.

Not a test; test_exact.py starts it. WITNESS is the folder of the notes; STOP_AT=STEP:RANK sends that rank
SIGTERM after that step, as a cluster would.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402

from depth_anything.training import run  # noqa: E402
from depth_anything.training.callbacks import StepCallback  # noqa: E402


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


genuine = run.fit_callbacks
run.fit_callbacks = lambda config, folder: [Witness(), *genuine(config, folder)]

if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="train")(run.main)()
