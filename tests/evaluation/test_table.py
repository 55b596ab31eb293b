"""Measured and reported results: one table per protocol, and every row names its own."""

import re
from dataclasses import replace

import pytest

from depth_anything.evaluation.benchmarks.da2k import SCENE_TYPES
from depth_anything.evaluation.depth_task import DepthTask
from depth_anything.evaluation.evaluate import METRICS
from depth_anything.evaluation.pairs_task import PairsTask
from depth_anything.evaluation.protocols import PROTOCOLS
from depth_anything.evaluation.reported_results import find_reported_results
from depth_anything.evaluation.table import (
    MEASURED_HERE,
    OTHER_PROTOCOLS,
    build_table,
    format_overview,
    format_summary,
    format_table,
)

DA2K = PairsTask("da2k", [], None, {})


def a_task(name="nyu", protocol=PROTOCOLS["da2"], incomplete=""):
    return DepthTask(name, [], None, {}, incomplete, protocol=protocol)


def a_result(name, value, task=None, count=2):
    task = task or a_task()
    metrics = dict.fromkeys([*METRICS, *(["boundary_f1"] if task.protocol.sharp else [])], value)
    return task.result(name, ({"key": str(i), "valid": 9, **metrics} for i in range(count)))


def a_pair_result(name, *right, scenes=("indoor", "aerial")):
    rows = zip(right, scenes, strict=True)
    return DA2K.result(name, ({"key": s, "scene": s, "pairs": 4, "right": r} for r, s in rows))


def a_table(task, *values):
    results = [a_result(f"model {value}", value, task) for value in values]
    return build_table(task, results, find_reported_results(task.name))


def lines_of(text, model):
    return [line for line in text.splitlines() if line.startswith(model)]


def texts(row):
    return [cell.text for cell in row.cells]


def test_measured_and_reported_results_have_the_same_columns():
    table = a_table(a_task(), 0.25, 0.5)
    assert table.headings == tuple(f"{label} {'↑' if m[0] == 'd' else '↓'}" for m, label in METRICS.items())
    first, second, midas = table.rows[:3]
    assert (first.model, first.origin, second.origin) == ("model 0.25", MEASURED_HERE, MEASURED_HERE)
    assert midas.model == "MiDaS 3.1 BEiT-L-512" and midas.origin == "published, arXiv 2401.10891, table 2"
    assert texts(midas) == ["0.048", "0.980", *["–"] * 7]
    (again,) = [row for row in table.rows if "again" in row.origin and row.model == "Depth Anything V2 L"]
    assert again.origin.startswith("measured again, github.com/") and again.cells[0].text == "0.0428"
    assert [cell.best for cell in first.cells] == [True, *[False] * 3, *[True] * 5]
    assert not any(cell.best for row in table.rows[2:] for cell in row.cells)
    assert all(len(row.cells) == len(METRICS) for row in (*table.rows, *table.other_rows))


def test_results_by_other_protocols_are_in_a_second_table_and_every_row_names_its_protocol():
    table = a_table(a_task(), 0.25)
    assert {row.protocol for row in table.rows} == {"da2"}
    assert {row.protocol for row in table.other_rows} == {"zoedepth"}
    text = format_table(table)
    head, rule, rest = text.partition(OTHER_PROTOCOLS)
    assert rule and "zoedepth" not in head and "da2" not in rest and "ZoeDepth" in rest
    for line in [line for line in text.splitlines() if "arXiv" in line or MEASURED_HERE in line]:
        assert re.search(r"  (da2|zoedepth)  +\S", line)
    metric = a_table(a_task(protocol=PROTOCOLS["zoedepth"]), 0.25)
    assert {row.protocol for row in metric.rows} == {"zoedepth"} and len(metric.rows) == 6
    assert {row.protocol for row in metric.other_rows} == {"da2"}
    alone = build_table(a_task(), [a_result("m", 0.2)])
    assert not alone.other_rows and len(alone.rows) == 1
    assert "da2" not in format_table(alone) and MEASURED_HERE not in format_table(alone)


def test_results_that_nobody_reproduced_have_a_remark():
    task = a_task("sintel", incomplete="only 2 of 9 images")
    table = a_table(task, 0.25)
    assert len(table.remarks) == 1 and table.remarks[0].startswith("not reproduced")
    marked = {row.model for row in table.rows if row.remark}
    assert len(marked) == 8 and "Depth Anything V2 L" in marked
    text = format_table(table, task.notes([a_result("mine", 0.25)]))
    assert lines_of(text, "MiDaS")[0].endswith("table 2 (1)") and "\n(1) not reproduced" in text
    assert "\nNote: only 2 of 9 images.\n" in text and "2 images. Protocol da2:" in text
    assert not lines_of(text, "model 0.25")[0].endswith("(1)")
    assert build_table(task, [a_result("m", 0.2)]).caution == ""


