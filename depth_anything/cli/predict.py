"""`depth-anything predict`, and run.py, which is the same: images to maps."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depth_anything.cli.options import (
    add_command,
    add_network,
    add_output_flags,
    add_tiles,
    add_weights,
    counted,
    describe_values,
    load_predictor,
    watch,
)

FOLDER = "./vis_depth"
"""Where pictures go unless told; theirs."""


def add_predict(commands: Any) -> None:
    """Declare `predict`."""
    predict = add_command(commands, "predict", "map images: a picture, and files of values", run=_predict)
    predict.add_argument(
        "source",
        nargs="?",
        metavar="IMAGE|FOLDER",
        help="an image, or a folder (its tree is kept), .txt list or tar of them",
    )
    _add_images(predict, formats=("png16",))


def run_images(arguments: Sequence[str] | None = None) -> int:
    """Run `run.py`: `depth-anything predict`, but that it writes what theirs writes, the picture alone.

    Args:
        arguments: what follows the program's name; those of the process by default.
    """
    from depth_anything.cli import run

    parser = argparse.ArgumentParser(
        prog="run.py", description="Map images; see depth-anything predict --help."
    )
    _add_images(parser, formats=())
    parser.set_defaults(run=_predict, source=None)
    return run(parser, arguments)


def _add_images(command: argparse.ArgumentParser, *, formats: tuple[str, ...]) -> None:
    command.add_argument(
        "--img-path", metavar="PATH", help="the images, as theirs: image, folder, list or tar"
    )
    command.add_argument(
        "--outdir", "--output", default=FOLDER, metavar="DIR", help="folder of the maps (%(default)s)"
    )
    add_weights(command)
    add_output_flags(command, formats=formats)
    command.add_argument(
        "--save-numpy", action="store_true", help="metres as NAME_raw_depth_meter.npy, as their metric run.py"
    )
    command.add_argument(
        "--focal",
        type=float,
        metavar="PX",
        help="focal length for points (of EXIF, else assumed)",
    )
    command.add_argument(
        "--max-points", type=int, default=1_000_000, metavar="N", help="in a file of points (%(default)s)"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="images at once through the network (%(default)s)",
    )
    add_network(command)
    add_tiles(command)


def _predict(options: argparse.Namespace) -> None:
    from depth_anything.inference.files import Products, predict_files

    given = [source for source in (options.source, options.img_path) if source]
    if len(given) != 1:
        raise ValueError("give the images once: as in --img-path PHOTOS")
    if not Path(given[0]).exists():  # before a large model is read, or fetched
        raise ValueError(f"{given[0]} does not exist: give an image, or a folder, list or tar of them")
    predictor, facts = load_predictor(options)
    products = Products(
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
        given[0],
        options.outdir,
        products=products,
        batch_size=options.batch_size,
        facts=facts,
        watch=lambda files: watch(files, what="predict", total=len(files)),
    )
    seconds = time.monotonic() - begin
    for file, why in outcome.skipped.items():
        print(f"skipped {file}: {why}", file=sys.stderr)
    for whence, images in outcome.focals.items():
        print(f"focal length ({counted(images, 'image')}, pixels in each .json): {whence}")
    print(
        f"{counted(outcome.images, 'image')} mapped, {counted(len(outcome.skipped), 'file')} skipped in "
        f"{seconds:.1f} s ({outcome.images / seconds:.2f} a second): {options.outdir} ({describe_values(predictor)})"
    )
