"""The rule of the verdict where figures meet its limits: neither equals nor exceeds by chance."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.claims import verdict  # noqa: E402


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_mean_difference_equal_to_the_noise_is_within_noise(higher_is_better: bool) -> None:
    low, high = [1.0, 2.0, 3.0], [2.0, 3.0, 4.0]  # both deviate by 1, and differ by 1 in every seed
    for better, worse in ((low, high), (high, low)):
        found = verdict.compare(better, worse, higher_is_better=higher_is_better)
        assert abs(found.margin) == found.noise == 1
        assert found.word == verdict.NOISE


@pytest.mark.parametrize(("other", "sign"), [([0.0, 1.0, 1.0], 1), ([0.0, -1.0, -1.0], -1)])
def test_a_seed_without_a_difference_agrees_with_neither(other: list[float], sign: int) -> None:
    found = verdict.compare([0.0, 0.0, 0.0], other, higher_is_better=False)
    assert sign * found.margin > found.noise > 0
    assert found.word == verdict.NOISE
