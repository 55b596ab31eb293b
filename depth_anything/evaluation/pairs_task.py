"""The task of DA-2K: which of two points is nearer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np

from depth_anything.evaluation.benchmarks.da2k import SCENE_TYPES, PointPairImage
from depth_anything.evaluation.html_report import data_url, shrink_to_page
from depth_anything.evaluation.predictions import PrecomputedMaps, check_aspect
from depth_anything.evaluation.task import (
    Column,
    EvalResult,
    EvalTask,
    MapSource,
    Row,
    batched,
    format_keys,
    join_reasons,
    predict_maps,
)
from depth_anything.geometry import MIN_DEPTH_M
from depth_anything.visualize import colorize_by_distance

WHITE, MAGENTA, YELLOW = (255, 255, 255), (255, 0, 200), (255, 215, 0)
_SCORE_COLORS = {1.0: WHITE, 0.5: YELLOW, 0.0: MAGENTA}
_RADIUS_PX = 6
_MIN_ACCURACY = 0.4
"""Below this a model is taken for inverted."""


@dataclass(frozen=True)
class PairResult(EvalResult):
    """How many pairs of points one model orders correctly.

    Attributes:
        rows: one per image: "key", "scene", "pairs" (how many), "right" (how many, a tie counts one half) and "mute"
            (1 if the map has no number at a point).
    """

    @property
    def pairs(self) -> int:
        """The number of pairs."""
        return sum(row["pairs"] for row in self.rows)

    @cached_property
    def means(self) -> dict[str, float]:
        """The share of pairs in the right order, 0 to 1: "accuracy" of all, and one per scene type that occurs."""
        occurring = {row["scene"] for row in self.rows}
        rows_of = {scene: [row for row in self.rows if row["scene"] == scene] for scene in SCENE_TYPES}
        shares = {scene: _accuracy(rows) for scene, rows in rows_of.items() if scene in occurring}
        return {"accuracy": _accuracy(self.rows), **shares}

    @property
    def non_finite(self) -> list[str]:
        """Keys of the images on which the map has NaN or infinity at a point."""
        return [row["key"] for row in self.rows if row.get("mute")]

    @property
    def warnings(self) -> list[str]:
        """Signs of a model that does not work: NaN, or most pairs in the wrong order."""
        if self.non_finite:
            return [f"{self.name} gives NaN or infinity on {format_keys(self.non_finite)}."]
        if self.pairs and self.means["accuracy"] < _MIN_ACCURACY:
            return [
                f"{self.name} orders most pairs wrongly: near and far are exchanged. "
                "Is disparity read as depth, or depth as disparity?"
            ]
        return []


@dataclass(frozen=True)
class PairExample:
    """One image of the report.

    Attributes:
        reason: why it is shown ("first", "median", "worst").
        image: the image and its pairs.
        maps: model name → float32 (H,W) of the image's size, larger is nearer.
        scores: model name → float64 (P,), as `score_pairs` gives.
    """

    reason: str
    image: PointPairImage
    maps: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class PairsTask(EvalTask):
    """Images with pairs of points, of which the nearer one is known."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def score(self, source: MapSource, frames: Sequence[PointPairImage]) -> list[Row]:
        """Predict a batch of images and count the pairs in the right order."""
        return score_images(source, frames)

    def result(self, name: str, rows: Iterable[Row], model: Mapping[str, Any] | None = None) -> PairResult:
        """Collect the rows of a model."""
        return PairResult(name, tuple(rows), model or {})

    def columns(self, results: Sequence[PairResult]) -> list[Column]:
        """Percent right of all pairs, and of each scene type that occurs."""
        labels = {metric: metric.replace("_", " ") for metric in results[0].means} | {"accuracy": "right %"}
        return [
            Column(metric, label, higher_is_better=True, percent=True) for metric, label in labels.items()
        ]

    def notes(self, results: Sequence[PairResult]) -> list[str]:
        """How many images and pairs, how ties count, and warnings."""
        size = f"{len(results[0].rows)} images, {results[0].pairs} pairs."
        ties = "A pair with equal values counts one half: a constant map has 50 %."
        return [f"{size} {ties}", *(warning for result in results for warning in result.warnings)]

    def choose_examples(
        self, results: Sequence[PairResult], *, first: int = 3, worst: int = 5
    ) -> dict[str, str]:
        """The first few images, then the worst few and the median of all models together: key → reason."""
        rows = results[0].rows
        right = [sum(row["right"] for row in own) for own in zip(*(r.rows for r in results), strict=True)]
        shares = {n: right[n] / row["pairs"] / len(results) for n, row in enumerate(rows) if row["pairs"]}
        ranked = sorted(shares, key=lambda number: (shares[number], -rows[number]["pairs"]))
        choices = [(row["key"], "first") for row in rows[:first]]
        choices += [(rows[number]["key"], "worst") for number in ranked[:worst] if shares[number] < 1]
        choices += [(rows[number]["key"], "median") for number in ranked[len(ranked) // 2 :][:1]]
        return join_reasons(choices)

    def make_example(
        self, frame: PointPairImage, reason: str, sources: Mapping[str, MapSource]
    ) -> PairExample:
        """Predict an image again with every model."""
        maps, scores = {}, {}
        for name, source in sources.items():
            map_: np.ndarray = np.asarray(_predict(source, [frame])[0], np.float32)
            scores[name] = score_pairs(map_, frame, quantity=source.quantity)
            if map_.shape != frame.image.shape[:2]:
                map_ = cv2.resize(map_, frame.image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            maps[name] = map_ if source.quantity == "disparity" else 1 / np.maximum(map_, MIN_DEPTH_M)
        return PairExample(reason, frame, maps, scores)

    def page(
        self, results: Sequence[PairResult], examples: Sequence[PairExample]
    ) -> tuple[str, dict[str, Any]]:
        """The template, its notes and pictures."""
        return "pairs_report.html.j2", {
            "columns": len(results) + 1,
            "notes": self.notes(results)[1:],
            "examples": [_example_values(example) for example in examples],
        }

    def document(self, results: Sequence[PairResult]) -> dict[str, Any]:
        """Models and warnings, for results.json."""
        models = [
            {
                "name": result.name,
                "facts": result.model,
                "images": len(result.rows),
                "pairs": result.pairs,
                "accuracy": result.means["accuracy"],
                "scenes": {scene: share for scene, share in result.means.items() if scene != "accuracy"},
                "rows": result.rows,
            }
            for result in results
        ]
        return {"models": models, "warnings": [warning for result in results for warning in result.warnings]}


def evaluate_pairs(
    source: MapSource, images: Iterable[PointPairImage], *, name: str = "model", batch_size: int = 16
) -> PairResult:
    """Evaluate a model on pairs of points. Holds `batch_size` images at a time."""
    return PairResult(
        name, tuple(row for b in batched(images, batch_size) for row in score_images(source, b))
    )


def score_images(source: MapSource, images: Sequence[PointPairImage]) -> list[Row]:
    """Predict a batch of images and count the pairs in the right order."""
    rows = []
    for image, map_ in zip(images, _predict(source, images), strict=True):
        right = score_pairs(map_, image, quantity=source.quantity)
        missing = _has_missing_values(map_, image, quantity=source.quantity)
        row = {"key": image.key, "scene": image.scene, "pairs": len(right), "right": float(right.sum())}
        rows.append({**row, "mute": int(missing)})
    return rows


def score_pairs(map_: np.ndarray, image: PointPairImage, *, quantity: str) -> np.ndarray:
    """Score the order of each pair of points in a map.

    Args:
        map_: (h,w) disparity or depth; resized to the image's size.
        image: the image and its pairs.
        quantity: "disparity" (larger is nearer) or "depth" (smaller is nearer).

    Returns:
        float64 (P,): 1 for the right order, 0.5 for equal values, 0 for the wrong order and for NaN.
    """
    if quantity not in ("disparity", "depth"):
        raise ValueError(f"pairs need a map of disparity or depth, not of {quantity!r}")
    height, width = image.image.shape[:2]
    values: np.ndarray = np.asarray(map_, np.float32)
    if values.shape != (height, width):
        values = cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)
    near, far = (values[image.pairs[:, point, 0], image.pairs[:, point, 1]] for point in (0, 1))
    if quantity == "depth":
        near, far = far, near
    known = ~(np.isnan(near) | np.isnan(far))
    return np.where(near > far, 1.0, 0.5 * (near == far)) * known


def draw_pairs(picture: np.ndarray, pairs: np.ndarray, scores: np.ndarray | None = None) -> np.ndarray:
    """Draw pairs of points into a picture, shrunk to the page's size: a disc is the nearer, a ring the farther point.

    Args:
        picture: uint8 (H,W,3) RGB.
        pairs: int64 (P,2,2): pair, nearer and farther point, row and column of `picture`.
        scores: float64 (P,): 1 is drawn white, 0.5 yellow, 0 magenta; all white if not given.

    Returns:
        uint8 (h,w,3) RGB.
    """
    small = np.ascontiguousarray(shrink_to_page(picture)).copy()
    scale = np.array(small.shape[:2]) / np.array(picture.shape[:2])
    for number, pair in enumerate(pairs):
        color = WHITE if scores is None else _SCORE_COLORS[float(scores[number])]
        near, far = (tuple(int(side) for side in ((point + 0.5) * scale)[::-1]) for point in pair)
        for shade, extra in (((0, 0, 0), 2), (color, 0)):
            cv2.line(small, near, far, shade, 2 + extra, cv2.LINE_AA)
        cv2.circle(small, near, _RADIUS_PX + 2, (0, 0, 0), -1, cv2.LINE_AA)
        cv2.circle(small, near, _RADIUS_PX, color, -1, cv2.LINE_AA)
        for shade, width in (((0, 0, 0), 4), (color, 2)):
            cv2.circle(small, far, _RADIUS_PX + 1, shade, width, cv2.LINE_AA)
    return small


def _predict(source: MapSource, frames: Sequence[PointPairImage]) -> list[np.ndarray]:
    if not isinstance(source, PrecomputedMaps):
        images = [frame.image for frame in frames]
        # The order of two points does not depend on the focal length, so any value does.
        return predict_maps(source, images, lambda: [1.0] * len(images))
    maps = [source.load_map(frame) for frame in frames]
    for map_, frame in zip(maps, frames, strict=True):
        check_aspect(map_, frame)
    return maps


def _has_missing_values(map_: np.ndarray, image: PointPairImage, *, quantity: str) -> bool:
    """Whether a map has no number at a point of a pair; infinite depth is sky."""
    missing = np.isnan(map_) if quantity == "depth" else ~np.isfinite(map_)
    if not missing.any():
        return False
    height, width = image.image.shape[:2]
    whole = cv2.resize(missing.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return bool(whole[image.pairs[..., 0], image.pairs[..., 1]].any())


def _accuracy(rows: Sequence[Row]) -> float:
    pairs = sum(row["pairs"] for row in rows)
    return float(np.sum([row["right"] for row in rows]) / pairs) if pairs else float("nan")


def _example_values(example: PairExample) -> dict[str, Any]:
    """What the template shows of one example: pictures as data URLs, captions as text."""
    image, pairs = example.image.image, example.image.pairs
    most = max(scores.sum() for scores in example.scores.values())
    models = []
    for name, map_ in example.maps.items():
        finite = map_[np.isfinite(map_)]
        low, high = np.percentile(finite, (2, 98)) if finite.size else (0.0, 1.0)
        colors = colorize_by_distance(map_, quantity="disparity", low=float(low), high=float(high))
        right = example.scores[name].sum()
        models.append(
            {
                "name": name,
                "map": data_url(draw_pairs(colors, pairs, example.scores[name])),
                "right": f"{right:g} of {len(pairs)} right",
                "best": len(example.maps) > 1 and right == most,
            }
        )
    size = f"{image.shape[1]}×{image.shape[0]}"
    return {
        "key": example.image.key,
        "reason": example.reason,
        "facts": f"{example.image.scene.replace('_', ' ')}, {size}, {len(pairs)} pairs",
        "image": data_url(draw_pairs(image, pairs)),
        "models": models,
    }
