"""Count the floating-point operations of a network, forward and backward, on the meta device.

The counts are those of `torch.utils.flop_counter`: matrix products, convolutions and attention; a multiplication and an
addition are two. Norms, activations, interpolation and losses are not counted. On the CPU the counter would miss
attention; on the meta device nothing is computed or allocated.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from depth_anything.model.accelerate import accelerate
from depth_anything.model.depth_anything import DepthAnything


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations for one image.

    Attributes:
        forward: Of the network.
        step: Of a training step: forward, backward and the frozen encoder, nothing recomputed. What MFU counts.
        recomputed: What activation checkpointing repeats in the backward pass, besides `step`.
    """

    forward: int
    step: int
    recomputed: int = 0


def count_flops(
    model: DepthAnything,
    height: int,
    width: int,
    *,
    frozen_encoder: bool = False,
    checkpointing: bool = False,
) -> FlopCount:
    """Count the operations of a network for one image.

    Args:
        model: On the meta device. With `checkpointing` its blocks are changed, so do not use it again.
        height: Height of the image in pixels, a multiple of the patch.
        width: Width of the image in pixels, a multiple of the patch.
        frozen_encoder: A step also encodes the image without a gradient, for feature alignment.
        checkpointing: Also count what recomputing the encoder's blocks costs.
    """
    image = torch.empty(1, 3, height, width, device="meta")
    forward, trained = _count_step(model, image)
    encoded = recomputed = 0
    if frozen_encoder:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.features(image)
        encoded = int(counter.get_total_flops())
    if checkpointing:
        accelerate(model, checkpoint=True, compile=False)
        recomputed = _count_step(model, image)[1] - trained
    return FlopCount(forward, trained + encoded, recomputed)


def count_forward_flops(model: DepthAnything, height: int, width: int) -> int:
    """Count the operations of a prediction of one image; arguments as `count_flops`."""
    image = torch.empty(1, 3, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return int(counter.get_total_flops())


def _count_step(model: DepthAnything, image: torch.Tensor) -> tuple[int, int]:
    """Return the operations of the forward pass, and of forward and backward."""
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        output = model(image)
        forward = int(counter.get_total_flops())
        output.sum().backward()
    return forward, int(counter.get_total_flops())
