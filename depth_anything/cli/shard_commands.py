"""`depth-anything shard`, `verify`, `view`, `merge`: write, check, show and merge sets of shards."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import (
    MAX_SIDE_PX,
    MAX_WORKERS,
    add_command,
    check_output,
    float_in_range,
    int_in_range,
)
from depth_anything.data.address import escape_unprintable, is_remote, redact_secrets
from depth_anything.errors import UserError
from depth_anything.ingest.catalog import SETS, CatalogEntry, load_source

if TYPE_CHECKING:
    from depth_anything.data.sample import Frame
    from depth_anything.data.tars import ShardSet

_COMMAND_NAME = "depth-anything view"


def add_shard(commands: Any) -> Any:
    """Add the command `shard`; return its subcommands, so that other modules can add theirs."""
    kinds = add_command(commands, "shard", "write shards, the format that training reads").add_subparsers(
        dest="kind", metavar="kind", required=True
    )
    _add_scenes(kinds)
    images = add_command(kinds, "images", "pack photographs", run=_run_images)
    images.add_argument("source", metavar="SOURCE", help="folder, text file with a path per line, or tar")
    images.add_argument(
        "output", metavar="OUT", help="folder of the new set, or an address as s3://bucket/set"
    )
    add_writer_options(images)

    _add_captions(kinds)
    _add_degraded(kinds)
    for name, entry in SETS.items():
        _add_catalog_set(kinds, name, entry)

    index = add_command(
        kinds, "index", "index tars of other programs, so that they can be read", run=_run_index
    )
    index.add_argument(
        "source", metavar="FOLDER", help="folder of tars; .idx files and manifest.json are written to it"
    )
    index.add_argument("--name", help="name of the set (the folder's)")
    add_license_option(index)
    return kinds


def _add_scenes(kinds: Any) -> None:
    scenes = add_command(kinds, "scenes", "render procedural scenes with exact depth", run=_run_scenes)
    scenes.add_argument(
        "output", metavar="OUT", help="folder of the new set, or an address as s3://bucket/set"
    )
    scenes.add_argument(
        "--look", choices=("synthetic", "photographic"), default="synthetic", help="%(default)s"
    )
    scenes.add_argument(
        "--layout",
        choices=("classic", "varied"),
        default="classic",
        help="varied: more viewpoints, close-ups and clutter (%(default)s)",
    )
    scenes.add_argument(
        "--count",
        type=int_in_range("--count", least=1),
        default=1024,
        metavar="N",
        help="number of scenes (%(default)s)",
    )
    scenes.add_argument(
        "--seed",
        type=int_in_range("--seed", least=0, most=2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the scenes (%(default)s)",
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
        help="records per shard (%(default)s)",
    )
    scenes.add_argument(
        "--fov",
        type=float_in_range("--fov", least=1, most=179, above=False, unit="degrees"),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the horizontal field of view, degrees (52 to 86, as the scenes of training)",
    )
    scenes.add_argument("--images-only", action="store_true", help="write images without depth")
    scenes.add_argument(
        "--classes", action="store_true", help="also write class maps, for stage=segmentation"
    )


def _add_captions(kinds: Any) -> None:
    captions = add_command(
        kinds, "captions", "pack photographs, or copy shards, with a caption of each image", run=_run_captions
    )
    captions.add_argument(
        "source", metavar="IMAGES", help="folder, text file with a path per line, tar, or a set of shards"
    )
    captions.add_argument(
        "captions", metavar="CAPTIONS", help="folder with NAME.txt for each image, or a csv or jsonl file"
    )
    captions.add_argument(
        "output", metavar="OUT", help="folder of the new set, or an address as s3://bucket/set"
    )
    add_writer_options(captions)


def _add_degraded(kinds: Any) -> None:
    degraded = add_command(
        kinds, "degraded", "copy a labeled set with the depth of a poor sensor", run=_run_degraded
    )
    degraded.add_argument("source", metavar="SET", help="folder or URL prefix of a set with depth in meters")
    degraded.add_argument(
        "output", metavar="OUT", help="folder of the new set, or an address as s3://bucket/set"
    )
    degraded.add_argument("--name", help="name of the set (the folder's)")
    degraded.add_argument(
        "--seed",
        type=int_in_range("--seed", least=0, most=10**9),
        default=0,
        metavar="N",
        help="seed of noise and holes (%(default)s)",
    )


def _add_catalog_set(kinds: Any, name: str, entry: CatalogEntry) -> None:
    """Add the command of a dataset of the catalog."""
    command = add_command(kinds, name, entry.help, run=_run_catalog_set)
    command.add_argument("source", metavar="RAW", help="folder that the set was downloaded or unpacked to")
    command.add_argument(
        "output", metavar="OUT", help="folder of the new set, or an address as s3://bucket/set"
    )
    add_writer_options(command, name=name)
    command.add_argument(
        "--leave-out",
        metavar="GLOB",
        nargs="*",
        help="names to leave out, such as 'amusement/*' (the set's default)",
    )
    if entry.labeled:
        add_sky_option(command)
    for option in entry.options:
        command.add_argument(
            option.name,
            choices=option.choices,
            default=option.default,
            type=Path if option.path else str,
            metavar="FILE" if option.path else None,
            help=option.help,
        )


def add_writer_options(command: argparse.ArgumentParser, *, name: str = "the folder's") -> None:
    """Add the options for writing any set; `name` describes the default of --name."""
    command.add_argument("--name", help=f"name of the set ({name})")
    command.add_argument(
        "--per-shard",
        type=int_in_range("--per-shard", least=1),
        default=1000,
        metavar="N",
        help="records per shard (%(default)s)",
    )
    command.add_argument(
        "--short-side",
        type=int_in_range("--short-side", least=1, most=MAX_SIDE_PX),
        metavar="N",
        help="resize larger images to this short side (no resizing)",
    )
    command.add_argument(
        "--part",
        type=_parse_part,
        default=(1, 1),
        metavar="K/N",
        help="write only the K-th of N parts, for example one per machine; parts in separate folders need merge (1/1)",
    )
    command.add_argument(
        "--workers",
        type=int_in_range("--workers", least=0, most=MAX_WORKERS),
        default=0,
        metavar="N",
        help="worker processes (none)",
    )
    add_license_option(command)


def add_sky_option(command: argparse.ArgumentParser) -> None:
    """Add the option for the sky."""
    command.add_argument(
        "--sky",
        choices=("far", "invalid"),
        help="how training treats the sky by default: as disparity 0, or not at all (the set's default)",
    )


def picture_path(text: str) -> Path:
    """Parse the path of a picture to write, and create its folder. Raises ValueError if it cannot be written."""
    from depth_anything.inference.overwrite import PICTURE_FORMATS

    path = Path(text)
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise ValueError(f"--output {text} is not a picture: type a file name that ends in .png or .jpg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--output {text} cannot be written: {error.filename} is not a folder") from error
    return path


def _parse_part(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part: the third of eight parts is 3/8")
    return int(k), int(n)


def add_license_option(command: argparse.ArgumentParser) -> None:
    """Add the option for the license of the images."""
    command.add_argument(
        "--licence",
        metavar="SPDX",
        help="license of the images, such as CC-BY-4.0; copied to models trained on them",
    )


def add_merge(commands: Any) -> None:
    """Add the command `merge`."""
    merge = add_command(
        commands,
        "merge",
        "merge the parts of a set that were written to several folders",
        run=_run_merge,
    )
    merge.add_argument(
        "output", metavar="OUT", help="folder of the whole set: a new folder, or that of a part"
    )
    merge.add_argument(
        "folders", metavar="FOLDER", nargs="*", help="folders of the other parts; they are not changed"
    )


def add_verify(commands: Any) -> None:
    """Add the command `verify`."""
    verify = add_command(commands, "verify", "read a whole set and report its problems", run=_run_verify)
    verify.add_argument("set", metavar="SET", help="folder or URL prefix of a set")
    verify.add_argument(
        "--decode", action="store_true", help="also decode every image and label, and compare their sizes"
    )
    verify.add_argument("--images", metavar="SET", help="image set of a label set; checks every pair")
    verify.add_argument(
        "--workers",
        type=int_in_range("--workers", least=1, most=MAX_WORKERS),
        default=1,
        metavar="N",
        help="shards read at the same time (%(default)s)",
    )


def add_view(commands: Any) -> None:
    """Add the command `view`."""
    view = add_command(commands, "view", "show records of a set of shards or labels", run=_run_view)
    view.add_argument("set", metavar="SET", help="folder or URL prefix of a set of shards or of labels")
    view.add_argument("--images", metavar="SET", help="image set of a label set")
    view.add_argument(
        "--count",
        type=int_in_range("--count", least=1),
        default=16,
        metavar="N",
        help="number of records, evenly spaced (%(default)s)",
    )
    view.add_argument("--output", metavar="FILE", default="sheet.png", help="picture to write (%(default)s)")


def _run_scenes(options: argparse.Namespace) -> None:
    from depth_anything.scenes.render import write_scenes
    from depth_anything.scenes.scene_set import SceneSetSpec

    height, width = options.size
    spec = SceneSetSpec(
        look=options.look,
        count=options.count,
        seed=options.seed,
        height=height,
        width=width,
        labelled=not options.images_only,
        layout=options.layout,
        classes=options.classes,
        fov=None if options.fov is None else (options.fov[0], options.fov[1]),
    )
    print_set(write_scenes(options.output, spec, per_shard=options.per_shard))


def _run_images(options: argparse.Namespace) -> None:
    from depth_anything.ingest.photographs import write_images

    print_write_result(write_images(options.source, options.output, **writer_options(options)), options)


def _run_captions(options: argparse.Namespace) -> None:
    from depth_anything.ingest.captions import CaptionedPhotographs, CaptionSource, write_captioned_set
    from depth_anything.ingest.writer import write_source

    if is_remote(options.source) or (Path(options.source) / "manifest.json").is_file():
        changed = {
            "--part": options.part != (1, 1),
            "--short-side": options.short_side,
            "--workers": options.workers,
        }
        for flag, typed in changed.items():
            if typed:
                raise UserError(
                    f"{flag} does not apply to a set of shards, which is copied", f"leave out {flag}"
                )
        result = write_captioned_set(
            options.source, options.captions, options.output, name=options.name, licence=options.licence
        )
        print_write_result(result, options)
        return
    source = CaptionedPhotographs(CaptionSource(Path(options.captions)), Path(options.output))
    print_write_result(
        write_source(source, options.source, options.output, **writer_options(options)), options
    )


def _run_degraded(options: argparse.Namespace) -> None:
    from depth_anything.ingest.degrade import write_degraded

    print_set(write_degraded(options.source, options.output, seed=options.seed, name=options.name))


def _run_catalog_set(options: argparse.Namespace) -> None:
    from depth_anything.ingest.writer import write_source

    names = sorted(option.name[2:].replace("-", "_") for option in SETS[options.kind].options)
    shard_set = write_source(
        load_source(options.kind),
        options.source,
        options.output,
        leave_out=options.leave_out,
        sky=getattr(options, "sky", None),
        **{**writer_options(options), "name": options.name or options.kind},
        **{name: getattr(options, name) for name in names if getattr(options, name) is not None},
    )
    print_write_result(shard_set, options)


def writer_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_writer_options` as keywords of `write_source`."""
    names = ("name", "per_shard", "short_side", "part", "workers", "licence")
    return {name: getattr(options, name) for name in names}


