"""train.py that waits at named places, without using the CPU, until a signal arrives or the test lets it go on.

Not a test; the jobs of test_cluster.py run it. Environment variables:

- HOLD: Places, of which the n-th start of a job waits at the n-th, and later starts at none: "start" (before the config
  is read), "STEP" (a number; after this step), "teardown" (while Lightning ends the training) or "label" (before the
  first image).
- HOLD_FOLDER: The waiting process writes held-JOB-PLACE-RANK with its PID there; a file named go lets all processes go
  on.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depth_anything.training.signals import signal_handler, slurm_job  # noqa: E402

signal_handler.install()

LONGEST_S = 300


def wait(place: str) -> None:
    """Wait for a signal or the file; at the latest after five minutes the test has failed and the job goes on."""
    file = Path(os.environ["HOLD_FOLDER"]) / f"held-{slurm_job()}-{place}-{os.environ['SLURM_PROCID']}"
    file.write_text(str(os.getpid()))
    end = time.monotonic() + LONGEST_S
    while not signal_handler.received and not file.with_name("go").exists() and time.monotonic() < end:
        time.sleep(0.1)


def hold(place: str) -> None:
    """Make this process wait when it first reaches a place."""
    import pytorch_lightning as pl

    from depth_anything.training import pseudolabel, run
    from depth_anything.training.checkpoints import Checkpoints

    holders: dict[str, tuple[Any, str]] = {
        "start": (run, "resolve_config"),
        "label": (pseudolabel.PseudoLabel, "predict_step"),
        "teardown": (pl.Trainer, "_teardown"),
    }
    holder, name = holders.get(place, (Checkpoints, "on_step"))
    original: Callable[..., Any] = getattr(holder, name)

    def replaced(*arguments: Any) -> Any:
        if place in holders:
            setattr(holder, name, original)
            wait(place)
            return original(*arguments)
        original(*arguments)  # on_step(callback, trainer, module, step) may save
        if arguments[-1] == int(place):
            wait(place)

    setattr(holder, name, replaced)


if __name__ == "__main__":
    starts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    places = os.environ.get("HOLD", "").split()
    if starts < len(places):
        hold(places[starts])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
