"""The datasets that `depth-anything shard` knows by name. A dataset's module is imported on first use."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class SetOption:
    """A command line option of one dataset, passed to its `find` as a keyword.

    Attributes:
        name: As it is typed: "--split".
        help: Its help text.
        choices: Allowed values; None: any.
        default: Value if it is not typed.
        path: The value is the path of a file.
    """

    name: str
    help: str
    choices: tuple[str, ...] | None = None
    default: str | None = None
    path: bool = False


@dataclass(frozen=True)
class CatalogEntry:
    """A dataset.

    Attributes:
        location: "module" in `ingest.sets`, or "module:name" of an object in it.
        help: Its title and content.
        labeled: It has depth or disparity.
        options: Its own command line options.
    """

    location: str
    help: str
    labeled: bool = False
    options: tuple[SetOption, ...] = ()


SETS: dict[str, CatalogEntry] = {
    "blendedmvs": CatalogEntry(
        "blendedmvs", "BlendedMVS, all three parts: scenes reconstructed from photographs", labeled=True
    ),
    "hypersim": CatalogEntry(
        "hypersim",
        "Hypersim: rendered interiors",
        labeled=True,
        options=(
            SetOption(
                "--split",
                "published split; all reads every frame in RAW",
                ("train", "val", "test", "all"),
                "train",
            ),
            SetOption(
                "--images",
                "preview stores the JPEG previews; hdr tone-maps the float colors as the authors do",
                ("preview", "hdr"),
                "preview",
            ),
            SetOption("--cameras", "metadata_camera_parameters.csv, if it is not in RAW", path=True),
        ),
    ),
    "irs": CatalogEntry(
        "irs", "IRS: rendered homes, offices, restaurants and stores in stereo", labeled=True
    ),
    "tartanair": CatalogEntry(
        "tartanair", "TartanAir: camera flights through rendered environments", labeled=True
    ),
    "vkitti2": CatalogEntry(
        "vkitti2",
        "Virtual KITTI 2: rendered drives",
        labeled=True,
        options=(SetOption("--camera", "left, right or both", ("0", "1", "both"), "0"),),
    ),
    "tartanair2": CatalogEntry(
        "tartanair2",
        "TartanAir V2: 65 more environments, twelve cameras",
        labeled=True,
        options=(SetOption("--camera", "such as lcam_front or rcam_back; or all", None, "lcam_front"),),
    ),
    "diml": CatalogEntry(
        "diml", "DIML/CVL RGB-D: indoor and outdoor scenes, measured; used by V1", labeled=True
    ),
    "hrwsi": CatalogEntry(
        "hrwsi",
        "HR-WSI: stereo photographs from the web; used by V1",
        labeled=True,
        options=(SetOption("--split", "published split", ("train", "val", "all"), "train"),),
    ),
    "megadepth": CatalogEntry(
        "megadepth", "MegaDepth v1: tourist photographs with reconstructed depth; used by V1", labeled=True
    ),
    "bdd100k": CatalogEntry(
        "unlabeled:bdd100k", "BDD100K: driving; its videos at 2 frames per second, or images"
    ),
    "landmarks": CatalogEntry("unlabeled:landmarks", "Google Landmarks v2"),
    "imagenet21k": CatalogEntry("unlabeled:imagenet21k", "ImageNet-21K"),
    "lsun": CatalogEntry("unlabeled:lsun", "LSUN: scenes, LMDB"),
    "objects365": CatalogEntry("unlabeled:objects365", "Objects365 v2"),
    "openimages": CatalogEntry("unlabeled:openimages", "Open Images V7"),
    "places365": CatalogEntry("unlabeled:places365", "Places365"),
    "cityscapes": CatalogEntry(
        "cityscapes",
        "Cityscapes: streets with class maps, for stage=segmentation",
        options=(SetOption("--split", "published split", ("train", "val", "test", "all"), "train"),),
    ),
    "ade20k": CatalogEntry(
        "ade20k",
        "ADE20K scene parsing: photographs with maps of 150 classes, for stage=segmentation",
        options=(SetOption("--split", "published split", ("training", "validation", "all"), "training"),),
    ),
    "sa1b": CatalogEntry("unlabeled:sa1b", "SA-1B: Segment Anything, tars as published"),
}
"""Name to entry. Each labeled set is a module of its own."""


def load_source(name: str) -> Any:
    """Import the source of a dataset; raises KeyError if the catalog does not have the name."""
    module, _, member = SETS[name].location.partition(":")
    source = import_module(f"depth_anything.ingest.sets.{module}")
    return getattr(source, member) if member else source
