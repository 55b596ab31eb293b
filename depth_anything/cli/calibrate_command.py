"""`depth-anything calibrate`: turn a relative model and a few known depths into a metric model."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import (
    add_command,
    add_inference_flags,
    add_weight_flags,
    check_output,
    float_in_range,
    list_weight_files,
    load_predictor,
)
from depth_anything.data.address import escape_unprintable
from depth_anything.errors import UserError
from depth_anything.progress import track

if TYPE_CHECKING:
    import numpy as np

    from depth_anything.inference.calibrate import CalibrationFit, KnownPoint
    from depth_anything.inference.predictor import Predictor


def add_calibrate(commands: Any) -> None:
    """Declare `calibrate`."""
    calibrate = add_command(
        commands, "calibrate", "calibrate a relative model to meters with a few known depths", run=_calibrate
    )
    calibrate.add_argument(
        "images", nargs="+", metavar="IMAGE", help="one or several images of one camera and one kind of scene"
    )
    calibrate.add_argument(
        "--points",
        nargs="+",
        default=(),
        metavar="CSV",
        help="a file per image with x,y,metres on each line, pixels from the upper left",
    )
    calibrate.add_argument(
        "--point",
        action="append",
        default=[],
        metavar="X,Y,METRES",
        help="a point of a single image; may be repeated",
    )
    calibrate.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="the calibrated model, .safetensors; it predicts meters",
    )
    calibrate.add_argument(
        "--threshold",
        type=float_in_range("--threshold", most=10),
        default=0.1,
        metavar="T",
        help="points that are off by more than this share of their depth are outliers (%(default)s)",
    )
    add_weight_flags(calibrate)
    add_inference_flags(calibrate)


def _calibrate(options: argparse.Namespace) -> None:
    import numpy as np

    from depth_anything import save_model
    from depth_anything.inference.calibrate import fit_points

    if Path(options.output).suffix != ".safetensors":
        raise ValueError(
            f"--output {options.output} must end in .safetensors, the format that stores the calibration"
        )
    check_output(
        [options.output],
        own=_is_calibrated,
        inputs=[*list_weight_files(options.weights), *options.images, *options.points],
    )
    known = _read_known_points(options)
    predictor, model_info = load_predictor(options)
    if predictor.model.quantity == "depth":
        raise UserError(f"{model_info['weights']} predicts meters already", "calibrate a relative model")
    values = _predict_at_points(predictor, known)
    meters = np.array([point.meters for points in known.values() for point in points])
    fit = fit_points(np.concatenate(list(values.values())), meters, threshold=options.threshold)
    _print_fit(fit, known, values, options.threshold)
    predictor.model.calibration = (fit.scale, fit.shift)
    save_model(predictor.model, options.output)
    print(f"{escape_unprintable(options.output)}: predicts meters for this camera and this kind of scene")


def _is_calibrated(path: Path) -> bool:
    """Tell whether this command may have written a model: it has a calibration."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("calibration", "null") != "null"
    except (OSError, SafetensorError):
        return False


def _read_known_points(options: argparse.Namespace) -> "dict[str, list[KnownPoint]]":
    """Read the known points of each image."""
    from depth_anything.inference.calibrate import parse_point, read_points

    images = list(dict.fromkeys(options.images))
    if options.point and (options.points or len(images) > 1):
        raise UserError(
            "--point is for a single image without --points", "give a CSV per image with --points"
        )
    if options.point:
        return {images[0]: [parse_point(text) for text in options.point]}
    if len(options.points) != len(images):
        raise UserError(
            f"{len(images)} images need {len(images)} files of points in the same order, not {len(options.points)}",
            "give --points a.csv b.csv, or for a single image --point 320,240,2.5",
        )
    return {image: read_points(path) for image, path in zip(images, options.points, strict=True)}


def _predict_at_points(
    predictor: "Predictor", known: "Mapping[str, list[KnownPoint]]"
) -> "dict[str, np.ndarray]":
    """Predict the disparity at the points of each image; an existing calibration is ignored."""
    from depth_anything.data.sample import decode_image
    from depth_anything.inference.calibrate import sample_at_points

    values = {}
    for image, points in track(known.items(), what="calibrate"):
        try:
            pixels = decode_image(Path(image).read_bytes())
        except ValueError as error:
            raise ValueError(f"{image}: {error}") from error
        values[image] = sample_at_points(predictor.predict_uncalibrated(pixels), points, image=image)
    return values


def _print_fit(
    fit: "CalibrationFit",
    known: "Mapping[str, list[KnownPoint]]",
    values: "Mapping[str, np.ndarray]",
    threshold: float,
) -> None:
    from depth_anything.inference.calibrate import fit_points

    rows = [
        (escape_unprintable(Path(image).name), point) for image, points in known.items() for point in points
    ]
    width = max(len(name) for name, _ in rows)
    print(f"{'image':{width}}       x       y    known    model      off")
    for (name, point), depth, used in zip(rows, fit.depth, fit.used, strict=True):
        off = f"{depth / point.meters - 1:+8.1%}" + ("" if used else "  left out")
        print(f"{name:{width}} {point.x:7.0f} {point.y:7.0f} {point.meters:6.2f} m {depth:6.2f} m {off}")
    left_out = len(rows) - int(fit.used.sum())
    print(f"depth = 1 / ({fit.scale:.6g} * disparity + {fit.shift:.6g}) meters")
    print(
        f"{int(fit.used.sum())} of {len(rows)} points used, {left_out} left out (off by more than {threshold:.0%}); "
        f"points used: AbsRel {fit.abs_rel:.4f}, RMSE {fit.rmse_m:.3f} m"
    )
    if fit.used.sum() == 2:
        print("two points are always fitted exactly, so their error means nothing: give more points")
    if len(known) > 1:
        for image, points in known.items():
            try:
                alone = fit_points(values[image], [point.meters for point in points], threshold=threshold)
                print(f"{escape_unprintable(image)} alone: scale {alone.scale:.6g}, shift {alone.shift:.6g}")
            except ValueError as error:
                print(f"{escape_unprintable(image)} alone: {escape_unprintable(error)}")
