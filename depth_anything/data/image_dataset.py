"""The dataset of self-supervised pretraining: crops of images by number, and a random order of their patches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depth_anything.data.dataset import StreamDataset, Timer, no_timer
from depth_anything.data.reader import RecordSource
from depth_anything.data.transforms import crop_and_resize, draw_patch_order, draw_resized_crop


class ImageDataset(StreamDataset):
    """Images without labels: a random rectangle of each, resized to a square; half of them are mirrored.

    Sets with depth can be used too; their labels are not read. A micro-batch of b samples has "image", uint8
    (b, S, S, 3) RGB, "sample", int64 (b,), "patch_order", int64 (b, N), a random permutation of the patches of each
    image, and "failed" as in `StreamDataset`. All of it depends on (seed, n) only.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
        *,
        seed: int,
        streams: int,
        image_size: int,
        patch: int,
        crop_area: tuple[float, float],
        repeat: Mapping[str, int] | None = None,
    ) -> None:
        """Compute the order; no shard is read.

        Args:
            sources: The sets.
            seed: Seed of the order and of all random choices.
            streams: Pieces of a pass that are read in parallel.
            image_size: Side S of the crops, pixels.
            patch: Side of the encoder's patches, pixels; N is (S / patch)².
            crop_area: Smallest and largest share of an image that a crop covers.
            repeat: How many times per pass a set or a shard is read.

        Raises:
            ValueError: As `StreamDataset`.
        """
        super().__init__(
            sources, seed=seed, streams=streams, image_size=image_size, patch=patch, repeat=repeat
        )
        self.patches, self.crop_area = (image_size // patch) ** 2, crop_area

    def _batch_arrays(self, count: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
        side = self.image_size
        return {
            "image": (np.uint8, (count, side, side, 3)),
            "sample": (np.int64, (count,)),
            "patch_order": (np.int64, (count, self.patches)),
        }

    def write_sample(
        self, shard: str, index: int, n: int, out: Mapping[str, np.ndarray], *, timer: Timer = no_timer
    ) -> tuple[dict[str, bytes], tuple[int, int]]:
        """Read an image and write it as sample `n`; as `StreamDataset.write_sample`.

        Raises:
            BadRecord: It cannot be read or decoded.
            StorageUnavailable: A disk or server fails for now, or the memory is full.
        """
        key, fields, image = self._read_image(shard, index, timer)
        height, width = image.shape[:2]
        crop = draw_resized_crop(height, width, area=self.crop_area, seed=self.seed, n=n)
        with timer("crop and flip"):
            crop_and_resize(image, crop, self.image_size, out=out["image"][0])
        out["patch_order"][0] = draw_patch_order(self.patches, seed=self.seed, n=n)
        return fields, (height, width)
