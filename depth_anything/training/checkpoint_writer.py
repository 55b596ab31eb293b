"""Write checkpoints: flushed to the disk and read back before they get their name, on request in the background."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from depth_anything.disk import WriteError, atomic_path
from depth_anything.errors import SAME_COMMAND
from depth_anything.model.integrity import has_digest, save_with_digest
from depth_anything.model.tensor_files import WRITE_ERRORS


class CheckpointWriter(Protocol):
    """Writes checkpoints of one format. All ranks call `write` at the same steps."""

    def write(self, trainer: pl.Trainer, path: Path, *, on_complete: Callable[[], None]) -> "Future[None]":
        """Write the checkpoint of the current step.

        The state is captured when this returns, and training may change it. No other write is in progress.

        Args:
            trainer: Its step has ended on all ranks.
            path: What the complete checkpoint is called, a file or a folder. It does not exist before it is complete
                on the disk and read back; the folder above it may not exist either.
            on_complete: To call on rank 0, in any thread, once `path` exists; an error belongs to the future.

        Returns:
            Done when the part of this rank is written and, on rank 0, when `on_complete` has returned. Its exception is
            an OSError if something cannot be written; then older checkpoints are unchanged.
        """
        ...


class SingleFileWriter:
    """Write the whole state from rank 0 into one file, in the format of `torch.save`.

    The bytes of the file do not depend on `asynchronous`, except that tensors of a GPU are marked as tensors of the
    CPU.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        """Choose where the file is written.

        Args:
            asynchronous: In a thread, from a copy of the state in the CPU's memory, while training continues. Hashing,
                checksums and the disk do not hold Python's lock.
        """
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None

    def write(self, trainer: pl.Trainer, path: Path, *, on_complete: Callable[[], None]) -> "Future[None]":
        """Capture the state on all ranks, and write it on rank 0; see `CheckpointWriter`."""
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        with io.capture() as captured:
            try:
                trainer.save_checkpoint(path)
            except Exception:
                if trainer.world_size > 1:
                    trainer.strategy.barrier()  # the other ranks wait here at the end of save_checkpoint
                raise

        def write_captured(checkpoint: Mapping[str, Any]) -> None:
            write_checkpoint(checkpoint, path)
            on_complete()

        done: Future[None] = Future()
        if self._thread is not None and captured:
            return self._thread.submit(write_captured, copy_to_cpu(captured[0]))
        for checkpoint in captured:  # none on other ranks than 0
            write_captured(checkpoint)
        done.set_result(None)
        return done


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file in its own folder and rename it.

    Lightning's TorchCheckpointIO writes to the system's temporary folder and moves the file: between two file systems
    that is a copy, which a kill leaves incomplete, and nothing is flushed to the disk.
    """

    _captured: list[dict[str, Any]] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write as `write_checkpoint`, or inside `capture` collect the checkpoint."""
        if self._captured is None:
            write_checkpoint(checkpoint, Path(path))
        else:
            self._captured.append(checkpoint)

    @contextmanager
    def capture(self) -> Iterator[Sequence[dict[str, Any]]]:
        """Collect the checkpoints that Lightning saves inside, in place of writing them.

        Lightning lets all ranks wait after `save_checkpoint`, where a rank that cannot write would never arrive.
        """
        captured: list[dict[str, Any]] = []
        self._captured = captured
        try:
            yield captured
        finally:
            self._captured = None


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint with its digest, flush it to the disk, read it back, and give it its name.

    A kill at any moment leaves `path` complete or absent, and other files unchanged.

    Args:
        checkpoint: As Lightning collects it.
        path: The file; its folder is created.

    Raises:
        WriteError: If it cannot be written, or is read back with other bytes.
    """
    with atomic_path(path, make_folder=True, also=(*WRITE_ERRORS, OSError)) as temporary:
        digest = save_with_digest(checkpoint, temporary)
        flush_to_disk(temporary)
        if not has_digest(temporary, digest):
            raise WriteError(
                f"{path} was read back with other bytes than were written, and is deleted",
                ("check the disk and the memory; older checkpoints are unchanged, so then ", SAME_COMMAND),
            )


def flush_to_disk(path: Path) -> None:
    """Write a file to the disk and drop it from the system's cache, so that it is read back from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def copy_to_cpu(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Copy a checkpoint, its tensors into memory of the CPU; views of one storage stay views of one storage.

    Copies from a GPU go through pinned memory, at the speed of the bus; this waits until all have arrived.
    """
    with _CopyTensors():
        copied = copy.deepcopy(checkpoint)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


class _CopyTensors(TorchFunctionMode):
    """Lets `copy.deepcopy` copy each storage once, to the CPU, and start the copies from a GPU without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and type(args[0]) in (Tensor, nn.Parameter):
            tensor, memo = args
            if tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg():
                memo[id(tensor)] = copied = self._copy(tensor.detach())
                return copied
        return func(*args, **(kwargs or {}))

    def _copy(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.device, storage.data_ptr()
        if key not in self._copies:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            target = torch.empty(source.shape, dtype=torch.uint8, pin_memory=source.is_cuda)
            self._copies[key] = target.copy_(source, non_blocking=True).untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(self._copies[key], tensor.storage_offset(), tensor.size(), tensor.stride())
