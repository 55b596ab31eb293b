"""A user's own set before it is written: what was found, what looks wrong, and a picture to see it in."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from depth_anything.data.sample import decode_image
from depth_anything.evaluation.frames import evenly_spaced
from depth_anything.ingest import maps
from depth_anything.ingest.custom import (
    CustomSet,
    FilePairs,
    check_aspect_ratio,
    printable_path,
    read_image_size,
)
from depth_anything.ingest.record import mask_invalid
from depth_anything.inspect.dataset_stats import format_common_sizes
from depth_anything.inspect.histogram import ValueHistogram, draw_histograms
from depth_anything.progress import ProgressLine
from depth_anything.visualize import colorize_by_distance, make_panel

SAMPLE_RECORDS = 200
"""Records whose pixels are looked at, evenly spaced; sizes are looked at in all."""

OVERLAY_COUNT = 8
TILE_PX = 304
MIN_MEDIAN_M, MAX_MEDIAN_M = 0.03, 200.0
"""A median depth outside of these is said: indoors it is some 3 m, in streets some 20 m."""

_UNITS = (("unit: mm", 0.001), ("unit: cm", 0.01), ("unit: m", 1.0), ("scale: 1/256", 1 / 256))
_SKY_COLOR = (170, 225, 255)  # light blue, which the map's colours do not have
_MIN_SATURATED_SHARE = 0.002  # of the pixels have the largest value: more than a single spot
_MOST_MAPS = 0.9  # of the maps must show a sign before it is said
_EIGHT_BIT_ERROR = "of 8 bits: a map is grey of 16 bits"  # maps.read_png16
_EIGHT_BIT_ADVICE = (
    "256 steps are a picture of depth: write the depth itself as 16-bit PNG, NPY, EXR or PFM; if 8 bits are all "
    "there is, save them as NPY and declare  quantity: disparity  where near is bright, or  scale: METRES of a stored 1"
)
_MIN_MAPS = 4  # maps are too few for a sign


@dataclass(frozen=True)
class MapStats:
    """What one map of the sample shows, in metres or the disparity's unit.

    Attributes:
        name: Of the record.
        median: Of the known values.
        top: Of the upper third.
        bottom: Of the lower third.
        largest: Of the known values.
        at_largest: Share of the pixels that have it.
        whole: Whether all known values are whole numbers.
    """

    name: str
    median: float
    top: float
    bottom: float
    largest: float
    at_largest: float
    whole: bool


@dataclass
class DatasetCheck:
    """What was found in a set that is about to be written.

    Attributes:
        lines: Facts, for people.
        doubts: What looks wrong, a sentence each.
        refused: Name and reason of what will not be taken, as far as headers and the sample tell.
        taken: Records that will be.
        picture: uint8 (H, W, 3): a histogram, and overlays of depth on the images.
    """

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    taken: int = 0
    picture: np.ndarray | None = None


def check_dataset(custom: CustomSet, *, sample: int = SAMPLE_RECORDS) -> DatasetCheck:
    """Look at the sizes of all images and maps, and at the pixels of a sample.

    Raises:
        ValueError: Nothing fits together, or nothing of the sample can be read.
    """
    pairs, found, look = custom.pair(), DatasetCheck(), _SampleStats(custom)
    found.refused += [(name, f"no {custom.quantity} of this name in {custom.depth}") for name in pairs.images]
    found.refused += [(name, f"no image of this name in {custom.images}") for name in pairs.maps]
    sizes = _read_sizes(custom, pairs, found.refused)
    good = sorted(sizes)
    chosen = [good[number] for number in evenly_spaced(len(good), sample)] if good else []
    drawn = {chosen[number] for number in evenly_spaced(len(chosen), OVERLAY_COUNT)} if chosen else set()
    with ProgressLine("looking at pixels", total=len(chosen)) as progress:
        for name in chosen:
            try:
                look.at(name, custom.line(name, *pairs.both[name]), draw=name in drawn)
            except (ValueError, MemoryError) as error:
                found.refused.append((name, str(error) or "it needs more memory than there is"))
            progress.update()
    eight = sum(_EIGHT_BIT_ERROR in reason for _, reason in found.refused)
    if not look.seen:
        why = "; ".join(f"{printable_path(name)}: {reason}" for name, reason in found.refused[:3])
        more = f"; {_EIGHT_BIT_ADVICE}" if eight else ""
        raise ValueError(f"none of {len(pairs.both)} pairs can be taken ({why}){more}")
    found.taken = len(good) - (len(chosen) - len(look.seen))
    found.lines = _format_facts(custom, pairs, sizes, look)
    found.warnings = _find_warnings(custom, sizes, look.seen)
    if eight:
        found.warnings.append(f"{eight} maps are PNGs of 8 bits: {_EIGHT_BIT_ADVICE}")
    found.picture = look.picture()
    return found


def _read_sizes(
    custom: CustomSet, pairs: FilePairs, refused: list[tuple[str, str]]
) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Sizes of image and map of each pair, by their headers; those that do not fit are refused."""
    sizes = {}
    with ProgressLine("looking at sizes", total=len(pairs.both)) as progress:
        for name, (image, depth) in pairs.both.items():
            try:
                size = read_image_size(custom.folder / image)
                try:
                    shape = maps.read_map_size(custom.folder / depth, key=custom.key)
                except ValueError as error:
                    raise ValueError(f"its {custom.quantity}: {error}") from error
                check_aspect_ratio(size, shape)
                sizes[name] = size, shape
            except ValueError as error:
                refused.append((name, str(error)))
            progress.update()
    return sizes


