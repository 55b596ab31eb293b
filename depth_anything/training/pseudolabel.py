"""stage=pseudolabel: the teacher labels every photograph exactly once, full frame (DESIGN.md §5).

Labels are disparity whatever the teacher gives; `label_disparity` is the only conversion, `describe_teacher` names it.

A shard of images is the unit of work. Whoever starts takes the next shard that is neither labelled nor leased,
labels it in memory and publishes the whole label shard by rename, so that any number of processes may start, die
and come back. Batches are formed inside one shard, by shape, in a fixed order: a shard labelled twice has the
same bytes, and a lease only saves work.
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
from depth_anything.data.labels import LabelSetWriter, open_labels
from depth_anything.data.loader import StreamLoader, next_or_failure, return_batch
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
MAX_REPORTED_IMAGES = 20  # images without a label; all of them are in NAME.json
MAX_WAITING_BATCHES = 16  # batches' worth of images that may wait for others of their shape
MIN_DEPTH_SHARE = 1e-3
"""Of a metric teacher's max_depth: nearer depths count as it. Labels keep 12 bits between a map's own extremes, and the
inverse of a pixel at zero would take them all."""


def convert_to_disparity(teacher: DepthAnything, output: torch.Tensor) -> torch.Tensor:
    """Turn what a teacher's `forward` gives into disparity, larger being nearer: what labels are.

    Args:
        teacher: Relative: its output is disparity already. Metric: metres, which are inverted. Calibrated: with scale
            and shift its output is disparity in 1/metres; what lies behind `FARTHEST_M` counts as there.
        output: Any shape, as `forward` gives it.

    Returns:
        float32, same shape; in 1/metres where the teacher knows metres. NaN stays NaN.
    """
    output = output.float()
    if teacher.max_depth is not None:
        return depth_to_disparity(output, nearest=MIN_DEPTH_SHARE * teacher.max_depth)
    if teacher.calibration is not None:
        scale, shift = teacher.calibration
        return (output * scale + shift).clamp(min=1 / FARTHEST_M)
    return output


def describe_teacher(teacher: DepthAnything, file: str) -> dict[str, Any]:
    """Say in a label set who made it and how its output became disparity; labels are mixed only where all agree.

    Returns:
        "fingerprint" of the weights, "file", "licence"; "quantity" and "unit" of what the teacher predicts, which is
        "depth" in "m" of metric and calibrated ones; "conversion" to the labels' disparity, None where there was none.
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
    """A note beside a label shard that says who is making it; a dead holder's note is void."""

    _watch = FileWatch()  # of all notes that this process has come across

    def __init__(self, path: Path, *, pid: int) -> None:
        """Name the note; `pid` is the process whose death voids it."""
        self.path, self.pid = path, pid

    @classmethod
    def of(cls, labels: LabelSetWriter, shard: str, *, pid: int) -> "Lease":
        """Name the lease of a label shard."""
        return cls(Path(labels.root) / f".{shard}.lease", pid=pid)

    def take(self) -> bool:
        """Take the lease unless somebody alive holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if write_new(self.path, self._note().encode()):
            return True
        if not self._void():
            return False
        self.path.unlink(missing_ok=True)
        return write_new(self.path, self._note().encode())

    def touch(self) -> None:
        """Show that the holder lives."""
        if self._is_mine():
            os.utime(self.path)

    def release(self) -> None:
        """Give the lease back, unless somebody has taken it over."""
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _note(self) -> str:
        return json.dumps({"host": socket.gethostname(), "pid": self.pid})

    def _is_mine(self) -> bool:
        try:
            return self.path.read_text() == self._note()
        except FileNotFoundError:
            return False

    def _void(self) -> bool:
        try:
            holder = json.loads(self.path.read_text())
            host, pid = str(holder["host"]), int(holder["pid"])
        except FileNotFoundError:
            return True
        except (ValueError, KeyError, TypeError):
            host, pid = "", 0
        timeout_s = (
            LEASE_STALE_S if host != socket.gethostname() else 10 * LEASE_STALE_S
        )  # the number may be another's by now
        return self._watch.is_dead(self.path, host=host, pid=pid, timeout_s=timeout_s)


@dataclass
class ImageBatch:
    """Images of one shape and one shard; the last of a shard is empty and tells what would not decode.

    A batch of a shard of no records says that this process waits for others.
    """

    set: str
    shard: str
    records: int
    indices: list[int]
    image: torch.Tensor  # (b,h,w,3) uint8
    failed: list[tuple[int, str]] = field(default_factory=list)

    def pin_memory(self) -> "ImageBatch":
        """Let the loader put the pixels where the GPU can fetch them while it works."""
        self.image = self.image.pin_memory()
        return self

    @classmethod
    def stack(cls, set: str, shard: str, records: int, images: list[tuple[int, np.ndarray]]) -> "ImageBatch":
        """Stack images of one shape."""
        pixels = torch.from_numpy(np.stack([image for _, image in images]))
        return cls(set, shard, records, [index for index, _ in images], pixels)


class ShardBatches(IterableDataset):
    """Take unlabelled shards one after another, here and in other processes, and cut them into batches."""

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
            image_size: Short side the images are resized to.
            patch: What both sides are multiples of.
            batch_size: Images of one shape at once.
            rank: This process, of `world`; they begin at different shards.
            world: Processes of this job.
        """
        self.labels = dict(labels)
        self.image_size, self.patch, self.batch_size = image_size, patch, batch_size
        self.rank, self.world, self.pid = rank, world, os.getpid()

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield batches until every shard of every set has its labels, by whomever."""
        batches = self._batches()
        while (batch := next_or_failure(batches)) is not None:
            yield batch

    def _batches(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        lane = self.rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        lanes = self.world * (worker.num_workers if worker else 1)
        work = [(name, shard.name) for name, labels in self.labels.items() for shard in labels.images.shards]
        mine = work[lane::lanes] + [
            item for other in range(lanes) if other != lane for item in work[other::lanes]
        ]
        handed: set[tuple[str, str]] = set()  # published as soon as the main process gets to it
        while left := [
            item for item in mine if item not in handed and not self.labels[item[0]].done(item[1])
        ]:
            before = len(handed)
            for name, shard in left:
                if (
                    not self.labels[name].done(shard)
                    and Lease.of(self.labels[name], shard, pid=self.pid).take()
                ):
                    yield from self.cut(name, shard)
                    handed.add((name, shard))
            if len(handed) == before:  # others hold what is left, and one of them may yet die
                time.sleep(0.5)
                yield ImageBatch(
                    "", "", 0, [], torch.empty(0, dtype=torch.uint8)
                )  # Lightning looks a batch ahead

    def cut(self, name: str, shard: str) -> Iterator[ImageBatch]:
        """Cut a shard into batches of one shape; each leaves as soon as it is full, the rest at the end.

        The order depends on the shard alone, and a record that fails leaves its place with its reason.
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
            same = waiting.setdefault((height, width), [])
            same.append((index, resize_image(frame.image, height, width)))
            if len(same) == self.batch_size:
                yield ImageBatch.stack(name, shard, count, waiting.pop((height, width)))
            elif sum(map(len, waiting.values())) > MAX_WAITING_BATCHES * self.batch_size:
                yield ImageBatch.stack(
                    name, shard, count, waiting.pop(max(waiting, key=lambda s: len(waiting[s])))
                )
        for same in waiting.values():
            yield ImageBatch.stack(name, shard, count, same)
        yield ImageBatch(name, shard, count, [], torch.empty(0, dtype=torch.uint8), failed)


