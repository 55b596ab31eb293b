"""A stopped and resumed run with LoRA adapters ends with the bytes of the unbroken one."""

from pathlib import Path
from typing import Any

import pytest

from depth_anything import load_model
from depth_anything.model.weights import fingerprint

pytest.importorskip("peft", reason="pip install 'depth-anything-train[lora]'")


def test_a_resumed_run_writes_the_same_bytes_as_an_unbroken_one(start: Any, tmp_path: Path) -> None:
    shared = ["stage=metric", "lora=2", "init=null", "steps=8", "trainer=cpu", "recipe.checkpointing=true"]
    unbroken = start(*shared, "name=unbroken")
    assert unbroken.returncode == 0, unbroken.stderr[-2000:]
    starts = [("3:0", 143), ("0:0", 0)]
    for stop, code in starts:
        result = start(
            *shared,
            "name=stopped",
            script="tests/integration/recording_train.py",
            SAMPLE_LOG=str(tmp_path),
            STOP_AT=stop,
        )
        assert result.returncode == code, result.stderr[-2000:]
        runs = tmp_path / "outputs"
        midway = sorted((runs / "stopped" / "checkpoints").glob("*.ckpt"))[-1]
        assert load_model(midway).max_depth == 80  # an unfinished run can be evaluated
    models = [(runs / name / "model.safetensors") for name in ("unbroken", "stopped")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert fingerprint(midway) == fingerprint(models[1])
