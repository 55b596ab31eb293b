"""Write the report of an evaluation: results.json, results.csv, table.txt and report.html.

With several benchmarks each has a folder with these files, and summary.json and summary.txt are above them.
"""

import csv
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from depth_anything import __version__
from depth_anything.disk import atomic_write
from depth_anything.evaluation.html_report import render_template
from depth_anything.evaluation.reported_results import ReportedResult
from depth_anything.evaluation.table import (
    Evaluated,
    build_table,
    format_overview,
    format_summary,
    format_table,
)
from depth_anything.evaluation.task import EvalResult, EvalTask


def write_report(
    task: EvalTask,
    results: Sequence[EvalResult],
    folder: str | Path,
    *,
    examples: Sequence[Any] = (),
    settings: Mapping[str, Any] | None = None,
    reported: Sequence[ReportedResult] = (),
    date: str | None = None,
) -> Path:
    """Write the report of one task into a folder, over older files.

    Args:
        task: the images and rules.
        results: one per model, on the same images.
        folder: created if needed.
        examples: the images to show, as `EvalTask.examples` gives them.
        settings: further facts about how it was made.
        reported: results of others on the same benchmark, for the table.
        date: instead of now.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no result, or results by different protocols or on different images.
    """
    _check_comparable(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": date or datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "data": dict(task.facts),
        "settings": dict(settings or {}),
        "versions": package_versions(),
        "published": [asdict(figure) for figure in reported],
    }
    _write_json(folder / "results.json", {**facts, **task.document(results)})
    _write_csv(folder / "results.csv", results)
    table = build_table(task, results, reported)
    text = format_table(table, task.notes(results))
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    template, values = task.page(results, examples)
    page = folder / "report.html"
    html = render_template(template, results=results, facts=facts, table=table, **values)
    page.write_text(html, encoding="utf-8")
    return page


def write_summary(
    evaluated: Evaluated, folder: str | Path, *, settings: Mapping[str, Any] | None = None
) -> None:
    """Write summary.json and summary.txt of several benchmarks into the folder of the whole report."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    depth = [(task, task.protocol, results) for task, results in evaluated if task.protocol]
    document: dict[str, Any] = {
        "settings": dict(settings or {}),
        "versions": package_versions(),
        "benchmarks": {
            task.name: {
                "protocol": {**protocol.to_dict(), "text": protocol.text},
                "models": [{"name": r.name, "images": r.images, "means": r.means} for r in results],
            }
            for task, protocol, results in depth
        },
        "points": {
            task.name: [{"name": r.name, "accuracy": r.means["accuracy"]} for r in results]
            for task, results in evaluated
            if not task.protocol
        },
    }
    _write_json(folder / "summary.json", document)
    text = (
        f"{format_summary([(task, results) for task, _, results in depth])}\n\n{format_overview(evaluated)}\n"
    )
    (folder / "summary.txt").write_text(text, encoding="utf-8")


def package_versions() -> dict[str, str]:
    """Versions of the packages that the figures depend on."""
    return {
        "depth_anything": __version__,
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _check_comparable(results: Sequence[EvalResult]) -> None:
    if not results:
        raise ValueError("no result to report")
    keys = [row["key"] for row in results[0].rows]
    for other in results[1:]:
        if other.protocol != results[0].protocol or [row["key"] for row in other.rows] != keys:
            raise ValueError(
                f"{results[0].name!r} and {other.name!r} were evaluated by different protocols or on different "
                "images: evaluate both in one command"
            )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    finite = _replace_non_finite({"version": 1, **document})
    atomic_write(path, json.dumps(finite, indent=1, ensure_ascii=False, allow_nan=False).encode())


def _replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: Path, results: Sequence[EvalResult]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = list(results[0].rows[0])
        writer.writerow(["model", *columns])
        for result in results:
            for row in result.rows:
                writer.writerow(map(_escape_formula, [result.name, *(row[column] for column in columns)]))


def _escape_formula(value: Any) -> Any:
    """Put an apostrophe before a text that a spreadsheet would read as a formula."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value
