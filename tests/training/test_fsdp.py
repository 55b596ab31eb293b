"""trainer=fsdp on processes of gloo: what DDP and a plain loop compute, checkpoints for any number of ranks, resume."""

import errno
import os
import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from fork_server import ForkServer
from made_configs import make_config
from pytorch_lightning.strategies import DDPStrategy
from saved_runs import TIMEOUT_S, AtStep
from sharded_runs import (
    SAVED,
    STEPS,
    assert_same_files,
    connect,
    make_batch,
    make_student,
    step_path,
    train,
)
from torch import nn
from torch.distributed.tensor import DTensor

from depth_anything import load_model
from depth_anything.disk import WriteError
from depth_anything.errors import UserError
from depth_anything.model.sharded_files import find_sharded_damage, is_sharded
from depth_anything.training import sharded_writer
from depth_anything.training.fsdp import ShardedStrategy
from depth_anything.training.lightning import join_process_group, start_run
from depth_anything.training.run_dir import RunDir
from depth_anything.training.student import Student

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("one_thread")]
LONG = 10
EXACT: Any = {"rtol": 0, "atol": 1e-9}  # in float64, where sums in another order do not grow to more


def _two(rank: int, folder: str) -> None:
    """DDP, FSDP2, FSDP2 resumed, and a disk that fails on one rank."""
    root = Path(folder)
    connect(rank, 2, root)
    own: dict[str, Any] = {"rank": rank, "ranks": 2}
    train(root / "ddp", DDPStrategy(), **own)
    check_ranks_connect_without_a_network()
    check_nodes_share_a_folder(root, rank)
    trainer, module = train(root / "fsdp", ShardedStrategy(), **own)
    check_sharding(module)
    train(root / "accumulated", ShardedStrategy(), accumulate=2, keep=1, **own)
    train_in_background(root / "background", own)
    copied = step_path(root / "resumed", SAVED)
    if rank == 0:
        shutil.copytree(step_path(root / "fsdp", SAVED), copied)
    dist.barrier()
    train(root / "resumed", ShardedStrategy(), checkpoint=copied, **own)
    train(root / "from-file", ShardedStrategy(), checkpoint=step_path(root / "ddp", SAVED), **own)
    train_in_float32(root / "float32-2", own)
    check_failing_disk(trainer, root, rank)
    dist.destroy_process_group()


def train_in_float32(root: Path, own: dict[str, Any], **rates: float) -> None:
    for name, strategy in (("ddp", DDPStrategy()), ("fsdp", ShardedStrategy())):
        module = make_student(torch.float32, steps=LONG, **rates)
        train(root / name, strategy, module=module, steps=LONG, every=LONG, **own)


def train_in_background(folder: Path, own: dict[str, Any]) -> None:
    """Write the first checkpoint only after the weights have changed."""
    later, original = threading.Event(), sharded_writer.write_shard

    def wait_and_write(*arguments: Any) -> Any:
        assert later.wait(TIMEOUT_S) and threading.current_thread() is not threading.main_thread()
        return original(*arguments)

    sharded_writer.write_shard = wait_and_write
    train(folder, ShardedStrategy(), AtStep(later.set, SAVED + 1), asynchronous=True, **own)
    sharded_writer.write_shard = original


def check_ranks_connect_without_a_network() -> None:
    """Ranks of torchrun and Slurm compare their folders before there is a network."""
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=ShardedStrategy(), logger=False)
    join_process_group(trainer)
    assert trainer.world_size == 2 and trainer.global_rank == dist.get_rank()


def check_nodes_share_a_folder(root: Path, rank: int) -> None:
    """A node that works in a folder of its own, as in a local copy of an object store, is told at the start."""
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=ShardedStrategy(), logger=False)
    config = make_config("stage=teacher", "trainer=fsdp")
    assert start_run(trainer, RunDir(root / "shared"), config) is None
    for run_dir, key in (("s3://bucket/name", "mirror.folder"), ("outputs/name", "output_dir")):
        own = root / f"node-{rank}" / key
        with pytest.raises(UserError, match=rf"(?s)rank 1 .*node-0.*{key}="):
            start_run(trainer, RunDir(own), replace(config, run_dir=run_dir))
    dist.barrier()
    assert not list(root.glob("*/**/.tmp*"))


