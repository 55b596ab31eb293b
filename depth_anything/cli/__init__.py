"""The command line `depth-anything COMMAND`, with a file for each group of commands.

Nothing heavy is imported before a command runs, so that `--help` is fast. Exit codes: 2 for a mistake of the user,
which is printed without a traceback; 1 for problems that a check found; 130 for Ctrl-C.
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
from depth_anything.cli import (
    bench_command,
    calibrate_command,
    custom_command,
    evaluate_command,
    export_command,
    plan_command,
    predict_command,
    shard_commands,
    stats_command,
    video_commands,
)
from depth_anything.cli.options import FlagError
from depth_anything.data.address import escape_unprintable, redact_secrets, with_addresses
from depth_anything.disk import explain_write_error
from depth_anything.errors import format_error

PROGRAM = "depth-anything"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: Command-line arguments; None for those of the process.
    """
    return run(build_parser(), arguments)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, call the function that the parser sets as `run`, and return the exit code.

    Args:
        parser: Parser of `depth-anything`, or of a script with one command.
        arguments: Command-line arguments; None for those of the process.
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
    except BrokenPipeError:  # the reader of stdout has exited, like head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if getattr(options, "traceback", False):
            raise
        sentence = format_error(explain_write_error(error), flags=flags)
        print(
            escape_unprintable(
                redact_secrets(with_addresses(f"{parser.prog}{f' {command}' if command else ''}: {sentence}"))
            ),
            file=sys.stderr,
        )
        return 2


def _print_warning(message: Warning | str, *args: Any, flags: Mapping[str, str], **kwargs: Any) -> None:
    """Print a warning for the user of a command, without the line of code."""
    sentence = with_addresses(format_error(message, flags=flags))
    print(f"{PROGRAM}: {escape_unprintable(sentence)}", file=sys.stderr)


def _command_name(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> str:
    """Return the name of the program and, if it has several, of the command."""
    words = sys.argv[1:] if arguments is None else arguments
    commands = [word for word in words if not word.startswith("-")] if parser.prog == PROGRAM else []
    return " ".join([parser.prog, *commands[:1]])


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands, without importing what they need."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Depth Anything V2: shards, reports, predictions. To train: python train.py",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    kinds = shard_commands.add_shard(commands)
    custom_command.add_custom(kinds)
    custom_command.add_custom_segmentation(kinds)
    shard_commands.add_merge(commands)
    shard_commands.add_verify(commands)
    shard_commands.add_view(commands)
    stats_command.add_stats(commands)
    bench_command.add_bench(commands)
    plan_command.add_plan(commands)
    predict_command.add_predict(commands)
    video_commands.add_video(commands)
    calibrate_command.add_calibrate(commands)
    evaluate_command.add_evaluate(commands)
    export_command.add_export(commands)
    video_commands.add_demo(commands)
    return parser
