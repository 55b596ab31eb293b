"""The command line: `depth-anything <command>`, a file here for each family of commands.

Nothing heavy is imported before a command runs, so that `--help` answers at once. What the user did wrong is
one sentence and exit code 2; a set with problems is exit code 1; Ctrl-C is 130.
"""

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from depth_anything import __version__
from depth_anything.cli import bench, calibrate, custom, evaluate, export, predict, shards, stats, video
from depth_anything.cli.options import FlagError
from depth_anything.data.address import escape_unprintable, redact_secrets
from depth_anything.errors import format_error

PROGRAM = "depth-anything"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: what follows the program's name; those of the process by default.
    """
    return run(build_parser(), arguments)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Run what a parser's `run` says and return the exit code; for `main`, and for the doors with one command.

    Args:
        parser: sets `run` to what is called with the options.
        arguments: what follows the program's name; those of the process by default.
    """
    try:
        options = parser.parse_args(arguments)
    except FlagError as error:
        print(f"{_command_name(parser, arguments)}: {escape_unprintable(error)}", file=sys.stderr)
        return 2
    options.typed = redact_secrets(
        shlex.join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    )
    command, flags = getattr(options, "command", None), getattr(options, "flags", {})
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_print_warning, flags=flags)
            return options.run(options) or 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our words has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if getattr(options, "traceback", False):
            raise
        sentence = format_error(error, flags=flags)
        print(
            escape_unprintable(
                redact_secrets(f"{parser.prog}{f' {command}' if command else ''}: {sentence}")
            ),
            file=sys.stderr,
        )
        return 2


def _print_warning(message: Warning | str, *args: Any, flags: Mapping[str, str], **kwargs: Any) -> None:
    """Warnings are for whoever typed the command, who has no use for the line of code that they come from."""
    print(f"{PROGRAM}: {escape_unprintable(format_error(message, flags=flags))}", file=sys.stderr)


def _command_name(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> str:
    """Name the program and the command, if it has several, that a line of arguments asks for."""
    words = sys.argv[1:] if arguments is None else arguments
    commands = [word for word in words if not word.startswith("-")] if parser.prog == PROGRAM else []
    return " ".join([parser.prog, *commands[:1]])


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, without importing anything that a command needs."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Depth Anything V2: shards, reports, predictions. To train: python train.py",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    custom.add_custom(shards.add_shard(commands))
    shards.add_merge(commands)
    shards.add_verify(commands)
    shards.add_view(commands)
    stats.add_stats(commands)
    bench.add_bench(commands)
    predict.add_predict(commands)
    video.add_video(commands)
    calibrate.add_calibrate(commands)
    evaluate.add_evaluate(commands)
    export.add_export(commands)
    video.add_demo(commands)
    return parser
