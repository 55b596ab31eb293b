"""stage=pseudolabel: the teacher labels every photograph exactly once, at full frame (docs/contracts.md, labels).

Labels are disparity for every kind of teacher: `convert_to_disparity` is the only conversion, and `describe_teacher`
records it. The unit of work is a shard of images. Each process takes the next shard that has no labels and no lease,
labels it in memory and publishes the complete label shard by rename, so any number of processes may start, die and
start again. Batches are formed inside one shard, by shape, in a fixed order: a shard labeled twice has the same bytes,
and a lease only saves work.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from depth_anything.data.codec import encode
from depth_anything.data.dataset import next_or_failure, return_batch
from depth_anything.data.labels import LabelSetWriter, open_labels
from depth_anything.data.loader import StreamLoader
from depth_anything.data.reader import Records
from depth_anything.data.sample import decode_record
from depth_anything.data.shards import open_set
from depth_anything.data.transforms import normalize, resize_image
from depth_anything.disk import write_new
from depth_anything.errors import SAME_COMMAND, UserError
from depth_anything.geometry import depth_to_disparity
from depth_anything.inference.predictor import FARTHEST_M
from depth_anything.locks import FileWatch
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.weights import fingerprint
from depth_anything.preprocess import resize_shape
from depth_anything.progress import ProgressLine
from depth_anything.training.signals import signal_handler

PREPROCESSING_TEXT = (
    "short side {size}, sides multiples of {patch}, bicubic with antialias on uint8, {precision}"
)
LEASE_STALE_S = 120.0
NON_FINITE_REASON = "the network gives no numbers (NaN or infinity)"
MAX_REPORTED_IMAGES = 20  # images without a label that are printed; NAME.json lists all of them
MAX_WAITING_BATCHES = 16  # batches' worth of images that may wait for others of their shape
MIN_DEPTH_SHARE = 1e-3
"""Share of a metric teacher's max_depth: nearer depths are set to it. Labels keep 12 bits between the extremes of a
map, and the inverse of a pixel at zero would use them all."""


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


def describe_teacher(teacher: DepthAnything, file: str) -> dict[str, Any]:
    """Build the record of the teacher that a label set keeps; labels of two teachers are not mixed.

    Two records describe the same teacher if all fields but "file" and "licence" are equal.

    Returns:
        "fingerprint" of the weights, "file", "licence"; "quantity" and "unit" of the teacher's prediction, "depth" in
        "m" for metric and calibrated teachers; "conversion" to the labels' disparity, None if there was none.
    """
    conversion = None
    if teacher.max_depth is not None:
        nearest = MIN_DEPTH_SHARE * teacher.max_depth
        conversion = f"1 / depth, depth from {nearest:g} to {teacher.max_depth:g} m"
    elif teacher.calibration is not None:
        scale, shift = teacher.calibration
        conversion = f"{scale!r} * output + {shift!r}, at least 1/{FARTHEST_M:g} m"
    return {
        "fingerprint": fingerprint(teacher),
        "file": file,
        "licence": teacher.licence,
        "quantity": teacher.quantity if teacher.calibration is None else "depth",
        "unit": teacher.unit if teacher.calibration is None else "m",
        "conversion": conversion,
    }


class Lease:
    """A file in the label folder that names the process labeling a shard; it expires when that process dies."""

    _watch = FileWatch()  # of all lease files that this process has seen

    def __init__(self, path: Path, *, pid: int) -> None:
        """Name the file; the lease expires when the process `pid` of this host dies."""
        self.path, self.pid = path, pid

    @classmethod
    def for_shard(cls, labels: LabelSetWriter, shard: str, *, pid: int) -> "Lease":
        """Return the lease of a label shard."""
        return cls(Path(labels.root) / f".{shard}.lease", pid=pid)

    def acquire(self) -> bool:
        """Take the lease and return True, unless a living process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if write_new(self.path, self._content().encode()):
            return True
        if not self._is_expired():
            return False
        self.path.unlink(missing_ok=True)
        return write_new(self.path, self._content().encode())

    def renew(self) -> None:
        """Update the modification time, which shows that the holder is alive."""
        if self._is_mine():
            os.utime(self.path)

    def release(self) -> None:
        """Remove the file, unless another process has taken the lease over."""
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _content(self) -> str:
        return json.dumps({"host": socket.gethostname(), "pid": self.pid})

    def _is_mine(self) -> bool:
        try:
            return self.path.read_text() == self._content()
        except FileNotFoundError:
            return False

    def _is_expired(self) -> bool:
        try:
            holder = json.loads(self.path.read_text())
            host, pid = str(holder["host"]), int(holder["pid"])
        except FileNotFoundError:
            return True
        except (ValueError, KeyError, TypeError):
            host, pid = "", 0
        # On this host the process can be looked up, but its number may belong to another process by now.
        timeout_s = LEASE_STALE_S if host != socket.gethostname() else 10 * LEASE_STALE_S
        return self._watch.is_dead(self.path, host=host, pid=pid, timeout_s=timeout_s)


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
    """

    set: str
    shard: str
    records: int
    indices: list[int]
    image: torch.Tensor
    failed: list[tuple[int, str]] = field(default_factory=list)

    def pin_memory(self) -> "ImageBatch":
        """Copy the pixels to pinned memory, from which the GPU copies them while it computes."""
        self.image = self.image.pin_memory()
        return self

    @classmethod
    def stack(cls, set: str, shard: str, records: int, images: list[tuple[int, np.ndarray]]) -> "ImageBatch":
        """Stack images of one shape."""
        pixels = torch.from_numpy(np.stack([image for _, image in images]))
        return cls(set, shard, records, [index for index, _ in images], pixels)


class ShardBatches(IterableDataset):
    """Lease unlabeled shards one after another, while other processes do the same, and yield their batches."""

    def __init__(
        self,
        labels: Mapping[str, LabelSetWriter],
        *,
        image_size: int,
        patch: int,
        batch_size: int,
        rank: int,
        world: int,
    ) -> None:
        """Describe the work.

        Args:
            labels: The label set to fill, by set name.
            image_size: Short side after resizing, pixels.
            patch: Both sides become multiples of it.
            batch_size: Images of one shape at once.
            rank: This process, of `world`; each begins at a different shard.
            world: Number of processes of this job.
        """
        self.labels = dict(labels)
        self.image_size, self.patch, self.batch_size = image_size, patch, batch_size
        self.rank, self.world, self.pid = rank, world, os.getpid()

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield batches until every shard of every set is labeled, by this process or another."""
        batches = self._batches()
        while (batch := next_or_failure(batches)) is not None:
            yield batch

    def _batches(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        count = worker.num_workers if worker else 1
        lane, lanes = self.rank * count + (worker.id if worker else 0), self.world * count
        work = [(name, shard.name) for name, labels in self.labels.items() for shard in labels.images.shards]
        order = work[lane::lanes] + [
            item for other in range(lanes) if other != lane for item in work[other::lanes]
        ]
        yielded: set[tuple[str, str]] = set()  # the main process publishes them later
        while left := [
            item for item in order if item not in yielded and not self.labels[item[0]].done(item[1])
        ]:
            before = len(yielded)
            for name, shard in left:
                lease = Lease.for_shard(self.labels[name], shard, pid=self.pid)
                if not self.labels[name].done(shard) and lease.acquire():
                    yield from self.iter_shard(name, shard)
                    yielded.add((name, shard))
            if len(yielded) == before:  # others hold all shards that are left, and one of them may die
                time.sleep(0.5)
                # Lightning fetches one batch ahead; without this one it would hold the last real batch back.
                yield ImageBatch("", "", 0, [], torch.empty(0, dtype=torch.uint8))

    def iter_shard(self, name: str, shard: str) -> Iterator[ImageBatch]:
        """Yield a shard in batches of one shape, each as soon as it is full, the rest at the end.

        The order depends on the shard alone. A record that fails is listed with its reason in the last batch.
        """
        records = Records(self.labels[name].images)
        count = dict(records.shards)[f"{name}/{shard}"]
        waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        failed: list[tuple[int, str]] = []
        for index in range(count):
            try:
                frame = decode_record(*records.read(f"{name}/{shard}", index))
            except ValueError as error:
                failed.append((index, str(error)))
                continue
            height, width = frame.image.shape[:2]
            height, width = resize_shape(height, width, self.image_size, self.patch)
            same_shape = waiting.setdefault((height, width), [])
            same_shape.append((index, resize_image(frame.image, height, width)))
            if len(same_shape) == self.batch_size:
                yield ImageBatch.stack(name, shard, count, waiting.pop((height, width)))
            elif sum(map(len, waiting.values())) > MAX_WAITING_BATCHES * self.batch_size:
                largest = max(waiting, key=lambda shape: len(waiting[shape]))
                yield ImageBatch.stack(name, shard, count, waiting.pop(largest))
        for same_shape in waiting.values():
            yield ImageBatch.stack(name, shard, count, same_shape)
        yield ImageBatch(name, shard, count, [], torch.empty(0, dtype=torch.uint8), failed)


class ShardData(pl.LightningDataModule):
    """The image sets to label, and the label sets to write."""

    def __init__(
        self,
        *,
        sets: Mapping[str, str],
        labels: str,
        batch_size: int,
        image_size: int,
        workers: int,
        patch: int,
        precision: str,
        teacher: Mapping[str, Any],
        codec: str,
    ) -> None:
        """Open the image sets and their label sets.

        Args:
            sets: Image set name to folder or URL prefix.
            labels: Folder of label sets.
            batch_size: Images of one shape and shard at once.
            image_size: Short side after resizing, pixels.
            workers: Loader processes a device; each reads a shard of its own.
            patch: The teacher's patch, pixels.
            precision: The trainer's; labels of two precisions are not mixed.
            teacher: The teacher's record for the label sets, as `describe_teacher` builds it.
            codec: Codec of the labels.

        Raises:
            ValueError: If a set is missing or damaged, or its labels are another teacher's.
        """
        super().__init__()
        preprocessing = PREPROCESSING_TEXT.format(size=image_size, patch=patch, precision=precision)
        self.labels = {
            name: LabelSetWriter(
                os.path.join(labels, name),
                open_set(root, name=name),
                teacher=teacher,
                preprocessing=preprocessing,
                codec=codec,
            )
            for name, root in sets.items()
        }
        self.batch_size, self.image_size, self.workers, self.patch = batch_size, image_size, workers, patch
        self.codec, self.precision = codec, precision

    def finished(self) -> bool:
        """Return whether every image of every set has its label; write the manifests that are still missing."""
        return all([labels.finish() for labels in self.labels.values()])

    def summary(self) -> str:
        """Return how many labels each set has and how many images were skipped.

        Raises:
            ValueError: If a set is not finished.
        """
        if not self.finished():
            raise UserError("not every shard has its labels", ["read the messages above and ", SAME_COMMAND])
        parts = []
        for name, labels in self.labels.items():
            written = open_labels(labels.root, labels.images)
            skipped = labels.images.records - written.records
            parts.append(
                f"{written.records} labels of {name} in {labels.root}"
                + (f" ({skipped} skipped)" if skipped else "")
            )
        return "finished: " + "; ".join(parts)

    def predict_dataloader(self) -> DataLoader:
        """Build the loader of this process, which takes the shards that no other process has taken."""
        assert self.trainer is not None
        batches = ShardBatches(
            self.labels,
            image_size=self.image_size,
            patch=self.patch,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return StreamLoader(
            batches,
            smaller=f"batch_size={max(1, self.batch_size // 2)}",
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            collate_fn=return_batch,
        )

    def release_leases(self) -> None:
        """Release the leases of shards that this process has not finished."""
        for labels in self.labels.values():
            for path in Path(labels.root).glob(".*.lease"):
                Lease(path, pid=os.getpid()).release()


class PseudoLabel(pl.LightningModule):
    """Run the teacher, gather the labels of each shard in memory, and publish each shard as a whole."""

    def __init__(self, model: DepthAnything, data: ShardData) -> None:
        """Store the teacher and the sets that it labels."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._data = (data,)  # in a tuple, which hides it from Lightning
        self._encoded: dict[tuple[str, str], dict[int, Future[bytes]]] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="encode")  # zstandard releases the GIL
        self._bar: ProgressLine | None = None
        self._read = self._failed = self._non_finite = 0

    def on_predict_start(self) -> None:
        """Open a progress bar over the images that had no label when this process started."""
        left = sum(labels.count_unlabeled_images() for labels in self._data[0].labels.values())
        self._bar = ProgressLine(
            "labeling",
            total=left,
            unit="image",
            interval_s=10.0,
            enabled=self.trainer.is_global_zero,
            keep=True,
        )

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> int:
        """Label a batch; after the last batch of a shard, publish the shard. Returns the number of images."""
        signal_handler.raise_if_received()
        if not batch.records:
            return 0
        labels = self._data[0].labels[batch.set]
        lease = Lease.for_shard(labels, batch.shard, pid=os.getpid())
        encoded = self._encoded.setdefault((batch.set, batch.shard), {})
        if batch.indices:
            output = self.model(normalize(batch.image).to(next(self.model.parameters()).dtype))
            disparity = convert_to_disparity(self.model, output)
            # The output is checked, too: the disparity of an infinite depth is 0.
            finite = (output.isfinite() & disparity.isfinite()).flatten(1).all(1).tolist()
            for index, values, is_finite in zip(batch.indices, disparity.cpu().numpy(), finite, strict=True):
                if is_finite:
                    encoded[index] = self._pool.submit(encode, values, codec=labels.codec)
            lease.renew()
        else:
            del self._encoded[batch.set, batch.shard]
            accounted = {index for index, _ in batch.failed}.union(encoded)
            non_finite = [(i, NON_FINITE_REASON) for i in range(batch.records) if i not in accounted]
            self._check_failures(batch, non_finite, labels.keys(batch.shard))
            published = {index: label.result() for index, label in encoded.items()}
            labels.publish(batch.shard, published, batch.failed + non_finite)
            lease.release()
        assert self._bar is not None
        self._bar.update(len(batch.indices) + len(batch.failed))
        return len(batch.indices)

    def _check_failures(
        self, batch: ImageBatch, non_finite: list[tuple[int, str]], keys: Sequence[str]
    ) -> None:
        """Print the images without a label; stop before the shard is published if they are too many.

        Raises:
            ValueError: If a whole shard, or over 1 % of at least 1000 images, cannot be read; or if the network gives
                NaN or infinity for over half of a shard, or over 1 % of at least 1000 images.
        """
        skipped = [*batch.failed, *non_finite]
        for index, reason in skipped[: max(0, MAX_REPORTED_IMAGES - self._failed - self._non_finite)]:
            print(f"no label for {keys[index]!r} of {batch.set}/{batch.shard}: {reason}", file=sys.stderr)
        self._read += batch.records
        self._failed += len(batch.failed)
        self._non_finite += len(non_finite)
        many_read = self._read >= 1000
        if len(batch.failed) == batch.records or (many_read and self._failed > 0.01 * self._read):
            raise UserError(
                f"{self._failed} of {self._read} images cannot be read, the last of {batch.set}/{batch.shard} "
                f"({batch.failed[-1][1]})",
                ["check the set with `depth-anything verify` and ", SAME_COMMAND],
            )
        decoded = batch.records - len(batch.failed)
        if 2 * len(non_finite) > decoded or (
            many_read and non_finite and self._non_finite > 0.01 * self._read
        ):
            precision = self._data[0].precision
            raise UserError(
                f"{NON_FINITE_REASON} for {len(non_finite)} of {decoded} images of {batch.set}/{batch.shard}, as "
                f"{keys[non_finite[0][0]]!r}, at trainer.precision={precision}",
                "type teacher=FILE for another teacher"
                if precision.startswith("32")
                else "the precision may overflow: try trainer.precision=32-true",
            )

    def on_predict_end(self) -> None:
        """Write the manifests of the sets that are complete now."""
        self._data[0].finished()
        assert self._bar is not None
        self._bar.close()
