"""What several commands need: their options, a model read, progress shown."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depth_anything import DepthAnything
    from depth_anything.inference.predictor import Predictor

WEIGHTS_HELP = ".safetensors, .pth, .ckpt, a finished run's folder, or a transformers folder"

DEFAULT_ENCODER = "vitl"
"""Whose published weights are taken where nothing else is said; theirs."""

MAX_METERS = 1e6
MAX_WORKERS = 1024
MAX_BATCH = 65_536
MAX_SIDE_PX = 16_384
"""Limits of flags: beyond them is a slip of the hand, which would fill any memory."""

FORMATS = ("png8", "png16", "npy", "npz", "exr", "ply", "glb")

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
}
"""What is typed for the arguments that errors and warnings name; see `depth_anything.errors.format_error`."""


class FlagError(Exception):
    """A flag's value is out of its range; the sentence names the flag. Not one of the errors that argparse rewords."""


def int_in_range(flag: str, *, least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return what reads a flag's whole number, for `type=` of argparse.

    Args:
        flag: Its name, for the error.
        least: The smallest number that it takes.
        most: The largest.
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
    """Return what reads a flag's number, for `type=` of argparse; NaN and infinity are none.

    Args:
        flag: Its name, for the error.
        least: The smallest number.
        most: The largest number, taken in.
        above: The number must be above `least`; else it may be `least`.
        unit: Of the number, for the error.
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
    """Declare a command that calls `run` with its options; `text` is its help."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_weight_flags(command: argparse.ArgumentParser) -> None:
    """Declare which model a command runs: a file, or published weights by the names of their encoder and data."""
    command.add_argument(
        "--weights",
        "--load-from",
        metavar="PATH",
        help=f"{WEIGHTS_HELP}; without it the published weights of --encoder, from checkpoints/ or the hub",
    )
    command.add_argument(
        "--encoder",
        metavar="NAME",
        help=f"vits, vitb, vitl or vitg, for published weights ({DEFAULT_ENCODER})",
    )
    command.add_argument(
        "--dataset",
        choices=("hypersim", "vkitti"),
        help="published weights that give metres: hypersim indoors, vkitti outdoors",
    )
    command.add_argument(
        "--max-depth",
        type=float_in_range("--max-depth", most=MAX_METERS, unit="metres"),
        metavar="M",
        help="metres of a metric model whose file does not say it",
    )
    add_version_flag(command)
    command.set_defaults(flags=ARGUMENT_FLAGS)


def add_version_flag(command: argparse.ArgumentParser) -> None:
    """Declare the version of Depth Anything that weights are of."""
    command.add_argument(
        "--weights-version",
        type=int,
        choices=(1, 2),
        help="1 for weights of Depth Anything V1 whose file does not say it; of published ones, which to take (2)",
    )


def add_inference_flags(command: argparse.ArgumentParser) -> None:
    """Declare how any command that runs a network runs it."""
    command.add_argument(
        "--input-size",
        type=int_in_range("--input-size", least=1, most=MAX_SIDE_PX),
        metavar="N",
        help="short side, pixels (the model's own)",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    command.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network (%(default)s)"
    )
    command.add_argument(
        "--resample",
        choices=("official", "transformers"),
        default="official",
        help="whose sizes and interpolation, to the digit (%(default)s)",
    )


def add_tiles_flag(command: argparse.ArgumentParser) -> None:
    """Declare the tiles of large images."""
    command.add_argument(
        "--tiles",
        type=_parse_tiles,
        metavar="N|RxC",
        help="so many overlapping tiles down and across, each seen at --input-size; for 4K and more",
    )


def add_picture_flags(command: argparse.ArgumentParser) -> None:
    """Declare how a map is painted: the authors' flags."""
    command.add_argument("--pred-only", action="store_true", help="only the map, without the image beside it")
    command.add_argument("--grayscale", action="store_true", help="the map in grey instead of colours")
    command.add_argument("--colormap", metavar="NAME", help="of matplotlib (theirs: Spectral_r, near is red)")


def add_output_flags(command: argparse.ArgumentParser, *, formats: tuple[str, ...]) -> None:
    """Declare what is written: the picture as theirs, and files that keep the values."""
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
    """Refuse an output that would replace a file that is read, or that this command did not write.

    Args:
        outputs: What the command is going to write.
        own: Tells a file that this command wrote.
        inputs: What it reads.
        flag: What names another output.

    Raises:
        ValueError: Names the file.
    """
    from depth_anything.inference.overwrite import check_overwrite

    read = [Path(path) for path in inputs]
    check_overwrite(
        [*map(Path, outputs)], is_own=own, inputs=lambda: read, fix=f"give another {flag}, or move it"
    )


def list_weight_files(weights: str | Path | None) -> list[Path]:
    """List the files that a model is read from: the file, or those of a run's or transformers folder."""
    if weights is None:
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
    """Return a model, and what reports say of it.

    Args:
        path: A weight file or a run's folder; None for published weights.
        input_size: Pixels of the short side; None leaves the model's own.
        encoder: Of the published weights; with a path, what the file shall be.
        dataset: "hypersim" or "vkitti" for published weights that give metres.
        max_depth: Metres, where the file does not say.
        version: 1 or 2, of the published weights, and where the file does not say.

    Raises:
        ValueError: No weights there, or not such ones.
    """
    from depth_anything.model.weights import fingerprint, load_model

    if path is None:
        from depth_anything.model.official_weights import find_official_weights

        path, encoder = (
            find_official_weights(encoder or DEFAULT_ENCODER, metric=dataset, version=version or 2),
            None,
        )
    path = _resolve_weight_file(Path(path))
    model = load_model(path, encoder=encoder, max_depth=max_depth, version=version)
    model.input_size = input_size or model.input_size
    facts = {
        "weights": str(path),
        "fingerprint": fingerprint(model),
        "encoder": model.encoder,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "quantity": model.quantity,
        "max_depth": model.max_depth,
        "input_size": model.input_size,
        "licence": model.licence,
    }
    return model, facts


def load_predictor(options: argparse.Namespace) -> "tuple[Predictor, dict[str, Any]]":
    """Return the predictor that a command's `add_weights` and `add_network` ask for, and what reports say of it."""
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
    """Return a predictor of a model, run as the command's `add_network` and `add_tiles` ask for."""
    from depth_anything.inference.predictor import Predictor

    return Predictor(
        model,
        device=options.device,
        input_size=model.input_size,
        precision=options.precision,
        resample=options.resample,
        tiles=getattr(options, "tiles", None),
    )


def check_single_model(options: argparse.Namespace, count: int) -> None:
    """Refuse to tell several models what only one of them may be.

    Args:
        options: Of a command that takes several models.
        count: How many it was given.

    Raises:
        ValueError: If there are several, and a flag says what a file is.
    """
    given = {
        "encoder": options.encoder,
        "version": options.weights_version,
        "max_depth": options.weights_max_depth,
    }
    told = [options.flags[name].format(value) for name, value in given.items() if value is not None]
    if count > 1 and told:
        raise ValueError(
            f"{' '.join(told)} would be said of {count} models: leave it out, and write files that say it themselves: "
            "depth-anything export --to safetensors --weights PATH --output NEW.safetensors, with the flags of each"
        )


def describe_values(predictor: "Predictor") -> str:
    """Say what a predictor's values are: quantity, unit and direction."""
    from depth_anything.inference.formats import direction

    return f"{predictor.quantity}, {predictor.unit}, larger is {direction(predictor.quantity)}"


def format_count(number: int, noun: str) -> str:
    """Put a number before a noun: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _resolve_weight_file(path: Path) -> Path:
    if (path / "model.safetensors").exists() and not (path / "config.json").exists():  # that is transformers'
        return path / "model.safetensors"
    if (path / "config.yaml").exists():
        raise ValueError(
            f"the run {path} is not finished and has no model.safetensors yet: start it again to go on, "
            f"or give one of the files in {path / 'checkpoints'}"
        )
    if not path.exists():
        from depth_anything.model.official_weights import official_license, official_page

        if official_page(path):
            raise FileNotFoundError(
                f"no weights at {path}: {path.name} (licence {official_license(path)}) is at {official_page(path)}"
            )
        raise FileNotFoundError(
            f"no weights at {path}: give {WEIGHTS_HELP}; for published weights leave it out and say --encoder vits"
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
