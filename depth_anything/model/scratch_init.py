"""Random starting weights for short runs: positions that are known from the start, and blocks that contribute at once.

DINOv2's own rule (deviation 0.02 for everything) is made for runs of 10⁵ steps. At the size of `vitn` it leaves
positions at a thirtieth of the patch embedding and each block at a few percent of its input: a run of some hundred
steps ends on the plateau on which the network sees neither where a patch is nor what is around it.
"""

import math

import torch
from torch import Tensor, nn

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.masked_autoencoder import MaskedAutoencoder

POSITION_AMPLITUDE = 0.5
"""About the deviation of a patch embedding of the default convolution, for normalized images."""

LONGEST_TO_SHORTEST_WAVE = 100.0
SHORTEST_WAVE_RADIANS = 6.0
"""Radians across the image: about one period, so that the embedding stays smooth when it is resampled."""


def sine_cosine_positions(side: int, width: int) -> Tensor:
    """Return a 2D sine-cosine position embedding, float32 (side², width), rows first.

    A quarter of the channels each hold sine and cosine of x and of y, at geometrically spaced frequencies (ViT
    practice, as in MAE, arXiv 2111.06377, appendix A.1, with lower frequencies).

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width={width} must be a multiple of 4")
    quarter = width // 4
    frequency = SHORTEST_WAVE_RADIANS / LONGEST_TO_SHORTEST_WAVE ** (torch.arange(quarter) / quarter)
    place = torch.arange(side) / side
    y, x = torch.meshgrid(place, place, indexing="ij")
    waves = [f(axis.reshape(-1, 1) * frequency) for axis in (x, y) for f in (torch.sin, torch.cos)]
    return POSITION_AMPLITUDE * torch.cat(waves, 1)


@torch.no_grad()
def init_from_scratch(model: DepthAnything | MaskedAutoencoder) -> None:
    """Replace the encoder's random weights: sine-cosine positions, and linear layers by Glorot and Bengio's rule.

    Draws from torch's global generator. The head keeps its weights, and so do positions that are not a square grid
    behind one class position (some encoders of timm).
    """
    positions = getattr(model.pretrained, "pos_embed", None)
    if positions is not None:
        _, count, width = positions.shape
        side = math.isqrt(count - 1)
        if side * side == count - 1 and width % 4 == 0:
            positions[0, 1:] = sine_cosine_positions(side, width)
    for block in model.pretrained.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
