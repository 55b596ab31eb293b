"""Writing a set shard by shard: it may be killed at any instant, started again, raced by other processes."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from depth_anything.data.shards import ShardInfo, ShardSet, index_shard, open_set, write_manifest, write_shard
from depth_anything.data.sources.source import Refused
from depth_anything.data.tars import write_atomically

Record = tuple[str, dict[str, bytes]]
Skipped = list[tuple[str, str]]  # name of a file, and why it is not in the set

_NAMED = 100  # skipped files that the manifest names; NAME.skipped.json has them all


def write_set(
    root: str | Path,
    *,
    name: str | None,
    settings: Mapping[str, Any],
    meta: Mapping[str, Any],
    count: int,
    per_shard: int,
    record: Callable[[str, int], Record],
) -> ShardSet:
    """Write a set, or what is missing of it; a complete one of the same settings is returned as it is.

    Shard k holds the numbers [k * per_shard, (k + 1) * per_shard) less those that `record` refuses, so that
    every shard can be made alone and comes out the same whoever makes it.

    Args:
        root: Folder, made if need be.
        name: Of the set; None: the folder's.
        settings: JSON that decides the bytes; kept from the first moment in settings.json, compared later.
        meta: More JSON for the manifest.
        count: Numbers to go through.
        per_shard: Numbers a shard.
        record: Makes record `number` of the shard <set>/<shard>, its key included; Refused leaves it out.

    Raises:
        ValueError: If the folder holds another set, the name cannot name a set, or every number was refused.
    """
    root = Path(root)
    name = name or root.resolve().name
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise ValueError(f'"{name}" cannot name a set: use A-Z a-z 0-9 _ -, or type another name')
    if count < 1 or per_shard < 1:
        raise ValueError(f"count={count} per_shard={per_shard}: both must be 1 or more")
    settings = {**settings, "name": name, "count": count, "per_shard": per_shard}
    _claim(root, settings)
    if (root / "manifest.json").exists():
        return _licensed(open_set(root), meta.get("licence"))
    shards, skipped = [], []
    with tqdm(total=count, desc=f"writing {root}", unit="image", disable=None) as bar:
        for k, start in enumerate(range(0, count, per_shard)):
            numbers = range(start, min(start + per_shard, count))
            info, left_out = _write_one(root / f"{k:05d}.tar", name, numbers, record, bar)
            shards += [info] if info else []
            skipped += left_out
    if not shards:
        why = "; ".join(f"{file}: {reason}" for file, reason in skipped[:3])
        raise ValueError(f"{root}: none of {count} files is an image that can be read ({why})")
    meta = {**meta, "settings": settings}
    if skipped:
        reasons = Counter(reason for _, reason in skipped)
        named = [list(row) for row in skipped[:_NAMED]]
        meta["skipped"] = {"count": len(skipped), "reasons": dict(reasons), "files": named}
    return write_manifest(root, name=name, shards=shards, meta=meta)


def _licensed(made: ShardSet, licence: str | None) -> ShardSet:
    """Note the licence in the manifest of a set that was written before it was known; no shard changes."""
    if licence in (None, made.meta.get("licence")):
        return made
    return write_manifest(
        made.root, name=made.name, shards=made.shards, meta={**made.meta, "licence": licence}
    )


def _claim(root: Path, settings: Mapping[str, Any]) -> None:
    """Say in the folder what is being written there, or find that it is something else."""
    path = root / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True)
    if path.exists():
        theirs, ours = json.loads(path.read_text()), json.loads(text)
        keys = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if keys:
            differs = ", ".join(f"{key} {theirs.get(key)} in place of {ours.get(key)}" for key in keys)
            raise ValueError(
                f"{root} holds a set made with other settings ({differs}): "
                f"name another folder, or remove it with  rm -r {root}"
            )
        return
    if (root / "manifest.json").exists() or any(root.glob("*.tar")):
        raise ValueError(f"{root} holds shards from elsewhere: name another folder")
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _write_one(
    path: Path, name: str, numbers: range, record: Callable[[str, int], Record], bar: tqdm
) -> tuple[ShardInfo | None, Skipped]:
    """Write one shard unless it is there; None if every number of it was refused."""
    notes = path.with_suffix(".skipped.json")
    if not path.exists() and not (notes.exists() and len(json.loads(notes.read_text())) == len(numbers)):
        made = _records(notes, f"{name}/{path.stem}", numbers, record, bar)
        first = next(made, None)
        if first is not None:
            write_shard(path, chain([first], made))
    else:
        bar.update(len(numbers))
    info = index_shard(path) if path.exists() else None
    return info, [tuple(row) for row in json.loads(notes.read_text())] if notes.exists() else []


def _records(
    notes: Path, prefix: str, numbers: range, record: Callable[[str, int], Record], bar: tqdm
) -> Iterator[Record]:
    """Make the records of a shard; what was left out is noted before the shard can be seen."""
    skipped: Skipped = []
    for number in numbers:
        try:
            yield record(prefix, number)
        except Refused as refusal:
            skipped.append((refusal.name, refusal.reason))
        bar.update()
    if skipped:
        write_atomically(notes, json.dumps(skipped, ensure_ascii=False, indent=1).encode())
