"""The command line: `depth-anything <command>`.

Nothing heavy is imported before a command runs, so that `--help` answers at once. What the user did wrong is
one sentence and exit code 2; a set with problems is exit code 1; Ctrl-C is 130.
"""

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from depth_anything import __version__

if TYPE_CHECKING:
    from depth_anything import DepthAnything
    from depth_anything.data.sample import Frame
    from depth_anything.data.shards import ShardSet

T = TypeVar("T")

PROGRAM = "depth-anything"
MEAN_MAP_FRAMES = 1000
"""How many frames of the training set the mean map is made of, at most."""

QUIET_S = 30.0
"""Seconds between lines of progress where there is no terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: what follows the program's name; those of the process by default.
    """
    options = build_parser().parse_args(arguments)
    options.typed = shlex.join([PROGRAM, *(sys.argv[1:] if arguments is None else arguments)])
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            return options.run(options) or 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2


def _say_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    """Warnings are for whoever typed the command, who has no use for the line of code that they come from."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, without importing anything that a command needs."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Depth Anything V2: shards, reports, predictions. To train: python train.py",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_shard(commands)
    _add_verify(commands)
    _add_view(commands)
    _add_predict(commands)
    _add_evaluate(commands)
    return parser


# The options, command by command

_WEIGHTS = ".safetensors, .pth, .ckpt, or a finished run's folder"


def _add_shard(commands: Any) -> None:
    kinds = _command(commands, "shard", "write shards: the one format that training reads").add_subparsers(
        dest="kind", metavar="kind", required=True
    )
    scenes = _command(kinds, "scenes", "draw scenes with exact depth", run=_shard_scenes)
    scenes.add_argument("output", metavar="OUT", help="folder of the new set")
    scenes.add_argument(
        "--look", choices=("synthetic", "photographic"), default="synthetic", help="%(default)s"
    )
    scenes.add_argument("--count", type=int, default=1024, metavar="N", help="scenes to draw (%(default)s)")
    scenes.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another seed, other scenes (%(default)s)"
    )
    scenes.add_argument(
        "--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"), help="pixels (256 256)"
    )
    scenes.add_argument(
        "--per-shard", type=int, default=128, metavar="N", help="records a shard (%(default)s)"
    )
    scenes.add_argument("--images-only", action="store_true", help="leave the depth out")

    images = _command(kinds, "images", "pack photographs", run=_shard_images)
    images.add_argument("source", metavar="SOURCE", help="folder, text file with a path a line, or tar")
    images.add_argument("output", metavar="OUT", help="folder of the new set")
    images.add_argument("--name", help="name of the set (the folder's)")
    images.add_argument(
        "--per-shard", type=int, default=1000, metavar="N", help="records a shard (%(default)s)"
    )

    images.add_argument(
        "--short-side", type=int, metavar="N", help="reduce larger images to this short side (as they are)"
    )

    index = _command(kinds, "index", "index tars made elsewhere, so that they can be read", run=_shard_index)
    index.add_argument("source", metavar="FOLDER", help="folder of tars; gets .idx files and manifest.json")
    index.add_argument("--name", help="name of the set (the folder's)")


def _add_verify(commands: Any) -> None:
    verify = _command(commands, "verify", "read a whole set and name what is wrong with it", run=_verify)
    verify.add_argument("set", metavar="SET", help="folder or URL prefix of a set")
    verify.add_argument("--decode", action="store_true", help="decode every image and label, too")


def _add_view(commands: Any) -> None:
    view = _command(commands, "view", "show what is in shards or labels", run=_view)
    view.add_argument("set", metavar="SET", help="folder or URL prefix of a set of shards or of labels")
    view.add_argument("--images", metavar="SET", help="the image set that labels belong to")
    view.add_argument(
        "--count", type=int, default=16, metavar="N", help="records shown, evenly spaced (%(default)s)"
    )
    view.add_argument(
        "--output", metavar="FILE", default="sheet.png", help="the picture to write (%(default)s)"
    )


def _add_predict(commands: Any) -> None:
    predict = _command(
        commands, "predict", "map images: a 16-bit PNG and a coloured picture each", run=_predict
    )
    predict.add_argument(
        "source", metavar="IMAGE|FOLDER", help="an image, or a folder (its tree is kept), list or tar of them"
    )
    predict.add_argument("--weights", required=True, metavar="PATH", help=_WEIGHTS)
    predict.add_argument("--output", required=True, metavar="DIR", help="folder of the maps")
    _add_network(predict)


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(commands, "evaluate", "judge models on a labelled set; write a report", run=_evaluate)
    evaluate.add_argument(
        "--weights",
        required=True,
        nargs="+",
        action="extend",
        metavar="[NAME=]PATH",
        help=f"models: {_WEIGHTS}",
    )
    evaluate.add_argument("--data", required=True, metavar="SET", help="labelled set with depth")
    evaluate.add_argument(
        "--mean-map",
        metavar="SET",
        help="also judge the mean map of this training set, which looks at no image",
    )
    evaluate.add_argument("--output", metavar="DIR", help="folder of the report (outputs/evaluate-<set>)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="so many images, evenly spaced (all)")
    _add_network(evaluate)


def _add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument("--input-size", type=int, metavar="N", help="short side, pixels (the model's own)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")


def _command(commands: Any, name: str, text: str, *, run: Any = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


# What the commands do


def _shard_scenes(options: argparse.Namespace) -> None:
    from depth_anything.data.sources.scenes import write_scenes

    height, width = options.size
    made = write_scenes(
        options.output,
        look=options.look,
        count=options.count,
        seed=options.seed,
        height=height,
        width=width,
        per_shard=options.per_shard,
        labelled=not options.images_only,
    )
    _print_set(made)


def _shard_images(options: argparse.Namespace) -> None:
    from depth_anything.data.sources.images import write_images

    made = write_images(
        options.source,
        options.output,
        name=options.name,
        per_shard=options.per_shard,
        short_side=options.short_side,
    )
    _print_set(made)


def _shard_index(options: argparse.Namespace) -> None:
    from depth_anything.data.shards import index_set

    _print_set(index_set(options.source, name=options.name))


def _verify(options: argparse.Namespace) -> int:
    from depth_anything.data.shards import verify_set

    problems = verify_set(options.set, decode=options.decode)
    for problem in problems:
        print(problem)
    print(f"{options.set}: {len(problems)} problems" if problems else f"{options.set}: sound")
    return 1 if problems else 0


def _view(options: argparse.Namespace) -> None:
    from PIL import Image

    from depth_anything.data.shards import JoinedRecords, open_set
    from depth_anything.evaluation.benchmarks import read_frames
    from depth_anything.evaluation.sheet import contact_sheet, describe

    shard_set = open_set(options.set)
    _print_set(shard_set)
    if "images" in shard_set.meta and not options.images:
        raise ValueError(
            f"{options.set} holds labels without their images: add --images and the set of those"
        )
    records = JoinedRecords(open_set(options.images), shard_set) if options.images else shard_set

    def told() -> "Iterator[Frame]":
        for frame in read_frames(records, limit=options.count):
            print("  ".join(describe(frame)))
            yield frame

    sheet = contact_sheet(told())
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(options.output)
    print(f"drawn: {options.output}")


def _evaluate(options: argparse.Namespace) -> None:
    from depth_anything.data.shards import open_set
    from depth_anything.evaluation.benchmarks import mean_map, read_frames
    from depth_anything.evaluation.report import compare
    from depth_anything.evaluation.table import format_table
    from depth_anything.inference.predictor import Predictor

    named = _names(options.weights)
    shard_set = open_set(options.data)
    predictors: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    if options.mean_map:
        frames = read_frames(options.mean_map, limit=MEAN_MAP_FRAMES)
        predictors["mean map"] = mean_map(_watch(frames, what="mean map"))
        facts["mean map"] = {"baseline": f"mean disparity of {options.mean_map}, the same for every image"}
    for name, path in named.items():
        model, facts[name] = _load(path, input_size=options.input_size)
        predictors[name] = Predictor(model, device=options.device, input_size=model.input_size)
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
        watch=lambda frames, name: _watch(frames, what=name, total=total),
    )
    print(format_table(results))
    print(f"report: {folder / 'report.html'}")


def _predict(options: argparse.Namespace) -> None:
    from depth_anything.inference.files import predict_files
    from depth_anything.inference.predictor import Predictor

    model, _ = _load(Path(options.weights), input_size=options.input_size)
    predictor = Predictor(model, device=options.device, input_size=model.input_size)
    outcome = predict_files(
        predictor,
        options.source,
        options.output,
        watch=lambda files: _watch(files, what="predict", total=len(files)),
    )
    for file, why in outcome.skipped.items():
        print(f"skipped {file}: {why}", file=sys.stderr)
    larger = "nearer" if predictor.quantity == "disparity" else "farther"
    print(
        f"{len(outcome.written) // 2} images mapped, {len(outcome.skipped)} files skipped: {options.output} "
        f"({predictor.quantity}, {predictor.unit}, larger is {larger})"
    )


# What several of them need


def _names(weights: Sequence[str]) -> dict[str, Path]:
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


def _load(path: Path, *, input_size: int | None) -> "tuple[DepthAnything, dict[str, Any]]":
    """The model of a weight file or a run's folder, and what reports say of it."""
    from depth_anything.model.weights import fingerprint, load_model

    if (path / "model.safetensors").exists() and not (path / "config.json").exists():  # that is transformers'
        path = path / "model.safetensors"
    elif (path / "config.yaml").exists():
        raise ValueError(
            f"the run {path} is not finished and has no model.safetensors yet: start it again to go on, "
            f"or give one of the files in {path / 'checkpoints'}"
        )
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: give {_WEIGHTS}")
    model = load_model(path)
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


def _print_set(shard_set: "ShardSet") -> None:
    from depth_anything.evaluation.benchmarks import describe_set

    for name, value in describe_set(shard_set).items():
        print(f"{name + ':':<10} {value}")


def _watch(items: Iterable[T], *, what: str, total: int | None = None) -> Iterator[T]:
    """Show how far a pass has come on standard error: a bar on a terminal, else a line every half minute."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    begin = said = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - said >= QUIET_S:
            said, rate = now, (done + 1) / (now - begin)
            rest = f", {(total - done - 1) / rate:.0f} s to go" if total else ""
            print(f"{what}: {done + 1} of {total or '?'}, {rate:.1f} a second{rest}", file=sys.stderr)
