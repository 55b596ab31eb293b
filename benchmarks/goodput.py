"""Simulate the paper's run at 8, 64 and 512 GPUs: goodput under failures, and where each resource breaks.

    python benchmarks/goodput.py                                  print the tables
    python benchmarks/goodput.py --write --picture docs/pictures/scale.png    and put them into docs/scale.md

Nothing is measured here: plans are computed, failures and readers are simulated (depth_anything/planning).
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from depth_anything.devices import find_device
from depth_anything.planning import assumptions
from depth_anything.planning.assumptions import Cluster
from depth_anything.planning.goodput import (
    GPU_HOURS_PER_FAILURE,
    RSC_GPU_HOURS_PER_FAILURE,
    Checkpoints,
    Interruptions,
    daly_interval,
    expected_goodput,
    first_order_goodput,
    job_mtbf_s,
    simulate_goodput,
)
from depth_anything.planning.pipeline import PipelinePlan, plan_pipeline
from depth_anything.planning.report import format_hours, format_quantity
from depth_anything.planning.stage_plan import save_times
from depth_anything.planning.store import ReaderDemand, Store, index_reads, reader_throughput
from depth_anything.progress import format_duration

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
GPUS = (8, 64, 512)
STARTS, SEED = 20_000, 0

VITG_CHECKPOINT_S = 30.2
"""Seconds to write the teacher's checkpoint and to read it back at 1 GB/s; a test compares it with a plan."""

SYNTHETIC_SETS = 5
WORKERS_PER_GPU = 8
"""Of configs/size/paper.yaml."""
CORES_PER_GPU = 10
"""Of slurm/train.sbatch."""
STORES = {
    "one S3 prefix": Store(bytes_per_s=100e9, requests_per_s=5500, latency_s=0.02),
    "one NFS server, 25 Gbit/s": Store(bytes_per_s=3.1e9, requests_per_s=50_000, latency_s=0.001),
    "a parallel file system": Store(bytes_per_s=50e9, requests_per_s=500_000, latency_s=0.001),
}
"""Requests of S3: "at least 5,500 GET requests per second per partitioned prefix" (Amazon). Others are assumed."""


def goodput_rows() -> list[list[str]]:
    """Simulate jobs by size, and the runs that were published."""
    rows = []
    for source, hours in (("Llama 3", GPU_HOURS_PER_FAILURE), ("Meta's clusters", RSC_GPU_HOURS_PER_FAILURE)):
        for gpus in (*GPUS, 16_384):
            mtbf = job_mtbf_s(gpus, hours)
            checkpoints = Checkpoints(daly_interval(VITG_CHECKPOINT_S, mtbf), VITG_CHECKPOINT_S)
            cells = [source, f"{gpus:,}", format_duration(mtbf), format_duration(checkpoints.interval_s)]
            for restart in (600.0, 240.0):
                stops = Interruptions(mtbf, restart)
                share = simulate_goodput(stops, checkpoints, starts=STARTS, seed=SEED).share
                cells.append(f"{share:.2%}")
                if restart == 600.0:
                    cells += [f"{expected_goodput(stops, checkpoints):.2%}"]
                    cells += [f"{first_order_goodput(stops, checkpoints):.2%}"]
            rows.append(cells)
    return rows


def interval_rows(plans: Sequence[PipelinePlan]) -> list[list[str]]:
    """Compare the configured interval of checkpoints with the best, stage by stage."""
    rows = []
    for plan in plans:
        for stage in plan.stages:
            if stage.checkpoints is None:
                continue
            saved, every = stage.checkpoints, stage.checkpoints.every_s
            mtbf = job_mtbf_s(stage.work.gpus)
            stops = Interruptions(mtbf, plan.cluster.restart_s, plan.cluster.time_limit_s)
            best = min(saved.best_every_s, 3600 * stage.useful_hours)
            shares = [
                simulate_goodput(stops, Checkpoints(t, saved.stop_s), starts=STARTS, seed=SEED).share
                for t in (every, 1800.0, best)
            ]
            name, gpus = f"{stage.stage} {stage.encoder}", str(stage.work.gpus)
            behind = save_times(saved.bytes, plan.cluster, every, asynchronous=True)
            shares.insert(1, simulate_goodput(stops, behind, starts=STARTS, seed=SEED).share)
            cells = [name, gpus, f"{saved.stop_s:.1f} s", format_duration(every)]
            row = [*cells, *(f"{share:.2%}" for share in shares)]
            if row not in rows:  # a larger cluster, of which the stage uses as many GPUs
                rows.append(row)
    return rows


