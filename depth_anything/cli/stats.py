"""`depth-anything stats`: what a set holds, in numbers and a picture."""

import argparse
from typing import Any

from depth_anything.cli.options import add_command, check_output, whole
from depth_anything.cli.shards import picture_path
from depth_anything.data.address import printable

_MADE_BY = "depth-anything stats"


def add_stats(commands: Any) -> None:
    """Declare `stats`."""
    stats = add_command(
        commands,
        "stats",
        "count a set: records, bytes, sizes, valid pixels and sky, how far they lie",
        run=_stats,
    )
    stats.add_argument("set", metavar="SET", help="folder or URL prefix of a set of shards or of labels")
    stats.add_argument(
        "--count",
        type=whole("--count", least=1),
        default=500,
        metavar="N",
        help="records looked at, evenly spaced (%(default)s)",
    )
    stats.add_argument(
        "--output", metavar="FILE", default="stats.png", help="the picture to write (%(default)s)"
    )


def _stats(options: argparse.Namespace) -> int:
    from depth_anything.data.outputs import is_picture_of, save_picture
    from depth_anything.data.shards import open_set
    from depth_anything.evaluation.stats import draw, gather, told

    picture = picture_path(options.output)
    check_output([options.output], own=lambda path: is_picture_of(path, _MADE_BY))
    shard_set = open_set(options.set)
    stats = gather(shard_set, sample=options.count)
    print("\n".join(map(printable, told(shard_set, stats))))
    save_picture(draw(shard_set, stats), picture, made_by=_MADE_BY)
    print(f"drawn:      {printable(options.output)}")
    return 1 if stats.bad else 0
