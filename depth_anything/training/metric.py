"""stage=metric: a relative network learns metres (the authors' metric_depth/; V1 §6 for the ZoeDepth route)."""

from typing import Any

import torch
from torch import Tensor

from depth_anything.geometry import depth_to_disparity
from depth_anything.losses import silog_loss
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.training.base import DepthModule
from depth_anything.training.config import MetricRecipe

__all__ = ["Metric", "MetricRecipe"]

MIN_DEPTH_M = 1e-3
"""Nearer predictions have its disparity: one pixel that is next to nothing must not be all that counts."""


class Metric(DepthModule):
    """The metric stage: sigmoid × max_depth against depth in metres, by SILog, per image.

    An image without two valid pixels, as a crop of sky above a LiDAR's reach, adds nothing and counts. Replayed
    images, whose truth is disparity, are compared by the invariant losses with 1 / prediction: they say what is
    nearer than what, and leave the metres to the others.
    """

    def __init__(
        self, model: DepthAnything, recipe: MetricRecipe, *, frozen: DepthAnything | None = None
    ) -> None:
        """Hold a network that gives depth, and its recipe.

        Args:
            model: The network to train, with its `max_depth`.
            recipe: Its numbers.
            frozen: None; this stage aligns no features.
        """
        super().__init__(model, recipe, frozen=frozen)
        self.silog_weight, self.variance_focus = recipe.silog_weight, recipe.variance_focus

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute SILog of (B,H,W) metres, outside autocast, and under "loss" what is minimised.

        Where the batch says of each image whether its truth is in "metric", bool (B,), "ssi" and "gm" of the
        others come in. Each is a sum over its images divided by B, as all losses here: they grow with the share.
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
