"""Measure what a training sample costs, stage by stage, next to the decoding and resizing that any loader must do.

Times are CPU times of processes, which other programs on the machine change least. Linux only, because the CPU clock of
another process is read.
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
from depth_anything.data.sample import IMAGE_FIELDS, decode_image, find_target_field
from depth_anything.data.transforms import resize_image

SAMPLE_STAGES: dict[str, str | None] = {
    "locate the record": None,
    "read the record": None,
    "decode the image": "decode the image, minimal",
    "resize the image": "resize the image, minimal",
    "crop and flip": None,
    "decode the label": "decode the label, minimal",
    "make target and mask": None,
}
"""Stages of a sample, each with the minimal work that it is compared with."""

_IDLE_POLL_S = 0.02


class StageTimer:
    """CPU and wall-clock milliseconds of each stage, one value per call.

    Example:
        >>> timer = StageTimer()
        >>> with timer("sort"):
        ...     numbers = sorted(range(1000))
        >>> list(timer.medians())
        ['sort']
    """

    def __init__(self) -> None:
        """Start without values."""
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.wall: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the body of a `with` statement as one call of `stage`."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu[stage].append(1e3 * (time.process_time() - cpu))
        self.wall[stage].append(1e3 * (time.perf_counter() - wall))

    def medians(self) -> dict[str, float]:
        """Return the median CPU milliseconds of each stage."""
        return {stage: float(np.median(values)) for stage, values in self.cpu.items()}

    def mean_wait(self, stage: str) -> float:
        """Return the mean milliseconds per call in which a stage waited for a disk or a server."""
        return max(0.0, float(np.mean(self.wall[stage]) - np.mean(self.cpu[stage])))

    def rows(self) -> list[tuple[str, float, float | None]]:
        """Return (stage, ms, ms of the minimal work) for each of SAMPLE_STAGES, and a last row with the sums."""
        medians = self.medians()
        rows = [
            (stage, medians[stage], medians.get(minimal or "")) for stage, minimal in SAMPLE_STAGES.items()
        ]
        return [*rows, ("all", sum(row[1] for row in rows), sum(row[2] or 0.0 for row in rows))]


def timed_sample(
    dataset: StreamDataset, n: int, timer: StageTimer
) -> tuple[dict[str, Any], Mapping[str, bytes], tuple[int, int]]:
    """Read sample `n` as the loader does, and measure each stage.

    Returns:
        A micro-batch of one sample as arrays, the fields of the record, and the (height, width) that its image was
        resized to.

    Raises:
        ValueError: The record cannot be read.
    """
    out = dataset.empty_batch(1)
    with timer("locate the record"):
        _, shard, index = dataset.stream.locate(n)
    fields, size = dataset.write_sample(shard, index, n, out, timer=timer)
    return out, fields, size


def minimal_decode(
    fields: Mapping[str, bytes], size: tuple[int, int], timer: StageTimer | None = None, *, label: bool = True
) -> None:
    """Do the work that any loader must do with a record: decode image and label, resize the image.

    Args:
        fields: Fields of the record; a JPEG is decoded by OpenCV, other images as the loader does.
        size: (height, width) to resize to, antialiased; an image of that size is not resized.
        timer: Measures the stages.
        label: Decode the label, too.
    """
    timer = timer or StageTimer()
    name = next(name for name in IMAGE_FIELDS if name in fields)
    with timer("decode the image, minimal"):
        if name in ("jpg", "jpeg"):
            image = np.asarray(cv2.imdecode(np.frombuffer(fields[name], np.uint8), cv2.IMREAD_COLOR))
        else:
            image = decode_image(fields[name])
    with timer("resize the image, minimal"):
        resize_image(image, *size)
    if label:
        with timer("decode the label, minimal"):
            codec.decode(fields[find_target_field(fields)])


class LoaderTimer:
    """Measures a loader in windows; between windows it waits until all workers have finished prefetching."""

    def __init__(self, loader: DataLoader) -> None:
        """Start the workers."""
        before = set(multiprocessing.active_children())
        self._batches: Iterator[Any] = iter(loader)
        self._pids = [child.pid for child in multiprocessing.active_children() if child not in before]
        self._prefetched = PREFETCH_BATCHES * loader.num_workers
        self.wait_idle()

    def measure(self, batches: int) -> tuple[float, float]:
        """Read that many batches; return CPU seconds (of all processes) and wall-clock seconds per batch.

        The wall clock starts when the prefetched batches are used up.
        """
        cpu, own = self._cpu(), time.process_time()
        for _ in range(self._prefetched):
            next(self._batches)
        start = time.perf_counter()
        for _ in range(batches):
            next(self._batches)
        wall = (time.perf_counter() - start) / batches
        own = time.process_time() - own
        self.wait_idle()
        return (self._cpu() - cpu + own) / (batches + self._prefetched), wall

    def wait_idle(self) -> None:
        """Wait until the workers use no more CPU time."""
        before, now = -1.0, self._cpu()
        while now - before > 1e-4:
            time.sleep(_IDLE_POLL_S)
            before, now = now, self._cpu()

    def close(self) -> None:
        """Stop the workers."""
        del self._batches

    def _cpu(self) -> float:
        return sum(process_cpu_seconds(pid) for pid in self._pids if pid is not None)


def process_cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used in all its threads."""
    return time.clock_gettime((~pid << 3) | 2)  # Linux's clock id for the CPU time of a process


def median_and_iqr(values: Sequence[float]) -> dict[str, float]:
    """Return median and interquartile range."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 3), "iqr": round(float(high - low), 3)}
