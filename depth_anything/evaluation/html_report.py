"""The HTML report: one self-contained page with tables, pictures and curves."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import cv2
import jinja2
import numpy as np

from depth_anything.evaluation.evaluate import DepthResult
from depth_anything.evaluation.table import MEASURED_HERE, OTHER_PROTOCOLS, format_number
from depth_anything.visualize import colorize, colorize_by_distance

MAX_ERROR = 0.5
"""Relative error of the last color of the error maps."""

MAX_PICTURE_PX = 448
"""Longest side of a picture on the page."""


@dataclass(frozen=True)
class DepthExample:
    """One image of the report.

    Attributes:
        key: the record.
        reason: why it is shown ("first", "best", "median", "worst").
        image: uint8 (H,W,3) RGB.
        truth: float32 (H,W) meters, NaN where nothing is compared.
        predictions: model name → float32 (H,W) meters, after alignment.
    """

    key: str
    reason: str
    image: np.ndarray
    truth: np.ndarray
    predictions: dict[str, np.ndarray]


def render_template(template: str, **values: Any) -> str:
    """Fill a template of this folder. All values are escaped, so none can add markup."""
    folder = resources.files("depth_anything.evaluation")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        measured_here=MEASURED_HERE, other_protocols=OTHER_PROTOCOLS, **values
    )


def shrink_to_page(rgb: np.ndarray) -> np.ndarray:
    """Shrink a picture, uint8 (H,W,3), to at most `MAX_PICTURE_PX` a side."""
    scale = MAX_PICTURE_PX / max(rgb.shape[:2])
    if scale >= 1:
        return rgb
    size = [max(1, round(side * scale)) for side in rgb.shape[1::-1]]
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def data_url(rgb: np.ndarray) -> str:
    """A picture, shrunk to the page's size, as a data URL with a JPEG."""
    bgr = np.ascontiguousarray(shrink_to_page(rgb)[..., ::-1])
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()


def depth_page(results: Sequence[DepthResult], examples: Sequence[DepthExample]) -> dict[str, Any]:
    """The values of depth_report.html.j2: curves, color ramps and examples."""
    ramp = np.linspace(0.0, 1.0, 256, dtype=np.float32)[None].repeat(8, axis=0)
    return {
        "curves": _curves(results),
        "examples": [_example_values(example, results) for example in examples],
        "near_to_far": data_url(colorize_by_distance(ramp[:, ::-1], quantity="disparity", low=0.0, high=1.0)),
        "error_ramp": data_url(_colorize_error(ramp * MAX_ERROR)),
        "error_range": f"{MAX_ERROR:.0%}",
    }


def _example_values(example: DepthExample, results: Sequence[DepthResult]) -> dict[str, Any]:
    """What the template shows of one example: pictures as data URLs, captions as text."""
    truth, valid = example.truth, np.isfinite(example.truth)
    disparity = np.where(valid, 1.0 / np.where(valid, truth, 1.0), 0.0).astype(np.float32)
    low, high = np.percentile(disparity[valid], (2, 98)) if valid.any() else (0.0, 1.0)
    paint = partial(colorize_by_distance, quantity="disparity", low=float(low), high=float(high))
    rows = [next(row for row in result.rows if row["key"] == example.key) for result in results]
    best = min(row["abs_rel"] for row in rows) if len(rows) > 1 else None
    models: list[dict[str, Any]] = []
    for result, row in zip(results, rows, strict=True):
        depth = example.predictions[result.name]
        error = np.abs(depth - truth) / np.where(valid, truth, 1.0)
        figures: dict[str, str] = {
            m: format_number(row[m]) for m in ("abs_rel", "d1", "boundary_f1") if m in row
        }
        models.append(
            {
                "name": result.name,
                "map": data_url(paint(1.0 / depth)),
                "error": data_url(_colorize_error(error, valid)),
                "best": row["abs_rel"] == best,
                "boundary_f1": "",
                **figures,
            }
        )
    height, width = truth.shape
    nearest, farthest = (np.nanmin(truth), np.nanmax(truth)) if valid.any() else (np.nan, np.nan)
    return {
        "key": example.key,
        "reason": example.reason,
        "image": data_url(example.image),
        "truth": data_url(paint(disparity, valid=valid)),
        "facts": f"{width}×{height}, {nearest:.3g}–{farthest:.3g} m, {valid.mean():.0%} compared",
        "models": models,
    }


def _colorize_error(error: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    return colorize(error, valid=valid, low=0.0, high=MAX_ERROR, colormap="inferno")


def _curves(results: Sequence[DepthResult], *, width: int = 1140, height: int = 240) -> dict[str, Any]:
    """Polylines of AbsRel over the images, sorted for each model: is a model better everywhere or on average?"""
    errors = [
        sorted(row["abs_rel"] for row in result.rows if row["valid"] and math.isfinite(row["abs_rel"]))
        for result in results
    ]
    highest = max((np.percentile(own, 98) for own in errors if own), default=1.0) or 1.0
    lines = [
        " ".join(
            f"{x:.1f},{height * (1 - min(error / highest, 1)):.1f}"
            for x, error in zip(np.linspace(0, width, len(own)), own, strict=True)
        )
        for own in errors
    ]
    # Three to six round numbers up to the highest.
    step = 10.0 ** math.floor(math.log10(highest))
    step *= next(share for share in (0.2, 0.5, 1.0, 2.0) if highest / (step * share) < 7)
    values = [round(step * count, 10) for count in range(1, int(highest / step) + 1)]
    ticks = [(f"{value:g}", round(height * (1 - value / highest), 1)) for value in values]
    return {"width": width, "height": height, "lines": lines, "ticks": ticks}
