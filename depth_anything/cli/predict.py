"""`depth-anything predict`, and run.py, which is the same: images to maps."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depth_anything.cli.options import (
    MAX_BATCH,
    add_command,
    add_inference_flags,
    add_output_flags,
    add_tiles_flag,
    add_weight_flags,
    describe_values,
    float_in_range,
    format_count,
    int_in_range,
    load_predictor,
)
from depth_anything.data.address import escape_unprintable
from depth_anything.progress import track

DEFAULT_OUTPUT = "./vis_depth"
"""Where pictures go unless told; theirs."""


def add_predict(commands: Any) -> None:
    """Declare `predict`."""
    predict = add_command(commands, "predict", "map images: a picture, and files of values", run=_predict)
    predict.add_argument(
        "source",
        nargs="*",
        metavar="IMAGE|FOLDER",
        help="images, or a folder (its tree is kept), .txt list or tar of them; several, too",
    )
    _add_predict_flags(predict, formats=("png16",))
    predict.set_defaults(output_flag="--output")


def run_images(arguments: Sequence[str] | None = None) -> int:
    """Run `run.py`: `depth-anything predict`, but that it writes what theirs writes, the picture alone.

    Args:
        arguments: what follows the program's name; those of the process by default.
    """
    from depth_anything.cli import run

    parser = argparse.ArgumentParser(
        prog="run.py", description="Map images; see depth-anything predict --help."
    )
    _add_predict_flags(parser, formats=())
    parser.set_defaults(run=_predict, source=[], output_flag="--outdir")
    return run(parser, arguments)


class _OutputFolderAction(argparse.Action):
    """Also keeps which name of the flag was typed, as `output_flag`: errors name that one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.outdir, namespace.output_flag = values, option_string


def _add_predict_flags(command: argparse.ArgumentParser, *, formats: tuple[str, ...]) -> None:
    command.add_argument(
        "--img-path", nargs="+", metavar="PATH", help="the images, as theirs: image, folder, list or tar"
    )
    command.add_argument(
        "--outdir",
        "--output",
        action=_OutputFolderAction,
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help="folder of the maps (%(default)s)",
    )
    add_weight_flags(command)
    add_output_flags(command, formats=formats)
    command.add_argument(
        "--save-numpy", action="store_true", help="metres as NAME_raw_depth_meter.npy, as their metric run.py"
    )
    command.add_argument(
        "--focal",
        type=float_in_range("--focal", most=1e7, unit="pixels"),
        metavar="PX",
        help="focal length for points (of EXIF, else assumed)",
    )
    command.add_argument(
        "--max-points",
        type=int_in_range("--max-points", least=1),
        default=1_000_000,
        metavar="N",
        help="in a file of points (%(default)s)",
    )
    command.add_argument(
        "--batch-size",
        type=int_in_range("--batch-size", least=1, most=MAX_BATCH),
        default=1,
        metavar="N",
        help="images at once through the network (%(default)s)",
    )
    add_inference_flags(command)
    add_tiles_flag(command)


def _predict(options: argparse.Namespace) -> int:
    from depth_anything.inference.files import PredictSettings, predict_files

    if bool(options.source) == bool(options.img_path):
        raise ValueError("give the images once: as in --img-path PHOTOS")
    given = options.source or options.img_path
    if not any(Path(source).exists() for source in given):  # before a large model is read, or fetched
        raise ValueError(f"{given[0]} does not exist: give an image, or a folder, list or tar of them")
    predictor, facts = load_predictor(options)
    settings = PredictSettings(
        formats=tuple(dict.fromkeys(options.format)),
        pred_only=options.pred_only,
        grayscale=options.grayscale,
        colormap=options.colormap,
        focal_px=options.focal,
        max_points=options.max_points,
        save_numpy=options.save_numpy,
    )
    begin = time.monotonic()
    outcome = predict_files(
        predictor,
        given,
        options.outdir,
        settings=settings,
        batch_size=options.batch_size,
        facts=facts,
        watch=lambda files: track(files, what="predict", total=len(files)),
        way_out=f"give another {options.output_flag}",
    )
    seconds = time.monotonic() - begin
    for file, why in outcome.skipped.items():
        print(f"skipped {escape_unprintable(file)}: {escape_unprintable(why)}", file=sys.stderr)
    for file, notes in outcome.notes.items():
        print(f"{escape_unprintable(file)}: {'; '.join(notes)}", file=sys.stderr)
    for whence, images in outcome.focals.items():
        print(f"focal length ({format_count(images, 'image')}, pixels in each .json): {whence}")
    print(
        f"{format_count(outcome.images, 'image')} mapped, {format_count(len(outcome.skipped), 'file')} skipped in "
        f"{seconds:.1f} s ({outcome.images / seconds:.2f} a second): {escape_unprintable(options.outdir)} "
        f"({describe_values(predictor)})"
    )
    return 1 if outcome.failed else 0
