"""Validate during training as `depth-anything evaluate` does, and keep the best model."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
from PIL import Image

from depth_anything.classes import paint_classes
from depth_anything.data.sample import Frame
from depth_anything.data.shards import open_set
from depth_anything.disk import atomic_path, atomic_write
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
from depth_anything.evaluation.evaluate import crop_to_view, masked_truth, predict_frames
from depth_anything.evaluation.protocols import EvalProtocol
from depth_anything.evaluation.runner import (
    cache_key,
    lines_of_share,
    score_lines,
    task_from_benchmark,
    task_from_set,
)
from depth_anything.evaluation.task import DepthPredictor, EvalTask, predict_maps
from depth_anything.inference.predictor import Predictor
from depth_anything.inference.segmentation import SegmentationPredictor
from depth_anything.model.segmentation import SegmentationModel
from depth_anything.model.tensor_files import WRITE_ERRORS
from depth_anything.model.weights import write_model
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback, gather_or_raise
from depth_anything.training.config import RunConfig
from depth_anything.training.heartbeat import heartbeat
from depth_anything.training.run_dir import RunDir
from depth_anything.training.segmentation_setup import open_segmentation_task
from depth_anything.training.whole_network import averaging_callbacks, evaluation_network, find_ema
from depth_anything.visualize import colorize_by_distance, make_panel

NUM_PICTURES = 4
"""Number of images that are painted at each validation."""


def open_validation_task(config: RunConfig) -> EvalTask | None:
    """Open what a run is validated on: the benchmark of `validation`, else the set of `sources`; None for neither.

    Raises:
        UserError: If it does not exist, or cannot be scored by that protocol.
    """
    if config.stage == "segmentation":
        return open_segmentation_task(config)
    settings, root = config.validation, config.sources.validation
    protocol, limit, max_depth = settings.protocol, settings.limit, settings.max_depth
    if settings.benchmark is None:
        if root is None:
            return None
        return task_from_set(open_set(root), protocol=protocol or "da2", limit=limit, max_depth=max_depth)
    assert settings.root is not None  # resolve_config checks it
    benchmark = load_benchmark(settings.benchmark)
    if not benchmark.depth_limits and (protocol is not None or max_depth is not None):
        raise UserError(
            f"{benchmark.title} compares pairs of points, not depth maps",
            "type validation.protocol=null validation.max_depth=null",
        )
    return task_from_benchmark(benchmark, settings.root, protocol=protocol, limit=limit, max_depth=max_depth)


class _DepthSummary(NamedTuple):
    """Depth of one validation image: its key, the number of pixels compared, and its range in meters."""

    key: str
    compared: int
    nearest: float
    farthest: float


def _summarize_depth(frame: Frame, protocol: EvalProtocol) -> _DepthSummary:
    view = crop_to_view(frame, protocol)
    assert view.depth is not None
    known = view.depth[np.isfinite(view.depth) & (view.depth > 0)]
    nearest, farthest = (float(known.min()), float(known.max())) if known.size else (math.nan, math.nan)
    compared = int(np.isfinite(masked_truth(view, protocol)).sum())
    return _DepthSummary(frame.key, compared, nearest, farthest)


def _check_valid_pixels(task: EvalTask, images: Sequence[_DepthSummary], *, report: bool) -> None:
    """Reject a task in which no image has a pixel to compare; with `report`, print images that have none.

    Raises:
        UserError: Naming the set, the range of its depth and the range that is compared.
    """
    protocol, empty = task.protocol, [image for image in images if not image.compared]
    if protocol is None or not empty:
        return
    keys = ", ".join(image.key for image in empty[:3]) + (", …" if len(empty) > 3 else "")
    if len(empty) < len(images):
        if report:
            print(
                f"{len(empty)} of {len(images)} images of {task.name} have no valid pixel and do not count: {keys}",
                file=sys.stderr,
            )
        return
    known = [image for image in empty if not math.isnan(image.farthest)]
    measured = "it has no finite depth above 0 m"
    if known:
        nearest, farthest = min(image.nearest for image in known), max(image.farthest for image in known)
        measured = f"its depth is {nearest:.4g} to {farthest:.4g} m"
    raise UserError(
        f"no image of the validation set {task.name} has a valid pixel ({keys}): {measured}, and "
        f"{protocol.min_depth:g} to {protocol.max_depth:g} m are compared",
        "if its unit is not meters, write it again with the right unit; else type validation.max_depth=METERS, or "
        "sources.validation=null to skip validation",
    )


class ValidationCallback(StepCallback):
    """Score held-out images as `depth-anything evaluate` does, paint the first few, and keep the best model.

    The best model has the lowest mean AbsRel, or the highest accuracy on DA-2K's pairs. It is kept as best.safetensors,
    and best.json names its step. Lightning's validation loop would need a second DataLoader and would count the metrics
    of uneven shares differently from the command line; this callback calls the functions of the command line.
    """

    def __init__(
        self, open_task: Callable[[], EvalTask | None], run_dir: RunDir, *, every: int, input_size: int
    ) -> None:
        """Validate every `every` optimizer steps and at the end.

        Args:
            open_task: Opens the images when training begins; None: never validate.
            run_dir: The run folder.
            every: In optimizer steps.
            input_size: Short side of the network's input, pixels.
        """
        self._open_task, self.run_dir, self.every, self.input_size = open_task, run_dir, every, input_size
        self.task: EvalTask | None = None
        self.lines: list[str] = []
        self.previews: list[Any] = []
        self.best: dict[str, Any] = {}
        self._weights = "last"

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Read this rank's share of the images, and best.json of the run so far."""
        super().on_train_start(trainer, module)
        shares = gather_or_raise(trainer.world_size, lambda: self._read_share(trainer, module.model.quantity))
        if self.task is None:
            return
        images = [image for share in shares for image in share]
        _check_valid_pixels(self.task, images, report=trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        if trainer.global_step == 0:
            self.run_dir.delete_best()
        # best.json may be of a later step than the checkpoint, if the run was killed in between.
        best = self.run_dir.read_best()
        self.best = best if best.get("judged") == _task_digest(self.task) else {}

    def _read_share(self, trainer: pl.Trainer, quantity: str) -> list[_DepthSummary]:
        """Open the task and read each image once, so that unusable images are reported before training."""
        self.task = task = self._open_task()
        summaries: list[_DepthSummary] = []
        if task is None:
            return summaries
        task.check_quantity(quantity)
        self.lines = lines_of_share(task.lines, (trainer.global_rank + 1, trainer.world_size))
        for number, line in enumerate(self.lines):
            item = task.read(line)
            if task.protocol is not None:
                if item.depth is None:
                    raise UserError(f"{item.key} has no depth in meters to validate on", "name a labeled set")
                summaries.append(_summarize_depth(item, task.protocol))
            if number < NUM_PICTURES:
                self.previews.append(item)
        return summaries

    def on_step(self, trainer: pl.Trainer, module: DepthModule, step: int) -> None:
        """Validate when due."""
        if self.task is None or (step % self.every and step != trainer.max_steps):
            return
        training = module.model.training
        self._weights = "average" if find_ema(trainer) or averaging_callbacks(trainer) else "last"
        with heartbeat.during("validation"), evaluation_network(trainer, module):
            predictor = _build_predictor(module, input_size=self.input_size)
            metric, means = self._score(trainer.world_size, predictor)
            for logger in trainer.loggers:
                logger.log_metrics({f"val_{name}": value for name, value in means.items()}, step=step)

            def write_results() -> None:
                if trainer.is_global_zero:
                    self._write_picture(trainer, predictor, step)
                    self._update_best(module, step, metric, means[metric])

            gather_or_raise(trainer.world_size, write_results)  # a full disk stops all ranks
        module.model.train(training)

    def _score(self, ranks: int, predictor: DepthPredictor) -> tuple[str, dict[str, float]]:
        """Score the shares of all ranks; return the metric that decides, and the means of all metrics."""
        task = self.task
        assert task is not None
        shares = gather_or_raise(ranks, lambda: score_lines(predictor, task, self.lines))
        return task.metric, task.result("model", (row for share in shares for row in share)).means

    def _write_picture(self, trainer: pl.Trainer, predictor: DepthPredictor, step: int) -> None:
        images = [item.image for item in self.previews]
        if isinstance(predictor, SegmentationPredictor):
            maps = predictor.predict_batch(images)
        elif isinstance(self.previews[0], Frame):
            maps = predict_frames(predictor, self.previews, images)
        else:  # pairs of points, painted by each map's own range
            maps = predict_maps(predictor, images, lambda: [1.0] * len(images))
        rows = [_picture_row(item, map_, predictor) for item, map_ in zip(self.previews, maps, strict=True)]
        titles = ["image", "truth", f"step {step}"] if len(rows[0]) == 3 else ["image", f"step {step}"]
        picture = make_panel(rows, titles=titles)
        path = self.run_dir.pictures / f"step-{step:09d}.jpg"
        with atomic_path(path, make_folder=True) as temporary:
            Image.fromarray(picture).save(temporary, "JPEG", quality=90)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(predictor.quantity.replace("disparity", "depth"), [picture], step=step)

    def _update_best(self, module: DepthModule, step: int, metric: str, value: float) -> None:
        """Save the model if it is better than all before.

        best.json is deleted first and rewritten last, so it never describes the wrong weights.
        """
        assert self.task is not None
        sign = 1 if self.task.higher_is_better else -1
        if math.isnan(value) or (self.best and sign * value <= sign * self.best["value"]):
            return
        self.best = {
            "step": step,
            "metric": metric,
            "value": value,
            "weights": self._weights,
            "images": self.task.name,
            "protocol": self.task.rules,
            "judged": _task_digest(self.task),
        }
        with atomic_path(self.run_dir.best, also=WRITE_ERRORS) as temporary:
            write_model(module.model, temporary)
            self.run_dir.best_json.unlink(missing_ok=True)
        atomic_write(self.run_dir.best_json, json.dumps(self.best).encode())


def _task_digest(task: EvalTask) -> str:
    """Compute a digest of all that a metric depends on besides the model; values of other tasks are not compared."""
    return "sha256:" + hashlib.sha256(json.dumps(cache_key(task), sort_keys=True).encode()).hexdigest()


def _build_predictor(module: DepthModule, *, input_size: int) -> DepthPredictor:
    model: Any = module.model
    if isinstance(model, SegmentationModel):
        return SegmentationPredictor(model, device=str(module.device))
    return Predictor(model, device=str(module.device), input_size=input_size)


def _picture_row(item: Any, map_: np.ndarray, predictor: DepthPredictor) -> list[np.ndarray]:
    """Return an image, its true map if there is one, and the prediction; near is red."""
    if isinstance(predictor, SegmentationPredictor):
        return [item.image, *(paint_classes(values, predictor.classes) for values in (item.classes, map_))]
    disparity = map_ if predictor.quantity == "disparity" else 1.0 / map_.clip(1e-3)
    truth = []
    if isinstance(item, Frame) and item.depth is not None:
        truth = [colorize_by_distance(1.0 / item.depth, quantity="disparity")]
    return [item.image, *truth, colorize_by_distance(disparity, quantity="disparity")]
