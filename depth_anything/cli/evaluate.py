"""`depth-anything evaluate`: models judged on a labelled set."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depth_anything.cli.options import WEIGHTS, add_command, add_network, load, make_predictor, watch

MEAN_MAP_FRAMES = 1000
"""How many frames of the training set the mean map is made of, at most."""


def add_evaluate(commands: Any) -> None:
    """Declare `evaluate`."""
    evaluate = add_command(
        commands, "evaluate", "judge models on a labelled set; write a report", run=_evaluate
    )
    evaluate.add_argument(
        "--weights",
        required=True,
        nargs="+",
        action="extend",
        metavar="[NAME=]PATH",
        help=f"models: {WEIGHTS}",
    )
    evaluate.add_argument("--data", required=True, metavar="SET", help="labelled set with depth")
    evaluate.add_argument(
        "--mean-map",
        metavar="SET",
        help="also judge the mean map of this training set, which looks at no image",
    )
    evaluate.add_argument("--output", metavar="DIR", help="folder of the report (outputs/evaluate-<set>)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="so many images, evenly spaced (all)")
    add_network(evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from depth_anything.data.shards import open_set
    from depth_anything.evaluation.report import compare
    from depth_anything.evaluation.sets import mean_map, read_frames
    from depth_anything.evaluation.table import format_table

    named = names_of(options.weights)
    shard_set = open_set(options.data)
    predictors: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    if options.mean_map:
        frames = read_frames(options.mean_map, limit=MEAN_MAP_FRAMES)
        predictors["mean map"] = mean_map(watch(frames, what="mean map"))
        facts["mean map"] = {"baseline": f"mean disparity of {options.mean_map}, the same for every image"}
    for name, path in named.items():
        model, facts[name] = load(path, input_size=options.input_size)
        predictors[name] = make_predictor(model, options)
        facts[name]["device"] = str(predictors[name].device)
    total = min(options.limit or shard_set.records, shard_set.records)
    folder = Path(options.output or f"outputs/evaluate-{shard_set.name}")
    results = compare(
        predictors,
        shard_set,
        folder,
        limit=options.limit,
        models=facts,
        settings={"command": options.typed},
        watch=lambda frames, name: watch(frames, what=name, total=total),
    )
    print(format_table(results))
    print(f"report: {folder / 'report.html'}")


def names_of(weights: Sequence[str]) -> dict[str, Path]:
    """Split [NAME=]PATH; a model without a name is called after its file, or its run."""
    named: dict[str, Path] = {}
    for text in weights:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():  # checkpoints may be called step=100.ckpt
            path = text
            file = Path(text).resolve()
            name = (
                file.parent.name
                if file.name == "model.safetensors"
                else file.stem
                if file.is_file()
                else file.name
            )
        if name in named:
            raise ValueError(
                f"two models are called {name!r}: name them, as in --weights a={named[name]} b={path}"
            )
        named[name] = Path(path)
    return named
