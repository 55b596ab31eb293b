"""Large images in overlapping tiles: where they lie, how their values are brought together, how seams vanish.

A network that knows disparity up to scale and shift gives each tile its own. A pass over the whole image, small,
says which; least squares carries each tile over to it. Blending weights fall to nothing where a tile ends.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

OVERLAP = 1 / 3
"""Of a tile, shared with each neighbour."""

CELLS_PER_SIDE = 32
"""A tile is compared with the whole image in so many cells a side."""

COARSE_CELLS_PER_SIDE = 4
"""Cells a side in which a tile's mean is made that of the whole image: what is broad only the whole can see."""

SAMPLES_PER_CELL = 8
"""That a cell is the mean of, a side."""

Box = tuple[slice, slice]


def parse_grid(tiles: int | tuple[int, int]) -> tuple[int, int]:
    """Read `tiles` as rows and columns.

    Raises:
        ValueError: If there would be none, or over 64 a side.
    """
    rows, columns = (tiles, tiles) if isinstance(tiles, int) else tiles
    if not (1 <= rows <= 64 and 1 <= columns <= 64):
        raise ValueError(f"tiles={tiles} must be 1 to 64 a side, as 2 or (2, 3): rows and columns")
    return rows, columns


def tile_spans(length: int, count: int) -> list[slice]:
    """Lay tiles over one side: of one length, evenly, neighbours sharing `OVERLAP`.

    Args:
        length: of the side, pixels.
        count: of the tiles.
    """
    side = min(length, math.ceil(length / (count - (count - 1) * OVERLAP)))
    starts = [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]
    return [slice(start, start + side) for start in starts]


def blend_weights(length: int, parts: list[slice]) -> list[np.ndarray]:
    """Compute the blending weights of tiles along one side; at every pixel they sum to one.

    A tile's own weight rises as a raised cosine from its end to the end of its neighbour; at the image's edges
    it is one.

    Args:
        length: of the side, pixels.
        parts: as `spans` gives them.

    Returns:
        for each part, float32 of its length.
    """
    windows = []
    for i, part in enumerate(parts):
        x = np.arange(part.start, part.stop) + 0.5
        window = np.ones(len(x))
        if i > 0:
            window *= _raised_cosine((x - part.start) / max(parts[i - 1].stop - part.start, 1))
        if i < len(parts) - 1:
            window *= _raised_cosine((part.stop - x) / max(part.stop - parts[i + 1].start, 1))
        windows.append(window)
    total = np.zeros(length)
    for part, window in zip(parts, windows, strict=True):
        total[part] += window
    return [(w / total[part]).astype(np.float32) for part, w in zip(parts, windows, strict=True)]


@torch.inference_mode()
def blend_tiles(
    whole: Tensor, tile_at: Callable[[Box], Tensor], shape: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """Join the maps of tiles into one.

    A tile that a positive scale does not fit to the whole image (nothing but sky or a wall, as a rule) has
    nothing to add: the small pass stands in.

    Args:
        whole: (h, w) float, disparity of the whole image at the size that the network saw.
        tile_at: returns the disparity of a part of the image, likewise; called once for each tile, in turn, so
            that no more than one is held.
        shape: of the image.
        grid: rows and columns.

    Returns:
        float32 of `shape`: disparity on the scale of `whole`, never negative; NaN where a tile holds NaN.
    """
    joined = np.zeros(shape, np.float32)
    for box, window in _tile_boxes(shape, grid):
        size = (box[0].stop - box[0].start, box[1].stop - box[1].start)
        part = _align_tile(tile_at(box), whole, box, shape, size)
        joined[box] += part.cpu().numpy() * window
    return joined.clip(min=0, out=joined)


def _align_tile(
    tile: Tensor, whole: Tensor, box: Box, shape: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Bring a tile to the scale of the whole image, and its broad shape to what the whole image says of it."""
    if not tile.isfinite().all():  # has no fit, and the whole image must not stand in for it unseen
        return tile.new_full(size, torch.nan)
    scale, shift = fit_scale_shift(tile, whole, box, shape)
    if scale <= 0:
        return _sample_box(whole, box, shape, size)
    part = F.interpolate(tile[None, None], size=size, mode="bilinear", align_corners=True) * scale + shift
    everything = (slice(0, shape[0]), slice(0, shape[1]))
    residual = _cell_means(whole, box, shape) - (_cell_means(tile, everything, shape) * scale + shift)
    broad = F.avg_pool2d(residual[None, None], CELLS_PER_SIDE // COARSE_CELLS_PER_SIDE).to(part.dtype)
    return (part + F.interpolate(broad, size=size, mode="bicubic", align_corners=False))[0, 0]


def fit_scale_shift(tile: Tensor, whole: Tensor, box: Box, shape: tuple[int, int]) -> tuple[float, float]:
    """Compute scale and shift that carry a tile's values over to those of the whole image, by least squares.

    Args:
        tile: (h, w) values of a part of the image.
        whole: (H, W) values of all of it.
        box: the part, pixels of the image.
        shape: of the image.
    """
    everything = (slice(0, shape[0]), slice(0, shape[1]))
    own, goal = (_cell_means(map, part, shape).flatten() for map, part in ((tile, everything), (whole, box)))
    spread = own - own.mean()
    variance = (spread * spread).sum()
    scale = float((spread * goal).sum() / variance) if variance > 0 else 0.0
    return scale, float(goal.mean()) - scale * float(own.mean())


def _tile_boxes(shape: tuple[int, int], grid: tuple[int, int]) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield each tile's place and its weights."""
    down, across = (tile_spans(length, count) for length, count in zip(shape, grid, strict=True))
    rows, columns = blend_weights(shape[0], down), blend_weights(shape[1], across)
    for row, row_weights in zip(down, rows, strict=True):
        for column, column_weights in zip(across, columns, strict=True):
            yield (row, column), row_weights[:, None] * column_weights


def _sample_box(whole: Tensor, box: Box, shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Sample a part of a map at `size` cells; the map's corners lie on those of the image, as in `predict`."""
    axes = []
    for part, length, count in zip(box, shape, size, strict=True):
        centres = (
            part.start + (torch.arange(count, device=whole.device) + 0.5) * (part.stop - part.start) / count
        )
        axes.append((centres - 0.5) * (2 / max(length - 1, 1)) - 1)
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1).to(whole.dtype)
    sampled = F.grid_sample(whole[None, None], points[None], padding_mode="border", align_corners=True)
    return sampled[0, 0]


def _cell_means(map: Tensor, box: Box, shape: tuple[int, int]) -> Tensor:
    """Average a part of a map in cells, so that what one map is too small to show does not count in the other."""
    fine = _sample_box(
        map, box, shape, (SAMPLES_PER_CELL * CELLS_PER_SIDE, SAMPLES_PER_CELL * CELLS_PER_SIDE)
    )
    return F.avg_pool2d(fine[None, None], SAMPLES_PER_CELL)[0, 0].double()


def _raised_cosine(share: np.ndarray) -> np.ndarray:
    """A smooth step from 0 to 1; what rises here and falls there sums to one."""
    return np.sin(np.pi / 2 * share.clip(0, 1)) ** 2
