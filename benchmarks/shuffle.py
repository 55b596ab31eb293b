"""Compare the order of samples with a perfect shuffle; reads no data.

    python benchmarks/shuffle.py [--json FILE] [--picture FILE]

Two measurements, each for the order of `Stream` and for a random permutation of NumPy:

    within a batch   number of distinct shards, and fraction of pairs of samples from the same shard
    over passes      position of a record in the next pass; fraction of pairs of one batch that are in one batch again;
                     distance of two consecutive records of a shard
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.data.stream import Stream


def order_of(stream: Stream, start: int, count: int) -> np.ndarray:
    """Return the records of samples [start, start + count) as numbers, counted over all shards."""
    first = dict(zip(stream._names, np.cumsum(stream._sizes) - stream._sizes, strict=True))
    rows = (stream.locate(n) for n in range(start, start + count))
    return np.fromiter((first[shard] + index for _, shard, index in rows), np.int64, count)


def perfect(records: int, number: int) -> np.ndarray:
    """Return one pass of a perfect shuffle."""
    return np.random.default_rng([7, number]).permutation(records)


def within_batches(order: np.ndarray, *, batch: int, per_shard: int) -> dict[str, Any]:
    """Measure distinct shards per batch, and the fraction of pairs from the same shard."""
    batches = order[: len(order) // batch * batch].reshape(-1, batch) // per_shard
    counts = [Counter(row.tolist()) for row in batches]
    pairs = [sum(k * (k - 1) for k in count.values()) / (batch * (batch - 1)) for count in counts]
    distinct = np.array([len(count) for count in counts])
    return {
        "batches": len(distinct),
        "distinct_mean": float(distinct.mean()),
        "distinct_least": int(distinct.min()),
        "pairs_of_one_shard": float(np.mean(pairs)),
        "histogram": np.bincount(distinct, minlength=batch + 1).tolist(),
    }


def over_passes(orders: list[np.ndarray], *, batch: int, per_shard: int) -> dict[str, Any]:
    """Compare two passes over the same records; a perfect shuffle gives 1/3, 0 and chance."""
    records = len(orders[0])
    places = [np.argsort(order) for order in orders]  # position of each record
    pairs = list(zip(places, places[1:], strict=False))
    again, met = 0, 0
    for before, after in pairs:
        row = np.argsort(before, kind="stable")[: records // batch * batch].reshape(-1, batch)
        fellows = [Counter((after[members] // batch).tolist()) for members in row]
        again += sum(k * (k - 1) // 2 for count in fellows for k in count.values())
        met += len(row) * batch * (batch - 1) // 2
    inside = np.arange(records - 1)
    inside = inside[inside // per_shard == (inside + 1) // per_shard]
    apart = np.concatenate([np.abs(place[inside + 1] - place[inside]) for place in places]) / records
    return {
        "passes": len(orders),
        "each_once": all((np.sort(order) == np.arange(records)).all() for order in orders),
        "moved_mean": float(np.mean([np.abs(a - b).mean() / records for a, b in pairs])),
        "correlation": float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])),
        "met_again": again / met,
        "neighbours_apart_median": float(np.median(apart)),
        "neighbours_in_one_batch": float((apart * records < batch).mean()),
        "neighbours_histogram": np.histogram(apart, 50, (0, 1), density=True)[0].round(4).tolist(),
    }


def compare(*, shards: int, per_shard: int, batch: int, passes: int, batches: int) -> dict[str, Any]:
    """Measure our order and a perfect shuffle; with passes=0 only within batches."""
    names = [(f"set/{i:06d}", per_shard) for i in range(shards)]
    stream = Stream(names, seed=0, streams=8 * batch)
    records = stream.records
    found: dict[str, Any] = {"shards": shards, "per_shard": per_shard, "batch": batch, "records": records}
    if passes:
        ours = [order_of(stream, number * records, records) for number in range(passes)]
        theirs = [perfect(records, number) for number in range(passes)]
    else:  # parts of the start, the middle and the end, because all of it would take hours
        starts = [0, records // 2 // batch * batch, records * 3 // 2 // batch * batch]
        ours = [np.concatenate([order_of(stream, start, batch * batches // 3) for start in starts])]
        theirs = [np.random.default_rng(7).integers(0, records, batch * (batches // 3) * 3)]
    for name, orders in (("ours", ours), ("perfect", theirs)):
        found[name] = within_batches(np.concatenate(orders), batch=batch, per_shard=per_shard)
        if passes:
            found[name] |= over_passes(orders, batch=batch, per_shard=per_shard)
    if passes:
        found["places"] = [np.argsort(order)[:: max(1, records // 1500)].tolist() for order in ours[:2]]
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Plot distinct shards, positions in two passes, and distances of neighbors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    large, small = found[-1], found[0]
    for name, color in (("ours", "tab:blue"), ("perfect", "tab:orange")):
        share = np.array(large[name]["histogram"]) / large[name]["batches"]
        axes[0].plot(np.arange(len(share)), share, color=color, label=name, drawstyle="steps-mid")
        for rows, style in ((small, "-"), (found[1], ":")):
            density = np.maximum(rows[name]["neighbours_histogram"], 1e-4)
            label = f"{name}, {rows['shards']:,} shards, batch {rows['batch']}"
            axes[2].plot(np.arange(50) / 50 + 0.01, density, style, color=color, label=label)
    seen = np.flatnonzero(np.array(large["ours"]["histogram"]) + np.array(large["perfect"]["histogram"]))
    axes[0].set(
        title=f"distinct shards in a batch of {large['batch']}, {large['shards']:,} shards",
        xlabel="shards",
        ylabel="share of batches",
        xlim=(seen.min() - 2, large["batch"] + 2),
    )
    axes[1].plot(*np.array(small["places"]) / small["records"], ".", markersize=2)
    axes[1].set(
        title=f"where a record comes, {small['shards']:,} shards", xlabel="first pass", ylabel="second pass"
    )
    axes[2].set(
        title="distance of neighbours in a shard",
        xlabel="share of a pass",
        ylabel="density",
        yscale="log",
    )
    axes[0].legend()
    axes[2].legend()
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--picture", type=Path, help="draw them here")
    parser.add_argument("--small", action="store_true", help="few shards, to see that it runs")
    args = parser.parse_args(argv)
    shards, large, per_shard = (20, 200, 50) if args.small else (200, 62_300, 1000)
    batch = 8 if args.small else 192
    found = [
        compare(shards=shards, per_shard=per_shard, batch=batch, passes=3, batches=0),
        # Streams of several shards each, as in the paper's run: the records of a shard are in one part of a pass.
        compare(shards=5 * shards, per_shard=per_shard, batch=max(4, batch // 12), passes=2, batches=0),
        compare(shards=large, per_shard=per_shard, batch=batch, passes=0, batches=9 if args.small else 1500),
    ]
    for rows in found:
        print(
            f"{rows['shards']:,} shards of {rows['per_shard']:,}, batch {rows['batch']}:     ours    perfect"
        )
        for name, value in rows["ours"].items():
            if not name.endswith("histogram"):
                print(f"    {name:26} {value:>12.5g} {rows['perfect'][name]:>12.5g}")
    if args.picture:
        draw(found, args.picture)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
