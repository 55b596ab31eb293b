"""FSDP2 for networks that are too large for one GPU: the strategy of trainer=fsdp, and its checkpoints.

Lightning's ModelParallelStrategy starts the ranks and gives `configure_model` their mesh. Its checkpoints are read
through a pickle, and restored before a run's hooks see them; this strategy saves the contents of a run's ordinary
checkpoint in shards (model/sharded_files.py) and restores them where every other strategy does.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from depth_anything.errors import UserError
from depth_anything.model.sharded_files import ShardedCheckpoint, is_sharded, rows_of_rank
from depth_anything.training.checkpoint_writer import AtomicCheckpointIO, CheckpointWriter, SingleFileWriter
from depth_anything.training.ema import AVERAGE_KEY
from depth_anything.training.sharded_writer import ShardedWriter, write_sharded
from depth_anything.training.whole_network import averaging_callbacks


class ShardedStrategy(ModelParallelStrategy):
    """Data parallelism with sharded parameters, gradients and optimizer states (FSDP2).

    `DepthModule.configure_model` shards the network. A checkpoint is a folder of shards, which any number of ranks and
    every other strategy can read; the single file of another strategy is read too.
    """

    def __init__(self, *, timeout: timedelta | None = None, process_group_backend: str | None = None) -> None:
        """Shard over all ranks.

        Args:
            timeout: Of collectives; None for PyTorch's.
            process_group_backend: None: NCCL for GPUs, gloo for CPUs.
        """
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        super().__init__(process_group_backend=process_group_backend, **options)
        self._writing_group: Any = None

    def setup_environment(self) -> None:
        """Connect the ranks; Lightning's default would use the GPUs of a node for tensor parallelism.

        Raises:
            UserError: If a callback of Lightning averages the weights.
        """
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        module = self.lightning_module
        if module is None:  # ranks that compare their folders before there is a network
            self._setup_distributed()
            return
        if averaging_callbacks(module.trainer):
            raise UserError(
                "Lightning's weight averaging cannot average sharded weights",
                "type callbacks=ema in its place",
            )
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Check that the module has sharded its network.

        Raises:
            UserError: If it has not: gradients of an ordinary network would not be averaged.
        """
        super().setup(trainer)
        assert self.lightning_module is not None
        if not any(isinstance(p, DTensor) for p in self.lightning_module.parameters()):
            raise UserError("this stage cannot shard its network", "type trainer=ddp")

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning restores optimizers from what `load_checkpoint` returns."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state dict of the module, with DTensors."""
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load the state dict of the module, with DTensors."""
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer, with DTensors."""
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load the states of the optimizers, with DTensors."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint in shards, or let a `ShardedWriter` write it. All ranks must call this."""
        io = self.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        if io.capturing:
            io.save_checkpoint(checkpoint, filepath)
        else:
            self._writing_group = self._writing_group or dist.new_group(backend="gloo")
            write_sharded(checkpoint, Path(filepath), self._writing_group)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, sharded or not; tensors of sharded parameters become DTensors with this rank's rows."""
        path = Path(checkpoint_path)
        if not is_sharded(path):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return self._shard_checkpoint(checkpoint)
        source, mesh = ShardedCheckpoint(path), self.device_mesh["data_parallel"]

        def read_own_rows(name: str) -> Tensor:
            shape = source.shapes[name]
            rows = source.read(name, rows_of_rank(shape[0], mesh.get_local_rank(), mesh.size()))
            return make_dtensor(rows, shape, mesh)

        filled: dict[str, Any] = source.fill(source.state, read_own_rows)
        return filled

    def _shard_checkpoint(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Replace the whole tensors of a single-file checkpoint by DTensors, where those of the module are."""
        assert self.lightning_module is not None
        live = dict(self.lightning_module.named_parameters())

        def shard_like(tensor: Tensor, parameter: Tensor | None) -> Tensor:
            if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
                return tensor
            mesh = parameter.device_mesh
            own = rows_of_rank(tensor.shape[0], mesh.get_local_rank(), mesh.size())
            return make_dtensor(tensor[own].clone(), tensor.shape, mesh)

        average = checkpoint.get(AVERAGE_KEY, {}).get("weights", {})
        for weights in (checkpoint["state_dict"], average, checkpoint.get("current_model_state", {})):
            weights.update({name: shard_like(tensor, live.get(name)) for name, tensor in weights.items()})
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, state in saved["state"].items():
                state.update(
                    {
                        key: shard_like(value, parameters[number]) if isinstance(value, Tensor) else value
                        for key, value in state.items()
                    }
                )
        return checkpoint


def make_dtensor(rows: Tensor, shape: Sequence[int], mesh: DeviceMesh) -> DTensor:
    """Build a tensor that is sharded by rows from the rows of this rank, without communication.

    Args:
        rows: (R, …).
        shape: Shape of the whole tensor.
        mesh: One-dimensional.
    """
    strides = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        rows.to(mesh.device_type), mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=strides
    )


class StrategyWriter:
    """Write checkpoints in the format of the run's strategy: in shards with trainer=fsdp, else one file."""

    def __init__(self, *, asynchronous: bool = False) -> None:
        """See `SingleFileWriter`."""
        self.asynchronous = asynchronous
        self._writer: CheckpointWriter | None = None

    def write(self, trainer: pl.Trainer, path: Path, *, on_complete: Callable[[], None]) -> "Future[None]":
        """Write the checkpoint of the current step; see `CheckpointWriter`."""
        if self._writer is None:
            sharded = isinstance(trainer.strategy, ShardedStrategy)
            self._writer = (ShardedWriter if sharded else SingleFileWriter)(asynchronous=self.asynchronous)
        return self._writer.write(trainer, path, on_complete=on_complete)