def print_write_result(shard_set: "ShardSet | None", options: argparse.Namespace) -> None:
    """Print what a set holds and which records were rejected; for a part, print the next step."""
    if shard_set is None:
        k, n = options.part
        print(
            f"part {k} of {n} is written. If the parts share the folder {escape_unprintable(options.output)}, the last "
            "one finishes the set; otherwise merge them:  depth-anything merge OUT FOLDER FOLDER …"
        )
        return
    print_set(shard_set)
    skipped = shard_set.meta.get("skipped")
    if skipped:
        reasons = sorted(skipped["reasons"].items(), key=lambda row: -row[1])
        summary = "; ".join(f"{count} x {reason}" for reason, count in reasons[:3])
        more = f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
        print(
            f"not taken:  {skipped['count']} ({escape_unprintable(summary)}{more}): see "
            f"{escape_unprintable(shard_set.root)}/*.skipped.json"
        )
    for kind, count in shard_set.meta.get("left_out", {}).items():
        print(f"left out:   {count} {escape_unprintable(kind)}")


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
        total = None  # verify_set reports the error
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
        raise ValueError(f"{options.set} holds labels without images: add --images and the image set")
    records = JoinedRecords(open_set(options.images), shard_set) if options.images else shard_set

    def printed_frames() -> "Iterator[Frame]":
        for frame in read_frames(records, limit=options.count):
            print("  ".join(map(escape_unprintable, describe_frame(frame))))
            yield frame

    save_picture(contact_sheet(printed_frames()), picture, made_by=_COMMAND_NAME)
    print(f"drawn: {escape_unprintable(options.output)}")


def print_set(shard_set: "ShardSet") -> None:
    """Print facts about a set, one per line."""
    from depth_anything.evaluation.frames import describe_set

    for name, value in describe_set(shard_set).items():
        print(f"{name + ':':<10} {escape_unprintable(value)}")
