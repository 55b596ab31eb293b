"""Score depth maps against ground truth: crop, align, convert to meters, clip and compare, image by image.

Validation inside training, the command line and the tests use these functions. All figures of a `DepthResult` are
computed from its rows, so the ranks of a distributed run can each score a share and join the rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from depth_anything.data.intrinsics import focal_from_meta
from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import MaskedFrame
from depth_anything.evaluation.predictions import PrecomputedMaps, check_aspect
from depth_anything.evaluation.protocols import CROPS, EvalProtocol, find_protocol
from depth_anything.evaluation.task import (
    DepthPredictor,
    EvalResult,
    MapSource,
    Row,
    batched,
    format_keys,
    predict_maps,
)
from depth_anything.geometry import align_least_squares, disparity_to_depth
from depth_anything.metrics import boundary_f1, depth_metrics

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
"""Also measured where the ground truth is sharp."""

HIGHER_IS_BETTER = frozenset({"d1", "d2", "d3", "boundary_f1"})


@dataclass(frozen=True)
class DepthResult(EvalResult):
    """The depth metrics of one model on one set.

    Attributes:
        rows: one per image: "key", "valid" (pixels compared), "scale" and "shift" of the fit, "slope" (sign of the
            correlation between map and ground truth), and the metrics, which are NaN where no pixel is valid.
        protocol: the rules by which maps were compared.
    """

    protocol: EvalProtocol = field(kw_only=True)

    @cached_property
    def means(self) -> dict[str, float]:
        """The mean of each metric over the images with a valid pixel; NaN if there is none."""
        valid = [row for row in self.rows if row["valid"]]
        metrics = METRICS | BOUNDARY_METRICS if self.protocol.sharp else METRICS
        return {m: math.fsum(row[m] for row in valid) / len(valid) if valid else math.nan for m in metrics}

    @property
    def images(self) -> int:
        """The number of images with a valid pixel."""
        return sum(row["valid"] > 0 for row in self.rows)

    @property
    def empty(self) -> list[str]:
        """Keys of the images without a valid pixel, which the means leave out."""
        return [row["key"] for row in self.rows if not row["valid"]]

    @property
    def non_finite(self) -> list[str]:
        """Keys of the images on which the model gave NaN or infinity; they turn the means into NaN."""
        return [row["key"] for row in self.rows if row["valid"] and not math.isfinite(row["abs_rel"])]

    @property
    def inverted(self) -> list[str]:
        """Keys of the images whose map is negatively correlated with the ground truth; alignment would hide that."""
        return [row["key"] for row in self.rows if row["valid"] and row.get("slope", 0) < 0]

    @property
    def constant(self) -> list[str]:
        """Keys of the images whose map has the same value at all pixels compared."""
        finite = [row for row in self.rows if row["valid"] > 1 and math.isfinite(row["abs_rel"])]
        return [row["key"] for row in finite if row.get("slope") == 0]

    @property
    def warnings(self) -> list[str]:
        """Signs of a model that does not work, one sentence each: NaN, inverted or constant maps."""
        lines = []
        if self.non_finite:
            lines.append(f"{self.name} gives NaN or infinity on {format_keys(self.non_finite)}.")
        if 2 * len(self.inverted) > self.images:
            lines.append(
                f"{self.name} gives inverted maps on {format_keys(self.inverted)}: near and far are exchanged. "
                "Is disparity read as depth, or depth as disparity?"
            )
        if self.constant:
            lines.append(f"{self.name} gives a constant map on {format_keys(self.constant)}.")
        return lines


def evaluate(
    source: MapSource,
    frames: Iterable[Frame],
    *,
    name: str = "model",
    protocol: str | EvalProtocol = "da2",
    max_depth: float | None = None,
    batch_size: int = 16,
    model: Mapping[str, Any] | None = None,
) -> DepthResult:
    """Evaluate a model on frames with known depth. Holds `batch_size` frames at a time.

    Args:
        source: a model with `quantity` and `predict_batch`, or maps on disk.
        frames: frames with `depth` in meters (inf is sky, NaN unknown; neither is compared).
        name: the model's name in the result.
        protocol: a name in `protocols.PROTOCOLS`, or rules of your own.
        max_depth: meters, instead of the protocol's.
        batch_size: frames predicted at once.
        model: facts about the model, kept in the result.

    Returns:
        The result; without rows if there is no frame, since a rank may have no share.

    Raises:
        ValueError: an unknown protocol, or a frame without depth.
    """
    rules = find_protocol(protocol, max_depth=max_depth)
    rows: list[Row] = []
    for batch in batched(frames, batch_size):
        rows += [row for _, row in score_frames(source, batch, protocol=rules)]
    return DepthResult(name, tuple(rows), model or {}, protocol=rules)


def score_frames(
    source: MapSource, frames: Sequence[Frame], *, protocol: EvalProtocol
) -> list[tuple[np.ndarray, Row]]:
    """Predict a batch of frames and score each map as `score_map` does."""
    views = [crop_to_view(frame, protocol) for frame in frames]
    if isinstance(source, PrecomputedMaps):
        maps = [_load_map(source, *pair, protocol) for pair in zip(frames, views, strict=True)]
    else:
        maps = predict_frames(source, frames, [view.image for view in views])
        if protocol.flip:
            flipped = predict_frames(
                source, frames, [np.ascontiguousarray(view.image[:, ::-1]) for view in views]
            )
            maps = [(map_ + other[:, ::-1]) / 2 for map_, other in zip(maps, flipped, strict=True)]
        # Infinity from a network is an error that clipping would hide; in a file it can mean sky.
        maps = [np.where(np.isfinite(map_), map_, np.nan) for map_ in maps]
    return [
        score_map(map_, view, quantity=source.quantity, protocol=protocol)
        for map_, view in zip(maps, views, strict=True)
    ]


def predict_frames(
    source: DepthPredictor, frames: Sequence[Frame], images: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Predict the maps of images that show the frames, cropped or flipped, but not resized.

    A model with a canonical focal length is given the focal length in each frame's metadata, which crops and flips do
    not change.
    """
    return predict_maps(
        source, list(images), lambda: [focal_from_meta(frame.meta, frame.image.shape) for frame in frames]
    )


