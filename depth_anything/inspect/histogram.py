"""How the values of many maps are spread: counted in little memory, drawn."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_MIN_DEPTH_M, _MAX_DEPTH_M, _BINS_PER_DECADE = 1e-4, 1e6, 60
_EDGES_M = np.geomspace(_MIN_DEPTH_M, _MAX_DEPTH_M, 10 * _BINS_PER_DECADE + 1)
_DISPARITY_BINS = 100
_BLUE, _GRAY = "#3b6ea5", "#888888"


class ValueHistogram:
    """Counts the values of maps of one quantity.

    Depth is counted in steps of 4 % between a tenth of a millimetre and a thousand kilometres. Disparity has no
    unit, so that each map is counted by hundredths of its own range.

    Attributes:
        quantity: "depth" or "disparity".
        unit: Of depth, as "m" or "arbitrary".
        maps: How many were added.
        pixels: "all", "valid", "sky" (+inf, in depth) and "unknown".
        counts: int64, of the values, a number a step.
        low: The smallest value of all.
        high: The largest.
    """

    def __init__(self, quantity: str, *, unit: str = "m") -> None:
        """Begin with none; `unit` is that of depth."""
        self.quantity, self.unit, self.maps, self.pixels = quantity, unit, 0, Counter[str]()
        self.edges = _EDGES_M if quantity == "depth" else np.linspace(0, 1, _DISPARITY_BINS + 1)
        self.counts = np.zeros(len(self.edges) - 1, np.int64)
        self.low, self.high = np.inf, -np.inf

    def add(self, label: np.ndarray) -> None:
        """Count a map, float (H, W): NaN is unknown, and in depth +inf sky."""
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
        """The value below which this share of all values lies, to a step; NaN where there are none."""
        total = np.cumsum(self.counts)
        if not total[-1]:
            return float("nan")
        step = int(np.searchsorted(total, share * total[-1]))
        low, high = self.edges[step], self.edges[step + 1]
        middle = np.sqrt(low * high) if self.quantity == "depth" else (low + high) / 2
        return float(np.clip(middle, self.low, self.high)) if self.quantity == "depth" else float(middle)


def draw_histograms(
    tally: ValueHistogram | None,
    others: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str,
    width_px: int = 1240,
) -> np.ndarray:
    """Draw how values are spread, and beside it other numbers, as sizes and bytes.

    Args:
        tally: Of depth or disparity, or None.
        others: What, with its unit, and the numbers.
        title: Above all.
        width_px: Of the picture.

    Returns:
        uint8 (H, W, 3) RGB.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ([2.0] if tally is not None else []) + [1.0] * len(others)
    figure = Figure(figsize=(width_px / 100, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(columns), width_ratios=columns, squeeze=False)[0]
    if tally is not None:
        _draw_value_histogram(axes[0], tally)
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


def _draw_value_histogram(axis: Any, tally: ValueHistogram) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_ylabel("% of the known pixels")
    depth = tally.quantity == "depth"
    axis.set_xlabel(f"depth, {tally.unit}" if depth else "disparity, share of each map's range")
    kept = np.flatnonzero(tally.counts)
    if not kept.size:
        return
    span = slice(int(kept[0]), int(kept[-1]) + 1)
    axis.stairs(
        100 * tally.counts[span] / tally.counts.sum(),
        tally.edges[span.start : span.stop + 1],
        fill=True,
        color=_BLUE,
    )
    axis.set_ylim(0, axis.get_ylim()[1] * 1.12)
    middle = tally.quantile(0.5)
    axis.axvline(middle, color=_GRAY, linestyle="--")
    axis.annotate(f" median {middle:.3g}", (middle, 0.95), xycoords=("data", "axes fraction"), color=_GRAY)
    if depth and tally.high > 3 * tally.low:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
