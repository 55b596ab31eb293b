"""Signals in every phase of two ranks: no rank hangs, and a resumed run ends with the weights of an unbroken one.

The suite runs a selection that has every place, number and receiver; `-m slow` runs all combinations.
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
RECEIVERS = ("0", "1", "all")
GIVEN = ("stage=teacher", "steps=12", "validation.every=3")
SELECTION = [
    ("open sets", "all", signal.SIGUSR1),
    ("forward", "all", signal.SIGUSR1),
    ("backward", "1", signal.SIGINT),
    ("validation", "all", signal.SIGTERM),
    ("save", "all", signal.SIGINT),
    ("teardown", "all", signal.SIGTERM),
    ("exit", "all", signal.SIGUSR1),
]
ALL = [
    case
    for case in itertools.product((*BEFORE, *DURING, *AFTER), RECEIVERS, NUMBERS)
    if case not in SELECTION
]


def model_digest(folder: Path) -> str:
    """Return the digest of the model of the run below a folder."""
    (model,) = folder.glob("outputs/*/model.safetensors")
    return hashlib.sha256(model.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def unbroken(start_ranks: StartRanks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the model of a run without signals."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert [run.code for run in start_ranks(folder, *GIVEN, ranks=2)] == [0, 0]
    return model_digest(folder)


@pytest.mark.parametrize(
    ("place", "receiver", "number"),
    [*SELECTION, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
)
def test_a_signal_to_one_rank_or_all(
    start_ranks: StartRanks,
    tmp_path: Path,
    unbroken: str,
    place: str,
    receiver: str,
    number: int,
) -> None:
    runs: list[Run] = start_ranks(tmp_path, *GIVEN, ranks=2, SIGNAL_AT=f"{place}:{receiver}:{number}")
    codes, errors = [run.code for run in runs], "".join(run.stderr for run in runs)
    if place in AFTER:
        assert codes == [0, 0], errors
    else:
        assert codes == [128 + number] * 2, errors
        assert runs[0].steps[-1:] == ([10] if place in DURING else [])
        assert f"signal {number}" in runs[0].stderr and "start the same command again" in runs[0].stderr
        again = start_ranks(tmp_path, *GIVEN, ranks=2)
        assert [run.code for run in again] == [0, 0], again[0].stderr
    assert model_digest(tmp_path) == unbroken
