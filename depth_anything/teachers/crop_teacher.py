"""A teacher that also labels crops of each photograph by themselves, which gives labels with more detail.

Source: Distill Any Depth (arXiv 2502.19204), 3.2: a teacher that sees a crop alone predicts finer detail in it than in
the whole image. The crops are drawn from a hash of the record's key (data/label_fields.py).
"""

from typing import Any

import numpy as np
import torch

from depth_anything.data.label_fields import CROPS_FIELD, Box, draw_boxes, encode_boxes
from depth_anything.errors import UserError
from depth_anything.preprocess import resize_shape
from depth_anything.teachers.ensemble_teacher import EnsembleTeacher
from depth_anything.teachers.folder_teacher import FolderTeacher
from depth_anything.teachers.teacher import LabelMaps, Photographs, Teacher


class CropTeacher(Teacher):
    """A teacher, or several as one, that sees each photograph as a whole and then square crops of it."""

    def __init__(self, teacher: Teacher, *, count: int, scale: float, image_size: int) -> None:
        """Wrap a teacher.

        Args:
            teacher: It gets photographs as they are stored, so that crops have their full detail.
            count: Crops for each photograph.
            scale: Side of a crop as a share of the photograph's short side.
            image_size: Side of the labels of crops, pixels, rounded to what the teacher needs.

        Raises:
            UserError: If a teacher is a folder of maps, which has none of crops.
        """
        super().__init__()
        for member in teacher.members if isinstance(teacher, EnsembleTeacher) else [teacher]:
            if isinstance(member, FolderTeacher):
                raise UserError(
                    f"label_crops={count}, but teacher={member.facts.file} has no maps of crops",
                    "type label_crops=0",
                )
        self.teacher, self.count, self.scale, self.image_size = teacher, count, scale, image_size
        self.multiple, self.facts = teacher.multiple, teacher.facts
        self.size = resize_shape(image_size, image_size, image_size, teacher.multiple)

    def describe(self) -> dict[str, Any]:
        """Return the record of the wrapped teacher, and how many crops there are and how large."""
        crops = {"count": self.count, "scale": self.scale, "size": list(self.size)}
        return {**self.teacher.describe(), "crops": crops}

    def preprocessing(self, *, image_size: int, precision: str) -> str:
        """Return the text of the wrapped teacher, and the crops."""
        text = self.teacher.preprocessing(image_size=image_size, precision=precision)
        return f"{text}; and {self.count} crops of {self.scale:g} of the short side at {self.size[0]} px"

    def predict(self, photographs: Photographs) -> LabelMaps:
        """Predict the photographs, then crop 0 of all, crop 1 of all, ….

        The boxes of a photograph are in the fields of its label.
        """
        whole = self.teacher.predict(photographs)
        images = photographs.image.cpu().numpy()
        height, width = images.shape[1:3]
        boxes = [
            draw_boxes(key, height, width, count=self.count, scale=self.scale) for key in photographs.keys
        ]
        extra = dict(whole.extra)
        for number in range(self.count):
            crops = self._cut(images, [of_image[number] for of_image in boxes])
            maps = self.teacher.predict(Photographs(crops, self.size, photographs.keys, photographs.metas))
            for position in maps.failed:
                maps.disparity[position] = torch.nan
            extra[f"crop{number}.disparity"] = maps.disparity
            extra |= {f"crop{number}.{name}": values for name, values in maps.extra.items()}
        fields = [{CROPS_FIELD: encode_boxes(height, width, of_image)} for of_image in boxes]
        return LabelMaps(whole.disparity, whole.failed, extra, fields)

    def _cut(self, images: np.ndarray, boxes: list[Box]) -> torch.Tensor:
        return torch.from_numpy(np.stack([box.cut(image) for box, image in zip(boxes, images, strict=True)]))
