"""Models judged on lists of images: stopped and continued, alone or shared out, always to the same rows.

A share is made of whole batches, the same ones whoever judges them: a network gives an image other last digits
beside other images, and the table must not depend on how many processes there were.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything import __version__
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame
from depth_anything.data.tars import ShardSet
from depth_anything.errors import Text, UserError, UserMessage
from depth_anything.evaluation.benchmarks.benchmark import Benchmark
from depth_anything.evaluation.benchmarks.da2k import PointPairImage, score_da2k
from depth_anything.evaluation.evaluate import MapReader, MapSource, check_aspect, score_frames
from depth_anything.evaluation.frames import describe_set, evenly_spaced, max_depth_from_manifest, read_frame
from depth_anything.evaluation.protocols import EvalProtocol, find_protocol
from depth_anything.evaluation.row_cache import RowCache, Share
from depth_anything.ingest.file_list import display_name, unescape_field
from depth_anything.ingest.source import RESUME_ADVICE, is_disk_failure

BATCH_SIZE = 8

ROWS_FOLDER = "rows"
"""The folder of kept rows, below that of the report."""

WithProgress = Callable[[Iterable[str], str], Iterable[str]]


class MissingData(UserError):
    """A benchmark, or a part of it, is missing; the message names it and where to get it."""


class DiskFailure(UserMessage, OSError):
    """The disk of a benchmark cannot be read for now; the message names the benchmark."""


@dataclass(frozen=True)
class EvalTask:
    """Images with known depth, and the rules by which models are judged on them.

    Attributes:
        name: of the set or benchmark.
        lines: a line of text an image, each another; their order is that of the rows.
        read: a line to its frame, or to its pairs of points; ValueError if it cannot be read.
        protocol: the rules; None where pairs of points are ordered.
        facts: what the report says of the images; "digest" is theirs.
        incomplete: in a sentence, that not all images of a benchmark are judged; "" if they are.
    """

    name: str
    lines: Sequence[str]
    read: Callable[[str], Any]
    protocol: EvalProtocol | None
    facts: Mapping[str, Any]
    incomplete: str = ""


def task_from_set(
    shard_set: ShardSet,
    *,
    protocol: str | EvalProtocol = "da2",
    limit: int | None = None,
    max_depth: float | None = None,
) -> EvalTask:
    """The frames of a labelled shard set, compared as far as `max_depth` of its manifest says.

    Boundaries are scored where its manifest says that its truth is `sharp`.

    Args:
        shard_set: with depth in metres.
        protocol: a name, or rules.
        limit: so many frames, evenly spaced.
        max_depth: metres, in place of the set's.
    """
    records = Records(shard_set)

    ends = list(accumulate(count for _, count in records.shards))

    def read(line: str) -> Frame:
        return read_frame(records, int(line), ends=ends)

    lines = [str(number) for number in evenly_spaced(shard_set.records, limit)]
    rules = find_protocol(
        protocol, max_depth=max_depth_from_manifest(shard_set) if max_depth is None else max_depth
    )
    if shard_set.meta.get("sharp"):
        rules = replace(rules, sharp=True)
    return EvalTask(shard_set.name, lines, read, rules, {**describe_set(shard_set), "limit": limit})


def task_from_benchmark(
    benchmark: Benchmark,
    root: str | Path,
    *,
    protocol: str | None = None,
    limit: int | None = None,
    max_depth: float | None = None,
) -> EvalTask:
    """The frames of a public benchmark.

    Args:
        benchmark: its facts and reader.
        root: the folder of all benchmarks, in which this one has a folder of its name, or the benchmark's own.
        protocol: a name that the benchmark has caps for; its own first one by default.
        limit: so many frames, evenly spaced.
        max_depth: metres, in place of the benchmark's own.

    Raises:
        ValueError: no such protocol there; as `MissingData`, the benchmark is not there.
    """
    rules = None
    if benchmark.depth_limits:
        rules = find_protocol(protocol or benchmark.protocol, benchmark=benchmark, max_depth=max_depth)
    root = Path(root)
    root = root / benchmark.name if (root / benchmark.name).is_dir() else root

    def read(line: str) -> Frame | PointPairImage:
        try:
            item: Frame | PointPairImage = benchmark.read(root, line)
        except (ValueError, OSError) as error:
            raise _with_benchmark_name(benchmark, error, display_name(line)) from error
        if isinstance(item, Frame):  # others' maps are called as one of its files
            names = [unescape_field(text) for text in line.split("\t")]
            item.meta["files"] = sorted(
                names, key=_looks_like_depth_file
            )  # the image's name is asked for first
        return item

    try:
        found = list(benchmark.find(root))
        if not found:
            raise ValueError(f"{root} lists no image of {benchmark.title}")
    except (ValueError, OSError) as error:
        raise _with_benchmark_name(benchmark, error, str(root)) from error
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
    if len(lines) < len(found):
        incomplete = (
            f"only {len(lines)} of {len(found)} images are judged, so that no published figure is comparable"
        )
    if rules is not None and max_depth is not None:
        incomplete = f"compared up to {max_depth:g} m, so that no published figure is comparable"
    if len(found) < benchmark.images:
        incomplete = f"only {facts['images']} images lie there, so that no published figure is comparable"
    return EvalTask(benchmark.name, lines, read, rules, facts, incomplete)


def cache_key(trial: EvalTask) -> dict[str, Any]:
    """What figures on a trial depend on besides the model: its name, which images, and by which rules."""
    return {
        "trial": trial.name,
        "images": [trial.facts["digest"], _digest(trial.lines)],
        "protocol": asdict(trial.protocol) if trial.protocol else None,
    }


def check_quantity(trial: EvalTask, quantity: str) -> None:
    """Raise ValueError if a model that gives this quantity cannot be judged on the trial.

    Its rules must compare such a thing, and metres that nothing is fitted to need a truth in metres.
    """
    if trial.protocol is None:
        return
    trial.protocol.check_quantity(quantity)
    unit = trial.facts.get("unit", "m")
    if quantity == "depth" and "depth" not in trial.protocol.fitted and unit != "m":
        raise ValueError(
            f"the depth of {trial.name} is in {unit}, not in metres: nothing that a metric model gives can be "
            "compared with it as it comes; take a protocol that fits depth (marigold), or another set"
        )


def open_row_cache(
    trial: EvalTask, model: Mapping[str, Any], folder: str | Path, *, name: str, part: Share = (1, 1)
) -> RowCache:
    """Where the rows of a model on a trial are kept; `model` holds all facts that its maps depend on."""
    about = {
        "version": __version__,
        "name": name,
        "model": dict(model),
        **cache_key(trial),
        "batch": BATCH_SIZE,
    }
    return RowCache(Path(folder) / ROWS_FOLDER, about, part=part)


def evaluate_share(
    predictor: MapSource,
    trial: EvalTask,
    kept: RowCache,
    *,
    name: str = "model",
    part: Share = (1, 1),
    watch: WithProgress = lambda lines, name: lines,
) -> None:
    """Judge what of a share has not been judged yet, and keep each row as it comes.

    Args:
        predictor: the model, or maps on disk.
        trial: the images and rules.
        kept: takes the rows.
        name: the model's, for `watch`.
        part: (k, n): the k-th of n shares, from 1.
        watch: wraps the pass over the lines, given the model's name; for progress bars.

    Raises:
        ValueError: the protocol compares no such quantity, or an image or its map cannot be read.
    """
    check_quantity(trial, predictor.quantity)
    done = kept.load()
    todo = [
        batch for batch in _batches_of_share(trial.lines, part) if not all(line in done for line in batch)
    ]
    passing = iter(watch([line for batch in todo for line in batch], name))
    for batch in todo:
        items = [trial.read(next(passing)) for _ in batch]
        kept.add(dict(zip(batch, _score_batch(predictor, items, trial.protocol), strict=True)))
    for _ in passing:  # lets a progress bar end
        pass


def lines_of_share(lines: Sequence[str], part: Share) -> list[str]:
    """The lines of the k-th of n shares, from 1, in their order: whole batches, of which only the last may be short."""
    return [line for batch in _batches_of_share(lines, part) for line in batch]


def collect_rows(trial: EvalTask, kept: RowCache) -> tuple[dict[str, Any], ...]:
    """All rows kept so far, in the order of the images; fewer than these where some are not judged yet."""
    rows = kept.load()
    return tuple(rows[line] for line in trial.lines if line in rows)


def _batches_of_share(lines: Sequence[str], part: Share) -> list[Sequence[str]]:
    batches = [lines[i : i + BATCH_SIZE] for i in range(0, len(lines), BATCH_SIZE)]
    return batches[part[0] - 1 :: part[1]]


class _LoadedMaps:
    """Maps on disk, asked as a predictor is: by the images of a batch."""

    def __init__(self, maps: MapReader, items: Sequence[PointPairImage]) -> None:
        self.quantity, self._maps, self._items = maps.quantity, maps, items

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The maps of all items."""
        maps = [self._maps.load_map(Frame(item.key, item.image)) for item in self._items]
        for item, map_ in zip(self._items, maps, strict=True):
            check_aspect(map_, item.image.shape, item.key)
        return maps