def score_map(
    prediction: np.ndarray, frame: Frame, *, quantity: str, protocol: EvalProtocol
) -> tuple[np.ndarray, Row]:
    """Convert one prediction to depth in meters by the protocol's rules, and compute its metrics.

    Args:
        prediction: (h,w) float map, disparity or meters; resized to the ground truth's size.
        frame: with depth (H,W) in meters, already cropped to the protocol's view.
        quantity: what the prediction is, "disparity" or "depth".
        protocol: the rules.

    Returns:
        The prediction as depth in meters, float32 (H,W), clipped to the protocol's range; and the image's row.

    Raises:
        ValueError: the frame has no depth, or the protocol does not compare this quantity.
    """
    if frame.depth is None:
        raise ValueError(f"record {frame.key!r} has no depth in meters: evaluate on a set with a depth field")
    protocol.check_quantity(quantity)
    truth = _to_float64(frame.depth)
    known = _in_range(truth, protocol)
    valid = known & _eval_mask(frame)
    if prediction.shape != frame.depth.shape:
        size = frame.depth.shape[::-1]
        prediction = cv2.resize(
            np.ascontiguousarray(prediction, np.float32), size, interpolation=cv2.INTER_LINEAR
        )
    depth = _to_float64(prediction)
    slope, _ = _fit(depth, truth, known, quantity=quantity)
    scale, shift = 1.0, 0.0
    if quantity in protocol.fitted:
        fitted = known & (depth > 0) if quantity == "disparity" and protocol.fit_positive_only else known
        scale, shift = _fit(depth, truth, fitted, quantity=quantity)
        depth = depth * scale + shift
    if quantity == "disparity":
        # Disparity that the fit makes zero or negative is infinitely far, not near.
        depth = disparity_to_depth(depth, min_disparity=_min_disparity(truth, known, protocol))
    depth = depth.clamp(protocol.min_depth, protocol.max_depth)
    metrics = depth_metrics(depth, truth, valid)
    if protocol.sharp:
        metrics["boundary_f1"] = boundary_f1(depth, truth, valid)
    row = {
        "key": frame.key,
        "valid": int(valid.sum()),
        "scale": scale,
        "shift": shift,
        "slope": 0 if math.isnan(slope) else int(slope > 0) - int(slope < 0),
        **{metric: float(value) for metric, value in metrics.items()},
    }
    return depth[0].float().numpy(), row


