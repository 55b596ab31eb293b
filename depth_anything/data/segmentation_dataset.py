"""Training samples of semantic segmentation: image and class map resized by a random scale, cropped and flipped."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depth_anything.classes import IGNORED
from depth_anything.data.class_maps import CLASSES_FIELD, decode_classes
from depth_anything.data.dataset import StreamDataset, Timer, no_timer, record_errors
from depth_anything.data.reader import RecordSource
from depth_anything.data.stream import CROP, SCALE, random_uniform
from depth_anything.data.transforms import nearest_indices, resize_image
from depth_anything.errors import UserError
from depth_anything.preprocess import IMAGENET_MEAN, resize_shape

PADDING = tuple(round(255 * value) for value in IMAGENET_MEAN)
"""Color of the pixels outside of an image that is smaller than the crop; their class is ignored."""


class SegmentationDataset(StreamDataset):
    """Samples by number, as `StreamDataset`, with a class map as the target.

    A batch has "image", "sample" and "failed" as there; "target" is uint8 (b, S, S), the class of each pixel, 255 where
    it is ignored; "valid", bool (b, S, S), is true where it is not.

    Attributes:
        scale_jitter: Least and largest factor of the short side.
    """

    is_categorical = True

    def __init__(
        self,
        sources: Sequence[RecordSource],
        *,
        seed: int,
        streams: int,
        image_size: int,
        short_side: int | None,
        scale_jitter: tuple[float, float] = (1.0, 1.0),
        perturb: bool = False,
        repeat: Mapping[str, int] | None = None,
    ) -> None:
        """Compute the order; no shard is read.

        Args:
            sources: Sets with class maps.
            seed: Seed of the order and of all random choices.
            streams: Pieces of a pass that are read in parallel.
            image_size: Side of the square crop, pixels.
            short_side: Shorter side of a resized image at a factor of 1, pixels; None: the image's own.
            scale_jitter: The factor of a sample is uniform between these.
            perturb: Add "perturbation" to the batches.
            repeat: How many times per pass a set or a shard is read.

        Raises:
            ValueError: As `StreamDataset`, or for factors that are not above 0 and ascending.
        """
        low, high = scale_jitter
        if not 0 < low <= high:
            raise UserError(
                f"scale_jitter={list(scale_jitter)} is not ascending", "type scale_jitter=[0.5,2.0]"
            )
        super().__init__(
            sources, seed=seed, streams=streams, image_size=image_size, perturb=perturb, repeat=repeat
        )
        self.resized_side, self.scale_jitter = short_side, (float(low), float(high))

    def _batch_arrays(self, count: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
        arrays = super()._batch_arrays(count)
        return {**arrays, "target": (np.uint8, arrays["target"][1])}

    def write_sample(
        self,
        shard: str,
        index: int,
        n: int,
        out: Mapping[str, np.ndarray],
        *,
        timer: Timer = no_timer,
    ) -> tuple[dict[str, bytes], tuple[int, int]]:
        """Read a record and write it as sample `n`; arguments, result and errors as for `StreamDataset`."""
        key, fields, image = self._read_image(shard, index, timer)
        with timer("decode the label"), record_errors(shard, index, key, CLASSES_FIELD):
            if CLASSES_FIELD not in fields:
                raise ValueError("the image has no class map")
            classes = decode_classes(fields[CLASSES_FIELD])
            if classes.shape != image.shape[:2]:
                raise ValueError(f"it has {classes.shape} pixels, and the image {image.shape[:2]}")
        size = self._resized_shape(image.shape[:2], n)
        top, left, mirror = self._draw_corner(size, n)
        with timer("resize the image"):
            image = resize_image(image, *size)
        with timer("crop and flip"):
            self._cut(image, classes, size, (top, left), mirror, out)
        return fields, size

    def _resized_shape(self, shape: tuple[int, ...], n: int) -> tuple[int, int]:
        """Return the (height, width) that sample `n`'s image is resized to."""
        low, high = self.scale_jitter
        factor = low + (high - low) * float(random_uniform(self.seed, n, 1, purpose=SCALE)[0])
        side = max(1, round(factor * (self.resized_side or min(shape))))
        return resize_shape(shape[0], shape[1], side, 1)

    def _draw_corner(self, size: tuple[int, int], n: int) -> tuple[int, int, bool]:
        """Draw the upper left corner of sample `n`'s square, and whether it is mirrored."""
        down, right, mirror = random_uniform(self.seed, n, 3, purpose=CROP)
        room = [max(0, length - self.image_size) + 1 for length in size]
        return int(down * room[0]), int(right * room[1]), bool(mirror < 0.5)

    def _cut(
        self,
        image: np.ndarray,
        classes: np.ndarray,
        size: tuple[int, int],
        corner: tuple[int, int],
        mirror: bool,
        out: Mapping[str, np.ndarray],
    ) -> None:
        """Write the square of image and class map; what is outside of the image is padded and ignored."""
        side, (top, left) = self.image_size, corner
        rows, columns = min(side, size[0] - top), min(side, size[1] - left)
        pixels, target = out["image"][0], out["target"][0]
        if rows < side or columns < side:
            pixels[:], target[:] = PADDING, IGNORED
        pixels[:rows, :columns] = image[top : top + rows, left : left + columns]
        down = nearest_indices(classes.shape[0], size[0], top, rows)
        across = nearest_indices(classes.shape[1], size[1], left, columns)
        target[:rows, :columns] = classes.take(down, 0).take(across, 1)
        if mirror:
            pixels[:], target[:] = pixels[:, ::-1].copy(), target[:, ::-1].copy()
        np.not_equal(target, IGNORED, out=out["valid"][0])
