"""`depth-anything shard`, `verify`, `view`: shards written, checked, looked at."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import MAX_SIDE_PX, MAX_WORKERS, add_command, check_output, int_in_range
from depth_anything.data.address import escape_unprintable, redact_secrets
from depth_anything.ingest.catalog import SETS, CatalogEntry, load_source

if TYPE_CHECKING:
    from depth_anything.data.sample import Frame
    from depth_anything.data.tars import ShardSet

_COMMAND_NAME = "depth-anything view"


def add_shard(commands: Any) -> Any:
    """Declare `shard` and its kinds; return these, so that others can add theirs."""
    kinds = add_command(commands, "shard", "write shards: the one format that training reads").add_subparsers(
        dest="kind", metavar="kind", required=True
    )
    scenes = add_command(kinds, "scenes", "draw scenes with exact depth", run=_run_scenes)
    scenes.add_argument("output", metavar="OUT", help="folder of the new set")
    scenes.add_argument(
        "--look", choices=("synthetic", "photographic"), default="synthetic", help="%(default)s"
    )
    scenes.add_argument(
        "--count",
        type=int_in_range("--count", least=1),
        default=1024,
        metavar="N",
        help="scenes to draw (%(default)s)",
    )
    scenes.add_argument(
        "--seed",
        type=int_in_range("--seed", least=0, most=2**63 - 1),
        default=0,
        metavar="N",
        help="another seed, other scenes (%(default)s)",
    )
    scenes.add_argument(
        "--size",
        type=int_in_range("--size", least=1, most=MAX_SIDE_PX),
        nargs=2,
        default=(256, 256),
        metavar=("H", "W"),
        help="pixels (256 256)",
    )
    scenes.add_argument(
        "--per-shard",
        type=int_in_range("--per-shard", least=1),
        default=128,
        metavar="N",
        help="records a shard (%(default)s)",
    )
    scenes.add_argument("--images-only", action="store_true", help="leave the depth out")

    images = add_command(kinds, "images", "pack photographs", run=_run_images)
    images.add_argument("source", metavar="SOURCE", help="folder, text file with a path a line, or tar")
    images.add_argument("output", metavar="OUT", help="folder of the new set")
    add_writer_options(images)

    for name, entry in SETS.items():
        _add_catalog_set(kinds, name, entry)

    index = add_command(kinds, "index", "index tars made elsewhere, so that they can be read", run=_run_index)
    index.add_argument("source", metavar="FOLDER", help="folder of tars; gets .idx files and manifest.json")
    index.add_argument("--name", help="name of the set (the folder's)")
    add_license_option(index)
    return kinds


def _add_catalog_set(kinds: Any, name: str, entry: CatalogEntry) -> None:
    """Declare a set of the catalogue."""
    command = add_command(kinds, name, entry.help, run=_run_catalog_set)
    command.add_argument("source", metavar="RAW", help="folder that the set was downloaded or unpacked to")
    command.add_argument("output", metavar="OUT", help="folder of the new set")
    add_writer_options(command, name=name)
    command.add_argument(
        "--leave-out",
        metavar="GLOB",
        nargs="*",
        help="names that are not taken, as 'amusement/*' (the set's)",
    )
    if entry.labelled:
        add_sky_option(command)
    for flag in entry.flags:
        command.add_argument(
            flag.name,
            choices=flag.choices,
            default=flag.default,
            type=Path if flag.path else str,
            metavar="FILE" if flag.path else None,
            help=flag.help,
        )


def add_writer_options(command: argparse.ArgumentParser, *, name: str = "the folder's") -> None:
    """Declare how any set is written; `name` is what it is called unless told otherwise."""
    command.add_argument("--name", help=f"name of the set ({name})")
    command.add_argument(
        "--per-shard",
        type=int_in_range("--per-shard", least=1),
        default=1000,
        metavar="N",
        help="records a shard (%(default)s)",
    )
    command.add_argument(
        "--short-side",
        type=int_in_range("--short-side", least=1, most=MAX_SIDE_PX),
        metavar="N",
        help="reduce larger images to this short side (as they are)",
    )
    command.add_argument(
        "--part",
        type=_parse_part,
        default=(1, 1),
        metavar="K/N",
        help="write only the K-th of N parts, on as many machines; they may share OUT, else merge (1/1)",
    )
    command.add_argument(
        "--workers",
        type=int_in_range("--workers", least=0, most=MAX_WORKERS),
        default=0,
        metavar="N",
        help="processes that write shards (in this one)",
    )
    add_license_option(command)


def add_sky_option(command: argparse.ArgumentParser) -> None:
    """Declare what training does with a set's sky."""
    command.add_argument(
        "--sky",
        choices=("far", "invalid"),
        help="what training does with it unless told otherwise: disparity 0, or nothing (the set's)",
    )


