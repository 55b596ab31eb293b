"""Signals in every phase of two ranks: no rank hangs, and a resumed run ends with the weights of an unbroken one.

The suite runs a chain of signals in one run folder; `-m slow` runs every place, receiver and number by itself.
"""

import hashlib
import itertools
import signal
from pathlib import Path

import pytest

from .conftest import Run, StartRanks

BEFORE = ("compose", "open sets", "setup", "read validation", "train start")
DURING = ("forward", "backward", "validation", "save")
AFTER = ("train end", "teardown", "model", "exit")
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GIVEN = ("stage=teacher", "validation.every=3")
CHAIN = [
    ("forward", "all", signal.SIGUSR1),
    ("backward", "1", signal.SIGINT),
    ("validation", "all", signal.SIGTERM),
]
"""Place, receiver, and number."""
ONLY_RANK_0 = ("save", "model")
ALL = [
    case
    for case in itertools.product((*BEFORE, *DURING, *AFTER), ("0", "1", "all"), NUMBERS)
    if not (case[0] in ONLY_RANK_0 and case[1] == "1")
]


def model_digest(folder: Path) -> str:
    """Return the digest of the model of the run below a folder."""
    (model,) = folder.glob("outputs/*/model.safetensors")
    return hashlib.sha256(model.read_bytes()).hexdigest()


def check_stopped(runs: list[Run], number: int, *, begin: int = 0, during: bool = True) -> int:
    """Check that both ranks stopped for a signal, within ten steps if it came during one; return the step."""
    assert [run.code for run in runs] == [128 + number] * 2, "".join(run.stderr for run in runs)
    assert f"signal {number}" in runs[0].stderr and "start the same command again" in runs[0].stderr
    if not during:
        assert runs[0].steps == []
        return begin
    step = runs[0].steps[-1]
    assert begin < step <= begin + 10  # they compare every tenth step, or more often if the machine is slow
    return step


@pytest.mark.heavy
def test_a_chain_of_signals_ends_with_the_weights_of_an_unbroken_run(
    start_ranks: StartRanks, tmp_path: Path
) -> None:
    given = (*GIVEN, "steps=32")
    unbroken = start_ranks(tmp_path / "unbroken", *given, ranks=2, SIGNAL_AT=f"exit:all:{signal.SIGUSR1}")
    assert [run.code for run in unbroken] == [0, 0]
    step = 0
    for place, receiver, number in CHAIN:
        runs = start_ranks(tmp_path / "chain", *given, ranks=2, SIGNAL_AT=f"{place}:{receiver}:{number}")
        step = check_stopped(runs, number, begin=step)
    runs = start_ranks(tmp_path / "chain", *given, ranks=2, SIGNAL_AT=f"teardown:all:{signal.SIGTERM}")
    assert [run.code for run in runs] == [0, 0]
    assert model_digest(tmp_path / "chain") == model_digest(tmp_path / "unbroken")


@pytest.fixture(scope="module")
def unbroken(start_ranks: StartRanks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the model of a run without signals."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert [run.code for run in start_ranks(folder, *GIVEN, "steps=32", ranks=2)] == [0, 0]
    return model_digest(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "receiver", "number"), ALL)
def test_a_signal_to_one_rank_or_all(
    start_ranks: StartRanks, tmp_path: Path, unbroken: str, place: str, receiver: str, number: int
) -> None:
    given = (*GIVEN, "steps=32")
    runs = start_ranks(tmp_path, *given, ranks=2, SIGNAL_AT=f"{place}:{receiver}:{number}")
    if place in AFTER:
        assert [run.code for run in runs] == [0, 0], "".join(run.stderr for run in runs)
    else:
        check_stopped(runs, number, during=place in DURING)
        again = start_ranks(tmp_path, *given, ranks=2)
        assert [run.code for run in again] == [0, 0], again[0].stderr
    assert model_digest(tmp_path) == unbroken
