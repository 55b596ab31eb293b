"""Run train.py in real processes on small scenes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[2]
#: A few seconds of training on 48 scenes of 42×56 px in 4 shards: 12 steps of 4 images are one pass.
SMALL = [
    "batch_size=4",
    "image_size=42",
    "checkpoint.every=5",
    "logging.every=1",
    "validation.every=1000",
    "validation.limit=4",
    "sources.scenes.synthetic.count=48",
    "sources.scenes.photographic.count=48",
    "sources.scenes.validation.count=8",
    *(
        f"++sources.scenes.{name}.{key}"
        for name in ("synthetic", "photographic", "validation")
        for key in ("height=42", "width=56", "per_shard=12")
    ),
]
Start = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WANDB_", "TORCHELASTIC_"))}
    return {**clean, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), **extra}


@pytest.fixture
def start(tmp_path: Path, fork_server: ForkServer) -> Start:
    """Return a function that runs train.py, or another script, with small scenes in tmp_path and waits for it.

    The process is forked from one that has imported torch, unless `own_process` is true.
    """

    def run(
        *arguments: str,
        script: str = "train.py",
        small: bool = True,
        own_process: bool = False,
        **extra: str,
    ) -> "subprocess.CompletedProcess[str]":
        places = [f"data_dir={tmp_path / 'data'}", f"output_dir={tmp_path / 'outputs'}"]
        command = [sys.executable, str(ROOT / script), *(SMALL if small else []), *places, *arguments]
        if not own_process:
            return fork_server.run(command, env=environment(**extra), cwd=tmp_path)
        return subprocess.run(
            command, env=environment(**extra), cwd=tmp_path, capture_output=True, text=True, timeout=900
        )

    return run
