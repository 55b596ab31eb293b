"""NaN in a sample of one rank of two, a loss far above the usual, a killed worker: logs, files and weights."""

import json
from pathlib import Path
from typing import Any

import torch

from depth_anything import load_model
from depth_anything.training.loggers import read_metrics

BAD, SPIKE = 29, 13  # sample 29 is in step 8, on rank 1 of two
COMMON = ("stage=teacher", "steps=14", "recipe.schedule=constant", "logging.every=5", "checkpoint.every=100")
# Adam would turn the rounding of a gradient near zero into a whole step.
COMMON += ("optimizer=sgd", "recipe.encoder_lr=0.001", "recipe.head_lr=0.001")


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_bad_samples_and_killed_workers_cost_no_more_than_their_step(start: Any, tmp_path: Path) -> None:
    script, log = "tests/integration/recording_train.py", tmp_path / "log"
    log.mkdir()
    settings = {"SPOIL": f"{BAD}:{SPIKE}:10", "SAMPLE_LOG": str(log)}
    ways = {
        "one": ("trainer=cpu", "workers=0"),
        "killed": ("trainer=cpu", "workers=2"),
        "two": ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "workers=0"),
    }
    models, reports = {}, {}
    for name, arguments in ways.items():
        extra = {"WORKER": "once:41"} if name == "killed" else {}
        run = start(*COMMON, *arguments, f"name={name}", script=script, **settings, **extra)
        assert run.returncode == 0, run.stderr[-3000:]
        folder = tmp_path / "outputs" / name
        models[name] = load_model(folder / "model.safetensors").state_dict()
        (skipped,), (spike,) = lines_of(folder, "skipped-steps"), lines_of(folder, "loss-spikes")
        reports[name] = skipped
        assert skipped["step"] == 8 and skipped["cause"] == "target" and skipped["rank"] == (name == "two")
        (record,) = skipped["records"]
        assert record.startswith(f"sample {BAD} (scenes-synthetic/")
        assert spike["step"] == SPIKE and set(spike["samples"]) <= set(range(48, 52))
        assert record in run.stderr and "step 8" in run.stderr and f"step {SPIKE}" in run.stderr
        assert "effective time" in run.stderr
        rows = read_metrics(folder / "metrics.csv").rows
        assert [row["step"] for row in rows if row["loss"]] == ["5", "10", "14"]
        if name == "killed":
            for word in ("loader worker", "process ", "signal 9 (SIGKILL)", "memory"):
                assert word in run.stderr
            assert run.stderr.count("SIGKILL") == 1
    assert reports["one"]["records"] == reports["two"]["records"] == reports["killed"]["records"]
    for key, value in models["one"].items():
        assert torch.equal(value, models["killed"][key]), key
        torch.testing.assert_close(value, models["two"][key], rtol=1e-4, atol=1e-5)
