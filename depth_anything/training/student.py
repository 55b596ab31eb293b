"""stage=student: train a network of any size on the teacher's labels of real photographs."""

from typing import Any

import torch
from torch import Tensor

from depth_anything.losses import feature_alignment_loss
from depth_anything.training.base import DepthModule


class Student(DepthModule):
    """The student stage (paper §5.2; V1 §3.3 for feature alignment).

    The ssi loss ignores the largest residuals of each image (`recipe.trim`). Feature alignment keeps the encoder's last
    features close to those of a frozen DINOv2 of the same size, which gets the image without perturbation.
    """

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute ssi, gradient matching, local and feature alignment, and their weighted sum as "loss"."""
        r = self.recipe
        if r.alignment_weight == 0:
            return super().losses(batch)
        given = self.inputs(batch)
        prediction, features = self.model(given["image"], return_features=True)
        parts = self.disparity_losses(prediction, given)
        with torch.no_grad():
            wanted = self._frozen[0].features(given["clean"])
        with torch.autocast(prediction.device.type, enabled=False):
            parts["alignment"] = feature_alignment_loss(features, wanted, tolerance=r.alignment_tolerance)
        loss = self.weighted_sum(parts) + r.alignment_weight * parts["alignment"]
        return {"loss": loss, **parts}
