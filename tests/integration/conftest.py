"""Run train.py in real processes on small scenes."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[2]
RECORDING = ROOT / "tests" / "integration" / "recording_train.py"
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


@dataclass
class Run:
    """Exit code of a rank, its stderr, and the folder of the test."""

    code: int
    stderr: str
    folder: Path

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint."""
        return sorted(int(path.stem[5:]) for path in self.folder.glob("**/step-*.ckpt"))


StartRanks = Callable[..., list[Run]]


@pytest.fixture(scope="module")
def start_ranks(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> StartRanks:
    """Return a function that runs the ranks of a stage; all runs share the scenes."""
    data = tmp_path_factory.mktemp("data")

    def run(folder: Path, *arguments: str, ranks: int = 1, **extra: str) -> list[Run]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        places = [f"data_dir={data}", f"output_dir={folder / 'outputs'}"]
        trainer = ["trainer=cpu"]
        if ranks > 1:
            trainer = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={ranks}"]
        command = [sys.executable, str(RECORDING), *SMALL, *places, *trainer, "workers=1", *arguments]
        started = []
        for rank in range(ranks):
            place = folder / str(rank)
            place.mkdir(parents=True, exist_ok=True)
            group = {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = environment(SAMPLE_LOG=str(folder), **(group if ranks > 1 else {}), **extra)
            errors = place / "stderr.txt"
            errors.unlink(missing_ok=True)
            started.append((fork_server.start(command, cwd=place, env=env, stderr=errors), errors))
        runs = []
        for process, errors in started:
            runs.append(Run(process.wait(600), errors.read_text(), folder))
            assert "Traceback" not in runs[-1].stderr, runs[-1].stderr
        return runs

    return run
