"""Shared memory that loader workers write batches into and the main process reads them from, reused between batches.

A batch that PyTorch sends from process to process lies in new shared memory each time, whose pages the kernel zeroes
and maps in both processes: that takes as long as decoding a small photograph. Here each worker has a few slots of its
own, allocated before it is forked. A slot is free again when no tensor in the main process refers to it any more.
While no slot is free, or if workers are spawned, batches are sent the usual way.
"""

import mmap
import secrets
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

_ALIGNMENT = 64  # bytes

_pools: "weakref.WeakValueDictionary[str, SharedBatchPool]" = weakref.WeakValueDictionary()


class ArrayField(NamedTuple):
    """An array of a batch: dtype, shape, and the byte offset where it begins in the memory of the batch."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


def batch_layout(arrays: Mapping[str, tuple[Any, tuple[int, ...]]]) -> tuple[dict[str, ArrayField], int]:
    """Place arrays of (dtype, shape) one after the other; return the fields and the total number of bytes."""
    fields, end = {}, 0
    for name, (dtype, shape) in arrays.items():
        fields[name] = ArrayField(np.dtype(dtype), shape, end)
        length = int(np.prod(shape)) * fields[name].dtype.itemsize
        end += -(-length // _ALIGNMENT) * _ALIGNMENT
    return fields, end


def array_views(memory: np.ndarray, fields: Mapping[str, ArrayField]) -> dict[str, np.ndarray]:
    """Return views of the arrays in `memory` (uint8, flat); they keep it alive."""
    return {
        name: memory[start : start + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
        for name, (dtype, shape, start) in fields.items()
    }


class Slot(NamedTuple):
    """A slot that a worker has acquired, and its memory (uint8, flat)."""

    pool: "SharedBatchPool"
    number: int
    memory: np.ndarray


class SharedBatchPool:
    """Slots for batches, a few per worker. Give it to the dataset before the loader forks its workers."""

    def __init__(self, *, workers: int, slots: int, length: int) -> None:
        """Reserve the memory; the kernel allocates a page when it is first written.

        Args:
            workers: Loader processes.
            slots: Per worker: batches that it prefetches, and batches that the main process holds.
            length: Bytes of a batch.
        """
        self.slots, self.length = slots, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, max(1, workers * slots) * self.length)
        self._in_use = np.frombuffer(mmap.mmap(-1, max(1, workers * slots)), np.uint8)
        self._key = secrets.token_hex(8)
        _pools[self._key] = self

    def __reduce__(self) -> Any:
        """Pickle as None: a spawned process does not share the memory."""
        return type(None), ()

    def acquire(self, worker: int, length: int) -> Slot | None:
        """Return a free slot of a worker (called in the worker), or None if none is free or it is too small."""
        own = range(worker * self.slots, (worker + 1) * self.slots)
        if length > self.length or own.stop > len(self._in_use):
            return None
        free = next((number for number in own if not self._in_use[number]), None)
        if free is None:
            return None
        self._in_use[free] = 1  # only the worker sets it, only the main process clears it: no lock is needed
        return Slot(self, free, self._slot_memory(free, length))

    def open(self, number: int, length: int) -> np.ndarray:
        """Return the memory of a slot (called in the main process); the slot is free when it is deleted."""
        memory = self._slot_memory(number, length)
        weakref.finalize(memory, self._release, number).atexit = False
        return memory

    def _release(self, number: int) -> None:
        self._in_use[number] = 0

    def _slot_memory(self, number: int, length: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, length, number * self.length)


class SharedBatch(dict):
    """A batch whose tensors lie in a slot; it is pickled as the number of the slot."""

    def __init__(self, slot: Slot, fields: Mapping[str, ArrayField], others: Mapping[str, Any]) -> None:
        """Create tensors that refer to the memory of the slot, and add the other entries of the batch."""
        super().__init__(_tensor_views(slot.memory, fields), **others)
        self._message = (slot.pool._key, slot.number, len(slot.memory), dict(fields), dict(others))

    def __reduce__(self) -> Any:
        """Pickle where the tensors lie."""
        return _open_shared_batch, self._message


def _open_shared_batch(
    key: str, number: int, length: int, fields: Mapping[str, ArrayField], others: Mapping[str, Any]
) -> dict[str, Any]:
    return {**_tensor_views(_pools[key].open(number, length), fields), **others}


def _tensor_views(memory: np.ndarray, fields: Mapping[str, ArrayField]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in array_views(memory, fields).items()}
