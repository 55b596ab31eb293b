"""Measure time and memory to list a set of millions of images once, and to resume with that list.

    python benchmarks/bench_listing.py --lines 13153500

A source with this many names (ImageNet-21K's by default) is listed as `depth-anything shard` does; then the list is
opened as other parts and restarts open it, and the lines of a shard are read. The names are synthetic, so no disk is
searched: a real disk adds its own time.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from depth_anything.ingest.file_list import FileList, write_file_list

T = TypeVar("T")


def names(count: int) -> Iterator[str]:
    """Names as a tar of a synset gives them."""
    for k in range(count):
        tar = f"n{k // 700:08d}.tar"
        yield f"{tar}/n{k // 700:08d}_{k}.JPEG\ttar\t{tar}\t{(k % 700) * 90000 + 512}\t88123"


def timed(what: str, function: Callable[[], T]) -> T:
    """Run, and print time and peak memory."""
    begin = time.perf_counter()
    result = function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:24} {time.perf_counter() - begin:8.2f} s, peak memory {peak:7.0f} MiB", flush=True)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=13_153_500)
    parser.add_argument("--per-shard", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        timed("list", lambda: write_file_list(root, names(options.lines)))
        listing = timed("open", lambda: FileList(root, per_shard=options.per_shard))
        lines = timed("read a shard's lines", lambda: listing.lines(listing.shards // 2))
        size = (root / "listing.txt").stat().st_size / 1e6
        print(f"{listing.count:,} lines, {size:.0f} MB, {listing.shards:,} shards, {len(lines)} lines read")


if __name__ == "__main__":
    main()
