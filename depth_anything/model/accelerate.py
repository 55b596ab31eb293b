"""Activation checkpointing and compilation of the encoder's blocks."""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from depth_anything.model.depth_anything import DepthAnything


def accelerate(model: DepthAnything, *, checkpoint: bool, compile: bool) -> None:
    """Enable activation checkpointing and compilation; results and names in the state dict do not change.

    Call it once, before data parallelism. Checkpointing is applied first and compiled too, so the compiler sees the
    recomputation. All blocks have the same code and share one compilation.

    Args:
        model: Changed in place.
        checkpoint: Store only each block's input for the backward pass and recompute the rest.
        compile: Compile each block when it first runs.
    """
    for block in model.pretrained.blocks:
        if checkpoint:
            # A bound method: a copy of the model must run its own blocks, not these as a closure would, and the
            # compiler silently skips a functools.partial.
            block.forward = MethodType(_forward_recomputed, block)
        if compile:
            block.compile()


def _forward_recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return recompute(type(block).forward, block, *args, use_reentrant=False, **kwargs)
