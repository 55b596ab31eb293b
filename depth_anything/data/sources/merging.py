"""Parts of one set, written on machines that share no folder, brought together."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from depth_anything.data.progress import Progress
from depth_anything.data.shards import ShardError, ShardInfo, ShardSet, open_set
from depth_anything.data.sources.listing import ABOUT_LISTING, LISTING, Listing
from depth_anything.data.sources.making import shard_name
from depth_anything.data.sources.writing import ABOUT, SETTINGS, check_free, finish, missing_shards
from depth_anything.data.tars import info_of, remove_stale, temporary_name

_NOTES = (".skipped.json", ".pixels.json", ".idx")
_HEAD = (SETTINGS, ABOUT, LISTING, ABOUT_LISTING)
_CHUNK = 1 << 20
_NAMED = 8


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
        for name in _HEAD:
            if not (part / name).is_file():
                raise ShardError(
                    f"{part} holds no part of a set (it has no {name}): name folders that depth-anything shard has "
                    "written, as  depth-anything merge OUT FOLDER FOLDER …"
                )
    if not (root / SETTINGS).exists():
        check_free(root)
    for part in [root, *parts]:
        _check_part(part, first)
    root.mkdir(parents=True, exist_ok=True)
    remove_stale(root)
    for name in _HEAD:
        if not (root / name).exists():
            _bring(first / name, root / name)
    wanted = _plan(root, parts)
    with Progress(f"merging {root}", total=len(wanted), unit="shard") as progress:
        copied = 0
        for path, info in wanted:
            copied += _bring_shard(path, root, info)
            progress.update()
    if copied:
        print(f"{root}: {copied} shards were copied, the others linked", file=sys.stderr)
    per_shard = json.loads((root / SETTINGS).read_bytes())["per_shard"]
    listing = Listing(root, per_shard=per_shard)
    lacking = missing_shards(root, listing)
    if lacking:
        named = ", ".join(shard_name(shard) for shard in lacking[:_NAMED])
        more = " …" if len(lacking) > _NAMED else ""
        raise ShardError(
            f"{root}: {len(lacking)} of {listing.shards} shards lack ({named}{more}): name the folders that hold them, "
            f"or make them with  depth-anything shard {json.loads((root / SETTINGS).read_bytes())['source']} RAW {root}"
        )
    made = finish(root, listing)
    assert made is not None, "no shard lacks"
    return made


def _check_part(part: Path, first: Path) -> None:
    """Hold what a folder says of its set against what the first one says."""
    for name, what in ((SETTINGS, "settings"), (ABOUT_LISTING, "raw data"), (ABOUT, "facts")):
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
                    if name == ABOUT
                    else "leave it out, or write it again as the others were"
                )
            )


def _plan(root: Path, parts: Sequence[Path]) -> list[tuple[Path, ShardInfo | None]]:
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
            info = info_of(part / name) if ending == "tar" else None
            known = there.get(stem)
            if known is None or known[1] is None:  # notes alone may be of a shard that was never finished
                there[stem] = part / name, info
            elif info is not None and known[1] != info:
                raise ShardError(
                    f"the shard {stem} in {known[0].parent} and that in {part} are not the same: verify both, "
                    "and remove the one that is wrong"
                )
    return [row for _, row in sorted(there.items()) if row[0].parent != root]


def _bring_shard(path: Path, root: Path, info: ShardInfo | None) -> bool:
    """Bring a shard, its notes first, so that it is seen whole or not at all; say whether it had to be copied."""
    stem = path.name.partition(".")[0]
    for ending in _NOTES:
        note = path.with_name(f"{stem}{ending}")
        if note.exists():
            _bring(note, root / note.name)
    return _bring(path, root / path.name, info) if info is not None else False


def _bring(path: Path, target: Path, info: ShardInfo | None = None) -> bool:
    """Link a file, or copy it where that cannot be, and say whether; a copied tar is held against its hash."""
    temporary = temporary_name(target)
    try:
        try:
            os.link(path, temporary)
            copied = False
        except OSError:  # another disk, or a file system without links
            digest, copied = _copy(path, temporary), True
            if info is not None and digest != info.hash:
                raise ShardError(
                    f"{path} is damaged (its hash differs): copy it from its machine again"
                ) from None
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return copied


def _copy(path: Path, target: Path) -> str:
    """Copy a file, its bytes safe on disk when this returns; return their hash."""
    digest = hashlib.sha256()
    with open(path, "rb") as source, open(target, "xb") as file:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return f"sha256:{digest.hexdigest()}"
