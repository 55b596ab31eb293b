"""What models are judged on: any labelled shard set, and the baseline that looks at no image."""

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
"""Metres, for sets whose manifest names no `max_depth`."""


def read_frames(
    shards: str | Path | ShardSet | Records | JoinedRecords,
    *,
    limit: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Frame]:
    """Decode the frames of a shard set one by one, in the order of its shards.

    Args:
        shards: folder or URL prefix of a set, or one already open.
        limit: so many frames, evenly spaced over the set; all of them where it has fewer.
        rank: which share to read, of
        ranks: so many; the shares are disjoint and together are everything.

    Raises:
        ValueError: no such set, or (as BadRecord) a record that cannot be read: no benchmark has holes.
    """
    records = shards
    if isinstance(records, str | Path):
        records = open_set(str(records))
    if isinstance(records, ShardSet):
        records = Records(records)
    ends = list(accumulate(count for _, count in records.shards))
    for number in evenly_spaced(ends[-1], limit)[rank::ranks]:
        yield read_frame(records, number, ends=ends)


def read_frame(records: Records | JoinedRecords, number: int, *, ends: Sequence[int]) -> Frame:
    """Decode one frame of an open set, counted from 0 over its shards, of which `ends` are the running counts."""
    shard = bisect_right(ends, number)
    name, count = records.shards[shard]
    index = number - (ends[shard] - count)
    return _decode(name, index, *records.read(name, index))


def evenly_spaced(total: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `total`, evenly spaced from 0 on; all of them without a limit."""
    if limit is None or limit >= total:
        return list(range(total))
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return [number * total // limit for number in range(limit)]


def _decode(shard: str, index: int, key: str, fields: dict[str, bytes]) -> Frame:
    try:
        return decode_record(key, fields)
    except ValueError as error:
        raise BadRecord(shard, index, key, str(error)) from error


def max_depth_from_manifest(shard_set: ShardSet) -> float:
    """How far, in metres, a set's truth is compared: `max_depth` of its manifest's meta, else 80."""
    return float(shard_set.meta.get("max_depth", DEFAULT_MAX_DEPTH))


def describe_set(shard_set: ShardSet) -> dict[str, Any]:
    """What a set is, for people: counts, digest, and its meta, a line each."""
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
        words = ", ".join(f"{name} {v}" for name, v in inner if isinstance(v, str | int | float))
        if words or isinstance(value, str | int | float):
            facts.setdefault(key, words or value)
    return facts


class MeanMap:
    """A baseline with a predictor's interface: the same disparity map for every image, stretched to its size.

    What a network must beat to show that it looks at the image and not only knows that floors are below.

    Attributes:
        map: float32 (h,w) disparity, 0 to 1, larger is nearer.
    """

    quantity = "disparity"
    unit = "relative"

    def __init__(self, map_: np.ndarray) -> None:
        """Keep the map."""
        self.map = map_

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The map at the size of each (H,W,3) image, float32 (H,W), whatever the image shows."""
        return [cv2.resize(self.map, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) for image in images]


def compute_mean_map(frames: Iterable[Frame], *, size: int = 64) -> MeanMap:
    """The mean disparity of a training set, as a baseline.

    Each frame's disparity is scaled to 0…1 by its own range before it is averaged over its valid pixels: else
    the nearest scenes would be all of the mean. Sky counts as 0.

    Args:
        frames: labelled frames of any sizes.
        size: side of the square map kept, in pixels.

    Raises:
        ValueError: no frame has a valid pixel.
    """
    total, weight = np.zeros((size, size)), np.zeros((size, size))
    for frame in frames:
        disparity, valid = make_disparity_target(frame)
        if not valid.any():
            continue
        low, high = disparity[valid].min(), disparity[valid].max()
        unit = np.where(valid, (disparity - low) / max(high - low, 1e-12), 0.0).astype(np.float32)
        total += cv2.resize(unit, (size, size), interpolation=cv2.INTER_AREA)
        weight += cv2.resize(valid.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    if not weight.any():
        raise ValueError("no mean map: no frame of the training set has a valid pixel")
    seen = weight > 0
    total[~seen] = total[seen].sum() / weight[seen].sum()
    return MeanMap((total / np.where(seen, weight, 1.0)).astype(np.float32))
