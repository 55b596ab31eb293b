"""Parts of one set, written on machines that share no folder, brought together."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from depth_anything.data.shards import open_set
from depth_anything.data.tars import ShardError, ShardInfo, ShardSet, read_shard_info
from depth_anything.disk import atomic_path, remove_stale
from depth_anything.ingest.file_list import FILE_LIST, FILE_LIST_INFO, FileList
from depth_anything.ingest.shard_job import shard_name
from depth_anything.ingest.writer import (
    ABOUT_FILE,
    SETTINGS_FILE,
    check_unclaimed,
    finish_set,
    list_missing_shards,
)
from depth_anything.progress import ProgressLine

_SIDECAR_SUFFIXES = (".skipped.json", ".pixels.json", ".idx")
_SET_FILES = (SETTINGS_FILE, ABOUT_FILE, FILE_LIST, FILE_LIST_INFO)
_CHUNK = 1 << 20
_MAX_NAMED_SHARDS = 8


def merge_parts(root: str | Path, folders: Sequence[str | Path] = ()) -> ShardSet:
    """Bring the shards of parts into one folder, linked where they can be, else copied, and finish the set.

    May be stopped and started again; the parts stay as they are. Without folders, finishes a folder that the
    parts' files were copied to.

    Args:
        root: Folder of the whole set: a new one, or that of a part.
        folders: Of the other parts.

    Raises:
        ShardError: A folder holds no part, parts were made with other settings or of other raw data, two have
            a shard in common that is not the same, one is damaged, or shards lack.
    """
    root, parts = Path(root), [Path(folder) for folder in folders]
    if (root / "manifest.json").exists() and not parts:
        return open_set(root)
    first = parts[0] if parts else root
    for part in parts or [root]:
        for name in _SET_FILES:
            if not (part / name).is_file():
                raise ShardError(
                    f"{part} holds no part of a set (it has no {name}): name folders that depth-anything shard has "
                    "written, as  depth-anything merge OUT FOLDER FOLDER …"
                )
    if not (root / SETTINGS_FILE).exists():
        check_unclaimed(root)
    for part in [root, *parts]:
        _check_part(part, first)
    root.mkdir(parents=True, exist_ok=True)
    remove_stale(root)
    for name in _SET_FILES:
        if not (root / name).exists():
            _link_or_copy(first / name, root / name)
    wanted = _plan_transfers(root, parts)
    with ProgressLine(f"merging {root}", total=len(wanted), unit="shard") as progress:
        copied = 0
        for path, info in wanted:
            copied += _transfer_shard(path, root, info)
            progress.update()
    if copied:
        print(f"{root}: {copied} shards were copied, the others linked", file=sys.stderr)
    per_shard = json.loads((root / SETTINGS_FILE).read_bytes())["per_shard"]
    listing = FileList(root, per_shard=per_shard)
    lacking = list_missing_shards(root, listing)
    if lacking:
        named = ", ".join(shard_name(shard) for shard in lacking[:_MAX_NAMED_SHARDS])
        more = " …" if len(lacking) > _MAX_NAMED_SHARDS else ""
        raise ShardError(
            f"{root}: {len(lacking)} of {listing.shards} shards lack ({named}{more}): name the folders that hold them, "
            f"or make them with  depth-anything shard {json.loads((root / SETTINGS_FILE).read_bytes())['source']} "
            f"RAW {root}"
        )
    made = finish_set(root, listing)
    assert made is not None, "no shard lacks"
    return made


def _check_part(part: Path, first: Path) -> None:
    """Hold what a folder says of its set against what the first one says."""
    for name, what in ((SETTINGS_FILE, "settings"), (FILE_LIST_INFO, "raw data"), (ABOUT_FILE, "facts")):
        if not (part / name).is_file():
            continue  # the folder of the whole, before anything was brought there
        ours, theirs = (json.loads((folder / name).read_bytes()) for folder in (first, part))
        differs = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
        if differs:
            told = ", ".join(f"{key} {theirs.get(key)} in place of {ours.get(key)}" for key in differs)
            raise ShardError(
                f"{part} is a part of another set than {first}: it was made with other {what} ({told}); "
                + (
                    "type its command again with the others' --licence and --sky, which changes no shard"
                    if name == ABOUT_FILE
                    else "leave it out, or write it again as the others were"
                )
            )


def _plan_transfers(root: Path, parts: Sequence[Path]) -> list[tuple[Path, ShardInfo | None]]:
    """List the tars to bring, and notes of shards that have none; two of one name must be the same."""
    there: dict[str, tuple[Path, ShardInfo | None]] = {}
    for part in [root, *parts]:
        names = set(os.listdir(part)) if part.is_dir() else set()
        for name in sorted(names):
            stem, dot, ending = name.partition(".")
            if name.startswith(".") or f"{dot}{ending}" not in (".tar", ".skipped.json"):
                continue
            if ending != "tar" and f"{stem}.tar" in names:
                continue
            info = read_shard_info(part / name) if ending == "tar" else None
            known = there.get(stem)
            if known is None or known[1] is None:  # notes alone may be of a shard that was never finished
                there[stem] = part / name, info
            elif info is not None and known[1] != info:
                raise ShardError(
                    f"the shard {stem} in {known[0].parent} and that in {part} are not the same: verify both, "
                    "and remove the one that is wrong"
                )
    return [row for _, row in sorted(there.items()) if row[0].parent != root]


def _transfer_shard(path: Path, root: Path, info: ShardInfo | None) -> bool:
    """Bring a shard, its notes first, so that it is seen whole or not at all; say whether it had to be copied."""
    stem = path.name.partition(".")[0]
    for ending in _SIDECAR_SUFFIXES:
        note = path.with_name(f"{stem}{ending}")
        if note.exists():
            _link_or_copy(note, root / note.name)
    return _link_or_copy(path, root / path.name, info) if info is not None else False


def _link_or_copy(path: Path, target: Path, info: ShardInfo | None = None) -> bool:
    """Link a file, or copy it where that cannot be, and say whether; a copied tar is held against its hash."""
    with atomic_path(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # another disk, or a file system without links
            digest = _copy_hashed(path, temporary)
            if info is not None and digest != info.hash:
                raise ShardError(
                    f"{path} is damaged (its hash differs)", "copy it from its machine again"
                ) from None
            return True
    return False


def _copy_hashed(path: Path, target: Path) -> str:
    """Copy a file, its bytes safe on disk when this returns; return their hash."""
    digest = hashlib.sha256()
    with open(path, "rb") as source, open(target, "xb") as file:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return f"sha256:{digest.hexdigest()}"