class ShardData(pl.LightningDataModule):
    """The images to label, and where their labels go."""

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
            teacher: What the label sets say of the teacher, as `describe_teacher` gives it.
            codec: Of the labels.

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
        """Tell whether every image of every set has its label; write the manifests that are still missing."""
        return all([labels.finish() for labels in self.labels.values()])

    def summary(self) -> str:
        """Say what every image has come to.

        Raises:
            ValueError: If a set is not finished after all.
        """
        if not self.finished():
            raise UserError(
                "not every shard has its labels", ["look at the messages above and ", SAME_COMMAND]
            )
        told = []
        for name, labels in self.labels.items():
            made = open_labels(labels.root, labels.images)
            skipped = labels.images.records - made.records
            told.append(
                f"{made.records} labels of {name} in {labels.root}"
                + (f" ({skipped} skipped)" if skipped else "")
            )
        return "finished: " + "; ".join(told)

    def predict_dataloader(self) -> DataLoader:
        """Build the loader of this process's share, which is whatever nobody else takes."""
        assert self.trainer is not None
        batches = ShardBatches(
            self.labels,
            image_size=self.image_size,
            patch=self.patch,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        gpu = self.trainer.strategy.root_device.type == "cuda"
        return StreamLoader(
            batches,
            smaller=f"batch_size={max(1, self.batch_size // 2)}",
            batch_size=None,
            num_workers=self.workers,
            pin_memory=gpu,
            collate_fn=return_batch,
        )

    def release_leases(self) -> None:
        """Give back the shards that this process has taken and not finished."""
        for labels in self.labels.values():
            for path in Path(labels.root).glob(".*.lease"):
                Lease(path, pid=os.getpid()).release()


class PseudoLabel(pl.LightningModule):
    """The teacher at work: labels gathered in memory by shard, each shard published whole."""

    def __init__(self, model: DepthAnything, data: ShardData) -> None:
        """Hold the teacher and the sets it fills."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._data = (data,)
        self._made: dict[tuple[str, str], dict[int, Future[bytes]]] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="encode")  # zstandard works outside the GIL
        self._bar: ProgressLine | None = None
        self._read = self._failed = self._mute = 0

    def on_predict_start(self) -> None:
        """Open a bar over the images that had no label when this process began."""
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
        """Label a batch; after a shard's last one, publish the shard. Returns how many images that was."""
        signal_handler.check()
        if not batch.records:
            return 0
        labels = self._data[0].labels[batch.set]
        lease = Lease.of(labels, batch.shard, pid=os.getpid())
        made = self._made.setdefault((batch.set, batch.shard), {})
        if batch.indices:
            output = self.model(normalize(batch.image).to(next(self.model.parameters()).dtype))
            disparity = convert_to_disparity(self.model, output)
            good = (output.isfinite() & disparity.isfinite()).flatten(1).all(1).tolist()  # 1 / inf would be 0
            for index, values, finite in zip(batch.indices, disparity.cpu().numpy(), good, strict=True):
                if finite:
                    made[index] = self._pool.submit(encode, values, codec=labels.codec)
            lease.touch()
        else:
            del self._made[batch.set, batch.shard]
            named = {index for index, _ in batch.failed}.union(made)
            mute = [(index, NON_FINITE_REASON) for index in range(batch.records) if index not in named]
            self._refuse(batch, mute, labels.keys(batch.shard))
            labels.publish(batch.shard, {i: label.result() for i, label in made.items()}, batch.failed + mute)
            lease.release()
        assert self._bar is not None
        self._bar.update(len(batch.indices) + len(batch.failed))
        return len(batch.indices)

    def _refuse(self, batch: ImageBatch, mute: list[tuple[int, str]], keys: Sequence[str]) -> None:
        """Name the images without a label; stop before a shard is published when the fault is not the images'."""
        skipped = [*batch.failed, *mute]
        for index, reason in skipped[: max(0, MAX_REPORTED_IMAGES - self._failed - self._mute)]:
            print(f"no label for {keys[index]!r} of {batch.set}/{batch.shard}: {reason}", file=sys.stderr)
        self._read += batch.records
        self._failed, self._mute = self._failed + len(batch.failed), self._mute + len(mute)
        many = self._read >= 1000
        if len(batch.failed) == batch.records or (many and self._failed > 0.01 * self._read):
            raise UserError(
                f"{self._failed} of {self._read} images cannot be read, the last of {batch.set}/{batch.shard} "
                f"({batch.failed[-1][1]})",
                ["look with `depth-anything verify` and ", SAME_COMMAND],
            )
        seen = batch.records - len(batch.failed)
        if 2 * len(mute) > seen or (many and mute and self._mute > 0.01 * self._read):
            precision = self._data[0].precision
            raise ValueError(
                f"{NON_FINITE_REASON} for {len(mute)} of {seen} images of {batch.set}/{batch.shard}, as "
                f"{keys[mute[0][0]]!r}; "
                + (
                    f"its weights are no use at trainer.precision={precision}; type teacher=FILE for another teacher"
                    if precision.startswith("32")
                    else f"trainer.precision={precision} may overflow: try trainer.precision=32-true"
                )
            )

    def on_predict_end(self) -> None:
        """Write the manifests of the sets that are complete now."""
        self._data[0].finished()
        assert self._bar is not None
        self._bar.close()
