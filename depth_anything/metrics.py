"""Depth metrics and boundary F1, per image and without host synchronization."""

import math

import torch
from torch import Tensor

from depth_anything.geometry import MIN_DEPTH_M, masked_float

BOUNDARY_RATIOS = tuple(1.05 + 0.2 * step / 9 for step in range(10))
"""Depth ratios of two neighbors that count as a boundary: ten steps from 5 % to 25 %."""


def depth_metrics(prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Compute nine metrics of each depth map.

        abs_rel   mean |p - t| / t              rmse      sqrt mean (p - t)^2
        sq_rel    mean (p - t)^2 / t            rmse_log  sqrt mean d^2,  d = ln p - ln t
        log10     mean |log10 p - log10 t|      silog     sqrt(mean d^2 - mean(d)^2 / 2)
        d1 d2 d3  share of pixels with max(p / t, t / p) < 1.25, 1.25^2, 1.25^3

    Source: Eigen et al. (arXiv 1406.2283); silog as in the official metric code, not times 100.

    Args:
        prediction: (B, H, W) depth in meters, aligned and clipped by an evaluation protocol.
        target: (B, H, W) depth in meters, positive and finite in `valid`.
        valid: (B, H, W) bool; values outside have no effect, including NaN and infinity.

    Returns:
        Name to (B,) tensor, float64 if a map is, else float32. NaN for an image without a valid pixel or with a NaN
        prediction at a valid pixel (d1, d2 and d3 count that as a miss). sq_rel and rmse are in meters.

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> metrics = depth_metrics(torch.tensor([[[1.0, 2.0, 6.0]]]), target, target > 0)
        >>> {name: round(metrics[name].item(), 3) for name in ("abs_rel", "rmse", "d1")}
        {'abs_rel': 0.167, 'rmse': 1.155, 'd1': 0.667}
    """
    count = valid.sum((1, 2))

    def mean(x: Tensor) -> Tensor:
        # 0 / 0 gives NaN for an image without a valid pixel.
        return torch.where(valid, x, 0).sum((1, 2)) / count

    p, t = masked_float(prediction, valid), masked_float(target, valid)
    error = p - t
    p, t = p.clamp(min=MIN_DEPTH_M), t.clamp(min=MIN_DEPTH_M)
    logs = p.log() - t.log()
    log_mean = mean(logs)
    log_variance = mean((logs - log_mean[:, None, None]).square())
    ratio = torch.maximum(p / t, t / p)
    return {
        "abs_rel": mean(error.abs() / t),
        "sq_rel": mean(error.square() / t),
        "rmse": mean(error.square()).sqrt(),
        "rmse_log": (log_variance + log_mean.square()).sqrt(),
        "log10": mean(logs.abs()) / math.log(10),
        "silog": (log_variance + 0.5 * log_mean.square()).sqrt(),
        "d1": mean((ratio < 1.25).to(ratio.dtype)),
        "d2": mean((ratio < 1.25**2).to(ratio.dtype)),
        "d3": mean((ratio < 1.25**3).to(ratio.dtype)),
    }


def boundary_f1(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Compute the F1 score of occluding contours.

    Two neighbors are a contour of ratio k in a direction if the second is more than k times as far as the first.
    For each k and each of the four directions (right, left, down, up):

        precision  contours of both maps / contours of the prediction
        recall     contours of both maps / contours of the target      each 0 where it would be 0 / 0

    Precision P and recall R are means over the directions, F1(k) = 2 P R / (P + R), or 0, and the score is the
    mean of F1(k) with weights k over k = 1.05 … 1.25 in ten steps. Contours are neither thinned nor widened: one that
    is off by a pixel counts as two errors. The score is invariant to scale, not to shift; disparities have the score
    of their depths, because the directions swap in pairs.

    Source: Depth Pro (arXiv 2410.02073), boundary metrics, and its `eval/boundary_metrics.py`, which has no mask and
    thins only for mattes. (MoGe pools the directions, weights by k - 1 and widens to 1, 2 and 3 pixels.)

    Args:
        prediction: (B, H, W) depth in meters, aligned and clipped by an evaluation protocol.
        target: (B, H, W) depth in meters, dense and sharp, positive and finite in `valid`.
        valid: (B, H, W) bool; a pair counts if both pixels are valid.

    Returns:
        (B,) 0 to 1, float64 if a map is, else float32. NaN for an image without a valid pixel or with a NaN
        prediction at a valid pixel. As in the source, a ratio or direction without a contour in the target adds 0,
        also for a perfect map.

    Example:
        >>> target = torch.full((1, 8, 8), 6.0)
        >>> target[:, 2:6, 2:6] = 3.0  # a box in front of a wall
        >>> maps = (target, 3 * target, target.roll(1, 2), torch.ones_like(target))
        >>> [round(boundary_f1(map_, target, target > 0).item(), 3) for map_ in maps]
        [1.0, 1.0, 0.375, 0.0]
    """
    p, t = masked_float(prediction, valid), masked_float(target, valid)
    dtype = torch.promote_types(p.dtype, t.dtype)
    scores = [_boundary_f1(*maps) for maps in zip(p.to(dtype), t.to(dtype), valid, strict=True)]
    known = valid.any(2).any(1) & ~p.isnan().any(2).any(1)
    return torch.where(known, torch.stack(scores), torch.nan)


def _boundary_f1(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Compute the score of one image from maps (H, W)."""
    ratios = torch.tensor(BOUNDARY_RATIOS, dtype=prediction.dtype, device=prediction.device)
    p, t = prediction.clamp(min=MIN_DEPTH_M), target.clamp(min=MIN_DEPTH_M)
    precision = recall = torch.zeros_like(ratios)
    for dim in (0, 1):
        ends = [
            (x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)) for x in (p, t, valid)
        ]
        both = ends[2][0] & ends[2][1]
        for first, second in ((0, 1), (1, 0)):
            steps = [torch.where(both, ends[map_][second] / ends[map_][first], 0) for map_ in (0, 1)]
            # Few pairs are a contour of either map; only these are compared with the ten ratios.
            p_steps, t_steps = (step[torch.maximum(*steps) > ratios[0]] for step in steps)
            shared = _count_exceeding(torch.minimum(p_steps, t_steps), ratios)
            precision = precision + shared / _count_exceeding(p_steps, ratios).clamp(min=1) / 4
            recall = recall + shared / _count_exceeding(t_steps, ratios).clamp(min=1) / 4
    total = precision + recall
    f1 = torch.where(total > 0, 2 * precision * recall / torch.where(total > 0, total, 1), 0)
    return (ratios * f1).sum() / ratios.sum()


def _count_exceeding(steps: Tensor, ratios: Tensor) -> Tensor:
    """Count the steps that exceed each ratio."""
    return (steps[:, None] > ratios).sum(0).to(ratios.dtype)
