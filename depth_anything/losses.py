"""The losses of Depth Anything V2, per image and vectorized over the batch, without host synchronization.

Shapes in this file: B images, H by W pixels; N tokens of D channels. All losses follow these rules:

- The value is the sum over images divided by the number of images, so that accumulated micro-batches and several
  ranks give the value of the whole batch. An image with fewer than 2 valid pixels adds zero, with zero gradient, and
  is counted.
- Values outside `valid`, including NaN and infinity, have no effect. A NaN inside `valid` is never hidden.
- Half precisions are computed in float32; float64 stays.

A pixel weight makes means weighted: the sum of weight * value divided by the sum of the weights. Weights of 1 give the
losses without weights, bit for bit; a weight that is not above 0 makes its pixel invalid.
"""

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from depth_anything.errors import Argument, UserError
from depth_anything.geometry import MIN_DEPTH_M, masked_float, masked_order_index, robust_scale_shift

NORMALIZATIONS = ("global", "hybrid", "local", "none")
"""How both maps are normalized before the ssi loss compares them; see `scale_shift_invariant_loss`."""


def scale_shift_invariant_loss(
    prediction: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    trim: float = 0.0,
    normalization: str = "global",
    levels: int = 3,
    pixel_weight: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean absolute difference of two disparity maps after normalizing scale and shift of each.

        mean |p - t|,  p and t: each map minus its median, divided by its mean absolute deviation

    Source: Depth Anything (arXiv 2401.10891), equations 1 to 3; trimming: Depth Anything V2 (arXiv
    2406.09414), 5.2; normalization: Distill Any Depth (arXiv 2502.19204), 3.1, equations 1 to 6, after the depth-range
    variant of HDN (Zhang et al., NeurIPS 2022).

    Args:
        prediction: (B, H, W), affine-invariant disparity.
        target: (B, H, W), disparity in any unit.
        valid: (B, H, W) bool.
        trim: Share in [0, 1) of each image's valid pixels to leave out: the floor(trim * count) largest |p - t|,
            among equals the last in row-major order.
        normalization: Over which pixels median and deviation are taken. "global": all valid pixels. "hybrid": the
            range of the target's valid values is divided into S equal segments, for S = 1, 2, …, 2^(levels - 1), both
            maps are normalized within the pixels of each segment, and |p - t| of a pixel is the mean over the S.
            "local": the largest S alone. "none": the maps are compared as they are.
        levels: Number of values of S.
        pixel_weight: (B, H, W) weight of each pixel in the mean; None for 1. It does not affect the normalization or
            the trimming, except that a pixel of weight 0 is invalid.
        weight: (B,) weight of each image in the sum over images; None for 1.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: If `trim` is not in [0, 1), or `normalization` is another word.

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 6.0, 3.0]]])
        >>> valid = torch.tensor([[[True, True, True, False]]])
        >>> scale_shift_invariant_loss(5 * target + 7, target, valid).item() < 1e-6
        True
        >>> loss = scale_shift_invariant_loss(torch.tensor([[[1.0, 2.0, 3.0, 9.0]]]), target, valid)
        >>> round(loss.item(), 4)
        0.6
    """
    valid = _usable(valid, pixel_weight)
    error = _error(prediction, target, valid, normalization, levels)
    return _mean_absolute(error, _trim(error, valid, trim), weight, pixel_weight)


def gradient_matching_loss(
    prediction: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    scales: int = 4,
    trim: float = 0.0,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    """Multi-scale gradient difference of two disparity maps after normalizing scale and shift of each.

        sum over s of  (sum |R[y, x + 1] - R[y, x]| + sum |R[y + 1, x] - R[y, x]|) / valid pixels of scale s

    R = p - t of `scale_shift_invariant_loss`, sampled at every s-th row and column; s = 1, 2, 4, 8. A
    difference counts if both pixels are valid.

    Source: MiDaS (arXiv 1907.01341), equation 11, with strides instead of blurs as in its code.

    Args:
        prediction: (B, H, W), affine-invariant disparity.
        target: (B, H, W), disparity in any unit.
        valid: (B, H, W) bool.
        scales: Number of strides, each twice the previous one.
        trim: Share in [0, 1) of each image's valid pixels to treat as invalid: the same pixels that
            `scale_shift_invariant_loss` leaves out.
        pixel_weight: (B, H, W) weight of each pixel; None for 1. A difference has the smaller weight of its two
            pixels, and the sum of a scale is divided by the sum of its pixels' weights.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: If `trim` is not in [0, 1).

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> prediction = torch.tensor([[[1.0, 3.0, 2.0]]])
        >>> gradient_matching_loss(prediction, target, target > 0, scales=1).item()
        1.5
    """
    valid = _usable(valid, pixel_weight)
    residual = _residual(prediction, target, valid)
    return _mean_gradient(residual, _trim(residual, valid, trim), scales, None, pixel_weight)


def invariant_losses(
    prediction: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    scales: int = 4,
    trim: float = 0.0,
    gradient_trim: float = 0.0,
    weight: Tensor | None = None,
    normalization: str = "global",
    levels: int = 3,
    pixel_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute both scale- and shift-invariant losses, which share the normalized maps.

    Args:
        prediction: (B, H, W), affine-invariant disparity.
        target: (B, H, W), disparity in any unit.
        valid: (B, H, W) bool.
        scales: As in `gradient_matching_loss`.
        trim: As in `scale_shift_invariant_loss`.
        gradient_trim: The `trim` of `gradient_matching_loss`.
        weight: (B,) weight of each image in the sum over images; None for 1.
        normalization, levels: As in `scale_shift_invariant_loss`. Gradient matching keeps the global normalization,
            because neighbors of two segments have no common scale; with "none" it compares the maps as they are.
            Its trimming takes the largest |p - t| of the ssi loss.
        pixel_weight: (B, H, W) weight of each pixel, as in both losses; None for 1.

    Returns:
        `scale_shift_invariant_loss` and `gradient_matching_loss`, two scalars.

    Raises:
        ValueError: If a share to trim is not in [0, 1), or `normalization` is another word.

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 6.0]]])
        >>> ssi, gm = invariant_losses(target.flip(2), target, target > 0)
        >>> ssi.item(), gm.item()
        (2.0, 5.0)
    """
    valid = _usable(valid, pixel_weight)
    if normalization == "none":
        residual = masked_float(prediction, valid) - masked_float(target, valid)
    else:
        residual = _residual(prediction, target, valid)
    error = residual
    if normalization not in ("global", "none"):
        error = _error(prediction, target, valid, normalization, levels, whole=residual)
    kept = _trim(error, valid, trim)
    gradient_kept = kept if gradient_trim == trim else _trim(error, valid, gradient_trim)
    return (
        _mean_absolute(error, kept, weight, pixel_weight),
        _mean_gradient(residual, gradient_kept, scales, weight, pixel_weight),
    )


