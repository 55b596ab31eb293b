"""Prediction of large images in overlapping tiles: tile layout, alignment to the whole image, seamless blending.

Each tile's disparity has its own scale and shift. Least squares aligns every tile to a prediction of the whole image
at low resolution. Blending weights fall to zero at the ends of a tile.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

OVERLAP = 1 / 3
"""Share of a tile that it has in common with each neighbor."""

CELLS_PER_SIDE = 32
"""A tile is compared with the whole image by the means of so many cells per side."""

COARSE_CELLS_PER_SIDE = 4
"""The residual to the whole image is corrected at so many cells per side, as only the whole image shows the layout."""

SAMPLES_PER_CELL = 8
"""Samples per side whose mean is a cell's value."""

Box = tuple[slice, slice]


def parse_grid(tiles: int | tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of `tiles`; one number sets both.

    Raises:
        ValueError: A number is below 1 or above 64.
    """
    rows, columns = (tiles, tiles) if isinstance(tiles, int) else tiles
    if not (1 <= rows <= 64 and 1 <= columns <= 64):
        raise ValueError(f"tiles={tiles} must be 1 to 64 per side, such as 2 or (2, 3): rows and columns")
    return rows, columns


def tile_spans(length: int, count: int) -> list[slice]:
    """Divide one side into tiles of equal length at equal distances; neighbors share `OVERLAP`.

    Args:
        length: Length of the side, pixels.
        count: Number of tiles.
    """
    side = min(length, math.ceil(length / (count - (count - 1) * OVERLAP)))
    starts = [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]
    return [slice(start, start + side) for start in starts]


def blend_weights(length: int, spans: list[slice]) -> list[np.ndarray]:
    """Compute the blending weights of the tiles along one side; they sum to one at every pixel.

    A weight rises as a raised cosine from the end of the tile to the end of its neighbor; at the image border it is
    one.

    Args:
        length: Length of the side, pixels.
        spans: As `tile_spans` returns them.

    Returns:
        For each tile, float32 of its length.
    """
    windows = []
    for i, span in enumerate(spans):
        x = np.arange(span.start, span.stop) + 0.5
        window = np.ones(len(x))
        if i > 0:
            window *= _raised_cosine((x - span.start) / max(spans[i - 1].stop - span.start, 1))
        if i < len(spans) - 1:
            window *= _raised_cosine((span.stop - x) / max(span.stop - spans[i + 1].start, 1))
        windows.append(window)
    total = np.zeros(length)
    for span, window in zip(spans, windows, strict=True):
        total[span] += window
    return [(w / total[span]).astype(np.float32) for span, w in zip(spans, windows, strict=True)]


@torch.inference_mode()
def blend_tiles(
    whole: Tensor, predict_tile: Callable[[Box], Tensor], shape: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """Predict tiles, align them to the whole image and blend them.

    A tile that no positive scale aligns (usually one of sky or wall only) is replaced by the low-resolution prediction.

    Args:
        whole: (h, w) float, disparity of the whole image at the network's resolution.
        predict_tile: Returns the disparity of a part of the image at the network's resolution; called once per tile, so
            that only one is in memory.
        shape: (H, W) of the image.
        grid: Rows and columns.

    Returns:
        float32 of `shape`: disparity in the scale of `whole`, never negative; NaN where a tile has NaN.
    """
    joined = np.zeros(shape, np.float32)
    for box, window in _tile_boxes(shape, grid):
        size = (box[0].stop - box[0].start, box[1].stop - box[1].start)
        tile = _align_tile(predict_tile(box), whole, box, shape, size)
        joined[box] += tile.cpu().numpy() * window
    return joined.clip(min=0, out=joined)


def _align_tile(
    tile: Tensor, whole: Tensor, box: Box, shape: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Bring a tile to the scale of the whole image, and its coarse shape to that of the whole image."""
    if not tile.isfinite().all():  # keep NaN visible instead of replacing it by the whole image
        return tile.new_full(size, torch.nan)
    scale, shift = fit_scale_shift(tile, whole, box, shape)
    if scale <= 0:
        return _sample_box(whole, box, shape, size)
    aligned = F.interpolate(tile[None, None], size=size, mode="bilinear", align_corners=True) * scale + shift
    full_box = (slice(0, shape[0]), slice(0, shape[1]))
    residual = _cell_means(whole, box, shape) - (_cell_means(tile, full_box, shape) * scale + shift)
    coarse = F.avg_pool2d(residual[None, None], CELLS_PER_SIDE // COARSE_CELLS_PER_SIDE).to(aligned.dtype)
    return (aligned + F.interpolate(coarse, size=size, mode="bicubic", align_corners=False))[0, 0]


def fit_scale_shift(tile: Tensor, whole: Tensor, box: Box, shape: tuple[int, int]) -> tuple[float, float]:
    """Fit scale and shift that align a tile with the whole image, by least squares over cells.

    Args:
        tile: (h, w) values of a part of the image.
        whole: (H, W) values of the whole image.
        box: The part, in pixels of the image.
        shape: (H, W) of the image.
    """
    full_box = (slice(0, shape[0]), slice(0, shape[1]))
    source = _cell_means(tile, full_box, shape).flatten()
    target = _cell_means(whole, box, shape).flatten()
    centered = source - source.mean()
    variance = (centered * centered).sum()
    scale = float((centered * target).sum() / variance) if variance > 0 else 0.0
    return scale, float(target.mean()) - scale * float(source.mean())


def _tile_boxes(shape: tuple[int, int], grid: tuple[int, int]) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield each tile's box and blending weights."""
    down, across = (tile_spans(length, count) for length, count in zip(shape, grid, strict=True))
    rows, columns = blend_weights(shape[0], down), blend_weights(shape[1], across)
    for row, row_weights in zip(down, rows, strict=True):
        for column, column_weights in zip(across, columns, strict=True):
            yield (row, column), row_weights[:, None] * column_weights


def _sample_box(whole: Tensor, box: Box, shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Sample a part of a map at `size` cells; corners of map and image coincide, as in `Predictor.predict`."""
    axes = []
    for span, length, count in zip(box, shape, size, strict=True):
        centers = (
            span.start + (torch.arange(count, device=whole.device) + 0.5) * (span.stop - span.start) / count
        )
        axes.append((centers - 0.5) * (2 / max(length - 1, 1)) - 1)
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1).to(whole.dtype)
    sampled = F.grid_sample(whole[None, None], points[None], padding_mode="border", align_corners=True)
    return sampled[0, 0]


def _cell_means(map: Tensor, box: Box, shape: tuple[int, int]) -> Tensor:
    """Average a part of a map in cells, so that detail which only one of two maps can show does not count."""
    fine = _sample_box(
        map, box, shape, (SAMPLES_PER_CELL * CELLS_PER_SIDE, SAMPLES_PER_CELL * CELLS_PER_SIDE)
    )
    return F.avg_pool2d(fine[None, None], SAMPLES_PER_CELL)[0, 0].double()


def _raised_cosine(share: np.ndarray) -> np.ndarray:
    """A smooth step from 0 to 1; a rising and a falling one at the same place sum to one."""
    return np.sin(np.pi / 2 * share.clip(0, 1)) ** 2
