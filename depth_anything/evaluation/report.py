"""From results to something a person reads: a table, JSON and CSV, and one HTML page that needs nothing else.

Of several benchmarks each has a folder with these, and a summary lies above them.

The page shows the picture, the truth, every model's map in the colour range of the truth, and where it errs:
for the first few images and for the best, median and worst of the best model.
"""

import csv
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from depth_anything import __version__
from depth_anything.data.sample import Frame
from depth_anything.disk import atomic_write
from depth_anything.evaluation.benchmarks.da2k import PairResult
from depth_anything.evaluation.compare import (
    compare_pairs,
    compare_results,
    format_compared_pairs,
    format_depth_table,
    format_overview,
)
from depth_anything.evaluation.da2k_report import (
    choose_pair_examples,
    collect_pair_examples,
    render_pairs_page,
)
from depth_anything.evaluation.evaluate import (
    DepthResult,
    MapSource,
    crop_to_view,
    masked_truth,
    score_frames,
)
from depth_anything.evaluation.html_report import DepthExample, render_page
from depth_anything.evaluation.protocols import EvalProtocol
from depth_anything.evaluation.reported_results import ReportedResult
from depth_anything.evaluation.runner import EvalTask
from depth_anything.evaluation.table import best_result, format_summary, format_table, pair_warnings


def write_task_report(
    predictors: Mapping[str, MapSource],
    trial: EvalTask,
    results: Sequence[DepthResult],
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    published: Sequence[ReportedResult] = (),
) -> Path:
    """Write the report of a trial that is through, with pictures; the path of its page.

    Args:
        predictors: name → predictor, for the pictures.
        trial: what they were judged on.
        results: a result a predictor, of all images.
        folder: where the report goes; made if need be.
        settings: what else the report should say about how it was made.
        published: figures of others on the same benchmark, to stand beside ours.
    """
    assert trial.protocol is not None
    why = choose_examples(results)
    lines = {row["key"]: line for row, line in zip(results[0].rows, trial.lines, strict=True)}
    frames = (trial.read(lines[key]) for key in why)
    examples = collect_examples(predictors, frames, why=why, protocol=trial.protocol)
    return write_report(
        results,
        folder,
        examples=examples,
        data=trial.facts,
        settings=settings,
        published=published,
        caution=trial.incomplete,
    )


def choose_examples(results: Sequence[DepthResult], *, first: int = 4) -> dict[str, str]:
    """Which images to show: key → why. The first few, then the best, median and worst of the best model."""
    leader = best_result(results)
    ranked = sorted((row for row in leader.rows if row["valid"]), key=lambda row: row["abs_rel"])
    wanted = [(row["key"], "first") for row in leader.rows[:first]]
    if ranked:
        spots = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
        wanted += [(ranked[spot]["key"], why) for why, spot in spots.items()]
    why: dict[str, str] = {}
    for key, reason in wanted:
        why[key] = f"{why[key]}, {reason}" if key in why else reason
    return why


def collect_examples(
    predictors: Mapping[str, MapSource],
    frames: Iterable[Frame],
    *,
    why: Mapping[str, str],
    protocol: EvalProtocol,
) -> list[DepthExample]:
    """Predict the frames whose key is in `why` again, and keep what the page shows, in the order of `why`."""
    examples = {}
    for frame in frames:
        if frame.key not in why or frame.depth is None:
            continue
        maps = {}
        for name, predictor in predictors.items():
            maps[name] = score_frames(predictor, [frame], protocol=protocol)[0][0]
        seen = crop_to_view(frame, protocol)
        truth = masked_truth(seen, protocol)
        examples[frame.key] = DepthExample(frame.key, why[frame.key], seen.image, truth, maps)
    return [examples[key] for key in why if key in examples]


