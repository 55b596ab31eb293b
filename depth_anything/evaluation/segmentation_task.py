"""The task of semantic segmentation: class maps are compared pixel by pixel, mIoU over all images together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from depth_anything.classes import IGNORED, ClassTable, paint_classes, read_class_table, table_to_list
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame
from depth_anything.data.tars import ShardSet
from depth_anything.errors import UserError
from depth_anything.evaluation.confusion import (
    SegmentationScores,
    count_confusion,
    score_confusion,
    sparse_matrix,
    sum_matrices,
)
from depth_anything.evaluation.frames import describe_set, evenly_spaced, read_frame
from depth_anything.evaluation.html_report import data_url
from depth_anything.evaluation.table import format_number
from depth_anything.evaluation.task import (
    Column,
    EvalResult,
    EvalTask,
    MapSource,
    Row,
    format_keys,
    join_reasons,
)

METRICS = {"miou": "mIoU", "mean_accuracy": "mean accuracy", "accuracy": "pixel accuracy"}
"""Metric name to printed name. All are in percent, and larger is better."""

WRONG_COLOR = (255, 0, 200)
RIGHT_LEVEL = 235
"""Colors of the error maps; ignored pixels are gray."""


@dataclass(frozen=True)
class SegmentationResult(EvalResult):
    """The class maps of one model on one set.

    Attributes:
        rows: one per image: "key", "pixels" (compared), "correct", "confusion": [true, predicted, pixels] of the pairs
            that occur.
        classes: the classes.
    """

    classes: ClassTable = field(kw_only=True)

    @cached_property
    def confusion(self) -> np.ndarray:
        """The confusion matrix of all images, int64 (K, K)."""
        return sum_matrices((row["confusion"] for row in self.rows), len(self.classes))

    @cached_property
    def scores(self) -> SegmentationScores:
        """IoU and accuracies of all images together."""
        return score_confusion(self.confusion)

    @property
    def means(self) -> dict[str, float]:
        """mIoU, mean accuracy and pixel accuracy over all pixels of all images, 0 to 1."""
        scores = self.scores
        return {"miou": scores.mean_iou, "mean_accuracy": scores.mean_accuracy, "accuracy": scores.accuracy}

    @property
    def non_finite(self) -> list[str]:
        """No image: a predictor raises an error for NaN."""
        return []

    @property
    def warnings(self) -> list[str]:
        """Signs of a model that does not work: a single class everywhere."""
        found = np.flatnonzero(self.confusion.sum(0))
        if len(found) == 1 and len(self.rows) > 1:
            return [f"{self.name} gives every pixel of every image the class {self.classes[found[0]].name}."]
        return []


@dataclass(frozen=True)
class SegmentationExample:
    """One image of the report: why it is shown, the image, its true class map, and those of the models by name."""

    key: str
    reason: str
    image: np.ndarray
    truth: np.ndarray
    predictions: dict[str, np.ndarray]


@dataclass(frozen=True)
class SegmentationTask(EvalTask):
    """Frames with class maps.

    Attributes:
        classes: the classes of the set.
    """

    metric: ClassVar[str] = "miou"
    higher_is_better: ClassVar[bool] = True
    classes: ClassTable = field(kw_only=True)

    @property
    def rules(self) -> str:
        """What best.json calls the rules."""
        return f"mIoU of {len(self.classes)} classes"

    def check_quantity(self, quantity: str) -> None:
        """Raise ValueError if these are no maps of classes."""
        if quantity != "classes":
            raise UserError(
                f"{self.name} is compared by classes, and a model predicts {quantity}",
                "give segmentation models of stage=segmentation only",
            )

    def check_source(self, name: str, source: MapSource) -> None:
        """Raise UserError unless a model has the classes of the set, in their order."""
        super().check_source(name, source)
        classes: ClassTable = source.classes  # type: ignore[union-attr]
        wanted, found = ([row.name for row in table] for table in (self.classes, classes))
        if wanted != found:
            other = next((pair for pair in zip(wanted, found, strict=False) if pair[0] != pair[1]), None)
            what = (
                f"{other[1]} in place of {other[0]}" if other else f"{len(found)} in place of {len(wanted)}"
            )
            raise UserError(
                f"{name} has other classes than {self.name} ({what})",
                "evaluate it on a set of its own classes",
            )

    def score(self, source: MapSource, frames: Sequence[Frame]) -> list[Row]:
        """Predict a batch of frames and count the pairs of classes of each."""
        maps = source.predict_batch([frame.image for frame in frames])  # type: ignore[union-attr]
        rows: list[Row] = []
        for frame, map_ in zip(frames, maps, strict=True):
            assert frame.classes is not None
            matrix = count_confusion(frame.classes, map_, len(self.classes))
            rows.append(
                {
                    "key": frame.key,
                    "pixels": int(matrix.sum()),
                    "correct": int(np.trace(matrix)),
                    "confusion": sparse_matrix(matrix),
                }
            )
        return rows

    def result(
        self, name: str, rows: Iterable[Row], model: Mapping[str, Any] | None = None
    ) -> SegmentationResult:
        """Collect the rows of a model."""
        return SegmentationResult(name, tuple(rows), model or {}, classes=self.classes)

    def columns(self, results: Sequence[SegmentationResult]) -> list[Column]:
        """mIoU and the accuracies, in percent."""
        return [
            Column(metric, f"{label} %", higher_is_better=True, percent=True)
            for metric, label in METRICS.items()
        ]

    def notes(self, results: Sequence[SegmentationResult]) -> list[str]:
        """How many images and classes, the IoU of each class, and warnings."""
        first = results[0]
        occurring = int((first.confusion.sum(1) > 0).sum())
        lines = [
            f"{first.images} images, {occurring} of {len(self.classes)} classes occur. mIoU is the mean over classes "
            "of the sum of intersections over the sum of unions of all images, not a mean over images."
        ]
        for result in results:
            figures = ", ".join(
                f"{row.name} {_percent(value)}"
                for row, value in zip(self.classes, result.scores.iou, strict=True)
            )
            lines.append(f"IoU % of {result.name}: {figures}.")
        if empty := [row["key"] for row in first.rows if not row["pixels"]]:
            lines.append(f"Without a pixel that is compared: {format_keys(empty)}.")
        return lines + [warning for result in results for warning in result.warnings]

    def choose_examples(self, results: Sequence[SegmentationResult], *, first: int = 4) -> dict[str, str]:
        """The first few images, then the best, median and worst of the best model by pixel accuracy."""
        best = max(results, key=lambda result: (not math.isnan(result.means["miou"]), result.means["miou"]))
        ranked = sorted(
            (row for row in best.rows if row["pixels"]), key=lambda row: -row["correct"] / row["pixels"]
        )
        choices = [(row["key"], "first") for row in best.rows[:first]]
        if ranked:
            places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
            choices += [(ranked[place]["key"], reason) for reason, place in places.items()]
        return join_reasons(choices)

    def make_example(
        self, frame: Frame, reason: str, sources: Mapping[str, MapSource]
    ) -> SegmentationExample:
        """Predict a frame again with every model."""
        assert frame.classes is not None
        maps = {
            name: source.predict_batch([frame.image])[0]  # type: ignore[union-attr]
            for name, source in sources.items()
        }
        return SegmentationExample(frame.key, reason, frame.image, frame.classes, maps)

    def page(
        self, results: Sequence[SegmentationResult], examples: Sequence[SegmentationExample]
    ) -> tuple[str, dict[str, Any]]:
        """The template, the IoU of each class, and the pictures."""
        rows = [
            {
                "name": row.name,
                "color": f"rgb({row.color[0]}, {row.color[1]}, {row.color[2]})",
                "pixels": f"{int(results[0].confusion[number].sum()):,}",
                "ious": [_percent(result.scores.iou[number]) for result in results],
            }
            for number, row in enumerate(self.classes)
        ]
        return "segmentation_report.html.j2", {
            "columns": len(results) + 2,
            "notes": [warning for result in results for warning in result.warnings],
            "class_rows": rows,
            "examples": [self._example_values(example) for example in examples],
        }

    def document(self, results: Sequence[SegmentationResult]) -> dict[str, Any]:
        """Classes and models with their confusion matrices, for results.json."""
        models = [
            {
                "name": result.name,
                "facts": result.model,
                "images": result.images,
                "means": result.means,
                "iou": [float(value) for value in result.scores.iou],
                "class_accuracy": [float(value) for value in result.scores.class_accuracy],
                "confusion": result.confusion.tolist(),
                "warnings": result.warnings,
                "rows": result.rows,
            }
            for result in results
        ]
        return {"classes": table_to_list(self.classes), "models": models}

    def _example_values(self, example: SegmentationExample) -> dict[str, Any]:
        models = []
        for name, map_ in example.predictions.items():
            counted = example.truth != IGNORED
            right = float((map_ == example.truth)[counted].mean()) if counted.any() else math.nan
            models.append(
                {
                    "name": name,
                    "map": data_url(paint_classes(map_, self.classes)),
                    "error": data_url(paint_errors(map_, example.truth)),
                    "right": f"{format_number(right, percent=True)} % right",
                }
            )
        height, width = example.truth.shape
        present = [
            self.classes[number].name for number in np.unique(example.truth).tolist() if number != IGNORED
        ]
        return {
            "key": example.key,
            "reason": example.reason,
            "facts": f"{width}×{height}, {', '.join(present[:8])}{', …' if len(present) > 8 else ''}",
            "image": data_url(example.image),
            "truth": data_url(paint_classes(example.truth, self.classes)),
            "models": models,
        }


def task_from_class_set(shard_set: ShardSet, *, limit: int | None = None) -> SegmentationTask:
    """Make a task of a set with class maps.

    Args:
        shard_set: whose manifest has classes.
        limit: number of frames, evenly spaced; None: all.

    Raises:
        UserError: It has no classes.
    """
    classes = read_class_table(shard_set.meta, shard_set.root)
    records = Records(shard_set)
    ends = list(accumulate(count for _, count in records.shards))

    def read(line: str) -> Frame:
        frame = read_frame(records, int(line), ends=ends)
        if frame.classes is None:
            raise ValueError(f"{frame.key} has no class map")
        if frame.classes.shape != frame.image.shape[:2]:
            raise ValueError(f"{frame.key}: image and class map differ in size")
        return frame

    lines = [str(number) for number in evenly_spaced(shard_set.records, limit)]
    facts = {**describe_set(shard_set), "classes": len(classes), "limit": limit}
    return SegmentationTask(shard_set.name, lines, read, facts, classes=classes)


def paint_errors(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Paint wrong pixels magenta, right ones light, ignored ones gray, uint8 (H, W, 3)."""
    picture = np.full((*truth.shape, 3), 128, np.uint8)
    picture[(truth != IGNORED) & (predicted == truth)] = RIGHT_LEVEL
    picture[(truth != IGNORED) & (predicted != truth)] = WRONG_COLOR
    return picture


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
