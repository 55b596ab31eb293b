"""What is inside a set, before anyone trains on it: its records on a contact sheet, their ranges in words."""

from collections.abc import Iterable

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from depth_anything.data.sample import Frame
from depth_anything.visualize import colorize_by_distance, make_panel

TILE_PX = 224
"""Width of one picture on the sheet."""

LINE_HEIGHT_PX = 18

_UNITS = {("depth", "m"): " m", ("disparity", "px"): " px"}  # others, as "arbitrary", are no unit to name


def contact_sheet(frames: Iterable[Frame], *, columns: int = 3) -> np.ndarray:
    """Draw frames in a grid: each its image, its target in colours (near is red), and its facts below.

    Args:
        frames: with depth, disparity or neither; one is held at a time.
        columns: frames side by side.

    Returns:
        uint8 (height,width,3) RGB.
    """
    tiles = [_draw_tile(frame) for frame in frames]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return make_panel(rows, max_width=max(tile.shape[1] for tile in tiles))


def describe_frame(frame: Frame) -> list[str]:
    """The facts of one frame as lines: its key and file, its size, its target's range, and what has no value."""
    height, width = frame.image.shape[:2]
    lines = [f"{frame.key} {frame.meta.get('name', '')}".rstrip()]
    target = frame.depth if frame.depth is not None else frame.disparity
    if target is None:
        return [*lines, f"{width} x {height}, no target"]
    size = "" if target.shape == (height, width) else f" (target {target.shape[1]} x {target.shape[0]})"
    values = target[np.isfinite(target)]
    kind = "depth" if frame.depth is not None else "disparity"
    unit = _UNITS.get((kind, frame.meta.get("unit", "m")), "")
    low, middle, high = np.percentile(values, (0, 50, 100)) if values.size else (np.nan,) * 3
    lines.append(f"{width} x {height}{size}, {kind} {low:.3g} to {high:.3g}{unit}, median {middle:.3g}{unit}")
    unknown = np.isnan(target).mean()
    lines.append(
        f"{values.size / target.size:.0%} known, {np.isinf(target).mean():.0%} sky, {unknown:.0%} unknown"
    )
    return lines


def _draw_tile(frame: Frame) -> np.ndarray:
    pictures = [_resize_to_tile(frame.image)]
    if frame.depth is not None:
        known = np.isfinite(frame.depth) & (frame.depth > 0)
        pictures.append(_resize_to_tile(_colorize_target(1.0 / np.where(known, frame.depth, 1.0), known)))
    elif frame.disparity is not None:
        pictures.append(_resize_to_tile(_colorize_target(frame.disparity, np.isfinite(frame.disparity))))
    height = max(picture.shape[0] for picture in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=255) for p in pictures]
    strip = np.concatenate(padded, axis=1)
    return np.concatenate([strip, _draw_caption(describe_frame(frame), strip.shape[1])], axis=0)


def _colorize_target(disparity: np.ndarray, known: np.ndarray) -> np.ndarray:
    low, high = np.percentile(disparity[known], (2, 98)) if known.any() else (0.0, 1.0)
    return colorize_by_distance(
        disparity, quantity="disparity", valid=known, low=float(low), high=float(high)
    )


def _resize_to_tile(picture: np.ndarray) -> np.ndarray:
    height = max(1, round(picture.shape[0] * TILE_PX / picture.shape[1]))
    way = cv2.INTER_AREA if picture.shape[1] > TILE_PX else cv2.INTER_NEAREST
    return cv2.resize(picture, (TILE_PX, height), interpolation=way)


def _draw_caption(lines: list[str], width: int) -> np.ndarray:
    picture = Image.new("RGB", (width, LINE_HEIGHT_PX * 3 + 6), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for line, text in enumerate(line.encode("ascii", "replace").decode() for line in lines):
        while font.getlength(text) > width - 4:
            text = ".." + text[3:]  # keys differ at their ends
        draw.text((2, 2 + line * LINE_HEIGHT_PX), text, fill="black" if line == 0 else "#555555", font=font)
    return np.asarray(picture)
