"""The table of results as text, and the pieces of it that the page shows too."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from depth_anything.evaluation.benchmarks.da2k import PairResult
from depth_anything.evaluation.evaluate import (
    BOUNDARY_METRICS,
    HIGHER_IS_BETTER,
    METRICS,
    NON_FINITE_NOTE,
    DepthResult,
    escape_control_characters,
    format_keys,
)

SUMMARY_METRICS = ("abs_rel", "d1", "rmse", "log10")
"""The metrics of a summary of several benchmarks."""

TIES_NOTE = "A pair that a map gives one value is half right: a constant map has 50 %."


def format_table(results: Sequence[DepthResult]) -> str:
    """The results as text: a line a model, the best of each column starred, images and protocol below."""
    heads = ["model", *(f"{label} {direction_arrow(metric)}" for metric, label in results[0].metrics.items())]
    rows = [
        [cell["text"] + ("*" if cell["best"] else " ") for cell in cells] for cells in mean_cells(results)
    ]
    lines = [[heads[0], *(head + " " for head in heads[1:])]]
    lines += [
        [escape_control_characters(result.name), *row] for result, row in zip(results, rows, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *numbers in lines:
        cells = [
            name.ljust(widths[0]),
            *(n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True)),
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], "", *table_notes(results)])


def format_summary(trials: Mapping[str, Sequence[DepthResult]]) -> str:
    """Several benchmarks as text: a line a benchmark and model, the name of its protocol beside it."""
    sharp = any(result.protocol.sharp for results in trials.values() for result in results)
    metrics = (*SUMMARY_METRICS, *BOUNDARY_METRICS) if sharp else SUMMARY_METRICS
    labels = METRICS | BOUNDARY_METRICS
    lines = [
        ["benchmark", "protocol", "model", "images", *(f"{labels[m]} {direction_arrow(m)}" for m in metrics)]
    ]
    for name, results in trials.items():
        for result in results:
            means = [format_number(result.means[m]) if m in result.means else "–" for m in metrics]
            lines.append([name, result.protocol.name, result.name, str(result.images), *means])
    return format_columns(lines, left=3)


def format_pairs_table(scores: Mapping[str, PairResult]) -> str:
    """Scores on pairs of points as text: a line a model, per cent right of all pairs and of each kind of scene."""
    scenes = list(next(iter(scores.values())).scenes)
    lines = [["model", "pairs", "right %", *scenes]]
    for name, score in scores.items():
        shares = [score.accuracy, *(score.scenes[scene] for scene in scenes)]
        lines.append([name, str(score.pairs), *(f"{100 * share:.1f}" for share in shares)])
    return "\n".join(
        [
            format_columns(lines, left=1),
            "",
            TIES_NOTE,
            *(escape_control_characters(w) for w in pair_warnings(scores)),
        ]
    )


def pair_warnings(scores: Mapping[str, PairResult]) -> list[str]:
    """What makes scores no scores of a working model, in a sentence each."""
    lines = []
    for name, score in scores.items():
        mute = [row["key"] for row in score.rows if row.get("mute")]
        if mute:
            lines.append(f"{name} {NON_FINITE_NOTE} on {format_keys(mute)}.")
        elif score.pairs and score.accuracy < 0.4:
            lines.append(
                f"{name} orders most pairs the wrong way round. Is disparity taken for depth, or depth for disparity?"
            )
    return lines


def format_columns(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns, a rule below the first line; so many columns begin at their left, numbers end at their right."""
    lines = [[escape_control_characters(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if place < left or head in ("protocol", "origin") else cell.rjust(width)
            for place, (cell, width, head) in enumerate(zip(line, widths, lines[0], strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def best_result(results: Sequence[DepthResult]) -> DepthResult:
    """The result with the lowest mean AbsRel; one without a mean is last."""
    return min(results, key=lambda result: (math.isnan(result.means["abs_rel"]), result.means["abs_rel"]))


def table_notes(results: Sequence[DepthResult]) -> list[str]:
    """What must be read with the table: how many images, by which protocol, and what went wrong on which."""
    first = results[0]
    lines = [f"{first.images} images. Protocol {first.protocol.text}."]
    if first.protocol.sharp:
        lines.append(
            "Boundary F1: Depth Pro's (arXiv 2410.02073), of maps as compared; 0 where truth has no contour."
        )
    if len({result.model.get("quantity") for result in results} - {None}) > 1:
        lines.append(
            f"What the models give: {_format_quantities(results)}; only what the protocol names is fitted."
        )
    if first.empty:
        lines.append(f"Without a valid pixel, and left out of the means: {format_keys(first.empty)}.")
    return [*lines, *(escape_control_characters(line) for result in results for line in result.warnings)]


def _format_quantities(results: Sequence[DepthResult]) -> str:
    return ", ".join(f"{r.name} {r.model['quantity']}" for r in results if r.model.get("quantity"))


def direction_arrow(metric: str) -> str:
    """Which way a metric improves."""
    return "↑" if metric in HIGHER_IS_BETTER else "↓"


def mean_cells(results: Sequence[DepthResult]) -> list[list[dict[str, Any]]]:
    """Per result, per metric, the printed mean and whether it is the best of several."""
    best = {}
    metrics = results[0].metrics
    for metric in metrics:
        values = [r.means[metric] for r in results if math.isfinite(r.means[metric])]
        if len(results) > 1 and values:
            best[metric] = max(values) if metric in HIGHER_IS_BETTER else min(values)
    return [
        [
            {"text": format_number(result.means[m]), "best": m in best and result.means[m] == best[m]}
            for m in metrics
        ]
        for result in results
    ]


def format_number(value: float) -> str:
    """A metric as printed."""
    if math.isnan(value):
        return "nan"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"
