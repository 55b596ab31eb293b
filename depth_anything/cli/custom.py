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
    from depth_anything.evaluation.survey import Survey

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
    write_atomically(output / "check.txt", "\n".join([*_told(found, len(found.refused)), ""]).encode())
    print("\n".join(_told(found, SHOWN)))
    for doubt in found.doubts:
        print(f"look:       {doubt}", file=sys.stderr)
    print(f"drawn:      {output / 'check.png'}", flush=True)


def _told(found: "Survey", most: int) -> list[str]:
    """The lines for people; of what is refused, so many by name."""
    lines = [*found.lines, f"taken:      {found.taken}"]
    for name, reason in found.refused[:most]:
        lines.append(f"not taken:  {name}: {reason}")
    if len(found.refused) > most:
        lines.append(f"not taken:  {len(found.refused) - most} more, see check.txt")
    return lines