def _score_batch(
    predictor: MapSource, items: Sequence[Any], protocol: EvalProtocol | None
) -> list[dict[str, Any]]:
    if protocol is not None:
        return [row for _, row in score_frames(predictor, items, protocol=protocol)]
    asked = _LoadedMaps(predictor, items) if isinstance(predictor, MapReader) else predictor
    return list(score_da2k(asked, items, batch_size=len(items)).rows)


def _with_benchmark_name(benchmark: Benchmark, error: Exception, what: str) -> MissingData | DiskFailure:
    """Name the benchmark in an error; that of a failing disk, raised or wrapped by a reader, stays one."""
    cause: BaseException | None = error
    while cause is not None and not is_disk_failure(cause):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError):
        failed = DiskFailure(f"{benchmark.name}: {what} cannot be read now ({cause.strerror})", RESUME_ADVICE)
        failed.errno = cause.errno
        return failed
    fix: Text = f"{benchmark.title} is at {benchmark.get}"
    if isinstance(error, UserError) and error.fix:
        return MissingData(f"{benchmark.name}: {error.what}", error.fix_parts)
    return MissingData(f"{benchmark.name}: {str(error).rstrip('.')}", fix)


def _looks_like_depth_file(path: str) -> bool:
    return any(word in path.lower() for word in ("depth", "filled", "disparit", "mask"))


def _digest(lines: Iterable[str]) -> str:
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
