"""From results to something a person reads: a table, JSON and CSV, and one HTML page that needs nothing else.

The page shows the picture, the truth, every model's map in the colour range of the truth, and where it errs:
for the first few images and for the best, median and worst of the best model.
"""

import csv
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from depth_anything import __version__
from depth_anything.data.sample import Frame
from depth_anything.data.shards import ShardSet
from depth_anything.evaluation.evaluate import Predicts, Protocol, Result, evaluate, judge
from depth_anything.evaluation.page import Example, render_page
from depth_anything.evaluation.sets import describe_set, find_frames, max_depth_of, read_frames
from depth_anything.evaluation.table import best_result, format_table


def compare(
    predictors: Mapping[str, Predicts],
    shard_set: ShardSet,
    folder: str | Path,
    *,
    limit: int | None = None,
    protocol: str | Protocol = "da2",
    models: Mapping[str, dict[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    watch: Callable[[Iterable[Frame], str], Iterable[Frame]] = lambda frames, name: frames,
) -> list[Result]:
    """Judge every predictor on a labelled set and write the report.

    Args:
        predictors: name → predictor, in the order of the table.
        shard_set: a labelled set with depth; its meta may hold `max_depth`.
        folder: where the report goes; made if need be.
        limit: so many frames, evenly spaced over the set.
        protocol: a name in `PROTOCOLS` or rules; the set's `max_depth` holds in either case.
        models: name → facts about the model for the report.
        settings: what else the report should say about how it was made.
        watch: wraps each pass over the frames, given the model's name; for progress bars.
    """
    results = []
    for name, predictor in predictors.items():
        frames = watch(read_frames(shard_set, limit=limit), name)
        results.append(
            evaluate(
                predictor,
                frames,
                name=name,
                protocol=protocol,
                max_depth=max_depth_of(shard_set),
                model=(models or {}).get(name),
            )
        )
    why = choose_examples(results)
    examples = collect_examples(
        predictors, find_frames(shard_set, why), why=why, protocol=results[0].protocol
    )
    data = {**describe_set(shard_set), "limit": limit}
    write_report(results, folder, examples=examples, data=data, settings=settings)
    return results


def choose_examples(results: Sequence[Result], *, first: int = 4) -> dict[str, str]:
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
    predictors: Mapping[str, Predicts],
    frames: Iterable[Frame],
    *,
    why: Mapping[str, str],
    protocol: Protocol,
) -> list[Example]:
    """Predict the frames whose key is in `why` again, and keep what the page shows, in the order of `why`."""
    examples = {}
    for frame in frames:
        if frame.key not in why or frame.depth is None:
            continue
        maps = {}
        for name, predictor in predictors.items():
            prediction = predictor.predict_batch([frame.image])[0]
            maps[name] = judge(prediction, frame, quantity=predictor.quantity, protocol=protocol)[0]
        compared = (frame.depth >= protocol.min_depth) & (frame.depth <= protocol.max_depth)
        truth = np.where(compared, frame.depth, np.float32(np.nan))
        examples[frame.key] = Example(frame.key, why[frame.key], frame.image, truth, maps)
    return [examples[key] for key in why if key in examples]


def write_report(
    results: Sequence[Result],
    folder: str | Path,
    *,
    examples: Sequence[Example] = (),
    data: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
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
    facts = {
        "date": date or datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "data": dict(data or {}),
        "settings": dict(settings or {}),
        "versions": versions(),
    }
    (folder / "results.json").write_text(_json(results, facts), encoding="utf-8")
    _write_csv(results, folder / "results.csv")
    (folder / "table.txt").write_text(format_table(results) + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render_page(results, examples, facts, title), encoding="utf-8")
    return page


def versions() -> dict[str, str]:
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


def _check_comparable(results: Sequence[Result]) -> None:
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


def _json(results: Sequence[Result], facts: Mapping[str, Any]) -> str:
    protocol = results[0].protocol
    document = {
        "version": 1,
        **facts,
        "protocol": {**asdict(protocol), "text": protocol.text},
        "models": [
            {
                "name": result.name,
                "facts": result.model,
                "images": result.images,
                "empty": result.empty,
                "broken": result.broken,
                "means": result.means,
                "rows": list(result.rows),
            }
            for result in results
        ],
    }
    return json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(results: Sequence[Result], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = list(results[0].rows[0])
        writer.writerow(["model", *columns])
        for result in results:
            writer.writerows([result.name, *(row[column] for column in columns)] for row in result.rows)
