"""Whole micro-batches of training samples by their numbers: find the record, decode, crop, flip, stack.

A sample's content depends on its number, the seed and the shards alone, whichever process makes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from depth_anything.data.sample import Frame, decode_record, disparity_target
from depth_anything.data.shards import BadRecord, JoinedRecords, Records
from depth_anything.data.stream import Stream
from depth_anything.data.transforms import draw_cutmix, draw_perturbation, draw_view, view_image, view_map
from depth_anything.preprocess import resize_shape

SKY = ("far", "invalid")

_PLACES = 100_000  # looked at for one sample, where most are known to be bad or lost with their shard


class StreamDataset(Dataset):
    """Training samples by number, from any number of sets.

    For `DataLoader(dataset, batch_sampler=MicroBatches(…), collate_fn=…)` with a collate_fn that returns its
    argument: a worker hands over whole micro-batches. Files are opened in the process that reads.

    Attributes:
        sources: the sets.
        sky: set name to "far" or "invalid".
        stream: the order; `stream.records` samples make a pass.
    """

    def __init__(
        self,
        sources: Sequence[Records | JoinedRecords],
        *,
        seed: int,
        streams: int,
        image_size: int,
        short_side: int | None = None,
        patch: int = 14,
        sky: str | Mapping[str, str] | None = "far",
        perturb: bool = False,
        cutmix: bool = False,
        repeat: Mapping[str, int] | None = None,
    ) -> None:
        """Lay out the order; no shard is read.

        Args:
            sources: labelled sets, whose frames are resized to `short_side` by the authors' rule, and images
                joined with labels, which are resized to their label's size.
            seed: of the order and of every random choice.
            streams: pieces of a pass that are read side by side.
            image_size: side of the square crop, pixels.
            short_side: of the resized frames, pixels; image_size if not given.
            patch: pixels that both sides of a resized frame are a multiple of.
            sky: "far" gives it disparity 0, "invalid" leaves it out; or {set: either}; for sets not named, and
                for None, what `sky_policies` finds.
            perturb: add "perturbation" to the batches.
            cutmix: add "box" to the batches.
            repeat: times a pass that a set or a shard comes.

        Raises:
            ValueError: two sets have one name, the crop exceeds the frames, there are no records, or `sky` or
                `repeat` names what is not there.
        """
        self.sources = list(sources)
        self.seed, self.image_size, self.sky = seed, image_size, sky_policies(self.sources, sky)
        self.short_side, self.patch = short_side or image_size, patch
        self.perturb, self.cutmix = perturb, cutmix
        if self.short_side < image_size:
            raise ValueError(
                f"image_size={image_size} exceeds short_side={self.short_side}; give at most that"
            )
        self._source: dict[str, Records | JoinedRecords] = {}
        for source in self.sources:
            if source.name in self._source:
                raise ValueError(f"two sets are called {source.name}; name one of them otherwise")
            self._source[source.name] = source
        shards = [shard for source in self.sources for shard in source.shards]
        self.stream = Stream(shards, seed=seed, streams=streams, repeat=repeat)
        self._bad: set[tuple[str, int]] = set()  # records that have failed in this process

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample `n` as a micro-batch of one."""
        return self.__getitems__([n])

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the samples of these numbers as one micro-batch of b samples, S being image_size.

        Returns:
            "image": uint8 (b, S, S, 3), RGB.
            "target": float32 (b, S, S), disparity, 0 where not valid.
            "valid": bool (b, S, S).
            "sample": int64 (b,), the numbers.
            "failed": list of "set/shard[index] key: reason", one for each number whose own record cannot be
            read, so that another stands in.
            "perturbation": float32 (b, 6) of draw_perturbation, where asked for.
            "box": float32 (b, 4) of draw_cutmix, where asked for.

        Raises:
            ValueError: no record can be read, or a label is smaller than the crop.
        """
        if get_worker_info() is not None:
            cv2.setNumThreads(0)  # a worker has one core; torch sees to its own threads
        count, side = len(numbers), self.image_size
        image = np.empty((count, side, side, 3), np.uint8)
        target, valid = np.empty((count, side, side), np.float32), np.empty((count, side, side), bool)
        failed = []
        for i, n in enumerate(numbers):
            frame, size, sky, failure = self._frame(n)
            target[i], valid[i] = self._cut(frame, size, n, sky=sky, image=image[i])
            failed += [failure] if failure else []
        batch = {"image": image, "target": target, "valid": valid, "sample": np.array(numbers, np.int64)}
        if self.perturb:
            batch["perturbation"] = np.stack([draw_perturbation(self.seed, n) for n in numbers])
        if self.cutmix:
            batch["box"] = np.stack([draw_cutmix(self.seed, n) for n in numbers])
        return {**{name: torch.from_numpy(values) for name, values in batch.items()}, "failed": failed}

    def _cut(
        self, frame: Frame, size: tuple[int, int], n: int, *, sky: str, image: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return disparity and mask of sample `n`'s square of a frame resized to `size`, and fill in `image`."""
        if min(size) < self.image_size:
            raise ValueError(
                f"{frame.key}: a label of {size[0]} x {size[1]} px is too small for {self.image_size}; "
                f"type image_size={min(size)}, or make larger labels"
            )
        view = draw_view(*size, self.image_size, seed=self.seed, n=n)
        # The map is cut first and converted after: pixels do not depend on each other, and most are cut away.
        small = replace(
            frame,
            depth=None if frame.depth is None else view_map(frame.depth, view),
            disparity=None if frame.disparity is None else view_map(frame.disparity, view),
        )
        view_image(frame.image, view, out=image)
        return disparity_target(small, sky=sky)

    def _frame(self, n: int) -> tuple[Frame, tuple[int, int], str, str | None]:
        """Return a frame for sample `n`, its size and its set's rule for sky, and why it is another's, if so."""
        _, shard, index = self.stream.locate(n)
        try:
            return *self._decode(shard, index), None
        except BadRecord as error:
            failure = f"{shard}[{index}] {error.key or '?'}: {error.reason}"
            gone = self._remember((shard, index), error)
        for place in islice(self.stream.stand_ins(n), _PLACES):
            if place[0] != gone and place not in self._bad:
                try:
                    return *self._decode(*place), failure
                except BadRecord as error:  # counted and named when its own number comes
                    gone = self._remember(place, error)
        raise ValueError(
            f"sample {n}: {failure}; nor can any other record be read: type  depth-anything verify"
        )

    def _decode(self, shard: str, index: int) -> tuple[Frame, tuple[int, int], str]:
        source = self._source[shard.split("/")[0]]
        sky = self.sky[source.name]
        key, fields = source.read(shard, index)
        try:
            frame = decode_record(key, fields)
        except ValueError as error:
            raise BadRecord(shard, index, key, str(error)) from error
        label = frame.depth if frame.disparity is None else frame.disparity
        if label is None:
            raise BadRecord(shard, index, key, "it has neither depth nor disparity: an image without a label")
        if isinstance(source, JoinedRecords):
            return frame, label.shape, sky
        height, width, _ = frame.image.shape
        return frame, resize_shape(height, width, self.short_side, self.patch), sky

    def _remember(self, place: tuple[str, int], error: BadRecord) -> str | None:
        """Note a bad record, so that no other sample tries it; return its shard if all of that is lost."""
        self._bad.add(place)
        return None if error.key else place[0]