class _SampleStats:
    """What the sample shows."""

    def __init__(self, custom: CustomSet) -> None:
        self.custom, self.tally = custom, ValueHistogram(custom.quantity)
        self.kinds = Counter[str]()
        self.seen: list[MapStats] = []
        self.tiles: list[np.ndarray] = []

    def at(self, name: str, line: str, *, draw: bool) -> None:
        """Look at one record; ValueError if it will not be taken."""
        raw = self.custom.read(self.custom.folder, line)
        values = raw.depth if raw.depth is not None else raw.disparity
        assert values is not None and isinstance(raw.image, bytes)
        label, kinds = mask_invalid(values, raw, sky=np.inf)
        image = decode_image(raw.image)
        if not kinds["valid"]:
            raise ValueError("not one pixel has a value")
        self.kinds += kinds
        self.tally.add(label)
        self.seen.append(_measure_map(name, label, values))
        if draw:
            self.tiles.append(_draw_overlay(name, image, label, self.custom.quantity))

    def picture(self) -> np.ndarray:
        """The histogram, and below it the overlays."""
        title = (
            f"{self.custom.quantity} of {len(self.seen)} records in {self.custom.depth} "
            "(below: near is red, sky light blue, unknown grey)"
        )
        columns = 4
        width = columns * (TILE_PX + 4) + 4
        top = draw_histograms(self.tally, [], title=title, width_px=width)
        rows = [self.tiles[start : start + columns] for start in range(0, len(self.tiles), columns)]
        below = make_panel(rows, max_width=TILE_PX)
        below = np.pad(below, ((0, 0), (0, width - below.shape[1]), (0, 0)), constant_values=255)
        return np.concatenate([top, below])


def _measure_map(name: str, label: np.ndarray, values: np.ndarray) -> MapStats:
    known = np.isfinite(label)
    third = max(1, label.shape[0] // 3)
    parts = [label[:third], label[-third:]]
    top, bottom = (float(np.median(p[np.isfinite(p)])) if np.isfinite(p).any() else np.nan for p in parts)
    kept = values[known]
    return MapStats(
        name,
        median=float(np.median(label[known])),
        top=top,
        bottom=bottom,
        largest=float(kept.max()),
        at_largest=float((kept == kept.max()).sum() / label.size),
        whole=bool((kept == np.rint(kept)).all()),
    )


def _format_facts(
    custom: CustomSet,
    pairs: FilePairs,
    sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]],
    look: _SampleStats,
) -> list[str]:
    tally, total = look.tally, look.kinds["all"]
    unit = " m" if custom.quantity == "depth" else ""
    others = ", ".join(f"{count} in {key}" for key, count in pairs.others.items() if count)
    kinds = [(kind, count) for kind, count in look.kinds.most_common() if kind != "all"]
    medians = [seen.median for seen in look.seen]
    lines = [
        f"pairs:      {len(pairs.both)}",
        f"alone:      {len(pairs.images)} images without a map, {len(pairs.maps)} maps without an image",
        f"other:      {others or 'no files'} (of another kind or name)",
        f"images:     {format_common_sizes(size for size, _ in sizes.values())}",
        f"maps:       {format_common_sizes(shape for _, shape in sizes.values())}",
        f"sample:     {tally.maps} records, pixels: "
        + ", ".join(f"{kind} {count / total:.1%}" for kind, count in kinds),
        f"{custom.quantity}:".ljust(12) + f"{tally.low:.4g} to {tally.high:.4g}{unit}, "
        f"medians of maps {min(medians):.4g} to {max(medians):.4g}{unit}",
    ]
    if custom.quantity == "depth":
        shares = ", ".join(f"{share:.0%} below {tally.quantile(share):.3g} m" for share in (0.01, 0.5, 0.99))
        lines.append(f"spread:     {shares}")
    return lines


