"""Writing a set shard by shard, whatever its source: killed at any instant, started again, on many machines.

Beside the shards the folder of a set holds settings.json (what decides its bytes), about.json (what its manifest
will say), the listing (see listing.py), of each shard NAME.skipped.json where files were refused and
NAME.pixels.json where it has labels, and, when every shard is there, manifest.json.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import ShardError, ShardSet, read_shard_info
from depth_anything.disk import remove_stale, write_new
from depth_anything.ingest.file_list import FILE_LIST, FILE_LIST_INFO, FileList, write_file_list
from depth_anything.ingest.pool import run_jobs
from depth_anything.ingest.shard_job import ShardJob, run_job, shard_name, write_json
from depth_anything.ingest.source import DatasetInfo, RawSample
from depth_anything.licenses import check_license
from depth_anything.progress import ProgressLine

SETTINGS_FILE, ABOUT_FILE = "settings.json", "about.json"
SKY_POLICIES = ("far", "invalid")

_SET_FILES = (ABOUT_FILE, FILE_LIST, FILE_LIST_INFO, "manifest.json")
_SIDECAR_SUFFIXES = (".idx", ".skipped.json", ".pixels.json")
_MAX_NAMED_FILES = 100  # skipped files that the manifest names; NAME.skipped.json has them all
_READ_THREADS = 16
_MAX_REASONS = 50  # that the manifest counts apart


class Source(Protocol):
    """What can be written as a set: a module of sources/, or an object that pickles.

    An object may have `settings`, JSON that decides the bytes beside what the options say.
    """

    @property
    def INFO(self) -> DatasetInfo:
        """What is known of the set."""

    @property
    def find(self) -> Callable[..., Iterable[str]]:
        """Gives a line a record of a raw folder; options by keyword."""

    @property
    def read(self) -> Callable[[Path, str], RawSample]:
        """Reads a line's record; ValueError with the reason if it cannot be taken."""


