"""Run evaluation tasks: open a set or benchmark, score it in shares, stop and continue, always with the same rows.

A share is made of whole batches, the same ones for any number of processes: a network's last digits depend on the
other images of a batch, and the table must not depend on how many processes there were.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from depth_anything import __version__
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame
from depth_anything.data.tars import ShardSet
from depth_anything.errors import UserError, UserMessage
from depth_anything.evaluation.benchmarks.benchmark import Benchmark
from depth_anything.evaluation.depth_task import DepthTask
from depth_anything.evaluation.frames import describe_set, evenly_spaced, max_depth_from_manifest, read_frame
from depth_anything.evaluation.pairs_task import PairsTask
from depth_anything.evaluation.protocols import EvalProtocol, find_protocol
from depth_anything.evaluation.row_cache import RowCache, Share
from depth_anything.evaluation.task import EvalResult, EvalTask, MapSource, Row
from depth_anything.ingest.file_list import display_name, unescape_field
from depth_anything.ingest.source import RESUME_ADVICE, is_disk_failure
from depth_anything.progress import ProgressLine

BATCH_SIZE = 8
ROWS_FOLDER = "rows"
"""The folder of cached rows, below the report's."""


@dataclass(frozen=True)
class EvalModel:
    """A model under evaluation.

    Attributes:
        name: as tables call it.
        source: predicts its maps, or loads them.
        facts: what the report says about it, and what its maps depend on (fingerprint, input size, …).
    """

    name: str
    source: MapSource
    facts: Mapping[str, Any]


class MissingData(UserError):
    """A benchmark, or a part of it, is missing; the message names it and where to get it."""


class DiskFailure(UserMessage, OSError):
    """The disk of a benchmark cannot be read for now; the message names the benchmark."""


def task_from_set(
    shard_set: ShardSet,
    *,
    protocol: str | EvalProtocol = "da2",
    limit: int | None = None,
    max_depth: float | None = None,
) -> DepthTask:
    """Make a task of a labeled shard set.

    Maps are compared up to the `max_depth` of its manifest; boundaries are scored if its manifest says `sharp`.

    Args:
        shard_set: with depth in meters.
        protocol: a name in `protocols.PROTOCOLS`, or rules of your own.
        limit: number of frames, evenly spaced; None: all.
        max_depth: meters, instead of the set's.
    """
    records = Records(shard_set)
    ends = list(accumulate(count for _, count in records.shards))
    rules = find_protocol(
        protocol, max_depth=max_depth_from_manifest(shard_set) if max_depth is None else max_depth
    )
    return DepthTask(
        shard_set.name,
        [str(number) for number in evenly_spaced(shard_set.records, limit)],
        lambda line: read_frame(records, int(line), ends=ends),
        {**describe_set(shard_set), "limit": limit},
        protocol=replace(rules, sharp=True) if shard_set.meta.get("sharp") else rules,
    )


def task_from_benchmark(
    benchmark: Benchmark,
    root: str | Path,
    *,
    protocol: str | None = None,
    limit: int | None = None,
    max_depth: float | None = None,
) -> EvalTask:
    """Make a task of a public benchmark.

    Args:
        benchmark: its facts and reader.
        root: folder of all benchmarks, with a folder of this one's name, or this benchmark's own folder.
        protocol: a name that the benchmark has depth limits for; its first one by default.
        limit: number of images, evenly spaced; None: all.
        max_depth: meters, instead of the benchmark's own.

    Raises:
        ValueError: the benchmark has no such protocol.
        MissingData: the benchmark is not there.
    """
    rules = None
    if benchmark.depth_limits:
        rules = find_protocol(protocol or benchmark.protocol, benchmark=benchmark, max_depth=max_depth)
    root = Path(root)
    root = root / benchmark.name if (root / benchmark.name).is_dir() else root

    def read(line: str) -> Frame:
        try:
            frame: Frame = benchmark.read(root, line)
        except (ValueError, OSError) as error:
            raise _benchmark_error(benchmark, error, display_name(line)) from error
        # Maps made by other programs are named as one of the frame's files; the image's name is tried first.
        frame.meta["files"] = sorted(map(unescape_field, line.split("\t")), key=_is_label_file)
        return frame

    try:
        found = list(benchmark.find(root))
        if not found:
            raise ValueError(f"{root} lists no image of {benchmark.title}")
    except (ValueError, OSError) as error:
        raise _benchmark_error(benchmark, error, str(root)) from error
    lines = [found[number] for number in evenly_spaced(len(found), limit)]
    facts = {
        "set": benchmark.name,
        "title": benchmark.title,
        "where": str(root),
        "digest": _digest(found),
        "images": f"{len(found)} of {benchmark.images}" if benchmark.images else len(found),
        "licence": benchmark.licence,
        "from": benchmark.get,
        "limit": limit,
    }
    incomplete = ""
    if len(found) < benchmark.images:
        incomplete = f"only {facts['images']} images are there, so no published figure is comparable"
    elif rules is not None and max_depth is not None:
        incomplete = f"compared up to {max_depth:g} m, so no published figure is comparable"
    elif len(lines) < len(found):
        incomplete = (
            f"only {len(lines)} of {len(found)} images are evaluated, so no published figure is comparable"
        )
    if rules is None:
        return PairsTask(benchmark.name, lines, read, facts, incomplete)
    return DepthTask(benchmark.name, lines, read, facts, incomplete, protocol=rules)


