"""The losses of Depth Anything V2, per image and vectorised over the batch, without host synchronisation.

Shapes in this file: B images, H by W pixels; N tokens of D channels. Rules that all four share:

- The value is the sum over images divided by the number of images, so accumulated micro-batches and ranks
  agree with the batch as a whole. An image with fewer than 2 valid pixels adds zero, with zero gradient, and
  stays in the count.
- What lies outside `valid` never matters, NaN and infinity included. A NaN inside `valid` is never hidden.
- Half precisions are computed in float32; float64 stays.
"""

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from depth_anything.geometry import MIN_DEPTH_M, masked_float, masked_order_index, robust_scale_shift


def scale_shift_invariant_loss(
    prediction: Tensor, target: Tensor, valid: Tensor, *, trim: float = 0.0
) -> Tensor:
    """Compare two disparity maps up to the scale and shift of each.

        mean |p - t|,  p and t: each map less its median, divided by its mean absolute deviation

    Source: Depth Anything (arXiv 2401.10891), equations 1 to 3; trimming: Depth Anything V2 (arXiv
    2406.09414), 5.2.

    Args:
        prediction: (B, H, W), affine-invariant disparity.
        target: (B, H, W), disparity in any unit.
        valid: (B, H, W) bool.
        trim: share of each image's valid pixels, in [0, 1), left out where |p - t| is largest: floor(trim *
            count) of them, among equals the last in reading order. The mean is that of the rest.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: if `trim` is not in [0, 1).

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 6.0, 3.0]]])
        >>> valid = torch.tensor([[[True, True, True, False]]])
        >>> scale_shift_invariant_loss(5 * target + 7, target, valid).item() < 1e-6
        True
        >>> loss = scale_shift_invariant_loss(torch.tensor([[[1.0, 2.0, 3.0, 9.0]]]), target, valid)
        >>> round(loss.item(), 4)
        0.6
    """
    residual, valid = _residual(prediction, target, valid)
    return _mean_absolute(residual, _trim(residual, valid, trim))


def gradient_matching_loss(
    prediction: Tensor, target: Tensor, valid: Tensor, *, scales: int = 4, trim: float = 0.0
) -> Tensor:
    """Compare the edges of two disparity maps up to the scale and shift of each.

        sum over s of  (sum |R[y, x + 1] - R[y, x]| + sum |R[y + 1, x] - R[y, x]|) / valid pixels of scale s

    R = p - t of `scale_shift_invariant_loss`, sampled at every s-th row and column; s = 1, 2, 4, 8. A
    difference counts where both its ends are valid.

    Source: MiDaS (arXiv 1907.01341), equation 11; strides, not blurs, as in its published loss.

    Args:
        prediction: (B, H, W), affine-invariant disparity.
        target: (B, H, W), disparity in any unit.
        valid: (B, H, W) bool.
        scales: how many strides, each twice the one before.
        trim: share of each image's valid pixels, in [0, 1), taken for invalid because |R| is largest there:
            the very pixels that `scale_shift_invariant_loss` leaves out.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: if `trim` is not in [0, 1).

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> prediction = torch.tensor([[[1.0, 3.0, 2.0]]])
        >>> gradient_matching_loss(prediction, target, target > 0, scales=1).item()
        1.5
    """
    residual, valid = _residual(prediction, target, valid)
    return _mean_gradient(residual, _trim(residual, valid, trim), scales)


