"""The interface of an evaluation task: images with ground truth, how maps are scored, what a report shows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from depth_anything.data.address import escape_unprintable
from depth_anything.evaluation.predictions import PrecomputedMaps
from depth_anything.evaluation.protocols import EvalProtocol

T = TypeVar("T")

Row = dict[str, Any]
"""The scores of one image, as results.csv holds them; "key" is the image's."""


class DepthPredictor(Protocol):
    """A model under evaluation: a `Predictor`, a baseline, or any object with these two members.

    If it also has a `canonical_focal` that is not None, `predict_maps` passes `focals` to `predict_batch`.
    """

    @property
    def quantity(self) -> str:
        """Either "disparity" (affine-invariant, larger is nearer) or "depth" (meters)."""

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Predict a float32 (H,W) map for each uint8 (H,W,3) RGB image."""


MapSource = DepthPredictor | PrecomputedMaps
"""What can be evaluated: a model, or a folder of maps on disk."""


@dataclass(frozen=True)
class Column:
    """A column of a results table.

    Attributes:
        metric: name of the metric in `EvalResult.means`.
        label: heading.
        higher_is_better: whether the largest value is the best.
        percent: whether values are printed times 100.
    """

    metric: str
    label: str
    higher_is_better: bool = False
    percent: bool = False


@dataclass(frozen=True)
class EvalResult(ABC):
    """The scores of one model on one task, image by image. All other figures are computed from the rows.

    Attributes:
        name: the model's name.
        rows: one per image.
        model: facts about the model for the report (fingerprint, encoder, …).
        protocol: the rules by which maps were compared; None for tasks without any.
    """

    name: str
    rows: tuple[Row, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    protocol: EvalProtocol | None = None

    @property
    def images(self) -> int:
        """The number of images that the means are over."""
        return len(self.rows)

    @property
    @abstractmethod
    def means(self) -> dict[str, float]:
        """The mean of each metric."""

    @property
    @abstractmethod
    def non_finite(self) -> list[str]:
        """Keys of the images on which the model gave NaN or infinity where it is scored."""

    @property
    @abstractmethod
    def warnings(self) -> list[str]:
        """Signs of a model that does not work, one sentence each."""


@dataclass(frozen=True)
class EvalTask(ABC):
    """Images with ground truth, and how maps of them are scored, tabulated and shown.

    Three tasks exist: `depth_task.DepthTask` compares depth pixel by pixel, `pairs_task.PairsTask` the order of
    pairs of points (DA-2K), `segmentation_task.SegmentationTask` classes.

    Attributes:
        metric: the metric that ranks models.
        higher_is_better: whether a larger value of it is better.
        name: of the set or benchmark.
        lines: one line of text per image, all different, in the order of the rows.
        read: reads the frame of a line; ValueError if it cannot be read.
        facts: what the report says about the images; "digest" identifies them.
        incomplete: why figures are not comparable with published ones (a sentence without its full stop), or "".
        protocol: the rules by which depth is compared; None for pairs of points.
    """

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    name: str
    lines: Sequence[str]
    read: Callable[[str], Any]
    facts: Mapping[str, Any]
    incomplete: str = ""
    protocol: EvalProtocol | None = field(default=None, kw_only=True)

    @property
    def rules(self) -> str:
        """What tables and best.json call the rules: the protocol's name, or the task's own."""
        return self.protocol.name if self.protocol else self.name

    def check_quantity(self, quantity: str) -> None:  # noqa: B027, all quantities are fine by default
        """Raise ValueError if maps of this quantity ("disparity" or "depth") cannot be scored."""

    def check_source(self, name: str, source: MapSource) -> None:
        """Raise ValueError if the maps of a model cannot be scored; `name` is the model's."""
        self.check_quantity(source.quantity)

    @abstractmethod
    def score(self, source: MapSource, frames: Sequence[Any]) -> list[Row]:
        """Predict a batch of frames and score each map."""

    @abstractmethod
    def result(self, name: str, rows: Iterable[Row], model: Mapping[str, Any] | None = None) -> EvalResult:
        """Collect the rows of a model."""

    @abstractmethod
    def columns(self, results: Sequence[Any]) -> list[Column]:
        """The columns of a table of these results."""

    @abstractmethod
    def notes(self, results: Sequence[Any]) -> list[str]:
        """What must be read with the table: how many images, by which rules, and what went wrong."""

    @abstractmethod
    def choose_examples(self, results: Sequence[Any]) -> dict[str, str]:
        """Which images the report shows: key → reason ("first", "best", "median", "worst")."""

    @abstractmethod
    def make_example(self, frame: Any, reason: str, sources: Mapping[str, MapSource]) -> Any:
        """Predict a frame again with every model and keep what the page shows."""

    @abstractmethod
    def page(self, results: Sequence[Any], examples: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        """The template of the HTML report, and the values that this task adds to it."""

    @abstractmethod
    def document(self, results: Sequence[Any]) -> dict[str, Any]:
        """What results.json holds about these results."""

    def examples(self, sources: Mapping[str, MapSource], results: Sequence[EvalResult]) -> list[Any]:
        """Read the images that the report shows and predict them again, one at a time."""
        lines = {row["key"]: line for row, line in zip(results[0].rows, self.lines, strict=True)}
        return [
            self.make_example(self.read(lines[key]), reason, sources)
            for key, reason in self.choose_examples(results).items()
        ]


def predict_maps(
    source: DepthPredictor, images: list[np.ndarray], focals: Callable[[], list[float | None]]
) -> list[np.ndarray]:
    """Predict maps of images; a model with a canonical focal length is given the focal length of each image, pixels."""
    if getattr(source, "canonical_focal", None) is None:
        return source.predict_batch(images)
    predictor: Any = source
    return predictor.predict_batch(images, focals=focals())


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Group items into lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def join_reasons(choices: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Merge (key, reason) pairs: key → "first, worst", in the order of first mention."""
    reasons: dict[str, str] = {}
    for key, reason in choices:
        reasons[key] = f"{reasons[key]}, {reason}" if key in reasons else reason
    return reasons


def format_keys(keys: Sequence[str]) -> str:
    """The number of images and the first five keys: "2 images (a, b)"."""
    count = f"{len(keys)} image{'s' if len(keys) > 1 else ''}"
    return f"{count} ({', '.join(map(escape_unprintable, keys[:5]))}{', …' if len(keys) > 5 else ''})"
