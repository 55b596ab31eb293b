"""The nine numbers by which depth maps are compared, per image and without host synchronisation."""

import math

import torch
from torch import Tensor

from depth_anything.geometry import MIN_METRES, masked_float


def depth_metrics(prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Compare depth maps, image by image.

        abs_rel   mean |p - t| / t              rmse      sqrt mean (p - t)^2
        sq_rel    mean (p - t)^2 / t            rmse_log  sqrt mean d^2,  d = ln p - ln t
        log10     mean |log10 p - log10 t|      silog     sqrt(mean d^2 - mean(d)^2 / 2)
        d1 d2 d3  share of pixels with max(p / t, t / p) < 1.25, 1.25^2, 1.25^3

    Source: Eigen et al. (arXiv 1406.2283); silog as the authors' metric code has it, not times 100.

    Args:
        prediction: (B, H, W) depth in metres; as an evaluation protocol aligned and clipped it.
        target: (B, H, W) depth in metres, positive and finite in `valid`.
        valid: (B, H, W) bool; what lies outside never matters, NaN and infinity included.

    Returns:
        Each name above with a (B,) tensor, float64 if a map is, else float32. NaN where an image has no valid
        pixel, or a NaN prediction at a valid one (which the three shares count as a miss). sq_rel and rmse
        are in metres.

    Example:
        >>> target = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> metrics = depth_metrics(torch.tensor([[[1.0, 2.0, 6.0]]]), target, target > 0)
        >>> {name: round(metrics[name].item(), 3) for name in ("abs_rel", "rmse", "d1")}
        {'abs_rel': 0.167, 'rmse': 1.155, 'd1': 0.667}
    """
    count = valid.sum((1, 2))

    def mean(x: Tensor) -> Tensor:
        # 0 / 0 is the NaN of an image without a valid pixel.
        return torch.where(valid, x, 0).sum((1, 2)) / count

    p, t = masked_float(prediction, valid), masked_float(target, valid)
    error = p - t
    p, t = p.clamp(min=MIN_METRES), t.clamp(min=MIN_METRES)
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
