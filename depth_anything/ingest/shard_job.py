"""Write one shard of a set: read its lines, encode the records, and write notes about rejected records and labels."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from depth_anything.data.address import escape_unprintable
from depth_anything.data.retry import retry
from depth_anything.data.store import Store
from depth_anything.data.tars import ShardError, write_shard
from depth_anything.disk import atomic_write
from depth_anything.ingest.file_list import display_name
from depth_anything.ingest.record import EncodedRecord, encode_sample
from depth_anything.ingest.source import RESUME_ADVICE, RawSample, RejectedRecord, is_disk_failure

NOTE_SUFFIXES = (".skipped.json", ".pixels.json")

_MAX_PRINTED_NOTES = 3


def shard_name(shard: int) -> str:
    """Return the name of a shard from its number."""
    return f"{shard:05d}"


@dataclass(frozen=True)
class ShardJob:
    """A shard to write, and everything that determines its bytes."""

    source: Any
    raw: Path
    store: Store
    name: str
    short_side: int | None
    shard: int
    numbers: range
    lines: list[str]


def run_job(job: ShardJob, tick: Callable[[], object]) -> None:
    """Write a shard and its notes.

    Args:
        job: The shard.
        tick: Called after each line.

    Raises:
        ShardError: The raw folder is gone; no record is rejected for that.
        StorageUnavailable: The disk of the raw folder keeps failing.
    """
    with job.store.staging() as folder:
        records = _encode_records(job, folder, tick)
        first = next(records, None)
        if first is not None:
            write_shard(folder / f"{shard_name(job.shard)}.tar", chain([first], records))
        publish_shard(job.store, folder, shard_name(job.shard))


def publish_shard(store: Store, folder: Path, stem: str) -> None:
    """Put a shard that was written in a folder of `staging` into its store: notes, tar, and last its index.

    Raises:
        ShardError: The store has another tar of this name.
    """
    for suffix in NOTE_SUFFIXES:
        if store.is_remote and (folder / f"{stem}{suffix}").exists():
            store.publish(folder / f"{stem}{suffix}", replace=True)
    for suffix in (".tar", ".idx"):
        if store.is_remote and (folder / f"{stem}{suffix}").exists():
            store.publish(folder / f"{stem}{suffix}")


def _encode_records(
    job: ShardJob, folder: Path, tick: Callable[[], object]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the records of a shard; write the notes at the end, before the shard becomes visible."""
    rejected: list[tuple[str, str]] = []
    labels: Counter[tuple[str, str | None]] = Counter()
    pixels: Counter[str] = Counter()
    notes: list[str] = []
    stem = shard_name(job.shard)
    for number, line in zip(job.numbers, job.lines, strict=True):
        try:
            record = _encode_line(job, line)
        except RejectedRecord as error:
            rejected.append((error.name, error.reason))
        else:
            pixels.update(record.pixels)
            notes += [f"{display_name(line)}: {note}" for note in record.notes]
            labels.update([(record.quantity, record.unit)] if record.quantity else [])
            yield f"{job.name}/{stem}/{number:07d}", record.fields
        tick()
    for note in notes[:_MAX_PRINTED_NOTES]:
        print(escape_unprintable(note), file=sys.stderr)
    if len(notes) > _MAX_PRINTED_NOTES:
        print(f"shard {stem}: {len(notes) - _MAX_PRINTED_NOTES} more notes of this kind", file=sys.stderr)
    if rejected:
        write_json(folder / f"{stem}.skipped.json", rejected)
    if labels:
        rows = [[quantity, unit, count] for (quantity, unit), count in sorted(labels.items(), key=str)]
        write_json(folder / f"{stem}.pixels.json", {"labels": rows, "pixels": dict(pixels)})


def _encode_line(job: ShardJob, line: str) -> EncodedRecord:
    """Read and encode the record of a line. Raises RejectedRecord if the record is bad."""
    name, source = display_name(line), job.source.INFO.name

    def read() -> RawSample:
        with _classify_errors(name, source):
            try:
                return job.source.read(job.raw, line)
            except (ValueError, OSError) as error:
                # A record is rejected for its own content, never because a disk is gone or fails.
                if not job.raw.exists():
                    raise ShardError(f"{job.raw} is gone", RESUME_ADVICE) from error
                raise

    raw = retry(f"{name} of {job.raw}", read)
    with _classify_errors(name, source):
        return encode_sample(raw, source=source, name=name, short_side=job.short_side)


@contextmanager
def _classify_errors(name: str, source: str) -> Iterator[None]:
    """Raise RejectedRecord for errors of a record; let errors of the disk pass; raise RuntimeError for a bug."""
    try:
        yield
    except ShardError:
        raise
    except (ValueError, OSError) as error:
        if is_disk_failure(error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RejectedRecord(name, reason) from error
    except MemoryError as error:
        raise RejectedRecord(name, "it needs more memory than is available") from error
    except Exception as error:
        raise RuntimeError(f"{name}: the reader of {source} failed ({error!r})") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    atomic_write(path, format_json(content))


def format_json(content: Any) -> bytes:
    """Return the bytes of a JSON file as sets hold them."""
    return json.dumps(content, ensure_ascii=False, indent=1).encode()
