"""Conversion of disparity and depth, robust normalization and least-squares alignment.

Shapes in this file: B images, H by W pixels, N = H * W. Values outside `valid`, including NaN and infinity, never
affect results or gradients. No function synchronizes with the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_DEVIATION = 1e-6
"""Smallest mean absolute deviation that a map is divided by."""

MIN_DEPTH_M = 1e-6
"""Smallest depth, meters, in logarithms and ratios.

A sigmoid that underflows to 0 must not stop a run, and one such pixel must not spoil a mean.
"""


def depth_to_disparity(depth: Tensor, *, nearest: float | None = None) -> Tensor:
    """Convert depth to disparity, its reciprocal.

    Args:
        depth: Any shape, floating point, meters; infinity is sky, NaN is unknown.
        nearest: Smaller depths, including zero, are raised to it, so that one pixel near zero does not take the whole
            range of a predicted map. None is for measured depth, where zero means unknown.

    Returns:
        Disparity in 1/meters, same shape and dtype: 0 for sky, NaN where depth is unknown or, without `nearest`, not
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
    """Convert metric (or aligned) disparity to depth.

    Args:
        disparity: Any shape, floating point, 1/meters; NaN stays NaN.
        min_disparity: Smaller disparities are raised to it, 1/meters: the reciprocal of the largest depth. A tensor
            must broadcast with `disparity`. Fits can be negative, so there is no default; 0 gives infinity.

    Returns:
        Depth in meters, same shape and dtype, at most 1 / `min_disparity`.

    Example:
        >>> disparity_to_depth(torch.tensor([0.5, -1.0]), min_disparity=0.0125).tolist()
        [2.0, 80.0]
    """
    return disparity.clamp(min=min_disparity).reciprocal()


def masked_float(x: Tensor, valid: Tensor) -> Tensor:
    """Set values outside `valid` to zero and convert to at least float32.

    The zeros are selected, because NaN times zero is NaN, in the forward and the backward pass.

    Args:
        x: Any shape and dtype.
        valid: Bool, same shape.

    Returns:
        Same shape; float64 stays, smaller types become float32.

    Example:
        >>> masked_float(torch.tensor([1.0, float("nan")]), torch.tensor([True, False])).tolist()
        [1.0, 0.0]
    """
    return torch.where(valid, x, 0).to(torch.promote_types(x.dtype, torch.float32))


def masked_order_index(x: Tensor, valid: Tensor, *, rank: Callable[[Any], Any]) -> Tensor:
    """Find in each row the valid element of a rank that depends on the number of valid elements.

    On a CPU this uses kthvalue, which is five times as fast as a sort but needs the same rank in all rows: invalid
    elements are set to -inf or +inf, as many of each as move the element to the rank of a full row. On other devices
    it sorts, because kthvalue is not deterministic there.

    Args:
        x: (B, N) floating point, finite in `valid`.
        valid: (B, N) bool.
        rank: Maps the count of valid elements, an int or an int tensor, to a zero-based rank; it must not grow faster
            than the count.

    Returns:
        (B, 1) int64 index into the row; arbitrary where nothing is valid.

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
        (B,) float32, or float64 if `x` is; 0 for an image without a valid pixel. The gradient flows to the
        pixel of the median.

    Example:
        >>> x = torch.tensor([[[4.0, 1.0], [3.0, float("nan")]]])
        >>> masked_median(x, ~x.isnan()).tolist()
        [3.0]
    """
    flat = masked_float(x, valid).flatten(1)
    index = masked_order_index(flat, valid.flatten(1), rank=lambda count: (count - 1) // 2)
    return flat.gather(1, index)[:, 0]


def robust_scale_shift(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each image's scale and shift; (x - shift) / scale is invariant to x -> a * x + b with a > 0.

        shift = median(x)    scale = max(mean |x - shift|, 1e-6)

    Source: Depth Anything (arXiv 2401.10891), equation 3, after MiDaS; both over the valid pixels only.

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
    """Fit scale and shift of each image that minimize the squares of scale * prediction + shift - target.

    Closed form in float64 around the means, because raw sums of squares lose precision for values far from zero.
    Devices without float64, such as MPS, cannot run it: evaluate on the CPU.

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
    p_centered, p_mean = _center(prediction, valid, count)
    t_centered, t_mean = _center(target, valid, count)
    variance = (p_centered * p_centered).sum((1, 2))
    covariance = (p_centered * t_centered).sum((1, 2))
    scale = torch.where(variance > 0, covariance / torch.where(variance > 0, variance, 1), 0)
    return scale.to(dtype), (t_mean - scale * p_mean).to(dtype)


def _center(x: Tensor, valid: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract each image's mean in float64, after its minimum, so that a constant becomes exactly zero."""
    x = masked_float(x, valid).double()
    low = torch.where(valid, x, torch.inf).amin((1, 2))
    low = torch.where(valid.flatten(1).any(1), low, 0)
    x = torch.where(valid, x - low[:, None, None], 0)
    mean = x.sum((1, 2)) / count
    return torch.where(valid, x - mean[:, None, None], 0), low + mean
