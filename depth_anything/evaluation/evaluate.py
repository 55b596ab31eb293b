"""One way to judge a model against metres: for validation inside training, the command line and tests alike.

Per image: fit (where the protocol says so), invert, clip, compare in depth. The means are means over images.
Everything a `Result` tells is derived from its rows, so that the ranks of a distributed run may each judge
their share and join the rows.
"""

import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import cv2
import numpy as np
import torch

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.frames import MaskedFrame
from depth_anything.evaluation.protocols import CROPS, EvalProtocol, find_protocol
from depth_anything.geometry import align_least_squares, disparity_to_depth
from depth_anything.metrics import boundary_f1, depth_metrics

T = TypeVar("T")

METRICS = {
    "abs_rel": "AbsRel",
    "d1": "δ1",
    "d2": "δ2",
    "d3": "δ3",
    "rmse": "RMSE",
    "rmse_log": "RMSE log",
    "log10": "log10",
    "sq_rel": "SqRel",
    "silog": "SILog",
}
"""Metric name → printed name, in the order of tables."""

BOUNDARY_METRICS = {"boundary_f1": "boundary F1"}
"""Those that come after them where the truth is sharp."""

NON_FINITE_NOTE = "gives no numbers (NaN or infinity)"
"""What is said of a model whose map has NaN or infinity where it is compared; such a table ends in exit code 1."""

MAX_ASPECT_RATIO = 1.03
"""How much the proportions of a map on disk may differ from its image's; rounding to patches makes a few per cent."""

HIGHER_IS_BETTER = frozenset({"d1", "d2", "d3", "boundary_f1"})
"""The metrics of which more is better."""


class DepthPredictor(typing.Protocol):
    """What is judged: a `Predictor`, a baseline, or anything with these two."""

    @property
    def quantity(self) -> str:
        """Either "disparity" (affine-invariant, larger is nearer) or "depth" (metres)."""

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """RGB uint8 (H,W,3) images → float32 (H,W) maps, each of its image's size."""


@typing.runtime_checkable
class MapReader(typing.Protocol):
    """What is judged without being asked for images: maps that some program made before."""

    @property
    def quantity(self) -> str:
        """As of `Predicts`."""

    def load_map(self, frame: Frame) -> np.ndarray:
        """The float (h,w) map of a frame; ValueError if there is none."""


MapSource = DepthPredictor | MapReader


@dataclass(frozen=True)
class DepthResult:
    """What one model did on one set, image by image.

    Attributes:
        name: the model's name.
        protocol: the rules it was judged by.
        rows: one dict an image: "key", "valid" (pixels compared), "scale" and "shift" of the fit, "slope" (sign of the
            map's relation to the truth, as `_slope` has it), and the metrics, which are NaN where no pixel is valid.
        model: facts about the model for the report (fingerprint, encoder, …).
    """

    name: str
    protocol: EvalProtocol
    rows: tuple[dict[str, Any], ...]
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, str]:
        """What was measured: metric name → printed name."""
        return METRICS | BOUNDARY_METRICS if self.protocol.sharp else METRICS

    @cached_property
    def means(self) -> dict[str, float]:
        """Each metric's mean over the images with a valid pixel; NaN where there is none."""
        return {metric: _mean([row[metric] for row in self.rows if row["valid"]]) for metric in self.metrics}

    @property
    def images(self) -> int:
        """How many images the means are over."""
        return sum(row["valid"] > 0 for row in self.rows)

    @property
    def empty(self) -> list[str]:
        """Keys of the images without a valid pixel, which the means leave out."""
        return [row["key"] for row in self.rows if not row["valid"]]

    @property
    def broken(self) -> list[str]:
        """Keys of the images on which the model gave something not finite; they turn the means into NaN."""
        return [row["key"] for row in self.rows if row["valid"] and not math.isfinite(row["abs_rel"])]

    @property
    def inverted(self) -> list[str]:
        """Keys of the images on which what should be near is far; a fit turns such a map round."""
        return [row["key"] for row in self.rows if row["valid"] and row.get("slope", 0) < 0]

    @property
    def constant(self) -> list[str]:
        """Keys of the images on which the model gave one value for all pixels compared, as a map of zeros."""
        finite = [row for row in self.rows if row["valid"] > 1 and math.isfinite(row["abs_rel"])]
        return [row["key"] for row in finite if row.get("slope") == 0]

    @property
    def warnings(self) -> list[str]:
        """What makes these figures no figures of a working model, in a sentence each; as a rule nothing."""
        lines = []
        if self.broken:
            lines.append(f"{self.name} {NON_FINITE_NOTE} on {format_keys(self.broken)}.")
        if 2 * len(self.inverted) > self.images:
            lines.append(
                f"{self.name} gives maps the wrong way round on {format_keys(self.inverted)}: near is far there. Is "
                "disparity taken for depth, or depth for disparity?"
            )
        if self.constant:
            lines.append(
                f"{self.name} gives one value for all pixels compared on {format_keys(self.constant)}."
            )
        return lines