def picture_path(text: str) -> Path:
    """Return the path of a picture to write, whose folder is made; ValueError names --output where it is none."""
    from depth_anything.inference.overwrite import PICTURE_FORMATS

    path = Path(text)
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise ValueError(f"--output {text} names no picture: type a file that ends in .png or .jpg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--output {text} cannot be written: {error.filename} is no folder") from error
    return path


def _parse_part(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: the third of eight is 3/8")
    return int(k), int(n)


def add_license_option(command: argparse.ArgumentParser) -> None:
    """Declare the licence of a set's images."""
    command.add_argument(
        "--licence", metavar="SPDX", help="of the images, as CC-BY-4.0; goes into what is trained on them"
    )


def add_merge(commands: Any) -> None:
    """Declare `merge`."""
    merge = add_command(
        commands,
        "merge",
        "bring the parts of a set together that were written in several folders",
        run=_run_merge,
    )
    merge.add_argument("output", metavar="OUT", help="folder of the whole set: a new one, or that of a part")
    merge.add_argument("folders", metavar="FOLDER", nargs="*", help="folders of the other parts; they stay")


def add_verify(commands: Any) -> None:
    """Declare `verify`."""
    verify = add_command(
        commands, "verify", "read a whole set and name what is wrong with it", run=_run_verify
    )
    verify.add_argument("set", metavar="SET", help="folder or URL prefix of a set")
    verify.add_argument(
        "--decode", action="store_true", help="decode every image and label, too, and compare their sizes"
    )
    verify.add_argument(
        "--images", metavar="SET", help="of labels: the images they were made from; every pair is looked at"
    )
    verify.add_argument(
        "--workers",
        type=int_in_range("--workers", least=1, most=MAX_WORKERS),
        default=1,
        metavar="N",
        help="shards read side by side (%(default)s)",
    )


def add_view(commands: Any) -> None:
    """Declare `view`."""
    view = add_command(commands, "view", "show what is in shards or labels", run=_run_view)
    view.add_argument("set", metavar="SET", help="folder or URL prefix of a set of shards or of labels")
    view.add_argument("--images", metavar="SET", help="the image set that labels belong to")
    view.add_argument(
        "--count",
        type=int_in_range("--count", least=1),
        default=16,
        metavar="N",
        help="records shown, evenly spaced (%(default)s)",
    )
    view.add_argument(
        "--output", metavar="FILE", default="sheet.png", help="the picture to write (%(default)s)"
    )


def _run_scenes(options: argparse.Namespace) -> None:
    from depth_anything.scenes.layout import write_scenes

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


def _run_images(options: argparse.Namespace) -> None:
    from depth_anything.ingest.photographs import write_images

    print_write_result(write_images(options.source, options.output, **writer_options(options)), options)


def _run_catalog_set(options: argparse.Namespace) -> None:
    from depth_anything.ingest.writer import write_source

    flags = {flag.name[2:].replace("-", "_") for flag in SETS[options.kind].flags}
    made = write_source(
        load_source(options.kind),
        options.source,
        options.output,
        leave_out=options.leave_out,
        sky=getattr(options, "sky", None),
        **{**writer_options(options), "name": options.name or options.kind},
        **{flag: getattr(options, flag) for flag in sorted(flags) if getattr(options, flag) is not None},
    )
    print_write_result(made, options)


def writer_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_writing` has declared, as `write_source` takes it; ValueError names a flag that cannot be."""
    names = ("name", "per_shard", "short_side", "part", "workers", "licence")
    return {name: getattr(options, name) for name in names}


def print_write_result(made: "ShardSet | None", options: argparse.Namespace) -> None:
    """Print what a set holds and what was not taken; of a part, how to go on."""
    if made is None:
        k, n = options.part
        print(
            f"part {k} of {n} is written; {escape_unprintable(options.output)} is finished when all are. Where "
            "parts share this "
            "folder the last one finishes it, else bring them together:  depth-anything merge OUT FOLDER FOLDER …"
        )
        return
    print_set(made)
    skipped = made.meta.get("skipped")
    if skipped:
        reasons = sorted(skipped["reasons"].items(), key=lambda row: -row[1])
        told = "; ".join(f"{count} x {reason}" for reason, count in reasons[:3])
        more = f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
        print(
            f"not taken:  {skipped['count']} ({escape_unprintable(told)}{more}): see "
            f"{escape_unprintable(made.root)}/*.skipped.json"
        )
    for what, count in made.meta.get("left_out", {}).items():
        print(f"passed over: {count} {escape_unprintable(what)}")


def _run_merge(options: argparse.Namespace) -> None:
    from depth_anything.ingest.merge import merge_parts

    print_write_result(merge_parts(options.output, options.folders), options)


def _run_index(options: argparse.Namespace) -> None:
    from depth_anything.data.shards import index_set
    from depth_anything.licenses import check_license

    meta = {"licence": check_license(options.licence)} if options.licence else {}
    print_set(index_set(options.source, name=options.name, meta=meta))


def _run_verify(options: argparse.Namespace) -> int:
    from depth_anything.data.shards import open_set, verify_set
    from depth_anything.data.tars import ShardError
    from depth_anything.progress import ProgressLine

    try:
        total = open_set(options.set, check=False).records
    except ShardError:
        total = None  # which verify_set tells
    with ProgressLine(f"verifying {redact_secrets(options.set)}", total=total) as progress:
        problems = verify_set(
            options.set,
            decode=options.decode,
            images=options.images,
            workers=options.workers,
            tick=progress.update,
        )
    for problem in problems:
        print(escape_unprintable(problem))
    name = escape_unprintable(redact_secrets(options.set))
    print(f"{name}: {len(problems)} problems" if problems else f"{name}: sound")
    return 1 if problems else 0


def _run_view(options: argparse.Namespace) -> None:
    from depth_anything.data.reader import JoinedRecords
    from depth_anything.data.shards import open_set
    from depth_anything.evaluation.frames import read_frames
    from depth_anything.inference.overwrite import is_picture_by, save_picture
    from depth_anything.inspect.contact_sheet import contact_sheet, describe_frame

    picture = picture_path(options.output)
    check_output([options.output], own=lambda path: is_picture_by(path, _COMMAND_NAME))
    shard_set = open_set(options.set)
    print_set(shard_set)
    if "images" in shard_set.meta and not options.images:
        raise ValueError(
            f"{options.set} holds labels without their images: add --images and the set of those"
        )
    records = JoinedRecords(open_set(options.images), shard_set) if options.images else shard_set

    def told() -> "Iterator[Frame]":
        for frame in read_frames(records, limit=options.count):
            print("  ".join(map(escape_unprintable, describe_frame(frame))))
            yield frame

    save_picture(contact_sheet(told()), picture, made_by=_COMMAND_NAME)
    print(f"drawn: {escape_unprintable(options.output)}")


def print_set(shard_set: "ShardSet") -> None:
    """Print what a set holds, a fact a line."""
    from depth_anything.evaluation.frames import describe_set

    for name, value in describe_set(shard_set).items():
        print(f"{name + ':':<10} {escape_unprintable(value)}")
