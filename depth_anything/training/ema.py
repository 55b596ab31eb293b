"""Exponential moving average (EMA) of the trained weights."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from depth_anything.model.accelerate import local_rows
from depth_anything.training.callbacks import StepCallback

AVERAGE_KEY = "average"
"""Key of the average in a checkpoint: "weights", by the names of the state dict, and the number of "updates"."""


class EMA(StepCallback):
    """Keep a moving average of the trained weights: average ← decay · average + (1 − decay) · weights.

    Validation scores the average, best.safetensors holds it, and at the end model-ema.safetensors does; the weights
    that train are never replaced. Lightning's EMAWeightAveraging copies the whole module, with frozen networks and in
    the precision of the weights, and cannot average sharded weights. This average has the trained parameters and the
    statistics of batch norms only, in float32, and of sharded ones each rank's rows.
    """

    def __init__(
        self, decay: float = 0.999, *, update_every_n_steps: int = 1, update_starting_at_step: int = 0
    ) -> None:
        """Average from the first update on, which copies the weights.

        Args:
            decay: From 0 to below 1.
            update_every_n_steps: Optimizer steps between two updates.
            update_starting_at_step: Number of finished optimizer steps before the first update.

        Raises:
            ValueError: If the decay is another number.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay} must be from 0 to below 1")
        self.decay, self.every, self.start = decay, update_every_n_steps, update_starting_at_step
        self.updates = 0
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Move an average that was read from a checkpoint to the device."""
        super().on_train_start(trainer, module)
        self.weights = {name: tensor.to(module.device) for name, tensor in self.weights.items()}

    @torch.no_grad()
    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Update the average when due."""
        if step <= self.start or (step - 1) % self.every:
            return
        current = averaged_tensors(module)
        if not self.updates:
            self.weights = {name: tensor.detach().float().clone() for name, tensor in current.items()}
        else:
            own = [local_rows(self.weights[name]) for name in current]
            torch._foreach_lerp_(
                own, [local_rows(tensor).float() for tensor in current.values()], 1 - self.decay
            )
        self.updates += 1

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the average; the state dict holds the weights that train."""
        checkpoint[AVERAGE_KEY] = {"updates": self.updates, "weights": self.weights}

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the average, also from a checkpoint of Lightning's EMAWeightAveraging; none begins at this step."""
        if "current_model_state" in checkpoint:  # Lightning's state dict is the average
            module.load_state_dict(checkpoint["current_model_state"])
            count = checkpoint["averaging_state"]["n_averaged"]
            names = averaged_tensors(module)
            weights = {name: checkpoint["state_dict"][name].float() for name in names}
            self.updates, self.weights = int(count), weights
        elif saved := checkpoint.get(AVERAGE_KEY):
            self.updates, self.weights = saved["updates"], dict(saved["weights"])
        self.weights = {name: tensor.to(module.device) for name, tensor in self.weights.items()}


def averaged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what is averaged, by the names of the state dict: trained parameters, and statistics of batch norms."""
    tensors: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for prefix, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            for name in ("running_mean", "running_var"):
                tensors[f"{prefix}.{name}"] = getattr(part, name)
    return tensors
