"""`depth-anything shard`, `verify`, `view`: shards written, checked, looked at."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import add_command

if TYPE_CHECKING:
    from depth_anything.data.sample import Frame
    from depth_anything.data.shards import ShardSet


def add_shard(commands: Any) -> None:
    """Declare `shard` and its kinds."""
    kinds = add_command(commands, "shard", "write shards: the one format that training reads").add_subparsers(
        dest="kind", metavar="kind", required=True
    )
    scenes = add_command(kinds, "scenes", "draw scenes with exact depth", run=_shard_scenes)
    scenes.add_argument("output", metavar="OUT", help="folder of the new set")
    scenes.add_argument(
        "--look", choices=("synthetic", "photographic"), default="synthetic", help="%(default)s"
    )
    scenes.add_argument("--count", type=int, default=1024, metavar="N", help="scenes to draw (%(default)s)")
    scenes.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another seed, other scenes (%(default)s)"
    )
    scenes.add_argument(
        "--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"), help="pixels (256 256)"
    )
    scenes.add_argument(
        "--per-shard", type=int, default=128, metavar="N", help="records a shard (%(default)s)"
    )
    scenes.add_argument("--images-only", action="store_true", help="leave the depth out")

    images = add_command(kinds, "images", "pack photographs", run=_shard_images)
    images.add_argument("source", metavar="SOURCE", help="folder, text file with a path a line, or tar")
    images.add_argument("output", metavar="OUT", help="folder of the new set")
    images.add_argument("--name", help="name of the set (the folder's)")
    images.add_argument(
        "--per-shard", type=int, default=1000, metavar="N", help="records a shard (%(default)s)"
    )

    images.add_argument(
        "--short-side", type=int, metavar="N", help="reduce larger images to this short side (as they are)"
    )
    add_licence(images)

    index = add_command(
        kinds, "index", "index tars made elsewhere, so that they can be read", run=_shard_index
    )
    index.add_argument("source", metavar="FOLDER", help="folder of tars; gets .idx files and manifest.json")
    index.add_argument("--name", help="name of the set (the folder's)")
    add_licence(index)


def add_licence(command: argparse.ArgumentParser) -> None:
    """Declare the licence of a set's images."""
    command.add_argument(
        "--licence", metavar="SPDX", help="of the images, as CC-BY-4.0; goes into what is trained on them"
    )


def add_verify(commands: Any) -> None:
    """Declare `verify`."""
    verify = add_command(commands, "verify", "read a whole set and name what is wrong with it", run=_verify)
    verify.add_argument("set", metavar="SET", help="folder or URL prefix of a set")
    verify.add_argument("--decode", action="store_true", help="decode every image and label, too")


def add_view(commands: Any) -> None:
    """Declare `view`."""
    view = add_command(commands, "view", "show what is in shards or labels", run=_view)
    view.add_argument("set", metavar="SET", help="folder or URL prefix of a set of shards or of labels")
    view.add_argument("--images", metavar="SET", help="the image set that labels belong to")
    view.add_argument(
        "--count", type=int, default=16, metavar="N", help="records shown, evenly spaced (%(default)s)"
    )
    view.add_argument(
        "--output", metavar="FILE", default="sheet.png", help="the picture to write (%(default)s)"
    )


def _shard_scenes(options: argparse.Namespace) -> None:
    from depth_anything.data.sources.scenes import write_scenes

    height, width = options.size
    made = write_scenes(
        options.output,
        look=options.look,
        count=options.count,
        seed=options.seed,
        height=height,
        width=width,
        per_shard=options.per_shard,
        labelled=not options.images_only,
    )
    print_set(made)


def _shard_images(options: argparse.Namespace) -> None:
    from depth_anything.data.sources.images import write_images

    made = write_images(
        options.source,
        options.output,
        name=options.name,
        per_shard=options.per_shard,
        short_side=options.short_side,
        licence=options.licence,
    )
    print_set(made)


def _shard_index(options: argparse.Namespace) -> None:
    from depth_anything.data.shards import index_set
    from depth_anything.licences import check_licence

    meta = {"licence": check_licence(options.licence)} if options.licence else {}
    print_set(index_set(options.source, name=options.name, meta=meta))


def _verify(options: argparse.Namespace) -> int:
    from depth_anything.data.shards import verify_set

    problems = verify_set(options.set, decode=options.decode)
    for problem in problems:
        print(problem)
    print(f"{options.set}: {len(problems)} problems" if problems else f"{options.set}: sound")
    return 1 if problems else 0


def _view(options: argparse.Namespace) -> None:
    from PIL import Image

    from depth_anything.data.shards import JoinedRecords, open_set
    from depth_anything.evaluation.benchmarks import read_frames
    from depth_anything.evaluation.sheet import contact_sheet, describe

    shard_set = open_set(options.set)
    print_set(shard_set)
    if "images" in shard_set.meta and not options.images:
        raise ValueError(
            f"{options.set} holds labels without their images: add --images and the set of those"
        )
    records = JoinedRecords(open_set(options.images), shard_set) if options.images else shard_set

    def told() -> "Iterator[Frame]":
        for frame in read_frames(records, limit=options.count):
            print("  ".join(describe(frame)))
            yield frame

    sheet = contact_sheet(told())
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(options.output)
    print(f"drawn: {options.output}")


def print_set(shard_set: "ShardSet") -> None:
    """Print what a set holds, a fact a line."""
    from depth_anything.evaluation.benchmarks import describe_set

    for name, value in describe_set(shard_set).items():
        print(f"{name + ':':<10} {value}")
