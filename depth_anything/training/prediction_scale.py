"""Log in which range the predictions lie, and warn when it drifts: affine-invariant losses do not see it."""

import math
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from depth_anything.training.prediction_watch import PredictionCallback
from depth_anything.training.step_guard import mean_over_ranks

REFERENCE_LINES = 5
"""The first log lines of a run, whose median is what later ones are compared with."""
MAX_DRIFT = 100.0
"""So many times larger or smaller than the reference is reported."""
MAX_ZEROS = 0.9
"""So large a share of zeros is reported: the last ReLU of the head is dead there, and has no gradient."""
MIN_RELATIVE_DEVIATION = 2.0**-7
"""Below this share of the mean, the values differ by less than two steps of bf16, which has 8 bits."""


def summarize_prediction(prediction: Tensor) -> Tensor:
    """Return mean, mean variance within an image, and share of zeros of a prediction (B, …), float32 (3,).

    The mean square minus the square of the mean would lose all digits at a large mean.
    """
    values = prediction.float().flatten(1)
    return torch.stack([values.mean(), values.var(1, correction=0).mean(), (values == 0).float().mean()])


class PredictionScale(PredictionCallback):
    """Log mean, standard deviation and share of zeros of the raw predictions at every log line.

    Statistics are means over all images of the logged step; the deviation is that within an image. Each of these is
    reported once: the mean or the deviation is more than MAX_DRIFT times its early value or less than its MAX_DRIFT-th
    part, most values are zero, or the values hardly differ.
    """

    def __init__(self, *, every: int) -> None:
        """Log every `every` steps."""
        self.every = every
        self._parts: list[Tensor] = []
        self._early: list[tuple[float, float]] = []
        self._reported: set[str] = set()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Summarize the prediction if its step is logged; the result stays on the device."""
        step = trainer.global_step + (trainer.global_step == self._last_step)
        if self._watch is not None and self._watch.prediction is not None and self._is_due(trainer, step):
            self._parts.append(summarize_prediction(self._watch.prediction))
            self._watch.prediction = None
        super().on_train_batch_end(trainer, module, outputs, batch, index)

    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Log when due; synchronize once a log line."""
        if not self._parts:
            return
        mean, variance, zeros = mean_over_ranks(torch.stack(self._parts).mean(0)).tolist()
        self._parts.clear()
        deviation = math.sqrt(variance) if math.isfinite(variance) else math.nan
        numbers = {"prediction_mean": mean, "prediction_std": deviation, "prediction_zeros": zeros}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        if math.isfinite(deviation):
            self._compare(step, mean, deviation, zeros, report=trainer.is_global_zero)

    def state_dict(self) -> dict[str, Any]:
        """Return the early statistics and what was reported, for the checkpoint."""
        return {"early": [list(pair) for pair in self._early], "reported": sorted(self._reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._early = [(pair[0], pair[1]) for pair in state_dict["early"]]
        self._reported = set(state_dict["reported"])

    def _is_due(self, trainer: pl.Trainer, step: int) -> bool:
        return step % self.every == 0 or step == trainer.max_steps

    def _compare(self, step: int, mean: float, deviation: float, zeros: float, *, report: bool) -> None:
        findings: list[tuple[str, str]] = []
        if len(self._early) < REFERENCE_LINES:
            self._early.append((abs(mean), deviation))
        else:
            for name, value, early in (
                ("mean", abs(mean), median(pair[0] for pair in self._early)),
                ("standard deviation", deviation, median(pair[1] for pair in self._early)),
            ):
                if early > 0 and not early / MAX_DRIFT <= value <= early * MAX_DRIFT:
                    findings.append((name, f"their {name} is {value:.3g}, and was {early:.3g} at first"))
        if zeros > MAX_ZEROS:
            findings.append(("zeros", f"{zeros:.1%} of them are 0, where the head has no gradient"))
        elif deviation < MIN_RELATIVE_DEVIATION * abs(mean):
            findings.append(
                ("constant", f"their standard deviation is {deviation:.3g} at a mean of {mean:.3g}")
            )
        self._print(
            [finding for finding in findings if finding[0] not in self._reported], step, report=report
        )

    def _print(self, findings: Sequence[tuple[str, str]], step: int, *, report: bool) -> None:
        for name, text in findings:
            self._reported.add(name)
            if report:
                print(
                    f"the predictions have drifted by step {step}: {text}; the loss does not see it (docs/guards.md)",
                    file=sys.stderr,
                )
