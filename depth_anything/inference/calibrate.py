"""Calibrate a model to a few known depths, robustly: scale and shift of disparity, or the scale of a metric model.

depth = 1 / (scale · disparity + shift), as the authors recommend for their relative models (Depth Anything V2, issue
157). One scale and shift hold for one camera and one kind of scene: the network may scale other images differently.
A metric model's depth is multiplied by one number, the median of known / predicted depth.
"""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from depth_anything.errors import UserError

OUTLIER_THRESHOLD = 0.1
"""A point is an outlier if the fitted depth is off by more than this share of the known depth."""

MAX_PAIRS = 20_000
"""Maximum number of pairs of points that are tried; of more pairs every n-th is used."""


POINTS_PER_IMAGE = 200
"""Number of pixels of an image with a depth map that are compared."""


@dataclass(frozen=True)
class KnownPoint:
    """A pixel, counted from the upper left one (0, 0), and its depth along the camera's axis in meters."""

    x: float
    y: float
    meters: float


@dataclass(frozen=True)
class CalibrationFit:
    """Scale, shift and the residuals of the points.

    Attributes:
        scale: Above 0, 1/m.
        shift: 1/m.
        depth: float64 (N,), depth of the calibrated model at the points, meters.
        meters: float64 (N,), known depth.
        used: bool (N,), False for outliers.
    """

    scale: float
    shift: float
    depth: np.ndarray
    meters: np.ndarray
    used: np.ndarray

    @property
    def abs_rel(self) -> float:
        """Mean of |depth − known| / known over the points used."""
        return float(_relative_error(self.depth, self.meters)[self.used].mean())

    @property
    def rmse_m(self) -> float:
        """Root mean squared error over the points used, meters."""
        return float(np.sqrt(np.square(self.depth - self.meters)[self.used].mean()))


@dataclass(frozen=True)
class ScaleFit:
    """The scale of a metric model.

    Attributes:
        scale: Above 0; calibrated depth = scale · depth.
        depth: float64 (N,), calibrated depth at the points, meters.
        meters: float64 (N,), known depth.
        image_scales: float64 (M,), the scale that each image alone would have.
    """

    scale: float
    depth: np.ndarray
    meters: np.ndarray
    image_scales: np.ndarray

    @property
    def abs_rel(self) -> float:
        """Mean of |depth − known| / known."""
        return float(_relative_error(self.depth, self.meters).mean())


def fit_scale(depth: Sequence[ArrayLike], meters: Sequence[ArrayLike]) -> ScaleFit:
    """Fit a scale such that scale · depth is near the known depth, by the median of known / predicted depth.

    Each image has the same weight, divided among its points. Half of the weight may be wrong without harm.

    Args:
        depth: Of each image (N,), depth predicted at its points, meters.
        meters: Of each image (N,), known depth, above 0.

    Raises:
        ValueError: There is no point, or a depth is not above 0.
    """
    predicted = [np.asarray(values, np.float64) for values in depth]
    known = [np.asarray(values, np.float64) for values in meters]
    if not sum(map(len, known)):
        raise ValueError("a scale needs at least one point")
    every, truth = np.concatenate(predicted), np.concatenate(known)
    if not ((every > 0) & np.isfinite(every) & (truth > 0) & np.isfinite(truth)).all():
        raise ValueError("predicted and known depths must be finite and above 0")
    weights = np.concatenate([np.full(len(values), 1 / max(len(values), 1)) for values in known])
    scale = _weighted_median(truth / every, weights)
    alone = [
        _weighted_median(k / p, np.ones(len(k))) if len(k) else np.nan
        for k, p in zip(known, predicted, strict=True)
    ]
    return ScaleFit(scale, scale * every, truth, np.array(alone))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """Return the value with half of the weight on each side; between two values their geometric mean."""
    order = np.argsort(values, kind="stable")
    values, total = values[order], np.cumsum(weights[order])
    half = total[-1] / 2
    low = int(np.searchsorted(total, half * (1 - 1e-9)))
    high = low + 1 if low + 1 < len(values) and total[low] <= half * (1 + 1e-9) else low
    return float(np.sqrt(values[low] * values[high]))


def sample_known_pixels(depth: np.ndarray, *, count: int = POINTS_PER_IMAGE) -> np.ndarray:
    """Choose up to `count` pixels with known depth, evenly spaced over the valid ones in row-major order.

    Args:
        depth: (H, W) meters; NaN, infinity (sky) and values not above 0 are not chosen.
        count: Maximum number.

    Returns:
        int64 (N,), flat indices.
    """
    valid = np.flatnonzero(np.isfinite(depth) & (depth > 0))
    return valid[np.linspace(0, len(valid) - 1, min(count, len(valid))).round().astype(np.int64)]


def read_points(path: str | Path) -> list[KnownPoint]:
    """Read known points from a CSV file with the columns x, y, metres; a header line is optional.

    Raises:
        ValueError: A line cannot be parsed (it is named), or there are no points.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(line, row) for line, row in enumerate(csv.reader(file), 1) if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a text file with x,y,metres on each line: {error}") from error
    points = []
    for line, row in rows:
        if line == rows[0][0] and not _is_number(row[0]):
            continue
        points.append(parse_point(",".join(row), where=f"{path}, line {line}"))
    if not points:
        raise UserError(f"{path} has no points", "write x,y,metres on each line")
    return points


def parse_point(text: str, *, where: str = "--point") -> KnownPoint:
    """Parse "x,y,metres".

    Raises:
        ValueError: The text has another form, or the depth is not above 0; the message begins with `where`.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(map(_is_number, parts)):
        raise UserError(f"{where}: {text!r} is not x,y,metres", "write for example 320,240,2.5")
    point = KnownPoint(*map(float, parts))
    if not 0 < point.meters < np.inf:
        raise ValueError(f"{where}: a depth of {point.meters:g} m must be above 0")
    return point


