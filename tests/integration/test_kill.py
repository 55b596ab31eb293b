"""SIGKILL at random moments and while saving: the files equal those of the unbroken run, to the byte.

`make soak` does the same twenty times a stage, in longer runs; see benchmarks/soak.py.
"""

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkedCommand, ForkServer

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/soak.py with 16 steps in place of 40 on half as many scenes."""
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None and spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    shorter = {"steps=40": "steps=16", "validation.every=20": "validation.every=8"}
    small = [shorter.get(word, word.replace("count=48", "count=24")) for word in soak.SMALL]
    assert sum(word not in soak.SMALL for word in small) == 4
    monkeypatch.setattr(soak, "SMALL", tuple(small))
    return soak


def test_killed_stages_write_the_same_bytes_as_unbroken_ones(
    tmp_path: Path, soak: Any, fork_server: ForkServer
) -> None:
    def start(command: list[str], environment: dict[str, str], errors: Path) -> ForkedCommand:
        return fork_server.start(command, cwd=tmp_path, env=environment, stderr=errors)

    rng = random.Random(7)
    for stage in ("teacher", "pseudolabel", "student"):
        outcome = soak.compare_stage(stage, tmp_path, kills=2, rng=rng, start=start)
        assert outcome["equal"], outcome
        assert outcome["files"] > 0 and not outcome["leftovers"], outcome
        assert outcome["kills"] >= 2, outcome