def silog_loss(prediction: Tensor, target: Tensor, valid: Tensor, *, variance_focus: float = 0.5) -> Tensor:
    """Scale-invariant logarithmic loss of two depth maps.

        sqrt(mean d^2 - variance_focus * mean(d)^2),  d = log prediction - log target

    Source: Eigen et al. (arXiv 1406.2283), with the root of the official metric training, which pools the batch
    while this is per image.

    Args:
        prediction: (B, H, W), meters, positive in `valid`.
        target: (B, H, W), meters, positive in `valid`.
        valid: (B, H, W) bool.
        variance_focus: With 1 the loss is invariant to scale, with 0 a wrong scale counts fully.

    Returns:
        Scalar, float32 or float64. The gradient of the root of zero is zero.

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> round(silog_loss(target * torch.e, target, target > 0, variance_focus=0.75).item(), 4)
        0.5
    """
    valid = valid & _has_enough_pixels(valid)
    count = _count_valid(valid)
    difference = _masked_log(prediction, valid) - _masked_log(target, valid)
    mean = difference.sum((1, 2)) / count
    # Variance plus squared mean, which unlike the difference in the formula cannot become negative by rounding.
    centered = torch.where(valid, difference - mean[:, None, None], 0)
    square = (centered * centered).sum((1, 2)) / count + (1 - variance_focus) * mean * mean
    zero = square <= 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt()).mean()


def feature_alignment_loss(student: Tensor, teacher: Tensor, *, tolerance: float = 0.85) -> Tensor:
    """Cosine alignment of a student's tokens with a frozen encoder's, ignoring tokens above the tolerance.

        per image the mean of 1 - cos over the tokens with cos < tolerance; zero if there are none

    Source: Depth Anything (arXiv 2401.10891), section 3.3.

    Args:
        student: (B, N, D) tokens.
        teacher: (B, N, D) tokens.
        tolerance: Tokens with at least this cosine are left out; 0.85 in the paper.

    Returns:
        Scalar, float32 or float64.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
        >>> teacher = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
        >>> feature_alignment_loss(student, teacher).item()
        1.0
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = (functional.normalize(x.to(dtype), dim=2, eps=1e-6) for x in (student, teacher))
    cosine = (student * teacher).sum(2)
    far = ~(cosine.detach() >= tolerance)
    return (torch.where(far, 1 - cosine, 0).sum(1) / far.sum(1).clamp(min=1)).mean()


def _usable(valid: Tensor, pixel_weight: Tensor | None) -> Tensor:
    """Return the valid pixels with a weight above 0, none for an image with only one of them."""
    valid = valid if pixel_weight is None else valid & (pixel_weight > 0)
    return valid & _has_enough_pixels(valid)


def _residual(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return the difference of the normalized maps, (B, H, W)."""
    return _normalize(prediction, valid) - _normalize(target, valid)


