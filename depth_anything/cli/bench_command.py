"""`depth-anything bench-data`: measure the training loader on a set of shards."""

import argparse
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import (
    MAX_SIDE_PX,
    MAX_WORKERS,
    add_command,
    check_output,
    format_count,
    int_in_range,
)
from depth_anything.data.address import escape_unprintable
from depth_anything.errors import UserError

if TYPE_CHECKING:
    from depth_anything.data.dataset import StreamDataset

# Forward GFLOP of a 518 px crop, counted on the meta device, and the lowest and highest fraction of an H100's
# 989 TFLOP/s (dense bf16) that training may reach. A training step counts as three forward passes. Not measured.
STUDENT_GFLOPS = {"vits": (115, 0.25, 0.25), "vitb": (381, 0.25, 0.35), "vitl": (1304, 0.25, 0.40)}
PEAK_GFLOPS, REFERENCE_SIDE = 989_000, 518


@dataclass(frozen=True)
class StageCost:
    """Milliseconds of one core for a stage of a sample, and for the minimal work of any loader (`bare_ms`)."""

    stage: str
    ms: float
    bare_ms: float | None


@dataclass(frozen=True)
class LoaderSpeed:
    """Speed of the loader with a number of workers."""

    workers: int
    cpu_ms: float
    images_per_s: float


@dataclass(frozen=True)
class Demand:
    """Images per second that a GPU trains on, and CPU cores that this needs; the lowest and the highest estimate."""

    student: str
    images_per_s: list[int]
    cores: list[float]


@dataclass
class BenchReport:
    """Results of `bench-data`; the fields are the keys of --json."""

    set: str
    records: int
    image_bytes: int
    label_bytes: int
    stages: list[StageCost]
    waiting_ms: float
    loader: list[LoaderSpeed] = field(default_factory=list)
    demand: list[Demand] = field(default_factory=list)


def add_bench(commands: Any) -> None:
    """Add the command `bench-data`."""
    bench = add_command(
        commands,
        "bench-data",
        "measure the loader on a set: time of each stage, and CPU cores needed per GPU",
        run=_run_bench,
    )
    bench.add_argument("set", metavar="SET", help="folder or URL prefix of a set")
    bench.add_argument("--labels", metavar="SET", help="the label set of its images")
    bench.add_argument(
        "--workers",
        type=int_in_range("--workers", least=1, most=MAX_WORKERS),
        nargs="+",
        metavar="N",
        help="numbers of worker processes to measure (1, and the number of cores)",
    )
    bench.add_argument(
        "--image-size",
        type=int_in_range("--image-size", least=1, most=MAX_SIDE_PX),
        default=REFERENCE_SIDE,
        metavar="N",
        help="short side and crop, pixels (%(default)s)",
    )
    bench.add_argument(
        "--batch-size",
        type=int_in_range("--batch-size", least=1),
        default=8,
        metavar="N",
        help="samples per batch (%(default)s)",
    )
    bench.add_argument(
        "--samples",
        type=int_in_range("--samples", least=1),
        default=256,
        metavar="N",
        help="samples per measurement (%(default)s)",
    )
    bench.add_argument("--json", metavar="FILE", help="also write the results to this file")


def _run_bench(options: argparse.Namespace) -> None:
    import cv2
    import torch

    if options.json:
        check_output([options.json], own=_is_bench_report, flag="--json")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    data = _open_dataset(options)
    report = _time_stages(data, options)
    cores = len(os.sched_getaffinity(0))
    for workers in options.workers or sorted({1, cores}):
        report.loader.append(_time_loader(data, workers, options))
    report.demand = estimate_demand(report.loader[-1].cpu_ms, options.image_size)
    _print_report(report, options, cores)
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(report), indent=1) + "\n")


def _is_bench_report(path: Path) -> bool:
    """Tell whether a file is a report of this command, by its keys."""
    try:
        return {"set", "records", "stages", "loader", "demand"} <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def estimate_demand(cpu_ms: float, side: int) -> list[Demand]:
    """Estimate how many images per second one GPU trains on, and the CPU cores that this needs, for each student.

    Args:
        cpu_ms: Milliseconds of one core per image.
        side: Side of the crop, pixels; the FLOP of a network are assumed proportional to its pixels.
    """
    rows = []
    for student, (gflop, low, high) in STUDENT_GFLOPS.items():
        rates = [share * PEAK_GFLOPS / (3 * gflop * (side / REFERENCE_SIDE) ** 2) for share in (low, high)]
        rows.append(Demand(student, [round(r) for r in rates], [round(r * cpu_ms / 1e3, 1) for r in rates]))
    return rows


