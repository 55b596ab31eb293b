"""The rule that turns figures of several seeds into a verdict."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

HOLDS, FAILS, NOISE = "holds", "does not hold", "within noise"

RULE = (
    "Each comparison has a difference per seed, positive if it agrees with the paper. The noise is the larger of the "
    "standard deviations of the two networks over the seeds. The claim *holds* if every seed's difference is positive "
    "and their mean exceeds the noise; it *does not hold* if every difference is negative and their mean exceeds the "
    "noise; everything else, and a single seed, is *within noise*. A claim of several comparisons holds if all hold, "
    "and does not hold if one does not."
)
"""The rule in words, for reports."""


@dataclass(frozen=True)
class Verdict:
    """What seeds say about one comparison.

    Attributes:
        word: `HOLDS`, `FAILS` or `NOISE`.
        margin: Mean difference over seeds in the metric's unit, positive if it agrees with the claim.
        noise: Larger standard deviation of the two networks over seeds; 0 for a single seed.
        differences: The difference of each seed.
    """

    word: str
    margin: float
    noise: float
    differences: tuple[float, ...]


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def compare(better: Sequence[float], worse: Sequence[float], *, higher_is_better: bool) -> Verdict:
    """Compare two networks seed by seed.

    Args:
        better: A figure per seed of the network that should be better.
        worse: The figures of the other network, of the same seeds.
        higher_is_better: Whether a larger figure is better.

    Raises:
        ValueError: The numbers of seeds differ, or there is none.

    Example:
        >>> compare([0.30, 0.31, 0.29], [0.34, 0.33, 0.35], higher_is_better=False).word
        'holds'
        >>> compare([0.30, 0.36, 0.29], [0.34, 0.33, 0.35], higher_is_better=False).word
        'within noise'
    """
    if not better or len(better) != len(worse):
        raise ValueError(f"cannot compare {len(better)} with {len(worse)} seeds")
    sign = 1 if higher_is_better else -1
    differences = tuple(sign * (b - w) for b, w in zip(better, worse, strict=True))
    margin, noise = statistics.mean(differences), max(spread(better), spread(worse))
    word = NOISE
    if len(differences) > 1 and abs(margin) > noise:
        word = HOLDS if min(differences) > 0 else FAILS if max(differences) < 0 else NOISE
    return Verdict(word, margin, noise, differences)


def combine(words: Sequence[str]) -> str:
    """Return the verdict of a claim from those of its comparisons; "not measured" without any."""
    if not words:
        return "not measured"
    if FAILS in words:
        return FAILS
    return HOLDS if set(words) == {HOLDS} else NOISE