def demand_rows(plans: Sequence[PipelinePlan]) -> list[list[str]]:
    """List what each stage asks for on each cluster, in bold what is more than the limits of the page."""
    rows = []
    for plan in plans:
        for stage in plan.stages:
            data, work = stage.data, stage.work
            cores, busiest = data.cores / work.gpus, work.images_per_s * largest_share(stage.stage)
            rows.append(
                [
                    f"{stage.stage} {stage.encoder}",
                    f"{_bold(str(work.gpus), work.gpus < plan.cluster.gpus)} of {plan.cluster.gpus}",
                    "–"
                    if work.images_per_gpu is None
                    else _bold(str(work.images_per_gpu), work.images_per_gpu < 4),
                    format_hours(stage.hours),
                    format_hours(stage.gpu_hours),
                    f"{work.images_per_s:,.0f}",
                    _bold(f"{cores:.1f}", cores > CORES_PER_GPU),
                    _bold(f"{busiest:,.0f}", busiest > 5500),
                    _bold(format_quantity(data.read_bytes_per_s, "B/s"), data.read_bytes_per_s > 3.1e9),
                    _bold(format_quantity(data.write_bytes_per_s, "B/s"), data.write_bytes_per_s > 3.1e9),
                    _bold(
                        format_quantity(work.gradient_bytes_per_s, "B/s"), work.gradient_bytes_per_s > 50e9
                    ),
                ]
            )
        totals = [format_hours(plan.hours), format_hours(plan.gpu_hours)]
        rows.append(["all", f"{plan.cluster.gpus}", "", *totals, *[""] * 6])
    return rows


def largest_share(stage: str) -> float:
    """Return the share of a stage's records that its largest set has, which is the busiest prefix of a bucket."""
    records = list(assumptions.PAPER_RECORDS.values())
    sets = records[:SYNTHETIC_SETS] if stage == "teacher" else records[SYNTHETIC_SETS:]
    return max(sets) / sum(sets)


def _bold(text: str, short: bool) -> str:
    return f"**{text}**" if short else text


def store_rows() -> list[list[str]]:
    """Let 1 to 4,096 loader processes of a student read from one store."""
    demand = ReaderDemand(
        bytes=assumptions.IMAGE_BYTES + assumptions.LABEL_BYTES,
        requests=2,
        cpu_s=assumptions.LOADER_MS / 1e3,
    )
    return [
        [f"{readers:,}", *(f"{reader_throughput(store, demand, readers):,.0f}" for store in STORES.values())]
        for readers in (1, 8, 64, 512, 4096)
    ]


def index_rows(plans: Sequence[PipelinePlan]) -> list[list[str]]:
    """Compare the indexes that a student's loader processes read with the records."""
    rows = []
    for plan in plans:
        stage = next(stage for stage in plan.stages if stage.stage == "student")
        readers, data = stage.work.gpus * WORKERS_PER_GPU, stage.data
        reads = 2 * data.passes * index_reads(data.shards, data.records / data.shards, readers)
        cells = [f"{stage.work.gpus}", f"{readers:,}", format_quantity(data.read_bytes, "B")]
        size = reads * assumptions.INDEX_BYTES
        rows.append([*cells, format_quantity(size, "B"), f"{size / data.read_bytes:.0%}"])
    return rows


def plan_all() -> list[PipelinePlan]:
    """Plan the paper's run on each cluster."""
    cluster = Cluster(find_device("h100"), gpus=1)
    return plan_pipeline(["size=paper"], ROOT / "configs", [replace(cluster, gpus=gpus) for gpus in GPUS])


