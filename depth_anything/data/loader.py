"""The loader that training reads from: whole micro-batches, made ahead by worker processes, without end."""

import atexit
import re
import signal
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from depth_anything.data.stream import MicroBatchSampler
from depth_anything.errors import UserError, UserMessage

if TYPE_CHECKING:
    from depth_anything.data.dataset import StreamDataset

PREFETCH_BATCHES = 2
"""Micro-batches that each worker makes ahead."""


class WorkerError(ChildProcessError):
    """A loader worker died, or had too little memory; it is raised where the next batch is due, between steps."""


def build_stream_loader(
    dataset: "StreamDataset",
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
        dataset: what it reads; its workers hand batches over in memory of their own.
        micro_batch: samples of a batch.
        workers: processes; 0 for none.
        rank: of `world` that share the stream.
        world: how many ranks there are.
        start: the first micro-batch, counted over the run: samples seen ÷ (world · micro_batch).
        pin_memory: copy batches into pinned memory, as transfers to a GPU need it.
    """
    dataset.use_shared_memory(workers=workers, micro_batch=micro_batch, places=PREFETCH_BATCHES + 2)
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


def return_batch(batch: Any) -> Any:
    """Hand a batch over as the dataset made it; module-level, so that spawned workers can find it."""
    return batch


def largest_divisor(number: int) -> int:
    """Return the largest divisor of a number from 2 up that is below it; 1 of 1.

    >>> largest_divisor(12), largest_divisor(9), largest_divisor(7), largest_divisor(1)
    (6, 3, 1, 1)
    """
    return next((number // k for k in range(2, number + 1) if number % k == 0), 1)


def ignore_signals(worker: int) -> None:
    """Make a worker process ignore the signals that end a run.

    A terminal and a cluster send them to the whole process group, and the main process needs batches until the next
    step boundary.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class WorkerFailure:
    """An error of a loader worker on its way to the main process, in place of a batch.

    torch would raise an error of the same class whose only argument is the text of the traceback.
    """

    error: ValueError | OSError


def send_failures(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate what makes a batch, so that a worker sends its ValueError or OSError in place of the batch."""

    @wraps(method)
    def make_batch(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            if isinstance(error, UserMessage):
                return WorkerFailure(error)
            kind = OSError if isinstance(error, OSError) else UserError
            return WorkerFailure(kind(str(error) or type(error).__name__))

    return make_batch


next_or_failure = send_failures(lambda batches: next(batches, None))


class StreamLoader(DataLoader):
    """A loader whose workers ignore signals, and whose errors name the worker and what to type."""

    def __init__(self, dataset: Any, *, smaller: str, **options: Any) -> None:
        """Take the options of torch's loader; `smaller` is what a user types for smaller batches."""
        super().__init__(dataset, worker_init_fn=ignore_signals, **options)
        self.smaller = smaller

    def __iter__(self) -> Any:
        """Start the workers; torch calls `_get_iterator` here."""
        # At its exit Python sends SIGTERM to workers that are still there and waits for them: for ever, as they
        # ignore it. Before that it calls this.
        iterator = super().__iter__()
        atexit.register(_shut_down_workers, weakref.ref(iterator))
        return iterator

    def _get_iterator(self) -> Any:
        return _WorkerIterator(self) if self.num_workers else super()._get_iterator()


class _WorkerIterator(_MultiProcessingDataLoaderIter):
    """The worker processes of a loader."""

    def __init__(self, loader: StreamLoader) -> None:
        handler = signal.getsignal(signal.SIGCHLD)
        self._smaller = loader.smaller
        super().__init__(loader)
        # torch's handler raises an error of a dead worker wherever the main process is, in the middle of an
        # optimizer step perhaps, and such a state must not be saved. Without it the error comes with the next batch.
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
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            why = ", for lack of memory perhaps" if code == -signal.SIGKILL else ""
            raise self._error(f"loader worker {number} (process {worker.pid}) {how}{why}") from error

    def _error(self, what: str) -> WorkerError:
        return WorkerError(
            f"{what}; the same command goes on; where it happens again, type workers={self._num_workers // 2} or "
            f"{self._smaller}"
        )


def _shut_down_workers(iterator: "weakref.ref[Any]") -> None:
    held = iterator()
    if isinstance(held, _MultiProcessingDataLoaderIter):
        held._shutdown_workers()
