"""Whole micro-batches of training samples by their numbers: find the record, decode, crop, flip, stack.

A sample's content depends on its number, the seed and the shards alone, whichever process makes it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from depth_anything.data import codec
from depth_anything.data.loader import send_failures
from depth_anything.data.reader import JoinedRecords, Records, ShardReader
from depth_anything.data.sample import convert_to_target, decode_image_and_meta, find_target_field
from depth_anything.data.shared_batch import SharedBatch, SharedBatchPool, array_views, batch_layout
from depth_anything.data.stream import Stream
from depth_anything.data.tars import BadRecord, StorageUnavailable
from depth_anything.data.transforms import (
    PERTURBATIONS,
    crop_encoded_map,
    crop_image,
    draw_crop,
    draw_cutmix_box,
    draw_perturbation,
)
from depth_anything.preprocess import resize_shape

SKY_POLICIES = ("far", "invalid")

_MAX_REPLACEMENTS = (
    100_000  # looked at for one sample, where most are known to be bad or lost with their shard
)


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
        depth_range: tuple[float, float] | None = None,
        relative: Collection[str] = (),
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
            depth_range: None for disparity; else targets are the records' depth in metres, valid from the first
                to the second of these metres.
            relative: names of sets whose targets are disparity though `depth_range` is given.

        Raises:
            ValueError: two sets have one name, the crop exceeds the frames, there are no records, or `sky` or
                `repeat` names what is not there.
        """
        self.sources = list(sources)
        self.seed, self.image_size, self.sky = seed, image_size, resolve_sky_policies(self.sources, sky)
        self.short_side, self.patch = short_side or image_size, patch
        self.perturb, self.cutmix = perturb, cutmix
        self.depth_range, self.relative = depth_range, frozenset(relative)
        self.handover: SharedBatchPool | None = None
        if self.short_side < image_size:
            raise ValueError(
                f"image_size={image_size} exceeds short_side={self.short_side}; give at most that"
            )
        self._source: dict[str, Records | JoinedRecords] = {}
        for source in self.sources:
            if source.name in self._source:
                raise ValueError(f"two sets are called {source.name}; name one of them otherwise")
            self._source[source.name] = source
        readers = [source for source in self.sources if isinstance(source, Records | JoinedRecords)]
        # One for all sets, so that what a worker holds does not grow with their number: the shards that the streams
        # stand in, twice for images and their labels, and some that they have just left.
        reader = ShardReader(max_indexes=max(2048, 2 * streams + 512))
        for source in readers:
            source.share_reader(reader)
        self._far = {source.name: source for source in readers if source.is_remote}
        shards = [shard for source in self.sources for shard in source.shards]
        self.stream = Stream(shards, seed=seed, streams=streams, repeat=repeat)
        self._bad: set[tuple[str, int]] = set()  # records that have failed in this process

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample `n` as a micro-batch of one."""
        return self.__getitems__([n])

    @send_failures
    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the samples of these numbers as one micro-batch of b samples, S being image_size.

        Returns:
            "image": uint8 (b, S, S, 3), RGB.
            "target": float32 (b, S, S), disparity (with `depth_range` metres), 0 where not valid.
            "valid": bool (b, S, S).
            "sample": int64 (b,), the numbers.
            "failed": list of "set/shard[index] key: reason", one for each number whose own record cannot be
            read, so that another stands in.
            "perturbation": float32 (b, 6) of draw_perturbation, where asked for.
            "box": float32 (b, 4) of draw_cutmix, where asked for.
            "metric": bool (b,), with `relative` sets: whether the target is in metres.

        Raises:
            ValueError: no record can be read, or a label is smaller than the crop.
        """
        worker = get_worker_info()
        if worker is not None:
            cv2.setNumThreads(0)  # a worker has one core; torch sees to its own threads
        fields, length = batch_layout(self._arrays(len(numbers)))
        place = self.handover.take(worker.id, length) if self.handover and worker else None
        memory = np.empty(length, np.uint8) if place is None else place.memory
        arrays = array_views(memory, fields)
        failed = []
        if self._far:
            self._expect(numbers)
        for i, n in enumerate(numbers):
            failure = self._fill(n, {name: values[i : i + 1] for name, values in arrays.items()})
            failed += [failure] if failure else []
        arrays["sample"][:] = numbers
        if self.perturb:
            arrays["perturbation"][:] = [draw_perturbation(self.seed, n) for n in numbers]
        if self.cutmix:
            arrays["box"][:] = [draw_cutmix_box(self.seed, n) for n in numbers]
        if place is not None:
            return SharedBatch(place, fields, {"failed": failed})
        return {**{name: torch.from_numpy(values) for name, values in arrays.items()}, "failed": failed}

    def _expect(self, numbers: Sequence[int]) -> None:
        """Let sets that are far away fetch the records of a micro-batch side by side."""
        places: dict[str, list[tuple[str, int]]] = {}
        for n in numbers:
            _, shard, index = self.stream.locate(n)
            name = shard.split("/")[0]
            if name in self._far and (shard, index) not in self._bad:
                places.setdefault(name, []).append((shard, index))
        for name, wanted in places.items():
            self._far[name].prefetch(wanted)

    def use_shared_memory(self, *, workers: int, micro_batch: int, places: int = 4) -> None:
        """Let forked loader workers write micro-batches where the main process reads them.

        Call it before the loader starts them; without it, batches are copied into new shared memory.

        Args:
            workers: of the loader.
            micro_batch: samples of a micro-batch.
            places: for each worker: two that it works ahead, and two that the main process changes over.
        """
        _, length = batch_layout(self._arrays(micro_batch))
        self.handover = SharedBatchPool(workers=workers, places=places, length=length) if workers else None

    def _arrays(self, count: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Return dtype and shape of each array of a micro-batch of `count`."""
        side = self.image_size
        arrays: dict[str, tuple[Any, tuple[int, ...]]] = {
            "image": (np.uint8, (count, side, side, 3)),
            "target": (np.float32, (count, side, side)),
            "valid": (np.bool_, (count, side, side)),
            "sample": (np.int64, (count,)),
        }
        if self.perturb:
            arrays["perturbation"] = (np.float32, (count, len(PERTURBATIONS)))
        if self.cutmix:
            arrays["box"] = (np.float32, (count, 4))
        if self.relative:
            arrays["metric"] = (np.bool_, (count,))
        return arrays

    def _fill(self, n: int, place: Mapping[str, np.ndarray]) -> str | None:
        """Write sample `n`, or its stand-in, into its place of a batch; return why it is not its own, if so."""
        _, shard, index = self.stream.locate(n)
        try:
            self._write(shard, index, n, place)
            return None
        except BadRecord as error:
            failure = f"{shard}[{index}] {error.key or '?'}: {error.reason}"
            gone = self._remember((shard, index), error)
        for other in islice(self.stream.replacements(n), _MAX_REPLACEMENTS):
            if other[0] != gone and other not in self._bad:
                try:
                    self._write(*other, n, place)
                    return failure
                except BadRecord as error:  # counted and named when its own number comes
                    gone = self._remember(other, error)
        raise ValueError(
            f"sample {n}: {failure}; nor can any other record be read: type  depth-anything verify"
        )

    def _write(self, shard: str, index: int, n: int, place: Mapping[str, np.ndarray]) -> None:
        """Write a record as sample `n` sees it, into arrays of one sample; BadRecord if it cannot be decoded."""
        source = self._source[shard.split("/")[0]]
        depth_range = None if source.name in self.relative else self.depth_range
        target, valid = place["target"][0], place["valid"][0]
        key, fields = source.read(shard, index)
        with _record_errors(shard, index, key):
            name = find_target_field(fields, meters=depth_range is not None)
            whole, meta = decode_image_and_meta(fields)
        with _record_errors(shard, index, key, name):
            size = codec.map_size(fields[name])
        if not isinstance(source, JoinedRecords):
            height, width, _ = whole.shape
            size = resize_shape(height, width, self.short_side, self.patch)
        if min(size) < self.image_size:
            raise ValueError(
                f"{key}: a label of {size[0]} x {size[1]} px is too small for {self.image_size}; "
                f"type image_size={min(size)}, or make larger labels"
            )
        view = draw_crop(*size, self.image_size, seed=self.seed, n=n)
        with _record_errors(shard, index, key, name):
            crop_encoded_map(fields[name], view, out=target)
        convert_to_target(
            target,
            valid,
            quantity=name.split(".")[0],
            sky=self.sky[source.name],
            meta=meta,
            depth_range=depth_range,
        )  # the map is cut first and converted after, as most pixels are cut away
        crop_image(whole, view, out=place["image"][0])
        if self.relative:
            place["metric"][0] = depth_range is not None

    def _remember(self, place: tuple[str, int], error: BadRecord) -> str | None:
        """Note a bad record, so that no other sample tries it; return its shard if all of that is lost."""
        self._bad.add(place)
        return None if error.key else place[0]


@contextmanager
def _record_errors(shard: str, index: int, key: str, name: str = "") -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise BadRecord(shard, index, key, f"{name}: {error}" if name else str(error)) from error
    except MemoryError as error:  # whether there is enough is the machine's fault, not the record's
        raise StorageUnavailable(
            f"{shard}[{index}] {key} cannot be decoded for now: the memory is full; use fewer loader workers"
        ) from error


def resolve_sky_policies(
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
    if isinstance(sky, str) and sky in SKY_POLICIES:
        sky = {source.name: sky for source in sources}
    if sky is not None and not isinstance(sky, Mapping):
        raise ValueError(f"sky={sky} is unknown; type sky=far, sky=invalid or sky={{SET: invalid}}")
    given = dict(sky or {})
    names = [source.name for source in sources]
    for name, policy in given.items():
        if name not in names:
            raise ValueError(f"sky names {name}, which is none of the sets {', '.join(sorted(names))}")
        if policy not in SKY_POLICIES:
            raise ValueError(f"sky={policy} of {name} is unknown; type sky=far or sky=invalid")
    for source in sources:
        if source.name in given:
            continue
        meta = source.set.meta if isinstance(source, Records) else {}
        given[source.name] = meta.get("sky_policy", SKY_POLICIES[0])
        if given[source.name] not in SKY_POLICIES:
            raise ValueError(
                f"the manifest of {source.name} has sky_policy={given[source.name]}, which is unknown; "
                f"type sky={{{source.name}: far}} or sky={{{source.name}: invalid}}"
            )
    return given
