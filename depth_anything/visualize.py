"""Color images of depth and disparity maps, and panels of pictures."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from depth_anything.errors import UserError

GRAY = 128
"""Level of red, green and blue for pixels without a value."""

DEFAULT_COLORMAP = "Spectral_r"
"""The official colormap for disparity, whose last color is red."""

MIN_DEPTH_M = np.float32(1e-3)
"""Smaller depths, meters, are raised to it before they are inverted, so that no pixel takes the whole range."""

GAP_PX = 4
_BLOCK_PIXELS = 1 << 20  # limits memory
FONT_PX = 16


def colorize(
    map: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
    colormap: str = "Spectral_r",
) -> np.ndarray:
    """Apply a colormap of 256 colors, bit-exact to the official `run.py`.

    Args:
        map: (H, W), disparity or depth, any real dtype and unit.
        valid: (H, W) bool; other pixels become gray, as do NaN and infinity.
        low: Value of the first color; smaller values are clipped. None for the smallest valid value.
        high: Value of the last color; larger values are clipped. None for the largest valid value.
        colormap: Name of a matplotlib colormap.

    Returns:
        uint8 (H, W, 3) RGB. A constant map has the first color.

    Raises:
        UserError: If matplotlib has no such colormap.

    Example:
        >>> colorize(np.array([[0.0, 0.5, 1.0, np.nan]]), colormap="gray")[0, :, 0].tolist()
        [0, 127, 255, 128]
    """
    table = _color_table(colormap)
    shown = np.isfinite(map) if valid is None else np.isfinite(map) & valid
    picture = np.full((*map.shape, 3), GRAY, dtype=np.uint8)
    if not shown.any():
        return picture
    values = map[shown]
    # The official code computes in float32, and its rounding decides some colors; larger ranges would overflow.
    least, most = values.min(), values.max()
    exact = values.dtype == np.float32 and low is None and high is None and max(abs(least), abs(most)) <= 1e30
    kind = np.float32 if exact else np.float64
    start = least.astype(kind) if low is None else low
    end = most.astype(kind) if high is None else high
    levels = np.zeros(values.shape, np.uint8)
    for begin in range(
        0, values.size if end > start else 0, _BLOCK_PIXELS
    ):  # in blocks: a large map in float64 takes gigabytes
        block = slice(begin, begin + _BLOCK_PIXELS)
        share = (values[block].astype(kind) - start) / (end - start)
        levels[block] = share.clip(0, 1) * 255
    picture[shown] = table[levels]
    return picture


def conditioning_image(map: np.ndarray, *, quantity: str, valid: np.ndarray | None = None) -> np.ndarray:
    """Compute the image that a depth-conditioned ControlNet gets: near is white, far is black, in 256 grays.

    level = (disparity - least) / (most - least) · 255, in float32 and truncated, over the range of this image. That is
    how V1's app and the Depth Anything preprocessors of WebUI (sd-webui-controlnet, annotator/depth_anything_v2.py)
    and ComfyUI compute it. `depth-anything predict --format controlnet` and stage=controlnet call this function.

    Args:
        map: (H, W), any real dtype; +inf is sky in a depth.
        quantity: "disparity" (larger is nearer), or "depth" in meters, of which 1 / depth is taken.
        valid: (H, W) bool; other pixels become black, as do NaN, and infinite disparities.

    Returns:
        uint8 (H, W, 3), three equal channels, which is what these programs hand to a ControlNet. A constant map is
        black.

    Example:
        >>> conditioning_image(np.array([[1.0, 2.0, 4.0]]), quantity="disparity")[0, :, 0].tolist()
        [0, 85, 255]
        >>> conditioning_image(np.array([[1.0, 2.0, np.inf]]), quantity="depth")[0, :, 0].tolist()
        [255, 127, 0]
    """
    values = np.asarray(map, np.float32)
    if quantity == "depth":
        values = np.float32(1) / np.maximum(values, MIN_DEPTH_M)
    known = np.isfinite(values) if valid is None else np.isfinite(values) & valid
    levels = np.zeros(values.shape, np.uint8)
    if known.any():
        least, most = values[known].min(), values[known].max()
        if most > least:
            levels[known] = ((values[known] - least) / (most - least) * np.float32(255)).astype(np.uint8)
    return np.repeat(levels[:, :, None], 3, axis=2)


def colorize_by_distance(
    map: np.ndarray,
    *,
    quantity: str,
    colormap: str = DEFAULT_COLORMAP,
    valid: np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """Apply a colormap such that its last color is near and its first is far, for disparity and for depth.

    Near is red in the official colormap, and white in "gray".

    Args:
        map: (H, W), any real dtype and unit.
        quantity: "disparity" (larger is nearer) or "depth" (larger is farther).
        colormap: Name of a matplotlib colormap for disparity; it is reversed for depth.
        valid: As in `colorize`.
        low: As in `colorize`.
        high: As in `colorize`.

    Returns:
        uint8 (H, W, 3) RGB.

    Raises:
        UserError: If matplotlib has no such colormap.

    Example:
        >>> map = np.array([[1.0, 2.0]])
        >>> [colorize_by_distance(map, quantity=q, colormap="gray")[0, :, 0].tolist() for q in ("disparity", "depth")]
        [[0, 255], [255, 0]]
    """
    return colorize(map, valid=valid, low=low, high=high, colormap=distance_colormap(quantity, colormap))


def distance_colormap(quantity: str, colormap: str = DEFAULT_COLORMAP) -> str:
    """Return the name of the matplotlib colormap that `colorize_by_distance` applies.

    Example:
        >>> distance_colormap("disparity"), distance_colormap("depth"), distance_colormap("depth", "gray")
        ('Spectral_r', 'Spectral', 'gray_r')
    """
    if quantity == "disparity":
        return colormap
    return colormap.removesuffix("_r") if colormap.endswith("_r") else f"{colormap}_r"


def check_colormap(colormap: str) -> None:
    """Check that matplotlib has a colormap.

    Raises:
        UserError: If it has not.

    Example:
        >>> check_colormap("inferno")
    """
    _color_table(colormap)


def make_panel(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] | None = None, *, max_width: int = 320
) -> np.ndarray:
    """Arrange pictures in rows on white, with a title above each column.

    Args:
        rows: uint8 (H, W, 3) RGB pictures of any sizes; rows may differ in length.
        titles: One for each column, in ASCII, because the font has little else.
        max_width: Wider pictures are downscaled to it, pixels, keeping the aspect ratio.

    Returns:
        uint8 (height, width, 3) RGB.

    Example:
        >>> picture = np.zeros((30, 40, 3), np.uint8)
        >>> make_panel([[picture, picture], [picture]]).shape
        (72, 92, 3)
    """
    cells = [[_shrink_to_width(picture, max_width) for picture in row] for row in rows]
    font = ImageFont.load_default(FONT_PX)
    widths = [0] * max(len(row) for row in [*cells, titles or ()])
    for row in cells:
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], cell.width)
    for column, title in enumerate(titles or ()):
        widths[column] = max(widths[column], math.ceil(font.getlength(title)))
    heights = [max((cell.height for cell in row), default=0) for row in cells]
    top = GAP_PX + (FONT_PX + 2 * GAP_PX if titles else 0)
    lefts = list(accumulate((width + GAP_PX for width in widths), initial=GAP_PX))
    tops = list(accumulate((height + GAP_PX for height in heights), initial=top))

    sheet = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles or ()):
        draw.text((lefts[column], GAP_PX), title, fill="black", font=font)
    for line, row in enumerate(cells):
        for column, cell in enumerate(row):
            sheet.paste(cell, (lefts[column], tops[line]))
    return np.asarray(sheet)


@cache
def _color_table(colormap: str) -> np.ndarray:
    import matplotlib  # takes 0.2 s

    if colormap not in matplotlib.colormaps:
        raise UserError(
            f"matplotlib has no colormap {colormap!r}", "use for example Spectral_r, inferno or gray"
        )
    if colormap in ("gray", "gray_r"):  # the official code uses the levels; matplotlib's rounding differs
        levels = np.arange(256, dtype=np.uint8)[:: -1 if colormap == "gray_r" else 1]
        return np.repeat(levels[:, None], 3, axis=1)
    colors = matplotlib.colormaps[colormap](np.arange(256))[:, :3]
    return (colors * 255).astype(np.uint8)  # truncated, as in the official code


def _shrink_to_width(picture: np.ndarray, max_width: int) -> Image.Image:
    image = Image.fromarray(picture)
    if image.width <= max_width:
        return image
    height = max(1, round(image.height * max_width / image.width))
    return image.resize((max_width, height), Image.Resampling.LANCZOS)
