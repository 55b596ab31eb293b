"""train.py with trainer=fsdp: killed and continued, moved to other numbers of devices, with an average."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depth_anything import load_model
from depth_anything.model.sharded_files import find_sharded_damage, read_sharded
from depth_anything.model.weights import fingerprint

pytestmark = pytest.mark.heavy

SCRIPT = "tests/integration/recording_train.py"
# Steps so small that float32 does not let the losses of other numbers of devices drift apart.
COMMON = [
    "stage=teacher",
    "steps=4",
    "checkpoint.every=2",
    "validation.every=4",
    "validation.limit=3",
    "workers=0",
]
COMMON += ["recipe.encoder_lr=1e-6", "recipe.head_lr=1e-6", "callbacks=ema", "callbacks.ema.decay=0.5"]


def sharded(devices: int) -> list[str]:
    return ["trainer=fsdp", "trainer.accelerator=cpu", f"trainer.devices={devices}"]


def column(folder: Path, name: str) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def read_samples(folder: Path) -> dict[int, list[str]]:
    """Collect step → sample numbers with pixel hashes from all ranks, and remove the records."""
    steps: dict[int, list[str]] = {}
    for path in folder.glob("rank-*.txt"):
        for line in path.read_text().splitlines():
            step, _, sample = line.partition(" ")
            steps.setdefault(int(step), []).append(sample)
        path.unlink()
    return {step: sorted(samples) for step, samples in steps.items()}


def test_a_killed_run_and_one_that_moves_equal_the_unbroken_one(start: Any, tmp_path: Path) -> None:
    """The killed run in every byte; 4 → 1 devices in samples and losses. Ranks validate unequal numbers of images."""
    outputs = tmp_path / "outputs"

    def run(name: str, *arguments: str, stop: str = "0:0") -> Any:
        return start(
            *COMMON, *arguments, f"name={name}", script=SCRIPT, SAMPLE_LOG=str(tmp_path), STOP_AT=stop
        )

    unbroken = run("unbroken", *sharded(2))
    assert unbroken.returncode == 0, unbroken.stderr[-2000:]
    samples = read_samples(tmp_path)
    killed = run("killed", *sharded(2), stop="3:1:9")
    assert killed.returncode != 0
    assert [path.name for path in (outputs / "killed" / "checkpoints").glob("step-*")] == [
        "step-000000002.ckpt"
    ]
    read_samples(tmp_path)
    continued = run("killed", *sharded(2))
    assert continued.returncode == 0, continued.stderr[-2000:]
    assert read_samples(tmp_path) == {step: samples[step] for step in (2, 3)}
    for name in ("model", "model-ema", "best"):
        file = f"{name}.safetensors"
        assert (outputs / "killed" / file).read_bytes() == (outputs / "unbroken" / file).read_bytes(), name

    assert run("moved", *sharded(4), stop="3:1:9").returncode != 0
    before = read_samples(tmp_path)
    moved = run("moved", "trainer=cpu")
    assert moved.returncode == 0, moved.stderr[-2000:]
    assert {**before, **read_samples(tmp_path)} == samples
    # Four gradients are added in another order than two, and the losses have kinks.
    for name in ("loss", "grad_norm", "val_abs_rel", "lr_encoder", "lr_head"):
        got, wanted = column(outputs / "moved", name), column(outputs / "unbroken", name)
        np.testing.assert_allclose(got, wanted, rtol=1e-2 if name == "grad_norm" else 1e-4, err_msg=name)
    check_results(outputs / "unbroken")


def test_ddp_and_fsdp_end_with_the_same_bytes(start: Any, tmp_path: Path) -> None:
    """At the rates of size=tiny, with clipped gradients."""
    for name in ("ddp", "fsdp"):
        words = ["stage=teacher", "steps=3", "validation.limit=2", "workers=0", "trainer.accelerator=cpu"]
        run = start(*words, f"trainer={name}", "trainer.devices=2", f"name={name}")
        assert run.returncode == 0, run.stderr[-2000:]
    ddp, fsdp = (tmp_path / "outputs" / name for name in ("ddp", "fsdp"))
    assert min(column(ddp, "grad_norm")) > 1 and column(ddp, "loss") == column(fsdp, "loss")
    assert (ddp / "model.safetensors").read_bytes() == (fsdp / "model.safetensors").read_bytes()


def check_results(folder: Path) -> None:
    """The files of a finished run: whole networks, and a checkpoint in shards that holds the same weights."""
    path = folder / "checkpoints" / "step-000000004.ckpt"
    assert len(list(path.glob("shard-*-of-00002.safetensors"))) == 2 and find_sharded_damage(path) == ""
    saved = torch.load(path / "state.ckpt", weights_only=True)
    assert saved["loops"] and saved["TrainData"]["samples"] == 16 and saved["lr_schedulers"]
    model = folder / "model.safetensors"
    assert fingerprint(path) == fingerprint(model)
    average = read_sharded(path, "average")["average"]["weights"]
    mean = load_model(folder / "model-ema.safetensors").state_dict()
    assert all(torch.equal(tensor, mean[name.removeprefix("model.")]) for name, tensor in average.items())
    assert json.loads((folder / "best.json").read_text())["weights"] == "average"
    assert fingerprint(folder / "best.safetensors") == fingerprint(folder / "model-ema.safetensors")
