"""A contact sheet of a set: its records with image, target and the range of its values."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from depth_anything.classes import IGNORED, MAX_CLASSES, make_class_table, paint_classes
from depth_anything.data.sample import Frame
from depth_anything.visualize import colorize_by_distance, make_panel

TILE_PX = 224
"""Width of one picture on the sheet."""

_LINE_HEIGHT_PX = 18
_FONT_PX = 13
_UNITS = {("depth", "m"): " m", ("disparity", "px"): " px"}  # other units, as "arbitrary", are not printed

_ANY_CLASSES = make_class_table([str(number) for number in range(MAX_CLASSES)])
"""Colors of class maps on the sheet, which does not know the names of a set's classes."""


def contact_sheet(frames: Iterable[Frame], *, columns: int = 3) -> np.ndarray:
    """Draw frames in a grid: the image, the target in colors (near is red), its confidence, and facts below.

    Confidence is gray: white is 1, black is 0.

    Args:
        frames: with depth, disparity or neither; one is held at a time.
        columns: frames in a row.

    Returns:
        uint8 (height,width,3) RGB.
    """
    tiles = [_draw_tile(frame) for frame in frames]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return make_panel(rows, max_width=max(tile.shape[1] for tile in tiles))


def describe_frame(frame: Frame) -> list[str]:
    """Describe a frame in lines: key and file, sizes and range of the target, and what share of it has a value."""
    height, width = frame.image.shape[:2]
    lines = [f"{frame.key} {frame.meta.get('name', '')}".rstrip()]
    target = frame.depth if frame.depth is not None else frame.disparity
    if target is None and frame.classes is not None:
        found = [number for number in np.unique(frame.classes).tolist() if number != IGNORED]
        ignored = (frame.classes == IGNORED).mean()
        return [*lines, f"{width} x {height}, {len(found)} classes", f"{ignored:.0%} ignored"]
    if target is None:
        return [*lines, f"{width} x {height}, no target"]
    size = "" if target.shape == (height, width) else f" (target {target.shape[1]} x {target.shape[0]})"
    values = target[np.isfinite(target)]
    quantity = "depth" if frame.depth is not None else "disparity"
    unit = _UNITS.get((quantity, frame.meta.get("unit", "m")), "")
    low, median, high = np.percentile(values, (0, 50, 100)) if values.size else (np.nan,) * 3
    sky, unknown = np.isinf(target).mean(), np.isnan(target).mean()
    trust = "" if frame.confidence is None else f", confidence {frame.confidence.mean():.2f}"
    return [
        *lines,
        f"{width} x {height}{size}, {quantity} {low:.3g} to {high:.3g}{unit}, median {median:.3g}{unit}",
        f"{values.size / target.size:.0%} known, {sky:.0%} sky, {unknown:.0%} unknown{trust}",
    ]


def colorize_disparity(disparity: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Colorize a disparity map between the 2nd and 98th percentile of its valid values; near is red."""
    low, high = np.percentile(disparity[valid], (2, 98)) if valid.any() else (0.0, 1.0)
    return colorize_by_distance(
        disparity, quantity="disparity", valid=valid, low=float(low), high=float(high)
    )


def draw_caption(lines: Sequence[str], width: int) -> np.ndarray:
    """Draw lines of text below a picture of this width, uint8 (h,width,3); long lines lose their beginning."""
    caption = Image.new("RGB", (width, _LINE_HEIGHT_PX * len(lines) + 6), "white")
    draw = ImageDraw.Draw(caption)
    font = ImageFont.load_default(_FONT_PX)
    for number, text in enumerate(line.encode("ascii", "replace").decode() for line in lines):
        while font.getlength(text) > width - 4:
            text = ".." + text[3:]  # keys differ at their ends
        draw.text(
            (2, 2 + number * _LINE_HEIGHT_PX), text, fill="black" if number == 0 else "#555555", font=font
        )
    return np.asarray(caption)


def _draw_tile(frame: Frame) -> np.ndarray:
    pictures = [_resize_to_tile(frame.image)]
    if frame.depth is not None:
        valid = np.isfinite(frame.depth) & (frame.depth > 0)
        pictures.append(_resize_to_tile(colorize_disparity(1.0 / np.where(valid, frame.depth, 1.0), valid)))
    elif frame.disparity is not None:
        pictures.append(_resize_to_tile(colorize_disparity(frame.disparity, np.isfinite(frame.disparity))))
    if frame.confidence is not None:
        gray = np.rint(255 * frame.confidence).astype(np.uint8)
        pictures.append(_resize_to_tile(np.repeat(gray[:, :, None], 3, 2)))
    if frame.classes is not None:
        pictures.append(_resize_to_tile(paint_classes(frame.classes, _ANY_CLASSES)))
    height = max(picture.shape[0] for picture in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=255) for p in pictures]
    strip = np.concatenate(padded, axis=1)
    return np.concatenate([strip, draw_caption([*describe_frame(frame), ""][:3], strip.shape[1])])


def _resize_to_tile(picture: np.ndarray) -> np.ndarray:
    height = max(1, round(picture.shape[0] * TILE_PX / picture.shape[1]))
    interpolation = cv2.INTER_AREA if picture.shape[1] > TILE_PX else cv2.INTER_NEAREST
    return cv2.resize(picture, (TILE_PX, height), interpolation=interpolation)
