"""`depth-anything predict`: images to maps."""

import argparse
import sys
from pathlib import Path
from typing import Any

from depth_anything.cli.options import WEIGHTS, add_command, add_network, load, watch


def add_predict(commands: Any) -> None:
    """Declare `predict`."""
    predict = add_command(
        commands, "predict", "map images: a 16-bit PNG and a coloured picture each", run=_predict
    )
    predict.add_argument(
        "source", metavar="IMAGE|FOLDER", help="an image, or a folder (its tree is kept), list or tar of them"
    )
    predict.add_argument("--weights", required=True, metavar="PATH", help=WEIGHTS)
    predict.add_argument("--output", required=True, metavar="DIR", help="folder of the maps")
    add_network(predict)


def _predict(options: argparse.Namespace) -> None:
    from depth_anything.inference.files import predict_files
    from depth_anything.inference.predictor import Predictor

    model, _ = load(Path(options.weights), input_size=options.input_size)
    predictor = Predictor(model, device=options.device, input_size=model.input_size)
    outcome = predict_files(
        predictor,
        options.source,
        options.output,
        watch=lambda files: watch(files, what="predict", total=len(files)),
    )
    for file, why in outcome.skipped.items():
        print(f"skipped {file}: {why}", file=sys.stderr)
    larger = "nearer" if predictor.quantity == "disparity" else "farther"
    print(
        f"{len(outcome.written) // 2} images mapped, {len(outcome.skipped)} files skipped: {options.output} "
        f"({predictor.quantity}, {predictor.unit}, larger is {larger})"
    )
