"""What a set of shards holds, in numbers: records, bytes, sizes, what its pixels are, how far they lie."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from depth_anything.data import address
from depth_anything.data.reader import Records
from depth_anything.data.sample import IMAGE_FIELDS, decode_labels
from depth_anything.data.tars import ShardSet
from depth_anything.evaluation.frames import evenly_spaced
from depth_anything.ingest.custom import read_image_size
from depth_anything.inspect.histogram import ValueHistogram, draw_histograms
from depth_anything.progress import ProgressLine


@dataclass
class DatasetStats:
    """Facts of a sample of a set's records.

    Attributes:
        records: Looked at.
        bytes: Of all their fields, by what they are: image, json, depth or disparity, other.
        whole: Bytes of each record.
        images: (height, width) of each image.
        maps: (height, width) of each label.
        tallies: Of depth, of disparity: those that occur.
        bad: What cannot be read, and why.
    """

    records: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    whole: list[int] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    maps: list[tuple[int, int]] = field(default_factory=list)
    histograms: dict[str, ValueHistogram] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)


def compute_stats(shard_set: ShardSet, *, sample: int) -> DatasetStats:
    """Look at so many records of a set, evenly spaced; at all, where it has fewer."""
    stats, records = DatasetStats(), Records(shard_set)
    ends = np.cumsum([count for _, count in records.shards])
    numbers = evenly_spaced(int(ends[-1]), sample)
    with ProgressLine(f"reading {shard_set.name}", total=len(numbers)) as progress:
        for number in numbers:
            shard = int(np.searchsorted(ends, number, side="right"))
            name, count = records.shards[shard]
            try:
                key, fields = records.read(name, number - (int(ends[shard]) - count))
                _add_record(stats, fields, unit=shard_set.meta.get("unit", "m"))
            except (ValueError, MemoryError) as error:
                stats.bad.append(str(error) or f"{name}: it needs more memory than there is")
            progress.update()
    return stats


def _add_record(stats: DatasetStats, fields: dict[str, bytes], *, unit: str) -> None:
    labels = decode_labels(fields)
    image = next((data for name, data in fields.items() if name in IMAGE_FIELDS), None)
    if image is not None:
        stats.images.append(read_image_size(image))
    for quantity, label in labels.items():
        stats.maps.append(label.shape)
        stats.histograms.setdefault(quantity, ValueHistogram(quantity, unit=unit)).add(label)
    stats.records += 1
    stats.whole.append(sum(map(len, fields.values())))
    for name, data in fields.items():
        first = name.partition(".")[0]
        known = "image" if name in IMAGE_FIELDS else first
        stats.bytes[known if known in ("image", "json", "depth", "disparity") else "other"] += len(data)


def format_stats(shard_set: ShardSet, stats: DatasetStats) -> list[str]:
    """The facts as lines for people."""
    meta, count = shard_set.meta, max(stats.records, 1)
    each = ", ".join(f"{what} {size / count / 1e3:.4g} kB" for what, size in stats.bytes.most_common())
    shards = len(shard_set.shards)
    lines = [
        f"set:        {shard_set.name} in {address.redact_secrets(shard_set.root)}",
        f"records:    {shard_set.records:,} in {shards:,} shards, {shard_set.bytes / 1e6:,.1f} MB",
        f"licence:    {meta.get('licence') or 'not said'}",
        f"sample:     {stats.records:,} records, evenly spaced",
        f"a record:   {sum(stats.whole) / count / 1e3:.4g} kB: {each}",
        f"images:     {format_common_sizes(stats.images) or 'none'}",
    ]
    if meta.get("kind") == "labels":
        lines.append(f"labels of:  {meta['images']['set']}, by {meta['teacher'].get('file', 'a teacher')}")
    if stats.maps and stats.maps != stats.images:
        lines.append(f"maps:       {format_common_sizes(stats.maps)}")
    for tally in stats.histograms.values():
        lines += _format_histogram(tally)
    if not stats.histograms:
        lines.append("labels:     none")
    if "pixels" in meta:
        lines.append(
            f"all pixels: {_format_pixel_kinds(meta['pixels'])} (of the whole set, counted when it was written)"
        )
    skipped = meta.get("skipped")
    if isinstance(skipped, dict):
        lines.append(f"not taken:  {skipped['count']:,} when it was written: see NAME.skipped.json")
    elif skipped:  # of labels
        lines.append(f"no label:   {skipped:,} images: see NAME.json")
    if stats.bad:
        lines.append(f"unreadable: {len(stats.bad)} of the sample, as {stats.bad[0]}")
    return lines


def _format_histogram(tally: ValueHistogram) -> list[str]:
    shares = ", ".join(f"{kind} {tally.share(kind):.1%}" for kind in ("valid", "sky", "unknown"))
    lines = [f"pixels:     {shares} (of the sample)"]
    if not tally.pixels["valid"]:
        return lines
    span = f"{tally.low:.4g} to {tally.high:.4g}"
    if tally.quantity == "disparity":
        return [
            *lines,
            f"disparity:  {span}; half of each map lies below {tally.quantile(0.5):.0%} of its range",
        ]
    below = ", ".join(f"{share:.0%} below {tally.quantile(share):.3g}" for share in (0.01, 0.5, 0.99))
    return [*lines, f"depth:      {span} {tally.unit}: {below}"]


def _format_pixel_kinds(pixels: dict[str, int]) -> str:
    total = max(pixels.get("all", 0), 1)
    rows = sorted(((count, kind) for kind, count in pixels.items() if kind != "all"), reverse=True)
    return ", ".join(f"{kind} {count / total:.1%}" for count, kind in rows)


def format_common_sizes(sizes: Iterable[tuple[int, int]]) -> str:
    """Name the three most common sizes, width first, and how many others there are."""
    counts = Counter(sizes)
    named = ", ".join(f"{width} x {height} ({count:,})" for (height, width), count in counts.most_common(3))
    return named + (f" and {len(counts) - 3} other sizes" if len(counts) > 3 else "")


def draw_stats(shard_set: ShardSet, stats: DatasetStats) -> np.ndarray:
    """Draw how depth or disparity, short sides and bytes are spread, uint8 (H, W, 3) RGB."""
    tally = next(iter(stats.histograms.values()), None)
    sides = [float(min(size)) for size in stats.images or stats.maps]
    others: list[tuple[str, list[float]]] = [
        ("short side, px", sides),
        ("kB a record", [size / 1e3 for size in stats.whole]),
    ]
    title = f"{shard_set.name}: {shard_set.records:,} records, {shard_set.bytes / 1e6:,.1f} MB"
    return draw_histograms(tally, others, title=title)
