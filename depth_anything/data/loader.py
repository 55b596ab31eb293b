"""The training data loader: endless micro-batches, prefetched by worker processes."""

import atexit
import re
import signal
import threading
import weakref
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from depth_anything.data.dataset import StreamDataset, WorkerFailure, return_batch
from depth_anything.data.stream import MicroBatchSampler
from depth_anything.errors import SAME_COMMAND, UserMessage

PREFETCH_BATCHES = 2
"""Micro-batches that each worker prefetches."""


class WorkerError(UserMessage, ChildProcessError):
    """A loader worker died or ran out of memory; raised where the next batch is due, between optimizer steps."""


def build_stream_loader(
    dataset: StreamDataset,
    *,
    micro_batch: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Build the endless loader of one rank.

    Args:
        dataset: Its workers write batches into shared memory.
        micro_batch: Samples per batch.
        workers: Worker processes; 0 for none.
        rank: Rank of this process among the `world` ranks that share the stream.
        world: Number of ranks.
        start: First micro-batch, counted over the run: samples seen ÷ (world · micro_batch).
        pin_memory: Copy batches into pinned memory, for transfers to a GPU.
    """
    dataset.use_shared_memory(workers=workers, micro_batch=micro_batch, slots=PREFETCH_BATCHES + 2)
    return StreamLoader(
        dataset,
        smaller=f"micro_batch={largest_divisor(micro_batch)}",
        batch_sampler=MicroBatchSampler(rank=rank, world=world, size=micro_batch, start=start),
        collate_fn=return_batch,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        persistent_workers=workers > 0,
    )


def largest_divisor(number: int) -> int:
    """Return the largest proper divisor of a number; 1 for 1.

    >>> largest_divisor(12), largest_divisor(9), largest_divisor(7), largest_divisor(1)
    (6, 3, 1, 1)
    """
    return next((number // k for k in range(2, number + 1) if number % k == 0), 1)


def ignore_signals(worker: int) -> None:
    """Make a worker process ignore the signals that stop a run.

    Terminals and clusters send them to the whole process group, but the main process needs batches until the end of
    the current optimizer step.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class StreamLoader(DataLoader):
    """A DataLoader whose workers ignore signals, and whose errors name the worker and what to type."""

    def __init__(self, dataset: Any, *, smaller: str, **options: Any) -> None:
        """Pass the options to DataLoader; `smaller` is the override that makes batches smaller, for messages."""
        super().__init__(dataset, worker_init_fn=ignore_signals, **options)
        self.smaller = smaller

    def __iter__(self) -> Any:
        """Start the workers."""
        # At exit Python sends SIGTERM to the remaining workers and waits for them. They ignore it, so they are
        # stopped before.
        iterator = super().__iter__()
        atexit.register(_shut_down_workers, weakref.ref(iterator))
        return iterator

    def _get_iterator(self) -> Any:
        return _WorkerIterator(self) if self.num_workers else super()._get_iterator()


class _WorkerIterator(_MultiProcessingDataLoaderIter):
    """The iterator of a loader with worker processes."""

    def __init__(self, loader: StreamLoader) -> None:
        handler = signal.getsignal(signal.SIGCHLD)
        self._smaller = loader.smaller
        super().__init__(loader)
        # PyTorch's handler raises the error of a dead worker at once, maybe in the middle of an optimizer step, and
        # a checkpoint of that state would be wrong. Without the handler the error is raised with the next batch.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def __next__(self) -> Any:
        try:
            batch = super().__next__()
        except (MemoryError, RuntimeError) as error:
            memory = re.search(r"MemoryError|can't allocate memory|Insufficient memory", str(error))
            worker = re.search(r"DataLoader worker process (\d+)", str(error))
            if memory is None or worker is None:
                raise
            raise self._error(f"loader worker {worker[1]} ran out of memory") from error
        if isinstance(batch, WorkerFailure):
            raise batch.error
        return batch

    def _try_get_data(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super()._try_get_data(*arguments, **options)
        except RuntimeError as error:
            dead = [(number, worker) for number, worker in enumerate(self._workers) if not worker.is_alive()]
            if not dead:
                raise
            number, worker = dead[0]
            code = worker.exitcode or 0
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            why = ", maybe for lack of memory" if code == -signal.SIGKILL else ""
            raise self._error(f"loader worker {number} (process {worker.pid}) {how}{why}") from error

    def _error(self, what: str) -> WorkerError:
        fewer = f"workers={self._num_workers // 2} or {self._smaller}"
        return WorkerError(what, [SAME_COMMAND, f" to resume; if it happens again, type {fewer}"])


def _shut_down_workers(iterator: "weakref.ref[Any]") -> None:
    workers = iterator()
    if isinstance(workers, _MultiProcessingDataLoaderIter):
        workers._shutdown_workers()
