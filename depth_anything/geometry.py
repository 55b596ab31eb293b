"""Disparity and depth, robust normalisation and alignment, per image and without host synchronisation.

Shapes in this file: B images, H by W pixels, N = H * W. What lies outside `valid` never matters, NaN and
infinity included, neither to the values nor to the gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_DEVIATION = 1e-6
"""Smallest mean absolute deviation that a map is divided by."""

MIN_DEPTH_M = 1e-6
"""Depths below a micrometre count as one in logarithms and ratios.

A sigmoid that underflows to 0 must not end a run, nor one such pixel spoil the mean of a table.
"""


def depth_to_disparity(depth: Tensor, *, nearest: float | None = None) -> Tensor:
    """Turn depth into disparity, its reciprocal.

    Args:
        depth: any shape, floating point, in metres; infinity is sky, NaN is unknown.
        nearest: for what a network gives: depths below it, zero included, count as it, so that a pixel next to zero
            does not take the whole range of the map. None: for measured truth, where zero is unknown.

    Returns:
        Disparity in 1/metres, same shape and dtype: 0 for sky, NaN where depth is unknown or, without `nearest`, not
        positive.

    Example:
        >>> depth_to_disparity(torch.tensor([2.0, float("inf"), 0.0])).tolist()
        [0.5, 0.0, nan]
        >>> depth_to_disparity(torch.tensor([2.0, float("nan"), 0.0]), nearest=0.1).tolist()
        [0.5, nan, 10.0]
    """
    depth = depth if nearest is None else depth.clamp(min=nearest)
    known = depth > 0
    return torch.where(known, torch.where(known, depth, 1).reciprocal(), torch.nan)


def disparity_to_depth(disparity: Tensor, *, min_disparity: float | Tensor) -> Tensor:
    """Turn metric (or aligned) disparity into depth.

    Args:
        disparity: any shape, floating point, in 1/metres; NaN stays NaN.
        min_disparity: disparities below it are raised to it, in 1/metres; 1 / the farthest depth wanted. A
            tensor must broadcast with `disparity`. Fits can be negative, so there is no default; 0 gives
            infinity.

    Returns:
        Depth in metres, same shape and dtype, at most 1 / `min_disparity`.

    Example:
        >>> disparity_to_depth(torch.tensor([0.5, -1.0]), min_disparity=0.0125).tolist()
        [2.0, 80.0]
    """
    return disparity.clamp(min=min_disparity).reciprocal()


def masked_float(x: Tensor, valid: Tensor) -> Tensor:
    """Put zeros outside `valid` and compute in float32 at least, from here on.

    The zeros are selected, not multiplied in: a NaN times zero is NaN, forwards and backwards.

    Args:
        x: any shape, any dtype.
        valid: bool, same shape.

    Returns:
        Same shape; float64 stays, anything smaller becomes float32.

    Example:
        >>> masked_float(torch.tensor([1.0, float("nan")]), torch.tensor([True, False])).tolist()
        [1.0, 0.0]
    """
    return torch.where(valid, x, 0).to(torch.promote_types(x.dtype, torch.float32))


def masked_order_index(x: Tensor, valid: Tensor, *, rank: Callable[[Any], Any]) -> Tensor:
    """Find, per row, the valid element of a rank that depends on how many are valid.

    On a CPU this is a selection, five times as fast as a sort. All rows then need the same rank: invalid
    elements are set to -inf or +inf, just so many of each that the wanted element lands on the rank of a full
    row. On other devices it is a sort, since selection there is not among the deterministic operations of
    torch.

    Args:
        x: (B, N) floating point, finite in `valid`.
        valid: (B, N) bool.
        rank: zero-based rank wanted among `count` valid elements, for an int or an int tensor alike; growing
            by at most as much as `count` does.

    Returns:
        (B, 1) int64 index into the row; of no meaning where nothing is valid.

    Example:
        >>> row, valid = torch.tensor([[5.0, 1.0, 3.0]]), torch.tensor([[True, False, True]])
        >>> masked_order_index(row, valid, rank=lambda count: count - 1).tolist()
        [[0]]
    """
    with torch.no_grad():
        wanted = rank(valid.sum(1, keepdim=True))
        if x.device.type == "cpu":
            return _select_by_kthvalue(x, valid, wanted, rank(x.shape[1]))
        return _select_by_sort(x, valid, wanted)


def _select_by_kthvalue(x: Tensor, valid: Tensor, wanted: Tensor, common: int) -> Tensor:
    low = (~valid).cumsum(1, dtype=torch.int32) <= common - wanted
    filled = torch.where(valid, x, torch.where(low, -torch.inf, torch.inf))
    return filled.kthvalue(common + 1, dim=1, keepdim=True).indices


def _select_by_sort(x: Tensor, valid: Tensor, wanted: Tensor) -> Tensor:
    order = torch.where(valid, x, torch.inf).sort(dim=1, stable=True).indices
    return order.gather(1, wanted.clamp(min=0))


def masked_median(x: Tensor, valid: Tensor) -> Tensor:
    """Compute the median of each image's valid pixels, the lower one of an even count.

    Args:
        x: (B, H, W), finite in `valid`.
        valid: (B, H, W) bool.

    Returns:
        (B,) float32, or float64 if `x` is; 0 for an image without a valid pixel. The gradient goes to the
        median's pixel.

    Example:
        >>> x = torch.tensor([[[4.0, 1.0], [3.0, float("nan")]]])
        >>> masked_median(x, ~x.isnan()).tolist()
        [3.0]
    """
    flat = masked_float(x, valid).flatten(1)
    index = masked_order_index(flat, valid.flatten(1), rank=lambda count: (count - 1) // 2)
    return flat.gather(1, index)[:, 0]


def robust_scale_shift(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Measure each image's spread and centre; (x - shift) / scale does not change with x -> a * x + b, a > 0.

        shift = median(x)    scale = max(mean |x - shift|, 1e-6)

    Source: Depth Anything (arXiv 2401.10891), equation 3, after MiDaS; here both are taken over the valid
    pixels alone.

    Args:
        x: (B, H, W), finite in `valid`.
        valid: (B, H, W) bool.

    Returns:
        scale and shift, each (B,), in the unit of `x`, float32 or float64; 1e-6 and 0 for an image without a
        valid pixel.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0, 6.0]]])
        >>> scale, shift = robust_scale_shift(x, x > 0)
        >>> round(scale.item(), 4), shift.item()
        (1.6667, 2.0)
    """
    x = masked_float(x, valid)
    shift = masked_median(x, valid)
    deviation = torch.where(valid, (x - shift[:, None, None]).abs(), 0).sum((1, 2))
    scale = deviation / valid.sum((1, 2)).clamp(min=1)
    return scale.clamp(min=MIN_DEVIATION), shift


