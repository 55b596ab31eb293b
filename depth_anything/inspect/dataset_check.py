"""Check a custom data set before it is written to shards: sizes, values, likely mistakes, and a picture."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from depth_anything.data.sample import decode_image
from depth_anything.evaluation.frames import evenly_spaced
from depth_anything.ingest import maps
from depth_anything.ingest.custom import CustomSet, check_aspect_ratio, read_image_size
from depth_anything.ingest.file_pairs import FilePairs, PairedFiles, printable_path
from depth_anything.ingest.record import mask_invalid
from depth_anything.inspect.contact_sheet import draw_caption
from depth_anything.inspect.dataset_stats import format_common_sizes
from depth_anything.inspect.histogram import ValueHistogram, draw_histograms
from depth_anything.progress import ProgressLine
from depth_anything.visualize import colorize_by_distance, make_panel

SAMPLE_RECORDS = 200
"""Records whose pixels are read, evenly spaced; sizes are read of all."""

MIN_MEDIAN_M, MAX_MEDIAN_M = 0.03, 200.0
"""A median depth outside of these gives a warning: indoors it is some 3 m, outdoors some 20 m."""

_OVERLAYS = 8
_TILE_PX = 304
_SKY_COLOR = (170, 225, 255)  # light blue, which the colormap does not have
_MIN_MAPS = 4  # fewer maps give no warning about their values
_MOST_MAPS = 0.9  # the share of maps that must show a sign
_MIN_SATURATED_SHARE = 0.002  # of the pixels have the largest value: more than a single highlight
_UNITS = (("unit: mm", 0.001), ("unit: cm", 0.01), ("unit: m", 1.0), ("scale: 1/256", 1 / 256))
_EIGHT_BIT_ADVICE = (
    "256 steps are a picture of depth: write the depth itself as 16-bit PNG, NPY, EXR or PFM; if only 8 bits exist, "
    "save them as NPY and declare  quantity: disparity  where near is bright, or  scale: METERS of a stored 1"
)

Size = tuple[int, int]


@dataclass(frozen=True)
class MapStats:
    """Statistics of one map of the sample, in meters or the unit of the disparity; `largest` and `whole` as stored.

    Attributes:
        median: of the known values.
        top: median of the upper third.
        bottom: median of the lower third.
        largest: the largest known value.
        at_largest: share of the pixels that have it.
        whole: whether all known values are whole numbers.
    """

    median: float
    top: float
    bottom: float
    largest: float
    at_largest: float
    whole: bool


@dataclass
class DatasetCheck:
    """The result of a check.

    Attributes:
        lines: facts.
        warnings: likely mistakes, one sentence each.
        refused: name and reason of each record that will not be written, as far as headers and the sample show.
        taken: number of records that will be written.
        picture: uint8 (H,W,3): a histogram, and overlays of depth on the images.
    """

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    taken: int = 0
    picture: np.ndarray | None = None


def check_dataset(custom: CustomSet, *, sample: int = SAMPLE_RECORDS) -> DatasetCheck:
    """Read the sizes of all images and maps, and the pixels of a sample.

    Raises:
        ValueError: no image has a map, or no record of the sample can be read.
    """
    pairs, check, stats = custom.files.find(), DatasetCheck(), _SampleStats(custom)
    check.refused += [(name, f"no {custom.quantity} of this name in {custom.depth}") for name in pairs.images]
    check.refused += [(name, f"no image of this name in {custom.images}") for name in pairs.maps]
    sizes, eight_bit = _read_sizes(custom, pairs, check.refused)
    names = sorted(sizes)
    sampled = [names[number] for number in evenly_spaced(len(names), sample)] if names else []
    drawn = {sampled[number] for number in evenly_spaced(len(sampled), _OVERLAYS)} if sampled else set()
    with ProgressLine("reading pixels", total=len(sampled)) as progress:
        for name in sampled:
            try:
                stats.add(name, PairedFiles.format_line(name, *pairs.matched[name]), draw=name in drawn)
            except (ValueError, MemoryError) as error:
                check.refused.append((name, str(error) or "it needs more memory than there is"))
            progress.update()
    if not stats.maps:
        reasons = "; ".join(f"{printable_path(name)}: {reason}" for name, reason in check.refused[:3])
        advice = f"; {_EIGHT_BIT_ADVICE}" if eight_bit else ""
        raise ValueError(f"none of {len(pairs.matched)} pairs can be used ({reasons}){advice}")
    check.taken = len(names) - (len(sampled) - len(stats.maps))
    check.lines = _format_facts(custom, pairs, sizes, stats)
    check.warnings = _find_warnings(custom, sizes, stats.maps)
    if eight_bit:
        check.warnings.append(f"{eight_bit} maps are 8-bit PNGs: {_EIGHT_BIT_ADVICE}")
    check.picture = stats.draw()
    return check


def _read_sizes(
    custom: CustomSet, pairs: FilePairs, refused: list[tuple[str, str]]
) -> tuple[dict[str, tuple[Size, Size]], int]:
    """Read (height, width) of image and map of each pair from their headers; also count the 8-bit PNGs.

    Pairs whose sizes do not match are appended to `refused`.
    """
    sizes, eight_bit = {}, 0
    with ProgressLine("reading sizes", total=len(pairs.matched)) as progress:
        for name, (image, depth) in pairs.matched.items():
            try:
                image_size = read_image_size(custom.folder / image)
                try:
                    map_size = maps.read_map_size(custom.folder / depth, key=custom.key)
                except ValueError as error:
                    eight_bit += isinstance(error, maps.EightBitError)
                    raise ValueError(f"its {custom.quantity}: {error}") from error
                check_aspect_ratio(image_size, map_size)
                sizes[name] = image_size, map_size
            except ValueError as error:
                refused.append((name, str(error)))
            progress.update()
    return sizes, eight_bit


class _SampleStats:
    """Statistics of the records of the sample, and their pictures."""

    def __init__(self, custom: CustomSet) -> None:
        self.custom, self.histogram = custom, ValueHistogram(custom.quantity)
        self.pixels = Counter[str]()
        self.maps: list[MapStats] = []
        self.tiles: list[np.ndarray] = []

    def add(self, name: str, line: str, *, draw: bool) -> None:
        """Read one record; ValueError if it cannot be used."""
        raw = self.custom.read(self.custom.folder, line)
        values = raw.depth if raw.depth is not None else raw.disparity
        assert values is not None and isinstance(raw.image, bytes)
        label, pixels = mask_invalid(values, raw, sky=np.inf)
        image = decode_image(raw.image)
        if not pixels["valid"]:
            raise ValueError("no pixel has a value")
        self.pixels += pixels
        self.histogram.add(label)
        self.maps.append(_measure_map(label, values))
        if draw:
            self.tiles.append(_draw_overlay(name, image, label, self.custom.quantity))

    def draw(self) -> np.ndarray:
        """The histogram, and below it the overlays."""
        title = (
            f"{self.custom.quantity} of {len(self.maps)} records in {self.custom.depth} "
            "(below: near is red, sky light blue, unknown gray)"
        )
        columns = 4
        width = columns * (_TILE_PX + 4) + 4
        top = draw_histograms(self.histogram, [], title=title, width_px=width)
        rows = [self.tiles[start : start + columns] for start in range(0, len(self.tiles), columns)]
        below = make_panel(rows, max_width=_TILE_PX)
        below = np.pad(below, ((0, 0), (0, width - below.shape[1]), (0, 0)), constant_values=255)
        return np.concatenate([top, below])


def _measure_map(label: np.ndarray, stored: np.ndarray) -> MapStats:
    known = np.isfinite(label)
    third = max(1, label.shape[0] // 3)
    parts = [label[:third], label[-third:]]
    top, bottom = (float(np.median(p[np.isfinite(p)])) if np.isfinite(p).any() else np.nan for p in parts)
    values = stored[known]
    largest = values.max()
    return MapStats(
        median=float(np.median(label[known])),
        top=top,
        bottom=bottom,
        largest=float(largest),
        at_largest=float((values == largest).sum() / label.size),
        whole=bool((values == np.rint(values)).all()),
    )


def _format_facts(
    custom: CustomSet, pairs: FilePairs, sizes: dict[str, tuple[Size, Size]], stats: _SampleStats
) -> list[str]:
    histogram, total = stats.histogram, stats.pixels["all"]
    unit = " m" if custom.quantity == "depth" else ""
    others = ", ".join(f"{count} in {key}" for key, count in pairs.others.items() if count)
    pixels = ", ".join(f"{kind} {n / total:.1%}" for kind, n in stats.pixels.most_common() if kind != "all")
    medians = [map_.median for map_ in stats.maps]
    lines = [
        f"pairs:      {len(pairs.matched)}",
        f"alone:      {len(pairs.images)} images without a map, {len(pairs.maps)} maps without an image",
        f"other:      {others or 'no files'} (of another kind or name)",
        f"images:     {format_common_sizes(size for size, _ in sizes.values())}",
        f"maps:       {format_common_sizes(size for _, size in sizes.values())}",
        f"sample:     {histogram.maps} records, pixels: {pixels}",
        f"{custom.quantity}:".ljust(12) + f"{histogram.low:.4g} to {histogram.high:.4g}{unit}, "
        f"medians of maps {min(medians):.4g} to {max(medians):.4g}{unit}",
    ]
    if custom.quantity == "depth":
        shares = ", ".join(
            f"{share:.0%} below {histogram.quantile(share):.3g} m" for share in (0.01, 0.5, 0.99)
        )
        lines.append(f"spread:     {shares}")
    return lines


def _find_warnings(
    custom: CustomSet, sizes: dict[str, tuple[Size, Size]], sampled: Sequence[MapStats]
) -> list[str]:
    warnings = _unit_warnings(custom, sampled) if custom.quantity == "depth" else []
    if len(sampled) >= _MIN_MAPS:
        warnings += _value_warnings(custom, sampled)
    image_sizes = {size for size, _ in sizes.values()}
    if custom.intrinsics is not None and len(image_sizes) > 1:
        warnings.append(f"the images have {len(image_sizes)} sizes, but intrinsics are those of one size")
    if custom.licence is None:
        warnings.append(
            "no license is given, so models trained on this set will say unknown; write  licence: CC-BY-4.0  or its own"
        )
    return warnings


def _unit_warnings(custom: CustomSet, sampled: Sequence[MapStats]) -> list[str]:
    median = float(np.median([map_.median for map_ in sampled]))
    if not MIN_MEDIAN_M <= median <= MAX_MEDIAN_M:
        stored = median / custom.scale
        fitting = [(text, stored * scale) for text, scale in _UNITS if 0.3 <= stored * scale <= 100]
        hint = "; ".join(f"with  {text}  it would be {meters:.3g} m" for text, meters in fitting)
        return [f"the median depth is {median:.4g} m, which is unusual{': ' + hint if hint else ''}"]
    if custom.scale == 1 and all(map_.whole for map_ in sampled):
        return ["all values are whole numbers, unlike most depth in meters: is it  unit: cm  or  unit: mm?"]
    return []


def _value_warnings(custom: CustomSet, sampled: Sequence[MapStats]) -> list[str]:
    warnings = []
    (largest, count), *_ = Counter(map_.largest for map_ in sampled).most_common(1)
    if count >= _MOST_MAPS * len(sampled) and len({map_.median for map_ in sampled}) > 1:
        stored = largest / custom.scale
        share = float(np.median([map_.at_largest for map_ in sampled if map_.largest == largest]))
        if share > _MIN_SATURATED_SHARE:
            warnings.append(
                f"{stored:.6g} is the largest stored value of nearly all maps, in {share:.1%} of their pixels: "
                f"if it means sky, write  sky: {stored:.6g}, if unknown,  invalid: [{stored:.6g}]"
            )
        else:
            warnings.append(
                f"{stored:.6g} is the largest stored value of nearly all maps: if each map was scaled to its own "
                "range, the units are lost"
            )
    inverted = [m.bottom > m.top if custom.quantity == "depth" else m.bottom < m.top for m in sampled]
    if np.mean(inverted) >= _MOST_MAPS:
        other = "disparity" if custom.quantity == "depth" else "depth"
        warnings.append(
            f"the lower third of the image is farther than the upper one in {np.mean(inverted):.0%} of the sample: "
            f"is it  quantity: {other}, or are the maps upside down?"
        )
    return warnings


def _draw_overlay(name: str, image: np.ndarray, label: np.ndarray, quantity: str) -> np.ndarray:
    """Draw the image, and below it the image under its map: near is red, sky light blue, unknown gray."""
    size = (_TILE_PX, max(1, round(image.shape[0] * _TILE_PX / image.shape[1])))
    small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    known = np.isfinite(label)
    near = np.full(label.shape, -1, np.float32)
    near[known] = label[known] if quantity == "disparity" else 1 / label[known]
    # Each pixel of the picture shows the nearest value below it, since LiDAR is sparse.
    step = max(1, round(label.shape[1] / _TILE_PX))
    spread = cv2.dilate(near, np.ones((step, step), np.uint8))
    drawn = np.asarray(cv2.resize(spread, size, interpolation=cv2.INTER_NEAREST))
    shown = (drawn >= 0)[..., None]
    low, high = (float(value) for value in np.percentile(near[known], (2, 98)))
    colors = colorize_by_distance(drawn, quantity="disparity", valid=drawn >= 0, low=low, high=high)
    gray = small.mean(2, keepdims=True)
    over = np.where(shown, 0.25 * gray + 0.75 * colors, gray)
    sky = np.asarray(cv2.resize((label == np.inf).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST))
    over = np.where((sky > 0)[..., None] & ~shown, _SKY_COLOR, over).astype(np.uint8)
    median = f"{np.median(label[known]):.3g}{' m' if quantity == 'depth' else ''}"
    return np.concatenate([small, over, draw_caption([f"{name}  median {median}"], _TILE_PX)])
