"""Observe the output of the network in training: which images it fails on, and in which range its values lie."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from depth_anything.training.callbacks import StepCallback


class PredictionWatch:
    """A hook on a network's forward pass. Everything it computes stays on the device.

    Attributes:
        prediction: Output of the last forward pass with a gradient, (B, …), detached; None if it is no tensor.
        bad_gradient: bool (B,): images at whose output the gradient is not finite; None before the backward pass.
    """

    def __init__(self, network: nn.Module) -> None:
        """Observe `network` until `close`; of several outputs the first one."""
        self.prediction: Tensor | None = None
        self.bad_gradient: Tensor | None = None
        self._handle = network.register_forward_hook(self._observe)

    def close(self) -> None:
        """Stop."""
        self._handle.remove()
        self.prediction = self.bad_gradient = None

    def _observe(self, network: nn.Module, inputs: Any, output: Any) -> None:
        prediction = output[0] if isinstance(output, tuple) and output else output
        if not torch.is_grad_enabled() or not isinstance(prediction, Tensor) or not prediction.requires_grad:
            return  # validation, or a network with other outputs
        self.prediction, self.bad_gradient = prediction.detach(), None
        prediction.register_hook(self._observe_gradient)

    def _observe_gradient(self, gradient: Tensor) -> None:
        self.bad_gradient = bad_images(gradient)


class PredictionCallback(StepCallback):
    """A callback that observes the output of the trained network from the start of training to its end."""

    _watch: PredictionWatch | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Observe the network."""
        super().on_train_start(trainer, module)
        self._watch = PredictionWatch(module.model)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop observing the network."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Stop observing the network."""
        self.on_train_end(trainer, module)


def bad_images(values: Tensor) -> Tensor:
    """Return which images of a batch (B, …) have a value that is not finite, bool (B,)."""
    return ~values.detach().isfinite().flatten(1).all(1)