def _find_warnings(
    custom: CustomSet, sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]], seen: Sequence[MapStats]
) -> list[str]:
    warnings = []
    if custom.quantity == "depth":
        warnings += _unit_warnings(custom, seen)
    if len(seen) >= _MIN_MAPS:
        warnings += _value_warnings(custom, seen)
    shapes = {size for size, _ in sizes.values()}
    if custom.intrinsics is not None and len(shapes) > 1:
        warnings.append(f"the images have {len(shapes)} sizes, and intrinsics are those of one")
    if custom.licence is None:
        warnings.append(
            "no licence is given: models trained on it will say unknown; write  licence: CC-BY-4.0  or its own"
        )
    return warnings


def _unit_warnings(custom: CustomSet, seen: Sequence[MapStats]) -> list[str]:
    median = float(np.median([one.median for one in seen]))
    if not MIN_MEDIAN_M <= median <= MAX_MEDIAN_M:
        stored = median / custom.scale
        fit = [(text, stored * scale) for text, scale in _UNITS if 0.3 <= stored * scale <= 100]
        hint = "; ".join(f"with  {text}  it would be {metres:.3g} m" for text, metres in fit)
        return [f"the median depth is {median:.4g} m, as few scenes have it{': ' + hint if hint else ''}"]
    if custom.scale == 1 and all(one.whole for one in seen):
        return ["all values are whole numbers, as metres seldom are: is it  unit: cm  or  unit: mm?"]
    return []


def _value_warnings(custom: CustomSet, seen: Sequence[MapStats]) -> list[str]:
    warnings = []
    (largest, count), *_ = Counter(one.largest for one in seen).most_common(1)
    if count >= _MOST_MAPS * len(seen) and len({one.median for one in seen}) > 1:
        stored = largest / custom.scale
        share = float(np.median([one.at_largest for one in seen if one.largest == largest]))
        if share > _MIN_SATURATED_SHARE:
            warnings.append(
                f"{stored:.6g} is the largest stored value of nearly all maps, in {share:.1%} of their pixels: "
                f"if it means sky, write  sky: {stored:.6g}, if nothing,  invalid: [{stored:.6g}]"
            )
        else:
            warnings.append(
                f"{stored:.6g} is the largest stored value of nearly all maps: if each was stretched to its own "
                "range, their units are lost"
            )
    upside = [one.bottom > one.top if custom.quantity == "depth" else one.bottom < one.top for one in seen]
    if np.mean(upside) >= _MOST_MAPS:
        other = "disparity" if custom.quantity == "depth" else "depth"
        warnings.append(
            f"the lower thirds of the pictures are farther than the upper ones in {np.mean(upside):.0%} of the "
            f"sample: is it  quantity: {other}, or are the maps upside down?"
        )
    return warnings


def _draw_overlay(name: str, image: np.ndarray, label: np.ndarray, quantity: str) -> np.ndarray:
    """The image, and below it the same under its map: near is red, sky light blue, what has no value grey."""
    height = max(1, round(image.shape[0] * TILE_PX / image.shape[1]))
    small = cv2.resize(image, (TILE_PX, height), interpolation=cv2.INTER_AREA)
    known = np.isfinite(label)
    near = np.zeros(label.shape, np.float32)
    near[known] = label[known] if quantity == "disparity" else 1 / label[known]
    low, high = np.percentile(near[known], (2, 98))
    step = max(
        1, round(label.shape[1] / TILE_PX)
    )  # the nearest of a few pixels stands for them: LiDAR is sparse
    spread = cv2.dilate(np.where(known, near, -1), np.ones((step, step), np.uint8))
    drawn = np.asarray(cv2.resize(spread, (TILE_PX, height), interpolation=cv2.INTER_NEAREST))
    colours = colorize_by_distance(
        drawn, quantity="disparity", valid=drawn >= 0, low=float(low), high=float(high)
    )
    grey = np.asarray(small).mean(2, keepdims=True)
    over = np.where((drawn >= 0)[..., None], 0.25 * grey + 0.75 * colours, grey)
    sky = cv2.resize((label == np.inf).astype(np.uint8), (TILE_PX, height), interpolation=cv2.INTER_NEAREST)
    over = np.where((np.asarray(sky) > 0)[..., None] & (drawn < 0)[..., None], _SKY_COLOR, over).astype(
        np.uint8
    )
    middle = float(np.median(label[known]))
    text = f"{middle:.3g} m" if quantity == "depth" else f"{middle:.3g}"
    return np.concatenate([np.asarray(small), over, _draw_caption(f"{name}  median {text}")])


def _draw_caption(text: str) -> np.ndarray:
    picture = Image.new("RGB", (TILE_PX, 18), "white")
    font = ImageFont.load_default(12)
    text = text.encode("ascii", "replace").decode()
    while font.getlength(text) > TILE_PX - 4:
        text = ".." + text[3:]  # names differ at their ends
    ImageDraw.Draw(picture).text((2, 1), text, fill="black", font=font)
    return np.asarray(picture)
