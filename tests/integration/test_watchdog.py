"""Ranks that hang in real runs: the log names them, and the run ends."""

import re
from pathlib import Path

import pytest

from depth_anything.training.watchdog import HANG_EXIT_CODE

from .conftest import StartRanks

pytestmark = pytest.mark.heavy

GIVEN = ("stage=teacher", "steps=12", "hang_timeout=3")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_killed(start_ranks: StartRanks, tmp_path: Path, rank: int) -> None:
    """The store of the process group is in the process of rank 0."""
    runs = start_ranks(tmp_path, *GIVEN, ranks=2, HANG_AT=f"7:{rank}:stop")
    other = 1 - rank
    assert runs[rank].code == -9 and runs[other].code == HANG_EXIT_CODE, runs[other].stderr
    log = runs[other].stderr
    assert re.search(rf"rank {rank}, process \d+ on \S+, does not answer \(.*SIGSTOP", log), log
    assert f"waiting: rank {other} at step 7, backward" in log
    assert f"stack of rank {other}" in log and "in run_fit" in log and "again" in log
    hang = next(tmp_path.glob("outputs/*/hang.txt")).read_text()
    assert hang.strip() in log


def test_a_rank_in_an_endless_loop_shows_its_stack(start_ranks: StartRanks, tmp_path: Path) -> None:
    runs = start_ranks(tmp_path, *GIVEN, ranks=2, HANG_AT="7:1:loop")
    assert [run.code for run in runs] == [HANG_EXIT_CODE] * 2
    log = runs[0].stderr
    assert re.search(r"rank 1, process \d+ on \S+, is behind the others: step 7, forward", log), log
    assert "waiting: rank 0 at step 7, backward" in log
    looping = log[log.index("stack of rank 1") : log.index("stack of rank 0")]
    assert "in replaced" in looping and "hang:" not in runs[1].stderr
