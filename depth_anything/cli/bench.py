"""`depth-anything bench-data`: what the loader does with someone's own shards, on their machine."""

import argparse
import json
import os
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

if TYPE_CHECKING:
    from depth_anything.data.dataset import StreamDataset

# Forward GFLOP of a 518 px crop, counted on the meta device, and the shares of an H100's 989 TFLOP/s (dense bf16)
# that its training may reach. Training is three times the forward pass. Arithmetic, measured on no GPU.
STUDENT_GFLOPS = {"vits": (115, 0.25, 0.25), "vitb": (381, 0.25, 0.35), "vitl": (1304, 0.25, 0.40)}
PEAK_GFLOPS, REFERENCE_SIDE = 989_000, 518


def add_bench(commands: Any) -> None:
    """Declare `bench-data`."""
    bench = add_command(
        commands,
        "bench-data",
        "time the loader on a set: each stage, and how many cores a GPU needs",
        run=_run_bench,
    )
    bench.add_argument("set", metavar="SET", help="folder or URL prefix of a set")
    bench.add_argument("--labels", metavar="SET", help="the labels of its images")
    bench.add_argument(
        "--workers",
        type=int_in_range("--workers", least=1, most=MAX_WORKERS),
        nargs="+",
        metavar="N",
        help="worker processes, one measurement for each number (1, and one for each core)",
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
        help="of a batch (%(default)s)",
    )
    bench.add_argument(
        "--samples",
        type=int_in_range("--samples", least=1),
        default=256,
        metavar="N",
        help="to measure, each time (%(default)s)",
    )
    bench.add_argument("--json", metavar="FILE", help="write the figures there, too")


def _run_bench(options: argparse.Namespace) -> None:
    import cv2
    import torch

    if options.json:
        check_output([options.json], own=_is_bench_report, flag="--json")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    data = _open_dataset(options)
    stages = _time_stages(data, options.samples)
    figures: dict[str, Any] = {"set": options.set, "records": data.stream.records, **stages}
    cores = len(os.sched_getaffinity(0))
    figures["loader"] = [
        _time_loader(data, workers, options) for workers in options.workers or sorted({1, cores})
    ]
    cost = figures["loader"][-1]["cpu_ms"]
    figures["demand"] = estimate_demand(cost, options.image_size)
    _print_report(figures, options, cores)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


def _is_bench_report(path: Path) -> bool:
    """Tell figures of this command by their keys."""
    try:
        return {"set", "records", "stages", "loader", "demand"} <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def estimate_demand(cpu_ms: float, side: int) -> list[dict[str, Any]]:
    """Say how many images a second a GPU takes in training, and the cores that this needs, by student.

    Args:
        cpu_ms: of a core for an image.
        side: of the crop, pixels; the work of a network is taken to grow with its pixels.
    """
    rows = []
    for student, (gflop, low, high) in STUDENT_GFLOPS.items():
        rates = [share * PEAK_GFLOPS / (3 * gflop * (side / REFERENCE_SIDE) ** 2) for share in (low, high)]
        rows.append(
            {
                "student": student,
                "images_per_s": [round(rate) for rate in rates],
                "cores": [round(rate * cpu_ms / 1e3, 1) for rate in rates],
            }
        )
    return rows


def _open_dataset(options: argparse.Namespace) -> "StreamDataset":
    from depth_anything.data.dataset import StreamDataset
    from depth_anything.data.labels import open_labels
    from depth_anything.data.reader import JoinedRecords, Records
    from depth_anything.data.shards import open_set

    images = open_set(options.set)
    if "images" in images.meta:
        raise ValueError(
            f"{options.set} holds labels: give the set of their images, and this with --labels {options.set}"
        )
    source: Records | JoinedRecords = Records(images)
    if options.labels:
        source = JoinedRecords(images, open_labels(options.labels, images))
    _, fields = source.read(source.shards[0][0], 0)
    if not any(name.startswith(("depth.", "disparity.")) for name in fields):
        raise ValueError(
            f"{options.set} holds images without depth: add --labels and the set of their labels"
        )
    return StreamDataset([source], seed=0, streams=64, image_size=options.image_size, sky=None)


def _time_stages(data: "StreamDataset", samples: int) -> dict[str, Any]:
    from depth_anything.data.timing import StageTimer, minimal_decode, stage_report, timed_sample

    stages = StageTimer()
    image_bytes = label_bytes = 0
    for n in range(-min(8, samples), samples):  # the first warm up
        if n == 0:
            stages = StageTimer()
        _, fields, size = timed_sample(data, n % data.stream.records, stages)
        minimal_decode(fields, size, stages)
        label = sum(len(value) for name, value in fields.items() if name.startswith(("depth.", "disparity.")))
        image_bytes, label_bytes = image_bytes + sum(map(len, fields.values())) - label, label_bytes + label
    count = samples + min(8, samples)
    return {
        "image_bytes": image_bytes // count,
        "label_bytes": label_bytes // count,
        "stages": [
            {"stage": name, "ms": round(ours, 3), "bare_ms": None if bare is None else round(bare, 3)}
            for name, ours, bare in stage_report(stages)
        ],
        "waiting_ms": round(stages.waiting("read it, checksums"), 3),
    }


def _time_loader(data: "StreamDataset", workers: int, options: argparse.Namespace) -> dict[str, Any]:
    from depth_anything.data.loader import build_stream_loader
    from depth_anything.data.timing import LoaderTimer

    window = LoaderTimer(build_stream_loader(data, micro_batch=options.batch_size, workers=workers))
    cpu, clock = window.measure(max(1, options.samples * workers // options.batch_size))
    window.close()
    return {
        "workers": workers,
        "cpu_ms": round(1e3 * cpu / options.batch_size, 3),
        "images_per_s": round(options.batch_size / clock, 1),
    }


def _print_report(figures: dict[str, Any], options: argparse.Namespace, cores: int) -> None:
    print(
        f"{escape_unprintable(options.set)}: {figures['records']:,} records, of the image "
        f"{figures['image_bytes'] / 1e3:.0f} kB, of the label {figures['label_bytes'] / 1e3:.0f} kB"
    )
    print("\nA sample, milliseconds of one core; beside it the bare work on the same bytes, done whole")
    for row in figures["stages"]:
        bare = "" if row["bare_ms"] is None else f"{row['bare_ms']:8.2f}"
        print(f"{row['ms']:8.2f} {bare:>8}  {row['stage']}")
    print(f"{figures['waiting_ms']:8.2f}           waiting for the disk or the server, the mean")
    print("\nThe loader of training")
    for row in figures["loader"]:
        print(
            f"{format_count(row['workers'], 'worker') + ':':>14} {row['images_per_s']:.0f} images/s by the clock, "
            f"{row['cpu_ms']:.2f} ms of a core an image"
        )
    print(
        f"\nCores that an H100 needs so as not to wait (arithmetic: three forward passes of {options.image_size} px at "
        f"25 to 40 % of 989 TFLOP/s; no GPU was measured). Here are {cores}."
    )
    for row in figures["demand"]:
        rates, need = (
            "–".join(f"{value:g}" for value in dict.fromkeys(row[k])) for k in ("images_per_s", "cores")
        )
        print(f"    {row['student']}: {rates} images/s, {need} cores")
    if options.json:
        print(f"\nwritten: {escape_unprintable(options.json)}")
