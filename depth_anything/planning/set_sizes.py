"""Records and shards of the sets of a run: from manifests where the sets exist, else from the paper or as typed."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from depth_anything.data.address import is_remote
from depth_anything.data.shards import open_set
from depth_anything.errors import UserError
from depth_anything.planning.assumptions import PAPER_RECORDS, RECORDS_PER_SHARD
from depth_anything.training.config import RunConfig


@dataclass(frozen=True)
class SetSize:
    """Size of one set, or of several together.

    Attributes:
        records: Number of records.
        shards: Number of shards.
        bytes: Size of the tars, if all of it is known from manifests; else None.
    """

    records: int
    shards: int
    bytes: int | None = None


def total_size(config: RunConfig, sets: Mapping[str, str], typed: Mapping[str, int]) -> SetSize:
    """Add up the sets of a run; remote sets are not opened.

    Args:
        config: Of the run, for the scenes that it would draw.
        sets: Name to folder or URL.
        typed: Name to number of records, as typed; it has priority.

    Raises:
        UserError: If the size of a set is known from nowhere.
    """
    sizes = [_set_size(config, name, str(root), typed) for name, root in sets.items()]
    known = [size.bytes for size in sizes if size.bytes is not None]
    return SetSize(
        records=sum(size.records for size in sizes),
        shards=sum(size.shards for size in sizes),
        bytes=sum(known) if len(known) == len(sizes) else None,
    )


def _set_size(config: RunConfig, name: str, root: str, typed: Mapping[str, int]) -> SetSize:
    if name in typed:
        return _estimate(typed[name])
    if not is_remote(root) and (Path(root) / "manifest.json").is_file():
        found = open_set(root, check=False)
        return SetSize(found.records, len(found.shards), found.bytes)
    drawn = [scene for scene in config.sources.scenes.values() if str(scene.root) == root]
    if drawn:
        return SetSize(drawn[0].count, ceil(drawn[0].count / drawn[0].per_shard))
    if name in PAPER_RECORDS:
        return _estimate(PAPER_RECORDS[name])
    raise UserError(
        f"the number of images of {name} is not known: there is no manifest at {root}",
        f"write the set first, or type --records {name}=NUMBER",
    )


def _estimate(records: int) -> SetSize:
    return SetSize(records, ceil(records / RECORDS_PER_SHARD))
