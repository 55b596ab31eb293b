"""Checkpoints in pieces: a folder with one safetensors file per rank, and a file with everything else.

A rank writes only the rows of each tensor that it holds, and reads only the rows that it needs, so a checkpoint that
was written by any number of ranks is read by any other number. The folder of N ranks holds

- `shard-00001-of-0000N.safetensors` …: rows of tensors, under the tensor's place in the checkpoint,
- `state.ckpt`: the checkpoint as `torch.save` writes it, with a reference in place of each tensor that is in the
  shards, and the digests of all shards.

Nothing in it is executed on reading: safetensors holds no code, and state.ckpt is read with `weights_only=True`.
torch.distributed.checkpoint describes its pieces in a pickle that it reads without such a restriction.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from depth_anything.errors import UserError, error_reason
from depth_anything.model.integrity import DIGEST_KEY, find_damage, save_with_digest
from depth_anything.model.tensor_files import SUPPORTED_FORMATS, save_safetensors, select_tensors

STATE_NAME = "state.ckpt"
_ROWS_KEY = "rows"
_REFERENCE_KEY = "tensor in the shards"
_SHARDS_KEY = "shards"
_SHARD_NAME = re.compile(r"shard-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor: what one rank holds of it.

    Attributes:
        tensor: (R, …), the rows; R may be 0.
        first: Number of the first row in the whole tensor.
        shape: Shape of the whole tensor, which has (R', …).
    """

    tensor: Tensor
    first: int
    shape: tuple[int, ...]


