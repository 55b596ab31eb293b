"""Heads of semantic segmentation that classify each pixel: a linear layer, and the DPT head with a channel per class.

Shapes: B images, H W pixels, h w patches, D width of a token, K classes.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depth_anything.classes import IGNORED
from depth_anything.model.dpt import DPTHead


class LinearHead(nn.Module):
    """Batch norm and a linear layer on the last tokens, as DINOv2 evaluates frozen features (arXiv 2304.07193, 7.4).

    In training the statistics are those of a micro-batch, so they depend on the number of devices.
    """

    last_blocks: ClassVar[bool] = False
    """Reads the taps of depth; only the last one counts."""

    def __init__(self, width: int, *, features: int, out_channels: Sequence[int], classes: int) -> None:
        """Build the head with small random weights; `features` and `out_channels` are not used."""
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens: Sequence[Tensor], grid: Sequence[int], size: Sequence[int]) -> Tensor:
        """Classify pixels.

        Args:
            tokens: Four (B, h·w, D), from the first tap to the last.
            grid: (h, w).
            size: (H, W) of the result, pixels.

        Returns:
            (B, K, H, W) logits.
        """
        logits = self.classify(self.norm(tokens[-1].transpose(1, 2).unflatten(2, list(grid))))
        return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


class DPTClassHead(DPTHead):
    """The DPT head of depth up to its fused features, then two convolutions to a channel per class."""

    last_blocks: ClassVar[bool] = False

    def __init__(self, width: int, *, features: int, out_channels: Sequence[int], classes: int) -> None:
        """Build the head with random weights; arguments as for `DPTHead`."""
        super().__init__(width, features=features, out_channels=out_channels)
        self.scratch.output_conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(features, classes, 1))
        nn.init.kaiming_uniform_(self.scratch.output_conv1.weight, nonlinearity="relu")
        nn.init.zeros_(self.scratch.output_conv1.bias)
        nn.init.normal_(self.scratch.output_conv2[1].weight, std=0.01)
        nn.init.zeros_(self.scratch.output_conv2[1].bias)

    def forward(self, tokens: Sequence[Tensor], grid: Sequence[int], size: Sequence[int]) -> Tensor:
        """Classify pixels; arguments and result as for `LinearHead`."""
        path = self._fuse(tokens, grid)
        logits = self.scratch.output_conv2(self.scratch.output_conv1(path))
        return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy of each image: the mean over its pixels that are not ignored, and then over images.

    An image whose pixels are all ignored counts as zero. So the loss does not depend on how a batch is divided.

    Args:
        logits: (B, K, H, W).
        target: Integers (B, H, W), `IGNORED` where a pixel does not count.
    """
    losses = F.cross_entropy(logits.float(), target.long(), ignore_index=IGNORED, reduction="none")
    count = (target != IGNORED).flatten(1).sum(1)
    return (losses.flatten(1).sum(1) / torch.clamp(count, min=1)).mean()
