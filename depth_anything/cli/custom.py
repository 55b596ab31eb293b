"""`depth-anything shard custom`: a user's own images and depth, checked, shown, and written as shards."""

import argparse
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import add_command
from depth_anything.cli.shards import add_sky, add_writing, print_written, writing

if TYPE_CHECKING:
    from depth_anything.data.sources.custom import Custom

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
    from PIL import Image

    from depth_anything.data.tars import write_atomically
    from depth_anything.evaluation.survey import survey

    found = survey(custom)
    output.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    assert found.picture is not None
    Image.fromarray(found.picture).save(picture, "PNG")
    write_atomically(output / "check.png", picture.getvalue())
    doubts = [f"look:       {doubt}" for doubt in found.doubts]
    told = [*found.lines, f"taken:      {found.taken}"]
    refused = [f"not taken:  {name}: {reason}" for name, reason in found.refused]
    write_atomically(output / "check.txt", "\n".join([*told, *doubts, *refused, ""]).encode())
    print("\n".join([*told, *refused[:SHOWN]]))
    if refused[SHOWN:]:
        print(f"not taken:  {len(refused) - SHOWN} more, see {output / 'check.txt'}")
    print(f"drawn:      {output / 'check.png'}", flush=True)
    for doubt in doubts:
        print(doubt, file=sys.stderr)
