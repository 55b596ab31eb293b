"""Skip an optimizer step whose loss or gradient is not finite, decided on the device, without waiting for it.

Gradients are averaged over all ranks, so a gradient that is not finite on one rank is so on all of them, and all ranks
skip the same step. A skipped step changes neither the weights nor the state of the optimizer, Adam's own step count
included. It counts as a step of the run: the schedule advances, and its samples are used up, so that a resumed run
does not meet them again.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from depth_anything.errors import UserError
from depth_anything.model.accelerate import local_rows

FUSED_OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
"""Classes whose fused kernels skip the update where `found_inf` is 1 (as for torch.amp.GradScaler)."""


def poison_loss(loss: Tensor) -> Tensor:
    """Return the loss; one that is not finite gets a gradient that is NaN everywhere, which reaches all ranks.

    The gradient of an infinite loss may be finite, or zero. A finite loss is multiplied by 1, which is exact.

    Args:
        loss: Scalar.
    """
    finite = loss.detach().isfinite()
    return loss * torch.where(finite, torch.ones_like(loss), torch.full_like(loss, torch.nan))


class StepGuard:
    """Decides whether an optimizer step is applied; a module calls it between the gradient and the update.

    Attributes:
        on_device: Whether the optimizer skips by itself, without the host knowing it. Else the host waits for the
            gradient norm, which costs nothing on a CPU.
        loss_limit: Scalar on the device: a step with a larger loss is skipped, too. None: there is no limit.
        skipped: Scalar bool on the device: whether the last step was skipped. Equal on all ranks.
    """

    def __init__(self) -> None:
        """Start without a limit; the host decides."""
        self.on_device = False
        self.loss_limit: Tensor | None = None
        self.skipped: Tensor | None = None

    def prepare(self, optimizer: torch.optim.Optimizer, *, loss_scaled: bool) -> bool:
        """Let the optimizer skip by itself if its parameters are on a GPU and it has a fused kernel.

        Args:
            optimizer: With its state restored.
            loss_scaled: Whether a GradScaler unscales the gradients; it waits for the device at every step itself.

        Returns:
            Whether no step waits for the device.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if all(p.device.type == "cpu" for p in parameters):
            return True
        self.on_device = not loss_scaled and use_fused_kernel(optimizer)
        return self.on_device

    def apply(self, optimizer: torch.optim.Optimizer, norm: Tensor, losses: Sequence[Tensor]) -> None:
        """Skip the update that follows if the gradient is not finite or the loss is above `loss_limit`.

        Args:
            optimizer: It holds the gradients, and updates next.
            norm: Norm of the gradient over all ranks and shards, a scalar.
            losses: The loss of each micro-batch of this step on this rank.
        """
        skipped = ~norm.isfinite()
        if self.loss_limit is not None and losses:
            skipped = skipped | (mean_over_ranks(torch.stack(list(losses)).mean()) > self.loss_limit)
        self.skipped = skipped
        if self.on_device:
            optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        elif bool(skipped):
            for group in optimizer.param_groups:  # optimizers leave parameters without a gradient alone
                for parameter in group["params"]:
                    parameter.grad = None


def use_fused_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """Switch an optimizer of torch to its fused kernel, with its state, unless its arguments chose another one.

    Returns:
        Whether it uses the fused kernel now.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    if type(optimizer) not in FUSED_OPTIMIZERS:
        return False
    if all(group.get("fused") for group in groups):
        return True
    if any(group.get("foreach") or group.get("differentiable") for group in groups):
        return False
    for group in groups:
        group.update(fused=True, foreach=False)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return True


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, on the device."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def require_finite_weights(module: nn.Module, step: int) -> None:
    """Refuse to save weights that are not finite, as an optimizer or a module of a user's own may make them.

    Raises:
        UserError: Naming the first such parameter.
    """
    named = list(module.named_parameters())
    flags = [local_rows(parameter.detach()).isfinite().all() for _, parameter in named]
    finite = [bool(flag) for flag in torch.stack(flags).tolist()]  # one wait for the device
    bad = [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]
    if bad:
        raise UserError(
            f"{len(bad)} parameters are not finite at step {step}, as {bad[0]}; this step is not saved",
            "start the same command again with lower learning rates to continue from the last checkpoint, as "
            "'resume_with=[recipe.encoder_lr,recipe.head_lr]' with half of each rate",
        )
