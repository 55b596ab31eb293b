"""Results that papers and others report, to compare with what is measured here: reported_results.csv.

A reported result is comparable only with one measured by the same protocol on the same files. Depth Anything's papers
(arXiv 2401.10891, 2406.09414) do not state the protocol of their zero-shot tables; `da2` reproduces them within 7 % on
NYU, KITTI and the indoor images of DIODE, and not on ETH3D and Sintel: the column "remark" says so.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

BENCHMARKS_WITHOUT_READER = ("booster_ntire2024",)
"""Benchmarks whose ground truth is not public."""

_TEXT_COLUMNS = ("model", "benchmark", "protocol", "source", "rerun", "remark")


@dataclass(frozen=True)
class ReportedResult:
    """The figures of one model on one benchmark.

    Attributes:
        model: as tables call it.
        benchmark: name in `benchmark_catalog`, or one of `BENCHMARKS_WITHOUT_READER`.
        protocol: the protocol, or the nearest to what is known of it.
        values: metric of `metrics.depth_metrics`, or "accuracy" and scene types of DA-2K (0 to 1), to value.
        source: paper and table, or repository.
        rerun: whether someone else measured it with the released weights.
        remark: what a reader must know before comparing (a sentence without its full stop), or "".
    """

    model: str
    benchmark: str
    protocol: str
    values: Mapping[str, float]
    source: str
    rerun: bool = False
    remark: str = ""


@cache
def load_reported_results() -> tuple[ReportedResult, ...]:
    """Read all reported results, in the order of the file."""
    file = resources.files("depth_anything.evaluation").joinpath("reported_results.csv")
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return tuple(
        ReportedResult(
            model=row["model"],
            benchmark=row["benchmark"],
            protocol=row["protocol"],
            values={name: float(text) for name, text in row.items() if text and name not in _TEXT_COLUMNS},
            source=row["source"],
            rerun=row["rerun"] == "yes",
            remark=row["remark"],
        )
        for row in rows
    )


def find_reported_results(benchmark: str, *, protocol: str | None = None) -> tuple[ReportedResult, ...]:
    """The reported results on a benchmark, of one protocol or of all: papers' first, then others'."""
    return tuple(
        result
        for result in load_reported_results()
        if result.benchmark == benchmark and protocol in (None, result.protocol)
    )
