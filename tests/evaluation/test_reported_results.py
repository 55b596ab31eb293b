"""Reported results: the papers' tables, entry by entry where a mistake would mislead most."""

import pytest

from depth_anything.evaluation.benchmarks.benchmark_catalog import BENCHMARKS, load_benchmark
from depth_anything.evaluation.benchmarks.da2k import SCENE_TYPES
from depth_anything.evaluation.protocols import PROTOCOLS
from depth_anything.evaluation.reported_results import (
    BENCHMARKS_WITHOUT_READER,
    find_reported_results,
    load_reported_results,
)
from depth_anything.metrics import depth_metrics


def figure(model, benchmark, metric="abs_rel", *, rerun=False, protocol="da2"):
    (row,) = [
        row
        for row in find_reported_results(benchmark, protocol=protocol)
        if row.model == model and row.rerun == rerun
    ]
    return row.values[metric]


def test_values_equal_those_of_the_papers():
    """Read off the papers, not off the code."""
    small, large = "Depth Anything V2 S", "Depth Anything V2 L"
    assert [figure(small, name) for name in ("kitti", "nyu", "sintel", "eth3d", "diode")] == [
        0.078,
        0.053,
        0.500,
        0.142,
        0.073,
    ]
    assert [figure(large, name, "d1") for name in ("kitti", "nyu", "sintel", "eth3d", "diode")] == [
        0.946,
        0.979,
        0.752,
        0.865,
        0.952,
    ]
    assert (
        figure("MiDaS 3.1 BEiT-L-512", "kitti") == 0.127 and figure("MiDaS 3.1 BEiT-L-512", "ddad") == 0.251
    )
    assert figure("Depth Anything V1 L", "ddad", "d1") == 0.789
    assert figure("Depth Anything V2 G", "sintel") == 0.506
    assert figure("Depth Anything V2 L, fine-tuned", "kitti", "rmse", protocol="zoedepth") == 1.861
    assert figure("ZoeDepth", "nyu", "log10", protocol="zoedepth") == 0.033
    zero_shot = [
        figure("Depth Anything V1 L, metric", name, metric, protocol="zoedepth")
        for name in ("sunrgbd_v1", "hypersim", "vkitti2", "diode_outdoor")
        for metric in ("abs_rel", "d1")
    ]
    assert zero_shot == [0.500, 0.660, 0.363, 0.361, 0.085, 0.913, 0.794, 0.288]
    assert figure(small, "da2k", "accuracy", protocol="da2k") == 0.953
    assert figure(large, "moge_eth3d", protocol="moge") == 0.0473
    assert figure(large, "nyu", rerun=True) == 0.0428
    assert figure("Depth Anything V1 L, metric", "ibims", "d1", protocol="zoedepth") == 0.714
    assert figure("Depth Anything V2", "booster_ntire2024", "d1", protocol="marigold") == 0.836


@pytest.mark.parametrize("name", ["kitti", "nyu", "sintel", "eth3d", "diode"])
def test_each_set_has_the_eight_models(name):
    rows = [row.model for row in find_reported_results(name, protocol="da2") if not row.rerun]
    assert rows == ["MiDaS 3.1 BEiT-L-512", *(f"Depth Anything V1 {size}" for size in "SBL")] + [
        f"Depth Anything V2 {size}" for size in "SBLG"
    ]


def test_every_row_is_of_a_known_benchmark_and_metric():
    metrics = {"accuracy", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "d1", "d2", "d3"}
    assert metrics - {"accuracy"} <= set(depth_metrics.__doc__.split()) | metrics
    for row in load_reported_results():
        assert row.benchmark in (*BENCHMARKS, *BENCHMARKS_WITHOUT_READER) and row.source
        assert row.protocol in (*PROTOCOLS, "da2k") and row.values.keys() <= metrics | set(SCENE_TYPES)
        assert all(0 < value < 3 for value in row.values.values())
        if row.benchmark in BENCHMARKS and row.protocol != "da2k":
            assert row.protocol in load_benchmark(row.benchmark).depth_limits
    keys = [(row.model, row.benchmark, row.protocol, row.rerun) for row in load_reported_results()]
    assert len(keys) == len(set(keys))
    assert find_reported_results("nothing") == ()


def test_results_that_nobody_reproduced_have_a_remark():
    for name in (
        "eth3d", "sintel", "diode", "ddad", "booster_ntire2024", "sunrgbd_v1", "hypersim", "vkitti2",
    ):  # fmt: skip
        assert all(row.remark for row in find_reported_results(name) if not row.rerun)
    assert not any(row.remark for row in find_reported_results("kitti"))


def test_the_scene_types_of_da2k_agree_with_their_mean():
    rows = [row for row in find_reported_results("da2k") if set(SCENE_TYPES) <= row.values.keys()]
    assert len(rows) == 3
    for row in rows:
        mean = sum(row.values[scene] for scene in SCENE_TYPES) / 8
        assert mean == pytest.approx(row.values["accuracy"], abs=0.015)
