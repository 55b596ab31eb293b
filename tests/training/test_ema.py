"""callbacks=ema: equal to a plain loop, also through a resume; frozen parts are outside."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, Timer
from tiny_training import (
    STEPS,
    Data,
    fit,
    make_batch,
    make_module,
    make_trainer,
    run_callbacks,
    train,
    weights,
)
from torch import nn

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback
from depth_anything.training.ema import EMA, averaged_tensors
from depth_anything.training.lightning import move_timers_first, save_networks
from depth_anything.training.run_dir import RunDir
from depth_anything.training.whole_network import evaluation_network, whole_network

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's advice to those who shard a model's layers, and that the callback of a checkpoint is missing.
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
DECAY = 0.5


def average(ema: EMA) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in ema.weights.values()])


def plain_loop(steps: int = STEPS, *, accumulate: int = 1, every: int = 1, start: int = 0) -> torch.Tensor:
    """Train without Lightning, with the same loss, and average with a formula on paper."""
    module = make_module()
    configured = module.configure_optimizers()
    optimizer, mean, updates = configured["optimizer"], weights(module), 0
    batches = [make_batch(seed) for seed in range(steps * accumulate)]
    for step in range(1, steps + 1):
        for batch in batches[(step - 1) * accumulate : step * accumulate]:
            (module.losses(batch)["loss"] / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step > start and (step - 1) % every == 0:
            mean = weights(module) if updates == 0 else DECAY * mean + (1 - DECAY) * weights(module)
            updates += 1
    return mean


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"start": 3}])
def test_the_average_equals_a_plain_loop_through_a_resume(tmp_path: Path, options: dict[str, int]) -> None:
    names = {"every": "update_every_n_steps", "start": "update_starting_at_step"}

    def make_ema() -> EMA:
        return EMA(DECAY, **{names[name]: value for name, value in options.items()})

    unbroken = make_ema()
    module = train(tmp_path / "unbroken", unbroken)
    torch.testing.assert_close(average(unbroken), plain_loop(**options), atol=1e-6, rtol=0)
    assert not torch.equal(average(unbroken), weights(module))
    assert torch.equal(
        weights(module), weights(train(tmp_path / "plain"))
    )  # training does not see the average
    for begin, steps in ((0, 4), (4, STEPS)):
        resumed = make_ema()
        train(tmp_path / "resumed", resumed, begin=begin, steps=steps)
    assert torch.equal(average(resumed), average(unbroken)) and resumed.updates == unbroken.updates


def test_accumulated_batches_are_one_update(tmp_path: Path) -> None:
    ema = EMA(DECAY)
    fit(tmp_path, make_module(), [make_batch(seed) for seed in range(8)], ema, steps=4, accumulate=2)
    assert ema.updates == 4
    torch.testing.assert_close(average(ema), plain_loop(4, accumulate=2), atol=1e-6, rtol=0)


def test_the_average_of_half_precision_weights_is_kept_in_float32() -> None:
    """With a decay of 0.999 the changes would vanish in bfloat16, of whose digits there are three."""
    layer, ema = nn.Linear(1, 1, bias=False).bfloat16(), EMA(0.999)
    expected = torch.tensor(1.0)
    for step, value in enumerate([1.0] + [2.0] * 50, start=1):
        nn.init.constant_(layer.weight, value)
        ema.on_step(None, layer, step)  # type: ignore[arg-type]
        expected = expected * 0.999 + value * 0.001
    assert ema.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.weights["weight"].squeeze(), expected, atol=1e-6, rtol=0)


def test_frozen_parts_and_buffers_are_outside_of_the_average(tmp_path: Path) -> None:
    """The frozen encoder of feature alignment, the mask token, blocks after the last tap; batch norms are inside."""
    model = DepthAnything("vitn", taps=(0, 1, 2, 3))
    module = DepthModule(model, make_module().recipe, frozen=DepthAnything("vitn"))
    trained = {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert averaged_tensors(module).keys() == trained
    assert "model.pretrained.mask_token" not in trained
    assert any(name.startswith("model.pretrained.blocks.3.") for name in trained)
    assert not any(name.startswith("model.pretrained.blocks.4.") for name in trained)
    normalized = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    assert {"1.running_mean", "1.running_var"} <= averaged_tensors(normalized).keys()
    assert "1.num_batches_tracked" not in averaged_tensors(normalized)


def test_validation_sees_the_average_and_training_its_own_weights(tmp_path: Path) -> None:
    module, ema = make_module(), EMA(DECAY)
    trainer = fit(tmp_path, module, [make_batch(seed) for seed in range(3)], ema, steps=3)
    live, current = module.model, weights(module)
    with pytest.raises(KeyError), evaluation_network(trainer, module):
        assert torch.equal(weights(module), average(ema)) and module.model is not live
        raise KeyError
    assert module.model is live and torch.equal(weights(module), current)


def test_an_average_of_lightning_continues(tmp_path: Path) -> None:
    """callbacks=ema was Lightning's class; its checkpoints hold the average as the state dict."""
    train(tmp_path, EMAWeightAveraging(decay=DECAY), steps=4)
    ema = EMA(DECAY)
    module = train(tmp_path, ema, begin=4)
    assert torch.equal(weights(module), weights(train(tmp_path / "plain")))
    torch.testing.assert_close(average(ema), plain_loop(), atol=1e-6, rtol=0)


