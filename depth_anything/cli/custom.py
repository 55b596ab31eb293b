"""`depth-anything shard custom`: a user's own images and depth, checked, shown, and written as shards."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import add_command, check_output
from depth_anything.cli.shards import add_sky_option, add_writer_options, print_write_result, writer_options
from depth_anything.data.address import escape_unprintable

if TYPE_CHECKING:
    from depth_anything.ingest.custom import CustomSet

_COMMAND_NAME = "depth-anything shard custom"

MAX_PRINTED_REJECTIONS = 5
"""Refused records that are named on the terminal; check.txt names all."""


def add_custom(kinds: Any) -> None:
    """Declare `custom` among the kinds of `shard`."""
    custom = add_command(kinds, "custom", "pack your own images with depth or disparity", run=_run_custom)
    custom.add_argument("source", metavar="SET.yaml", help="what lies where, in which unit: docs/own-data.md")
    custom.add_argument(
        "output", metavar="OUT", help="folder of the new set; gets check.png and check.txt, too"
    )
    add_writer_options(custom)
    add_sky_option(custom)
    custom.add_argument("--check-only", action="store_true", help="say what is found, and write no shards")


def _run_custom(options: argparse.Namespace) -> None:
    from depth_anything.ingest.declaration import load_declaration
    from depth_anything.ingest.file_list import FILE_LIST_INFO
    from depth_anything.ingest.writer import write_source

    output = Path(options.output)
    custom = replace(load_declaration(options.source), leave_out=output.resolve())
    if options.check_only or not (output / FILE_LIST_INFO).exists():  # begun: it was checked then
        _write_check_report(custom, output)
    if options.check_only:
        return
    how = {**writer_options(options), "name": options.name or custom.name}
    print_write_result(write_source(custom, custom.folder, output, sky=options.sky, **how), options)


def _write_check_report(custom: "CustomSet", output: Path) -> None:
    """Look at the set, say what is there, and leave a picture and all that was said in the output folder."""
    from depth_anything.disk import atomic_write
    from depth_anything.inference.overwrite import is_picture_by, save_picture
    from depth_anything.inspect.dataset_check import check_dataset

    picture_file, text_file = output / "check.png", output / "check.txt"
    check_output(
        [picture_file, text_file],
        own=lambda path: is_picture_by(picture_file, _COMMAND_NAME) or _is_check_report(text_file),
        flag="OUT",
    )
    found = check_dataset(custom)
    output.mkdir(parents=True, exist_ok=True)
    assert found.picture is not None
    save_picture(found.picture, picture_file, made_by=_COMMAND_NAME)
    warnings = [f"look:       {doubt}" for doubt in found.warnings]
    told = [*found.lines, f"taken:      {found.taken}"]
    refused = [f"not taken:  {name}: {reason}" for name, reason in found.refused]
    atomic_write(text_file, "\n".join([*told, *warnings, *refused, ""]).encode())
    print("\n".join(map(escape_unprintable, [*told, *refused[:MAX_PRINTED_REJECTIONS]])))
    if refused[MAX_PRINTED_REJECTIONS:]:
        print(
            f"not taken:  {len(refused) - MAX_PRINTED_REJECTIONS} more, see {escape_unprintable(output / 'check.txt')}"
        )
    print(f"drawn:      {escape_unprintable(output / 'check.png')}", flush=True)
    for doubt in warnings:
        print(escape_unprintable(doubt), file=sys.stderr)


def _is_check_report(text_file: Path) -> bool:
    """Tell a check.txt by its lines, for those of versions whose picture does not say who drew it."""
    try:
        return "\ntaken:      " in text_file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
