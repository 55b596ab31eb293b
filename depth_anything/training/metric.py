"""stage=metric: fine-tune a relative network to depth in meters (the authors' metric_depth/; V1 §6 for ZoeDepth)."""

from typing import Any

import torch
from torch import Tensor

from depth_anything.geometry import depth_to_disparity
from depth_anything.losses import silog_loss
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.training.base import DepthModule
from depth_anything.training.recipes import MetricRecipe

__all__ = ["Metric", "MetricRecipe"]

MIN_DEPTH_M = 1e-3
"""Smallest predicted depth that is inverted, so that one pixel near zero does not dominate the disparity."""


class Metric(DepthModule):
    """The metric stage: SILog between sigmoid × max_depth and the depth in meters, per image.

    An image with fewer than two valid pixels, such as a crop of sky, adds zero to the mean. Replayed images, whose
    target is disparity, are compared with 1 / prediction by the invariant losses, which constrain relative depth only.
    """

    def __init__(
        self, model: DepthAnything, recipe: MetricRecipe, *, frozen: DepthAnything | None = None
    ) -> None:
        """Store a network that predicts depth, and the hyperparameters.

        Args:
            model: The network to train, with a `max_depth`.
            recipe: The hyperparameters.
            frozen: None; this stage has no feature alignment.
        """
        super().__init__(model, recipe, frozen=frozen)
        self.silog_weight, self.variance_focus = recipe.silog_weight, recipe.variance_focus

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute SILog of a (B,H,W) depth in meters, in float32, and the weighted sum of all terms as "loss".

        With replay, "metric", bool (B,), marks the images whose target is in meters; for the others "ssi" and "gm" are
        added. Every term is a sum over its images divided by B, so it grows with their share.
        """
        given = self.inputs(batch)
        prediction = self.model(given["image"])
        metric = batch["metric"][:, None, None] if "metric" in batch else None
        valid = given["valid"] if metric is None else given["valid"] & metric
        with torch.autocast(prediction.device.type, enabled=False):
            silog = silog_loss(prediction, given["target"], valid, variance_focus=self.variance_focus)
        loss = self.silog_weight * silog
        if metric is None:
            return {"loss": loss, "silog": silog}
        disparity = depth_to_disparity(prediction.float(), nearest=MIN_DEPTH_M)
        parts = self.disparity_losses(disparity, {**given, "valid": given["valid"] & ~metric})
        loss = loss + self.recipe.ssi_weight * parts["ssi"] + self.recipe.gm_weight * parts["gm"]
        return {"loss": loss, "silog": silog, **parts}
