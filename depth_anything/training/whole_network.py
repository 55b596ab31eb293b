"""The network that is validated and saved: whole if it is sharded, with averaged weights if there are any."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.distributed.tensor import DTensor

from depth_anything.model.accelerate import copy_without_weights
from depth_anything.training.ema import EMA


def averaging_callbacks(trainer: Any) -> list[WeightAveraging]:
    """List Lightning's weight-averaging callbacks of a Trainer."""
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]


def find_ema(trainer: Any) -> EMA | None:
    """Return the EMA callback of a Trainer that has an average by now."""
    return next((each for each in trainer.callbacks if isinstance(each, EMA) and each.updates), None)


@contextmanager
def whole_network(module: Any, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Let `module.model` be a copy with all weights on this rank, if it is sharded or other weights are given.

    Every rank must enter, because the ranks send each other their rows. Inside, a rank may run the network alone. The
    weights that train are not changed.

    Args:
        module: The module in training; a sharded one has a `plain_model` without weights.
        weights: Values to use in place of the module's own, by the names of its state dict; sharded or not.
    """
    live = module.model
    sharded = any(isinstance(p, DTensor) for p in live.parameters())
    if not sharded and not weights:
        yield
        return
    network = copy_without_weights(module.plain_model if sharded else live)
    state: dict[str, Tensor] = {}
    for name, tensor in live.state_dict().items():
        value = (weights or {}).get(f"model.{name}", tensor)
        value = value.full_tensor() if isinstance(value, DTensor) else value
        state[name] = value.to(tensor.device, tensor.dtype)
    network.load_state_dict(state, assign=True)
    module.model = network
    try:
        yield
    finally:
        module.model = live


@contextmanager
def evaluation_network(trainer: Any, module: pl.LightningModule) -> Iterator[None]:
    """Let `module.model` be what is validated: whole, with the average of callbacks=ema if there is one.

    Lightning's own WeightAveraging callbacks put their average in place, as in Lightning's validation loop, which calls
    their `on_validation_epoch_start` and `on_validation_epoch_end`.
    """
    average = find_ema(trainer)
    for callback in averaging_callbacks(trainer):
        callback.on_validation_epoch_start(trainer, module)
    try:
        with whole_network(module, average.weights if average else None):
            yield
    finally:
        for callback in averaging_callbacks(trainer):
            callback.on_validation_epoch_end(trainer, module)
