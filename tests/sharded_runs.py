"""Trainings of a small student on ranks of gloo, sharded or not, for tests."""

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from tiny_training import BatchList
from torch.utils.data import DataLoader

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.sharded_files import STATE_NAME
from depth_anything.training.callbacks import StepCallback
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.ema import EMA
from depth_anything.training.fsdp import StrategyWriter
from depth_anything.training.lightning import trainer_arguments
from depth_anything.training.recipes import Recipe
from depth_anything.training.student import Student
from depth_anything.training.whole_network import evaluation_network, whole_network

STEPS, SAVED, IMAGES, SIDE = 6, 3, 4, 28


def make_student(dtype: torch.dtype = torch.float64, **changes: Any) -> Student:
    """Build a student with a frozen encoder, with fixed random weights."""
    torch.manual_seed(0)
    model, frozen = DepthAnything("vitn").to(dtype), DepthAnything("vitn").to(dtype)
    numbers: dict[str, Any] = {
        "steps": STEPS,
        "encoder_lr": 1e-3,
        "head_lr": 3e-3,
        "clip_norm": 0.5,
        "warmup": 0.3,
    }
    numbers |= {
        "alignment_weight": 1.0,
        "alignment_tolerance": 1.0,
        "weight_decay": 0.1,
        "checkpointing": True,
    }
    return Student(model, Recipe(**(numbers | changes)), frozen=frozen)


def make_batch(step: int, rank: int, ranks: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Build a rank's share of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    size = (IMAGES, SIDE, SIDE)
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
    target = torch.rand(size, generator=generator).to(dtype)
    share = slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks)
    valid = torch.ones(size, dtype=torch.bool)
    return {"image": image[share], "target": target[share], "valid": valid[share]}


class Recorder(StepCallback):
    """Records the loss of the global batch, the gradient norm and the learning rates of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: dict[int, list[float]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.rates[trainer.global_step] = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        loss = torch.stack([part["loss"].double() for part in module.parts]).mean()
        if trainer.world_size > 1:
            dist.all_reduce(loss)
        self.losses.append(float(loss) / trainer.world_size)
        assert type(module.grad_norm) is torch.Tensor
        self.norms.append(float(module.grad_norm))
        module.parts.clear()


def train(
    folder: Path,
    strategy: Any,
    *added: pl.Callback,
    rank: int = 0,
    ranks: int = 1,
    steps: int = STEPS,
    checkpoint: Path | None = None,
    precision: Any = "32-true",
    module: Student | None = None,
    accumulate: int = 1,
    accelerator: str = "cpu",
    asynchronous: bool = False,
    every: int = SAVED,
    keep: int = 2,
) -> tuple[pl.Trainer, Student]:
    """Train to `steps`, from the step of a checkpoint, and write what came out to `result-RANK.pt`."""
    begin = int(checkpoint.stem.removeprefix("step-")) if checkpoint else 0
    module = module or make_student()
    dtype = next(module.model.parameters()).dtype
    recorder, ema = Recorder(), EMA(0.5)
    writer = StrategyWriter(asynchronous=asynchronous)
    saving = Checkpoints(folder / "checkpoints", every=every, keep=keep, writer=writer)
    callbacks = [*added, recorder, ema, saving]
    arguments = trainer_arguments(callbacks=callbacks, max_steps=steps, run_dir=str(folder))
    arguments |= {"accelerator": accelerator, "devices": ranks, "strategy": strategy, "precision": precision}
    arguments["accumulate_grad_batches"] = accumulate
    trainer = pl.Trainer(**arguments)
    batches = [make_batch(step, rank, ranks, dtype) for step in range(begin, steps)]
    batches = [
        {key: value.chunk(accumulate)[number] for key, value in batch.items()}
        for batch in batches
        for number in range(accumulate)
    ]
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    trainer.fit(module, DataLoader(BatchList(batches), batch_size=None), ckpt_path=checkpoint)
    result: dict[str, Any] = {"losses": recorder.losses, "norms": recorder.norms}
    result["rates"] = list(recorder.rates.values())
    with whole_network(module):
        result["weights"] = {name: tensor.cpu().clone() for name, tensor in module.model.state_dict().items()}
    with evaluation_network(trainer, module):
        result["average"] = {name: tensor.cpu().clone() for name, tensor in module.model.state_dict().items()}
    torch.save(result, folder / f"result-{rank}.pt")
    return trainer, module


def connect(rank: int, ranks: int, folder: Path) -> None:
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), NODE_RANK="0")
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{ranks}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)


def step_path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:09d}.ckpt"


def assert_same_files(first: Path, second: Path) -> None:
    """Shards are equal in every byte, and so are position, schedule and states of callbacks."""
    names = sorted(path.name for path in first.glob("shard-*"))
    assert len(names) == 2 and names == sorted(path.name for path in second.glob("shard-*"))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    states = [torch.load(folder / STATE_NAME, weights_only=True) for folder in (first, second)]
    assert repr(states[0]) == repr(states[1])
