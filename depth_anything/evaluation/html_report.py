"""The report as one HTML page: pictures, curves and captions in, a text that needs no other file out."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import cv2
import jinja2
import numpy as np

from depth_anything.evaluation.compare import MEASURED_HERE, OTHER_PROTOCOLS, Comparison
from depth_anything.evaluation.evaluate import DepthResult
from depth_anything.evaluation.table import best_result, format_number, table_notes
from depth_anything.visualize import colorize, colorize_by_distance

ERROR_RANGE = 0.5
"""Relative error at which the error maps' colours end."""

MAX_PICTURE_PX = 448
"""Longest side of a picture in the page, in pixels."""


@dataclass(frozen=True)
class DepthExample:
    """One image of the report.

    Attributes:
        key: the record.
        why: what brought it here ("first", "best", "median", "worst").
        image: uint8 (H,W,3) RGB.
        truth: float32 (H,W) metres, NaN where the protocol compares nothing.
        predictions: per model name float32 (H,W) metres as compared, that is after the protocol's fit.
    """

    key: str
    why: str
    image: np.ndarray
    truth: np.ndarray
    predictions: dict[str, np.ndarray]


def render_page(
    results: Sequence[DepthResult],
    examples: Sequence[DepthExample],
    facts: Mapping[str, Any],
    *,
    comparison: Comparison,
    title: str,
) -> str:
    """The page as HTML. `facts` holds date, data, settings and versions; the rest is as in `write_report`."""
    ramp = np.linspace(0.0, 1.0, 256, dtype=np.float32)[None].repeat(8, axis=0)
    return render_template(
        "report.html.j2",
        title=title,
        facts=facts,
        models={result.name: result.model for result in results},
        columns=len(results) + 2,
        results=results,
        comparison=comparison,
        notes=table_notes(results)[1:],
        curves=_curves(results),
        examples=[_example_values(example, results) for example in examples],
        leader=best_result(results).name,
        near_to_far=data_url(_colorize_disparity(ramp[:, ::-1], low=0.0, high=1.0)),
        error_ramp=data_url(_colorize_error(ramp, low=0.0, high=1.0)),
        error_range=f"{ERROR_RANGE:.0%}",
    )


def _example_values(example: DepthExample, results: Sequence[DepthResult]) -> dict[str, Any]:
    """What the template shows of one example: pictures as data addresses, captions as text."""
    compared = np.isfinite(example.truth)
    disparity = np.where(compared, 1.0 / np.where(compared, example.truth, 1.0), 0.0).astype(np.float32)
    low, high = np.percentile(disparity[compared], (2, 98)) if compared.any() else (0.0, 1.0)
    models: list[dict[str, Any]] = []
    for result in results:
        depth = example.predictions[result.name]
        error = np.abs(depth - example.truth) / np.where(compared, example.truth, 1.0)
        row = next(row for row in result.rows if row["key"] == example.key)
        models.append(
            {
                "name": result.name,
                "map": data_url(_colorize_disparity(1.0 / depth, low=low, high=high)),
                "error": data_url(_colorize_error(error, valid=compared, low=0.0, high=ERROR_RANGE)),
                "abs_rel": format_number(row["abs_rel"]),
                "d1": format_number(row["d1"]),
                "boundary_f1": format_number(row["boundary_f1"]) if result.protocol.sharp else "",
            }
        )
    scores = [row["abs_rel"] for result in results for row in result.rows if row["key"] == example.key]
    for model, score in zip(models, scores, strict=True):
        model["best"] = len(scores) > 1 and score == min(scores)
    nearest, farthest = (
        (np.nanmin(example.truth), np.nanmax(example.truth)) if compared.any() else (np.nan, np.nan)
    )
    height, width = example.truth.shape
    return {
        "key": example.key,
        "why": example.why,
        "image": data_url(example.image),
        "truth": data_url(_colorize_disparity(disparity, valid=compared, low=low, high=high)),
        "facts": f"{width}×{height}, {nearest:.3g}–{farthest:.3g} m, {compared.mean():.0%} compared",
        "models": models,
    }


def _colorize_disparity(
    disparity: np.ndarray, *, low: float, high: float, valid: np.ndarray | None = None
) -> np.ndarray:
    return colorize_by_distance(
        disparity, quantity="disparity", valid=valid, low=float(low), high=float(high)
    )


def _colorize_error(
    error: np.ndarray, *, low: float, high: float, valid: np.ndarray | None = None
) -> np.ndarray:
    return colorize(error, valid=valid, low=low, high=high, colormap="inferno")


def render_template(template: str, **values: Any) -> str:
    """A page from a template of this folder; what it is given is text, and never markup."""
    folder = resources.files("depth_anything.evaluation")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        here=MEASURED_HERE, other_rules=OTHER_PROTOCOLS, **values
    )


def shrink_to_page(rgb: np.ndarray) -> np.ndarray:
    """A picture, uint8 (H,W,3), no larger than the page shows it."""
    shrink = MAX_PICTURE_PX / max(rgb.shape[:2])
    if shrink >= 1:
        return rgb
    size = [max(1, round(side * shrink)) for side in rgb.shape[1::-1]]
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def data_url(rgb: np.ndarray) -> str:
    """The picture itself as an address, shrunk to what the page shows."""
    bgr = np.ascontiguousarray(shrink_to_page(rgb)[..., ::-1])
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()


def _curves(results: Sequence[DepthResult], *, width: int = 1140, height: int = 240) -> dict[str, Any]:
    """Polylines of AbsRel over the images, sorted for each model: does it win everywhere or on average?"""
    sorted_errors = [
        sorted(row["abs_rel"] for row in result.rows if row["valid"] and math.isfinite(row["abs_rel"]))
        for result in results
    ]
    highest = max((np.percentile(errors, 98) for errors in sorted_errors if errors), default=1.0) or 1.0
    lines = []
    for errors in sorted_errors:
        span = max(len(errors) - 1, 1)
        lines.append(
            " ".join(
                f"{i / span * width:.1f},{height * (1 - min(e / highest, 1)):.1f}"
                for i, e in enumerate(errors)
            )
        )
    ticks = [(f"{tick:g}", round(height * (1 - tick / highest), 1)) for tick in _ticks(highest)]
    return {"width": width, "height": height, "lines": lines, "ticks": ticks}


def _ticks(highest: float) -> list[float]:
    """Three to six round numbers up to the highest."""
    step = 10.0 ** math.floor(math.log10(highest))
    step *= next(share for share in (0.2, 0.5, 1.0, 2.0) if highest / (step * share) < 7)
    return [round(step * count, 10) for count in range(1, int(highest / step) + 1)]