def align_least_squares(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Fit each image's scale and shift with the least squares of scale * prediction + shift - target.

    In closed form, in float64, around the means: with the raw sums of squares a distant cluster of values
    would cancel away. (A device without float64, such as MPS, cannot run it: evaluate on the CPU.)

    Args:
        prediction: (B, H, W), finite in `valid`.
        target: (B, H, W), finite in `valid`.
        valid: (B, H, W) bool.

    Returns:
        scale and shift, each (B,), in the wider dtype of the two maps, at least float32. A constant
        prediction gives scale 0 and the target's mean; no valid pixel gives 0 and 0.

    Example:
        >>> prediction = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> scale, shift = align_least_squares(prediction, 2 * prediction + 1, prediction > 0)
        >>> scale.tolist(), shift.tolist()
        ([2.0], [1.0])
    """
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    count = valid.sum((1, 2)).clamp(min=1)
    p_centred, p_mean = _center(prediction, valid, count)
    t_centred, t_mean = _center(target, valid, count)
    variance = (p_centred * p_centred).sum((1, 2))
    covariance = (p_centred * t_centred).sum((1, 2))
    scale = torch.where(variance > 0, covariance / torch.where(variance > 0, variance, 1), 0)
    return scale.to(dtype), (t_mean - scale * p_mean).to(dtype)


def _center(x: Tensor, valid: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract each image's mean, in float64; the minimum first, so that a constant gives exact zeros."""
    x = masked_float(x, valid).double()
    low = torch.where(valid, x, torch.inf).amin((1, 2))
    low = torch.where(valid.flatten(1).any(1), low, 0)
    x = torch.where(valid, x - low[:, None, None], 0)
    mean = x.sum((1, 2)) / count
    return torch.where(valid, x - mean[:, None, None], 0), low + mean
