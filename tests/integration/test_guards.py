"""NaN in a sample of one rank of two, a loss far above the usual, a killed worker: logs, files and weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from depth_anything import DepthAnything, load_model, save_model
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


@pytest.mark.heavy
def test_two_ranks_of_a_student_and_of_a_metric_model_skip_alike(start: Any, tmp_path: Path) -> None:
    """A NaN in a pseudo-label or in meters, on rank 1 of two, and a loss times 10⁸."""
    script, log = "tests/integration/recording_train.py", tmp_path / "log"
    log.mkdir()
    for encoder in ("vitt", "vitn"):
        save_model(DepthAnything(encoder), tmp_path / f"{encoder}.safetensors")
    labeled = start("stage=pseudolabel", f"teacher={tmp_path / 'vitt.safetensors'}")
    assert labeled.returncode == 0, labeled.stderr[-3000:]
    settings = {"SPOIL": f"{BAD}:{SPIKE}:1e8", "SAMPLE_LOG": str(log)}
    ranks = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "workers=0")
    stages = {
        "student": ("scenes-photographic", "init=null", "guards.spike=warn"),
        # Nothing clips its gradient, so such a step would destroy the weights.
        "metric": ("scenes-synthetic", f"init={tmp_path / 'vitn.safetensors'}", "guards.spike=skip"),
    }
    for stage, (images, *typed) in stages.items():
        run = start(f"stage={stage}", "encoder=vitn", *typed, *COMMON[1:], *ranks, script=script, **settings)
        assert run.returncode == 0, run.stderr[-3000:]
        (folder,) = tmp_path.glob(f"outputs/{stage}-*")
        (skipped,), (spike,) = lines_of(folder, "skipped-steps"), lines_of(folder, "loss-spikes")
        assert (skipped["step"], skipped["cause"], skipped["rank"]) == (8, "target", 1)
        (record,) = skipped["records"]
        assert record.startswith(f"sample {BAD} ({images}/")
        assert spike["step"] == SPIKE
        for words in (
            "step 8 was skipped on all ranks: its loss (nan)",
            f"on rank 1: {record}",
            f"step {SPIKE}",
        ):
            assert words in run.stderr
        assert ("such steps are skipped" in run.stderr) == (stage == "metric")
        weights = load_model(folder / "model.safetensors").state_dict()
        assert all(value.isfinite().all() for value in weights.values())
        taken = [(log / f"rank-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
        assert len(taken[0]) == len(taken[1]) == 14 * 2 and not set(taken[0]) & set(taken[1])
        for rank in (0, 1):
            (log / f"rank-{rank}.txt").unlink()