def test_decimal_points_are_aligned():
    text = format_table(a_table(a_task("kitti"), 0.25, 0.5))
    head = text.partition("\n\n")[0].splitlines()
    points = {re.search(r"\d\.\d\d", line.removeprefix("model 0.")).start() for line in head[4:]}
    assert len(points) == 1 and "0.2500*" in head[2] and "0.076 " in head[7]


def test_boundaries_have_a_column_where_they_are_measured():
    sharp = a_task("sintel", replace(PROTOCOLS["da2"], sharp=True))
    own = a_result("m", 0.25, sharp)
    text = format_table(build_table(sharp, [own]), sharp.notes([own]))
    assert "boundary F1 ↑" in text and "Depth Pro" in text
    assert "boundary" not in format_table(a_table(a_task(), 0.25))
    evaluated = [(sharp, [own]), (a_task(), [a_result("m", 0.5)])]
    summary = format_summary(evaluated).splitlines()
    assert summary[0].endswith("boundary F1 ↑") and summary[2].endswith("0.2500") and summary[3].endswith("–")
    assert "boundary" not in format_summary(evaluated[1:]) and "nan" not in format_summary(evaluated)


def test_pairs_of_points_have_a_column_per_scene_type():
    results = [a_pair_result("a", 4, 1), a_pair_result("b", 2, 1)]
    table = build_table(DA2K, results, find_reported_results("da2k"))
    assert table.headings == ("right %", "indoor", "aerial")
    a, b, marigold = table.rows[:3]
    assert texts(a) == ["62.5", "100.0", "25.0"]
    assert [cell.best for cell in a.cells] == [True] * 3 and [c.best for c in b.cells] == [False, False, True]
    assert texts(marigold) == ["86.8", "–", "–"]
    (small,) = [row for row in table.rows if row.model == "Depth Anything V2 S"]
    assert texts(small) == ["95.3", "92.9", "96.4"]
    assert "table 3" in small.origin and "14" in small.origin and not table.other_rows
    assert list(results[0].means) == ["accuracy", *(s for s in SCENE_TYPES if s in ("indoor", "aerial"))]
    alone = build_table(DA2K, results[:1]).rows
    assert len(alone) == 1 and not any(cell.best for cell in alone[0].cells)


def test_the_overview_has_a_row_per_model_and_a_column_per_benchmark():
    nyu, sintel = a_task(incomplete="only 2 of 654 images are there"), a_task("sintel")
    pairs = [a_pair_result("mine", 4, 1), a_pair_result("only here", 2, 2)]
    results = [(nyu, [a_result("mine", 0.25)]), (sintel, [a_result("mine", 0.5)]), (DA2K, pairs)]
    text = format_overview(results)
    assert "\nNote: nyu: only 2 of 654 images are there.\n" in text
    assert re.split(r"  +", text.splitlines()[0]) == ["model", "nyu (da2)", "sintel (da2)", "da2k", "origin"]
    (mine,) = lines_of(text, "mine")
    assert re.split(r"  +", mine) == ["mine", "0.2500 / 0.2500", "0.5000 / 0.5000", "62.5", MEASURED_HERE]
    assert re.split(r"  +", lines_of(text, "only here")[0])[1:4] == ["–", "–", "50.0"]
    paper, again = lines_of(text, "Depth Anything V2 L")
    assert re.split(r"  +", paper)[1:4] == ["0.045 / 0.979", "0.487 / 0.752 (1)", "97.1"]
    assert re.split(r"  +", again)[1:4] == ["0.0428 / –", "0.2321 / –", "–"] and "measured again" in again
    assert "fine-tuned" not in text and "(1) not reproduced" in text
    for model in ("MiDaS 3.1", *(f"Depth Anything V1 {size}" for size in "SBL"), "Depth Anything V2 G"):
        assert lines_of(text, model), model


@pytest.mark.parametrize(("name", "rows"), [("moge_nyu", 3), ("scannet", 1)])
def test_a_benchmark_with_few_or_no_reported_results_has_a_table(name, rows):
    table = a_table(a_task(name, PROTOCOLS["moge" if name == "moge_nyu" else "marigold"]), 0.25)
    assert len(table.rows) == rows and not table.other_rows
    assert format_table(table).count("model 0.25") == 1
