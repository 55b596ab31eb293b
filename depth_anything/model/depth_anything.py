"""The network: an encoder, four taps, a DPT head.

Shapes: B images, H W pixels, N patch tokens of width D.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depth_anything.model.dpt import DPTHead
from depth_anything.model.encoder import ENCODERS, PATCH, DINOv2


class DepthAnything(nn.Module):
    """Depth Anything V2: an image to disparity, or to depth in metres."""

    def __init__(
        self,
        encoder: str = "vitl",
        *,
        max_depth: float | None = None,
        taps: Sequence[int] | None = None,
        pretrained: bool = False,
    ) -> None:
        """Build the network."""
        super().__init__()
        spec = ENCODERS[encoder]
        self.encoder = encoder
        self.taps = tuple(taps) if taps is not None else spec.taps
        self.max_depth = max_depth
        self.patch_size = PATCH
        self.pretrained = DINOv2(spec)
        self.depth_head = DPTHead(
            spec.width, features=spec.features, out_channels=spec.out_channels, max_depth=max_depth
        )

    @property
    def quantity(self) -> str:
        """What the output is: "disparity" (relative, larger is nearer) or "depth" (metres)."""
        return "disparity" if self.max_depth is None else "depth"

    def encoder_parameters(self) -> list[nn.Parameter]:
        """List the encoder's trainable parameters."""
        return [p for p in self.pretrained.parameters() if p.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """List the head's trainable parameters."""
        return [p for p in self.depth_head.parameters() if p.requires_grad]

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Predict a map the size of the image."""
        final, tokens = self.pretrained.forward_intermediates(
            image, indices=list(self.taps), norm=True, output_fmt="NLC"
        )
        grid = (image.shape[2] // self.patch_size, image.shape[3] // self.patch_size)
        output = self.depth_head(tokens, grid, image.shape[2:])
        if return_features:
            return output, final[:, self.pretrained.num_prefix_tokens :]
        return output

    def features(self, image: Tensor) -> Tensor:
        """Encode an image into its final, normalised patch tokens (B, N, D)."""
        return self.pretrained.forward_features(image)[:, self.pretrained.num_prefix_tokens :]

    @torch.no_grad()
    def infer_image(self, bgr: np.ndarray, input_size: int = 518) -> np.ndarray:
        """Predict the map of one photograph, as the authors' class of the same name does."""
        from depth_anything.preprocess import preprocess_image

        rgb = np.ascontiguousarray(bgr[..., ::-1])
        image = torch.from_numpy(preprocess_image(rgb, input_size, self.patch_size))
        output = self(image[None].to(next(self.parameters()).device))
        output = F.interpolate(output[:, None], bgr.shape[:2], mode="bilinear", align_corners=True)
        return output[0, 0].float().cpu().numpy()
