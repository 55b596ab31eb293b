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
from depth_anything.geometry import align_least_squares, depth_to_disparity, disparity_to_depth
from depth_anything.metrics import depth_metrics

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

RISING = frozenset({"d1", "d2", "d3"})
"""The metrics of which more is better."""


class Predicts(typing.Protocol):
    """What is judged: a `Predictor`, a baseline, or anything with these two."""

    @property
    def quantity(self) -> str:
        """Either "disparity" (affine-invariant, larger is nearer) or "depth" (metres)."""

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """RGB uint8 (H,W,3) images → float32 (H,W) maps, each of its image's size."""


@dataclass(frozen=True)
class Protocol:
    """A protocol: which predictions are fitted to the truth, and between which depths they are compared.

    Attributes:
        name: what tables and reports call it.
        fitted: the quantities that get one scale and shift per image, by least squares of the predicted
            disparity to 1 / truth; any other quantity is compared as it comes.
        min_depth: metres; nearer truth is not valid, nearer predictions are raised to it.
        max_depth: metres; farther truth (sky included) is not valid, farther predictions are lowered to it.
    """

    name: str
    fitted: tuple[str, ...]
    min_depth: float = 1e-3
    max_depth: float = 80.0

    @property
    def text(self) -> str:
        """The protocol in one sentence."""
        fitted = " and ".join(self.fitted)
        fit = (
            f"{fitted} fitted per image by least squares to 1/truth, inverted, "
            if fitted
            else "nothing fitted, "
        )
        return (
            f"{self.name}: {fit}clipped to {self.min_depth:g}–{self.max_depth:g} m, compared in depth "
            "over pixels whose truth lies in that range; means over images"
        )


PROTOCOLS = {"da2": Protocol("da2", fitted=("disparity",))}
"""da2: the rule that reproduces the published NYU and KITTI figures within 5 %; it fits no model of depth."""


@dataclass(frozen=True)
class Result:
    """What one model did on one set, image by image.

    Attributes:
        name: the model's name.
        protocol: the rules it was judged by.
        rows: one dict an image: "key", "valid" (pixels compared), "scale" and "shift" of the fit, and the
            metrics, which are NaN where no pixel is valid.
        model: facts about the model for the report (fingerprint, encoder, …).
    """

    name: str
    protocol: Protocol
    rows: tuple[dict[str, Any], ...]
    model: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def means(self) -> dict[str, float]:
        """Each metric's mean over the images with a valid pixel; NaN where there is none."""
        return {metric: _mean([row[metric] for row in self.rows if row["valid"]]) for metric in METRICS}

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


def evaluate(
    predictor: Predicts,
    frames: Iterable[Frame],
    *,
    name: str = "model",
    protocol: str | Protocol = "da2",
    max_depth: float | None = None,
    batch_size: int = 16,
    model: dict[str, Any] | None = None,
) -> Result:
    """Judge a model on frames with known depth. Holds `batch_size` frames at a time.

    Args:
        predictor: anything with `quantity` and `predict_batch`.
        frames: frames with `depth` in metres (inf is sky, NaN unknown; neither is compared).
        name: the model's name in the result.
        protocol: a name in `PROTOCOLS`, or rules of your own.
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
        for frame, map_ in zip(batch, predictor.predict_batch([f.image for f in batch]), strict=True):
            rows.append(judge(map_, frame, quantity=predictor.quantity, protocol=rules)[1])
    return Result(name, rules, tuple(rows), model or {})


def find_protocol(protocol: str | Protocol, *, max_depth: float | None = None) -> Protocol:
    """The rules of that name, or those given, with another `max_depth` (metres) if there is one."""
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}; choose one of: {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[protocol]
    return protocol if max_depth is None else replace(protocol, max_depth=float(max_depth))


def judge(
    prediction: np.ndarray, frame: Frame, *, quantity: str, protocol: Protocol
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
        ValueError: the frame has no depth.
    """
    if frame.depth is None:
        raise ValueError(
            f"record {frame.key!r} has no depth in metres: evaluation needs a labelled set with a depth field"
        )
    truth = _double(frame.depth)
    valid = (truth >= protocol.min_depth) & (truth <= protocol.max_depth)  # false for NaN and for sky
    depth = _double(_resized(prediction, frame.depth.shape))
    scale, shift = 1.0, 0.0
    if quantity in protocol.fitted:
        disparity = depth if quantity == "disparity" else depth_to_disparity(depth)
        scales, shifts = align_least_squares(disparity, 1.0 / truth.where(valid, torch.ones(())), valid)
        scale, shift = float(scales), float(shifts)
        # What the fit puts behind infinity (disparity ≤ 0) is as far as can be, not as near as can be.
        depth = disparity_to_depth(disparity * scale + shift, min_disparity=1.0 / protocol.max_depth)
    elif quantity == "disparity":
        raise ValueError(
            f"protocol {protocol.name!r} compares metres and fits no disparity: use a metric model or da2"
        )
    depth = depth.clamp(protocol.min_depth, protocol.max_depth)
    metrics = {metric: float(value) for metric, value in depth_metrics(depth, truth, valid).items()}
    row = {"key": frame.key, "valid": int(valid.sum()), "scale": scale, "shift": shift, **metrics}
    return depth[0].float().numpy(), row


def merge(parts: Sequence[Result]) -> Result:
    """Join what ranks found on their shares of one set: rows sorted by key, a key that came twice once."""
    rows = {row["key"]: row for part in parts for row in part.rows}
    return replace(parts[0], rows=tuple(rows[key] for key in sorted(rows)))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _double(map_: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(map_, dtype=np.float64))[None]


def _resized(map_: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if map_.shape == shape:
        return map_
    return cv2.resize(
        np.ascontiguousarray(map_, dtype=np.float32), shape[::-1], interpolation=cv2.INTER_LINEAR
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