def _error(
    prediction: Tensor,
    target: Tensor,
    valid: Tensor,
    normalization: str,
    levels: int,
    *,
    whole: Tensor | None = None,
) -> Tensor:
    """Return the difference of each pixel, (B, H, W): signed, or for "hybrid" and "local" absolute.

    `whole` is the result of `_residual`, if it is known.
    """
    if normalization not in NORMALIZATIONS:
        raise UserError(
            [Argument("normalization", normalization), f" is not one of {', '.join(NORMALIZATIONS)}"],
            ["the papers of Depth Anything use ", Argument("normalization", "global")],
        )
    if normalization == "none":
        return masked_float(prediction, valid) - masked_float(target, valid)
    if normalization == "global":
        return _residual(prediction, target, valid)
    if normalization == "local":
        return _segment_error(prediction, target, valid, 2 ** (levels - 1))
    total = (_residual(prediction, target, valid) if whole is None else whole).abs()
    for level in range(1, levels):
        total = total + _segment_error(prediction, target, valid, 2**level)
    return total / levels


def _segment_error(prediction: Tensor, target: Tensor, valid: Tensor, segments: int) -> Tensor:
    """Return |p - t| of both maps normalized within each segment of the target's range of values; 0 outside `valid`."""
    values = masked_float(target.detach(), valid)
    low = torch.where(valid, values, torch.inf).amin((1, 2), keepdim=True)
    high = torch.where(valid, values, -torch.inf).amax((1, 2), keepdim=True)
    span = torch.where(high > low, high - low, 1)
    # Compared as floats, because the conversion of NaN to an integer is undefined.
    number = ((values - low) / span * segments).floor().clamp(max=segments - 1)
    total = torch.where(valid & number.isnan(), torch.nan, torch.zeros_like(values))
    for segment in range(segments):
        inside = valid & (number == segment)
        total = torch.where(inside, _residual(prediction, target, inside).abs(), total)
    return total


def _normalize(x: Tensor, valid: Tensor) -> Tensor:
    x = masked_float(x, valid)
    scale, shift = robust_scale_shift(x, valid)
    return (x - shift[:, None, None]) / scale[:, None, None]


def _trim(residual: Tensor, valid: Tensor, trim: float) -> Tensor:
    """Remove the floor(trim * count) largest |residual| of each image from `valid`, of equal ones the last."""
    if not 0 <= trim < 1:
        raise UserError(
            [Argument("trim", trim), " is not in [0, 1)"], ["the paper's is ", Argument("trim", 0.1)]
        )
    if trim == 0:
        return valid
    share = Fraction(trim).limit_denominator(1_000_000)  # 0.29 of 100 is 29, but floor(0.29 * 100) is 28

    def last_kept(count: int | Tensor) -> int | Tensor:
        return count - count * share.numerator // share.denominator - 1

    size, mask = residual.detach().abs().flatten(1), valid.flatten(1)
    limit = size.gather(1, masked_order_index(size, mask, rank=last_kept))
    equal = mask & (size == limit)
    room = last_kept(mask.sum(1, keepdim=True)) + 1 - (mask & (size < limit)).sum(1, keepdim=True)
    surplus = equal & (equal.cumsum(1, dtype=torch.int32) > room)
    # A NaN residual stays valid, so that the loss becomes NaN.
    return (mask & ~(size > limit) & ~surplus).view_as(valid)


def _mean_absolute(
    error: Tensor, kept: Tensor, weight: Tensor | None = None, pixel_weight: Tensor | None = None
) -> Tensor:
    size = error.abs()
    if pixel_weight is None:
        return _mean(torch.where(kept, size, 0).sum((1, 2)) / _count_valid(kept), weight)
    w = masked_float(pixel_weight, kept).to(size.dtype)
    return _mean(torch.where(kept, size * w, 0).sum((1, 2)) / _sum_weights(w), weight)


def _mean_gradient(
    residual: Tensor,
    kept: Tensor,
    scales: int,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    total = residual.new_zeros(residual.shape[0])
    w_all = None if pixel_weight is None else masked_float(pixel_weight, kept).to(residual.dtype)
    for stride in (2**level for level in range(scales)):
        r, m = residual[:, ::stride, ::stride], kept[:, ::stride, ::stride]
        across, down = (r[:, :, 1:] - r[:, :, :-1]).abs(), (r[:, 1:] - r[:, :-1]).abs()
        count = _count_valid(m)
        if w_all is not None:
            w = w_all[:, ::stride, ::stride]
            across = across * torch.minimum(w[:, :, 1:], w[:, :, :-1])
            down = down * torch.minimum(w[:, 1:], w[:, :-1])
            count = _sum_weights(w)
        across = torch.where(m[:, :, 1:] & m[:, :, :-1], across, 0)
        down = torch.where(m[:, 1:] & m[:, :-1], down, 0)
        total = total + (across.sum((1, 2)) + down.sum((1, 2))) / count
    return _mean(total, weight)


def _sum_weights(w: Tensor) -> Tensor:
    total = w.sum((1, 2))
    return torch.where(total > 0, total, 1)


def _mean(per_image: Tensor, weight: Tensor | None) -> Tensor:
    return (per_image if weight is None else per_image * weight).mean()


def _masked_log(depth: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, masked_float(depth, valid), 1).clamp(min=MIN_DEPTH_M).log()


def _has_enough_pixels(valid: Tensor) -> Tensor:
    return valid.sum((1, 2), keepdim=True) >= 2


def _count_valid(valid: Tensor) -> Tensor:
    return valid.sum((1, 2)).clamp(min=1)
