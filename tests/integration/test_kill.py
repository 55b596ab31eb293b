"""SIGKILL at random moments and while saving: the files equal those of the unbroken run, to the byte.

`make soak` does the same twenty times a stage; see benchmarks/soak.py.
"""

import importlib.util
import random
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def test_killed_stages_write_the_same_bytes_as_unbroken_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None and spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    rng = random.Random(7)
    for stage in ("teacher", "pseudolabel", "student"):
        outcome = soak.compare_stage(stage, tmp_path, kills=2, rng=rng)
        assert outcome["equal"], outcome
        assert outcome["files"] > 0 and not outcome["leftovers"], outcome
        assert outcome["kills"] >= 2, outcome
