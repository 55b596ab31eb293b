"""stage=pseudolabel: the teacher labels every photograph exactly once, at full frame (docs/contracts.md, labels).

Labels are disparity for every kind of teacher (depth_anything/teachers/), which records how it came about. The unit of
work is a shard of images. Each process takes the next shard that has no labels and no lease,
labels it in memory and publishes the complete label shard by rename, so any number of processes may start, die and
start again. Batches are formed inside one shard, by shape, in a fixed order: a shard labeled twice has the same bytes,
and a lease only saves work.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from depth_anything.data.address import join_address
from depth_anything.data.codec import CONFIDENCE_CODEC, encode
from depth_anything.data.dataset import next_or_failure, return_batch
from depth_anything.data.labels import LabelSetWriter, open_labels
from depth_anything.data.loader import StreamLoader
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame, decode_record
from depth_anything.data.shards import open_set
from depth_anything.data.transforms import resize_image
from depth_anything.errors import SAME_COMMAND, UserError
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.preprocess import resize_shape
from depth_anything.progress import ProgressLine
from depth_anything.teachers.network_teacher import PREPROCESSING_TEXT, NetworkTeacher
from depth_anything.teachers.teacher import Teacher
from depth_anything.training.headroom import label_need, warn_of
from depth_anything.training.image_batch import ImageBatch
from depth_anything.training.lease import release_leases, remove_leases, shard_lease
from depth_anything.training.signals import signal_handler
from depth_anything.training.work_share import WorkShare, choose_share

NON_FINITE_REASON = "the network gives no numbers (NaN or infinity)"
MAX_REPORTED_IMAGES = 20  # images without a label that are printed; NAME.json lists all of them
MAX_WAITING_BATCHES = 16  # batches' worth of images that may wait for others of their shape
OBJECT_POLL_S = (
    3.0,
    60.0,
)  # shortest and longest wait between two looks at an object store, which cost money
MAX_ASKED = 100  # shards that are asked for one by one; for more of them an object store is listed
MAX_WAITING_BYTES = 512 << 20  # the same for photographs that are not resized


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
        resized: bool = True,
        share: WorkShare | None = None,
    ) -> None:
        """Describe the work.

        Args:
            labels: The label set to fill, by set name.
            image_size: Short side after resizing, pixels.
            patch: Both sides become multiples of it.
            batch_size: Images of one shape at once.
            rank: This process, of `world`; each begins at a different shard.
            world: Number of processes of this job.
            resized: Yield images at the size of the labels; else as they are stored.
            share: The shards of this job; None: all of them.
        """
        self.labels, self.share = dict(labels), share or WorkShare()
        self.image_size, self.patch, self.batch_size = image_size, patch, batch_size
        self.rank, self.world, self.pid = rank, world, os.getpid()
        self.resized = resized

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield batches until every shard of every set is labeled, by this process or another."""
        batches = self._batches()
        while (batch := next_or_failure(batches)) is not None:
            yield batch

    def _batches(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        count = worker.num_workers if worker else 1
        lane, lanes = self.rank * count + (worker.id if worker else 0), self.world * count
        work = self.share.select(
            [(name, shard.name) for name, labels in self.labels.items() for shard in labels.images.shards]
        )
        order = work[lane::lanes]
        if self.share.leases:
            order += [item for other in range(lanes) if other != lane for item in work[other::lanes]]
        yielded: set[tuple[str, str]] = set()  # the main process publishes them later
        remote = any(labels.store.is_remote for labels in self.labels.values())
        left, (wait_s, longest_s) = order, OBJECT_POLL_S if remote else (0.5, 0.5)
        while left := self._unlabeled(left, yielded):
            before = len(yielded)
            for name, shard in left:
                lease = shard_lease(self.labels[name], shard, pid=self.pid)
                if self.labels[name].done(shard) or (self.share.leases and not lease.acquire()):
                    continue
                if self.labels[name].done(shard, ask=True):  # and its lease is free for that reason
                    lease.release()
                else:
                    yield from self.iter_shard(name, shard)
                    yielded.add((name, shard))
            if len(yielded) == before:  # others hold all shards that are left, and one of them may die
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, longest_s)
                # Lightning fetches one batch ahead; without this one it would hold the last real batch back.
                yield ImageBatch("", "", 0, [], torch.empty(0, dtype=torch.uint8))

    def _unlabeled(
        self, items: Sequence[tuple[str, str]], yielded: set[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Return the shards that neither this process nor, as far as it is known now, another one has labeled."""
        ask = len(items) <= MAX_ASKED
        for labels in () if ask else self.labels.values():
            labels.refresh()
        return [(s, k) for s, k in items if (s, k) not in yielded and not self.labels[s].done(k, ask=ask)]

    def iter_shard(self, name: str, shard: str) -> Iterator[ImageBatch]:
        """Yield a shard in batches of one shape, each as soon as it is full, the rest at the end.

        The order depends on the shard alone. A record that fails is listed with its reason in the last batch.
        """
        records = Records(self.labels[name].images)
        count = dict(records.shards)[f"{name}/{shard}"]
        waiting: dict[tuple[int, ...], list[tuple[int, Frame]]] = {}
        failed: list[tuple[int, str]] = []

        def take(shape: tuple[int, ...]) -> ImageBatch:
            size = (
                resize_shape(shape[0], shape[1], self.image_size, self.patch) if not self.resized else shape
            )
            return ImageBatch.stack(name, shard, count, waiting.pop(shape), (size[0], size[1]))

        for index in range(count):
            try:
                frame = decode_record(*records.read(f"{name}/{shard}", index))
            except ValueError as error:
                failed.append((index, str(error)))
                continue
            height, width = frame.image.shape[:2]
            if self.resized:
                height, width = resize_shape(height, width, self.image_size, self.patch)
                frame.image = resize_image(frame.image, height, width)
            same_shape = waiting.setdefault((height, width), [])
            same_shape.append((index, Frame(frame.key, frame.image, frame.meta)))
            if len(same_shape) == self.batch_size:
                yield take((height, width))
            elif self._waits_too_long(waiting):
                yield take(max(waiting, key=lambda shape: len(waiting[shape])))
        for shape in list(waiting):
            yield take(shape)
        yield ImageBatch(name, shard, count, [], torch.empty(0, dtype=torch.uint8), failed)

    def _waits_too_long(self, waiting: Mapping[tuple[int, ...], Sequence[tuple[int, Frame]]]) -> bool:
        """Return whether so many images wait for others of their shape that a smaller batch is better."""
        if sum(map(len, waiting.values())) > MAX_WAITING_BATCHES * self.batch_size:
            return True
        if self.resized:
            return False
        return sum(3 * h * w * len(images) for (h, w), images in waiting.items()) > MAX_WAITING_BYTES


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
        preprocessing: str | None = None,
        resized: bool = True,
        share: str | None = None,
    ) -> None:
        """Open the image sets and their label sets.

        Args:
            sets: Image set name to folder or URL prefix.
            labels: Folder or address of label sets.
            batch_size: Images of one shape and shard at once.
            image_size: Short side after resizing, pixels.
            workers: Loader processes a device; each reads a shard of its own.
            patch: The teacher's patch, pixels.
            precision: The trainer's; labels of two precisions are not mixed.
            teacher: The teacher's record for the label sets, as `Teacher.describe` returns it.
            codec: Codec of the labels.
            preprocessing: `Teacher.preprocessing`; None for a network of this project.
            resized: Whether the teacher takes images at the size of the labels.
            share: "K/N": label only the K-th of N shares of the shards; see `choose_share`.

        Raises:
            ValueError: If a set is missing or damaged, or its labels are another teacher's.
        """
        super().__init__()
        if preprocessing is None:
            preprocessing = PREPROCESSING_TEXT.format(size=image_size, patch=patch, precision=precision)
        self.labels = {
            name: LabelSetWriter(
                join_address(labels, name),
                open_set(root, name=name),
                teacher=teacher,
                preprocessing=preprocessing,
                codec=codec,
            )
            for name, root in sets.items()
        }
        self.batch_size, self.image_size, self.workers, self.patch = batch_size, image_size, workers, patch
        self.codec, self.precision, self.resized = codec, precision, resized
        self.share = choose_share(share, [each.store for each in self.labels.values()])

    def check_disk(self) -> None:
        """Print a warning if the labels that are missing need more disk than is free."""
        for labels in self.labels.values():
            shards = [(shard.name, shard.records) for shard in labels.images.shards]
            if not labels.store.is_remote:
                warn_of(label_need(Path(labels.root), shards, image_size=self.image_size))

    def finished(self) -> bool:
        """Return whether every image of every set has its label; write the manifests that are still missing.

        The leases of a finished set are removed: a process that was killed between a shard's labels and its lease
        leaves one.
        """
        for labels in self.labels.values():
            labels.refresh()
        finished = [labels for labels in self.labels.values() if labels.finish()]
        for labels in finished:
            remove_leases(labels)
        return len(finished) == len(self.labels)

    def summary(self) -> str:
        """Return how many labels each set has and how many images were skipped.

        Raises:
            ValueError: If a set, or the share of this process, is not finished.
        """
        if not self.finished():
            work = [(labels, each.name) for labels in self.labels.values() for each in labels.images.shards]
            if self.share.count > 1 and all(labels.done(name) for labels, name in self.share.select(work)):
                return f"share {self.share} is labeled; the last share to end finishes the sets"
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
            resized=self.resized,
            share=self.share,
        )
        return StreamLoader(
            batches,
            smaller=f"batch_size={max(1, self.batch_size // 2)}",
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            collate_fn=return_batch,
        )

    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, index: int) -> ImageBatch:
        """Copy images to the device, unless they are photographs, which the teacher prepares on the CPU."""
        return super().transfer_batch_to_device(batch, device, index) if self.resized else batch

    def release_leases(self) -> None:
        """Release the leases of shards that this process has not finished."""
        for labels in self.labels.values():
            release_leases(labels, pid=os.getpid())


def label_data_arguments(teacher: Teacher, *, image_size: int, precision: str) -> dict[str, Any]:
    """Return the arguments of `ShardData` that depend on the teacher; the others as `ShardData` has them."""
    arguments: dict[str, Any] = {"patch": teacher.multiple, "teacher": teacher.describe()}
    if not isinstance(teacher, NetworkTeacher):
        text = teacher.preprocessing(image_size=image_size, precision=precision)
        arguments |= {"preprocessing": text, "resized": teacher.resized}
    return arguments


class PseudoLabel(pl.LightningModule):
    """Run the teacher, gather the labels of each shard in memory, and publish each shard as a whole."""

    def __init__(self, model: DepthAnything | Teacher, data: ShardData) -> None:
        """Store the teacher and the sets that it labels."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        teacher = model if isinstance(model, Teacher) else NetworkTeacher(model)
        self._teacher = (teacher,)  # in a tuple, which hides it from Lightning
        self._data = (data,)
        self._encoded: dict[tuple[str, str], dict[int, dict[str, Future[bytes] | bytes]]] = {}
        self._without_map: dict[tuple[str, str], list[tuple[int, str]]] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="encode")  # zstandard releases the GIL
        self._bar: ProgressLine | None = None
        self._read = self._failed = self._non_finite = self._missing = 0

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
        lease = shard_lease(labels, batch.shard, pid=os.getpid())
        shard = (batch.set, batch.shard)
        encoded = self._encoded.setdefault(shard, {})
        without_map = self._without_map.setdefault(shard, [])
        if batch.indices:
            maps = self._teacher[0].predict(batch.photographs())
            finite = maps.disparity.isfinite().flatten(1).all(1).tolist()
            fields = {"disparity": maps.disparity, **maps.extra}
            values = {name: tensor.float().cpu().numpy() for name, tensor in fields.items()}
            for position, index in enumerate(batch.indices):
                if position in maps.failed:
                    without_map.append((index, maps.failed[position]))
                elif finite[position]:
                    encoded[index] = self._encode(values, position, labels.codec)
                    encoded[index] |= maps.fields[position] if maps.fields else {}
            if self._data[0].share.leases:
                lease.renew()
        else:
            del self._encoded[shard], self._without_map[shard]
            accounted = {index for index, _ in [*batch.failed, *without_map]}.union(encoded)
            non_finite = [(i, NON_FINITE_REASON) for i in range(batch.records) if i not in accounted]
            self._check_failures(batch, non_finite, labels.keys(batch.shard), without_map)
            published = {
                index: {
                    name: data if isinstance(data, bytes) else data.result() for name, data in fields.items()
                }
                for index, fields in encoded.items()
            }
            if not self._data[0].share.leases:
                labels.publish(batch.shard, published, [*batch.failed, *without_map, *non_finite])
            elif lease.renew(force=True):
                labels.publish(batch.shard, published, [*batch.failed, *without_map, *non_finite])
                lease.release()
            else:
                print(f"{batch.set}/{batch.shard}: another process labels it by now", file=sys.stderr)
        assert self._bar is not None
        self._bar.update(len(batch.indices) + len(batch.failed))
        return len(batch.indices)

    def _encode(
        self, maps: Mapping[str, np.ndarray], position: int, codec: str
    ) -> dict[str, Future[bytes] | bytes]:
        """Start to encode the maps of an image; return its fields."""
        codecs = {name: CONFIDENCE_CODEC if name.endswith("confidence") else codec for name in maps}
        return {
            f"{name}.{codecs[name]}": self._pool.submit(encode, values[position], codec=codecs[name])
            for name, values in maps.items()
        }

    def _check_failures(
        self,
        batch: ImageBatch,
        non_finite: list[tuple[int, str]],
        keys: Sequence[str],
        without_map: Sequence[tuple[int, str]] = (),
    ) -> None:
        """Print the images without a label; stop before the shard is published if they are too many.

        Raises:
            ValueError: If a whole shard, or over 1 % of at least 1000 images, cannot be read, or has no map of a folder
                or function; or if the network gives NaN or infinity for over half of a shard, or over 1 % of at least
                1000 images.
        """
        skipped = [*batch.failed, *without_map, *non_finite]
        for index, reason in skipped[
            : max(0, MAX_REPORTED_IMAGES - self._failed - self._non_finite - self._missing)
        ]:
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
        self._missing += len(without_map)
        if without_map and (len(without_map) == decoded or (many_read and self._missing > 0.01 * self._read)):
            raise UserError(
                f"the teacher has no map for {self._missing} of {self._read} images, the last of "
                f"{batch.set}/{batch.shard} ({without_map[-1][1]})",
                ["correct the teacher and ", SAME_COMMAND],
            )
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
