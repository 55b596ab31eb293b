"""`depth-anything shard custom` and `custom-segmentation`: write a user's own labeled images as shards."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import add_command, check_output
from depth_anything.cli.shard_commands import (
    add_sky_option,
    add_writer_options,
    print_write_result,
    writer_options,
)
from depth_anything.data.address import escape_unprintable, join_address

if TYPE_CHECKING:
    from depth_anything.ingest.custom import CustomSet

_COMMAND_NAME = "depth-anything shard custom"

MAX_PRINTED_REJECTIONS = 5
"""Rejected records that are named on the terminal; check.txt names all."""


def add_custom(kinds: Any) -> None:
    """Add the command `shard custom`."""
    custom = add_command(kinds, "custom", "pack your own images with depth or disparity", run=_run_custom)
    custom.add_argument("source", metavar="SET.yaml", help="declares folders and units: docs/own-data.md")
    custom.add_argument(
        "output", metavar="OUT", help="folder of the new set; check.png and check.txt are written to it too"
    )
    add_writer_options(custom)
    add_sky_option(custom)
    custom.add_argument("--check-only", action="store_true", help="check the set, and write no shards")


def add_custom_segmentation(kinds: Any) -> None:
    """Add the command `shard custom-segmentation`."""
    custom = add_command(
        kinds, "custom-segmentation", "pack your own images with class maps", run=_run_custom_segmentation
    )
    custom.add_argument(
        "source", metavar="SET.yaml", help="declares folders and classes: docs/segmentation.md"
    )
    custom.add_argument(
        "output", metavar="OUT", help="folder of the new set, or an address as s3://bucket/set"
    )
    add_writer_options(custom)


def _run_custom_segmentation(options: argparse.Namespace) -> None:
    from depth_anything.ingest.custom_segmentation import load_segmentation_declaration
    from depth_anything.ingest.writer import write_source

    custom = replace(load_segmentation_declaration(options.source), leave_out=Path(options.output).resolve())
    settings = {**writer_options(options), "name": options.name or custom.name}
    print_write_result(write_source(custom, custom.folder, options.output, **settings), options)


def _run_custom(options: argparse.Namespace) -> None:
    from depth_anything.data.store import open_store
    from depth_anything.ingest.declaration import load_declaration
    from depth_anything.ingest.file_list import FILE_LIST_INFO
    from depth_anything.ingest.writer import write_source

    output = open_store(options.output)
    custom = replace(load_declaration(options.source), leave_out=Path(options.output).resolve())
    started = output.exists(FILE_LIST_INFO)  # the set was checked when it was started
    if options.check_only or not started:
        with output.staging() as folder:
            for file in _write_check_report(custom, folder, shown=options.output):
                output.publish(file, replace=True)
    if options.check_only:
        return
    settings = {**writer_options(options), "name": options.name or custom.name}
    result = write_source(custom, custom.folder, options.output, sky=options.sky, **settings)
    print_write_result(result, options)


def _write_check_report(custom: "CustomSet", output: Path, *, shown: str) -> tuple[Path, Path]:
    """Check the set, print the result, and write check.png and check.txt to a folder; return their paths.

    `shown` is the folder or address that messages name.
    """
    from depth_anything.disk import atomic_write
    from depth_anything.inference.overwrite import is_picture_by, save_picture
    from depth_anything.inspect.dataset_check import check_dataset

    picture_file, text_file = output / "check.png", output / "check.txt"
    check_output(
        [picture_file, text_file],
        own=lambda path: is_picture_by(picture_file, _COMMAND_NAME) or _is_check_report(text_file),
        flag="OUT",
    )
    result = check_dataset(custom)
    output.mkdir(parents=True, exist_ok=True)
    assert result.picture is not None
    save_picture(result.picture, picture_file, made_by=_COMMAND_NAME)
    warnings = [f"look:       {warning}" for warning in result.warnings]
    summary = [*result.lines, f"taken:      {result.taken}"]
    rejected = [f"not taken:  {name}: {reason}" for name, reason in result.refused]
    atomic_write(text_file, "\n".join([*summary, *warnings, *rejected, ""]).encode())
    print("\n".join(map(escape_unprintable, [*summary, *rejected[:MAX_PRINTED_REJECTIONS]])))
    if (more := len(rejected) - MAX_PRINTED_REJECTIONS) > 0:
        print(f"not taken:  {more} more, see {escape_unprintable(join_address(shown, text_file.name))}")
    print(f"drawn:      {escape_unprintable(join_address(shown, picture_file.name))}", flush=True)
    for warning in warnings:
        print(escape_unprintable(warning), file=sys.stderr)
    return picture_file, text_file


def _is_check_report(text_file: Path) -> bool:
    """Recognize a check.txt by its lines. Early versions did not mark their check.png with the command's name."""
    try:
        return "\ntaken:      " in text_file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
