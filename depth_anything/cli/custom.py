"""`depth-anything shard custom`: a user's own images and depth, checked, shown, and written as shards."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import add_command, check_output
from depth_anything.cli.shards import add_sky, add_writing, print_written, writing
from depth_anything.data.address import printable

if TYPE_CHECKING:
    from depth_anything.data.sources.custom import Custom

_MADE_BY = "depth-anything shard custom"

SHOWN = 5
"""Refused records that are named on the terminal; check.txt names all."""


def add_custom(kinds: Any) -> None:
    """Declare `custom` among the kinds of `shard`."""
    custom = add_command(kinds, "custom", "pack your own images with depth or disparity", run=_shard_custom)
    custom.add_argument("source", metavar="SET.yaml", help="what lies where, in which unit: docs/own-data.md")
    custom.add_argument(
        "output", metavar="OUT", help="folder of the new set; gets check.png and check.txt, too"
    )
    add_writing(custom)
    add_sky(custom)
    custom.add_argument("--check-only", action="store_true", help="say what is found, and write no shards")


def _shard_custom(options: argparse.Namespace) -> None:
    from depth_anything.data.sources.declaration import read_yaml
    from depth_anything.data.sources.listing import ABOUT_LISTING
    from depth_anything.data.sources.writing import write_source

    output = Path(options.output)
    custom = replace(read_yaml(options.source), leave_out=output.resolve())
    if options.check_only or not (output / ABOUT_LISTING).exists():  # begun: it was checked then
        _check(custom, output)
    if options.check_only:
        return
    how = {**writing(options), "name": options.name or custom.name}
    print_written(write_source(custom, custom.folder, output, sky=options.sky, **how), options)


def _check(custom: "Custom", output: Path) -> None:
    """Look at the set, say what is there, and leave a picture and all that was said in the output folder."""
    from depth_anything.data.outputs import is_picture_of, save_picture
    from depth_anything.data.tars import write_atomically
    from depth_anything.evaluation.survey import survey

    picture_file, text_file = output / "check.png", output / "check.txt"
    check_output(
        [picture_file, text_file],
        own=lambda path: is_picture_of(picture_file, _MADE_BY) or _is_earlier(text_file),
        flag="OUT",
    )
    found = survey(custom)
    output.mkdir(parents=True, exist_ok=True)
    assert found.picture is not None
    save_picture(found.picture, picture_file, made_by=_MADE_BY)
    doubts = [f"look:       {doubt}" for doubt in found.doubts]
    told = [*found.lines, f"taken:      {found.taken}"]
    refused = [f"not taken:  {name}: {reason}" for name, reason in found.refused]
    write_atomically(text_file, "\n".join([*told, *doubts, *refused, ""]).encode())
    print("\n".join(map(printable, [*told, *refused[:SHOWN]])))
    if refused[SHOWN:]:
        print(f"not taken:  {len(refused) - SHOWN} more, see {printable(output / 'check.txt')}")
    print(f"drawn:      {printable(output / 'check.png')}", flush=True)
    for doubt in doubts:
        print(printable(doubt), file=sys.stderr)


def _is_earlier(text_file: Path) -> bool:
    """Tell a check.txt by its lines, for those of versions whose picture does not say who drew it."""
    try:
        return "\ntaken:      " in text_file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