def sample_at_points(map: np.ndarray, points: Sequence[KnownPoint], *, image: str) -> np.ndarray:
    """Return the values of a map at points (nearest pixel).

    Args:
        map: (H, W).
        points: In pixels of the image after EXIF rotation.
        image: Name of the image, for the error.

    Returns:
        float64 (N,).

    Raises:
        ValueError: A point lies outside.
    """
    height, width = map.shape
    for point in points:
        if not (-0.5 <= point.x < width - 0.5 and -0.5 <= point.y < height - 0.5):
            raise ValueError(
                f"the point {point.x:g},{point.y:g} lies outside {image}, which is {width} wide and {height} high"
            )
    return np.array([map[int(point.y + 0.5), int(point.x + 0.5)] for point in points], np.float64)


def fit_points(
    disparity: ArrayLike, meters: ArrayLike, *, threshold: float = OUTLIER_THRESHOLD
) -> CalibrationFit:
    """Fit scale and shift such that 1 / (scale · disparity + shift) is near the known depth of most points.

    Every pair of points proposes a fit (RANSAC over all pairs, so it is deterministic). The proposal with the
    smallest sum of relative errors wins, where an error counts at most `threshold`. Least squares of the relative
    error over the inliers then refines it.

    Args:
        disparity: (N,), predicted disparity at the points, over any number of images.
        meters: (N,), known depth, above 0.
        threshold: Relative error above which a point is an outlier.

    Raises:
        ValueError: Fewer than two points, the same disparity at all of them, or no fit that a majority agrees with.
    """
    disparity, meters = np.asarray(disparity, np.float64), np.asarray(meters, np.float64)
    if len(meters) < 2:
        raise ValueError(f"scale and shift need at least two points, better ten; got {len(meters)}")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be above 0")
    if np.ptp(disparity) < 1e-6 * max(float(np.abs(disparity).max()), 1e-12):
        raise UserError(
            "the model predicts the same disparity at all points", "choose points at other depths"
        )
    proposal = _fit_best_pair(disparity, meters, threshold)
    if proposal is None:
        raise _no_consensus_error(disparity, meters, 0, threshold)
    scale, shift = proposal
    used = _relative_error(_to_depth(disparity, scale, shift), meters) <= threshold
    for _ in range(10):
        refined = _least_squares(disparity[used], meters[used])
        inliers = _relative_error(_to_depth(disparity, *refined), meters) <= threshold
        if refined[0] <= 0 or inliers.sum() < used.sum():
            break
        (scale, shift), converged, used = refined, bool((inliers == used).all()), inliers
        if converged:
            break
    if 2 * used.sum() <= len(meters) and len(meters) > 2:
        raise _no_consensus_error(disparity, meters, int(used.sum()), threshold)
    return CalibrationFit(scale, shift, _to_depth(disparity, scale, shift), meters, used)


def _fit_best_pair(disparity: np.ndarray, meters: np.ndarray, threshold: float) -> tuple[float, float] | None:
    pairs = np.array(list(itertools.combinations(range(len(meters)), 2)))
    pairs = pairs[:: max(1, len(pairs) // MAX_PAIRS)]
    first, second = pairs.T
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = (1 / meters[first] - 1 / meters[second]) / (disparity[first] - disparity[second])
    shifts = 1 / meters[first] - scales * disparity[first]
    valid = np.isfinite(scales) & (scales > 0)
    if not valid.any():
        return None
    scales, shifts = scales[valid], shifts[valid]
    costs = np.zeros(len(scales))
    for d, m in zip(
        disparity, meters, strict=True
    ):  # one point at a time, to bound memory for thousands of points
        costs += np.minimum(_relative_error(_to_depth(d, scales, shifts), m), threshold)
    best = int(costs.argmin())
    return float(scales[best]), float(shifts[best])


def _least_squares(disparity: np.ndarray, meters: np.ndarray) -> tuple[float, float]:
    matrix = np.stack([meters * disparity, meters], axis=1)
    (scale, shift), *_ = np.linalg.lstsq(matrix, np.ones(len(meters)), rcond=None)
    return float(scale), float(shift)


def _to_depth(disparity: np.ndarray, scale: np.ndarray | float, shift: np.ndarray | float) -> np.ndarray:
    inverse = np.asarray(scale * disparity + shift)
    return 1 / np.maximum(inverse, 1e-6)  # negative inverse depth counts as very far


def _relative_error(depth: np.ndarray, meters: np.ndarray) -> np.ndarray:
    return np.abs(depth - meters) / meters


def _no_consensus_error(
    disparity: np.ndarray, meters: np.ndarray, inliers: int, threshold: float
) -> UserError:
    if np.corrcoef(disparity, 1 / meters)[0, 1] < 0:
        return UserError(
            "the predicted disparity falls where the known points come nearer",
            "check that x and y are not swapped, that the third column is meters and not their inverse, and that the "
            "model predicts disparity, not depth",
        )
    return UserError(
        f"the points do not agree: one scale and shift fit only {inliers} of {len(meters)} within {threshold:.0%} of "
        "their depth",
        "check the points, or allow more with --threshold",
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
