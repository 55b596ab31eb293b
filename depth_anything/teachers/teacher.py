"""What every teacher is: facts for the label set, and `predict`, which turns photographs into disparity.

A kind of teacher is a subclass of `Teacher` in a file of its own; `open_teacher` (open_teacher.py) chooses it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from depth_anything.data.sample import Frame
from depth_anything.errors import UserError
from depth_anything.geometry import depth_to_disparity

QUANTITIES = ("disparity", "depth")
UNITS = {"disparity": ("relative", "1/m"), "depth": ("m", "relative")}
"""Quantity → its units."""

MIN_DEPTH_SHARE = 1e-3
"""Share of a teacher's largest depth, or of a map's median depth in relative units: nearer depths are set to it.
Labels keep 12 bits between the extremes of a map, and the inverse of a pixel at zero would use them all."""

MIN_DEPTH_M = 0.01
"""The same in meters, for teachers without a largest depth."""


@dataclass(frozen=True)
class Photographs:
    """Photographs of one shape, as a teacher gets them.

    Attributes:
        image: (B,H,W,3) uint8, RGB; at the size of the label if every teacher of the run has `resized`, else as stored.
        size: Height and width of the labels, pixels.
        keys: The records' keys.
        metas: The records' metadata, which may name the files of the photographs ("name", "files").
    """

    image: Tensor
    size: tuple[int, int]
    keys: Sequence[str]
    metas: Sequence[Mapping[str, Any]]

    def frames(self) -> Iterator[Frame]:
        """Yield the photographs one by one."""
        for key, meta, pixels in zip(self.keys, self.metas, self.image.cpu().numpy(), strict=True):
            yield Frame(key, pixels, dict(meta))


@dataclass
class LabelMaps:
    """What a teacher predicts for `Photographs`.

    Attributes:
        disparity: (B,h,w) float32 of the labels' size, larger is nearer. An image with NaN or infinity gets no label.
        failed: Position in the batch → reason, for images that get no label.
        extra: Name → (B,H,W) float32: more maps, stored in the record as NAME.CODEC next to the disparity; names that
            end in "confidence" have values in [0, 1] and a codec of their own.
        fields: For each image more fields of its record, name → bytes; () for none.
    """

    disparity: Tensor
    failed: dict[int, str] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    fields: Sequence[Mapping[str, bytes]] = ()


@dataclass(frozen=True)
class TeacherFacts:
    """The record of a teacher in a label set; the fields are its keys.

    Attributes:
        fingerprint: "sha256:" and the hash of everything that decides the maps.
        file: The teacher as it was typed.
        licence: SPDX name; None if unknown.
        quantity: "disparity" or "depth": what the teacher predicts.
        unit: "relative", "m" or "1/m".
        conversion: How that becomes the labels' disparity; None if it is stored unchanged.
    """

    fingerprint: str
    file: str
    licence: str | None
    quantity: str
    unit: str
    conversion: str | None

    def as_record(self) -> dict[str, Any]:
        """Return the fields as a label set stores them."""
        return asdict(self)


@dataclass(frozen=True)
class MapKind:
    """What the values of a map mean, and how they become disparity.

    Attributes:
        quantity: "disparity" or "depth". Depth is known up to a scale at least; with an unknown shift, as some
            diffusion models have, it has no inverse.
        unit: "relative", "m" or "1/m".
        max_depth: Largest depth that the teacher can predict, meters; None if it has none.
    """

    quantity: str
    unit: str
    max_depth: float | None = None

    def __post_init__(self) -> None:
        """Check the words.

        Raises:
            UserError: If the quantity is unknown or has another unit.
        """
        if self.quantity not in QUANTITIES:
            raise UserError(f"the quantity {self.quantity!r} is neither disparity nor depth")
        if self.unit not in UNITS[self.quantity]:
            units = " or ".join(UNITS[self.quantity])
            raise UserError(f"{self.quantity} is in {units}, not in {self.unit!r}")

    @property
    def conversion(self) -> str | None:
        """How the values become disparity, in words; None if they are stored unchanged."""
        if self.quantity == "disparity":
            return None
        if self.unit == "relative":
            return f"1 / depth, depth from {MIN_DEPTH_SHARE:g} of the map's median"
        if self.max_depth is None:
            return f"1 / depth, depth from {MIN_DEPTH_M:g} m"
        return f"1 / depth, depth from {MIN_DEPTH_SHARE * self.max_depth:g} to {self.max_depth:g} m"

    def to_disparity(self, values: Tensor) -> Tensor:
        """Convert maps.

        Args:
            values: (..., H, W) floating point, in the quantity and unit of this kind.

        Returns:
            float32, same shape; NaN where a value is NaN or infinite.
        """
        values = values.float()
        if self.quantity == "disparity":
            return torch.where(values.isfinite(), values, torch.nan)
        if self.unit == "relative":
            median = values.flatten(-2).nanmedian(-1).values[..., None, None]
            disparity = depth_to_disparity(torch.maximum(values, MIN_DEPTH_SHARE * median))
        else:
            nearest = MIN_DEPTH_M if self.max_depth is None else MIN_DEPTH_SHARE * self.max_depth
            disparity = depth_to_disparity(values, nearest=nearest)
        return torch.where(values.isfinite(), disparity, torch.nan)


class Teacher(nn.Module):
    """A teacher. Lightning moves it to the device and casts its parameters, if it has any.

    Attributes:
        facts: The record of the label set.
        multiple: The sides of labels are multiples of it, pixels.
        resized: Whether `predict` wants images at the size of the labels, instead of photographs as they are.
        input_text: How the photographs reach the network; "{precision}" becomes the trainer's precision.
    """

    facts: TeacherFacts
    multiple: int
    resized: bool = False
    input_text: str

    def describe(self) -> dict[str, Any]:
        """Return the record of the teacher that a label set keeps; labels of two teachers are not mixed."""
        return self.facts.as_record()

    def preprocessing(self, *, image_size: int, precision: str) -> str:
        """Return the text that the label set stores as "preprocessing"; labels with two such texts are not mixed."""
        label = f"labels: short side {image_size}, sides multiples of {self.multiple}"
        return f"{self.input_text.format(precision=precision)}; {label}"

    def module_argument(self) -> nn.Module:
        """Return what the labeling module is built with."""
        return self

    @abstractmethod
    def predict(self, photographs: Photographs) -> LabelMaps:
        """Predict the disparity of photographs.

        Args:
            photographs: On the CPU, or with `resized` on any device.
        """


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map, float32 (H,W), bilinearly, as `depth-anything evaluate` does; an equal size is unchanged."""
    if values.shape == size:
        return np.ascontiguousarray(values, np.float32)
    return cv2.resize(np.ascontiguousarray(values, np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)


def failure_reason(error: BaseException) -> str:
    """Return the first line of an error, at most 300 characters, as a label set keeps it."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def agreed_license(spec: str, known: str | None, typed: str | None) -> str | None:
    """Return the license of a teacher: what it says itself, else what was typed.

    Raises:
        UserError: If the two differ.
    """
    if None not in (known, typed) and known != typed:
        raise UserError(
            f"teacher_licence={typed}, but {spec} says that its license is {known}",
            "leave teacher_licence out",
        )
    return known or typed
