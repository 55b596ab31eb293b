"""One shard of a set: its lines read, made records, written with what there is to tell of them."""

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
from depth_anything.data.remote import retry
from depth_anything.data.tars import ShardError, write_shard
from depth_anything.disk import atomic_write
from depth_anything.ingest.file_list import display_name
from depth_anything.ingest.record import EncodedRecord, encode_sample
from depth_anything.ingest.source import RESUME_ADVICE, RawSample, RejectedRecord, is_disk_failure

_MAX_PRINTED_NOTES = 3
"""Notes on images that are printed of a shard; there may be thousands."""


def shard_name(shard: int) -> str:
    """Return the name of a set's shard by its number."""
    return f"{shard:05d}"


@dataclass(frozen=True)
class ShardJob:
    """A shard to be made, and all that decides its bytes."""

    source: Any
    raw: Path
    root: Path
    name: str
    short_side: int | None
    shard: int
    numbers: range
    lines: list[str]


def run_job(job: ShardJob, tick: Callable[[], object]) -> None:
    """Write one shard and the notes on it; `tick` is called after each line.

    Raises:
        ShardError: The raw folder is gone: that is no reason to leave records out.
        Outage: Its disk fails, again and again.
    """
    made = _encode_records(job, tick)
    first = next(made, None)
    if first is not None:
        write_shard(job.root / f"{shard_name(job.shard)}.tar", chain([first], made))


def _encode_records(job: ShardJob, tick: Callable[[], object]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Make the records of a shard; what is told of them is written before the shard can be seen."""
    skipped: list[tuple[str, str]] = []
    labels: Counter[tuple[str, str | None]] = Counter()
    pixels: Counter[str] = Counter()
    notes: list[str] = []
    stem = shard_name(job.shard)
    for number, line in zip(job.numbers, job.lines, strict=True):
        try:
            made = _encode_line(job, line)
        except RejectedRecord as refusal:
            skipped.append((refusal.name, refusal.reason))
        else:
            pixels.update(made.pixels)
            notes += [f"{display_name(line)}: {note}" for note in made.notes]
            labels.update([(made.quantity, made.unit)] if made.quantity else [])
            yield f"{job.name}/{stem}/{number:07d}", made.fields
        tick()
    for note in notes[:_MAX_PRINTED_NOTES]:
        print(escape_unprintable(note), file=sys.stderr)
    if len(notes) > _MAX_PRINTED_NOTES:
        print(f"shard {stem}: {len(notes) - _MAX_PRINTED_NOTES} more notes of this kind", file=sys.stderr)
    if skipped:
        write_json(job.root / f"{stem}.skipped.json", skipped)
    if labels:
        rows = [[quantity, unit, count] for (quantity, unit), count in sorted(labels.items(), key=str)]
        write_json(job.root / f"{stem}.pixels.json", {"labels": rows, "pixels": dict(pixels)})


def _encode_line(job: ShardJob, line: str) -> EncodedRecord:
    """Read a line's record; Refused if it cannot be taken."""
    name, facts = display_name(line), job.source.INFO

    def read() -> RawSample:
        with _classify_errors(name, facts.name):
            try:
                return job.source.read(job.raw, line)
            except (ValueError, OSError) as error:
                # A record is left out for what is wrong with it, never because a disk is gone or fails.
                if not job.raw.exists():
                    raise ShardError(f"{job.raw} is gone: {RESUME_ADVICE}") from error
                raise

    raw = retry(f"{name} of {job.raw}", read)
    with _classify_errors(name, facts.name):
        return encode_sample(raw, source=facts.name, name=name, short_side=job.short_side)


@contextmanager
def _classify_errors(name: str, source: str) -> Iterator[None]:
    """Say of what goes wrong with a record whether the record is at fault: Refused, or else the disk or the code."""
    try:
        yield
    except ShardError:
        raise
    except (ValueError, OSError) as error:
        if is_disk_failure(error):
            raise
        raise RejectedRecord(
            name, getattr(error, "strerror", None) or str(error) or type(error).__name__
        ) from error
    except MemoryError as error:
        raise RejectedRecord(name, "it needs more memory than there is") from error
    except Exception as error:
        raise RuntimeError(f"{name}: the reader of {source} broke over it ({error!r})") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON that is seen whole or not at all."""
    atomic_write(path, json.dumps(content, ensure_ascii=False, indent=1).encode())
