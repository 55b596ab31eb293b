"""`depth-anything calibrate`: turn a model and a few known depths into one that predicts meters of that camera."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import (
    add_command,
    add_focal_flags,
    add_inference_flags,
    add_weight_flags,
    check_output,
    float_in_range,
    format_count,
    int_in_range,
    list_weight_files,
    load_predictor,
)
from depth_anything.data.address import escape_unprintable
from depth_anything.errors import UserError
from depth_anything.progress import track

if TYPE_CHECKING:
    import numpy as np

    from depth_anything.inference.calibrate import CalibrationFit, KnownPoint, ScaleFit
    from depth_anything.inference.predictor import Predictor


@dataclass(frozen=True)
class _KnownImage:
    """Predicted values and known depths of an image.

    Attributes:
        name: File or record.
        values: float64 (N,), predicted disparity or depth at the points.
        meters: float64 (N,), known depth.
        points: Where they are, if they were typed or read from a CSV file; () for a depth map.
    """

    name: str
    values: "np.ndarray"
    meters: "np.ndarray"
    points: "Sequence[KnownPoint]" = ()


def add_calibrate(commands: Any) -> None:
    """Declare `calibrate`."""
    calibrate = add_command(
        commands,
        "calibrate",
        "calibrate a model with a few known depths: a relative one to meters, a metric one by a scale",
        run=_calibrate,
    )
    calibrate.add_argument(
        "images", nargs="*", metavar="IMAGE", help="one or several images of one camera and one kind of scene"
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
        "--data", metavar="SET", help="in place of images and points: a labeled set with depth in meters"
    )
    calibrate.add_argument(
        "--limit",
        type=int_in_range("--limit", least=1),
        default=5,
        metavar="N",
        help="number of images of --data, evenly spaced (%(default)s)",
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
        help="points of a relative model that are off by more than this share of their depth are outliers (0.1)",
    )
    add_weight_flags(calibrate)
    add_focal_flags(calibrate, default="from the record or EXIF, else assumed")
    add_inference_flags(calibrate)


def _calibrate(options: argparse.Namespace) -> None:
    from depth_anything import save_model

    if Path(options.output).suffix != ".safetensors":
        raise ValueError(
            f"--output {options.output} must end in .safetensors, the format that stores the calibration"
        )
    if bool(options.images) == bool(options.data):
        raise UserError(
            "known depths are needed, of images or of a labeled set",
            "give images with --points CSV, or --data SET",
        )
    check_output(
        [options.output],
        own=_is_calibrated,
        inputs=[*list_weight_files(options.weights), *options.images, *options.points],
    )
    known = None if options.data else _read_known_points(options)
    predictor, _ = load_predictor(options)
    if known is None:
        images = _predict_set(predictor, options.data, options.limit)
    else:
        images = _predict_at_points(predictor, known, options)
    if predictor.model.quantity == "depth":
        _scale_model(predictor, images)
    else:
        _fit_disparity(predictor, images, options.threshold)
    save_model(predictor.model, options.output)
    print(f"{escape_unprintable(options.output)}: predicts meters for this camera and this kind of scene")


def _scale_model(predictor: "Predictor", images: Sequence[_KnownImage]) -> None:
    """Multiply a metric model's depth by the median of known / predicted: its largest depth becomes scale · itself."""
    from depth_anything.inference.calibrate import fit_scale
    from depth_anything.model.metadata import MAX_DEPTH_RANGE_M

    fit = fit_scale([image.values for image in images], [image.meters for image in images])
    _print_scale(fit, images)
    model = predictor.model
    assert model.max_depth is not None
    max_depth = model.max_depth * fit.scale
    if not MAX_DEPTH_RANGE_M[0] <= max_depth <= MAX_DEPTH_RANGE_M[1]:
        raise UserError(
            f"the scale {fit.scale:.3g} would make {max_depth:.3g} m the model's largest depth",
            "check that the known depths are in meters",
        )
    earlier = model.origin.get("calibrated")
    earlier = earlier.get("scale", 1.0) if isinstance(earlier, dict) else 1.0
    scale = fit.scale * (earlier if isinstance(earlier, int | float) else 1.0)
    model.max_depth = max_depth
    model.origin = {
        **model.origin,
        "calibrated": {"scale": scale, "images": len(images), "points": len(fit.meters)},
    }


def _fit_disparity(predictor: "Predictor", images: Sequence[_KnownImage], threshold: float) -> None:
    """Fit scale and shift of a relative model's disparity."""
    import numpy as np

    from depth_anything.inference.calibrate import fit_points

    meters = np.concatenate([image.meters for image in images])
    fit = fit_points(np.concatenate([image.values for image in images]), meters, threshold=threshold)
    _print_fit(fit, images, threshold)
    predictor.model.calibration = (fit.scale, fit.shift)


