"""Trade time for memory, and compile, block by block: applied to a finished network from outside."""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from depth_anything.model.depth_anything import DepthAnything


def accelerate(model: DepthAnything, *, checkpoint: bool, compile: bool) -> None:
    """Change how the encoder's blocks run; what they compute and the names in the state dict stay.

    Call it once, before data parallelism: first checkpointing, then compilation around it, so that the
    compiler sees what is computed twice. All blocks are alike and share one compilation.

    Args:
        model: Changed in place.
        checkpoint: Keep only each block's input for the backward pass and compute the rest again.
        compile: Compile each block when it first runs.
    """
    for block in model.pretrained.blocks:
        if checkpoint:
            # A bound method, because a copy of the model must run its own blocks (a closure would run these), and
            # because the compiler passes over a functools.partial without a word.
            block.forward = MethodType(_forward_recomputed, block)
        if compile:
            block.compile()


def _forward_recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return recompute(type(block).forward, block, *args, use_reentrant=False, **kwargs)
