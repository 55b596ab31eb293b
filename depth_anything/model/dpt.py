"""The DPT head: turns the tokens of four encoder blocks into one map, with the official parameter names.

Shapes: B images, H W pixels, h w patches, D width of a token, F features of the fusion path.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualConvUnit(nn.Module):
    """Two 3×3 convolutions, each after a ReLU, with a residual connection."""

    def __init__(self, features: int) -> None:
        """Build the unit for a fixed number of channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, F, h, w) to the same shape."""
        # The first ReLU must not be in place: the residual needs x unchanged.
        return x + self.conv2(F.relu(self.conv1(F.relu(x)), inplace=True))


class FusionBlock(nn.Module):
    """Add a level to the path of the coarser levels, refine it, and resize it to the next level."""

    def __init__(self, features: int) -> None:
        """Build the block for a fixed number of channels."""
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        self.resConfUnit1 = ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)

    def forward(self, path: Tensor, level: Tensor | None, size: Sequence[int]) -> Tensor:
        """Fuse path and level, both (B, F, h, w), into (B, F, *size)."""
        if level is not None:
            path = path + self.resConfUnit1(level)
        # The official code resizes first. A 1×1 convolution and an interpolation commute, because the weights of the
        # interpolation sum to one; in this order the convolution has a quarter of the pixels.
        path = self.out_conv(self.resConfUnit2(path))
        return F.interpolate(path, size=size, mode="bilinear", align_corners=True)


class DPTHead(nn.Module):
    """The decoder of Depth Anything V2.

    Source: dpt.py and util/blocks.py of the official repository, without class token and batch norm.
    """

    def __init__(
        self, width: int, *, features: int, out_channels: Sequence[int], max_depth: float | None = None
    ) -> None:
        """Build the head with random weights.

        Args:
            width: Channels D of the tokens.
            features: Channels F of the fusion path.
            out_channels: Channels of the four levels, from fine to coarse.
            max_depth: None for disparity ≥ 0; a number of meters for depth between 0 and it.
        """
        super().__init__()
        self.max_depth = max_depth
        self.projects = nn.ModuleList([nn.Conv2d(width, channels, 1) for channels in out_channels])
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(out_channels[0], out_channels[0], 4, stride=4),
                nn.ConvTranspose2d(out_channels[1], out_channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(out_channels[3], out_channels[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = nn.Module()
        for i, channels in enumerate(out_channels, 1):
            setattr(self.scratch, f"layer{i}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{i}", FusionBlock(features))
        self.scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 1, 1)
        )
        # The coarsest level has no path to add to, so this unit never runs; official files contain it.
        self.scratch.refinenet4.resConfUnit1.requires_grad_(False)
        self._init_output()

    def _init_output(self) -> None:
        """Initialize the last three convolutions such that the final ReLU is active, at any seed.

        With torch's default, each convolution loses two thirds of the variance and the biases dominate: the map has a
        spread of 0.005 around ±0.1, and where it is negative everything is zero without a gradient. Here the
        convolutions keep the variance, and the map is spread around one (zero before a sigmoid).
        """
        output = self.scratch.output_conv2
        convolve, project = output[0], output[2]
        for layer in (self.scratch.output_conv1, convolve, project):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
        nn.init.constant_(project.bias, 1.0 if self.max_depth is None else 0.0)

    def forward(self, tokens: Sequence[Tensor], grid: Sequence[int], size: Sequence[int]) -> Tensor:
        """Decode four levels of tokens into a map.

        Args:
            tokens: Four (B, h·w, D), from the first tap to the last.
            grid: (h, w).
            size: (H, W) of the result, pixels.

        Returns:
            (B, H, W): disparity ≥ 0, or meters if max_depth was given.
        """
        path = self.scratch.output_conv1(self._fuse(tokens, grid))
        path = F.interpolate(path, size=size, mode="bilinear", align_corners=True)
        output = self._output(path).squeeze(1)
        if self.max_depth is None:
            return F.relu(output)
        return torch.sigmoid(output) * self.max_depth

    def _fuse(self, tokens: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
        """Fuse four levels of tokens into (B, F, 8 · h, 8 · w)."""
        scratch = self.scratch
        levels = [
            resize(project(x.transpose(1, 2).unflatten(2, grid)))
            for x, project, resize in zip(tokens, self.projects, self.resize_layers, strict=True)
        ]
        one, two, three, four = (getattr(scratch, f"layer{i}_rn")(level) for i, level in enumerate(levels, 1))
        path = scratch.refinenet4(four, None, three.shape[2:])
        path = scratch.refinenet3(path, three, two.shape[2:])
        path = scratch.refinenet2(path, two, one.shape[2:])
        return scratch.refinenet1(path, one, (one.shape[2] * 2, one.shape[3] * 2))

    def _output(self, path: Tensor) -> Tensor:
        output = self.scratch.output_conv2
        convolve, activate, project = output[0], output[1], output[2]
        path = activate(convolve(path))
        if path.dtype == project.weight.dtype:
            return project(path)
        # Under autocast the last sum stays in full precision: bfloat16 has 8 bits, whose steps would be visible.
        with torch.autocast(path.device.type, enabled=False):
            return project(path.to(project.weight.dtype))
