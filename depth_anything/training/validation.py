"""Held-out images judged inside training, by the function and the rules of the command line; the best network kept."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
from PIL import Image

from depth_anything.data.sample import Frame
from depth_anything.data.shards import open_set
from depth_anything.disk import atomic_path, atomic_write
from depth_anything.evaluation.benchmarks.catalog import load_benchmark as load_benchmark
from depth_anything.evaluation.benchmarks.da2k import PairResult, score_da2k
from depth_anything.evaluation.evaluate import (
    HIGHER_IS_BETTER,
    DepthResult,
    crop_to_view,
    evaluate,
    masked_truth,
    merge_results,
)
from depth_anything.evaluation.protocols import EvalProtocol
from depth_anything.evaluation.runner import (
    BATCH_SIZE,
    EvalTask,
    cache_key,
    check_quantity,
    lines_of_share,
    task_from_benchmark,
    task_from_set,
)
from depth_anything.inference.predictor import Predictor
from depth_anything.model.tensor_files import WRITE_ERRORS
from depth_anything.model.weights import write_model
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback, gather_or_raise
from depth_anything.training.run_dir import RunDir
from depth_anything.visualize import colorize_by_distance, make_panel

NUM_PICTURES = 4
"""So many of the first images are painted."""


def open_validation_task(config: Mapping[str, Any]) -> EvalTask | None:
    """Open what a run is validated on: the benchmark of `validation`, else the set of `sources`; None: nothing.

    Raises:
        ValueError: If it is not there, or is not judged by that protocol.
    """
    settings, root = config["validation"], config["sources"]["validation"]
    given = {"limit": settings["limit"], "max_depth": settings["max_depth"]}
    protocol = settings["protocol"]
    if settings["benchmark"] is None:
        return None if root is None else task_from_set(open_set(root), protocol=protocol or "da2", **given)
    benchmark = load_benchmark(settings["benchmark"])
    if not benchmark.depth_limits and (protocol is not None or given["max_depth"] is not None):
        raise ValueError(
            f"{benchmark.title} asks for pairs of points alone; type validation.protocol=null validation.max_depth=null"
        )
    return task_from_benchmark(benchmark, settings["root"], protocol=protocol, **given)


class _DepthSummary(NamedTuple):
    """What an image offers to be judged by: its key, the pixels that are compared, and its range in metres."""

    key: str
    compared: int
    nearest: float
    farthest: float


def _summarize_depth(frame: Frame, rules: EvalProtocol) -> _DepthSummary:
    shown = crop_to_view(frame, rules)
    assert shown.depth is not None
    known = shown.depth[np.isfinite(shown.depth) & (shown.depth > 0)]
    nearest, farthest = (float(known.min()), float(known.max())) if known.size else (math.nan, math.nan)
    compared = int(np.isfinite(masked_truth(shown, rules)).sum())
    return _DepthSummary(frame.key, compared, nearest, farthest)


def _check_valid_pixels(trial: EvalTask, found: Sequence[_DepthSummary], *, tell: bool) -> None:
    """Refuse images of which none has a pixel to compare; with `tell`, name those that have none among others.

    Raises:
        ValueError: Naming the set, the range of its depth and the range that is compared.
    """
    rules, empty = trial.protocol, [truth for truth in found if not truth.compared]
    if rules is None or not empty:
        return
    keys = ", ".join(truth.key for truth in empty[:3]) + (", …" if len(empty) > 3 else "")
    if len(empty) < len(found):
        if tell:
            print(
                f"{len(empty)} of {len(found)} images of {trial.name} have no valid pixel and do not count: {keys}",
                file=sys.stderr,
            )
        return
    known = [truth for truth in empty if truth.farthest == truth.farthest]
    measured = "it has no finite depth above 0 m"
    if known:
        nearest, farthest = min(truth.nearest for truth in known), max(truth.farthest for truth in known)
        measured = f"its depth is {nearest:.4g} to {farthest:.4g} m"
    raise ValueError(
        f"no image of the validation set {trial.name} has a valid pixel ({keys}): {measured}, and "
        f"{rules.min_depth:g} to {rules.max_depth:g} m are compared; if its unit is another, make it again with the "
        "right unit; else type validation.max_depth=METRES, or sources.validation=null to train without"
    )


class ValidationCallback(StepCallback):
    """Judge held-out images as `depth-anything evaluate` does, paint the first few, and keep the best network.

    The best is the one of the least mean AbsRel, or of the most pairs of points in the right order. It lies beside
    the last one as best.safetensors, and best.json says of which step it is.
    """

    def __init__(
        self, open_trial: Callable[[], EvalTask | None], folder: RunDir, *, every: int, input_size: int
    ) -> None:
        """Judge every `every` steps and at the end.

        Args:
            open_trial: Opens what is judged on, when training begins; None: never judge.
            folder: Of the run.
            every: In optimizer steps.
            input_size: Short side the network sees, pixels.
        """
        self._open, self.folder, self.every, self.input_size = open_trial, folder, every, input_size
        self.trial: EvalTask | None = None
        self.lines: list[str] = []
        self.shown: list[Any] = []
        self.best: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Look at this rank's share of the images, and which network was best before."""
        super().on_train_start(trainer, module)
        shares = gather_or_raise(trainer.world_size, lambda: self._look(trainer, module.model.quantity))
        if self.trial is None:
            return
        _check_valid_pixels(
            self.trial, [truth for share in shares for truth in share], tell=trainer.is_global_zero
        )
        if not trainer.is_global_zero:
            return
        if trainer.global_step == 0:
            self.folder.delete_best()
        best = self.folder.read_best()  # of a later step, too: what a killed run found is found
        self.best = best if best.get("judged") == _task_digest(self.trial) else {}

    def _look(self, trainer: pl.Trainer, quantity: str) -> list[_DepthSummary]:
        """Open the images and read each once, so that what cannot be judged is said before anything is trained."""
        self.trial = trial = self._open()
        found: list[_DepthSummary] = []
        if trial is None:
            return found
        check_quantity(trial, quantity)
        self.lines = lines_of_share(trial.lines, (trainer.global_rank + 1, trainer.world_size))
        for number, line in enumerate(self.lines):
            item = trial.read(line)
            if trial.protocol is not None:
                if item.depth is None:
                    raise ValueError(f"{item.key} has no depth in metres to validate on; name a labelled set")
                found.append(_summarize_depth(item, trial.protocol))
            if number < NUM_PICTURES:
                self.shown.append(item)
        return found

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Validate when due."""
        if self.trial is None or (step % self.every and step != trainer.max_steps):
            return
        training = module.model.training
        predictor = Predictor(module.model, device=str(module.device), input_size=self.input_size)
        metric, numbers = self._judged(trainer.world_size, predictor)
        for logger in trainer.loggers:
            logger.log_metrics({f"val_{name}": value for name, value in numbers.items()}, step=step)

        def keep() -> None:
            if trainer.is_global_zero:
                self._paint(trainer, predictor, step)
                self._keep_best(module, step, metric, numbers[metric])

        gather_or_raise(trainer.world_size, keep)  # a full disk stops all ranks
        module.model.train(training)

    def _judged(self, ranks: int, predictor: Predictor) -> tuple[str, dict[str, float]]:
        """Judge all ranks' shares; the metric that decides, and the means of all."""
        assert self.trial is not None
        rules, read = self.trial.protocol, self.trial.read
        if rules is None:
            scores = gather_or_raise(
                ranks, lambda: score_da2k(predictor, map(read, self.lines), batch_size=BATCH_SIZE)
            )
            score = PairResult(tuple(row for share in scores for row in share.rows))
            return "accuracy", {"accuracy": score.accuracy, **score.scenes}

        def judged() -> DepthResult:
            return evaluate(predictor, map(read, self.lines), protocol=rules, batch_size=BATCH_SIZE)

        return "abs_rel", merge_results(gather_or_raise(ranks, judged)).means

    def _paint(self, trainer: pl.Trainer, predictor: Predictor, step: int) -> None:
        maps = predictor.predict_batch([item.image for item in self.shown])
        rows = [
            _picture_row(item, map_, predictor.quantity) for item, map_ in zip(self.shown, maps, strict=True)
        ]
        titles = ["image", "truth", f"step {step}"] if len(rows[0]) == 3 else ["image", f"step {step}"]
        picture = make_panel(rows, titles=titles)
        path = self.folder.pictures / f"step-{step:09d}.jpg"
        with atomic_path(path, make_folder=True) as temporary:
            Image.fromarray(picture).save(temporary, "JPEG", quality=90)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("depth", [picture], step=step)

    def _keep_best(self, module: DepthModule, step: int, metric: str, value: float) -> None:
        """Keep the network if it is better than all before; its note goes first and comes last, and so never lies."""
        better = 1 if metric in (*HIGHER_IS_BETTER, "accuracy") else -1
        if math.isnan(value) or (self.best and better * value <= better * self.best["value"]):
            return
        assert self.trial is not None
        self.best = {
            "step": step,
            "metric": metric,
            "value": value,
            "images": self.trial.name,
            "protocol": self.trial.protocol.name if self.trial.protocol else self.trial.name,
            "judged": _task_digest(self.trial),
        }
        with atomic_path(self.folder.best, also=WRITE_ERRORS) as temporary:
            write_model(module.model, temporary)
            self.folder.best_json.unlink(missing_ok=True)
        atomic_write(self.folder.best_json, json.dumps(self.best).encode())


def _task_digest(trial: EvalTask) -> str:
    """A digest of all that a figure depends on besides the network: others are not held against it."""
    return "sha256:" + hashlib.sha256(json.dumps(cache_key(trial), sort_keys=True).encode()).hexdigest()


def _picture_row(item: Any, map_: np.ndarray, quantity: str) -> list[np.ndarray]:
    """An image, its truth where there is one for each pixel, and what the network says; near is red."""
    disparity = map_ if quantity == "disparity" else 1.0 / map_.clip(1e-3)
    truth = []
    if isinstance(item, Frame) and item.depth is not None:
        truth = [colorize_by_distance(1.0 / item.depth, quantity="disparity")]
    return [item.image, *truth, colorize_by_distance(disparity, quantity="disparity")]