def cache_key(task: EvalTask) -> dict[str, Any]:
    """All that scores on a task depend on besides the model: its name, its images and the protocol."""
    return {
        "trial": task.name,
        "images": [task.facts["digest"], _digest(task.lines)],
        "protocol": task.protocol.to_dict() if task.protocol else None,
    }


def open_row_cache(
    model: EvalModel, task: EvalTask, folder: str | Path, *, share: Share = (1, 1)
) -> RowCache:
    """Open the cached rows of a model on a task, below the report's folder.

    Rows of a model with other facts are not used. Its device and path do not count: machines of several kinds may
    share the work.
    """
    facts = {
        key: value for key, value in model.facts.items() if key not in ("device", "weights", "predictions")
    }
    settings = {
        "version": __version__,
        "name": model.name,
        "model": facts,
        **cache_key(task),
        "batch": BATCH_SIZE,
    }
    return RowCache(Path(folder) / ROWS_FOLDER, settings, share=share)


def evaluate_share(model: EvalModel, task: EvalTask, folder: str | Path, *, share: Share = (1, 1)) -> None:
    """Score the images of a share that have no row yet, and cache the rows of each batch at once.

    Args:
        model: a network, or maps on disk.
        task: images and rules.
        folder: of the report; rows are cached below it.
        share: (k, n): the k-th of n shares, from 1.

    Raises:
        ValueError: the task cannot score this quantity, or an image or its map cannot be read.
    """
    task.check_quantity(model.source.quantity)
    cache = open_row_cache(model, task, folder, share=share)
    done = cache.load()
    batches = [batch for batch in _batches_of_share(task.lines, share) if not done.keys() >= set(batch)]
    with ProgressLine(f"{task.name}, {model.name}", total=sum(map(len, batches)), unit="image") as progress:
        for batch in batches:
            cache.add(dict(zip(batch, score_lines(model.source, task, batch), strict=True)))
            progress.update(len(batch))


def collect_results(models: Iterable[EvalModel], task: EvalTask, folder: str | Path) -> list[EvalResult]:
    """The results of each model from all rows cached so far; images that are not scored yet are left out."""
    results = []
    for model in models:
        rows = open_row_cache(model, task, folder).load()
        results.append(
            task.result(model.name, (rows[line] for line in task.lines if line in rows), model.facts)
        )
    return results


def score_lines(source: MapSource, task: EvalTask, lines: Sequence[str]) -> list[Row]:
    """Read and score images in batches of `BATCH_SIZE`."""
    rows: list[Row] = []
    for start in range(0, len(lines), BATCH_SIZE):
        rows += task.score(source, [task.read(line) for line in lines[start : start + BATCH_SIZE]])
    return rows


def lines_of_share(lines: Sequence[str], share: Share) -> list[str]:
    """The lines of the k-th of n shares, from 1, in their order: whole batches, of which only the last may be short."""
    return [line for batch in _batches_of_share(lines, share) for line in batch]


def _batches_of_share(lines: Sequence[str], share: Share) -> list[Sequence[str]]:
    batches = [lines[start : start + BATCH_SIZE] for start in range(0, len(lines), BATCH_SIZE)]
    return batches[share[0] - 1 :: share[1]]


def _benchmark_error(benchmark: Benchmark, error: Exception, what: str) -> MissingData | DiskFailure:
    """Name the benchmark in an error; that of a failing disk stays an OSError, even if a reader wrapped it."""
    cause: BaseException | None = error
    while cause is not None and not is_disk_failure(cause):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError):
        failed = DiskFailure(f"{benchmark.name}: {what} cannot be read now ({cause.strerror})", RESUME_ADVICE)
        failed.errno = cause.errno
        return failed
    if isinstance(error, UserError) and error.fix:
        return MissingData(f"{benchmark.name}: {error.what}", error.fix_parts)
    return MissingData(
        f"{benchmark.name}: {str(error).rstrip('.')}", f"{benchmark.title} is at {benchmark.get}"
    )


def _is_label_file(path: str) -> bool:
    return any(word in path.lower() for word in ("depth", "filled", "disparit", "mask"))


def _digest(lines: Iterable[str]) -> str:
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