def _is_calibrated(path: Path) -> bool:
    """Tell whether this command may have written a model: it has a calibration."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return metadata.get("calibration", "null") != "null" or "calibrated" in json.loads(
            metadata.get("origin", "{}")
        )
    except (OSError, SafetensorError, ValueError, TypeError):
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
    predictor: "Predictor", known: "dict[str, list[KnownPoint]]", options: argparse.Namespace
) -> list[_KnownImage]:
    """Predict at the points of each image; an existing calibration of disparity is ignored."""
    import numpy as np

    from depth_anything.data.sample import decode_image
    from depth_anything.inference.calibrate import sample_at_points
    from depth_anything.inference.focal import ASSUMED_SOURCE, choose_focal_length

    images = []
    for image, points in track(known.items(), what="calibrate"):
        data = Path(image).read_bytes()
        try:
            pixels = decode_image(data)
        except ValueError as error:
            raise ValueError(f"{image}: {error}") from error
        focal = choose_focal_length(data, pixels.shape, focal_px=options.focal, fov_deg=options.fov)
        assumed = focal.source.startswith(ASSUMED_SOURCE)  # the predictor assumes the same, and warns
        map_ = _predict(predictor, pixels, None if assumed else focal.pixels)
        values = sample_at_points(map_, points, image=image)
        images.append(_KnownImage(image, values, np.array([point.meters for point in points]), points))
    return images


def _predict_set(predictor: "Predictor", root: str, limit: int) -> list[_KnownImage]:
    """Predict evenly spaced images of a labeled set, and sample pixels with known depth.

    Raises:
        UserError: The set is not in meters, or no pixel has a known depth.
    """
    import cv2

    from depth_anything.data.intrinsics import focal_from_meta
    from depth_anything.data.shards import open_set
    from depth_anything.evaluation.frames import read_frames
    from depth_anything.inference.calibrate import sample_known_pixels

    opened = open_set(root)
    quantity, unit = opened.meta.get("quantity"), opened.meta.get("unit")
    if (quantity, unit) != ("depth", "m"):
        raise UserError(
            f"the set {opened.name} has quantity={quantity} and unit={unit}, not depth in m",
            "give a set in meters",
        )
    images = []
    for frame in track(read_frames(opened, limit=limit), what="calibrate"):
        if frame.depth is None:
            continue
        map_ = _predict(predictor, frame.image, focal_from_meta(frame.meta, frame.image.shape))
        if map_.shape != frame.depth.shape:  # as `evaluate` does
            map_ = cv2.resize(map_, frame.depth.shape[::-1], interpolation=cv2.INTER_LINEAR)
        chosen = sample_known_pixels(frame.depth)
        if len(chosen):
            values = map_.reshape(-1)[chosen].astype("float64")
            images.append(_KnownImage(frame.key, values, frame.depth.reshape(-1)[chosen].astype("float64")))
    if not images:
        raise UserError(f"no pixel of {root} has a known depth", "give a labeled set")
    return images


def _predict(predictor: "Predictor", pixels: "np.ndarray", focal: float | None) -> "np.ndarray":
    if predictor.model.quantity == "depth":
        return predictor.predict(pixels, focal=focal)
    return predictor.predict_uncalibrated(pixels)


def _print_scale(fit: "ScaleFit", images: Sequence[_KnownImage]) -> None:
    import numpy as np

    before = float(np.mean(np.abs(fit.depth / fit.scale - fit.meters) / fit.meters))
    width = max(len(escape_unprintable(Path(image.name).name)) for image in images)
    for image, alone in zip(images, fit.image_scales, strict=True):
        name = escape_unprintable(Path(image.name).name)
        print(f"{name:{width}} {format_count(len(image.meters), 'point')}, alone: scale {alone:.6g}")
    print(
        f"depth = {fit.scale:.6g} * depth of the model (median of known / predicted, equal weight per image)"
    )
    print(
        f"{format_count(len(fit.meters), 'point')} of {format_count(len(images), 'image')}: AbsRel {before:.4f} "
        f"before, {fit.abs_rel:.4f} after"
    )
    if fit.abs_rel > before:
        low, high = np.min(fit.image_scales), np.max(fit.image_scales)
        print(
            f"the images do not agree on a scale ({low:.3g} to {high:.3g} alone), so AbsRel grows: one number cannot "
            "correct this model"
        )
    if len(fit.meters) == 1:
        print("a single point is always fitted exactly, so its error means nothing: give more points")


def _print_fit(fit: "CalibrationFit", images: Sequence[_KnownImage], threshold: float) -> None:
    from depth_anything.inference.calibrate import fit_points

    rows = [(escape_unprintable(Path(image.name).name), point) for image in images for point in image.points]
    width = max((len(name) for name, _ in rows), default=0)
    if rows:
        print(f"{'image':{width}}       x       y    known    model      off")
        for (name, point), depth, used in zip(rows, fit.depth, fit.used, strict=True):
            off = f"{depth / point.meters - 1:+8.1%}" + ("" if used else "  left out")
            print(f"{name:{width}} {point.x:7.0f} {point.y:7.0f} {point.meters:6.2f} m {depth:6.2f} m {off}")
    count = len(fit.meters)
    left_out = count - int(fit.used.sum())
    print(f"depth = 1 / ({fit.scale:.6g} * disparity + {fit.shift:.6g}) meters")
    print(
        f"{int(fit.used.sum())} of {count} points used, {left_out} left out (off by more than {threshold:.0%}); "
        f"points used: AbsRel {fit.abs_rel:.4f}, RMSE {fit.rmse_m:.3f} m"
    )
    if fit.used.sum() == 2:
        print("two points are always fitted exactly, so their error means nothing: give more points")
    if len(images) > 1:
        for image in images:
            try:
                alone = fit_points(image.values, image.meters, threshold=threshold)
                print(
                    f"{escape_unprintable(image.name)} alone: scale {alone.scale:.6g}, shift {alone.shift:.6g}"
                )
            except ValueError as error:
                print(f"{escape_unprintable(image.name)} alone: {escape_unprintable(error)}")
