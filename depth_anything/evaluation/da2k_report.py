"""The page of models that ordered pairs of points: which pairs each of them got wrong, drawn into picture and maps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.da2k import PairResult, PointPairImage, score_pairs
from depth_anything.evaluation.compare import Comparison
from depth_anything.evaluation.evaluate import MapReader, MapSource, check_aspect
from depth_anything.evaluation.html_report import data_url, render_template, shrink_to_page
from depth_anything.evaluation.table import pair_warnings
from depth_anything.geometry import MIN_DEPTH_M
from depth_anything.visualize import colorize_by_distance

WHITE, MAGENTA, YELLOW = (255, 255, 255), (255, 0, 200), (255, 215, 0)
_COLORS = {1.0: WHITE, 0.5: YELLOW, 0.0: MAGENTA}
_RADIUS_PX = 6


@dataclass(frozen=True)
class PairExample:
    """One image of the page.

    Attributes:
        why: what brought it here ("first", "median", "worst").
        compared: the image and its pairs.
        maps: per model name float (H,W), larger is nearer, of the image's size.
        answers: per model name float64 (P,): 1 for a pair that is right, 0.5 for a tie, 0 for a wrong one.
    """

    why: str
    compared: PointPairImage
    maps: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]


def choose_pair_examples(
    scores: Mapping[str, PairResult], *, first: int = 3, worst: int = 5
) -> dict[str, str]:
    """Which images to show: key → why. The first few, then the worst few and the median of all models together."""
    rows = next(iter(scores.values())).rows
    right_of_all = [
        sum(own) for own in zip(*([row["right"] for row in s.rows] for s in scores.values()), strict=True)
    ]
    shares = {n: right_of_all[n] / row["pairs"] / len(scores) for n, row in enumerate(rows) if row["pairs"]}
    ranked = sorted(shares, key=lambda number: (shares[number], -rows[number]["pairs"]))
    wanted = [(row["key"], "first") for row in rows[:first]]
    wanted += [(rows[number]["key"], "worst") for number in ranked[:worst] if shares[number] < 1]
    wanted += [(rows[number]["key"], "median") for number in ranked[len(ranked) // 2 :][:1]]
    why: dict[str, str] = {}
    for key, reason in wanted:
        why[key] = f"{why[key]}, {reason}" if key in why else reason
    return why


def collect_pair_examples(
    predictors: Mapping[str, MapSource], images: Iterable[PointPairImage], *, why: Mapping[str, str]
) -> list[PairExample]:
    """Predict the images whose key is in `why` again, and keep what the page shows, in the order of `why`."""
    examples = {}
    for compared in images:
        if compared.key not in why:
            continue
        maps, answers = {}, {}
        for name, predictor in predictors.items():
            map_ = _predict_map(predictor, compared)
            answers[name] = score_pairs(map_, compared, quantity=predictor.quantity)
            maps[name] = _to_disparity(map_, compared.image.shape[:2], quantity=predictor.quantity)
        examples[compared.key] = PairExample(why[compared.key], compared, maps, answers)
    return [examples[key] for key in why if key in examples]


def render_pairs_page(
    scores: Mapping[str, PairResult],
    examples: Sequence[PairExample],
    facts: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    *,
    comparison: Comparison,
    title: str,
) -> str:
    """The page as HTML. `facts` holds date, data, settings and versions; `models` those of each model."""
    return render_template(
        "points.html.j2",
        title=title,
        facts=facts,
        models=models,
        columns=len(scores) + 1,
        score=next(iter(scores.values())),
        notes=pair_warnings(scores),
        comparison=comparison,
        examples=[_template_values(example) for example in examples],
    )


def _template_values(example: PairExample) -> dict[str, Any]:
    """What the template shows of one example."""
    compared = example.compared
    most = max(answers.sum() for answers in example.answers.values())
    models = [
        {
            "name": name,
            "map": data_url(draw_pairs(_colorize_disparity(map_), compared.pairs, example.answers[name])),
            "right": f"{example.answers[name].sum():g} of {len(compared.pairs)} right",
            "best": len(example.maps) > 1 and example.answers[name].sum() == most,
        }
        for name, map_ in example.maps.items()
    ]
    height, width = compared.image.shape[:2]
    return {
        "key": compared.key,
        "why": example.why,
        "facts": f"{compared.scene.replace('_', ' ')}, {width}×{height}, {len(compared.pairs)} pairs",
        "image": data_url(draw_pairs(compared.image, compared.pairs)),
        "models": models,
    }


def draw_pairs(picture: np.ndarray, pairs: np.ndarray, answers: np.ndarray | None = None) -> np.ndarray:
    """Draw pairs of points into a picture, shrunk to the page's size: a disc is the nearer, a ring the farther.

    Args:
        picture: uint8 (H, W, 3), RGB.
        pairs: int64 (P, 2, 2): pair, nearer and farther point, row and column of `picture`.
        answers: float64 (P,): 1 is drawn white, 0.5 yellow, 0 magenta; all white if not given.

    Returns:
        uint8 (h, w, 3), RGB.
    """
    small = np.ascontiguousarray(shrink_to_page(picture)).copy()
    scale = np.array(small.shape[:2]) / np.array(picture.shape[:2])
    for number, pair in enumerate(pairs):
        color = WHITE if answers is None else _COLORS[float(answers[number])]
        near, far = (tuple(int(side) for side in ((point + 0.5) * scale)[::-1]) for point in pair)
        for shade, extra in (((0, 0, 0), 2), (color, 0)):
            cv2.line(small, near, far, shade, 2 + extra, cv2.LINE_AA)
        cv2.circle(small, near, _RADIUS_PX + 2, (0, 0, 0), -1, cv2.LINE_AA)
        cv2.circle(small, near, _RADIUS_PX, color, -1, cv2.LINE_AA)
        for shade, width in (((0, 0, 0), 4), (color, 2)):
            cv2.circle(small, far, _RADIUS_PX + 1, shade, width, cv2.LINE_AA)
    return small


def _predict_map(predictor: MapSource, compared: PointPairImage) -> np.ndarray:
    if isinstance(predictor, MapReader):
        map_ = predictor.load_map(Frame(compared.key, compared.image))
        check_aspect(map_, compared.image.shape, compared.key)
        return map_
    return predictor.predict_batch([compared.image])[0]


def _to_disparity(map_: np.ndarray, shape: tuple[int, ...], *, quantity: str) -> np.ndarray:
    """The map at the size of its image, float32 (H,W), larger being nearer whatever it held."""
    values: np.ndarray = np.asarray(map_, np.float32)
    if values.shape != shape:
        values = cv2.resize(values, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return values if quantity == "disparity" else 1 / np.maximum(values, MIN_DEPTH_M)


def _colorize_disparity(map_: np.ndarray) -> np.ndarray:
    known = np.isfinite(map_)
    low, high = np.percentile(map_[known], (2, 98)) if known.any() else (0.0, 1.0)
    return colorize_by_distance(map_, quantity="disparity", low=float(low), high=float(high))