def write_source(
    source: Source | ModuleType,
    raw: str | Path,
    root: str | Path,
    *,
    name: str | None = None,
    per_shard: int = 1000,
    part: tuple[int, int] = (1, 1),
    workers: int = 0,
    short_side: int | None = None,
    sky: str | None = None,
    leave_out: Sequence[str] | None = None,
    licence: str | None = None,
    **options: Any,
) -> ShardSet | None:
    """Write a set, or a part of it, or what is missing; a complete one of the same settings is returned as it is.

    Shard k holds the lines [k * per_shard, (k + 1) * per_shard) of the listing less those that are refused, so
    that every shard can be made alone and comes out the same whoever makes it.

    Args:
        source: Reads the raw data.
        raw: Where they lie.
        root: Folder of the set, made if need be; parts may share it or not.
        name: Of the set, needed with parts; None: the folder's.
        per_shard: Lines a shard.
        part: (k, n): the k-th of n parts, from 1.
        workers: Processes that make shards; 0 makes them in this one.
        short_side: See `to_record`.
        sky: "far" or "invalid": what training does with the sky unless told otherwise; None: the source's.
        leave_out: Glob patterns of names that are not taken; None: the source's.
        licence: SPDX name; None: the source's. May be given later, as `sky`.
        options: Of the source's `find`; a Path stands for the file's content.

    Returns:
        The set, or None while shards of other parts are missing.

    Raises:
        ValueError: If the folder holds another set, nothing is found in `raw`, or everything is refused.
    """
    raw, root, facts = Path(raw), Path(root), source.INFO
    if name is None and part[1] > 1:  # it stands in every key, and their folders may be called differently
        raise ValueError("parts of a set need the same name, wherever they are written: type --name, too")
    name = _validate_arguments(
        name or root.resolve().name, per_shard=per_shard, part=part, workers=workers, sky=sky
    )
    if short_side is not None and short_side < 1:
        raise ValueError(f"short_side={short_side} is no size: training takes 518")
    leave_out = list(facts.leave_out if leave_out is None else leave_out)
    settings = {
        "source": facts.name,
        **getattr(source, "settings", {}),
        **{key: _option_value(value) for key, value in options.items()},
        **({"leave_out": leave_out} if leave_out else {}),
        **({"short_side": short_side} if short_side is not None else {}),
        "name": name,
        "per_shard": per_shard,
    }
    check_same_settings(root, settings)
    told = {"licence": check_license(licence) if licence else None, "sky_policy": sky}
    if (root / "manifest.json").exists() and not _has_missing_shards(root):
        if (root / ABOUT_FILE).exists():
            _write_about(root, facts, told)
        return _update_manifest(open_set(root), told)
    if not (root / FILE_LIST_INFO).exists():
        found = _require_first_line(source.find(raw, **options), raw, facts)
        _claim_folder(root, settings)
        write_file_list(root, found, leave_out=leave_out)
    _claim_folder(root, settings)
    _write_about(root, facts, told)
    listing = FileList(root, per_shard=per_shard)
    k, n = part
    mine = range((k - 1) * listing.shards // n, k * listing.shards // n)
    remove_stale(root)
    missing = list_missing_shards(root, listing, among=mine)
    jobs = (
        ShardJob(source, raw, root, name, short_side, shard, listing.numbers(shard), listing.lines(shard))
        for shard in missing
    )
    total = sum(len(listing.numbers(shard)) for shard in missing)
    _run_all(jobs, root, total=total, workers=workers if len(missing) > 1 else 0)
    return finish_set(root, listing)


def _run_all(jobs: Iterator[ShardJob], root: Path, *, total: int, workers: int) -> None:
    with ProgressLine(f"writing {root}", total=total) as progress:
        if workers:
            run_jobs(jobs, workers=workers, tick=progress.update)
        else:
            for job in jobs:
                run_job(job, progress.update)


def finish_set(root: Path, listing: FileList) -> ShardSet | None:
    """Write the manifest of a set whose shards are all there; None if some are not.

    Raises:
        ShardError: Everything was refused.
    """
    if list_missing_shards(root, listing):
        return None
    settings, about = (json.loads((root / file).read_bytes()) for file in (SETTINGS_FILE, ABOUT_FILE))
    there = set(os.listdir(root))
    names = [shard_name(shard) for shard in range(listing.shards)]
    with ThreadPoolExecutor(_READ_THREADS) as pool:  # a network disk takes its time over each
        shards = list(
            pool.map(read_shard_info, [root / f"{name}.tar" for name in names if f"{name}.tar" in there])
        )
        notes, labels = (
            pool.map(
                _read_json, [root / f"{name}.{kind}.json" for name in names if f"{name}.{kind}.json" in there]
            )
            for kind in ("skipped", "pixels")
        )
        skipped = SkippedFiles(notes)
        described = _label_summary(labels)
    if not shards:
        why = "; ".join(f"{file}: {reason}" for file, reason in skipped.named[:3])
        raise ShardError(
            f"{root}: none of {listing.count} files can be taken ({why}); when that is mended, "
            f"begin anew with  rm -r {root}"
        )
    if "quantity" not in described:
        del about["sky_policy"]  # of images alone
        about.pop("sharp", None)
    meta = {**about, "settings": {**settings, "count": listing.count}, "listing": listing.digest}
    meta |= {**described, **skipped.told()}
    if listing.left_out:
        meta["left_out"] = listing.left_out
    return write_manifest(root, name=settings["name"], shards=shards, meta=meta)


def _has_missing_shards(root: Path) -> bool:
    """Whether shards of a finished set were removed since, damaged ones perhaps; they are made again."""
    there = set(os.listdir(root))
    return any(f"{shard.name}.tar" not in there for shard in open_set(root, check=False).shards)


def list_missing_shards(root: Path, listing: FileList, *, among: range | None = None) -> list[int]:
    """Number the shards of a listing that are not there yet: neither made nor wholly refused."""
    there = set(os.listdir(root))
    shards = range(listing.shards) if among is None else among
    left = [shard for shard in shards if f"{shard_name(shard)}.tar" not in there]
    return [
        shard for shard in left if not _is_fully_rejected(root, shard, len(listing.numbers(shard)), there)
    ]


# What the folder says of itself


def check_same_settings(root: Path, settings: Mapping[str, Any]) -> None:
    """Look whether a folder is free, or was begun with these settings.

    Raises:
        ShardError: It holds another set, or shards or files from elsewhere that would be replaced.
    """
    path = root / SETTINGS_FILE
    if path.exists():
        theirs, ours = _read_settings(path), json.loads(json.dumps(settings))
        keys = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if keys:
            differs = ", ".join(f"{key} {theirs.get(key)} in place of {ours.get(key)}" for key in keys)
            raise ShardError(
                f"{root} holds a set made with other settings ({differs}): "
                f"name another folder, or remove it with  rm -r {root}"
            )
    else:
        check_unclaimed(root)


def check_unclaimed(root: Path) -> None:
    """Refuse a folder in which files of a set lie that no set was begun with; settings.json is always the first.

    Raises:
        ShardError: Names the file.
    """
    names = sorted(os.listdir(root)) if root.is_dir() else []
    foreign = [name for name in names if name in _SET_FILES or name.endswith((".tar", *_SIDECAR_SUFFIXES))]
    if not foreign or (root / SETTINGS_FILE).exists():  # another process has begun the set meanwhile
        return
    if any(name == "manifest.json" or name.endswith(".tar") for name in foreign):
        raise ShardError(f"{root} holds shards from elsewhere: name another folder")
    raise _foreign_file_error(root / foreign[0])


def _foreign_file_error(path: Path) -> ShardError:
    return ShardError(
        f"{path} was not written by this command and would be replaced: name another folder, or move it"
    )


def _read_settings(path: Path) -> dict[str, Any]:
    """Read settings.json; ShardError if it is that of something else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content.keys() >= {"source", "name", "per_shard"}:
        raise _foreign_file_error(path)
    return content


def _claim_folder(root: Path, settings: Mapping[str, Any]) -> None:
    """Say in the folder what is being written there; ShardError if another process was faster with another set."""
    root.mkdir(parents=True, exist_ok=True)
    if not write_new(root / SETTINGS_FILE, json.dumps(settings, indent=1, sort_keys=True).encode()):
        check_same_settings(root, settings)


def _write_about(root: Path, facts: DatasetInfo, told: Mapping[str, str | None]) -> None:
    """Note what the manifest shall say; what the user has said stays said."""
    path = root / ABOUT_FILE
    about = json.loads(path.read_bytes()) if path.exists() else None
    new = about or {
        "licence": facts.licence or None,
        "source": {"title": facts.title, "get": facts.get},
        "sky_policy": facts.sky,
        **({"sharp": True} if facts.sharp else {}),
    }
    new = {**new, **{key: value for key, value in told.items() if value is not None}}
    if new != about:
        write_json(path, new)


def _update_manifest(made: ShardSet, told: Mapping[str, str | None]) -> ShardSet:
    """Note in the manifest of a finished set what is only known now; no shard changes."""
    labelled = "quantity" in made.meta
    new = {key: value for key, value in told.items() if value and (labelled or key != "sky_policy")}
    if all(made.meta.get(key) == value for key, value in new.items()):
        return made
    return write_manifest(made.root, name=made.name, shards=made.shards, meta={**made.meta, **new})


class SkippedFiles:
    """Files that were not taken, counted by reason.

    Attributes:
        named: Name and reason of the first hundred.
    """

    def __init__(self, notes: Iterable[Iterable[Sequence[str]]]) -> None:
        """Count the rows of each NAME.skipped.json."""
        self._reasons: Counter[str] = Counter()
        self.named: list[list[str]] = []
        for name, reason in chain.from_iterable(notes):
            self._reasons[reason] += 1
            if len(self.named) < _MAX_NAMED_FILES:
                self.named.append([name, reason])

    def told(self) -> dict[str, Any]:
        """Return what the manifest says of them; nothing if there are none."""
        if not self._reasons:
            return {}
        reasons = dict(self._reasons.most_common(_MAX_REASONS))
        count = self._reasons.total()
        if len(self._reasons) > _MAX_REASONS:
            reasons["other"] = count - sum(reasons.values())
        return {"skipped": {"count": count, "reasons": reasons, "files": self.named}}


def _label_summary(labels: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up what the shards' NAME.pixels.json say: quantity, unit, what is sky, pixels by kind."""
    kinds: Counter[tuple[str, str | None]] = Counter()
    pixels: Counter[str] = Counter()
    for label in labels:
        kinds.update({(quantity, unit): count for quantity, unit, count in label["labels"]})
        pixels.update(label["pixels"])
    if not kinds:
        return {}
    quantities, units = ({kind[i] for kind in kinds} for i in (0, 1))
    meta: dict[str, Any] = {"pixels": dict(sorted(pixels.items()))}
    if len(quantities) == 1:
        (meta["quantity"],) = quantities
        meta["sky"] = "inf" if meta["quantity"] == "depth" else "zero"
    if len(units) == 1 and None not in units:
        (meta["unit"],) = units
    return meta


def _is_fully_rejected(root: Path, shard: int, count: int, there: set[str]) -> bool:
    notes = f"{shard_name(shard)}.skipped.json"
    return notes in there and len(_read_json(root / notes)) == count


def _validate_arguments(
    name: str, *, per_shard: int, part: tuple[int, int], workers: int, sky: str | None
) -> str:
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise ValueError(f'"{name}" cannot name a set: use A-Z a-z 0-9 _ -, or type another name')
    if per_shard < 1 or workers < 0:
        raise ValueError(f"per_shard={per_shard} workers={workers}: at least 1 and 0")
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]} is none: of 4 parts the first is 1/4 and the last 4/4")
    if sky not in (None, *SKY_POLICIES):
        raise ValueError(f'sky="{sky}" is unknown: use "far" or "invalid"')
    return name


def _require_first_line(found: Iterable[str], raw: Path, facts: DatasetInfo) -> Iterator[str]:
    """Look for the first line now, so that a wrong folder is told before anything is written."""
    lines = iter(found)
    try:
        first = next(lines)
    except StopIteration:
        raise ValueError(f"{raw} holds nothing of {facts.title}: looked for {facts.layout}") from None
    return _prepend(first, lines)


def _prepend(first: str, rest: Iterator[str]) -> Generator[str, None, Any]:
    yield first
    return (yield from rest)


def _option_value(value: Any) -> Any:
    """Return an option as settings.json has it: of a file its content, which is elsewhere on other machines."""
    if not isinstance(value, Path):
        return value
    return f"sha256:{hashlib.sha256(_read_option_file(value)).hexdigest()}"


def _read_option_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ShardError(f"{path} is damaged ({error}): remove it and the tar it is named after") from error