def evaluate(
    predictor: MapSource,
    frames: Iterable[Frame],
    *,
    name: str = "model",
    protocol: str | EvalProtocol = "da2",
    max_depth: float | None = None,
    batch_size: int = 16,
    model: dict[str, Any] | None = None,
) -> DepthResult:
    """Judge a model on frames with known depth. Holds `batch_size` frames at a time.

    Args:
        predictor: anything with `quantity` and `predict_batch`, or maps on disk.
        frames: frames with `depth` in metres (inf is sky, NaN unknown; neither is compared).
        name: the model's name in the result.
        protocol: a name in `protocols.PROTOCOLS`, or rules of your own.
        max_depth: metres, in place of the protocol's.
        batch_size: frames given to the predictor at once.
        model: facts about the model, kept in the result.

    Raises:
        ValueError: an unknown protocol, or a frame without depth. No frame at all is no error but a result
            without rows, since a rank may have no share.
    """
    rules = find_protocol(protocol, max_depth=max_depth)
    rows = []
    for batch in _batches(frames, batch_size):
        rows += [row for _, row in score_frames(predictor, batch, protocol=rules)]
    return DepthResult(name, rules, tuple(rows), model or {})


def score_map(
    prediction: np.ndarray, frame: Frame, *, quantity: str, protocol: EvalProtocol
) -> tuple[np.ndarray, dict[str, Any]]:
    """Bring one prediction to metres by the protocol's rule, and measure it.

    Args:
        prediction: (h,w) float map, disparity or metres; resized to the truth where sizes differ.
        frame: with depth (H,W) in metres.
        quantity: what the prediction is, "disparity" or "depth".
        protocol: the rules.

    Returns:
        The prediction as depth in metres, float32 (H,W), within the protocol's range; and the image's row.

    Raises:
        ValueError: the frame has no depth, or the protocol compares no such quantity.
    """
    if frame.depth is None:
        raise ValueError(
            f"record {frame.key!r} has no depth in metres: evaluation needs a labelled set with a depth field"
        )
    protocol.check_quantity(quantity)
    truth = _to_float64(frame.depth)
    known = _valid_mask(truth, protocol)
    valid = known & _region_mask(frame)
    depth = _to_float64(_resize(prediction, frame.depth.shape))
    slope = _slope_sign(depth, truth, known, quantity=quantity)
    scale, shift = 1.0, 0.0
    if quantity in protocol.fitted:
        scale, shift = _fit_scale_shift(depth, truth, known, quantity=quantity, positive=protocol.positive)
        depth = depth * scale + shift
    if quantity == "disparity":
        # What the fit puts behind infinity (disparity ≤ 0) is as far as can be, not as near as can be.
        depth = disparity_to_depth(depth, min_disparity=_min_disparity(truth, known, protocol))
    depth = depth.clamp(protocol.min_depth, protocol.max_depth)
    metrics = {metric: float(value) for metric, value in depth_metrics(depth, truth, valid).items()}
    if protocol.sharp:
        metrics["boundary_f1"] = float(boundary_f1(depth, truth, valid))
    fit = {"scale": scale, "shift": shift, "slope": slope}
    row = {"key": frame.key, "valid": int(valid.sum()), **fit, **metrics}
    return depth[0].float().numpy(), row


def score_frames(
    predictor: MapSource, frames: Sequence[Frame], *, protocol: EvalProtocol
) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Predict frames together, and judge each; what `judge` returns, a frame each, in their order."""
    seen = [crop_to_view(frame, protocol) for frame in frames]
    if isinstance(predictor, MapReader):
        maps = [_load_map(predictor, *pair, protocol) for pair in zip(frames, seen, strict=True)]
    else:
        maps = predictor.predict_batch([frame.image for frame in seen])
        if protocol.flip:
            mirrored = predictor.predict_batch([np.ascontiguousarray(f.image[:, ::-1]) for f in seen])
            maps = [(map_ + other[:, ::-1]) / 2 for map_, other in zip(maps, mirrored, strict=True)]
        # Of a network infinity is a fault, and clipping would make a number of it; of a file it may mean the sky.
        maps = [np.where(np.isfinite(map_), map_, np.nan) for map_ in maps]
    return [
        score_map(map_, frame, quantity=predictor.quantity, protocol=protocol)
        for map_, frame in zip(maps, seen, strict=True)
    ]


def crop_to_view(frame: Frame, protocol: EvalProtocol) -> Frame:
    """Cut a frame to what the protocol shows to a model.

    Raises:
        ValueError: the frame is too small for it, or image and depth differ in size.
    """
    if protocol.view is None:
        return frame
    shape = frame.image.shape[:2]
    if frame.depth is not None and frame.depth.shape != shape:
        raise ValueError(f"record {frame.key!r} cannot be cut to {protocol.view}: its depth has another size")
    try:
        box = CROPS[protocol.view](*shape)
    except ValueError as error:
        raise ValueError(f"record {frame.key!r} cannot be cut to {protocol.view}: {error}") from error
    if isinstance(frame, MaskedFrame) and frame.part is not None:
        frame = replace(frame, part=frame.part[box])
    return replace(frame, image=frame.image[box], depth=None if frame.depth is None else frame.depth[box])


def masked_truth(frame: Frame, protocol: EvalProtocol) -> np.ndarray:
    """The truth of a frame as the model was shown it, float32 (H,W) metres; NaN where it is not compared."""
    assert frame.depth is not None
    compared = _valid_mask(_to_float64(frame.depth), protocol) & _region_mask(frame)
    return np.where(compared[0].numpy(), frame.depth, np.float32(np.nan))


def merge_results(parts: Sequence[DepthResult]) -> DepthResult:
    """Join what ranks found on their shares of one set: rows sorted by key, a key that came twice once."""
    rows = {row["key"]: row for part in parts for row in part.rows}
    return replace(parts[0], rows=tuple(rows[key] for key in sorted(rows)))


def format_keys(keys: Sequence[str]) -> str:
    """How many images, and the first few by their keys, which are others' words and printed without control signs."""
    count = f"{len(keys)} image{'s' if len(keys) > 1 else ''}"
    return f"{count} ({', '.join(map(escape_control_characters, keys[:5]))}{', …' if len(keys) > 5 else ''})"


