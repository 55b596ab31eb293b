"""Tables of results as text: one benchmark with reported results in the same columns, or several benchmarks.

A reported result is in the same table only if it follows the same protocol; all others are in a second table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from depth_anything.data.address import escape_unprintable
from depth_anything.evaluation.evaluate import BOUNDARY_METRICS, METRICS
from depth_anything.evaluation.reported_results import ReportedResult, find_reported_results
from depth_anything.evaluation.task import EvalResult, EvalTask

MEASURED_HERE = "measured here"
_ORIGINS = {False: "published", True: "measured again"}  # by `ReportedResult.rerun`
OTHER_PROTOCOLS = "By other rules, not comparable with the figures above:"

SUMMARY_METRICS = ("abs_rel", "d1", "rmse", "log10")
"""The columns of a summary of several benchmarks."""

OVERVIEW_METRICS = ("abs_rel", "d1", "accuracy")
"""The figures in a cell of a table with a column per benchmark, as far as the benchmark has them."""

Evaluated = Sequence[tuple[EvalTask, Sequence[EvalResult]]]
"""Tasks with the results of all models on each."""

_NO_VALUE = "–"


@dataclass(frozen=True)
class Cell:
    """A figure as printed, and whether it is the best of what was measured here."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class TableRow:
    """The figures of one model.

    Attributes:
        model: its name.
        cells: one per column.
        protocol: name of the rules.
        origin: who measured it, and the source.
        remark: number of a remark below the table, from 1; 0 for none.
    """

    model: str
    cells: tuple[Cell, ...]
    protocol: str
    origin: str
    remark: int = 0


@dataclass(frozen=True)
class ResultsTable:
    """Measured and reported results of one benchmark.

    Attributes:
        headings: of the figures' columns.
        rows: measured results, then reported ones by the same protocol.
        other_rows: reported results by other protocols.
        remarks: sentences without their full stop, which `TableRow.remark` refers to.
        caution: why no reported result is comparable (a sentence without its full stop), or "".
    """

    headings: tuple[str, ...]
    rows: tuple[TableRow, ...]
    other_rows: tuple[TableRow, ...] = ()
    remarks: tuple[str, ...] = ()
    caution: str = ""


def build_table(
    task: EvalTask, results: Sequence[EvalResult], reported: Sequence[ReportedResult] = ()
) -> ResultsTable:
    """Put results on a task and reported results of the same benchmark into one table."""
    columns, rules = task.columns(results), task.rules
    best: dict[str, float] = {}
    for column in columns:
        values = [result.means[column.metric] for result in results]
        finite = [value for value in values if math.isfinite(value)]
        if len(results) > 1 and finite:
            best[column.metric] = max(finite) if column.higher_is_better else min(finite)
    rows: list[TableRow] = []
    other_rows: list[TableRow] = []
    remarks: list[str] = []
    for result in results:
        means = [(column, result.means[column.metric]) for column in columns]
        cells = [Cell(format_number(v, percent=c.percent), v == best.get(c.metric)) for c, v in means]
        rows.append(TableRow(result.name, tuple(cells), rules, MEASURED_HERE))
    for figure in reported:
        cells = [Cell(format_reported(figure.values.get(c.metric), percent=c.percent)) for c in columns]
        origin = f"{_ORIGINS[figure.rerun]}, {figure.source}"
        row = TableRow(
            figure.model, tuple(cells), figure.protocol, origin, _remark_number(figure.remark, remarks)
        )
        (rows if figure.protocol == rules else other_rows).append(row)
    return ResultsTable(
        headings=tuple(column.label for column in columns),
        rows=tuple(rows),
        other_rows=tuple(other_rows),
        remarks=tuple(remarks),
        caution=task.incomplete if reported else "",
    )


def format_table(table: ResultsTable, notes: Sequence[str] = ()) -> str:
    """A table as text, the best of what was measured here starred; protocol and origin only with reported results."""
    origin = bool(table.other_rows) or any(row.origin != MEASURED_HERE for row in table.rows)
    parts = [_format_rows(table.headings, table.rows, origin=origin)]
    if table.other_rows:
        parts.append(f"{OTHER_PROTOCOLS}\n\n{_format_rows(table.headings, table.other_rows, origin=True)}")
    if table.caution:
        parts.append(f"Note: {table.caution}.")
    if table.remarks:
        parts.append("\n".join(f"({number}) {remark}." for number, remark in enumerate(table.remarks, 1)))
    if notes:
        parts.append("\n".join(map(escape_unprintable, notes)))
    return "\n\n".join(parts)


