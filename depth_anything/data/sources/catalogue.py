"""Every set that `depth-anything shard` knows by name, and where its source is; nothing is imported before use."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Flag:
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
class Entry:
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
    flags: tuple[Flag, ...] = ()


SETS: dict[str, Entry] = {
    "bdd100k": Entry("unlabelled:bdd100k", "BDD100K: driving; its videos at 2 frames a second, or images"),
    "landmarks": Entry("unlabelled:landmarks", "Google Landmarks v2"),
    "imagenet21k": Entry("unlabelled:imagenet21k", "ImageNet-21K"),
    "lsun": Entry("unlabelled:lsun", "LSUN: scenes, lmdb"),
    "objects365": Entry("unlabelled:objects365", "Objects365 v2"),
    "openimages": Entry("unlabelled:openimages", "Open Images V7"),
    "places365": Entry("unlabelled:places365", "Places365"),
    "sa1b": Entry("unlabelled:sa1b", "SA-1B: Segment Anything, tars as published"),
}
"""Name to entry. A labelled set is a module of its own."""


def load(name: str) -> Any:
    """Import the source of a set; KeyError if the catalogue has none of this name."""
    module, _, member = SETS[name].where.partition(":")
    source = import_module(f"depth_anything.data.sources.{module}")
    return getattr(source, member) if member else source
