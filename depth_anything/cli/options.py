"""What several commands need: their options, a model read, progress shown."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from depth_anything import DepthAnything

T = TypeVar("T")

WEIGHTS = ".safetensors, .pth, .ckpt, or a finished run's folder"

QUIET_S = 30.0
"""Seconds between lines of progress where there is no terminal."""


def add_command(commands: Any, name: str, text: str, *, run: Any = None) -> argparse.ArgumentParser:
    """Declare a command that calls `run` with its options; `text` is its help."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_network(command: argparse.ArgumentParser) -> None:
    """Declare how any command that runs a network runs it."""
    command.add_argument("--input-size", type=int, metavar="N", help="short side, pixels (the model's own)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")


def load(path: Path, *, input_size: int | None) -> "tuple[DepthAnything, dict[str, Any]]":
    """Return the model of a weight file or a run's folder, and what reports say of it."""
    from depth_anything.model.weights import fingerprint, load_model

    if (path / "model.safetensors").exists() and not (path / "config.json").exists():  # that is transformers'
        path = path / "model.safetensors"
    elif (path / "config.yaml").exists():
        raise ValueError(
            f"the run {path} is not finished and has no model.safetensors yet: start it again to go on, "
            f"or give one of the files in {path / 'checkpoints'}"
        )
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: give {WEIGHTS}")
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


def watch(items: Iterable[T], *, what: str, total: int | None = None) -> Iterator[T]:
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
