"""Write checkpoints of trainer=fsdp: every rank its shard, on request in the background."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from depth_anything.disk import WriteError, name_write_errors, publish_folder, temporary_path
from depth_anything.errors import SAME_COMMAND, UserError
from depth_anything.model.integrity import find_damage
from depth_anything.model.sharded_files import (
    STATE_NAME,
    Piece,
    rows_of_rank,
    split_tensors,
    write_shard,
    write_state,
)
from depth_anything.model.tensor_files import WRITE_ERRORS
from depth_anything.training.callbacks import gather_or_raise
from depth_anything.training.checkpoint_writer import AtomicCheckpointIO, copy_to_cpu, flush_to_disk


class ShardedWriter:
    """Write checkpoints as folders of shards; see `CheckpointWriter` and model/sharded_files.py."""

    def __init__(self, *, asynchronous: bool = False) -> None:
        """Choose where the files are written.

        Args:
            asynchronous: In a thread of each rank, from a copy of its rows in the CPU's memory.
        """
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._group: Any = None

    def write(self, trainer: pl.Trainer, path: Path, *, on_complete: Callable[[], None]) -> "Future[None]":
        """Capture the rows of this rank, and write them; see `CheckpointWriter`."""
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        with io.capture() as captured:
            trainer.save_checkpoint(path)
        if self._group is None:  # of its own: a thread must not share one
            self._group = dist.new_group(backend="gloo")
        state, pieces = split_tensors(captured[0], piece_of_rank)

        def write_captured() -> None:
            write_pieces(state, pieces, path, self._group)
            if trainer.is_global_zero:
                on_complete()

        if self._thread is not None:
            state = copy_to_cpu(state)
            return self._thread.submit(write_captured)
        done: Future[None] = Future()
        write_captured()
        done.set_result(None)
        return done


def require_shared_folder(folder: Path, *, fix: str) -> None:
    """Check that rank 0 sees what the other ranks write into a folder. All ranks must call this.

    On the disk of a single node a checkpoint would lack the shards of the other nodes.

    Args:
        folder: It is created.
        fix: What to type if it is not shared.

    Raises:
        UserError: On all ranks, if a rank writes into another folder of this name.
    """
    probe, ranks = temporary_path(folder / "probe"), dist.get_world_size()

    def write() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        return probe.name

    def look() -> None:
        unseen = [rank for rank, name in enumerate(names) if not (folder / name).exists()]
        if dist.get_rank() == 0 and unseen:
            raise UserError(
                f"rank {unseen[0]} writes into another {folder} than rank 0, but the shards of a checkpoint need one "
                "folder that all nodes share",
                fix,
            )

    try:
        names = gather_or_raise(ranks, write)
        gather_or_raise(ranks, look)
    finally:
        probe.unlink(missing_ok=True)


def write_sharded(checkpoint: dict[str, Any], path: Path, group: Any) -> None:
    """Write a checkpoint that has DTensors; arguments and errors as `write_pieces`."""
    write_pieces(*split_tensors(checkpoint, piece_of_rank), path, group)


def piece_of_rank(tensor: Tensor) -> Piece | None:
    """Copy this rank's rows of a DTensor to the CPU; None for an ordinary tensor, which all ranks hold."""
    if not isinstance(tensor, DTensor):
        return None
    assert tensor.placements == (Shard(0),), "the network was sharded by other code"
    mesh = tensor.device_mesh
    own = rows_of_rank(tensor.shape[0], mesh.get_local_rank(), mesh.size())
    rows = tensor.to_local().detach().to("cpu", copy=True)
    assert rows.shape[0] == own.stop - own.start
    return Piece(rows, own.start, tuple(tensor.shape))


def write_pieces(state: dict[str, Any], pieces: dict[str, Piece], path: Path, group: Any) -> None:
    """Write the shard of each rank; rank 0 writes the rest and gives the folder its name when all have written.

    Every file is flushed to the disk and read back before. A kill leaves `path` complete or absent.

    Args:
        state: The checkpoint with references in place of DTensors.
        pieces: This rank's rows of them.
        path: The folder of the checkpoint.
        group: A process group of the CPU that nothing else uses meanwhile.

    Raises:
        WriteError: On all ranks, if one of them cannot write; nothing is left on the disk.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    names: list[Any] = [str(temporary_path(path))]
    dist.broadcast_object_list(names, src=0, group=group)
    temporary = Path(names[0])

    def write_own_shard() -> tuple[str, str]:
        name, digest = write_shard(pieces, temporary, rank, ranks)
        verify(temporary / name, path)
        return name, digest

    def publish() -> None:
        if rank == 0:
            write_state(state, temporary, dict(shards))
            verify(temporary / STATE_NAME, path)
            publish_folder(temporary, path)

    try:
        gather_write(lambda: temporary.mkdir(parents=True, exist_ok=True), path, group)
        shards = gather_write(write_own_shard, path, group)
        gather_write(publish, path, group)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def verify(file: Path, path: Path) -> None:
    """Flush a file to the disk and read it back.

    Raises:
        WriteError: If it is read back with other bytes.
    """
    flush_to_disk(file)
    if damage := find_damage(file):
        raise WriteError(
            f"{path} was read back with other bytes than were written ({file.name}: {damage}), and is deleted",
            ("check the disk and the memory; older checkpoints are unchanged, so then ", SAME_COMMAND),
        )


def gather_write(write: Callable[[], Any], path: Path, group: Any) -> list[Any]:
    """Call `write` on every rank and return all results.

    Raises:
        WriteError: On all ranks, with the first error of any rank.
    """
    result: Any = None
    failure: WriteError | None = None
    try:
        with name_write_errors(path, (*WRITE_ERRORS, OSError)):
            result = write()
    except WriteError as error:
        failure = error
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, failure), group=group)
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    return [result for result, _ in outcomes]