class StopEarly(StepCallback):
    """Ends a training of more than three steps after the third."""

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        trainer.should_stop = step == 3 < trainer.max_steps


@pytest.mark.parametrize("steps", [3, 100], ids=["at the end", "early"])
def test_the_last_step_is_saved_before_lightning_replaces_the_weights(tmp_path: Path, steps: int) -> None:
    callbacks = run_callbacks(tmp_path, StopEarly(), EMAWeightAveraging(decay=DECAY), every=100)
    fit(tmp_path, make_module(), [make_batch(seed) for seed in range(5)], *callbacks, steps=steps)
    saved = torch.load(tmp_path / "checkpoints" / "step-000000003.ckpt", weights_only=True)
    for name, tensor in train(tmp_path / "plain", steps=3).state_dict().items():
        assert torch.equal(saved["current_model_state"][name], tensor), name


def test_a_run_that_began_without_an_average_gets_one(tmp_path: Path) -> None:
    train(tmp_path, steps=4)
    ema = EMA(DECAY)
    train(tmp_path, ema, begin=4)
    assert ema.updates == 2


def test_an_early_end_saves_weights_and_average(tmp_path: Path) -> None:
    callbacks = run_callbacks(tmp_path, EMA(DECAY), Timer(duration={"microseconds": 1}))
    trainer = make_trainer(tmp_path, *callbacks, steps=STEPS)
    move_timers_first(trainer)
    trainer.fit(make_module(), datamodule=Data())
    resumed, unbroken = EMA(DECAY), EMA(DECAY)
    module = train(tmp_path, resumed, begin=1)
    assert torch.equal(weights(module), weights(train(tmp_path / "unbroken", unbroken)))
    assert torch.equal(average(resumed), average(unbroken))


class Networks:
    """Records what `save_networks` saves."""

    def __init__(self) -> None:
        self.saved: list[tuple[str, torch.Tensor, dict[str, str]]] = []

    def save(self, module: Any, path: Path, *, title: str, measured: dict[str, str]) -> None:
        self.saved.append((path.name, weights(module).clone(), dict(measured)))


@pytest.mark.parametrize("left", [0, 2])
def test_both_networks_are_saved_also_after_a_kill_before(tmp_path: Path, left: int) -> None:
    """The card of the average has the results of the validation; no step may be left to train."""
    ema = EMA(DECAY)
    module = train(tmp_path, ema, steps=STEPS - left)
    if left == 0:
        expected = weights(module), average(ema)
        ema = EMA(DECAY)
        trainer = make_trainer(tmp_path, *run_callbacks(tmp_path, ema), steps=STEPS)
        module = make_module()
        trainer.fit(module, datamodule=Data(), ckpt_path=tmp_path / f"checkpoints/step-{STEPS:09d}.ckpt")
    else:
        expected = weights(module), average(ema)
        trainer = module.trainer
    trainer.loggers[0].log_metrics({"val_abs_rel": 0.25}, step=STEPS)
    trainer.loggers[0].save()
    networks: Any = Networks()
    save_networks(trainer, module, networks, RunDir(tmp_path), title="run")
    assert [name for name, _, _ in networks.saved] == ["model.safetensors", "model-ema.safetensors"]
    for (_, saved, _), wanted in zip(networks.saved, expected, strict=True):
        assert torch.equal(saved, wanted)
    assert [measured for _, _, measured in networks.saved] == [{}, {"abs_rel": "0.25"}]


def test_the_copy_shares_no_weights_with_the_network_in_training() -> None:
    module = make_module()
    before = copy.deepcopy(module.state_dict())
    with whole_network(module, {name: torch.zeros_like(tensor) for name, tensor in before.items()}):
        assert not any(tensor.any() for tensor in module.model.state_dict().values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 5])
def test_an_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay"):
        EMA(decay)


def test_the_folder_of_a_controlnet_has_a_second_one_for_the_average(tmp_path: Path) -> None:
    folder = RunDir(tmp_path, result="controlnet/diffusion_pytorch_model.safetensors")
    assert folder.average == tmp_path / "controlnet-ema" / "diffusion_pytorch_model.safetensors"