def crop_to_view(frame: Frame, protocol: EvalProtocol) -> Frame:
    """Crop a frame to the part of the image that the protocol shows to the model.

    Raises:
        ValueError: the frame is smaller than the crop, or image and depth differ in size.
    """
    if protocol.view_crop is None:
        return frame
    shape = frame.image.shape[:2]
    if frame.depth is not None and frame.depth.shape != shape:
        raise ValueError(
            f"record {frame.key!r} cannot be cropped to {protocol.view_crop}: its depth has another size"
        )
    try:
        box = CROPS[protocol.view_crop](*shape)
    except ValueError as error:
        raise ValueError(
            f"record {frame.key!r} cannot be cropped to {protocol.view_crop}: {error}"
        ) from error
    if isinstance(frame, MaskedFrame) and frame.eval_mask is not None:
        frame = replace(frame, eval_mask=frame.eval_mask[box])
    return replace(frame, image=frame.image[box], depth=None if frame.depth is None else frame.depth[box])


def masked_truth(frame: Frame, protocol: EvalProtocol) -> np.ndarray:
    """The depth of a cropped frame, float32 (H,W) meters; NaN where it is not compared."""
    assert frame.depth is not None
    valid = _in_range(_to_float64(frame.depth), protocol) & _eval_mask(frame)
    return np.where(valid[0].numpy(), frame.depth, np.float32(np.nan))


def _load_map(source: PrecomputedMaps, frame: Frame, view: Frame, protocol: EvalProtocol) -> np.ndarray:
    """Load a map of the whole image, or of the part that the protocol shows."""
    map_ = source.load_map(frame)
    if protocol.view_crop is None:
        check_aspect(map_, frame)
    elif map_.shape == frame.image.shape[:2]:
        return map_[CROPS[protocol.view_crop](*map_.shape)]
    elif map_.shape != view.image.shape[:2]:
        size = "x".join(map(str, map_.shape[::-1]))
        raise ValueError(
            f"the map of {frame.key!r} is {size}: it must have the size of its image or of {protocol.view_crop}"
        )
    return map_


def _in_range(truth: Tensor, protocol: EvalProtocol) -> Tensor:
    """The pixels of a (1,H,W) ground truth within the protocol's range and crop; never NaN or infinite ones."""
    low, high = protocol.min_depth, protocol.max_depth
    within = (truth > low) & (truth < high) if protocol.open_interval else (truth >= low) & (truth <= high)
    within &= truth.isfinite() & (truth > 0)
    if protocol.eval_crop is None:
        return within
    inside = torch.zeros_like(within)
    inside[0][CROPS[protocol.eval_crop](*truth.shape[1:])] = True
    return within & inside


def _eval_mask(frame: Frame) -> Tensor:
    """The pixels of a frame that errors are computed over: (1,H,W), or one True for all."""
    mask = frame.eval_mask if isinstance(frame, MaskedFrame) else None
    return torch.tensor(True) if mask is None else torch.from_numpy(np.ascontiguousarray(mask))[None]


def _fit(prediction: Tensor, truth: Tensor, valid: Tensor, *, quantity: str) -> tuple[float, float]:
    """Fit scale and shift by least squares: a disparity to 1 / truth, a depth to truth."""
    target = 1.0 / truth.where(valid, torch.ones(())) if quantity == "disparity" else truth
    scale, shift = align_least_squares(prediction, target, valid)
    return float(scale), float(shift)


def _min_disparity(truth: Tensor, valid: Tensor, protocol: EvalProtocol) -> float:
    if protocol.min_disparity_from_truth:
        return 1.0 / float(truth[valid].max()) if valid.any() else 1.0
    return 1.0 / protocol.max_depth if protocol.min_disparity is None else protocol.min_disparity


def _to_float64(map_: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(map_, dtype=np.float64))[None]
