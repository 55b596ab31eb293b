"""The range of the predictions is logged, and a drift that an affine-invariant loss does not see is reported once."""

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_training import fit, make_batch, make_module

from depth_anything.training.callbacks import TrainingMetrics
from depth_anything.training.prediction_scale import PredictionScale

STEPS = 16


class Scaled(pl.Callback):
    """Changes the last layer at a step."""

    def __init__(self, way: str, at: int) -> None:
        self.way, self.at = way, at

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == self.at - 1:
            layer = module.model.depth_head
            if self.way == "scale":
                layer.weight.data *= 1000.0
                layer.bias.data *= 1000.0
            if self.way == "shift":
                layer.bias.data += 1e4
            if self.way == "dead":
                layer.weight.data.zero_()
                layer.bias.data.zero_()


def train(folder: Path, *added: Any, accumulate: int = 1) -> list[dict[str, str]]:
    torch.manual_seed(0)
    batches = [make_batch(seed) for seed in range(STEPS * accumulate)]
    callbacks = [TrainingMetrics(every=2, batch_size=2 * accumulate), *added]
    fit(folder, make_module(), batches, *callbacks, steps=STEPS, accumulate=accumulate)
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("scale", ("their standard deviation is", "their mean is")),
        ("shift", ("their mean is", "at a mean of")),
        ("dead", ("100.0%",)),
        ("none", ()),
    ],
)
def test_a_drift_is_reported_once_with_its_values(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str], way: str, words: tuple[str, ...]
) -> None:
    rows = train(tmp_path, Scaled(way, at=12), PredictionScale(every=2))
    drifts = [line for line in capsys.readouterr().err.splitlines() if "drift" in line]
    assert bool(drifts) == (way != "none")
    for word in words:
        assert sum(word in line for line in drifts) == 1
    assert all("step 12" in line for line in drifts)
    values = [float(row["prediction_std"]) for row in rows]
    if way == "scale":
        assert values[5] > 500 * values[4]


def test_the_statistics_are_those_of_all_micro_batches(tmp_path: Path, one_thread: None) -> None:
    module = make_module()
    images = [module.inputs(make_batch(seed))["image"] for seed in (0, 1)]
    values = module.model(torch.cat(images)).detach()
    first = train(tmp_path, PredictionScale(every=1), accumulate=2)[0]
    assert float(first["prediction_mean"]) == pytest.approx(values.mean().item(), rel=1e-5)
    assert float(first["prediction_std"]) == pytest.approx(
        sum(float(image.var(correction=0)) for image in values) ** 0.5 / len(values) ** 0.5, rel=1e-4
    )


def test_what_was_reported_is_not_repeated_after_a_restart() -> None:
    scale = PredictionScale(every=1)
    for _ in range(5):
        scale._compare(1, 1.0, 0.5, 0.0, report=False)
    scale._compare(2, 1.0, 0.5, 0.95, report=False)
    again = PredictionScale(every=1)
    again.load_state_dict(scale.state_dict())
    assert again._reported == {"zeros"} and again._early == [(1.0, 0.5)] * 5
