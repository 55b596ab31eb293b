"""Options that several commands share, and loading the models that they name."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.data.address import with_addresses
from depth_anything.errors import UserError

if TYPE_CHECKING:
    from depth_anything import DepthAnything
    from depth_anything.inference.predictor import Predictor
    from depth_anything.inference.segmentation import SegmentationPredictor
    from depth_anything.model.segmentation import SegmentationModel

WEIGHTS_HELP = (
    ".safetensors, .pth, .ckpt, a finished run's or transformers folder, or the s3:// or gs:// address of one"
)

DEFAULT_ENCODER = "vitl"
"""Default encoder of the official weights, as in the official run.py."""

MAX_METERS = 1e6
MAX_WORKERS = 1024
MAX_BATCH = 65_536
MAX_SIDE_PX = 16_384
"""Limits of flags; larger values are typing mistakes that would exhaust any memory."""

FORMATS = ("png8", "png16", "npy", "npz", "exr", "controlnet", "ply", "glb")

ARGUMENT_FLAGS = {
    "encoder": "--encoder {}",
    "version": "--weights-version {}",
    "max_depth": "--max-depth {}",
    "input_size": "--input-size {}",
    "device": "--device {}",
    "precision": "--precision {}",
    "resample": "--resample {}",
    "to": "--to {}",
    "opset": "--opset {}",
    "focal": "--focal {}",
    "fov": "--fov {}",
}
"""Argument name to flag, for errors and warnings; see `depth_anything.errors.format_error`."""


class FlagError(Exception):
    """The value of a flag is out of range. It is not one of the errors that argparse replaces by its own text."""


def int_in_range(flag: str, *, least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a parser of a whole number, for `type=` of argparse.

    Args:
        flag: Name of the flag, for the error.
        least: Smallest allowed number.
        most: Largest allowed number.
    """

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise FlagError(
                f"{flag} must be a whole number, at least {least} and at most {most}, not {text!r}"
            )
        return number

    return read


def float_in_range(
    flag: str, *, least: float = 0.0, most: float, above: bool = True, unit: str = ""
) -> Callable[[str], float]:
    """Return a parser of a finite number, for `type=` of argparse.

    Args:
        flag: Name of the flag, for the error.
        least: Lower limit.
        most: Largest allowed number.
        above: Whether `least` itself is not allowed.
        unit: Unit of the number, for the error.
    """

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (least < number <= most or (number == least and not above)):
            span = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
            raise FlagError(f"{flag} must be {span}{f' {unit}' if unit else ''}, not {text!r}")
        return number

    return read


def add_command(commands: Any, name: str, text: str, *, run: Any = None) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its options; `text` is its help."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_weight_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags of a model: a file, or official weights by encoder and training set."""
    command.add_argument(
        "--weights",
        "--load-from",
        metavar="PATH",
        help=f"{WEIGHTS_HELP}; without it the official weights of --encoder, from checkpoints/ or the hub",
    )
    command.add_argument(
        "--encoder",
        metavar="NAME",
        help=f"vits, vitb, vitl or vitg, for official weights ({DEFAULT_ENCODER})",
    )
    command.add_argument(
        "--dataset",
        choices=("hypersim", "vkitti"),
        help="official weights that predict meters: hypersim indoors, vkitti outdoors",
    )
    command.add_argument(
        "--max-depth",
        type=float_in_range("--max-depth", most=MAX_METERS, unit="meters"),
        metavar="M",
        help="largest depth, meters, of a metric model whose file does not say it",
    )
    add_version_flag(command)
    command.set_defaults(flags=ARGUMENT_FLAGS)


def add_version_flag(command: argparse.ArgumentParser) -> None:
    """Add the flag for the version of Depth Anything."""
    command.add_argument(
        "--weights-version",
        type=int,
        choices=(1, 2),
        help="1 for weights of Depth Anything V1 whose file does not say it; of official weights the version (2)",
    )


