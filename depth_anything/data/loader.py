"""The loader that training reads from: whole micro-batches, made ahead by worker processes, without end."""

import atexit
import signal
import weakref
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from depth_anything.data.dataset import StreamDataset
from depth_anything.data.stream import MicroBatches

AHEAD = 2
"""Micro-batches that each worker makes ahead."""


def stream_loader(
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
        dataset: what it reads; its workers hand batches over in memory of their own.
        micro_batch: samples of a batch.
        workers: processes; 0 for none.
        rank: of `world` that share the stream.
        world: how many ranks there are.
        start: the first micro-batch, counted over the run: samples seen ÷ (world · micro_batch).
        pin_memory: copy batches into pinned memory, as transfers to a GPU need it.
    """
    dataset.hand_over(workers=workers, micro_batch=micro_batch, places=AHEAD + 2)
    return _Loader(
        dataset,
        batch_sampler=MicroBatches(rank=rank, world=world, size=micro_batch, start=start),
        collate_fn=identity,
        worker_init_fn=_deaf,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=AHEAD if workers else None,
        persistent_workers=workers > 0,
    )


def identity(batch: Any) -> Any:
    """Hand a batch over as the dataset made it; module-level, so that spawned workers can find it."""
    return batch


def _deaf(worker: int) -> None:
    # Signals that end a run may reach the whole process group, and the main process needs batches until the next
    # step boundary.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        # At its exit Python sends SIGTERM to workers that are still there and waits for them: for ever, as they are
        # deaf. Before that it calls this.
        iterator = super().__iter__()
        atexit.register(_let_go, weakref.ref(iterator))
        return iterator


def _let_go(iterator: "weakref.ref[Any]") -> None:
    held = iterator()
    if isinstance(held, _MultiProcessingDataLoaderIter):
        held._shutdown_workers()