def escape_control_characters(text: str) -> str:
    """A name as one line that moves no cursor: what cannot be printed becomes its escape, as in a Python string.

    >>> plain("a\\nb")
    'a\\\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_aspect(map_: np.ndarray, shape: tuple[int, ...], key: str) -> None:
    """Refuse a map from elsewhere that is not of its image's proportions: it would be stretched, or shows a part.

    Raises:
        ValueError: Its aspect differs from the image's by more than `MOST_STRETCH`, as a map turned on its side does.
    """
    (height, width), (rows, columns) = map_.shape, shape[:2]
    ratio = (width / height) / (columns / rows)
    if not 1 / MAX_ASPECT_RATIO <= ratio <= MAX_ASPECT_RATIO:
        raise ValueError(
            f"the map of {key!r} is {width}x{height} and its image {columns}x{rows}: a map may be smaller or larger "
            "than its image, but must show all of it and have its proportions"
        )


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _load_map(predictor: MapReader, whole: Frame, seen: Frame, protocol: EvalProtocol) -> np.ndarray:
    """A map from disk, of the whole image or of the part that the protocol shows."""
    map_ = predictor.load_map(whole)
    if protocol.view is None:
        check_aspect(map_, whole.image.shape, whole.key)
    if protocol.view is not None and map_.shape == whole.image.shape[:2]:
        return map_[CROPS[protocol.view](*map_.shape)]
    if protocol.view is not None and map_.shape != seen.image.shape[:2]:
        size = "x".join(map(str, map_.shape[::-1]))
        raise ValueError(
            f"the map of {whole.key!r} is {size}, neither its image's size nor that of {protocol.view}"
        )
    return map_


def _valid_mask(truth: torch.Tensor, protocol: EvalProtocol) -> torch.Tensor:
    """Which pixels of a (1,H,W) truth are compared; never those whose depth is NaN or infinite."""
    low, high = protocol.min_depth, protocol.max_depth
    within = (truth > low) & (truth < high) if protocol.strict else (truth >= low) & (truth <= high)
    within &= truth.isfinite() & (truth > 0)
    if protocol.crop is None:
        return within
    inside = torch.zeros_like(within)
    inside[0][CROPS[protocol.crop](*truth.shape[1:])] = True
    return within & inside


def _region_mask(frame: Frame) -> torch.Tensor:
    """Which pixels of its truth a frame is compared in: (1,H,W), or one True for all."""
    part = frame.part if isinstance(frame, MaskedFrame) else None
    return torch.tensor(True) if part is None else torch.from_numpy(np.ascontiguousarray(part))[None]


def _fit_scale_shift(
    prediction: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor, *, quantity: str, positive: bool
) -> tuple[float, float]:
    target = 1.0 / truth.where(valid, torch.ones(())) if quantity == "disparity" else truth
    if quantity == "disparity" and positive:
        valid = valid & (prediction > 0)
    scale, shift = align_least_squares(prediction, target, valid)
    return float(scale), float(shift)


def _slope_sign(prediction: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor, *, quantity: str) -> int:
    """1 where a map grows with what it should be, -1 where it falls with it, 0 where it is constant or no map."""
    scale, _ = _fit_scale_shift(prediction, truth, valid, quantity=quantity, positive=False)
    return 0 if math.isnan(scale) else int(scale > 0) - int(scale < 0)


def _min_disparity(truth: torch.Tensor, valid: torch.Tensor, protocol: EvalProtocol) -> float:
    if protocol.floor_at_truth:
        return 1.0 / float(truth[valid].max()) if valid.any() else 1.0
    return 1.0 / protocol.max_depth if protocol.floor is None else protocol.floor


def _to_float64(map_: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(map_, dtype=np.float64))[None]


def _resize(map_: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if map_.shape == shape:
        return map_
    return cv2.resize(
        np.ascontiguousarray(map_, dtype=np.float32), shape[::-1], interpolation=cv2.INTER_LINEAR
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