def add_inference_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags for running a model."""
    command.add_argument(
        "--input-size",
        type=int_in_range("--input-size", least=1, most=MAX_SIDE_PX),
        metavar="N",
        help="shorter image side, pixels (the model's own)",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    command.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision of the network (%(default)s)",
    )
    command.add_argument(
        "--resample",
        choices=("official", "transformers"),
        default="official",
        help="preprocessing to reproduce exactly (%(default)s)",
    )


def add_focal_flags(command: argparse.ArgumentParser, *, default: str, points: bool = False) -> None:
    """Add the flags for the focal length of images, in pixels or as a field of view.

    Args:
        command: The parser.
        default: What is used without the flags, for the help.
        points: Whether the command also writes point clouds.
    """
    what = "for points, and for metric models with a canonical focal length" if points else ""
    what = what or "for metric models with a canonical focal length"
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--focal",
        type=float_in_range("--focal", most=1e7, unit="pixels"),
        metavar="PX",
        help=f"focal length in pixels of the images, {what} (default: {default})",
    )
    group.add_argument(
        "--fov",
        type=float_in_range("--fov", most=179, unit="degrees"),
        metavar="DEG",
        help="the same as a horizontal field of view, degrees",
    )


def add_multi_scale_flag(command: argparse.ArgumentParser) -> None:
    """Add the flag for averaging over scales."""
    command.add_argument(
        "--multi-scale",
        action="store_true",
        help="segmentation models: average scales 0.5 to 2 and mirrored images; evaluate adds this as a model",
    )


def add_tiles_flag(command: argparse.ArgumentParser) -> None:
    """Add the flag for tiling large images."""
    command.add_argument(
        "--tiles",
        type=_parse_tiles,
        metavar="N|RxC",
        help="overlapping tiles, rows x columns, each predicted at --input-size; for 4K and more",
    )


def add_picture_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags for color images of maps, as in the official run.py."""
    command.add_argument(
        "--pred-only", action="store_true", help="only the map, without the image next to it"
    )
    command.add_argument("--grayscale", action="store_true", help="the map in gray instead of colors")
    command.add_argument(
        "--colormap", metavar="NAME", help="matplotlib colormap (default: Spectral_r, near is red)"
    )


def add_output_flags(command: argparse.ArgumentParser, *, formats: tuple[str, ...]) -> None:
    """Add the flags for outputs: color images, and files with the values."""
    add_picture_flags(command)
    command.add_argument(
        "--format",
        nargs="*",
        choices=FORMATS,
        default=formats,
        help=f"also files of values, or of points in space ({' '.join(formats) or 'none'})",
    )


def check_output(
    outputs: Iterable[str | Path],
    *,
    own: Callable[[Path], bool],
    inputs: Iterable[str | Path] = (),
    flag: str = "--output",
) -> None:
    """Check that outputs replace neither an input nor a file that this command did not write.

    Args:
        outputs: Files that the command will write.
        own: Returns whether the command wrote a file.
        inputs: Files that it reads.
        flag: Flag that chooses another output.

    Raises:
        ValueError: Naming the file.
    """
    from depth_anything.inference.overwrite import check_overwrite

    read = [Path(path) for path in inputs]
    check_overwrite(
        [*map(Path, outputs)], is_own=own, inputs=lambda: read, fix=f"give another {flag}, or move it"
    )


def list_weight_files(weights: str | Path | None) -> list[Path]:
    """List the files of a model: the file, or those in the folder of a run or of transformers; none of an address."""
    if weights is None or "://" in str(weights):
        return []
    path = Path(weights)
    return [path, *path.glob("*.safetensors"), *path.glob("*.json")] if path.is_dir() else [path]


def load_weights(
    path: str | Path | None,
    *,
    input_size: int | None,
    encoder: str | None = None,
    dataset: str | None = None,
    max_depth: float | None = None,
    version: int | None = None,
) -> "tuple[DepthAnything, dict[str, Any]]":
    """Load a model, and describe it for reports.

    Args:
        path: A weight file or the folder of a run; None for official weights.
        input_size: Shorter image side, pixels; None for the model's own.
        encoder: Encoder of the official weights; with a path, the expected encoder.
        dataset: "hypersim" or "vkitti" for official weights that predict meters.
        max_depth: Meters, if the file does not say it.
        version: 1 or 2, of the official weights, or if the file does not say it.

    Raises:
        ValueError: If there are no such weights.
    """
    from depth_anything.data.local_copy import local_path
    from depth_anything.model.weights import fingerprint, load_model

    if path is None:
        from depth_anything.model.official_weights import find_official_weights

        path, encoder = (
            find_official_weights(encoder or DEFAULT_ENCODER, metric=dataset, version=version or 2),
            None,
        )
    path = _resolve_weight_file(local_path(path))
    model = load_model(path, encoder=encoder, max_depth=max_depth, version=version)
    model.input_size = input_size or model.input_size
    facts = {
        "weights": with_addresses(str(path)),
        "fingerprint": fingerprint(model),
        "encoder": model.encoder,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "quantity": model.quantity,
        "max_depth": model.max_depth,
        "input_size": model.input_size,
        "licence": model.licence,
    }
    if model.canonical_focal is not None:
        facts["canonical_focal"] = model.canonical_focal
    return model, facts


