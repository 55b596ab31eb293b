"""Runs whose folder is in an object store: preemption, another machine, weights and checkpoints by address."""

import json
import sys
from pathlib import Path

import pytest
from fork_server import ForkServer
from local_servers import FaultyServer, s3_environment

from depth_anything import load_model
from depth_anything.data.store import ObjectStore

from .conftest import RECORDING, ROOT, SMALL, environment

STEPS = 6


@pytest.fixture
def command(tmp_path: Path, faulty_s3: FaultyServer) -> list[str]:
    """A teacher that looks for new files once an hour."""
    places = [f"data_dir={tmp_path / 'data'}", "trainer=cpu", "workers=0", "mirror.every=3600"]
    return ["stage=teacher", *SMALL, *places, f"steps={STEPS}", "checkpoint.every=100"]


@pytest.mark.heavy
def test_a_preempted_run_is_in_the_store_and_continues_on_another_machine(
    command: list[str], s3_prefix: str, faulty_s3: FaultyServer, tmp_path: Path, fork_server: ForkServer
) -> None:
    def start(
        *typed: str, folder: str, script: Path = ROOT / "train.py", **extra: str
    ) -> tuple[int, str, str]:
        """Start on a machine with a disk of its own; return its exit code and what it printed."""
        store = {
            **s3_environment(faulty_s3.address),
            "DEPTH_ANYTHING_CACHE": str(tmp_path / folder / "cache"),
        }
        env = environment(**store, SAMPLE_LOG=str(tmp_path), **extra)
        run = fork_server.run(
            [sys.executable, str(script), *command, f"mirror.folder={tmp_path / folder}", *typed],
            env=env,
            cwd=tmp_path,
        )
        assert "Traceback" not in run.stderr, run.stderr
        return run.returncode, run.stdout, run.stderr

    home = f"output_dir={s3_prefix}/runs"
    code, _, errors = start(home, folder="a", script=RECORDING, SIGNAL_AT="forward:0:10")  # SIGUSR1
    run = ObjectStore(f"{s3_prefix}/runs/teacher-vitt-tiny")
    saved = json.loads(run.read("saved.json"))["step"]
    name = f"checkpoints/step-{saved:09d}.ckpt"
    assert code == 128 + 10 and 0 < saved < STEPS and {name, "metrics.csv"} <= run.names(), errors
    assert "lock.json" not in run.names()

    code, printed, errors = start(home, folder="b")
    assert code == 0 and f"fetching the run from {run.root}" in errors, errors
    assert f"finished: {run.root}/model.safetensors" in printed
    rows = run.read("metrics.csv").decode().splitlines()
    assert [line.split(",")[0] for line in rows[1:]] == [str(step) for step in range(1, STEPS + 1)]
    assert json.loads(run.read("finished.json")) == {"steps": STEPS}

    # Another run, on a disk, continues from the checkpoint of this one.
    typed = (f"output_dir={tmp_path / 'outputs'}", "name=second", f"resume={run.root}/{name}")
    code, printed, errors = start(*typed, folder="c")
    assert code == 0, errors
    one, two = load_model(run.root), load_model(tmp_path / "outputs" / "second" / "model.safetensors")
    for key, value in one.state_dict().items():
        assert value.equal(two.state_dict()[key]), key
