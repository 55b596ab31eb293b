"""What is measured here beside what others have, in the same columns: of one benchmark, and of several.

A figure stands in the same table only if it was made by the rules that ours was made by; those of other rules have a
table of their own, under their name. What nobody could make again says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from depth_anything.evaluation.benchmarks.da2k import SCENE_TYPES as KINDS
from depth_anything.evaluation.benchmarks.da2k import PairResult
from depth_anything.evaluation.evaluate import DepthResult, escape_control_characters
from depth_anything.evaluation.reported_results import SCENE_ACCURACY, ReportedResult, find_reported_results
from depth_anything.evaluation.table import (
    TIES_NOTE,
    direction_arrow,
    format_columns,
    format_number,
    mean_cells,
    pair_warnings,
    table_notes,
)

MEASURED_HERE = "measured here"
OVERVIEW_METRICS = ("abs_rel", "d1")
"""The metrics of a cell where benchmarks are columns."""

OTHER_PROTOCOLS = "By other rules, so that nothing above can be held against it:"
_NO_VALUE = "–"


@dataclass(frozen=True)
class ComparisonRow:
    """A model's figures.

    Attributes:
        model: its name.
        cells: a dict a figure: "text", and whether it is the "best" of what was measured here.
        protocol: the name of the rules.
        origin: who measured it, and where that stands.
        remark: number of the remark that a reader must know, from 1; 0: none.
    """

    model: str
    cells: tuple[dict[str, Any], ...]
    protocol: str
    origin: str
    remark: int = 0


@dataclass(frozen=True)
class Comparison:
    """Measured and published figures of one benchmark.

    Attributes:
        heads: of the figures' columns.
        lines: by the rules of what was measured, which come first.
        others: by other rules.
        remarks: sentences without their full stop; a line's `remark` counts them from 1.
        caution: likewise, why no figure of others is comparable at all.
    """

    heads: tuple[str, ...]
    lines: tuple[ComparisonRow, ...]
    others: tuple[ComparisonRow, ...] = ()
    remarks: tuple[str, ...] = ()
    caution: str = ""


def compare_results(results: Sequence[DepthResult], figures: Sequence[ReportedResult] = ()) -> Comparison:
    """Put published figures of a benchmark beside results on it, all of the same protocol."""
    metrics = results[0].metrics
    ours = [
        ComparisonRow(result.name, tuple(cells), result.protocol.name, MEASURED_HERE)
        for result, cells in zip(results, mean_cells(results), strict=True)
    ]
    heads = [f"{label} {direction_arrow(metric)}" for metric, label in metrics.items()]
    return _build_comparison(
        heads, ours, figures, lambda figure: [_format_figure(figure.values.get(m)) for m in metrics]
    )


def compare_pairs(scores: Mapping[str, PairResult], figures: Sequence[ReportedResult] = ()) -> Comparison:
    """The same of DA-2K: per cent right, of all pairs and of each kind of scene that occurs."""
    scenes = list(next(iter(scores.values())).scenes)
    shares = {name: [score.accuracy, *map(score.scenes.get, scenes)] for name, score in scores.items()}
    best = [max(column) for column in zip(*shares.values(), strict=True)] if len(scores) > 1 else [None]
    ours = []
    for name, own in shares.items():
        marked = zip_longest(own, best)
        cells = tuple({"text": _format_percent(share), "best": share == top} for share, top in marked)
        ours.append(ComparisonRow(name, cells, "da2k", MEASURED_HERE))

    def texts(figure: ReportedResult) -> list[str]:
        kinds = dict(zip(KINDS, SCENE_ACCURACY.get(figure.model, ()), strict=False))
        return [_format_percent(share) for share in (figure.values["accuracy"], *map(kinds.get, scenes))]

    heads = ["right %", *(scene.replace("_", " ") for scene in scenes)]
    whole = [
        replace(figure, source=f"{figure.source} (scenes: 14)") if figure.model in SCENE_ACCURACY else figure
        for figure in figures
    ]
    return _build_comparison(heads, ours, whole, texts)


def format_comparison(comparison: Comparison) -> str:
    """A comparison as text; the best of what was measured here is starred."""
    parts = [_format_rows(comparison.heads, comparison.lines)]
    if comparison.others:
        parts.append(f"{OTHER_PROTOCOLS}\n\n{_format_rows(comparison.heads, comparison.others)}")
    if comparison.caution:
        parts.append(f"Note: {comparison.caution}.")
    if comparison.remarks:
        parts.append("\n".join(f"({number}) {text}." for number, text in enumerate(comparison.remarks, 1)))
    return "\n\n".join(parts)


def format_depth_table(results: Sequence[DepthResult], comparison: Comparison) -> str:
    """A comparison with what must be read with our results."""
    return "\n".join([format_comparison(comparison), "", *table_notes(results)])


def format_compared_pairs(scores: Mapping[str, PairResult], comparison: Comparison) -> str:
    """A comparison of DA-2K with what must be read with our scores."""
    first = next(iter(scores.values()))
    told = "\n".join(
        [
            f"{len(first.rows)} images, {first.pairs} pairs. {TIES_NOTE}",
            *map(escape_control_characters, pair_warnings(scores)),
        ]
    )
    return f"{format_comparison(comparison)}\n\n{told}"


def format_overview(
    trials: Mapping[str, Sequence[DepthResult]],
    points: Mapping[str, Mapping[str, PairResult]],
    *,
    cautions: Sequence[str] = (),
) -> str:
    """Several benchmarks as text: a line a model, measured here or by others, and a column a benchmark.

    Args:
        trials: benchmark → results; its cells are AbsRel / δ1, and others' are of the same protocol.
        points: DA-2K → scores; its cells are per cent right.
        cautions: sentences without their full stop: of which benchmarks not all images were judged.
    """
    columns = [*map(_depth_column, trials, trials.values()), *map(_pairs_column, points, points.values())]
    ours: dict[tuple[str, str], dict[str, str]] = {}
    theirs: dict[tuple[str, str], dict[str, str]] = {}
    sources: dict[tuple[str, str], dict[str, None]] = {}
    remarks: list[str] = []
    for head, mine, figures in columns:
        for model, text in mine.items():
            ours.setdefault((model, MEASURED_HERE), {})[head] = text
        for figure in figures:
            row = (figure.model, _origin(figure))
            mark = _remark_number(figure.remark, remarks)
            theirs.setdefault(row, {})[head] = _format_reported(figure.values) + (
                f" ({mark})" if mark else ""
            )
            sources.setdefault(row, {})[figure.source] = None
    lines = [["model", *(head for head, _, _ in columns), "origin"]]
    for row, cells in [*ours.items(), *theirs.items()]:
        origin = "; ".join([f"{row[1]}", *sources.get(row, ())])
        lines.append([row[0], *(cells.get(head, _NO_VALUE) for head, _, _ in columns), origin])
    notes = ["AbsRel / δ1 (da2k: per cent right); others' figures are of the rules that each column names."]
    notes += [f"Note: {text}." for text in cautions]
    notes += [f"({number}) {text}." for number, text in enumerate(remarks, 1)]
    return "\n".join([format_columns(lines, left=1), "", *notes])


def _depth_column(
    name: str, results: Sequence[DepthResult]
) -> tuple[str, dict[str, str], Sequence[ReportedResult]]:
    """Head, texts of ours, and what others have by the same rules."""
    protocol = results[0].protocol.name
    mine = {
        result.name: " / ".join(format_number(result.means[metric]) for metric in OVERVIEW_METRICS)
        for result in results
    }
    return f"{name} ({protocol})", mine, find_reported_results(name, protocol=protocol)


def _pairs_column(
    name: str, scores: Mapping[str, PairResult]
) -> tuple[str, dict[str, str], Sequence[ReportedResult]]:
    return (
        name,
        {model: _format_percent(score.accuracy) for model, score in scores.items()},
        find_reported_results(name),
    )


def _build_comparison(
    heads: Sequence[str],
    ours: Sequence[ComparisonRow],
    figures: Sequence[ReportedResult],
    texts: Callable[[ReportedResult], Sequence[str]],
) -> Comparison:
    remarks: list[str] = []
    lines = []
    for figure in figures:
        cells = tuple({"text": text, "best": False} for text in texts(figure))
        origin = f"{_origin(figure)}, {figure.source}"
        mark = _remark_number(figure.remark, remarks)
        lines.append(ComparisonRow(figure.model, cells, figure.protocol, origin, mark))
    rules = ours[0].protocol
    same = [line for line in lines if line.protocol == rules]
    others = tuple(line for line in lines if line.protocol != rules)
    return Comparison(tuple(heads), (*ours, *same), others, tuple(remarks))


def _format_rows(heads: Sequence[str], lines: Sequence[ComparisonRow]) -> str:
    columns = [_align_decimal_points([line.cells[place] for line in lines]) for place in range(len(heads))]
    rows = [["model", *(f"{head} " for head in heads), "protocol", "origin"]]
    for line, *numbers in zip(lines, *columns, strict=True):
        mark = f" ({line.remark})" if line.remark else ""
        rows.append([line.model, *numbers, line.protocol, line.origin + mark])
    return format_columns(rows, left=1)


def _align_decimal_points(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Texts of a column with their points one below the other, the best starred."""
    behind = [len(cell["text"].partition(".")[2]) for cell in cells]
    room = [max(behind) - own if own else 0 for own in behind]
    return [
        cell["text"] + ("*" if cell["best"] else " ") + " " * spaces
        for cell, spaces in zip(cells, room, strict=True)
    ]


def _origin(figure: ReportedResult) -> str:
    return "measured again" if figure.rerun else "published"


def _remark_number(remark: str, remarks: list[str]) -> int:
    """The number of a remark, from 1, which is added if it is new; 0 for none."""
    if remark and remark not in remarks:
        remarks.append(remark)
    return remarks.index(remark) + 1 if remark else 0


def _format_reported(values: Mapping[str, float]) -> str:
    """AbsRel / δ1 of others, or what they have of DA-2K."""
    if "accuracy" in values:
        return _format_percent(values["accuracy"])
    return " / ".join(_format_figure(values.get(metric)) for metric in OVERVIEW_METRICS)


def _format_figure(value: float | None) -> str:
    """A figure with the three or four digits that it was printed with."""
    return _NO_VALUE if value is None else f"{value:.4f}".removesuffix("0")


def _format_percent(share: float | None) -> str:
    return _NO_VALUE if share is None else f"{100 * share:.1f}"
