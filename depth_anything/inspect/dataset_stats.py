"""Statistics of a set of shards: records, bytes, sizes, kinds of pixels, and the distribution of depth."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from depth_anything.classes import IGNORED, read_class_table
from depth_anything.data import codec
from depth_anything.data.address import redact_secrets
from depth_anything.data.reader import Records
from depth_anything.data.sample import CONFIDENCE_FIELD, IMAGE_FIELDS, decode_labels
from depth_anything.data.tars import ShardSet
from depth_anything.evaluation.frames import evenly_spaced, locate_record
from depth_anything.ingest.custom import read_image_size
from depth_anything.inspect.histogram import ValueHistogram, draw_histograms
from depth_anything.progress import ProgressLine


@dataclass
class DatasetStats:
    """Statistics of a sample of a set's records.

    Attributes:
        records: number of records read.
        field_bytes: of their fields, by kind: image, json, depth, disparity or other.
        record_bytes: of each record.
        images: (height, width) of each image.
        maps: (height, width) of each label.
        histograms: of depth and disparity, those that occur.
        confidences: mean of each confidence map, and its share below 0.5.
        crops: number of crops with labels of their own.
        class_pixels: pixels of each class, by number; 255 is ignored.
        bad: which records cannot be read, and why.
    """

    records: int = 0
    field_bytes: Counter[str] = field(default_factory=Counter)
    record_bytes: list[int] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    maps: list[tuple[int, int]] = field(default_factory=list)
    histograms: dict[str, ValueHistogram] = field(default_factory=dict)
    confidences: list[tuple[float, float]] = field(default_factory=list)
    crops: int = 0
    class_pixels: Counter[int] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, fields: Mapping[str, bytes], *, unit: str) -> None:
        """Count a record; ValueError if it cannot be decoded."""
        labels = decode_labels(fields)
        classes = labels.pop("classes", None)
        if classes is not None:
            counts = np.bincount(classes.ravel())
            self.class_pixels.update(
                {number: int(counts[number]) for number in np.flatnonzero(counts).tolist()}
            )
        image = next((data for name, data in fields.items() if name in IMAGE_FIELDS), None)
        if image is not None:
            self.images.append(read_image_size(image))
        for quantity, label in labels.items():
            self.maps.append(label.shape)
            self.histograms.setdefault(quantity, ValueHistogram(quantity, unit=unit)).add(label)
        if CONFIDENCE_FIELD in fields:
            confidence = codec.decode(fields[CONFIDENCE_FIELD])
            self.confidences.append((float(confidence.mean()), float((confidence < 0.5).mean())))
        self.crops += sum(name.startswith("crop") and ".disparity." in name for name in fields)
        self.records += 1
        self.record_bytes.append(sum(map(len, fields.values())))
        for name, data in fields.items():
            kind = "image" if name in IMAGE_FIELDS else name.partition(".")[0]
            self.field_bytes[
                kind if kind in ("image", "json", "depth", "disparity", "classes") else "other"
            ] += len(data)


def compute_stats(shard_set: ShardSet, *, sample: int) -> DatasetStats:
    """Read at most `sample` records of a set, evenly spaced."""
    stats, records = DatasetStats(), Records(shard_set)
    ends = list(accumulate(count for _, count in records.shards))
    numbers = evenly_spaced(ends[-1], sample)
    with ProgressLine(f"reading {shard_set.name}", total=len(numbers)) as progress:
        for number in numbers:
            shard, index = locate_record(records, number, ends=ends)
            try:
                stats.add(records.read(shard, index)[1], unit=shard_set.meta.get("unit", "m"))
            except (ValueError, MemoryError) as error:
                stats.bad.append(str(error) or f"{shard}: it needs more memory than there is")
            progress.update()
    return stats


def format_stats(shard_set: ShardSet, stats: DatasetStats) -> list[str]:
    """Format the statistics as lines of text."""
    meta, count, shards = shard_set.meta, max(stats.records, 1), len(shard_set.shards)
    sizes = ", ".join(f"{kind} {size / count / 1e3:.4g} kB" for kind, size in stats.field_bytes.most_common())
    lines = [
        f"set:        {shard_set.name} in {redact_secrets(shard_set.root)}",
        f"records:    {shard_set.records:,} in {shards:,} shards, {shard_set.bytes / 1e6:,.1f} MB",
        f"licence:    {meta.get('licence') or 'unknown'}",
        f"sample:     {stats.records:,} records, evenly spaced",
        f"a record:   {sum(stats.record_bytes) / count / 1e3:.4g} kB: {sizes}",
        f"images:     {format_common_sizes(stats.images) or 'none'}",
    ]
    if meta.get("kind") == "labels":
        lines.append(f"labels of:  {meta['images']['set']}, by {meta['teacher'].get('file', 'a teacher')}")
    if stats.maps and stats.maps != stats.images:
        lines.append(f"maps:       {format_common_sizes(stats.maps)}")
    for histogram in stats.histograms.values():
        lines += _format_histogram(histogram)
    if stats.class_pixels:
        lines.append(f"classes:    {_format_classes(shard_set, stats.class_pixels)}")
    elif not stats.histograms:
        lines.append("labels:     none")
    if stats.confidences:
        mean, low = np.mean(stats.confidences, axis=0)
        lines.append(f"confidence: {mean:.2f} on average, {low:.1%} of the pixels below 0.5")
    if stats.crops:
        lines.append(f"crops:      {stats.crops / count:.3g} per record, each with a label of its own")
    if "pixels" in meta:
        total = max(meta["pixels"].get("all", 0), 1)
        kinds = sorted(((n, kind) for kind, n in meta["pixels"].items() if kind != "all"), reverse=True)
        shares = ", ".join(f"{kind} {n / total:.1%}" for n, kind in kinds)
        lines.append(f"all pixels: {shares} (of the whole set, counted when it was written)")
    skipped = meta.get("skipped")
    if isinstance(skipped, dict):
        lines.append(f"not taken:  {skipped['count']:,} when it was written: see NAME.skipped.json")
    elif skipped:  # a label set
        lines.append(f"no label:   {skipped:,} images: see NAME.json")
    if stats.bad:
        lines.append(f"unreadable: {len(stats.bad)} of the sample, for example {stats.bad[0]}")
    return lines


def _format_classes(shard_set: ShardSet, pixels: Counter[int]) -> str:
    """Name the classes with their shares of the pixels, the most frequent first; 255 is ignored."""
    names = {number: row.name for number, row in enumerate(read_class_table(shard_set.meta, shard_set.root))}
    names[IGNORED] = "ignored"
    total = pixels.total()
    return ", ".join(
        f"{names.get(number, number)} {count / total:.1%}" for number, count in pixels.most_common()
    )


def format_common_sizes(sizes: Iterable[tuple[int, int]]) -> str:
    """Name the three most common sizes, width first, and the number of others."""
    counts = Counter(sizes)
    named = ", ".join(f"{width} x {height} ({count:,})" for (height, width), count in counts.most_common(3))
    return named + (f" and {len(counts) - 3} other sizes" if len(counts) > 3 else "")


def draw_stats(shard_set: ShardSet, stats: DatasetStats) -> np.ndarray:
    """Draw the distribution of depth or disparity, short sides and bytes, uint8 (H,W,3) RGB."""
    sides = [float(min(size)) for size in stats.images or stats.maps]
    kilobytes = [size / 1e3 for size in stats.record_bytes]
    return draw_histograms(
        next(iter(stats.histograms.values()), None),
        [("short side, px", sides), ("kB per record", kilobytes)],
        title=f"{shard_set.name}: {shard_set.records:,} records, {shard_set.bytes / 1e6:,.1f} MB",
    )


def _format_histogram(histogram: ValueHistogram) -> list[str]:
    shares = ", ".join(f"{kind} {histogram.share(kind):.1%}" for kind in ("valid", "sky", "unknown"))
    lines = [f"pixels:     {shares} (of the sample)"]
    if not histogram.pixels["valid"]:
        return lines
    span = f"{histogram.low:.4g} to {histogram.high:.4g}"
    if histogram.quantity == "disparity":
        half = f"half of each map is below {histogram.quantile(0.5):.0%} of its range"
        return [*lines, f"disparity:  {span}; {half}"]
    below = ", ".join(f"{share:.0%} below {histogram.quantile(share):.3g}" for share in (0.01, 0.5, 0.99))
    return [*lines, f"depth:      {span} {histogram.unit}: {below}"]
