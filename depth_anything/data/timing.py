"""What a sample costs, hop by hop, beside the bare work that no loader can do without.

Figures are CPU time of processes, which other users of the machine change least. Linux only: the clock of another
process is asked for by its number.
"""

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from torch.utils.data import DataLoader

from depth_anything.data import codec
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.loader import PREFETCH_BATCHES
from depth_anything.data.reader import JoinedRecords
from depth_anything.data.sample import (
    IMAGE_FIELDS,
    convert_to_target,
    decode_image,
    decode_image_and_meta,
    find_target_field,
)
from depth_anything.data.transforms import crop_encoded_map, crop_image, draw_crop, resize_image
from depth_anything.preprocess import resize_shape

#: Stage of a sample to the bare work that it is held against.
SAMPLE_STAGES: dict[str, str | None] = {
    "find the record": None,
    "read it, checksums": None,
    "decode the image": "decode the image, bare",
    "resize the image": "resize the image, bare",
    "cut and mirror it": None,
    "decode the label": "decode the label, bare",
    "target and mask": None,
}
_IDLE_POLL_S = 0.02


class StageTimer:
    """CPU and clock milliseconds by stage, a figure for each time it ran."""

    def __init__(self) -> None:
        """Begin with none."""
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.clock: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is done inside as stage `name`."""
        cpu, clock = time.process_time(), time.perf_counter()
        yield
        self.cpu[name].append(1e3 * (time.process_time() - cpu))
        self.clock[name].append(1e3 * (time.perf_counter() - clock))

    def medians(self) -> dict[str, float]:
        """Return the median CPU milliseconds of each stage."""
        return {name: float(np.median(values)) for name, values in self.cpu.items()}

    def waiting(self, name: str) -> float:
        """Return how long a stage waited without working, milliseconds, the mean: for a disk or a server."""
        return max(0.0, float(np.mean(self.clock[name]) - np.mean(self.cpu[name])))


def timed_sample(
    dataset: StreamDataset, n: int, stage: StageTimer
) -> tuple[dict[str, np.ndarray], Mapping[str, bytes], tuple[int, int]]:
    """Make sample `n` as `dataset` does, each hop timed.

    Returns:
        "image", "target" and "valid" as in the dataset's batches, without the first axis; the record's fields;
        and the size that its image was resized to.

    Raises:
        ValueError: the record cannot be read.
    """
    side = dataset.image_size
    target, valid = np.empty((side, side), np.float32), np.empty((side, side), bool)
    with stage("find the record"):
        _, shard, index = dataset.stream.locate(n)
        source = next(s for s in dataset.sources if s.name == shard.split("/")[0])
    with stage("read it, checksums"):
        _, fields = source.read(shard, index)
    with stage("decode the image"):
        name = find_target_field(fields)
        whole, meta = decode_image_and_meta(fields)
    size = codec.map_size(fields[name])
    if not isinstance(source, JoinedRecords):
        size = resize_shape(whole.shape[0], whole.shape[1], dataset.short_side, dataset.patch)
    view = draw_crop(*size, side, seed=dataset.seed, n=n)
    with stage("resize the image"):
        resized = resize_image(whole, *size)
    with stage("cut and mirror it"):
        image = crop_image(resized, view)
    with stage("decode the label"):
        crop_encoded_map(fields[name], view, out=target)
    with stage("target and mask"):
        convert_to_target(target, valid, quantity=name.split(".")[0], sky=dataset.sky[source.name], meta=meta)
    return {"image": image, "target": target, "valid": valid}, fields, size


def minimal_decode(
    fields: Mapping[str, bytes], size: tuple[int, int], stage: StageTimer | None = None, *, label: bool = True
) -> None:
    """Do with a record's bytes what no loader can do without: decode image and label whole, resize the image.

    Args:
        fields: of the record; its JPEG is decoded by OpenCV as it stands, other images as the loader does.
        size: height and width to resize to, antialiased; an image of that size is left alone.
        stage: what to time it with.
        label: decode the label, too.
    """
    stage = stage or StageTimer()
    name = next(name for name in IMAGE_FIELDS if name in fields)
    with stage("decode the image, bare"):
        if name in ("jpg", "jpeg"):
            image = np.asarray(cv2.imdecode(np.frombuffer(fields[name], np.uint8), cv2.IMREAD_COLOR))
        else:
            image = decode_image(fields[name])
    with stage("resize the image, bare"):
        resize_image(image, *size)
    if label:
        with stage("decode the label, bare"):
            codec.decode(fields[find_target_field(fields)])


class LoaderTimer:
    """A loader that is measured by windows; between them its workers come to rest, their batches made ahead."""

    def __init__(self, loader: DataLoader) -> None:
        """Start the workers."""
        before = set(multiprocessing.active_children())
        self._batches: Iterator[Any] = iter(loader)
        self._pids = [child.pid for child in multiprocessing.active_children() if child not in before]
        self._ahead = PREFETCH_BATCHES * loader.num_workers
        self.rest()

    def measure(self, batches: int) -> tuple[float, float]:
        """Take that many batches; return CPU and clock seconds a batch.

        CPU is that of all processes. The clock starts when what was made ahead is used up.
        """
        cpu, mine = self._cpu(), time.process_time()
        for _ in range(self._ahead):
            next(self._batches)
        start = time.perf_counter()
        for _ in range(batches):
            next(self._batches)
        clock = (time.perf_counter() - start) / batches
        mine = time.process_time() - mine
        self.rest()
        return (self._cpu() - cpu + mine) / (batches + self._ahead), clock

    def rest(self) -> None:
        """Wait until the workers have made all that they make ahead."""
        before, now = -1.0, self._cpu()
        while now - before > 1e-4:
            time.sleep(_IDLE_POLL_S)
            before, now = now, self._cpu()

    def close(self) -> None:
        """Let the workers go."""
        del self._batches

    def _cpu(self) -> float:
        return sum(process_cpu_seconds(pid) for pid in self._pids if pid is not None)


def process_cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used in all its threads."""
    return time.clock_gettime((~pid << 3) | 2)  # the kernel's number for a process's CPU clock


def stage_report(stages: StageTimer) -> list[tuple[str, float, float | None]]:
    """Return (stage, milliseconds, milliseconds of the bare work) in order, and the sums of each."""
    medians = stages.medians()
    rows = [(name, medians[name], medians.get(bare or "")) for name, bare in SAMPLE_STAGES.items()]
    return [*rows, ("all", sum(row[1] for row in rows), sum(row[2] or 0.0 for row in rows))]


def median_and_iqr(values: Sequence[float]) -> dict[str, float]:
    """Return median and interquartile range."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 3), "iqr": round(float(high - low), 3)}
