"""Combine the disparity of several teachers for one image, and measure where they agree.

Shapes in this file: K teachers, B images, H by W pixels. NaN and infinity mean that a teacher has no value at a pixel.
Everything is vectorized over the images and does not synchronize with the host.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from depth_anything.data.label_fields import key_uniform
from depth_anything.geometry import align_least_squares, masked_float, robust_scale_shift

RULES = ("first", "random", "mean", "confidence")
AGREEMENT_TOLERANCE = 0.5
"""Difference of two teachers at which they do not agree at all, in mean absolute deviations of the first map: the unit
of the ssi loss, in which the residuals of a student are of the order of 0.1."""


class AlignedMaps(NamedTuple):
    """Maps of several teachers in the scale of one of them.

    Attributes:
        maps: (K,B,H,W) float32; NaN where a teacher has no value or is left out.
        scale: (B,), mean absolute deviation of the reference map, in its unit.
        correlation: (B,) in [0, 1]: the smallest correlation of a teacher's map with the reference; 0 for one that is
            constant or falls where the reference rises, which no positive scale fits.
    """

    maps: Tensor
    scale: Tensor
    correlation: Tensor


def choose_teacher(key: str, shares: Sequence[float]) -> int:
    """Choose a teacher for a record from a hash of its key: the same in every process and on every machine.

    Args:
        key: The record's key.
        shares: How often each teacher is chosen, in any unit.

    Example:
        >>> chosen = [choose_teacher(f"set/0/{i}", [7, 3]) for i in range(1000)]
        >>> 250 < chosen.count(1) < 350
        True
    """
    [number] = key_uniform(key, "teacher", 1)
    total, passed = sum(shares), 0.0
    for index, share in enumerate(shares):
        passed += share
        if number * total < passed:
            return index
    return max(index for index, share in enumerate(shares) if share > 0)


def align_maps(maps: Tensor) -> AlignedMaps:
    """Fit scale and shift of each map to the first one, by least squares over the pixels that both have.

    The reference of an image is the first map with at least two values; it is not changed. A map whose best scale is
    not positive, or that shares fewer than two pixels with the reference, is left out.

    Args:
        maps: (K,B,H,W) floating point disparity, each in a unit of its own.
    """
    maps = maps.float()
    known = maps.isfinite()
    usable = known.sum((2, 3)) >= 2
    chosen = usable.int().argmax(0)
    images = torch.arange(maps.shape[1], device=maps.device)
    target, target_known = maps[chosen, images], known[chosen, images]
    aligned, smallest = [], torch.ones(maps.shape[1], device=maps.device)
    for k, values in enumerate(maps):
        shared = known[k] & target_known
        scale, shift = align_least_squares(values, target, shared)
        is_reference = chosen == k
        enough = shared.sum((1, 2)) >= 2
        fits = enough & (scale > 0) & scale.isfinite() & shift.isfinite()
        compared = enough & ~is_reference
        correlation = torch.where(fits, _correlation(values, target, shared), 0)
        smallest = torch.where(compared, torch.minimum(smallest, correlation), smallest)
        fitted = masked_float(values, known[k]) * scale[:, None, None] + shift[:, None, None]
        fitted = torch.where(is_reference[:, None, None], values, fitted)
        keep = known[k] & (fits | is_reference)[:, None, None]
        aligned.append(torch.where(keep, fitted, torch.nan))
    deviation, _ = robust_scale_shift(target, target_known)
    return AlignedMaps(torch.stack(aligned), deviation, smallest)


def _correlation(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Return the correlation of two maps over the valid pixels of each image, (B,), at least 0; 0 for a constant."""
    count = valid.sum((1, 2)).clamp(min=1)
    centered = []
    for values in (x, y):
        values = masked_float(values, valid).double()
        mean = values.sum((1, 2)) / count
        centered.append(torch.where(valid, values - mean[:, None, None], 0))
    covariance = (centered[0] * centered[1]).sum((1, 2))
    product = (centered[0].square().sum((1, 2)) * centered[1].square().sum((1, 2))).sqrt()
    return torch.where(product > 0, covariance / torch.where(product > 0, product, 1), 0).clamp(0, 1).float()


def mean_map(aligned: AlignedMaps) -> Tensor:
    """Return the mean of the teachers that have a value, (B,H,W); NaN where none has."""
    known = aligned.maps.isfinite()
    count = known.sum(0)
    total = masked_float(aligned.maps, known).sum(0)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def median_map(aligned: AlignedMaps) -> Tensor:
    """Return the median of the teachers that have a value, of an even number the mean of the middle two, (B,H,W)."""
    known = aligned.maps.isfinite()
    count = known.sum(0, keepdim=True)
    ordered = torch.where(known, aligned.maps, torch.inf).sort(dim=0).values
    low = ordered.gather(0, ((count - 1) // 2).clamp(min=0))[0]
    high = ordered.gather(0, (count // 2).clamp(max=len(ordered) - 1))[0]
    return torch.where(count[0] > 0, (low + high) / 2, torch.nan)


def agreement_map(aligned: AlignedMaps, *, tolerance: float = AGREEMENT_TOLERANCE) -> Tensor:
    """Measure where teachers agree, in [0, 1].

        r * max(0, 1 - (largest - smallest aligned value) / (tolerance * mean absolute deviation of the reference map))

    r is the smallest correlation of a teacher with the reference in this image. The second factor is 1 for the same
    value and 0 for a difference of `tolerance` deviations or more. Without r, maps that have nothing in common would
    agree along the lines where the reference has its mean, because least squares fits such a map by a constant. The
    agreement is 0 where fewer than two teachers have a value.

    Args:
        aligned: Result of `align_maps`.
        tolerance: Above 0.

    Returns:
        (B,H,W) float32.
    """
    known = aligned.maps.isfinite()
    high = torch.where(known, aligned.maps, -torch.inf).amax(0)
    low = torch.where(known, aligned.maps, torch.inf).amin(0)
    spread = torch.where(known.sum(0) >= 2, high - low, torch.inf)
    closeness = (1 - spread / (tolerance * aligned.scale[:, None, None])).clamp(0, 1)
    return aligned.correlation[:, None, None] * closeness
