"""The optimizer of the stages that train: its two parameter groups, its schedule, and the class that a config names."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depth_anything.model.accelerate import local_rows
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.masked_autoencoder import MaskedAutoencoder
from depth_anything.training.config import OptimizerConfig
from depth_anything.training.recipes import SCHEDULES, Recipe
from depth_anything.training.value_rules import check_value, choice

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Builds an optimizer from parameter groups."""


def learning_rate_factor(step: int, *, steps: int, warmup: float, schedule: str) -> float:
    """Compute the factor of the learning rate at an optimizer step.

    Args:
        step: Number of finished optimizer steps; 0 at the first step.
        steps: Length of the run in optimizer steps.
        warmup: Share of the run, 0 to 1, in which the rate rises linearly from near zero.
        schedule: Schedule after the warmup: "constant", "linear" (to zero at the end), "cosine", "poly" (power 0.9), or
            "late-cosine" (full until 70 % of the run, as ZoeDepth's OneCycle with div 1).

    Returns:
        A factor between 0 and 1.

    Raises:
        ValueError: For an unknown schedule.
    """
    check_value("recipe.schedule", schedule, choice(*SCHEDULES))
    climb = round(warmup * steps)
    if step < climb:
        return (step + 1) / (climb + 1)
    done = (step - climb) / max(1, steps - climb)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    if schedule == "late-cosine":
        done = max(0.0, (step / max(1, steps) - 0.7) / 0.3)
    if schedule.endswith("cosine"):
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(min(1.0, done) * torch.pi, dtype=torch.float64))))
    return max(0.0, 1.0 - done) ** 0.9


def parameter_groups(
    model: DepthAnything | MaskedAutoencoder, *, encoder_lr: float, head_lr: float
) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group for the encoder and one for the head, each with its rate.

    Of a masked autoencoder, biases, norms and tokens are in two more groups without weight decay, as in the authors'
    code (MAE, main_pretrain.py); its decoder counts as the head.

    Raises:
        AssertionError: If a trainable parameter is in no group or in two.
    """
    groups: list[dict[str, Any]] = [
        {"name": "encoder", "params": list(model.encoder_parameters()), "lr": encoder_lr},
        {"name": "head", "params": list(model.head_parameters()), "lr": head_lr},
    ]
    if isinstance(model, MaskedAutoencoder):
        groups = [part for group in groups for part in _split_by_decay(group)]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    return groups


def _split_by_decay(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a group into matrices, which decay, and vectors and tokens, which do not."""
    flat = [p for p in group["params"] if max(p.shape) == p.numel()]
    rest = [p for p in group["params"] if max(p.shape) != p.numel()]
    return [
        {**group, "params": rest},
        {**group, "name": f"{group['name']}_no_decay", "params": flat, "weight_decay": 0.0},
    ]


def clip_gradients(parameters: Sequence[Tensor], limit: float | None) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`, and return their norm before that.

    Args:
        parameters: Those that have gradients.
        limit: None: do not scale.
    """
    total = gradient_norm([p.grad for p in parameters if p.grad is not None])
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, total)
    return total


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the norm of all gradients together, a scalar that is equal on all ranks and no DTensor.

    With several ranks the squares are added in float64, so that the sum does not depend on how gradients are sharded:
    DDP and FSDP2 then scale by the same number. In float32 it differs in the last digits; Adam turns that into
    other steps for weights whose gradient is almost zero. One process adds in float32, as older versions did.
    """
    sharded = isinstance(gradients[0], DTensor)
    if not sharded and not (dist.is_initialized() and dist.get_world_size() > 1):
        return nn.utils.get_total_norm(gradients)
    rows = [local_rows(gradient) for gradient in gradients]
    squares = torch.stack(torch._foreach_norm(rows, 2, dtype=torch.float64)).square().sum()
    if sharded:
        dist.all_reduce(squares)
    return squares.sqrt().to(gradients[0].dtype)


def adam_factory(recipe: Recipe) -> OptimizerFactory:
    """Return the function that builds the default optimizer: Adam with decoupled weight decay."""
    betas = (recipe.betas[0], recipe.betas[1])
    return lambda groups: torch.optim.AdamW(groups, betas=betas, weight_decay=recipe.weight_decay)


def optimizer_factory(optimizer: OptimizerConfig) -> OptimizerFactory:
    """Return the function that builds the optimizer of a config node.

    Args:
        optimizer: The class and its arguments. The parameter groups, each with its rate, are its first argument.
    """
    partial = instantiate(optimizer.as_dict(), _partial_=True, _convert_="all")
    # The arguments are saved in checkpoints, where torch's own classes have tuples.
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in partial.keywords.items()}
    return lambda groups: partial.func(groups, **arguments)
