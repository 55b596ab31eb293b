"""Random starting weights for short runs: positions that are known from the start, and blocks that contribute at once.

Attention starts with a structure that trained vision transformers share: tokens attend to those like themselves, which
with these positions are their neighbors, and subtract their mean ("Mimetic Initialization of Self-Attention Layers",
arXiv 2305.09828).

The first map is nearer at the bottom, as most photographs are. The losses do not depend on the scale of the map, so
nothing draws an inverted map through zero: of runs that began with a random map, one in six stayed inverted to the end.

DINOv2's own rule (deviation 0.02 for everything) is made for runs of 10⁵ steps. At the size of `vitn` it leaves
positions at a thirtieth of the patch embedding and each block at a few percent of its input: a run of some hundred
steps ends on the plateau on which the network sees neither where a patch is nor what is around it.
"""

import math

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.dpt import DPTHead
from depth_anything.model.masked_autoencoder import MaskedAutoencoder

POSITION_AMPLITUDE = 0.5
"""About the deviation of a patch embedding of the default convolution, for normalized images."""

LONGEST_TO_SHORTEST_WAVE = 100.0
SHORTEST_WAVE_RADIANS = 6.0
"""Radians across the image: about one period, so that the embedding stays smooth when it is resampled."""


QUERY_KEY_NOISE, QUERY_KEY_IDENTITY = 0.7, 0.7
VALUE_OUTPUT_NOISE, VALUE_OUTPUT_IDENTITY = 0.4, 0.4
"""α₁, β₁, α₂ and β₂ of arXiv 2305.09828, section 4."""


RAMP = 0.3
"""Half the difference between the bottom and the top of the first map, whose mean is 1."""
RIDGE = 1e-3
"""Regularization of the fit, as a share of the mean square of the inputs: it keeps the weights near 1."""


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


def _draw_factors(width: int, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Factor noise · N(0, 1 / width) + identity · I into L · R with singular vectors, both (width, width)."""
    left, values, right = torch.linalg.svd(
        noise * torch.randn(width, width) / math.sqrt(width) + identity * torch.eye(width)
    )
    return left * values.sqrt(), values.sqrt()[:, None] * right


@torch.no_grad()
def init_attention(attention: nn.Module) -> None:
    """Initialize timm's fused self-attention as arXiv 2305.09828, section 4, does.

    For each head, queries times keys is about 0.7 Z + 0.7 I, restricted to the largest singular values that fit the
    head; values times the output projection is 0.4 Z - 0.4 I. Z is normal with variance 1 / D. Biases stay.

    Args:
        attention: With `qkv`, a linear layer from D to 3 D, `proj` from D to D, and `num_heads`.
    """
    width = attention.proj.weight.shape[0]
    head = width // attention.num_heads
    queries, keys, values = attention.qkv.weight.view(3, width, width)
    for start in range(0, width, head):
        left, right = _draw_factors(width, QUERY_KEY_NOISE, QUERY_KEY_IDENTITY)
        queries[start : start + head] = left[:, :head].T
        keys[start : start + head] = right[:head]
    left, right = _draw_factors(width, VALUE_OUTPUT_NOISE, -VALUE_OUTPUT_IDENTITY)
    values.copy_(left.T)
    attention.proj.weight.copy_(right.T)


def _probe_images(count: int = 8, side: int = 70) -> Tensor:
    """Return smooth random images (count, 3, side, side), which know nothing of top and bottom; always the same."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(side, side), mode="bicubic")


@torch.no_grad()
def fit_vertical_ramp(model: DepthAnything) -> None:
    """Fit the last convolution of the DPT head such that random images get a map that rises toward the bottom.

    Ridge regression of its inputs on a ramp from 1 - RAMP at the top to 1 + RAMP at the bottom.
    """
    head = model.depth_head.scratch.output_conv2[2]
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    training = model.training
    side = 10 * model.multiple
    model.eval()(_probe_images(side=side))
    model.train(training)
    hook.remove()
    features = seen[0].permute(0, 2, 3, 1).double()
    ramp = torch.linspace(-RAMP, RAMP, side, dtype=torch.float64)[None, :, None].expand(features.shape[:3])
    mean = features.mean((0, 1, 2))
    inputs = (features - mean).flatten(0, 2)
    gram = inputs.T @ inputs
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram, inputs.T @ ramp.flatten())
    head.weight.copy_(weight.reshape(head.weight.shape))
    head.bias.copy_(1 - mean @ weight)


@torch.no_grad()
def init_from_scratch(model: DepthAnything | MaskedAutoencoder) -> None:
    """Replace the encoder's random weights: sine-cosine positions, structured attention, other linear layers by Glorot.

    Draws from torch's global generator. Positions that are not a square grid behind one class position (some encoders
    of timm) stay; attention without a fused `qkv` gets Glorot and Bengio's rule. Of the head, only the last convolution
    of a DPT head for disparity changes (`fit_vertical_ramp`).
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
        attention = getattr(block, "attn", None)
        if isinstance(attention, Attention):
            init_attention(attention)
    head = getattr(model, "depth_head", None)
    if isinstance(head, DPTHead) and head.max_depth is None:
        fit_vertical_ramp(model)
