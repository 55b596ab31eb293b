"""Check how much disk, memory and shared memory a run needs and has, before it runs out."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from depth_anything.data.loader import PREFETCH_BATCHES
from depth_anything.host_memory import free_memory, total_memory
from depth_anything.training.callbacks import StepCallback
from depth_anything.training.config import RunConfig
from depth_anything.training.run_dir import step_from_name

SHARED_MEMORY = Path("/dev/shm")
FLOAT_BYTES, ADAM_MOMENTS = 4, 2
LABEL_BYTES_PER_PIXEL = 0.39
"""139 kB at 518 × 686 (benchmarks/results/codec_epyc2_202611.md)."""
CHECK_INTERVAL_S = 300.0
"""Seconds between two checks."""
LOW_MEMORY = 0.05
"""Share of the memory that must stay free."""
SLOTS = PREFETCH_BATCHES + 2
"""Batches of a worker in the memory that it shares with the main process."""
WORKER_BYTES = 250 * 2**20
"""Memory of a loader worker besides its batches; measured (benchmarks/results/data_epyc2_202611.md)."""


@dataclass(frozen=True)
class Need:
    """Something that a run needs, and how much of it there is.

    Attributes:
        name: Identifies it: it is reported once.
        needed: Bytes.
        free: Bytes; None if unknown.
        what: What needs it, as the start of a sentence.
        fix: What to do.
    """

    name: str
    needed: float
    free: float | None
    what: str
    fix: str

    @property
    def is_short(self) -> bool:
        """Whether there is less than needed."""
        return self.free is not None and self.free < self.needed

    def message(self) -> str:
        """Return the warning."""
        assert self.free is not None
        return f"warning: {self.what} {format_bytes(self.needed)}, and {format_bytes(self.free)} are free; {self.fix}"


def format_bytes(number: float) -> str:
    """Format bytes in binary units.

    >>> format_bytes(3 * 2**30), format_bytes(5e6)
    ('3.0 GiB', '4.8 MiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 2**10:,.1f} KiB"


def free_disk(folder: Path) -> int | None:
    """Return the bytes that this user may still write to the file system of a folder; None if unknown."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def checkpoint_bytes(module: nn.Module) -> int:
    """Estimate the size of a checkpoint: all weights, and Adam's two moments of those that are trained."""
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return FLOAT_BYTES * (sum(p.numel() for p in parameters) + ADAM_MOMENTS * trained)


@dataclass(frozen=True)
class CheckpointSchedule:
    """At which steps a run saves, and which checkpoints it keeps, as `Checkpoints` does.

    Attributes:
        steps: The last step, which is saved.
        every: Steps between two.
        keep: How many of the newest are kept.
        keep_every: Multiples of it are saved and kept for good; None for none.
    """

    steps: int
    every: int
    keep: int
    keep_every: int | None = None

    @classmethod
    def of_run(cls, config: RunConfig) -> "CheckpointSchedule":
        """Return the schedule of a config."""
        checkpoint = config.checkpoint
        return cls(config.steps, checkpoint.every, checkpoint.keep, checkpoint.keep_every)

    def count(self) -> int:
        """Return how many checkpoints the run writes."""
        number = self.steps // self.every
        if self.keep_every:
            number += self.steps // self.keep_every - self.steps // math.lcm(self.every, self.keep_every)
        return number + (not self._is_due(self.steps))

    def kept_at_end(self) -> int:
        """Return how many checkpoints are there when the run ends."""
        return self.kept_for_good(0) + self._newest_only()

    def kept_for_good(self, step: int) -> int:
        """Return how many of the checkpoints after a step are kept for good."""
        return self.steps // self.keep_every - step // self.keep_every if self.keep_every else 0

    def still_needed(self, step: int, present: Sequence[int]) -> int:
        """Return how many more checkpoints than now the disk holds at most until the end.

        Args:
            step: The step now.
            present: The steps of the checkpoints that are there.
        """
        replaced = sum(not self._is_kept(each) for each in present)
        return self.kept_for_good(step) + max(self._newest_only() - replaced, 0) + 1

    def _newest_only(self) -> int:
        """Return how many of the newest checkpoints at the end are not kept for good anyway."""
        found: list[int] = []
        step = self.steps
        while step > 0 and len(found) < self.keep:
            found.append(step)
            step = max((step - 1) // period * period for period in (self.every, self.keep_every) if period)
        return sum(not self._is_kept(each) for each in found)

    def _is_kept(self, step: int) -> bool:
        return bool(self.keep_every) and step % (self.keep_every or 1) == 0

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 or self._is_kept(step)


def disk_need(
    folder: Path, *, size: int, schedule: CheckpointSchedule, step: int, present: Sequence[int]
) -> Need:
    """Return the disk that the checkpoints still need: a new one is complete before the oldest is deleted.

    Args:
        folder: The folder of the checkpoints.
        size: Bytes of one.
        schedule: When the run saves, and what it keeps.
        step: The step now.
        present: The steps of the checkpoints that are there.
    """
    count = schedule.still_needed(step, present)
    what = f"the next {count} checkpoints in {folder} need"
    fix = "make space, type checkpoint.keep=1, or another output_dir="
    if schedule.keep_every:
        what = f"the {count} checkpoints that the run will still keep in {folder} need"
        fix = "make space, type a larger checkpoint.keep_every=N, or another output_dir="
    return Need(
        "disk",
        count * size,
        free_disk(folder),
        what if count > 1 else f"the next checkpoint in {folder} needs",
        fix,
    )


def memory_need(*, added: float = 0.0) -> Need:
    """Return the host memory that must stay free, besides `added` bytes that are about to be allocated."""
    total = total_memory()
    return Need(
        "memory",
        added + LOW_MEMORY * (total or 0.0),
        free_memory() if total else None,
        "loading data and what must stay free of the memory take",
        "type a smaller workers=N or micro_batch=N, or ask for more memory (slurm: --mem)",
    )


def shared_memory_need(*, workers: int, batch_bytes: int) -> Need:
    """Return the shared memory that loader workers need for batches when their slots are in use."""
    return Need(
        "shared memory",
        workers * batch_bytes,
        free_disk(SHARED_MEMORY),
        f"a batch of each of {workers} loader workers in {SHARED_MEMORY} takes",
        "start the container with a larger --shm-size, or type a smaller workers=N or micro_batch=N",
    )


def label_need(root: Path, shards: Sequence[tuple[str, int]], *, image_size: int) -> Need:
    """Return the disk that the labels of the shards that are not finished need.

    Args:
        root: Folder of the label set.
        shards: Name and number of records of each shard of the image set.
        image_size: Short side of the labels, pixels; what no shard shows yet is estimated from it.
    """
    missing = sum(records for name, records in shards if not (root / f"{name}.json").is_file())
    finished = [
        (root / f"{name}.tar", records) for name, records in shards if (root / f"{name}.json").is_file()
    ]
    sizes = [path.stat().st_size for path, _ in finished if path.is_file()]
    known = sum(records for path, records in finished if path.is_file())
    each = sum(sizes) / known if known else LABEL_BYTES_PER_PIXEL * image_size * image_size * 4 / 3
    folder = next(path for path in (root, *root.parents) if path.exists())
    return Need(
        f"labels {root}",
        missing * each,
        free_disk(folder),
        f"{missing:,} labels of {root.name} in {root} need about",
        "make space, or type another labels=FOLDER",
    )


def warn_of(need: Need) -> None:
    """Print the warning on stderr if there is less than needed."""
    if need.is_short:
        print(need.message(), file=sys.stderr)


class Headroom(StepCallback):
    """Warn, once each, before the disk of the run folder, the host memory or the shared memory run out.

    Checked before the first step on every node, and every CHECK_INTERVAL_S.
    """

    def __init__(
        self, checkpoints: Path, schedule: CheckpointSchedule, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Set what is checked.

        Args:
            checkpoints: The folder of the checkpoints.
            schedule: When the run saves, and what it keeps.
            now: Returns the time in seconds.
        """
        self.folder, self.schedule, self._now = checkpoints, schedule, now
        self._size = 0
        self._checked_at = 0.0
        self._reported: set[str] = set()

    def on_train_start(self, trainer: Any, module: pl.LightningModule) -> None:
        """Check before the first step, with what the loader is about to allocate."""
        super().on_train_start(trainer, module)
        self._size, self._checked_at = checkpoint_bytes(module), self._now()
        data: Any = getattr(trainer, "datamodule", None)
        workers = getattr(data, "workers", 0)
        loading, needs = 0.0, []
        if workers and hasattr(data, "open") and trainer.local_rank == 0:
            batch = sum(array.nbytes for array in data.open().empty_batch(1).values()) * data.micro_batch
            workers *= trainer.num_devices  # of this node
            loading = workers * (WORKER_BYTES + SLOTS * batch)
            needs = [shared_memory_need(workers=workers, batch_bytes=batch)]
        self._report([*self._needs(trainer, loading), *needs], trainer)

    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Check now and then, without waiting for the device or for other ranks."""
        if self._now() - self._checked_at >= CHECK_INTERVAL_S:
            self._checked_at = self._now()
            self._report(self._needs(trainer, 0.0), trainer)

    def _needs(self, trainer: Any, loading: float) -> list[Need]:
        needs = [memory_need(added=loading)] if trainer.local_rank == 0 else []
        if trainer.is_global_zero:
            present = [step_from_name(path) for path in self.folder.glob("step-*.ckpt")]
            folder = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            step, size = trainer.global_step, self._size
            needs.append(disk_need(folder, size=size, schedule=self.schedule, step=step, present=present))
        return needs

    def _report(self, needs: list[Need], trainer: Any) -> None:
        for need in needs:
            if need.is_short and need.name not in self._reported:
                self._reported.add(need.name)
                where = f" on node {trainer.node_rank}" if trainer.num_nodes > 1 else ""
                print(f"{need.message()}{where}", file=sys.stderr)
