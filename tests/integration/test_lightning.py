"""Callbacks and loggers of Lightning, added on the command line of train.py."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import torch

from depth_anything import load_model
from depth_anything.model.weights import fingerprint


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_callbacks_and_loggers_are_added_by_config(start: Any, tmp_path: Path) -> None:
    """A stopped and resumed run with averaged weights ends with the bytes of the unbroken one."""
    common = ["stage=teacher", "steps=6", "trainer=cpu", "workers=0", "checkpoint.every=2"]
    added = [
        "logger=[csv,tensorboard]",
        "callbacks=monitor",
        "+callbacks.swa._target_=pytorch_lightning.callbacks.EMAWeightAveraging",
        "+callbacks.swa.decay=0.5",
        "+callbacks.timer._target_=pytorch_lightning.callbacks.Timer",
        "+callbacks.timer.duration={hours: 1}",
    ]
    plain = start(*common, "name=plain")
    assert plain.returncode == 0, plain.stderr[-2000:]
    averaged = start(*common, *added, "name=averaged")
    assert averaged.returncode == 0, averaged.stderr[-2000:]
    for stop, code in (("3:0", 143), ("0:0", 0)):
        stopped = start(
            *common, *added, "name=stopped",
            script="tests/integration/recording_train.py", SAMPLE_LOG=str(tmp_path), STOP_AT=stop,
        )  # fmt: skip
        assert stopped.returncode == code, stopped.stderr[-2000:]
    runs = tmp_path / "outputs"
    models = {name: runs / name / "model.safetensors" for name in ("plain", "averaged", "stopped")}
    assert models["averaged"].read_bytes() == models["stopped"].read_bytes()
    assert fingerprint(load_model(models["averaged"])) != fingerprint(load_model(models["plain"]))
    for name in ("averaged", "stopped"):
        rows = read_rows(runs / name)
        assert [int(row["step"]) for row in rows] == list(range(7))
        for column in ("loss", "lr-AdamW/head", "DeviceStatsMonitor.on_train_batch_end/cpu_percent"):
            assert math.isfinite(float(rows[3][column])), column
        assert list((runs / name / "tensorboard").glob("events.*"))


def test_monitors_run_on_two_ranks(start: Any, tmp_path: Path) -> None:
    """Lightning's monitors need a logger on every rank; only rank 0 writes."""
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "workers=0"]
    result = start(
        "stage=teacher", "steps=2", *ranks, "callbacks=monitor", "logger=tensorboard", "name=ranks"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [int(row["step"]) for row in read_rows(tmp_path / "outputs" / "ranks")] == [0, 1, 2]
    assert len(list((tmp_path / "outputs" / "ranks" / "tensorboard").glob("events.*"))) == 1


def test_a_callback_class_that_does_not_exist_is_one_error_line(start: Any) -> None:
    result = start("stage=teacher", "+callbacks.own._target_=pytorch_lightning.callbacks.NoSuchCallback")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "callbacks.own._target_" in result.stderr and "NoSuchCallback" in result.stderr


def test_a_run_writes_both_files_and_says_what_was_validated(start: Any, tmp_path: Path) -> None:
    result = start(
        "stage=teacher", "steps=4", "trainer=cpu", "workers=0", "callbacks=ema", "callbacks.ema.decay=0.5"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    folder = next((tmp_path / "outputs").iterdir())
    last, mean, best = (load_model(folder / f"{name}.safetensors") for name in ("model", "model-ema", "best"))
    key = "pretrained.blocks.0.attn.qkv.weight"
    assert torch.equal(mean.state_dict()[key], best.state_dict()[key])
    assert not torch.equal(mean.state_dict()[key], last.state_dict()[key])
    assert json.loads((folder / "best.json").read_text())["weights"] == "average"
    assert "abs_rel" in (folder / "model-ema.safetensors.md").read_text()
    assert "abs_rel" not in (folder / "README.md").read_text()