def format_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table of Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(plans: Sequence[PipelinePlan]) -> dict[str, str]:
    """Return the tables of docs/scale.md by their names there; those of plans only if there are plans."""
    found = {
        "goodput": format_markdown(
            [
                "failures as",
                "GPUs",
                "one every",
                "saved every",
                "simulated",
                "Daly",
                "Young",
                "simulated, restart 4 min",
            ],
            goodput_rows(),
        ),
        "store": format_markdown(["readers", *STORES], store_rows()),
    }
    if plans:
        found["demand"] = format_markdown(
            [
                "stage",
                "GPUs",
                "images each",
                "hours",
                "GPU-hours",
                "images/s",
                "cores each",
                "requests/s",
                "read",
                "written",
                "gradients",
            ],
            demand_rows(plans),
        )
        found["index"] = format_markdown(
            ["GPUs used", "loader processes", "records read", "indexes read", "indexes ÷ records"],
            index_rows(plans),
        )
        found["interval"] = format_markdown(
            [
                "stage",
                "GPUs",
                "saving takes",
                "2,000 steps take",
                "every 2,000",
                "asynchronous",
                "at 30 minutes",
                "at the best interval",
            ],
            interval_rows(plans),
        )
    return found


def replace_tables(page: str, found: dict[str, str]) -> str:
    """Return the page with other tables between their marks."""
    for name, table in found.items():
        pattern = rf"(?s)(<!-- {name}: written by benchmarks/goodput\.py -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda mark, table=table: f"{mark[1]}\n{table}\n\n{mark[2]}", page)
        assert count == 1, f"the page has no place for the table {name}"
    return page


def draw(plans: Sequence[PipelinePlan], path: Path) -> None:
    """Draw the goodput by the number of GPUs, and the throughput of a store by the number of readers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    sizes = [2**power for power in range(3, 16)]
    for label, hours in (
        ("Llama 3", GPU_HOURS_PER_FAILURE),
        ("Meta's research clusters", RSC_GPU_HOURS_PER_FAILURE),
    ):
        shares = []
        for gpus in sizes:
            mtbf = job_mtbf_s(gpus, hours)
            checkpoints = Checkpoints(daly_interval(VITG_CHECKPOINT_S, mtbf), VITG_CHECKPOINT_S)
            shares.append(
                simulate_goodput(Interruptions(mtbf, 600.0), checkpoints, starts=STARTS, seed=SEED).share
            )
        left.plot(sizes, shares, marker="o", markersize=3, label=f"failures as counted on {label}")
    left.errorbar(
        [16_384],
        [0.90],
        yerr=[[0], [0.05]],
        fmt="k^",
        lolims=True,
        markersize=5,
        label="Llama 3, published: above 0.90",
    )
    left.set(
        xscale="log",
        xlabel="GPUs of one job",
        ylabel="goodput",
        ylim=(0, 1.02),
        title="restart 10 min, checkpoint 15 s, best interval",
    )
    left.legend(fontsize=7, loc="lower left")
    demand = ReaderDemand(assumptions.IMAGE_BYTES + assumptions.LABEL_BYTES, 2, assumptions.LOADER_MS / 1e3)
    readers = [2**power for power in range(13)]
    for name, store in STORES.items():
        right.plot(readers, [reader_throughput(store, demand, number) for number in readers], label=name)
    for plan in plans:
        stage = next(stage for stage in plan.stages if stage.stage == "student")
        rate = stage.work.images_per_s
        right.axhline(rate, color="gray", linewidth=0.7, linestyle="--")
        right.text(1, rate * 1.1, f"{stage.encoder} on {stage.work.gpus} GPUs", fontsize=7, color="gray")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="loader processes on one store",
        ylabel="images/s",
        title="a student's samples from one store",
    )
    right.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Print the tables, and write them and the picture if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw a picture")
    options = parser.parse_args()
    plans = plan_all()
    found = tables(plans)
    print("\n\n".join(found.values()))
    if options.write:
        PAGE.write_text(replace_tables(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    if options.picture:
        draw(plans, options.picture)


if __name__ == "__main__":
    main()