def invariant_losses(
    prediction: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    scales: int = 4,
    trim: float = 0.0,
    gradient_trim: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute both invariant losses for the price of one: they share the normalised maps.

    Args:
        prediction: (B, H, W), affine-invariant disparity.
        target: (B, H, W), disparity in any unit.
        valid: (B, H, W) bool.
        scales: as in `gradient_matching_loss`.
        trim: as in `scale_shift_invariant_loss`.
        gradient_trim: `trim` of `gradient_matching_loss`.
        weight: (B,), what each image counts in the sum over images; None: 1.

    Returns:
        `scale_shift_invariant_loss` and `gradient_matching_loss`, two scalars.

    Raises:
        ValueError: if a share to trim is not in [0, 1).

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 6.0]]])
        >>> ssi, gm = invariant_losses(target.flip(2), target, target > 0)
        >>> ssi.item(), gm.item()
        (2.0, 5.0)
    """
    residual, valid = _residual(prediction, target, valid)
    kept = _trim(residual, valid, trim)
    gradient_kept = kept if gradient_trim == trim else _trim(residual, valid, gradient_trim)
    return _mean_absolute(residual, kept, weight), _mean_gradient(residual, gradient_kept, scales, weight)


def silog_loss(prediction: Tensor, target: Tensor, valid: Tensor, *, variance_focus: float = 0.5) -> Tensor:
    """Compare two depth maps by the spread and the mean of their log ratio.

        sqrt(mean d^2 - variance_focus * mean(d)^2),  d = log prediction - log target

    Source: Eigen et al. (arXiv 1406.2283); the root as in the authors' metric training, which however pools
    the batch where this is per image.

    Args:
        prediction: (B, H, W), metres, positive in `valid`.
        target: (B, H, W), metres, positive in `valid`.
        valid: (B, H, W) bool.
        variance_focus: 1 forgives a wrong scale altogether, 0 not at all.

    Returns:
        Scalar, float32 or float64. Where the root is of zero its gradient is taken as zero.

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> round(silog_loss(target * torch.e, target, target > 0, variance_focus=0.75).item(), 4)
        0.5
    """
    valid = valid & _has_enough_pixels(valid)
    count = _count_valid(valid)
    difference = _masked_log(prediction, valid) - _masked_log(target, valid)
    mean = difference.sum((1, 2)) / count
    # Variance and squared mean apart: their sum cannot cancel below zero as the formula's difference can.
    centred = torch.where(valid, difference - mean[:, None, None], 0)
    square = (centred * centred).sum((1, 2)) / count + (1 - variance_focus) * mean * mean
    zero = square <= 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt()).mean()


def feature_alignment_loss(student: Tensor, teacher: Tensor, *, tolerance: float = 0.85) -> Tensor:
    """Draw a student's tokens towards those of a frozen encoder, as far as the tolerance.

        per image the mean of 1 - cos over the tokens with cos < tolerance; zero if there are none

    Source: Depth Anything (arXiv 2401.10891), 3.3, there 0.85.

    Args:
        student: (B, N, D) tokens.
        teacher: (B, N, D) tokens.
        tolerance: cosine from which on a token is near enough and left out.

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


def _residual(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the normalised maps, (B, H, W), and tell which pixels count: none where there is but one."""
    valid = valid & _has_enough_pixels(valid)
    return _normalize(prediction, valid) - _normalize(target, valid), valid


def _normalize(x: Tensor, valid: Tensor) -> Tensor:
    x = masked_float(x, valid)
    scale, shift = robust_scale_shift(x, valid)
    return (x - shift[:, None, None]) / scale[:, None, None]


def _trim(residual: Tensor, valid: Tensor, trim: float) -> Tensor:
    """Take the floor(trim * count) largest |residual| of an image out of `valid`, equal ones from the end."""
    if not 0 <= trim < 1:
        raise ValueError(
            f"trim is a share of the pixels in [0, 1), not {trim}; the student's recipe has trim=0.1"
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
    # Written so that a NaN stays in and is seen.
    return (mask & ~(size > limit) & ~surplus).view_as(valid)


def _mean_absolute(residual: Tensor, kept: Tensor, weight: Tensor | None = None) -> Tensor:
    return _mean(torch.where(kept, residual.abs(), 0).sum((1, 2)) / _count_valid(kept), weight)


def _mean_gradient(residual: Tensor, kept: Tensor, scales: int, weight: Tensor | None = None) -> Tensor:
    total = residual.new_zeros(residual.shape[0])
    for stride in (2**level for level in range(scales)):
        r, m = residual[:, ::stride, ::stride], kept[:, ::stride, ::stride]
        across = torch.where(m[:, :, 1:] & m[:, :, :-1], (r[:, :, 1:] - r[:, :, :-1]).abs(), 0)
        down = torch.where(m[:, 1:] & m[:, :-1], (r[:, 1:] - r[:, :-1]).abs(), 0)
        total = total + (across.sum((1, 2)) + down.sum((1, 2))) / _count_valid(m)
    return _mean(total, weight)


def _mean(per_image: Tensor, weight: Tensor | None) -> Tensor:
    return (per_image if weight is None else per_image * weight).mean()


def _masked_log(depth: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, masked_float(depth, valid), 1).clamp(min=MIN_DEPTH_M).log()


def _has_enough_pixels(valid: Tensor) -> Tensor:
    return valid.sum((1, 2), keepdim=True) >= 2


def _count_valid(valid: Tensor) -> Tensor:
    return valid.sum((1, 2)).clamp(min=1)
