"""`depth-anything stats`: statistics of a set of shards, printed and drawn."""

import argparse
from typing import Any

from depth_anything.cli.options import add_command, check_output, int_in_range
from depth_anything.cli.shard_commands import picture_path
from depth_anything.data.address import escape_unprintable

_COMMAND_NAME = "depth-anything stats"


def add_stats(commands: Any) -> None:
    """Declare `stats`."""
    stats = add_command(
        commands,
        "stats",
        "print statistics of a set: records, bytes, sizes, valid pixels, sky and depth",
        run=_stats,
    )
    stats.add_argument("set", metavar="SET", help="folder or URL prefix of a set of shards or of labels")
    stats.add_argument(
        "--count",
        type=int_in_range("--count", least=1),
        default=500,
        metavar="N",
        help="records read, evenly spaced (%(default)s)",
    )
    stats.add_argument("--output", metavar="FILE", default="stats.png", help="picture to write (%(default)s)")


def _stats(options: argparse.Namespace) -> int:
    from depth_anything.data.shards import open_set
    from depth_anything.inference.overwrite import is_picture_by, save_picture
    from depth_anything.inspect.dataset_stats import compute_stats, draw_stats, format_stats

    picture = picture_path(options.output)
    check_output([options.output], own=lambda path: is_picture_by(path, _COMMAND_NAME))
    shard_set = open_set(options.set)
    stats = compute_stats(shard_set, sample=options.count)
    print("\n".join(map(escape_unprintable, format_stats(shard_set, stats))))
    save_picture(draw_stats(shard_set, stats), picture, made_by=_COMMAND_NAME)
    print(f"drawn:      {escape_unprintable(options.output)}")
    return 1 if stats.bad else 0
