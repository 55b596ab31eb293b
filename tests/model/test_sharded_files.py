"""Sharded checkpoints: written by any number of ranks, read by any other, and nothing in them is executed."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from depth_anything import load_model
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.metadata import build_metadata
from depth_anything.model.sharded_files import (
    STATE_NAME,
    Piece,
    ShardedCheckpoint,
    find_sharded_damage,
    is_sharded,
    read_sharded,
    read_sharded_state,
    rows_of_rank,
    split_tensors,
    write_shard,
    write_state,
)

SHAPES = {"one": (1, 4), "few": (3,), "even": (8, 2), "odd": (7, 2, 3)}


def make_checkpoint() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    moments = {
        number: {"exp_avg": tensor + 1, "step": torch.tensor(3.0)}
        for number, tensor in enumerate(weights.values())
    }
    optimizer = {
        "state": moments,
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1, 2, 3]}],
    }
    return {
        "global_step": 3,
        "state_dict": weights,
        "optimizer_states": [optimizer],
        "buffers": [torch.arange(5)],
    }


def write(checkpoint: dict[str, Any], folder: Path, ranks: int) -> None:
    """Write a checkpoint as `ranks` ranks do; scalars and integers stay in state.ckpt."""
    folder.mkdir()
    shards = {}
    for rank in range(ranks):

        def own_rows(tensor: Tensor, rank: int = rank) -> Piece | None:
            if not tensor.is_floating_point() or not tensor.ndim:
                return None
            rows = rows_of_rank(tensor.shape[0], rank, ranks)
            return Piece(tensor[rows], rows.start, tuple(tensor.shape))

        state, pieces = split_tensors(checkpoint, own_rows)
        name, digest = write_shard(pieces, folder, rank, ranks)
        shards[name] = digest
    write_state(state, folder, shards)


def equal(first: Any, second: Any) -> bool:
    """Compare nested containers of tensors, also by their types."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_a_checkpoint_of_any_number_of_ranks_is_read_whole(tmp_path: Path, ranks: int) -> None:
    """More ranks than rows leave some shards without rows of a tensor."""
    checkpoint, folder = make_checkpoint(), tmp_path / "step.ckpt"
    write(checkpoint, folder, ranks)
    assert is_sharded(folder) and find_sharded_damage(folder) == ""
    assert len(list(folder.iterdir())) == ranks + 1
    assert equal(read_sharded(folder), checkpoint)
    assert list(read_sharded(folder, "state_dict")) == ["state_dict"]


@pytest.mark.parametrize(("written", "read"), [(2, 4), (4, 2), (2, 3), (3, 9), (9, 1)])
def test_each_rank_reads_its_rows_of_a_checkpoint_of_other_ranks(
    tmp_path: Path, written: int, read: int
) -> None:
    checkpoint, folder = make_checkpoint(), tmp_path / "step.ckpt"
    write(checkpoint, folder, written)
    source = ShardedCheckpoint(folder)
    for name, tensor in checkpoint["state_dict"].items():
        parts = [
            source.read(f"state_dict/{name}", rows_of_rank(tensor.shape[0], rank, read))
            for rank in range(read)
        ]
        assert torch.equal(torch.cat(parts), tensor)
        assert all(part.shape[1:] == tensor.shape[1:] for part in parts)


def remove_shard(folder: Path) -> None:
    (folder / "shard-00002-of-00002.safetensors").unlink()


def flip_a_byte(folder: Path) -> None:
    path = folder / "shard-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def take_shard_of_another_step(folder: Path) -> None:
    other = make_checkpoint()
    other["state_dict"]["odd"] += 1
    write(other, folder.with_name("other.ckpt"), 2)
    name = "shard-00002-of-00002.safetensors"
    (folder / name).write_bytes((folder.with_name("other.ckpt") / name).read_bytes())


def flip_a_byte_of_the_state(folder: Path) -> None:
    """In a tensor, which torch.load reads without noticing."""
    content = bytearray((folder / STATE_NAME).read_bytes())
    content[content.index(make_checkpoint()["buffers"][0].numpy().tobytes())] ^= 1
    (folder / STATE_NAME).write_bytes(content)


def list_no_shards(folder: Path) -> None:
    write_state(split_tensors(make_checkpoint(), lambda _: None)[0], folder, {})


def cut_state(folder: Path) -> None:
    content = (folder / STATE_NAME).read_bytes()
    (folder / STATE_NAME).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (remove_shard, "lacks shard-00002"),
        (flip_a_byte, "shard-00001"),
        (take_shard_of_another_step, "has shard-00002"),
        (cut_state, STATE_NAME),
        (flip_a_byte_of_the_state, STATE_NAME),
        (list_no_shards, "has no shards"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    folder = tmp_path / "step.ckpt"
    write(make_checkpoint(), folder, 2)
    damage(folder)
    assert problem in find_sharded_damage(folder)


def test_rows_that_no_shard_has_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "step.ckpt"
    write(make_checkpoint(), folder, 2)
    state = dict(read_sharded_state(folder))
    first = sorted(state["shards"])[0]
    write_state(state, folder, {first: state["shards"][first]})
    source = ShardedCheckpoint(folder)
    assert source.read("state_dict/even", slice(0, 4)).shape == (4, 2)
    with pytest.raises(ValueError, match="rows 4 to 8 of state_dict/even"):
        source.read("state_dict/even")


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, way: str) -> None:
    folder, executed = tmp_path / "step.ckpt", tmp_path / "executed"
    write(make_checkpoint(), folder, 2)
    content = {"state_dict": {}, "depth_anything": Payload(executed), "shards": {}}
    with (folder / STATE_NAME).open("wb") as file:
        torch.save(content, file) if way == "torch" else pickle.dump(content, file, protocol=2)
    with pytest.raises(ValueError):
        load_model(folder)
    with pytest.raises(pickle.UnpicklingError):
        ShardedCheckpoint(folder)
    assert not executed.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/shard-00001-of-00001.safetensors", "x"])
def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "step.ckpt"
    write(make_checkpoint(), folder, 1)
    write_state({"state_dict": {}}, folder, {name: ""})
    assert repr(name) in find_sharded_damage(folder)
    with pytest.raises(ValueError):
        ShardedCheckpoint(folder)


def test_load_model_reads_a_sharded_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, folder = DepthAnything("vitn", max_depth=20.0), tmp_path / "step-000000003.ckpt"
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write({"state_dict": weights, "depth_anything": build_metadata(model)}, folder, 2)
    loaded = load_model(folder)
    assert (loaded.encoder, loaded.max_depth) == ("vitn", 20.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    flip_a_byte(folder)
    with pytest.raises(ValueError, match=r"step-000000003\.ckpt is damaged .*shard-00001"):
        load_model(folder)