def sky_policies(
    sources: Sequence[Records | JoinedRecords], sky: str | Mapping[str, str] | None
) -> dict[str, str]:
    """Say for each set what becomes of its sky: "far" gives it disparity 0, "invalid" leaves it out.

    Args:
        sources: the sets.
        sky: one rule for all, or {set: rule}; for sets not named, and for None, the rule is "sky_policy" of
            their manifest, "far" if it has none. Made labels have a value everywhere and no sky.

    Raises:
        ValueError: another word, or a set that is not there.
    """
    if isinstance(sky, str) and sky in SKY:
        sky = {source.name: sky for source in sources}
    if sky is not None and not isinstance(sky, Mapping):
        raise ValueError(f"sky={sky} is unknown; type sky=far, sky=invalid or sky={{SET: invalid}}")
    given = dict(sky or {})
    names = [source.name for source in sources]
    for name, policy in given.items():
        if name not in names:
            raise ValueError(f"sky names {name}, which is none of the sets {', '.join(sorted(names))}")
        if policy not in SKY:
            raise ValueError(f"sky={policy} of {name} is unknown; type sky=far or sky=invalid")
    for source in sources:
        if source.name in given:
            continue
        meta = source.set.meta if isinstance(source, Records) else {}
        given[source.name] = meta.get("sky_policy", SKY[0])
        if given[source.name] not in SKY:
            raise ValueError(
                f"the manifest of {source.name} has sky_policy={given[source.name]}, which is unknown; "
                f"type sky={{{source.name}: far}} or sky={{{source.name}: invalid}}"
            )
    return given
