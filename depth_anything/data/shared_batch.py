"""Memory that loader workers write batches into and the main process reads them from, again and again.

A batch that goes from process to process the usual way lies in new shared memory each time: every page of it
has to be found, zeroed and mapped on both sides, which takes as long as decoding a small photograph. Here each
worker has a few places of its own, made before it is forked. A place is free again when the last tensor that
lies in it is gone, whoever held it; while none is free, or after `spawn`, batches go the usual way.
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
    """An array of a batch: what it holds, and where it begins in the batch's memory, bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


def batch_layout(arrays: Mapping[str, tuple[Any, tuple[int, ...]]]) -> tuple[dict[str, ArrayField], int]:
    """Lay arrays of (dtype, shape) behind each other; return where each lies, and the bytes of all."""
    fields, end = {}, 0
    for name, (dtype, shape) in arrays.items():
        fields[name] = ArrayField(np.dtype(dtype), shape, end)
        length = int(np.prod(shape)) * fields[name].dtype.itemsize
        end += -(-length // _ALIGNMENT) * _ALIGNMENT
    return fields, end


def array_views(memory: np.ndarray, fields: Mapping[str, ArrayField]) -> dict[str, np.ndarray]:
    """Return the arrays that lie in `memory`, uint8 and flat; they keep it alive."""
    return {
        name: memory[start : start + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
        for name, (dtype, shape, start) in fields.items()
    }


class SharedBatchPool:
    """Places for batches, some for each worker; hand it to the dataset before the loader starts its workers."""

    def __init__(self, *, workers: int, places: int, length: int) -> None:
        """Reserve the memory; none of it is used before a batch lies there.

        Args:
            workers: loader processes.
            places: for each: batches under way, and those that the main process holds.
            length: of a batch, bytes.
        """
        self.places, self.length = places, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, max(1, workers * places) * self.length)
        self._in_use = np.frombuffer(mmap.mmap(-1, max(1, workers * places)), np.uint8)
        self._key = secrets.token_hex(8)
        _pools[self._key] = self

    def __reduce__(self) -> Any:
        """Become None in a process that is not forked: it does not share the memory."""
        return type(None), ()

    def take(self, worker: int, length: int) -> "Slot | None":
        """Return a free place of a worker, called there; None where there is none, or it is too small."""
        mine = range(worker * self.places, (worker + 1) * self.places)
        if length > self.length or mine.stop > len(self._in_use):
            return None
        free = next((number for number in mine if not self._in_use[number]), None)
        if free is None:
            return None
        self._in_use[free] = 1  # the worker alone takes, the main process alone gives back
        return Slot(self, free, self._at(free, length))

    def open(self, number: int, length: int) -> np.ndarray:
        """Return the memory of a place that was filled, called in the main process; free when it is gone."""
        memory = self._at(number, length)
        weakref.finalize(memory, self._give_back, number).atexit = False
        return memory

    def _give_back(self, number: int) -> None:
        self._in_use[number] = 0

    def _at(self, number: int, length: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, length, number * self.length)


class Slot(NamedTuple):
    """A place that a worker has taken: its memory, uint8 and flat."""

    handover: SharedBatchPool
    number: int
    memory: np.ndarray


class SharedBatch(dict):
    """A batch whose tensors lie in a place; pickled, it is little more than the number of that place."""

    def __init__(self, place: Slot, fields: Mapping[str, ArrayField], others: Mapping[str, Any]) -> None:
        """Hold the tensors that lie in the memory, and what else belongs to the batch."""
        super().__init__(_tensor_views(place.memory, fields), **others)
        self._message = (place.handover._key, place.number, len(place.memory), dict(fields), dict(others))

    def __reduce__(self) -> Any:
        """Send where the tensors lie."""
        return _open_shared_batch, self._message


def _open_shared_batch(
    key: str, number: int, length: int, fields: Mapping[str, ArrayField], others: Mapping[str, Any]
) -> dict[str, Any]:
    return {**_tensor_views(_pools[key].open(number, length), fields), **others}


def _tensor_views(memory: np.ndarray, fields: Mapping[str, ArrayField]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in array_views(memory, fields).items()}
