"""Maps as colours, and pictures side by side."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRAY = 128
"""Level of red, green and blue of a pixel without a value."""

DEFAULT_COLORMAP = "Spectral_r"
"""The authors' colormap, for disparity: its last color is red."""

GAP_PX = 4
_BLOCK_PIXELS = 1 << 20  # pixels
FONT_PX = 16


def colorize(
    map: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
    colormap: str = "Spectral_r",
) -> np.ndarray:
    """Paint a map with 256 colours, to the digit as the authors' `run.py` paints its pictures.

    Args:
        map: (H, W), disparity or depth, any real dtype and unit.
        valid: (H, W) bool; what lies outside becomes grey, and so does NaN and infinity.
        low: value of the first colour, that of the smallest valid one unless given; what lies below has it
            too.
        high: value of the last colour, that of the largest valid one unless given; what lies above has it
            too.
        colormap: a name matplotlib knows.

    Returns:
        uint8 (H, W, 3), RGB. A constant map gets the first colour.

    Raises:
        ValueError: if matplotlib knows no such colormap.

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
    # The authors compute in float32, whose last bits decide a colour here and there; that needs a span it can hold.
    least, most = values.min(), values.max()
    exact = values.dtype == np.float32 and low is None and high is None and max(abs(least), abs(most)) <= 1e30
    kind = np.float32 if exact else np.float64
    start = least.astype(kind) if low is None else low
    end = most.astype(kind) if high is None else high
    levels = np.zeros(values.shape, np.uint8)
    for begin in range(
        0, values.size if end > start else 0, _BLOCK_PIXELS
    ):  # a large map in float64 takes gigabytes
        block = slice(begin, begin + _BLOCK_PIXELS)
        share = (values[block].astype(kind) - start) / (end - start)
        levels[block] = share.clip(0, 1) * 255
    picture[shown] = table[levels]
    return picture


def colorize_by_distance(
    map: np.ndarray,
    *,
    quantity: str,
    colormap: str = DEFAULT_COLORMAP,
    valid: np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """Paint a map such that the last color of the colormap is near and its first is far, whatever the map holds.

    All pictures follow this one rule: near is red in the authors' colors, and white in "gray".

    Args:
        map: (H, W), any real dtype and unit.
        quantity: "disparity" (larger is nearer) or "depth" (larger is farther).
        colormap: A name matplotlib knows, as for disparity; turned round for depth.
        valid: As for `colorize`.
        low: As for `colorize`: a value, not a color.
        high: As for `colorize`.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: If matplotlib knows no such colormap.

    Example:
        >>> map = np.array([[1.0, 2.0]])
        >>> [paint(map, quantity=q, colormap="gray")[0, :, 0].tolist() for q in ("disparity", "depth")]
        [[0, 255], [255, 0]]
    """
    return colorize(map, valid=valid, low=low, high=high, colormap=distance_colormap(quantity, colormap))


def distance_colormap(quantity: str, colormap: str = DEFAULT_COLORMAP) -> str:
    """Name the matplotlib colormap that paints a quantity by the rule of `paint`.

    Example:
        >>> colormap_for("disparity"), colormap_for("depth"), colormap_for("depth", "gray")
        ('Spectral_r', 'Spectral', 'gray_r')
    """
    if quantity == "disparity":
        return colormap
    return colormap.removesuffix("_r") if colormap.endswith("_r") else f"{colormap}_r"


def check_colormap(colormap: str) -> None:
    """Refuse a colormap that `paint` and `colorize` do not know.

    Raises:
        ValueError: If matplotlib knows no such colormap.

    Example:
        >>> check_colormap("inferno")
    """
    _color_table(colormap)


def make_panel(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] | None = None, *, max_width: int = 320
) -> np.ndarray:
    """Lay pictures out on white, row by row, with a title above each column.

    Args:
        rows: uint8 (H, W, 3) pictures, RGB, of any sizes; rows may differ in length.
        titles: one for each column, in ASCII: the font has little else.
        max_width: wider pictures are shrunk to it, in pixels, keeping their shape; none is enlarged.

    Returns:
        uint8 (height, width, 3), RGB.

    Example:
        >>> picture = np.zeros((30, 40, 3), np.uint8)
        >>> panel([[picture, picture], [picture]]).shape
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
    import matplotlib  # 0.2 s that only those who look at pictures shall pay

    if colormap not in matplotlib.colormaps:
        raise ValueError(
            f"matplotlib knows no colormap {colormap!r}; among those it knows are Spectral_r, inferno, gray"
        )
    if colormap in ("gray", "gray_r"):  # theirs takes levels as they are, and matplotlib's end below some
        levels = np.arange(256, dtype=np.uint8)[:: -1 if colormap == "gray_r" else 1]
        return np.repeat(levels[:, None], 3, axis=1)
    colours = matplotlib.colormaps[colormap](np.arange(256))[:, :3]
    return (colours * 255).astype(np.uint8)  # cut off, as the authors do


def _shrink_to_width(picture: np.ndarray, max_width: int) -> Image.Image:
    image = Image.fromarray(picture)
    if image.width <= max_width:
        return image
    height = max(1, round(image.height * max_width / image.width))
    return image.resize((max_width, height), Image.Resampling.LANCZOS)
