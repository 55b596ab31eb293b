"""Histograms of the values of many maps, in constant memory, and their pictures."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_DEPTH_EDGES_M = np.geomspace(1e-4, 1e6, 10 * 60 + 1)  # ten decades of 60 bins
_DISPARITY_EDGES = np.linspace(0, 1, 101)
_BLUE, _GRAY = "#3b6ea5", "#888888"


class ValueHistogram:
    """The histogram of the values of many maps of one quantity.

    Depth has logarithmic bins of 4 % from 0.1 mm to 1000 km. Disparity has no unit, so each map is scaled to its own
    range and counted in 100 bins.

    Attributes:
        quantity: "depth" or "disparity".
        unit: of depth, as "m" or "arbitrary".
        maps: number of maps added.
        pixels: number of pixels: "all", "valid", "sky" (+inf, in depth) and "unknown".
        edges: float64, of the bins.
        counts: int64, one per bin.
        low: the smallest value of all.
        high: the largest.
    """

    def __init__(self, quantity: str, *, unit: str = "m") -> None:
        """Create an empty histogram; `unit` is that of depth."""
        self.quantity, self.unit, self.maps, self.pixels = quantity, unit, 0, Counter[str]()
        self.edges = _DEPTH_EDGES_M if quantity == "depth" else _DISPARITY_EDGES
        self.counts = np.zeros(len(self.edges) - 1, np.int64)
        self.low, self.high = np.inf, -np.inf

    def add(self, label: np.ndarray) -> None:
        """Count a map, float (H,W): NaN is unknown, and in depth +inf is sky."""
        values = label[np.isfinite(label)].astype(np.float64)
        sky = int((label == np.inf).sum())
        self.maps += 1
        unknown = label.size - values.size - sky
        self.pixels.update(all=label.size, valid=values.size, sky=sky, unknown=unknown)
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.quantity == "disparity":
            values = (values - low) / (high - low) if high > low else np.zeros_like(values)
        self.counts += np.histogram(values.clip(self.edges[0], self.edges[-1]), self.edges)[0]

    def share(self, kind: str) -> float:
        """The share of all pixels that are "valid", "sky" or "unknown"."""
        return self.pixels[kind] / max(self.pixels["all"], 1)

    def quantile(self, share: float) -> float:
        """The value below which this share of all values lies, to a bin; NaN if there are none."""
        total = np.cumsum(self.counts)
        if not total[-1]:
            return float("nan")
        place = int(np.searchsorted(total, share * total[-1]))
        low, high = self.edges[place], self.edges[place + 1]
        if self.quantity == "disparity":
            return float((low + high) / 2)
        return float(np.clip(np.sqrt(low * high), self.low, self.high))


def draw_histograms(
    histogram: ValueHistogram | None,
    others: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str,
    width_px: int = 1240,
) -> np.ndarray:
    """Draw the histogram of depth or disparity, and those of other numbers, as sizes and bytes.

    Args:
        histogram: of depth or disparity, or None.
        others: labels with unit, and the numbers of each.
        title: above all.
        width_px: of the picture.

    Returns:
        uint8 (H,W,3) RGB.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ([2.0] if histogram is not None else []) + [1.0] * len(others)
    figure = Figure(figsize=(width_px / 100, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(columns), width_ratios=columns, squeeze=False)[0]
    if histogram is not None:
        _draw_value_histogram(axes[0], histogram)
    for axis, (label, numbers) in zip(axes[len(columns) - len(others) :], others, strict=True):
        axis.hist(numbers, bins=min(30, max(4, len(set(numbers)))), color=_BLUE)
        axis.set_xlabel(label)
        axis.set_ylabel("records")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title.encode("ascii", "replace").decode(), fontsize=11)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def _draw_value_histogram(axis: Any, histogram: ValueHistogram) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_ylabel("% of the known pixels")
    depth = histogram.quantity == "depth"
    axis.set_xlabel(f"depth, {histogram.unit}" if depth else "disparity, share of each map's range")
    filled = np.flatnonzero(histogram.counts)
    if not filled.size:
        return
    first, last = int(filled[0]), int(filled[-1]) + 1
    percent = 100 * histogram.counts[first:last] / histogram.counts.sum()
    axis.stairs(percent, histogram.edges[first : last + 1], fill=True, color=_BLUE)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.12)
    median = histogram.quantile(0.5)
    axis.axvline(median, color=_GRAY, linestyle="--")
    axis.annotate(f" median {median:.3g}", (median, 0.95), xycoords=("data", "axes fraction"), color=_GRAY)
    if depth and histogram.high > 3 * histogram.low:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