def _open_dataset(options: argparse.Namespace) -> "StreamDataset":
    from depth_anything.data.dataset import StreamDataset
    from depth_anything.data.labels import open_labels
    from depth_anything.data.reader import JoinedRecords, Records
    from depth_anything.data.shards import open_set

    images = open_set(options.set)
    if "images" in images.meta:
        raise UserError(
            f"{options.set} has labels", f"type the set of their images, and --labels {options.set}"
        )
    source: Records | JoinedRecords = Records(images)
    if options.labels:
        source = JoinedRecords(images, open_labels(options.labels, images))
    _, fields = source.read(source.shards[0][0], 0)
    if not any(name.startswith(("depth.", "disparity.")) for name in fields):
        raise UserError(f"{options.set} has images without depth", "add --labels and their label set")
    return StreamDataset([source], seed=0, streams=64, image_size=options.image_size, sky=None)


def _time_stages(data: "StreamDataset", options: argparse.Namespace) -> BenchReport:
    from depth_anything.data.timing import StageTimer, minimal_decode, timed_sample

    timer, samples, warm_up = StageTimer(), options.samples, min(8, options.samples)
    image_bytes = label_bytes = 0
    for n in range(-warm_up, samples):
        if n == 0:
            timer = StageTimer()
        _, fields, size = timed_sample(data, n % data.stream.records, timer)
        minimal_decode(fields, size, timer)
        label = sum(len(value) for name, value in fields.items() if name.startswith(("depth.", "disparity.")))
        image_bytes, label_bytes = image_bytes + sum(map(len, fields.values())) - label, label_bytes + label
    count = samples + warm_up
    return BenchReport(
        set=options.set,
        records=data.stream.records,
        image_bytes=image_bytes // count,
        label_bytes=label_bytes // count,
        stages=[
            StageCost(name, round(ms, 3), None if minimal is None else round(minimal, 3))
            for name, ms, minimal in timer.rows()
        ],
        waiting_ms=round(timer.mean_wait("read the record"), 3),
    )


def _time_loader(data: "StreamDataset", workers: int, options: argparse.Namespace) -> LoaderSpeed:
    from depth_anything.data.loader import build_stream_loader
    from depth_anything.data.timing import LoaderTimer

    timer = LoaderTimer(build_stream_loader(data, micro_batch=options.batch_size, workers=workers))
    cpu, wall = timer.measure(max(1, options.samples * workers // options.batch_size))
    timer.close()
    size = options.batch_size
    return LoaderSpeed(workers, cpu_ms=round(1e3 * cpu / size, 3), images_per_s=round(size / wall, 1))


def _print_report(report: BenchReport, options: argparse.Namespace, cores: int) -> None:
    print(
        f"{escape_unprintable(options.set)}: {report.records:,} records, {report.image_bytes / 1e3:.0f} kB per "
        f"image, {report.label_bytes / 1e3:.0f} kB per label"
    )
    print("\nOne sample, milliseconds of one core; right: the minimal work of any loader, on the whole frame")
    for row in report.stages:
        minimal = "" if row.bare_ms is None else f"{row.bare_ms:8.2f}"
        print(f"{row.ms:8.2f} {minimal:>8}  {row.stage}")
    print(f"{report.waiting_ms:8.2f}           mean wait for the disk or the server")
    print("\nThe training loader")
    for speed in report.loader:
        print(
            f"{format_count(speed.workers, 'worker') + ':':>14} {speed.images_per_s:.0f} images/s, "
            f"{speed.cpu_ms:.2f} ms of one core per image"
        )
    print(
        f"\nCPU cores that keep an H100 busy (estimated from three forward passes of {options.image_size} px at "
        f"25 to 40 % of 989 TFLOP/s; no GPU was measured). This machine has {cores}."
    )
    for need in report.demand:
        rates, cores_needed = (
            "–".join(f"{value:g}" for value in dict.fromkeys(values))
            for values in (need.images_per_s, need.cores)
        )
        print(f"    {need.student}: {rates} images/s, {cores_needed} cores")
    if options.json:
        print(f"\nwritten: {escape_unprintable(options.json)}")
