"""The training dataset: micro-batches of samples by number. Find the record, decode, resize, crop, flip, stack.

The content of a sample depends only on its number, the seed and the shards, in every process.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from depth_anything.data import codec
from depth_anything.data.captions import CAPTION_BYTES, draw_caption, read_captions, write_caption
from depth_anything.data.intrinsics import focal_from_meta, resize_focal
from depth_anything.data.label_fields import LabelOptions, choose_view, find_crop_field, write_extras
from depth_anything.data.reader import JoinedRecords, Records, RecordSource, ShardReader
from depth_anything.data.sample import convert_to_target, decode_image_and_meta, find_target_field
from depth_anything.data.shared_batch import (
    ArrayField,
    SharedBatch,
    SharedBatchPool,
    Slot,
    array_views,
    batch_layout,
)
from depth_anything.data.stream import Stream
from depth_anything.data.tars import BadRecord, StorageUnavailable
from depth_anything.data.transforms import (
    PERTURBATIONS,
    crop_encoded_map,
    crop_image,
    draw_crop,
    draw_cutmix_box,
    draw_perturbation,
    resize_image,
)
from depth_anything.errors import UserError, UserMessage
from depth_anything.preprocess import resize_shape

SKY_POLICIES = ("far", "invalid")

_MAX_REPLACEMENTS = 100_000  # records tried for one sample, where most are bad or their shard is unreadable

Timer = Callable[[str], AbstractContextManager[None]]
"""Called with the name of a stage of `StreamDataset.write_sample`; the stage runs inside the context."""

_NO_TIMER: AbstractContextManager[None] = nullcontext()


def no_timer(stage: str) -> AbstractContextManager[None]:
    """Measure nothing."""
    return _NO_TIMER


@dataclass(frozen=True)
class WorkerFailure:
    """An error of a loader worker, sent to the main process in place of a batch.

    PyTorch would raise an error of the same class whose only argument is the text of the traceback.
    """

    error: ValueError | OSError


def send_failures(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that builds a batch: a worker returns its ValueError or OSError in place of the batch."""

    @wraps(method)
    def build_or_fail(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            if isinstance(error, UserMessage):
                return WorkerFailure(error)
            kind = OSError if isinstance(error, OSError) else UserError
            return WorkerFailure(kind(str(error) or type(error).__name__))

    return build_or_fail


next_or_failure = send_failures(lambda batches: next(batches, None))
"""Return the next item of an iterator of batches, None at its end; errors as in `send_failures`."""


def return_batch(batch: Any) -> Any:
    """Return a batch as the dataset built it: a collate_fn that spawned workers can unpickle."""
    return batch


class StreamDataset(Dataset):
    """Training samples by number, from any number of sets.

    For `DataLoader(dataset, batch_sampler=MicroBatchSampler(…), collate_fn=return_batch)`: a worker sends whole
    micro-batches. Files are opened in the process that reads.

    Attributes:
        sources: The sets.
        sky: Set name to "far" or "invalid".
        stream: The order; `stream.records` samples are one pass.
        is_categorical: Targets are numbers of classes, not values that differ within an image.
    """

    is_categorical = False

    def __init__(
        self,
        sources: Sequence[RecordSource],
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
        label_options: LabelOptions | None = None,
        flip: bool = True,
        captions: bool = False,
        canonical_focal: float | None = None,
    ) -> None:
        """Compute the order; no shard is read.

        Args:
            sources: Labeled sets, whose frames are resized to `short_side` by the authors' rule, and images joined
                with labels, which are resized to the size of their label.
            seed: Seed of the order and of all random choices.
            streams: Pieces of a pass that are read in parallel.
            image_size: Side of the square crop, pixels.
            short_side: Short side of the resized frames, pixels; `image_size` by default.
            patch: Both sides of a resized frame are multiples of it, pixels.
            sky: "far" gives the sky disparity 0, "invalid" leaves it out; or {set: either}. None, and sets that are
                not named, use the rule of `resolve_sky_policies`.
            perturb: Add "perturbation" to the batches.
            cutmix: Add "box" to the batches.
            repeat: How many times per pass a set or a shard is read.
            depth_range: None for disparity targets. Otherwise targets are depth in meters, valid where
                lowest ≤ depth ≤ highest.
            relative: Names of sets whose targets are disparity even if `depth_range` is given.
            label_options: How the optional fields of labels are used; None ignores them.
            flip: Mirror half of the samples.
            captions: Add "caption" to the batches. A record without one counts as bad.
            canonical_focal: With `depth_range`: targets are the depth that a camera of this focal length, in pixels of
                the resized frame, would have seen. Pixels beyond the highest depth by either camera are not valid.

        Raises:
            ValueError: Two sets have the same name, the crop is larger than the frames, there are no records, or `sky`
                or `repeat` name an unknown set.
        """
        self.sources = list(sources)
        self.seed, self.image_size = seed, image_size
        self.sky = resolve_sky_policies(self.sources, sky)
        self.short_side, self.patch = short_side or image_size, patch
        self.perturb, self.cutmix = perturb, cutmix
        self.depth_range, self.relative = depth_range, frozenset(relative)
        self.label_options = label_options or LabelOptions()
        self.flip, self.captions = flip, captions
        self.canonical_focal = canonical_focal
        self.shared_batches: SharedBatchPool | None = None
        if self.short_side < image_size:
            raise UserError(
                f"image_size={image_size} exceeds short_side={self.short_side}", "type at most that"
            )
        self._sources: dict[str, RecordSource] = {}
        for source in self.sources:
            if source.name in self._sources:
                raise UserError(f"two sets have the name {source.name}", "rename one of them")
            self._sources[source.name] = source
        readers = [source for source in self.sources if isinstance(source, RecordSource)]
        # One reader for all sets, so that the memory of a worker does not grow with their number. It keeps the indexes
        # of the shards that the streams read, twice for images and labels, and of some that they have just left.
        reader = ShardReader(max_indexes=max(2048, 2 * streams + 512))
        for source in readers:
            source.share_reader(reader)
        self._remote = {source.name: source for source in readers if source.is_remote}
        shards = [shard for source in self.sources for shard in source.shards]
        self.stream = Stream(shards, seed=seed, streams=streams, repeat=repeat)
        self._bad: set[tuple[str, int]] = set()  # records that have failed in this process

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample `n` as a micro-batch of one."""
        return self.__getitems__([n])

    @send_failures
    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the samples with these numbers as one micro-batch of b samples, S being image_size.

        Returns:
            "image": uint8 (b, S, S, 3), RGB.
            "target": float32 (b, S, S), disparity (with `depth_range` depth in meters), 0 where not valid.
            "valid": bool (b, S, S).
            "sample": int64 (b,), the numbers.
            "failed": List of "set/shard[index] key: reason", one for each sample whose own record is bad and was
            replaced.
            "perturbation": float32 (b, 6) of `draw_perturbation`, if `perturb`.
            "box": float32 (b, 4) of `draw_cutmix_box`, if `cutmix`.
            "metric": bool (b,), if there are `relative` sets: whether the target is in meters.
            "confidence", "local", "local_valid", "local_confidence": (b, S, S) of `write_extras`, by `label_options`.
            "caption": uint8 (b, CAPTION_BYTES), if `captions`: one of the image's captions; see `caption_texts`.

        Raises:
            ValueError: No record can be read, or a label is smaller than the crop.
            StorageUnavailable: A disk or server fails for now.
        """
        worker = get_worker_info()
        if worker is not None:
            cv2.setNumThreads(0)  # a worker has one core; PyTorch sets its own threads
        slot: Slot | None = None
        fields: dict[str, ArrayField] = {}
        if self.shared_batches and worker:
            fields, length = batch_layout(self._batch_arrays(len(numbers)))
            slot = self.shared_batches.acquire(worker.id, length)
        if slot is None:
            arrays = self.empty_batch(len(numbers))
        else:
            arrays = array_views(slot.memory, fields)
        failed = []
        if self._remote:
            self._prefetch(numbers)
        for i, n in enumerate(numbers):
            failure = self._write_or_replace(n, {name: values[i : i + 1] for name, values in arrays.items()})
            failed += [failure] if failure else []
        arrays["sample"][:] = numbers
        if self.perturb:
            arrays["perturbation"][:] = [draw_perturbation(self.seed, n) for n in numbers]
        if self.cutmix:
            arrays["box"][:] = [draw_cutmix_box(self.seed, n) for n in numbers]
        if slot is not None:
            return SharedBatch(slot, fields, {"failed": failed})
        return {**{name: torch.from_numpy(values) for name, values in arrays.items()}, "failed": failed}

    def _prefetch(self, numbers: Sequence[int]) -> None:
        """Let remote sets fetch the records of a micro-batch in parallel."""
        records: dict[str, list[tuple[str, int]]] = {}
        for n in numbers:
            _, shard, index = self.stream.locate(n)
            name = shard.split("/")[0]
            if name in self._remote and (shard, index) not in self._bad:
                records.setdefault(name, []).append((shard, index))
        for name, wanted in records.items():
            self._remote[name].prefetch(wanted)

    def use_shared_memory(self, *, workers: int, micro_batch: int, slots: int = 4) -> None:
        """Let forked loader workers write micro-batches into shared memory.

        Call it before the loader starts its workers; without it, PyTorch copies batches into new shared memory.

        Args:
            workers: Number of workers of the loader.
            micro_batch: Samples of a micro-batch.
            slots: Per worker: two batches that it prefetches, and two that the main process may hold.
        """
        _, length = batch_layout(self._batch_arrays(micro_batch))
        self.shared_batches = (
            SharedBatchPool(workers=workers, slots=slots, length=length) if workers else None
        )

    def _batch_arrays(self, count: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Return dtype and shape of each array of a micro-batch of `count` samples."""
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
        if self.label_options.weight == "weight":
            arrays["confidence"] = (np.float32, (count, side, side))
        if self.label_options.local:
            arrays["local"] = (np.float32, (count, side, side))
            arrays["local_valid"] = (np.bool_, (count, side, side))
            if self.label_options.weight == "weight":
                arrays["local_confidence"] = (np.float32, (count, side, side))
        if self.captions:
            arrays["caption"] = (np.uint8, (count, CAPTION_BYTES))
        return arrays

    def empty_batch(self, count: int) -> dict[str, np.ndarray]:
        """Allocate the arrays of a micro-batch of `count` samples."""
        return {name: np.empty(shape, dtype) for name, (dtype, shape) in self._batch_arrays(count).items()}

    def _write_or_replace(self, n: int, out: Mapping[str, np.ndarray]) -> str | None:
        """Write sample `n`, or its replacement, into arrays of one sample; return why it was replaced, if so."""
        _, shard, index = self.stream.locate(n)
        try:
            self.write_sample(shard, index, n, out)
            return None
        except BadRecord as error:
            failure = f"{shard}[{index}] {error.key or '?'}: {error.reason}"
            lost = self._mark_bad((shard, index), error)
        for record in islice(self.stream.replacements(n), _MAX_REPLACEMENTS):
            if record[0] != lost and record not in self._bad:
                try:
                    self.write_sample(*record, n, out)
                    return failure
                except BadRecord as error:  # it is reported when its own number is read
                    lost = self._mark_bad(record, error)
        raise UserError(f"sample {n}: {failure}; no other record can be read", "type  depth-anything verify")

    def _read_image(self, shard: str, index: int, timer: Timer) -> tuple[str, dict[str, bytes], np.ndarray]:
        """Read a record whose image alone is decoded here; return its key, its fields and the image."""
        with timer("read the record"):
            key, fields = self._sources[shard.split("/")[0]].read(shard, index)
        with timer("decode the image"), record_errors(shard, index, key):
            image, _ = decode_image_and_meta(fields)
        return key, fields, image

    def write_sample(
        self,
        shard: str,
        index: int,
        n: int,
        out: Mapping[str, np.ndarray],
        *,
        timer: Timer = no_timer,
    ) -> tuple[dict[str, bytes], tuple[int, int]]:
        """Read a record and write it as sample `n`.

        Args:
            shard: set/shard.
            index: Index of the record in the shard.
            n: The number, which determines crop and flip.
            out: Arrays of a batch of one sample.
            timer: Measures the stages; see `timing.SAMPLE_STAGES`.

        Returns:
            The fields of the record, and the (height, width) that its image was resized to.

        Raises:
            BadRecord: It cannot be read or decoded.
            ValueError: The label is smaller than the crop.
            StorageUnavailable: A disk or server fails for now, or the memory is full.
        """
        source = self._sources[shard.split("/")[0]]
        depth_range = None if source.name in self.relative else self.depth_range
        target, valid = out["target"][0], out["valid"][0]
        with timer("read the record"):
            key, fields = source.read(shard, index)
        with timer("decode the image"), record_errors(shard, index, key):
            name = find_target_field(fields, meters=depth_range is not None)
            image, meta = decode_image_and_meta(fields)
            if self.captions:
                write_caption(
                    draw_caption(read_captions(fields, meta), seed=self.seed, n=n), out["caption"][0]
                )
        with record_errors(shard, index, key):
            whole = image.shape[:2]
            view, local = choose_view(fields, whole, self.label_options, seed=self.seed, n=n)
            if view.box is not None:
                name, image = find_crop_field(fields, view.prefix), view.box.cut(image)
        with record_errors(shard, index, key, name):
            size = codec.map_size(fields[name])
        if not isinstance(source, JoinedRecords) and view.box is None:
            size = resize_shape(image.shape[0], image.shape[1], self.short_side, self.patch)
        if min(size) < self.image_size:
            raise UserError(
                f"{key}: its label of {size[0]} x {size[1]} px is too small for image_size={self.image_size}",
                f"type image_size={min(size)}, or make larger labels",
            )
        crop = draw_crop(*size, self.image_size, seed=self.seed, n=n)
        crop = crop if self.flip else replace(crop, flip=False)
        with timer("decode the label"), record_errors(shard, index, key, name):
            crop_encoded_map(fields[name], crop, out=target)
        with timer("make target and mask"):  # after cropping, because most pixels are cropped away
            convert_to_target(
                target,
                valid,
                quantity=name.split(".")[-2],
                sky=self.sky[source.name],
                meta=meta,
                depth_range=depth_range,
            )
            with record_errors(shard, index, key):
                write_extras(fields, view, local, crop, image=whole, options=self.label_options, out=out)
            if depth_range is not None and self.canonical_focal is not None:
                with record_errors(shard, index, key, "json"):
                    focal = resize_focal(_read_focal(meta, image.shape), image.shape, size)
                to_canonical_depth(
                    target, valid, focal=focal, canonical_focal=self.canonical_focal, highest=depth_range[1]
                )
        with timer("resize the image"):
            image = resize_image(image, *size)
        with timer("crop and flip"):
            crop_image(image, crop, out=out["image"][0])
        if self.relative:
            out["metric"][0] = depth_range is not None
        return fields, size

    def _mark_bad(self, record: tuple[str, int], error: BadRecord) -> str | None:
        """Remember a bad record, so that no other sample tries it; return its shard if that is unreadable."""
        self._bad.add(record)
        return None if error.key else record[0]


def to_canonical_depth(
    depth: np.ndarray, valid: np.ndarray, *, focal: float, canonical_focal: float, highest: float
) -> None:
    """Convert depth to what a camera of the canonical focal length would have seen, in place.

    depth · canonical_focal / focal: Metric3D (arXiv 2307.10984), section 3.1, label transform.

    Args:
        depth: float32 (H, W), meters; becomes 0 where not valid.
        valid: bool (H, W); becomes False where the canonical depth exceeds `highest`, which the network cannot predict.
        focal: Focal length of the frame, pixels.
        canonical_focal: Focal length of the canonical camera, in the same pixels.
        highest: Largest canonical depth, meters.
    """
    np.multiply(depth, np.float32(canonical_focal / focal), out=depth)
    valid &= depth <= highest
    np.copyto(depth, 0, where=~valid)


def _read_focal(meta: Mapping[str, Any], shape: Sequence[int]) -> float:
    focal = focal_from_meta(meta, shape)
    if focal is None:
        raise ValueError("it has no intrinsics, which canonical_focal needs")
    return focal


@contextmanager
def record_errors(shard: str, index: int, key: str, field: str = "") -> Iterator[None]:
    """Name the record in the errors of decoding it: ValueError becomes BadRecord, MemoryError StorageUnavailable."""
    try:
        yield
    except ValueError as error:
        raise BadRecord(shard, index, key, f"{field}: {error}" if field else str(error)) from error
    except MemoryError as error:  # the machine is at fault, not the record
        raise StorageUnavailable(
            f"{shard}[{index}] {key} cannot be decoded: the memory is full", "type a smaller workers=N"
        ) from error


def resolve_sky_policies(
    sources: Sequence[RecordSource], sky: str | Mapping[str, str] | None
) -> dict[str, str]:
    """Return the sky policy of each set: "far" gives the sky disparity 0, "invalid" leaves it out.

    Args:
        sources: The sets.
        sky: One policy for all, or {set: policy}. None, and sets that are not named, use "sky_policy" of the manifest,
            or "far". Pseudo-labels have a value everywhere and no sky.

    Raises:
        ValueError: An unknown policy or set.
    """
    if isinstance(sky, str) and sky in SKY_POLICIES:
        sky = {source.name: sky for source in sources}
    if sky is not None and not isinstance(sky, Mapping):
        raise UserError(f"sky={sky} is unknown", "type sky=far, sky=invalid or sky={SET: invalid}")
    policies = dict(sky or {})
    names = [source.name for source in sources]
    for name, policy in policies.items():
        if name not in names:
            raise ValueError(f"sky names {name}, which is not one of the sets {', '.join(sorted(names))}")
        if policy not in SKY_POLICIES:
            raise UserError(f"sky={policy} of {name} is unknown", "type sky=far or sky=invalid")
    for source in sources:
        if source.name in policies:
            continue
        meta = source.set.meta if isinstance(source, Records) else {}
        policies[source.name] = meta.get("sky_policy", SKY_POLICIES[0])
        if policies[source.name] not in SKY_POLICIES:
            raise UserError(
                f"the manifest of {source.name} has the unknown sky_policy={policies[source.name]}",
                f"type sky={{{source.name}: far}} or sky={{{source.name}: invalid}}",
            )
    return policies
