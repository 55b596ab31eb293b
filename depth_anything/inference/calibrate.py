"""Metres from a relative model and a few known depths: scale and shift in disparity, and who does not fit.

depth = 1 / (scale · disparity + shift). The authors advise it for their relative models (Depth Anything V2, issue
157). One scale and shift serve one camera and one kind of scene: a network may give another image others.
"""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

OUTLIER_THRESHOLD = 0.1
"""A point is left out where the model is off by more than this share of its depth."""

MAX_PAIRS = 20_000
"""Of points that are tried; a few hundred points have more, of which every so many is taken."""


@dataclass(frozen=True)
class KnownPoint:
    """A pixel (from the upper left one, which is 0, 0) and its distance along the camera's axis, metres."""

    x: float
    y: float
    metres: float


@dataclass(frozen=True)
class CalibrationFit:
    """Scale and shift, and how well the points agree with them.

    Attributes:
        scale: Above 0.
        shift: One over metres.
        depth: float64 (N,), metres that the calibrated model gives.
        metres: float64 (N,), as known.
        used: bool (N,): the points that agree.
    """

    scale: float
    shift: float
    depth: np.ndarray
    metres: np.ndarray
    used: np.ndarray

    @property
    def abs_rel(self) -> float:
        """Mean of |depth − metres| / metres over the points used."""
        return float(_relative_error(self.depth, self.metres)[self.used].mean())

    @property
    def rmse_m(self) -> float:
        """Root of the mean squared difference over the points used, metres."""
        return float(np.sqrt(np.square(self.depth - self.metres)[self.used].mean()))


def read_points(path: str | Path) -> list[KnownPoint]:
    """Read a CSV of x,y,metres; a first line of words is its head.

    Raises:
        ValueError: the line that makes no sense, or a file without points.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(line, row) for line, row in enumerate(csv.reader(file), 1) if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no text with x,y,metres a line: {error}") from error
    points = []
    for line, row in rows:
        if line == rows[0][0] and not _is_number(row[0]):
            continue
        points.append(parse_point(",".join(row), where=f"{path}, line {line}"))
    if not points:
        raise ValueError(f"{path} holds no points: write x,y,metres a line")
    return points


def parse_point(text: str, *, where: str = "--point") -> KnownPoint:
    """Read "x,y,metres".

    Raises:
        ValueError: another text, or a depth that is not above 0; `where` is named.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(map(_is_number, parts)):
        raise ValueError(f"{where}: {text!r} is not x,y,metres, as 320,240,2.5")
    point = KnownPoint(*map(float, parts))
    if not 0 < point.metres < np.inf:
        raise ValueError(f"{where}: a depth of {point.metres:g} m must be above 0")
    return point


def sample_at_points(map: np.ndarray, points: Sequence[KnownPoint], *, image: str) -> np.ndarray:
    """Take a map's values at points, each that of the nearest pixel.

    Args:
        map: (H, W).
        points: in pixels of the image, upright as its EXIF says.
        image: its name, for the error.

    Returns:
        float64 (N,).

    Raises:
        ValueError: a point lies outside.
    """
    height, width = map.shape
    for point in points:
        if not (-0.5 <= point.x < width - 0.5 and -0.5 <= point.y < height - 0.5):
            raise ValueError(
                f"the point {point.x:g},{point.y:g} lies outside {image}, which is {width} wide and {height} high"
            )
    return np.array([map[int(point.y + 0.5), int(point.x + 0.5)] for point in points], np.float64)


def fit_points(
    disparity: ArrayLike, metres: ArrayLike, *, threshold: float = OUTLIER_THRESHOLD
) -> CalibrationFit:
    """Fit scale and shift such that 1 / (scale · disparity + shift) is near the known depths of most points.

    Every pair of points proposes a fit; the one with the least sum of errors wins, an error being the share of its
    depth that a point is off, and at most `threshold`. Least squares over the points within the threshold then has
    the last word; it weighs a share of the depth alike, near or far. No chance is involved.

    Args:
        disparity: (N,), what the model gives at the points, over any number of images.
        metres: (N,), above 0.
        threshold: share of its depth from which on a point is left out.

    Raises:
        ValueError: fewer than two points, all of one disparity, or points of which no majority agrees.
    """
    disparity, metres = np.asarray(disparity, np.float64), np.asarray(metres, np.float64)
    if len(metres) < 2:
        raise ValueError(f"scale and shift need two points at least, better ten, and {len(metres)} was given")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be above 0")
    if np.ptp(disparity) < 1e-6 * max(float(np.abs(disparity).max()), 1e-12):
        raise ValueError("the model gives all points the same disparity: choose points at different depths")
    proposal = _fit_best_pair(disparity, metres, threshold)
    if proposal is None:
        raise _no_consensus_error(disparity, metres, 0, threshold)
    scale, shift = proposal
    used = _relative_error(_to_depth(disparity, scale, shift), metres) <= threshold
    for _ in range(10):
        refined = _least_squares(disparity[used], metres[used])
        agree = _relative_error(_to_depth(disparity, *refined), metres) <= threshold
        if refined[0] <= 0 or agree.sum() < used.sum():
            break
        (scale, shift), settled, used = refined, bool((agree == used).all()), agree
        if settled:
            break
    if 2 * used.sum() <= len(metres) and len(metres) > 2:
        raise _no_consensus_error(disparity, metres, int(used.sum()), threshold)
    return CalibrationFit(scale, shift, _to_depth(disparity, scale, shift), metres, used)


def _fit_best_pair(disparity: np.ndarray, metres: np.ndarray, threshold: float) -> tuple[float, float] | None:
    pairs = np.array(list(itertools.combinations(range(len(metres)), 2)))
    pairs = pairs[:: max(1, len(pairs) // MAX_PAIRS)]
    first, second = pairs.T
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = (1 / metres[first] - 1 / metres[second]) / (disparity[first] - disparity[second])
    shifts = 1 / metres[first] - scales * disparity[first]
    good = np.isfinite(scales) & (scales > 0)
    if not good.any():
        return None
    scales, shifts = scales[good], shifts[good]
    costs = np.zeros(len(scales))
    for d, m in zip(disparity, metres, strict=True):  # a point at a time, so that thousands fit into memory
        costs += np.minimum(_relative_error(_to_depth(d, scales, shifts), m), threshold)
    best = int(costs.argmin())
    return float(scales[best]), float(shifts[best])


def _least_squares(disparity: np.ndarray, metres: np.ndarray) -> tuple[float, float]:
    matrix = np.stack([metres * disparity, metres], axis=1)
    (scale, shift), *_ = np.linalg.lstsq(matrix, np.ones(len(metres)), rcond=None)
    return float(scale), float(shift)


def _to_depth(disparity: np.ndarray, scale: np.ndarray | float, shift: np.ndarray | float) -> np.ndarray:
    inverse = np.asarray(scale * disparity + shift)
    return 1 / np.maximum(inverse, 1e-6)  # behind the camera counts as very far


def _relative_error(depth: np.ndarray, metres: np.ndarray) -> np.ndarray:
    return np.abs(depth - metres) / metres


def _no_consensus_error(
    disparity: np.ndarray, metres: np.ndarray, agree: int, threshold: float
) -> ValueError:
    if np.corrcoef(disparity, 1 / metres)[0, 1] < 0:
        return ValueError(
            "the map is upside down at these points: it puts nearer what is farther; are x and y swapped, "
            "or metres and their inverse, or does the model give depth?"
        )
    return ValueError(
        f"the points do not agree: one scale and shift bring only {agree} of {len(metres)} within "
        f"{threshold:.0%} of their depth; check them, or allow more with --threshold"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