def format_summary(evaluated: Evaluated) -> str:
    """Several benchmarks of depth as text: a line per benchmark and model."""
    sharp = any("boundary_f1" in result.means for _, results in evaluated for result in results)
    metrics = (*SUMMARY_METRICS, *BOUNDARY_METRICS) if sharp else SUMMARY_METRICS
    labels = METRICS | BOUNDARY_METRICS
    arrows = {column.metric: column.label for task, results in evaluated for column in task.columns(results)}
    lines = [["benchmark", "protocol", "model", "images", *(arrows.get(m, labels[m]) for m in metrics)]]
    for task, results in evaluated:
        for result in results:
            means = [format_number(result.means[m]) if m in result.means else _NO_VALUE for m in metrics]
            lines.append([task.name, task.rules, result.name, str(result.images), *means])
    return format_columns(lines, left=3)


def format_overview(evaluated: Evaluated) -> str:
    """Several benchmarks as text: a line per model, measured here or reported, and a column per benchmark."""
    headings: list[str] = []
    measured: dict[tuple[str, str], dict[str, str]] = {}
    others: dict[tuple[str, str], dict[str, str]] = {}
    sources: dict[tuple[str, str], dict[str, None]] = {}
    remarks: list[str] = []
    for task, results in evaluated:
        rules = task.rules
        heading = task.name if rules == task.name else f"{task.name} ({rules})"
        headings.append(heading)
        columns = [column for column in task.columns(results) if column.metric in OVERVIEW_METRICS]
        for result in results:
            figures = [format_number(result.means[c.metric], percent=c.percent) for c in columns]
            measured.setdefault((result.name, MEASURED_HERE), {})[heading] = " / ".join(figures)
        for figure in find_reported_results(task.name, protocol=rules):
            row = (figure.model, _ORIGINS[figure.rerun])
            figures = [format_reported(figure.values.get(c.metric), percent=c.percent) for c in columns]
            remark = _remark_number(figure.remark, remarks)
            others.setdefault(row, {})[heading] = " / ".join(figures) + (f" ({remark})" if remark else "")
            sources.setdefault(row, {})[figure.source] = None
    lines = [["model", *headings, "origin"]]
    for (model, origin), cells in [*measured.items(), *others.items()]:
        origin = "; ".join([origin, *sources.get((model, origin), ())])
        lines.append([model, *(cells.get(heading, _NO_VALUE) for heading in headings), origin])
    notes = [
        "AbsRel / δ1 (da2k: percent right); reported results follow the protocol that each column names."
    ]
    notes += [f"Note: {task.name}: {task.incomplete}." for task, _ in evaluated if task.incomplete]
    notes += [f"({number}) {remark}." for number, remark in enumerate(remarks, 1)]
    return "\n".join([format_columns(lines, left=1), "", *notes])


def format_columns(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Align columns and draw a rule below the first line.

    The first `left` columns, "protocol" and "origin" are aligned at their left, numbers at their right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if place < left or head in ("protocol", "origin") else cell.rjust(width)
            for place, (cell, width, head) in enumerate(zip(line, widths, lines[0], strict=True))
        ]
        joined = "  ".join(cells).rstrip()
        text.append(joined if joined.isprintable() else escape_unprintable(joined))
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def format_number(value: float, *, percent: bool = False) -> str:
    """A measured value as printed: four decimals, or percent with one."""
    if percent:
        return f"{100 * value:.1f}"
    return f"{value:.4f}" if math.isnan(value) or abs(value) < 100 else f"{value:.4g}"


def format_reported(value: float | None, *, percent: bool = False) -> str:
    """A reported value with the three or four digits that it was printed with."""
    if value is None:
        return _NO_VALUE
    return f"{100 * value:.1f}" if percent else f"{value:.4f}".removesuffix("0")


def _format_rows(headings: Sequence[str], rows: Sequence[TableRow], *, origin: bool) -> str:
    """Align the decimal points of each column and star the best."""
    lines = [["model", *(f"{heading} " for heading in headings), *(["protocol", "origin"] if origin else [])]]
    decimals = [
        [len(row.cells[place].text.partition(".")[2]) for row in rows] for place in range(len(headings))
    ]
    for number, row in enumerate(rows):
        cells = [
            cell.text + ("*" if cell.best else " ") + " " * (max(own) - own[number] if own[number] else 0)
            for cell, own in zip(row.cells, decimals, strict=True)
        ]
        mark = f" ({row.remark})" if row.remark else ""
        lines.append([row.model, *cells, *([row.protocol, row.origin + mark] if origin else [])])
    return format_columns(lines, left=1)


def _remark_number(remark: str, remarks: list[str]) -> int:
    """The number of a remark, from 1, which is added if it is new; 0 for none."""
    if remark and remark not in remarks:
        remarks.append(remark)
    return remarks.index(remark) + 1 if remark else 0
