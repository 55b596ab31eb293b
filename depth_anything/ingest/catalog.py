"""Every set that `depth-anything shard` knows by name, and where its source is; nothing is imported before use."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class SetOption:
    """An option of a set's own, which its `find` takes by keyword.

    Attributes:
        name: As typed: "--split".
        help: What it means.
        choices: What it may be; None: anything.
        default: Where it is not typed.
        path: It names a file.
    """

    name: str
    help: str
    choices: tuple[str, ...] | None = None
    default: str | None = None
    path: bool = False


@dataclass(frozen=True)
class CatalogEntry:
    """A set of the catalogue.

    Attributes:
        where: "module" below this package, or "module:name in it".
        help: Its makers' name and what is in it.
        labelled: It has depth or disparity.
        flags: Of its own.
    """

    where: str
    help: str
    labelled: bool = False
    flags: tuple[SetOption, ...] = ()


SETS: dict[str, CatalogEntry] = {
    "blendedmvs": CatalogEntry(
        "sets.blendedmvs", "BlendedMVS, all three parts: scenes rebuilt from photographs", labelled=True
    ),
    "hypersim": CatalogEntry(
        "sets.hypersim",
        "Hypersim: rendered interiors",
        labelled=True,
        flags=(
            SetOption(
                "--split",
                "of the published ones; all takes what lies there",
                ("train", "val", "test", "all"),
                "train",
            ),
            SetOption(
                "--images",
                "the preview as it is, or the makers' tone mapping of the colours in float",
                ("preview", "hdr"),
                "preview",
            ),
            SetOption("--cameras", "metadata_camera_parameters.csv, if it does not lie in RAW", path=True),
        ),
    ),
    "irs": CatalogEntry(
        "sets.irs", "IRS: rendered homes, offices, restaurants and stores in stereo", labelled=True
    ),
    "tartanair": CatalogEntry("sets.tartanair", "TartanAir: flights through rendered places", labelled=True),
    "vkitti2": CatalogEntry(
        "sets.vkitti2",
        "Virtual KITTI 2: drives, rendered",
        labelled=True,
        flags=(SetOption("--camera", "left, right or both", ("0", "1", "both"), "0"),),
    ),
    "tartanair2": CatalogEntry(
        "sets.tartanair2",
        "TartanAir V2: 65 more places, twelve cameras",
        labelled=True,
        flags=(SetOption("--camera", "as lcam_front, rcam_back; or all", None, "lcam_front"),),
    ),
    "diml": CatalogEntry("sets.diml", "DIML/CVL RGB-D: rooms and streets, measured; of V1", labelled=True),
    "hrwsi": CatalogEntry(
        "sets.hrwsi",
        "HR-WSI: photographs from the web, matched in stereo; of V1",
        labelled=True,
        flags=(SetOption("--split", "of the published ones", ("train", "val", "all"), "train"),),
    ),
    "megadepth": CatalogEntry(
        "sets.megadepth", "MegaDepth v1: tourists' photographs, rebuilt; of V1", labelled=True
    ),
    "bdd100k": CatalogEntry(
        "sets.unlabeled:bdd100k", "BDD100K: driving; its videos at 2 frames a second, or images"
    ),
    "landmarks": CatalogEntry("sets.unlabeled:landmarks", "Google Landmarks v2"),
    "imagenet21k": CatalogEntry("sets.unlabeled:imagenet21k", "ImageNet-21K"),
    "lsun": CatalogEntry("sets.unlabeled:lsun", "LSUN: scenes, lmdb"),
    "objects365": CatalogEntry("sets.unlabeled:objects365", "Objects365 v2"),
    "openimages": CatalogEntry("sets.unlabeled:openimages", "Open Images V7"),
    "places365": CatalogEntry("sets.unlabeled:places365", "Places365"),
    "sa1b": CatalogEntry("sets.unlabeled:sa1b", "SA-1B: Segment Anything, tars as published"),
}
"""Name to entry. A labelled set is a module of its own."""


def load_source(name: str) -> Any:
    """Import the source of a set; KeyError if the catalogue has none of this name."""
    module, _, member = SETS[name].where.partition(":")
    source = import_module(f"depth_anything.ingest.{module}")
    return getattr(source, member) if member else source