def write_report(
    results: Sequence[DepthResult],
    folder: str | Path,
    *,
    examples: Sequence[DepthExample] = (),
    data: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    published: Sequence[ReportedResult] = (),
    caution: str = "",
    title: str = "Evaluation",
    date: str | None = None,
) -> Path:
    """Write results.json, results.csv, table.txt and report.html into a folder, over older ones.

    Args:
        results: one a model, judged by the same protocol on the same images.
        folder: made if need be.
        examples: the images to show.
        data: facts about the set: name, digest, records, ….
        settings: what else was set.
        published: figures of others, for the table.
        caution: in a sentence without its full stop, why none of them is comparable; "" if they are.
        title: the page's heading.
        date: in place of now.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no result, or results of different protocols or images, which no table may compare.
    """
    _check_comparable(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = _report_metadata(data, settings, published, date)
    _write_json(folder / "results.json", {**facts, **_results_json(results)})
    _write_csv({result.name: result.rows for result in results}, folder / "results.csv")
    comparison = replace(compare_results(results, published), caution=caution if published else "")
    text = format_depth_table(results, comparison) if published else format_table(results)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    page = folder / "report.html"
    html = render_page(results, examples, facts, comparison=comparison, title=title)
    page.write_text(html, encoding="utf-8")
    return page


def write_pairs_report(
    predictors: Mapping[str, MapSource],
    trial: EvalTask,
    scores: Mapping[str, PairResult],
    folder: str | Path,
    *,
    models: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    published: Sequence[ReportedResult] = (),
    date: str | None = None,
) -> Path:
    """Write results.json, results.csv, table.txt and report.html of models that ordered pairs of points.

    Args:
        predictors: name → predictor, for the pictures.
        trial: what they were judged on.
        scores: name → score, of all images.
        folder: where the report goes; made if need be.
        models: name → facts about the model.
        settings: what else was set.
        published: figures of others.
        date: in place of now.

    Returns:
        The path of report.html.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    why = choose_pair_examples(scores)
    lines = {
        row["key"]: line for row, line in zip(next(iter(scores.values())).rows, trial.lines, strict=True)
    }
    examples = collect_pair_examples(predictors, (trial.read(lines[key]) for key in why), why=why)
    facts = _report_metadata(trial.facts, settings, published, date)
    told: list[dict[str, Any]] = [
        {"name": name, "facts": dict(models[name]), **_pairs_json(score)} for name, score in scores.items()
    ]
    warned = pair_warnings(scores)
    _write_json(folder / "results.json", {**facts, "models": told, "warnings": warned})
    _write_csv({name: score.rows for name, score in scores.items()}, folder / "results.csv")
    comparison = replace(compare_pairs(scores, published), caution=trial.incomplete if published else "")
    (folder / "table.txt").write_text(format_compared_pairs(scores, comparison) + "\n", encoding="utf-8")
    page = folder / "report.html"
    html = render_pairs_page(scores, examples, facts, models, comparison=comparison, title="Evaluation")
    page.write_text(html, encoding="utf-8")
    return page


def write_summary(
    trials: Mapping[str, Sequence[DepthResult]],
    folder: str | Path,
    *,
    points: Mapping[str, Mapping[str, PairResult]] | None = None,
    cautions: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write summary.json and summary.txt of several benchmarks, over older ones.

    Args:
        trials: benchmark → the results on it.
        folder: of the whole report; made if need be.
        points: DA-2K → the scores on it.
        cautions: sentences without their full stop: of which benchmarks not all images were judged.
        settings: how it was made.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    points = points or {}
    document: dict[str, Any] = {
        "settings": dict(settings or {}),
        "versions": package_versions(),
        "benchmarks": {
            name: {
                "protocol": {**asdict(results[0].protocol), "text": results[0].protocol.text},
                "models": [{"name": r.name, "images": r.images, "means": r.means} for r in results],
            }
            for name, results in trials.items()
        },
        "points": {
            name: [{"name": model, "accuracy": score.accuracy} for model, score in scores.items()]
            for name, scores in points.items()
        },
    }
    _write_json(folder / "summary.json", document)
    text = f"{format_summary(trials)}\n\n{format_overview(trials, points, cautions=cautions)}\n"
    (folder / "summary.txt").write_text(text, encoding="utf-8")


def package_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "depth_anything": __version__,
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _check_comparable(results: Sequence[DepthResult]) -> None:
    if not results:
        raise ValueError("no result to report")
    first = results[0]
    keys = [row["key"] for row in first.rows]
    for other in results[1:]:
        if other.protocol != first.protocol or [row["key"] for row in other.rows] != keys:
            raise ValueError(
                f"{first.name!r} and {other.name!r} were judged by different protocols or on different "
                "images: evaluate both in one command"
            )


def _report_metadata(
    data: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    published: Sequence[ReportedResult],
    date: str | None,
) -> dict[str, Any]:
    """How a report was made, for its page and its JSON."""
    return {
        "date": date or datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "data": dict(data or {}),
        "settings": dict(settings or {}),
        "versions": package_versions(),
        "published": [{**asdict(figure), "values": dict(figure.values)} for figure in published],
    }


def _results_json(results: Sequence[DepthResult]) -> dict[str, Any]:
    """Protocol and models of a report's JSON."""
    protocol = results[0].protocol
    return {
        "protocol": {**asdict(protocol), "text": protocol.text},
        "models": [
            {
                "name": result.name,
                "facts": result.model,
                "images": result.images,
                "empty": result.empty,
                "broken": result.broken,
                "inverted": result.inverted,
                "constant": result.constant,
                "warnings": result.warnings,
                "means": result.means,
                "rows": list(result.rows),
            }
            for result in results
        ],
    }


def _pairs_json(score: PairResult) -> dict[str, Any]:
    return {
        "images": len(score.rows),
        "pairs": score.pairs,
        "accuracy": score.accuracy,
        "scenes": score.scenes,
        "rows": list(score.rows),
    }


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    finite = _replace_non_finite({"version": 1, **document})
    atomic_write(path, json.dumps(finite, indent=1, ensure_ascii=False, allow_nan=False).encode())


def _replace_non_finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(rows: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = list(next(iter(rows.values()))[0])
        writer.writerow(["model", *columns])
        for name, own in rows.items():
            writer.writerows(
                [_escape_formula(name), *(_escape_formula(row[column]) for column in columns)] for row in own
            )


def _escape_formula(value: Any) -> Any:
    """A value of a CSV; before a text that a spreadsheet would take for a formula stands an apostrophe."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )
