"""Measured beside published: one table of one protocol, everything else apart and under its name."""

import re
from dataclasses import replace

import pytest

from depth_anything.evaluation.benchmarks.da2k import PairResult
from depth_anything.evaluation.compare import (
    MEASURED_HERE,
    compare_pairs,
    compare_results,
    format_comparison,
    format_depth_table,
    format_overview,
)
from depth_anything.evaluation.evaluate import METRICS, DepthResult
from depth_anything.evaluation.protocols import PROTOCOLS
from depth_anything.evaluation.reported_results import find_reported_results
from depth_anything.evaluation.table import format_summary


def a_result(name, value, *, protocol=PROTOCOLS["da2"], count=2):
    metrics = dict.fromkeys([*METRICS, *(["boundary_f1"] if protocol.sharp else [])], value)
    return DepthResult(name, protocol, tuple({"key": str(i), "valid": 9, **metrics} for i in range(count)))


def a_score(*right, scenes=("indoor", "aerial")):
    rows = zip(right, scenes, strict=True)
    return PairResult(tuple({"key": s, "scene": s, "pairs": 4, "right": r} for r, s in rows))


def lines_of(text, model):
    return [line for line in text.splitlines() if line.startswith(model)]


def test_measured_and_published_stand_in_the_same_columns():
    comparison = compare_results(
        [a_result("mine", 0.25), a_result("other", 0.5)], find_reported_results("nyu")
    )
    assert comparison.heads == tuple(f"{label} {'↑' if m[0] == 'd' else '↓'}" for m, label in METRICS.items())
    first, second, midas = comparison.lines[:3]
    assert (first.model, first.origin, second.origin) == ("mine", MEASURED_HERE, MEASURED_HERE)
    assert midas.model == "MiDaS 3.1 BEiT-L-512" and midas.origin == "published, arXiv 2401.10891, table 2"
    assert [cell["text"] for cell in midas.cells] == ["0.048", "0.980", *["–"] * 7]
    (again,) = [
        line for line in comparison.lines if "again" in line.origin and line.model == "Depth Anything V2 L"
    ]
    assert again.origin.startswith("measured again, github.com/") and again.cells[0]["text"] == "0.0428"
    assert [cell["best"] for cell in first.cells] == [True, *[False] * 3, *[True] * 5]
    assert not any(cell["best"] for line in comparison.lines[2:] for cell in line.cells)
    assert all(len(line.cells) == len(METRICS) for line in (*comparison.lines, *comparison.others))


def test_other_rules_are_apart_and_every_line_names_its_own():
    comparison = compare_results([a_result("mine", 0.25)], find_reported_results("nyu"))
    assert {line.protocol for line in comparison.lines} == {"da2"}
    assert {line.protocol for line in comparison.others} == {"zoedepth"}
    text = format_comparison(comparison)
    head, rule, rest = text.partition("By other rules, so that nothing above can be held against it:")
    assert rule and "zoedepth" not in head and "da2" not in rest and "ZoeDepth" in rest
    for line in [line for line in text.splitlines() if "arXiv" in line or MEASURED_HERE in line]:
        assert re.search(r"  (da2|zoedepth)  +\S", line)
    fitted = compare_results(
        [a_result("metric", 0.25, protocol=PROTOCOLS["zoedepth"])], find_reported_results("nyu")
    )
    assert {line.protocol for line in fitted.lines} == {"zoedepth"} and len(fitted.lines) == 6
    assert {line.protocol for line in fitted.others} == {"da2"}
    assert (
        not compare_results([a_result("m", 0.2)]).others
        and len(compare_results([a_result("m", 0.2)]).lines) == 1
    )


def test_what_nobody_reproduces_says_so_beside_the_figure():
    comparison = replace(
        compare_results([a_result("mine", 0.25)], find_reported_results("sintel")),
        caution="only 2 of 9 images",
    )
    assert len(comparison.remarks) == 1 and comparison.remarks[0].startswith("not reproduced by anyone")
    marked = {line.model for line in comparison.lines if line.remark}
    assert len(marked) == 8 and "Depth Anything V2 L" in marked
    text = format_depth_table([a_result("mine", 0.25)], comparison)
    assert lines_of(text, "MiDaS")[0].endswith("table 2 (1)") and "\n(1) not reproduced" in text
    assert "\nNote: only 2 of 9 images.\n" in text and "2 images. Protocol da2:" in text
    assert not lines_of(text, "mine")[0].endswith("(1)")


def test_numbers_stand_one_below_the_other():
    text = format_comparison(
        compare_results([a_result("mine", 0.25), a_result("b", 0.5)], find_reported_results("kitti"))
    )
    head = text.partition("\n\n")[0].splitlines()
    points = {re.search(r"\d\.\d\d", line).start() for line in head[2:]}
    assert len(points) == 1 and "0.2500*" in head[2] and "0.076 " in head[7]


def test_boundaries_have_a_column_where_they_were_measured():
    sharp = replace(PROTOCOLS["da2"], sharp=True)
    text = format_depth_table(
        [a_result("mine", 0.25, protocol=sharp)], compare_results([a_result("mine", 0.25, protocol=sharp)])
    )
    assert "boundary F1 ↑" in text and "Depth Pro" in text
    assert "boundary" not in format_comparison(
        compare_results([a_result("mine", 0.25)], find_reported_results("nyu"))
    )
    trials = {"sintel": [a_result("m", 0.25, protocol=sharp)], "nyu": [a_result("m", 0.5)]}
    summary = format_summary(trials).splitlines()
    assert summary[0].endswith("boundary F1 ↑") and summary[2].endswith("0.2500") and summary[3].endswith("–")
    assert "boundary" not in format_summary({"nyu": trials["nyu"]}) and "nan" not in format_summary(trials)


def test_points_have_their_scenes():
    comparison = compare_pairs({"a": a_score(4, 1), "b": a_score(2, 1)}, find_reported_results("da2k"))
    assert comparison.heads == ("right %", "indoor", "aerial")
    a, b, marigold = comparison.lines[:3]
    assert [cell["text"] for cell in a.cells] == ["62.5", "100.0", "25.0"]
    assert [cell["best"] for cell in a.cells] == [True] * 3 and [c["best"] for c in b.cells] == [
        False,
        False,
        True,
    ]
    assert [cell["text"] for cell in marigold.cells] == ["86.8", "–", "–"]
    (small,) = [line for line in comparison.lines if line.model == "Depth Anything V2 S"]
    assert [cell["text"] for cell in small.cells] == ["95.3", "92.9", "96.4"]
    assert small.origin.endswith("arXiv 2406.09414, table 3 (scenes: 14)") and not comparison.others
    alone = compare_pairs({"a": a_score(4, 1)}).lines
    assert len(alone) == 1 and not any(cell["best"] for cell in alone[0].cells)


def test_the_overview_has_models_as_lines_and_benchmarks_as_columns():
    trials = {"nyu": [a_result("mine", 0.25)], "sintel": [a_result("mine", 0.5)]}
    points = {"da2k": {"mine": a_score(4, 1), "only here": a_score(2, 2)}}
    text = format_overview(trials, points, cautions=["nyu: only 2 of 654 images lie there"])
    assert "\nNote: nyu: only 2 of 654 images lie there.\n" in text
    assert re.split(r"  +", text.splitlines()[0]) == ["model", "nyu (da2)", "sintel (da2)", "da2k", "origin"]
    (mine,) = lines_of(text, "mine")
    assert re.split(r"  +", mine) == ["mine", "0.2500 / 0.2500", "0.5000 / 0.5000", "62.5", MEASURED_HERE]
    assert re.split(r"  +", lines_of(text, "only here")[0])[1:4] == ["–", "–", "50.0"]
    paper, again = lines_of(text, "Depth Anything V2 L")
    assert re.split(r"  +", paper)[1:4] == ["0.045 / 0.979", "0.487 / 0.752 (1)", "97.1"]
    assert re.split(r"  +", again)[1:4] == ["0.0428 / –", "0.2321 / –", "–"] and "measured again" in again
    assert "fine-tuned" not in text and "(1) not reproduced by anyone" in text
    for model in ("MiDaS 3.1", *(f"Depth Anything V1 {size}" for size in "SBL"), "Depth Anything V2 G"):
        assert lines_of(text, model), model


@pytest.mark.parametrize("name", ["moge_nyu", "scannet"])
def test_a_benchmark_with_little_or_nothing_published(name):
    protocol = PROTOCOLS["moge" if name == "moge_nyu" else "marigold"]
    comparison = compare_results([a_result("mine", 0.25, protocol=protocol)], find_reported_results(name))
    assert len(comparison.lines) == (3 if name == "moge_nyu" else 1) and not comparison.others
    assert format_comparison(comparison).count("mine") == 1
