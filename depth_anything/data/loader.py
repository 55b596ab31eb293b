"""The training data loader: endless micro-batches, prefetched by worker processes."""

import atexit
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from depth_anything.data.dataset import StreamDataset, WorkerFailure, return_batch
from depth_anything.data.stream import MicroBatchSampler
from depth_anything.errors import SAME_COMMAND, UserMessage
from depth_anything.host_memory import count_oom_kills, describe_memory

PREFETCH_BATCHES = 2
"""Micro-batches that each worker prefetches."""
MAX_WORKER_RESTARTS = 3
"""How often killed workers are replaced before the run ends."""


class WorkerError(UserMessage, ChildProcessError):
    """A loader worker died or ran out of memory; raised where the next batch is due, between optimizer steps."""


class WorkerKilled(WorkerError):
    """A loader worker was killed by a signal."""


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

    def allocate() -> None:
        dataset.use_shared_memory(workers=workers, micro_batch=micro_batch, slots=PREFETCH_BATCHES + 2)

    return StreamLoader(
        dataset,
        allocate=allocate,
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

    def __init__(
        self, dataset: Any, *, smaller: str, allocate: Callable[[], None] = lambda: None, **options: Any
    ) -> None:
        """Pass the options to DataLoader.

        Args:
            dataset: Read by the workers.
            smaller: The override that makes batches smaller, for messages.
            allocate: Called before workers are started; allocates the memory that they share with this process.
            options: Of DataLoader.
        """
        super().__init__(dataset, worker_init_fn=ignore_signals, **options)
        self.smaller, self.allocate = smaller, allocate

    def __iter__(self) -> Any:
        """Start the workers."""
        # At exit Python sends SIGTERM to the remaining workers and waits for them. They ignore it, so they are
        # stopped before.
        iterator = super().__iter__()
        atexit.register(_shut_down_workers, weakref.ref(iterator))
        return iterator

    def _get_iterator(self) -> Any:
        self.allocate()
        return _WorkerIterator(self) if self.num_workers else super()._get_iterator()


class _WorkerIterator(_MultiProcessingDataLoaderIter):
    """The iterator of a loader with worker processes; workers that are killed are replaced.

    A micro-batch depends only on its number, so all workers are stopped and started again at the micro-batch that is
    due. Those that the main process holds stay in the shared memory of the old workers.
    """

    _restarts = 0

    def __init__(self, loader: StreamLoader) -> None:
        handler = signal.getsignal(signal.SIGCHLD)
        # Without a cycle, so that the workers end as soon as nothing refers to loader and iterator.
        self._loader, self._smaller = weakref.ref(loader), loader.smaller
        self._oom_kills = count_oom_kills()
        super().__init__(loader)
        # PyTorch's handler raises the error of a dead worker at once, maybe in the middle of an optimizer step, and
        # a checkpoint of that state would be wrong. Without the handler the error is raised with the next batch.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def __next__(self) -> Any:
        while True:
            try:
                batch = super().__next__()
                break
            except WorkerKilled as error:
                if self._restarts == MAX_WORKER_RESTARTS or not self._restart(error):
                    raise
            except (MemoryError, RuntimeError) as error:
                memory = re.search(r"MemoryError|can't allocate memory|Insufficient memory", str(error))
                worker = re.search(r"DataLoader worker process (\d+)", str(error))
                if memory is None or worker is None:
                    raise
                what = f"loader worker {worker[1]} ran out of memory"
                raise self._error(WorkerError, what) from error
        if isinstance(batch, WorkerFailure):
            raise batch.error
        return batch

    def _restart(self, error: WorkerKilled) -> bool:
        """Replace the workers; return False for a loader whose order has no position, or that is gone."""
        loader = self._loader()
        sampler = loader.batch_sampler if loader is not None else None
        if loader is None or not isinstance(sampler, MicroBatchSampler):
            return False
        restarts, workers = self._restarts + 1, self._workers
        sampler.start += self._num_yielded
        print(
            f"rank {sampler.rank}: {error.what}; all loader workers are started again at micro-batch {sampler.start} "
            f"(restart {restarts} of {MAX_WORKER_RESTARTS})",
            file=sys.stderr,
        )
        self._shutdown_workers()
        for worker in workers:
            if worker.is_alive():  # they ignore SIGTERM
                worker.kill()
                worker.join()
        loader.allocate()  # the killed worker cannot release its memory
        self.__init__(loader)  # type: ignore[misc]
        self._restarts = restarts
        return True

    def _try_get_data(self, timeout: float = 1.0) -> Any:
        """Wait for a batch so long, then look whether a worker has died; PyTorch looks every 5 seconds."""
        try:
            return super()._try_get_data(timeout)
        except RuntimeError as error:
            dead = [(number, worker) for number, worker in enumerate(self._workers) if not worker.is_alive()]
            if not dead:
                raise
            number, worker = dead[0]
            code = worker.exitcode or 0
            name = f"loader worker {number} (process {worker.pid})"
            if code >= 0:
                raise self._error(WorkerError, f"{name} exited with code {code}") from error
            signal_name = next((known.name for known in signal.Signals if known == -code), "?")
            what = f"{name} was killed by signal {-code} ({signal_name}){self._reason(-code)}"
            raise self._error(WorkerKilled, what) from error

    def _reason(self, number: int) -> str:
        """Return the probable reason of a signal, with the free memory, as the end of a sentence."""
        if number == signal.SIGBUS:
            return ", maybe because /dev/shm is full"
        if number != signal.SIGKILL:
            return ""
        kills, memory = count_oom_kills() - self._oom_kills, describe_memory()
        reason = (
            f"the kernel killed {kills} processes for lack of memory" if kills else "maybe for lack of memory"
        )
        return f", {reason}{f' ({memory} now)' if memory else ''}"

    def _error(self, kind: type[WorkerError], what: str) -> WorkerError:
        fewer = f"workers={self._num_workers // 2} or {self._smaller}"
        return kind(what, [SAME_COMMAND, f" to resume; if it happens again, type {fewer}"])


def _shut_down_workers(iterator: "weakref.ref[Any]") -> None:
    workers = iterator()
    if isinstance(workers, _MultiProcessingDataLoaderIter):
        workers._shutdown_workers()
