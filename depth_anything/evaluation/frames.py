"""Frames of labeled shard sets for evaluation, and a baseline that ignores the image."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depth_anything.data.address import redact_secrets
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.sample import Frame, decode_record, make_disparity_target
from depth_anything.data.shards import open_set
from depth_anything.data.tars import BadRecord, ShardSet

DEFAULT_MAX_DEPTH = 80.0
"""Meters, for sets whose manifest has no `max_depth`."""


def read_frames(
    shards: str | Path | ShardSet | Records | JoinedRecords,
    *,
    limit: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Frame]:
    """Decode the frames of a shard set one by one, in the order of its shards.

    Args:
        shards: folder or URL prefix of a set, or an open one.
        limit: number of frames, evenly spaced over the set; None: all.
        rank: which share to read.
        ranks: number of shares; they are disjoint and together are everything.

    Raises:
        ValueError: no such set, or (as BadRecord) a record that cannot be read; records are never skipped.
    """
    records = open_set(str(shards)) if isinstance(shards, str | Path) else shards
    if isinstance(records, ShardSet):
        records = Records(records)
    ends = list(accumulate(count for _, count in records.shards))
    for number in evenly_spaced(ends[-1], limit)[rank::ranks]:
        yield read_frame(records, number, ends=ends)


def read_frame(records: Records | JoinedRecords, number: int, *, ends: Sequence[int]) -> Frame:
    """Decode frame `number` of an open set; arguments as for `locate_record`."""
    shard, index = locate_record(records, number, ends=ends)
    key, fields = records.read(shard, index)
    try:
        return decode_record(key, fields)
    except ValueError as error:
        raise BadRecord(shard, index, key, str(error)) from error


def locate_record(records: Records | JoinedRecords, number: int, *, ends: Sequence[int]) -> tuple[str, int]:
    """The shard of record `number` of a set, from 0, and its index there; `ends` are the running counts of records."""
    place = bisect_right(ends, number)
    shard, count = records.shards[place]
    return shard, number - (ends[place] - count)


def evenly_spaced(total: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `total`, evenly spaced from 0; all of them if `limit` is None."""
    if limit is None or limit >= total:
        return list(range(total))
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return [number * total // limit for number in range(limit)]


def max_depth_from_manifest(shard_set: ShardSet) -> float:
    """The largest depth that is compared on a set, in meters: `max_depth` of its manifest's meta, else 80."""
    return float(shard_set.meta.get("max_depth", DEFAULT_MAX_DEPTH))


def describe_set(shard_set: ShardSet) -> dict[str, Any]:
    """The facts of a set for people: counts, digest, and its meta."""
    facts: dict[str, Any] = {
        "set": shard_set.name,
        "where": redact_secrets(shard_set.root),
        "digest": shard_set.digest,
        "records": shard_set.records,
        "shards": len(shard_set.shards),
        "megabytes": round(shard_set.bytes / 1e6, 1),
    }
    for key, value in shard_set.meta.items():
        inner = value.items() if isinstance(value, dict) else ()
        text = ", ".join(f"{name} {v}" for name, v in inner if isinstance(v, str | int | float))
        if text or isinstance(value, str | int | float):
            facts.setdefault(key, text or value)
    return facts


class MeanMap:
    """A baseline with a predictor's interface: the same disparity map for every image, resized to it.

    A network must beat it to show that it uses the image and has not only learned that floors are below.

    Attributes:
        map: float32 (h,w) disparity, 0 to 1, larger is nearer.
    """

    quantity = "disparity"
    unit = "relative"

    def __init__(self, map_: np.ndarray) -> None:
        """Keep the map."""
        self.map = map_

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The map at the size of each (H,W,3) image, float32 (H,W)."""
        return [cv2.resize(self.map, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) for image in images]


def compute_mean_map(frames: Iterable[Frame], *, size: int = 64) -> MeanMap:
    """Average the disparity of a training set.

    Each frame's disparity is scaled to its own range, 0 to 1, before it is averaged over its valid pixels; otherwise
    the nearest scenes would dominate. Sky counts as 0.

    Args:
        frames: labeled frames of any sizes.
        size: side of the square map, in pixels.

    Raises:
        ValueError: no frame has a valid pixel.
    """
    total, weight = np.zeros((size, size)), np.zeros((size, size))
    for frame in frames:
        disparity, valid = make_disparity_target(frame)
        if not valid.any():
            continue
        low, high = disparity[valid].min(), disparity[valid].max()
        scaled = np.where(valid, (disparity - low) / max(high - low, 1e-12), 0.0).astype(np.float32)
        total += cv2.resize(scaled, (size, size), interpolation=cv2.INTER_AREA)
        weight += cv2.resize(valid.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    if not weight.any():
        raise ValueError("no mean map: no frame of the training set has a valid pixel")
    filled = weight > 0
    total[~filled] = total[filled].sum() / weight[filled].sum()
    return MeanMap((total / np.where(filled, weight, 1.0)).astype(np.float32))
