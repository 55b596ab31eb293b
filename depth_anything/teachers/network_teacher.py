"""A network of this project as teacher: any file that `load_model` reads, also the authors'."""

from typing import Any

import numpy as np
import torch
from torch import nn

from depth_anything.data.transforms import normalize, resize_image
from depth_anything.geometry import depth_to_disparity
from depth_anything.inference.predictor import FARTHEST_M
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.weights import fingerprint
from depth_anything.teachers.teacher import (
    MIN_DEPTH_SHARE,
    LabelMaps,
    Photographs,
    Teacher,
    TeacherFacts,
    agreed_license,
)

PREPROCESSING_TEXT = (
    "short side {size}, sides multiples of {patch}, bicubic with antialias on uint8, {precision}"
)


def convert_to_disparity(teacher: DepthAnything, output: torch.Tensor) -> torch.Tensor:
    """Convert the output of a teacher's `forward` into disparity, larger is nearer, as labels hold it.

    Args:
        teacher: Relative: its output is disparity already. Metric: its output in meters is inverted. Calibrated: with
            scale and shift its output is disparity in 1/meters, at least that of `FARTHEST_M`.
        output: Any shape, as `forward` returns it.

    Returns:
        float32, same shape; in 1/meters where the teacher knows meters. NaN stays NaN.
    """
    output = output.float()
    if teacher.max_depth is not None:
        return depth_to_disparity(output, nearest=MIN_DEPTH_SHARE * teacher.max_depth)
    if teacher.calibration is not None:
        scale, shift = teacher.calibration
        return (output * scale + shift).clamp(min=1 / FARTHEST_M)
    return output


def network_facts(teacher: DepthAnything, file: str, *, licence: str | None = None) -> TeacherFacts:
    """Build the record of a network.

    Args:
        teacher: The network. Its quantity and unit are those of the prediction: "depth" in "m" for metric and
            calibrated networks.
        file: Its file, as it was typed.
        licence: License of weights whose file does not say it.
    """
    conversion = None
    if teacher.max_depth is not None:
        nearest = MIN_DEPTH_SHARE * teacher.max_depth
        conversion = f"1 / depth, depth from {nearest:g} to {teacher.max_depth:g} m"
    elif teacher.calibration is not None:
        scale, shift = teacher.calibration
        conversion = f"{scale!r} * output + {shift!r}, at least 1/{FARTHEST_M:g} m"
    return TeacherFacts(
        fingerprint=fingerprint(teacher),
        file=file,
        licence=agreed_license(file, teacher.licence, licence),
        quantity=teacher.quantity if teacher.calibration is None else "depth",
        unit=teacher.unit if teacher.calibration is None else "m",
        conversion=conversion,
    )


def describe_teacher(teacher: DepthAnything, file: str) -> dict[str, Any]:
    """Build the record of a network that a label set keeps; labels of two teachers are not mixed.

    Two records describe the same teacher if all fields but "file" and "licence" are equal.
    """
    return network_facts(teacher, file).as_record()


class NetworkTeacher(Teacher):
    """A `DepthAnything` network; it sees photographs at the size of the labels."""

    resized = True

    def __init__(self, network: DepthAnything, facts: TeacherFacts | None = None) -> None:
        """Wrap a network; `facts` may be missing where only `predict` is used."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.multiple = network.multiple
        if facts is not None:
            self.facts = facts

    def preprocessing(self, *, image_size: int, precision: str) -> str:
        """Return the text that the label set stores; the same in all versions, so that old sets are continued."""
        return PREPROCESSING_TEXT.format(size=image_size, patch=self.multiple, precision=precision)

    def module_argument(self) -> nn.Module:
        """Return the network itself, which labeling modules of users may change."""
        return self.network

    def predict(self, photographs: Photographs) -> LabelMaps:
        """Predict disparity; photographs of another size than the labels are resized first."""
        image, (height, width) = photographs.image, photographs.size
        if tuple(image.shape[1:3]) != photographs.size:
            resized = [resize_image(one, height, width) for one in image.cpu().numpy()]
            image = torch.from_numpy(np.stack(resized))
        weight = next(self.network.parameters())
        output = self.network(normalize(image.to(weight.device)).to(weight.dtype))
        disparity = convert_to_disparity(self.network, output)
        # The output is checked, too: the disparity of an infinite depth is 0.
        return LabelMaps(torch.where(output.isfinite(), disparity, torch.nan))
