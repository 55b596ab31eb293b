"""Trade time for memory, and compile, block by block: applied to a finished network from outside."""

from functools import partial

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
            block.forward = partial(recompute, block.forward, use_reentrant=False)
        if compile:
            block.compile()