def check_sharding(module: Student) -> None:
    """Every parameter is sharded: of the network, in its own dtype, and of the frozen encoder."""
    for network in (module.model, module._frozen[0]):
        parameters = list(network.parameters())
        assert all(isinstance(p, DTensor) and p.dtype == torch.float64 for p in parameters)
        rows = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor) and p.shape[0] > 1)
        assert rows == pytest.approx(sum(p.numel() for p in parameters if p.shape[0] > 1) / 2, rel=0.01)
    fully_sharded = [name for name, part in module.model.named_modules() if isinstance(part, fsdp_module())]
    blocks = [f"pretrained.blocks.{n}" for n in range(len(module.model.pretrained.blocks))]
    assert sorted(fully_sharded) == sorted(["", "depth_head", *blocks])


def fsdp_module() -> type:
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule


def check_failing_disk(trainer: pl.Trainer, root: Path, rank: int) -> None:
    """All ranks raise the error of one that cannot write or reads other bytes back, and leave nothing behind."""

    def fail(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flip_a_bit(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    faults = [("write_shard", fail, os.strerror(errno.ENOSPC)), ("flush_to_disk", flip_a_bit, "read back")]
    for name, faulty, words in faults:
        original = getattr(sharded_writer, name)
        setattr(sharded_writer, name, faulty if rank == 1 else original)
        with pytest.raises(WriteError, match=rf"failed\.ckpt .*{words}"):
            trainer.save_checkpoint(root / "failed.ckpt")
        setattr(sharded_writer, name, original)
        dist.barrier()
        assert not list(root.glob("*failed*")) and not list(root.glob(".tmp*"))


def _four(rank: int, folder: str) -> None:
    root = Path(folder)
    connect(rank, 4, root)
    train(root / "four", ShardedStrategy(), rank=rank, ranks=4)
    checkpoint = step_path(root / "fsdp", SAVED)
    train(root / "two-to-four", ShardedStrategy(), rank=rank, ranks=4, checkpoint=checkpoint)
    train_in_float32(root / "float32-4", {"rank": rank, "ranks": 4}, encoder_lr=5e-4, head_lr=5e-4)
    dist.destroy_process_group()


def plain_loop() -> dict[str, Any]:
    """Train on whole batches in one process, without Lightning and the project's optimizer code."""
    module = make_student()
    model, r = module.model, module.recipe
    encoder, head = model.encoder_parameters(), model.head_parameters()
    groups = [{"params": encoder, "lr": r.encoder_lr}, {"params": head, "lr": r.head_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=r.weight_decay)
    result: dict[str, Any] = {"losses": [], "norms": [], "rates": []}
    mean: list[torch.Tensor] = []
    for step in range(STEPS):
        climb = round(r.warmup * STEPS)
        factor = (step + 1) / (climb + 1) if step < climb else 1 - (step - climb) / (STEPS - climb)
        for group, rate in zip(optimizer.param_groups, (r.encoder_lr, r.head_lr), strict=True):
            group["lr"] = rate * factor
        loss = module.losses(make_batch(step, 0, 1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in (*encoder, *head) if p.grad is not None]
        norm = torch.cat([g.flatten() for g in gradients]).square().sum().sqrt()
        assert r.clip_norm is not None
        for gradient in gradients:
            gradient *= min(1.0, r.clip_norm / (float(norm) + 1e-6))
        optimizer.step()
        result["losses"].append(loss.item())
        result["norms"].append(norm.item())
        result["rates"].append([group["lr"] for group in optimizer.param_groups])
        weights = [p.detach().float().clone() for p in (*encoder, *head)]
        mean = [0.5 * m + 0.5 * w for m, w in zip(mean, weights, strict=True)] if mean else weights
    state = model.state_dict()
    result["weights"] = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter, value in zip((*encoder, *head), mean, strict=True):
            parameter.copy_(value)
    result["average"] = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """Folder of the runs of two and of four ranks."""
    folder = tmp_path_factory.mktemp("runs")
    fork_server.run_ranks(__file__, "_two", str(folder))
    fork_server.run_ranks(__file__, "_four", str(folder), count=4)
    return folder


def result_of(folder: Path, rank: int = 0) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(folder / f"result-{rank}.pt", weights_only=True)
    return result


def assert_same(got: dict[str, Any], wanted: dict[str, Any], *, steps: int = STEPS) -> None:
    for key in ("losses", "norms", "rates"):
        torch.testing.assert_close(
            torch.tensor(got[key]), torch.tensor(wanted[key][-steps:]), **EXACT, msg=key
        )
    for key, tolerance in (("weights", 1e-9), ("average", 1e-6)):
        for name, tensor in got[key].items():
            torch.testing.assert_close(tensor, wanted[key][name], rtol=0, atol=tolerance, msg=f"{key} {name}")


@pytest.mark.parametrize(("name", "ranks"), [("ddp", 2), ("fsdp", 2), ("accumulated", 2), ("four", 4)])
def test_losses_norms_and_weights_equal_those_of_a_plain_loop(runs: Path, name: str, ranks: int) -> None:
    """With a frozen encoder, clipped gradients, two learning rates and an average, on each rank."""
    plain = plain_loop()
    assert max(plain["norms"]) > 0.5 and len(set(plain["losses"])) == STEPS
    for rank in range(ranks):
        assert_same(result_of(runs / name, rank), plain)


def test_float32_weights_equal_those_of_ddp_in_every_bit(runs: Path) -> None:
    """After ten steps at rates of 1e-3 and 3e-3, with gradients that are clipped at each step, on two ranks."""
    ddp, fsdp = (result_of(runs / "float32-2" / name) for name in ("ddp", "fsdp"))
    assert len(set(ddp["losses"])) == LONG and min(ddp["norms"]) > 0.5
    assert fsdp["losses"] == ddp["losses"] and fsdp["norms"] == ddp["norms"]
    assert all(torch.equal(tensor, ddp["weights"][name]) for name, tensor in fsdp["weights"].items())


def test_float32_losses_equal_those_of_ddp_on_four_ranks(runs: Path) -> None:
    """At the rates of size=tiny. gloo adds four gradients in another order for DDP than for shards, so bits differ."""
    ddp, fsdp = (result_of(runs / "float32-4" / name) for name in ("ddp", "fsdp"))
    np.testing.assert_allclose(fsdp["losses"], ddp["losses"], rtol=0, atol=1e-5)


def test_older_folders_are_removed(runs: Path) -> None:
    assert [path.name for path in (runs / "accumulated" / "checkpoints").iterdir()] == [
        f"step-{STEPS:09d}.ckpt"
    ]


@pytest.mark.parametrize(("name", "of"), [("two-to-four", "fsdp"), ("from-file", "ddp")])
def test_a_checkpoint_continues_on_other_ranks_and_in_shards(runs: Path, name: str, of: str) -> None:
    assert_same(result_of(runs / name), result_of(runs / of), steps=STEPS - SAVED)


def test_a_resumed_run_equals_the_unbroken_one_in_every_bit(runs: Path) -> None:
    resumed, unbroken = result_of(runs / "resumed"), result_of(runs / "fsdp")
    assert resumed["losses"] == unbroken["losses"][SAVED:] and resumed["rates"] == unbroken["rates"][SAVED:]
    for key in ("weights", "average"):
        assert all(torch.equal(tensor, unbroken[key][name]) for name, tensor in resumed[key].items())
    assert_same_files(step_path(runs / "resumed", STEPS), step_path(runs / "fsdp", STEPS))


def test_a_checkpoint_written_in_the_background_is_the_same(runs: Path) -> None:
    """The state of its step, although training went on."""
    for step in (SAVED, STEPS):
        assert_same_files(step_path(runs / "background", step), step_path(runs / "fsdp", step))


def test_a_sharded_checkpoint_continues_in_one_process_without_shards(runs: Path, tmp_path: Path) -> None:
    train(tmp_path, "auto", checkpoint=step_path(runs / "fsdp", SAVED))
    assert_same(result_of(tmp_path), result_of(runs / "fsdp"), steps=STEPS - SAVED)
    assert step_path(tmp_path, STEPS).is_file()


@pytest.mark.parametrize("name", ["fsdp", "four"])
def test_load_model_reads_a_sharded_checkpoint(runs: Path, name: str) -> None:
    path = step_path(runs / name, STEPS)
    assert is_sharded(path) and find_sharded_damage(path) == ""
    loaded = load_model(path).state_dict()
    for key, tensor in result_of(runs / name)["weights"].items():
        assert torch.equal(loaded[key], tensor.float()), key


def _mixed(rank: int, folder: str) -> None:
    """Two steps in bf16-mixed with DDP and FSDP2, and compiled."""
    root = Path(folder)
    connect(rank, 2, root)
    torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]  # inductor takes a minute
    own: dict[str, Any] = {"rank": rank, "ranks": 2, "steps": 2, "precision": "bf16-mixed"}
    train(root / "ddp", DDPStrategy(), module=make_student(torch.float32), **own)
    for name, compile in (("fsdp", False), ("compiled", True)):
        module = make_student(torch.float32, compile=compile)
        trainer, _ = train(root / name, ShardedStrategy(), module=module, **own)
        check_float32(trainer, module)
    dist.destroy_process_group()


def check_float32(trainer: pl.Trainer, module: Student) -> None:
    """The optimizer has weights and moments in float32."""
    assert all(p.dtype == torch.float32 for p in module.parameters())
    states = trainer.optimizers[0].state.values()
    assert states and all(state["exp_avg"].dtype == torch.float32 for state in states)


def test_mixed_precision_trains_float32_weights(tmp_path: Path, fork_server: ForkServer) -> None:
    """Compiled or not, with the losses of DDP; bfloat16 has three digits."""
    fork_server.run_ranks(__file__, "_mixed", str(tmp_path))
    results = {name: result_of(tmp_path / name) for name in ("ddp", "fsdp", "compiled")}
    for name in ("fsdp", "compiled"):
        torch.testing.assert_close(results[name]["losses"], results["ddp"]["losses"], rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_a_plain_loop(tmp_path: Path, fork_server: ForkServer) -> None:
    """As on processes of gloo, in float64; in bf16-mixed blocks are gathered in bfloat16."""
    fork_server.run_ranks(__file__, "_gpus", str(tmp_path))
    losses = {name: result_of(tmp_path / name)["losses"] for name in ("exact", "mixed")}
    for name, tolerance in (("exact", 1e-5), ("mixed", 2e-2)):
        torch.testing.assert_close(losses[name], plain_loop()["losses"], rtol=0, atol=tolerance)
    assert load_model(step_path(tmp_path / "exact", STEPS)).encoder == "vitn"


def _gpus(rank: int, folder: str) -> None:
    root, device = Path(folder), torch.device("cuda", rank)
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0")
    meet = f"file://{root}/meet"
    dist.init_process_group("nccl", init_method=meet, rank=rank, world_size=2, device_id=device)
    own: dict[str, Any] = {"rank": rank, "ranks": 2, "accelerator": "gpu"}
    train(root / "exact", ShardedStrategy(), **own)
    module, seen = make_student(torch.float32), set()

    def record(linear: nn.Linear, *_: Any) -> None:
        seen.add(linear.weight.dtype)

    module.model.pretrained.blocks[0].mlp.fc1.register_forward_pre_hook(record)
    trainer, _ = train(root / "mixed", ShardedStrategy(), module=module, precision="bf16-mixed", **own)
    check_float32(trainer, module)
    assert torch.bfloat16 in seen
    dist.destroy_process_group()
