"""`depth-anything predict`, and run.py with the authors' flags: predict depth maps of images."""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from depth_anything.cli.options import (
    MAX_BATCH,
    add_command,
    add_focal_flags,
    add_inference_flags,
    add_multi_scale_flag,
    add_output_flags,
    add_tiles_flag,
    add_weight_flags,
    build_segmentation_predictor,
    describe_values,
    format_count,
    int_in_range,
    load_predictor,
    load_segmentation_weights,
)
from depth_anything.data.address import escape_unprintable
from depth_anything.errors import UserError
from depth_anything.progress import track

DEFAULT_OUTPUT = "./vis_depth"
"""Default output folder, as in the authors' run.py."""


def add_predict(commands: Any) -> None:
    """Declare `predict`."""
    predict = add_command(
        commands, "predict", "predict depth maps of images: pictures, and files of values", run=_predict
    )
    predict.add_argument(
        "source",
        nargs="*",
        metavar="IMAGE|FOLDER",
        help="one or several images, or folders (their tree is kept), .txt lists or tars of images",
    )
    _add_predict_flags(predict, formats=("png16",))
    predict.set_defaults(output_flag="--output")


def run_images(arguments: Sequence[str] | None = None) -> int:
    """Run `run.py`: `depth-anything predict`, which by default writes only the picture, as the authors' run.py.

    Args:
        arguments: Command-line arguments; None: those of the process.
    """
    from depth_anything.cli import run

    parser = argparse.ArgumentParser(
        prog="run.py", description="Predict depth maps of images; see depth-anything predict --help."
    )
    _add_predict_flags(parser, formats=())
    parser.set_defaults(run=_predict, source=[], output_flag="--outdir")
    return run(parser, arguments)


class _OutputFolderAction(argparse.Action):
    """Stores the folder, and in `output_flag` the spelling of the flag that was typed, for errors."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.outdir, namespace.output_flag = values, option_string


def _add_predict_flags(command: argparse.ArgumentParser, *, formats: tuple[str, ...]) -> None:
    command.add_argument(
        "--img-path",
        nargs="+",
        metavar="PATH",
        help="the images, as in the authors' run.py: images, folders, lists or tars",
    )
    command.add_argument(
        "--outdir",
        "--output",
        action=_OutputFolderAction,
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help="output folder (%(default)s)",
    )
    add_weight_flags(command)
    add_output_flags(command, formats=formats)
    command.add_argument(
        "--save-numpy",
        action="store_true",
        help="also write meters to NAME_raw_depth_meter.npy, as the authors' metric run.py",
    )
    add_focal_flags(command, default="from EXIF, else assumed", points=True)
    command.add_argument(
        "--max-points",
        type=int_in_range("--max-points", least=1),
        default=1_000_000,
        metavar="N",
        help="maximum number of points per file (%(default)s)",
    )
    command.add_argument(
        "--batch-size",
        type=int_in_range("--batch-size", least=1, most=MAX_BATCH),
        default=1,
        metavar="N",
        help="images per forward pass (%(default)s)",
    )
    add_inference_flags(command)
    add_tiles_flag(command)
    add_multi_scale_flag(command)


def _predict(options: argparse.Namespace) -> int:
    from depth_anything.data.local_copy import local_path
    from depth_anything.inference.files import PredictSettings, predict_files
    from depth_anything.inference.focal import ASSUMED_SOURCE, DEFAULT_FOV_DEG
    from depth_anything.model.segmentation_files import is_segmentation_file

    if bool(options.source) == bool(options.img_path):
        raise UserError(
            "images must be given either as arguments or with --img-path",
            "type for example --img-path PHOTOS",
        )
    sources = options.source or options.img_path
    if not any(Path(source).exists() for source in sources):  # checked before a model is read or downloaded
        raise UserError(f"{sources[0]} does not exist", "give an image, or a folder, list or tar of images")
    writer_class = None
    if options.weights and is_segmentation_file(local_path(options.weights)):
        predictor, model_info, writer_class = _load_segmentation(options)
    elif options.multi_scale:
        raise UserError(
            "--multi-scale is for segmentation models", "leave it out, or give one with --weights"
        )
    else:
        predictor, model_info = load_predictor(options)
    settings = PredictSettings(
        formats=tuple(dict.fromkeys(options.format)),
        pred_only=options.pred_only,
        grayscale=options.grayscale,
        colormap=options.colormap,
        focal_px=options.focal,
        fov_deg=options.fov,
        max_points=options.max_points,
        save_numpy=options.save_numpy,
    )
    begin = time.monotonic()
    result = predict_files(
        predictor,
        sources,
        options.outdir,
        settings=settings,
        batch_size=options.batch_size,
        model_info=model_info,
        progress=partial(track, what="predict"),
        fix=f"give another {options.output_flag}",
        writer_class=writer_class,
    )
    seconds = time.monotonic() - begin
    for file, why in result.skipped.items():
        print(f"skipped {escape_unprintable(file)}: {escape_unprintable(why)}", file=sys.stderr)
    for file, notes in result.notes.items():
        print(f"{escape_unprintable(file)}: {'; '.join(notes)}", file=sys.stderr)
    for source, images in result.focal_sources.items():
        count = format_count(images, "image")
        print(f"focal length ({count}, pixels in each .json; set it with --focal): {source}")
    assumed = sum(
        count for source, count in result.focal_sources.items() if source.startswith(ASSUMED_SOURCE)
    )
    if assumed and predictor.canonical_focal is not None:
        print(
            f"{format_count(assumed, 'image')} without a focal length in EXIF: {DEFAULT_FOV_DEG:.0f} degrees along the "
            "longer side are assumed, and the meters are proportional to the focal length; give --focal PIXELS or "
            "--fov DEGREES",
            file=sys.stderr,
        )
    print(
        f"{format_count(result.images, 'image')} predicted, {format_count(len(result.skipped), 'file')} skipped in "
        f"{seconds:.1f} s ({result.images / seconds:.2f} per second): {escape_unprintable(options.outdir)} "
        f"({describe_values(predictor)})"
    )
    return 1 if result.failed else 0


def _load_segmentation(options: argparse.Namespace) -> tuple[Any, dict[str, Any], Any]:
    """Load the predictor of a segmentation model, describe its model, and choose the writer of class maps."""
    from depth_anything.inference.class_files import ClassWriter

    flags = {"--focal": options.focal, "--max-depth": options.max_depth, "--colormap": options.colormap}
    typed = next(
        (flag for flag, value in flags.items() if value is not None),
        "--grayscale" if options.grayscale else "",
    )
    if typed:
        raise UserError(f"{typed} is for depth, and this model predicts classes", f"leave {typed} out")
    model, facts = load_segmentation_weights(options.weights)
    predictor = build_segmentation_predictor(model, options, multi_scale=options.multi_scale)
    return predictor, facts, ClassWriter
