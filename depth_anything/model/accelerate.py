"""Activation checkpointing, compilation and sharding of a network, applied in this order from outside."""

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recompute

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.masked_autoencoder import MaskedAutoencoder


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


def shard(
    model: DepthAnything | MaskedAutoencoder, mesh: DeviceMesh, *, gather_dtype: torch.dtype | None = None
) -> None:
    """Distribute the parameters over ranks (FSDP2): each rank keeps its rows of every parameter.

    Call it once, after `accelerate`, on every rank with equal weights. Each block of the encoder and the head is
    gathered when it runs and freed after; parameters outside of them stay gathered during a step. Gradients
    are averaged in float32. Names in the state dict do not change; its tensors are DTensors.

    Args:
        model: Changed in place, and moved to the device of the mesh.
        mesh: One-dimensional.
        gather_dtype: In which blocks and head are gathered and computed, as bfloat16 under autocast; None for that of
            the parameters, which the optimizer updates in their own dtype in any case.
    """
    # Autocast keeps residual sums and norms in float32; casting the inputs of blocks would not.
    policy = MixedPrecisionPolicy(
        param_dtype=gather_dtype,
        reduce_dtype=torch.float32 if gather_dtype else None,
        cast_forward_inputs=False,
    )
    for block in model.pretrained.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if isinstance(model, DepthAnything):
        fully_shard(model.depth_head, mesh=mesh, mp_policy=policy)
    # By default the rest is freed after the backward pass, which a frozen network does not have.
    frozen = not any(p.requires_grad for p in model.parameters())
    fully_shard(model, mesh=mesh, reshard_after_forward=True if frozen else None)
    if isinstance(model, DepthAnything):
        register_fsdp_forward_method(model, "features")  # gathers as `forward` does


def local_rows(tensor: Tensor) -> Tensor:
    """Return the rows of a sharded tensor that this rank holds, and an ordinary tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_without_weights(model: nn.Module) -> nn.Module:
    """Copy a network; its parameters are on the meta device and take no memory. A sharded one cannot be copied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _forward_recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return recompute(type(block).forward, block, *args, use_reentrant=False, **kwargs)