def load_segmentation_weights(path: str | Path) -> "tuple[SegmentationModel, dict[str, Any]]":
    """Load a segmentation model, and describe it for reports.

    Raises:
        ValueError: If there are no such weights.
    """
    from depth_anything.data.local_copy import local_path
    from depth_anything.model.segmentation_files import load_segmentation
    from depth_anything.model.weights import fingerprint

    path = _resolve_weight_file(local_path(path))
    model = load_segmentation(path)
    facts = {
        "weights": with_addresses(str(path)),
        "fingerprint": fingerprint(model),
        "encoder": model.encoder,
        "head": model.head,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "quantity": model.quantity,
        "classes": len(model.classes),
        "input_size": model.input_size,
        "licence": model.licence,
    }
    return model, facts


def build_segmentation_predictor(
    model: "SegmentationModel", options: argparse.Namespace, *, multi_scale: bool = False
) -> "SegmentationPredictor":
    """Build the predictor of a segmentation model from the flags of a command.

    Raises:
        UserError: If a flag is for depth models.
    """
    from depth_anything.inference.segmentation import MULTI_SCALES, SegmentationPredictor

    depth_only = {"--resample": options.resample != "official", "--tiles": getattr(options, "tiles", None)}
    for flag, typed in depth_only.items():
        if typed:
            raise UserError(f"{flag} is for depth models, and this one predicts classes", f"leave {flag} out")
    return SegmentationPredictor(
        model,
        device=options.device,
        input_size=options.input_size,
        scales=MULTI_SCALES if multi_scale else (1.0,),
        flip=multi_scale,
        precision=options.precision,
    )


def load_predictor(options: argparse.Namespace) -> "tuple[Predictor, dict[str, Any]]":
    """Load the predictor that the flags of a command choose, and describe its model for reports."""
    model, facts = load_weights(
        options.weights,
        input_size=options.input_size,
        encoder=options.encoder,
        dataset=options.dataset,
        max_depth=options.max_depth,
        version=options.weights_version,
    )
    return build_predictor(model, options), facts


def build_predictor(model: "DepthAnything", options: argparse.Namespace) -> "Predictor":
    """Build the predictor of a model from the flags of a command."""
    from depth_anything.inference.predictor import Predictor

    return Predictor(
        model,
        device=options.device,
        input_size=model.input_size,
        precision=options.precision,
        resample=options.resample,
        tiles=getattr(options, "tiles", None),
        focal=getattr(options, "focal", None),
        fov=getattr(options, "fov", None),
    )


def check_single_model(options: argparse.Namespace, count: int) -> None:
    """Check that flags which describe one model are not used with several.

    Args:
        options: Parsed arguments of a command that takes several models.
        count: Number of models.

    Raises:
        UserError: If there are several models, and a flag describes one.
    """
    values = {
        "encoder": options.encoder,
        "version": options.weights_version,
        "max_depth": options.weights_max_depth,
    }
    typed = [options.flags[name].format(value) for name, value in values.items() if value is not None]
    if count > 1 and typed:
        raise UserError(
            f"{' '.join(typed)} would describe {count} models",
            "leave it out, and write files that say it themselves: "
            "depth-anything export --to safetensors --weights PATH --output NEW.safetensors, with the flags of each",
        )


def describe_values(predictor: "Predictor") -> str:
    """Describe the values of a predictor: quantity, unit and direction, or the number of classes."""
    if predictor.quantity == "classes":
        return f"{len(predictor.classes)} classes"  # type: ignore[attr-defined]
    from depth_anything.inference.formats import DIRECTION

    return f"{predictor.quantity}, {predictor.unit}, larger is {DIRECTION[predictor.quantity]}"


def format_count(number: int, noun: str) -> str:
    """Format a number with a noun: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _resolve_weight_file(path: Path) -> Path:
    if (path / "model.safetensors").exists() and not (path / "config.json").exists():  # that is transformers'
        return path / "model.safetensors"
    if (path / "config.yaml").exists():
        raise UserError(
            f"the run {path} is not finished and has no model.safetensors yet",
            f"start it again to continue, or give one of the files in {path / 'checkpoints'}",
        )
    if not path.exists():
        from depth_anything.model.official_weights import official_license, official_page

        if official_page(path):
            raise FileNotFoundError(
                f"no weights at {path}: {path.name} (license {official_license(path)}) is at {official_page(path)}"
            )
        raise FileNotFoundError(
            f"no weights at {path}: give {WEIGHTS_HELP}; for official weights leave it out and give --encoder vits"
        )
    return path


def _parse_tiles(text: str) -> int | tuple[int, int]:
    rows, by, columns = text.lower().partition("x")
    try:
        numbers = (int(rows), int(columns)) if by else (int(rows),)
    except ValueError:
        numbers = (0,)
    if not all(1 <= number <= 64 for number in numbers):
        raise FlagError(f"--tiles must be 1 to 64 a side, as 3 or 2x3, not {text!r}")
    return (numbers[0], numbers[-1]) if by else numbers[0]
