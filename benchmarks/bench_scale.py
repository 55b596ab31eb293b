"""Measure start-up, resume at sample 90,000,000, and memory of a run over 60,000 shards.

    OMP_NUM_THREADS=1 nice -n -15 python benchmarks/bench_scale.py [--json FILE]

The shards have 1,000 records each, 60 million in total; most are hard links to a few files, so the set has the
manifest, files and indexes of the paper's size in 30 MB. Cold starts and resumed ones alternate, each in a process of
its own: import, manifest, order, loader, first batch. Then the process continues while its memory is sampled; a
worker reads from as many shards as there are streams.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BASES, RECORDS, SIDE = 4, 1000, 56
RESUMED = 90_000_000


def write_large_set(root: Path, shards: int) -> None:
    """Write a few shards and link them to many names."""
    from depth_anything.data.sample import Frame, encode_frame
    from depth_anything.data.shards import write_manifest
    from depth_anything.data.tars import ShardInfo, write_shard

    rng = np.random.default_rng(0)
    infos = []
    for base in range(BASES):
        image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        fields = encode_frame(
            Frame("", image, disparity=rng.random((SIDE, SIDE), np.float32)), codec="q12", jpeg_quality=50
        )
        records = ((f"large/{base}/{i:04d}", fields) for i in range(RECORDS))
        infos.append(write_shard(root / f"base{base}.tar", records))
    rows = []
    for number in range(shards):
        base, name = infos[number % BASES], f"{number:06d}"
        for ending in (".tar", ".idx"):
            os.link(root / f"{base.name}{ending}", root / f"{name}{ending}")
        rows.append(ShardInfo(name, base.records, base.bytes, base.hash))
    write_manifest(root, name="large", shards=rows, meta={})


def resident_mb(pid: int) -> float:
    """Memory that a process holds for itself: what it shares with its parent is counted there."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kept = {line.split(":")[0]: int(line.split()[1]) for line in rows[1:] if line.endswith("kB")}
    return (kept["Private_Clean"] + kept["Private_Dirty"]) / 1e3


def one_start(root: str, start: int, args: argparse.Namespace) -> dict[str, Any]:
    """Start a rank at a sample, take its first batch and more; called in a fresh process."""
    began = time.perf_counter()
    seconds, cpu = {}, {}

    def lap(name: str) -> None:
        seconds[name], cpu[name] = time.perf_counter() - began, time.process_time()

    import multiprocessing

    import torch

    from depth_anything.data.dataset import StreamDataset
    from depth_anything.data.loader import build_stream_loader
    from depth_anything.data.reader import Records
    from depth_anything.data.shards import open_set
    from depth_anything.data.timing import process_cpu_seconds

    torch.set_num_threads(1)
    lap("imported")
    made = open_set(root)
    lap("manifest read, files there")
    data = StreamDataset([Records(made)], seed=0, streams=8 * args.batch, image_size=SIDE)
    data.stream.locate(start)
    lap("order laid out")
    loader = build_stream_loader(
        data, micro_batch=args.batch, workers=args.workers, start=start // args.batch
    )
    batches = iter(loader)
    first = next(batches)["sample"][0].item()
    lap("first batch")
    assert first == start // args.batch * args.batch
    workers = [child.pid for child in multiprocessing.active_children()]
    cpu["first batch"] += sum(process_cpu_seconds(pid) for pid in workers)
    memory = {}
    for batch in range(1, args.batches + 1):
        if batch in (1, *range(args.batches // 8, args.batches + 1, args.batches // 8)):
            memory[batch * args.batch] = {
                "rank": round(resident_mb(os.getpid()), 1),
                "worker": round(max(resident_mb(pid) for pid in workers), 1),
            }
        next(batches)
    return {"start": start, "seconds": seconds, "cpu": cpu, "memory_mb": memory}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batches", type=int, default=64, help="taken after the first, for the memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--one-start", nargs=2, metavar=("SET", "SAMPLE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one_start:
        print(json.dumps(one_start(args.one_start[0], int(args.one_start[1]), args)))
        return {}
    resumed = min(RESUMED, args.shards * RECORDS * 3 // 2) // args.batch * args.batch
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "resumed": []}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_large_set(Path(folder), args.shards)
        print(f"{args.shards:,} shards linked in {time.perf_counter() - began:.0f} s")
        passed = [f"--{name}={getattr(args, name)}" for name in ("batch", "workers", "batches")]
        for _ in range(args.repeats):
            for name, sample in (("cold", 0), ("resumed", resumed)):
                command = [sys.executable, __file__, *passed, "--one-start", folder, str(sample)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                starts[name].append(json.loads(done.stdout))
    record = {
        "benchmark": "scale",
        "version": 1,
        "shards": args.shards,
        "batch": args.batch,
        "starts": starts,
    }
    tell(starts)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


def tell(starts: dict[str, list[dict[str, Any]]]) -> None:
    ends = {}
    for name, runs in starts.items():
        print(
            f"{name}, from sample {runs[0]['start']:,}; median of {len(runs)}, seconds by the clock (of a core)"
        )
        for lap in runs[0]["seconds"]:
            clock, cpu = (float(np.median([run[kind][lap] for run in runs])) for kind in ("seconds", "cpu"))
            print(f"{clock:8.2f} ({cpu:.2f})  {lap}")
            ends[name, lap] = (clock, cpu)
        for samples, held in runs[-1]["memory_mb"].items():
            print(f"    after {int(samples):>7,} samples: rank {held['rank']} MB, worker {held['worker']} MB")
    pair = [ends[name, "first batch"] for name in ("resumed", "cold")]
    print(
        f"first batch, resumed ÷ cold: {pair[0][0] / pair[1][0]:.2f} by the clock, {pair[0][1] / pair[1][1]:.2f} of CPU"
    )


if __name__ == "__main__":
    main()
