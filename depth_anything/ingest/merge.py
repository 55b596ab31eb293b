"""Merge parts of a set that were written to several folders."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from depth_anything.data.address import is_remote
from depth_anything.data.shards import open_set
from depth_anything.data.store import FolderStore
from depth_anything.data.tars import ShardError, ShardInfo, ShardSet, read_shard_info
from depth_anything.disk import atomic_path, remove_stale
from depth_anything.ingest.file_list import FILE_LIST, FILE_LIST_INFO, FileList
from depth_anything.ingest.shard_job import shard_name
from depth_anything.ingest.writer import (
    ABOUT_FILE,
    SETTINGS_FILE,
    SIDECAR_SUFFIXES,
    check_unclaimed,
    describe_differences,
    finish_set,
    list_missing_shards,
)
from depth_anything.progress import ProgressLine

_SET_FILES = (SETTINGS_FILE, ABOUT_FILE, FILE_LIST, FILE_LIST_INFO)
_CHUNK = 1 << 20
_MAX_NAMED_SHARDS = 8


def merge_parts(root: str | Path, folders: Sequence[str | Path] = ()) -> ShardSet:
    """Merge the shards of several parts into one folder and finish the set.

    Shards are hard-linked where possible, else copied. The parts stay unchanged. An interrupted merge can be started
    again. Without `folders`, finishes a folder into which the files of the parts were copied.

    Args:
        root: Folder of the whole set: a new folder, or that of a part.
        folders: Folders of the other parts.

    Raises:
        ShardError: A folder holds no part, parts have other settings or other raw data, two parts have different
            shards of one name, a part is damaged, or shards are missing.
    """
    for place in (root, *folders):
        if is_remote(str(place)):
            raise ShardError(
                f"{place} is not a folder, and only folders are merged",
                "write all parts of the set to one address with --part; the last one finishes it",
            )
    root, parts = Path(root), [Path(folder) for folder in folders]
    if (root / "manifest.json").exists() and not parts:
        return open_set(root)
    first = parts[0] if parts else root
    for part in parts or [root]:
        for name in _SET_FILES:
            if not (part / name).is_file():
                raise ShardError(
                    f"{part} does not hold a part of a set (it has no {name})",
                    "name folders of depth-anything shard, as in  depth-anything merge OUT FOLDER FOLDER …",
                )
    if not (root / SETTINGS_FILE).exists():
        check_unclaimed(FolderStore(root))
    for part in [root, *parts]:
        _check_same_set(part, first)
    root.mkdir(parents=True, exist_ok=True)
    remove_stale(root)
    for name in _SET_FILES:
        if not (root / name).exists():
            _link_or_copy(first / name, root / name)
    transfers = _plan_transfers(root, parts)
    copied = 0
    with ProgressLine(f"merging {root}", total=len(transfers), unit="shard") as progress:
        for path, info in transfers:
            copied += _transfer_shard(path, root, info)
            progress.update()
    if copied:
        print(f"{root}: {copied} shards were copied, the others linked", file=sys.stderr)
    settings = json.loads((root / SETTINGS_FILE).read_bytes())
    file_list = FileList(root, per_shard=settings["per_shard"])
    missing = list_missing_shards(FolderStore(root), file_list)
    if missing:
        names = ", ".join(shard_name(shard) for shard in missing[:_MAX_NAMED_SHARDS])
        more = " …" if len(missing) > _MAX_NAMED_SHARDS else ""
        raise ShardError(
            f"{root}: {len(missing)} of {file_list.shards} shards are missing ({names}{more})",
            f"name the folders that hold them, or type  depth-anything shard {settings['source']} RAW {root}",
        )
    merged = finish_set(FolderStore(root), file_list)
    assert merged is not None, "no shard is missing"
    return merged


def _check_same_set(part: Path, first: Path) -> None:
    """Raise ShardError if two folders hold parts of different sets."""
    for name, content in ((SETTINGS_FILE, "settings"), (FILE_LIST_INFO, "raw data"), (ABOUT_FILE, "facts")):
        if not (part / name).is_file():
            continue  # the folder of the whole set, still empty
        expected, found = (json.loads((folder / name).read_bytes()) for folder in (first, part))
        differences = describe_differences(found, expected)
        if differences:
            if name == ABOUT_FILE:
                advice = "type its command again with the --licence and --sky of the others; no shard changes"
            else:
                advice = "leave it out, or write it again like the others"
            raise ShardError(
                f"{part} is a part of another set than {first}: it was written with other {content} ({differences})",
                advice,
            )


def _plan_transfers(root: Path, parts: Sequence[Path]) -> list[tuple[Path, ShardInfo | None]]:
    """List the tars to transfer, and the notes of shards without a tar. Shards of one name must be equal."""
    found: dict[str, tuple[Path, ShardInfo | None]] = {}
    for part in [root, *parts]:
        names = set(os.listdir(part)) if part.is_dir() else set()
        for name in sorted(names):
            stem, dot, suffix = name.partition(".")
            if name.startswith(".") or f"{dot}{suffix}" not in (".tar", ".skipped.json"):
                continue
            if suffix != "tar" and f"{stem}.tar" in names:
                continue
            info = read_shard_info(part / name) if suffix == "tar" else None
            known = found.get(stem)
            if known is None or known[1] is None:  # notes without a tar may belong to an unfinished shard
                found[stem] = part / name, info
            elif info is not None and known[1] != info:
                raise ShardError(
                    f"the shard {stem} in {known[0].parent} differs from that in {part}",
                    "verify both, and remove the damaged one",
                )
    return [row for _, row in sorted(found.items()) if row[0].parent != root]


def _transfer_shard(path: Path, root: Path, info: ShardInfo | None) -> bool:
    """Transfer a shard, its notes before the tar; return whether the tar had to be copied."""
    stem = path.name.partition(".")[0]
    for suffix in SIDECAR_SUFFIXES:
        note = path.with_name(f"{stem}{suffix}")
        if note.exists():
            _link_or_copy(note, root / note.name)
    return _link_or_copy(path, root / path.name, info) if info is not None else False


def _link_or_copy(path: Path, target: Path, info: ShardInfo | None = None) -> bool:
    """Hard-link a file, or copy it if that fails, checking the hash of a tar; return whether it was copied."""
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
    """Copy a file, sync it to disk, and return its hash."""
    digest = hashlib.sha256()
    with open(path, "rb") as source, open(target, "xb") as file:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return f"sha256:{digest.hexdigest()}"
