"""A batch of photographs of one shape that wait for their labels."""

import json
from dataclasses import dataclass, field

import numpy as np
import torch

from depth_anything.data.sample import Frame
from depth_anything.teachers.teacher import Photographs


@dataclass
class ImageBatch:
    """Images of one shape from one shard.

    The last batch of a shard has no images and lists the records that failed to decode. A batch with `records` 0
    means that this process waits for shards that others are labeling.

    Attributes:
        set: Name of the image set.
        shard: Name of the shard.
        records: Number of records in the shard.
        indices: Record numbers of the images.
        image: (B,H,W,3) uint8.
        failed: Record number and reason of each record that failed.
        size: Height and width of the labels.
        keys: Keys of the images.
        metas: Metadata of the images, as JSON: Lightning visits every item of a mapping.
    """

    set: str
    shard: str
    records: int
    indices: list[int]
    image: torch.Tensor
    failed: list[tuple[int, str]] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    keys: list[str] = field(default_factory=list)
    metas: str = "[]"

    def photographs(self) -> Photographs:
        """Return the images as a teacher takes them."""
        return Photographs(self.image, self.size, self.keys, json.loads(self.metas))

    def pin_memory(self) -> "ImageBatch":
        """Copy the pixels to pinned memory, from which the GPU copies them while it computes."""
        self.image = self.image.pin_memory()
        return self

    @classmethod
    def stack(
        cls, set: str, shard: str, records: int, images: list[tuple[int, Frame]], size: tuple[int, int]
    ) -> "ImageBatch":
        """Stack images of one shape; `images` has record numbers and frames, `size` is that of the labels."""
        frames = [frame for _, frame in images]
        return cls(
            set,
            shard,
            records,
            [index for index, _ in images],
            torch.from_numpy(np.stack([frame.image for frame in frames])),
            size=size,
            keys=[frame.key for frame in frames],
            metas=json.dumps([frame.meta for frame in frames]),
        )