def rows_of_rank(total: int, rank: int, ranks: int) -> slice:
    """Return the rows of a tensor that a rank holds: equal chunks, the last of which may be shorter or empty.

    >>> [rows_of_rank(5, rank, 4) for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    >>> rows_of_rank(4, 1, 2)
    slice(2, 4, None)
    """
    size = -(-total // ranks)
    return slice(min(rank * size, total), min((rank + 1) * size, total))


def is_sharded(path: Path) -> bool:
    """Return whether a path is the folder of a sharded checkpoint."""
    return (path / STATE_NAME).is_file()


def write_shard(pieces: Mapping[str, Piece], folder: Path, rank: int, ranks: int) -> tuple[str, str]:
    """Write the pieces of a rank into the folder of a checkpoint.

    Args:
        pieces: Place in the checkpoint to piece; the same places on all ranks.
        folder: An existing folder.
        rank: From 0.
        ranks: How many write.

    Returns:
        The name of the file, and its digest.
    """
    path = folder / f"shard-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    rows = {name: [piece.first, *piece.shape] for name, piece in pieces.items()}
    tensors = {name: piece.tensor.contiguous() for name, piece in pieces.items()}
    save_safetensors(tensors, path, {_ROWS_KEY: json.dumps(rows, sort_keys=True)})
    return path.name, _digest(path)


def write_state(state: Mapping[str, Any], folder: Path, shards: Mapping[str, str]) -> None:
    """Write the rest of a checkpoint, after all shards.

    Args:
        state: The checkpoint with references, from `split_tensors`.
        folder: The folder with the shards.
        shards: Name to digest of each, from `write_shard`.
    """
    save_with_digest({**state, _SHARDS_KEY: dict(shards)}, folder / STATE_NAME)


def split_tensors(
    content: Any, select: Callable[[Tensor], Piece | None], *, place: str = ""
) -> tuple[Any, dict[str, Piece]]:
    """Replace tensors in nested dictionaries, lists and tuples by references.

    Args:
        content: A checkpoint.
        select: Returns the piece of a tensor; None leaves the tensor where it is.
        place: Keys down to `content`, joined by "/".

    Returns:
        The content with references, and the piece of each place.
    """
    if isinstance(content, Tensor):
        piece = select(content)
        return (content, {}) if piece is None else ({_REFERENCE_KEY: place}, {place: piece})
    if not isinstance(content, (Mapping, list, tuple)):
        return content, {}
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    split = {
        key: split_tensors(value, select, place=f"{place}/{key}" if place else str(key))
        for key, value in items
    }
    pieces = {name: piece for _, found in split.values() for name, piece in found.items()}
    if not pieces:
        return content, {}
    replaced = {key: value for key, (value, _) in split.items()}
    return (replaced if isinstance(content, Mapping) else type(content)(replaced.values())), pieces


class ShardedCheckpoint:
    """A sharded checkpoint that is open for reading.

    Attributes:
        state: The checkpoint with references in place of tensors.
        shapes: Place of each of these tensors in the checkpoint to its shape.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files of a checkpoint; tensors are read later.

        Raises:
            ValueError: If a file is missing, of another checkpoint or no such file.
        """
        self.state: dict[str, Any] = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
        shards = self.state.pop(_SHARDS_KEY)
        if problem := _find_foreign_shard(folder, shards):
            raise ValueError(f"{folder} {problem}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, Any]]] = {}
        for name in sorted(shards):
            file = safe_open(folder / name, framework="pt")
            for tensor, (first, *shape) in json.loads(file.metadata()[_ROWS_KEY]).items():
                self._pieces.setdefault(tensor, []).append((first, file))
                self.shapes[tensor] = tuple(shape)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor from the shards, all of it or some of its rows.

        Args:
            name: Its place in the checkpoint.
            rows: The wanted rows, with start and stop; None for all.

        Raises:
            ValueError: If rows are missing.
        """
        start, stop = (0, self.shapes[name][0]) if rows is None else (rows.start, rows.stop)
        parts: list[Tensor] = []
        for first, file in sorted(self._pieces[name], key=lambda piece: piece[0]):
            saved = file.get_slice(name)
            end = min(stop, first + saved.get_shape()[0])
            if first <= start < end:
                parts.append(saved[start - first : end - first])
                start = end
        if start != stop:
            raise ValueError(f"rows {start} to {stop} of {name} are in no shard")
        return torch.cat(parts) if parts else self._pieces[name][0][1].get_tensor(name)[:0]

    def fill(self, content: Any, read: Callable[[str], Tensor]) -> Any:
        """Replace the references in a part of `state` by what `read` returns for their names."""
        if isinstance(content, Mapping):
            if content.keys() == {_REFERENCE_KEY}:
                return read(content[_REFERENCE_KEY])
            return {key: self.fill(value, read) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return type(content)(self.fill(value, read) for value in content)
        return content


def read_sharded(folder: Path, *keys: str) -> dict[str, Any]:
    """Read a sharded checkpoint as the single file of the same run would be read.

    Args:
        folder: The checkpoint.
        keys: Keys whose tensors are read; the others are left out. None of them: everything.

    Raises:
        ValueError: As `ShardedCheckpoint`.
    """
    source = ShardedCheckpoint(folder)
    state = {key: value for key, value in source.state.items() if not keys or key in keys}
    filled: dict[str, Any] = source.fill(state, source.read)
    return filled


def read_sharded_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the metadata of the model in a sharded checkpoint, as `read_tensors` does of a file.

    Raises:
        ValueError: If it is damaged, of another kind, or contains code.
    """
    if damage := find_sharded_damage(folder):
        raise UserError(
            f"{folder} is damaged or cut short ({damage})", "fetch it again, or give another copy"
        )
    try:
        content = read_sharded(folder, "state_dict", "depth_anything")
        weights, metadata = content["state_dict"], dict(content["depth_anything"])
    except Exception as error:  # hostile files can end the readers anywhere
        raise UserError(
            f"{folder} is no checkpoint of a model ({error_reason(error)})", SUPPORTED_FORMATS
        ) from error
    return select_tensors(weights, metadata, folder), metadata


def read_sharded_state(folder: Path) -> dict[str, Any]:
    """Read a sharded checkpoint without its sharded tensors, in whose places are references."""
    state: dict[str, Any] = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
    return state


def find_sharded_damage(folder: Path) -> str:
    """Return what is wrong with the files of a sharded checkpoint; "" if they are as they were written.

    Raises:
        OSError: If a file cannot be read now, which is not damage.
    """
    if damage := find_damage(folder / STATE_NAME):
        return f"{STATE_NAME}: {damage}"
    try:
        shards = read_sharded_state(folder)[_SHARDS_KEY]
    except Exception as error:  # torch.load raises many types for files of other formats
        return f"{STATE_NAME}: {type(error).__name__}"
    if problem := _find_foreign_shard(folder, shards):
        return problem
    for name in shards:
        if damage := find_damage(folder / name):
            return f"{name}: {damage}"
    return ""


def _find_foreign_shard(folder: Path, shards: Mapping[str, str]) -> str:
    """Return which shard is missing or was written with another checkpoint, as the end of a message."""
    for name, digest in shards.items():
        if not _SHARD_NAME.fullmatch(name):  # state.ckpt may come from anyone
            return f"names a shard {name!r}"
        if not (folder / name).is_file():
            return f"lacks {name}"
        if _digest(folder / name) != digest:
            return f"has {name} of another checkpoint"
    return "" if shards else "has no shards"


def _digest(path: Path) -> str:
    """Return the digest that a safetensors file says of itself; "" if it says none."""
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get(DIGEST_KEY, ""))
    except Exception:  # a damaged file can end the reader anywhere
        return ""
