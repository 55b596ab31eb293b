"""The report: complete and self-contained; ties, NaN and incomparable results are marked."""

import base64
import csv
import json
import math
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest

from depth_anything.data.sample import Frame
from depth_anything.evaluation.depth_task import DepthTask
from depth_anything.evaluation.evaluate import METRICS, DepthResult, evaluate
from depth_anything.evaluation.pairs_task import PairsTask
from depth_anything.evaluation.protocols import EvalProtocol
from depth_anything.evaluation.report import write_report, write_summary
from depth_anything.evaluation.reported_results import ReportedResult
from depth_anything.evaluation.table import build_table, format_table

PROTOCOL = EvalProtocol("da2", fitted=("disparity",))


class Noisy:
    """The truth with noise: the number of an image is in its first pixel."""

    quantity = "disparity"

    def __init__(self, frames, noise):
        self.frames, self.noise = frames, noise

    def predict_batch(self, images):
        maps = []
        for number in (int(image[0, 0, 0]) for image in images):
            rng = np.random.default_rng(number)
            depth = np.nan_to_num(self.frames[number].depth, nan=9.0, posinf=50.0)
            maps.append((1 / depth + self.noise * (number + 1) * rng.random(depth.shape)).astype(np.float32))
        return maps


def make_frames(count=9, height=40, width=60):
    frames = []
    for number in range(count):
        rows = np.linspace(12, 2, height, dtype=np.float32)[:, None]
        depth = rows + np.cos(np.arange(width, dtype=np.float32) / 5 + number)
        depth[: number % 3] = np.inf
        frames.append(
            Frame(f"toy/0/{number:03d}", np.full((height, width, 3), number, np.uint8), {}, depth=depth)
        )
    return frames


def a_task(frames=(), facts=None, protocol=PROTOCOL, incomplete=""):
    lines = [str(number) for number in range(len(frames))]
    return DepthTask("toy", lines, lambda line: frames[int(line)], facts or {}, incomplete, protocol=protocol)


def evaluate_noise(frames, protocol=PROTOCOL, **noises):
    models = {name: Noisy(frames, noise) for name, noise in noises.items()}
    return models, [
        evaluate(model, frames, name=name, protocol=protocol, model={"fingerprint": "sha256:" + name})
        for name, model in models.items()
    ]


def a_result(name, values, **changes):
    rows = [dict.fromkeys(METRICS, value) | {"key": str(i), "valid": 9} for i, value in enumerate(values)]
    return DepthResult(name, tuple(row | changes for row in rows), protocol=PROTOCOL)


def table_of(*results):
    return format_table(build_table(a_task(), results), a_task().notes(results))


def written(task, models, results, folder):
    page = write_report(task, results, folder, examples=task.examples(models, results))
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    frames = make_frames()
    task = a_task(frames, {"set": "toy <script>", "digest": "sha256:1234", "limit": None})
    models, results = evaluate_noise(frames, good=0.001, bad=0.01)
    examples = task.examples(models, results)
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(task, results, folder, examples=examples, settings={"command": "depth-anything evaluate"})
    return folder, results, examples


def test_examples_are_the_first_and_the_best_median_and_worst(report):
    _, results, examples = report
    errors = {row["key"]: row["abs_rel"] for row in results[0].rows}
    ranked = sorted(errors, key=errors.get)
    reasons = {example.key: example.reason for example in examples}
    assert list(reasons)[:4] == [f"toy/0/00{number}" for number in range(4)]
    for key, why in ((ranked[0], "best"), (ranked[4], "median"), (ranked[-1], "worst")):
        assert why in reasons[key]
    assert "first, best" in reasons["toy/0/000"] and len(examples) == len(reasons)
    assert list(a_task().choose_examples(results, first=2))[:2] == ["toy/0/000", "toy/0/001"]


def test_examples_hold_maps_in_meters(report):
    _, _, examples = report
    for example in examples:
        known = np.isfinite(example.truth)
        good, bad = (np.abs(example.predictions[n] - example.truth)[known].mean() for n in ("good", "bad"))
        assert good < bad < 8
        assert example.predictions["good"].dtype == np.float32


def test_the_page_is_self_contained(report):
    page = (report[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://|<script|<link""", page)
    assert "toy &lt;script&gt;" in page
    for needed in (
        "prefers-color-scheme: dark",
        "sha256:good",
        "sha256:1234",
        "AbsRel ↓",
        "δ1 ↑",
        "depth-anything evaluate",
    ):
        assert needed in page
    assert "limit" not in page


def test_the_page_shows_the_metrics_and_pictures(report):
    folder, results, examples = report
    page = (folder / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    decoded = [cv2.imdecode(np.frombuffer(base64.b64decode(p), np.uint8), cv2.IMREAD_COLOR) for p in pictures]
    assert len(decoded) == len(examples) * (2 + 2 + 2 * 2)
    assert all(picture is not None for picture in decoded)
    for result in results:
        for example in examples:
            error = next(row["abs_rel"] for row in result.rows if row["key"] == example.key)
            assert f"{error:.4f}" in page
        assert f"{result.means['d1']:.4f}" in page
    assert page.count("<polyline") == 2


def test_json_and_csv_hold_every_row(report):
    folder, results, _ = report
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert document["protocol"]["name"] == "da2" and document["protocol"]["max_depth"] == 80
    assert document["data"]["digest"] == "sha256:1234" and document["versions"]["torch"] and document["date"]
    for model, result in zip(document["models"], results, strict=True):
        assert model["name"] == result.name and model["facts"]["fingerprint"] == f"sha256:{result.name}"
        assert model["means"] == result.means and model["rows"] == list(result.rows) and model["images"] == 9
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18 and float(rows[9]["abs_rel"]) == results[1].rows[0]["abs_rel"]
    assert (folder / "table.txt").read_text(encoding="utf-8") == table_of(*results) + "\n"


def test_table_marks_the_best_in_each_direction():
    table = table_of(a_result("low", [0.1, 0.2]), a_result("high", [0.3, 0.4]))
    low, high = (
        next(line for line in table.splitlines() if line.startswith(name)) for name in ("low", "high")
    )
    assert low.split()[1:] == ["0.1500*", "0.1500", "0.1500", "0.1500"] + ["0.1500*"] * 5
    assert high.split()[1:] == ["0.3500", "0.3500*", "0.3500*", "0.3500*"] + ["0.3500"] * 5
    assert "2 images" in table and "least squares to 1/truth" in table and "80 m" in table
    assert "*" not in table_of(a_result("alone", [0.1]))


def test_ties_share_the_star_and_nan_never_has_it():
    table = table_of(a_result("a", [0.1]), a_result("b", [0.1]), a_result("c", [float("nan")]))
    a, b, c = table.splitlines()[2:5]
    assert a.count("*") == b.count("*") == 9 and "*" not in c and "nan" in c
    assert "c gives NaN or infinity on 1 image (0)" in table


def test_images_without_a_valid_pixel_are_named(tmp_path):
    frames = make_frames(3)
    frames[1].depth[:] = np.inf
    models, results = evaluate_noise(frames, m=0.01)
    page = written(a_task(frames), models, results, tmp_path)
    assert all("1 image (toy/0/001)" in text for text in (table_of(*results), page))
    assert json.loads((tmp_path / "results.json").read_text())["models"][0]["rows"][1]["abs_rel"] is None


def test_a_report_is_written_if_no_image_has_a_valid_pixel(tmp_path):
    frames = make_frames(2)
    for frame in frames:
        frame.depth[:] = np.nan
    models, results = evaluate_noise(frames, m=0.01)
    assert "nan" in written(a_task(frames), models, results, tmp_path)


def test_results_that_are_not_comparable_are_refused(tmp_path):
    one = a_result("a", [0.1, 0.2])
    with pytest.raises(ValueError):
        write_report(a_task(), [], tmp_path)
    other = DepthResult("b", one.rows, protocol=EvalProtocol("x", fitted=()))
    for result in (a_result("b", [0.1]), other):
        with pytest.raises(ValueError, match="'a' and 'b'"):
            write_report(a_task(), [one, result], tmp_path)
    assert not list(tmp_path.iterdir())


ODD = 'a,b <script>alert(1)</script> ü"\n=1'


def test_odd_names_are_escaped_everywhere(tmp_path):
    frames = [replace(frame, key=f"{frame.key} {ODD}") for frame in make_frames(3)]
    frames[1].depth[:] = np.inf
    models, results = evaluate_noise(frames, **{ODD: 0.01})
    task = a_task(frames, {f"key {ODD}": f"value {ODD}"}, incomplete=f"caution {ODD}")
    figure = ReportedResult(
        f"paper {ODD}", "nyu", "da2", {"abs_rel": 0.1}, f"source {ODD}", remark=f"remark {ODD}"
    )
    reported = [figure, replace(figure, protocol=ODD)]
    examples = task.examples(models, results)
    write_report(task, results, tmp_path, examples=examples, settings={"command": ODD}, reported=reported)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt; ü&#34;") > 15
    for what in ("paper", "source", "remark", "value", "caution", "toy/0/002"):
        assert f"{what} a,b &lt;script&gt;" in page, what
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [frame.key for frame in frames] and rows[0]["model"] == ODD
    assert float(rows[2]["abs_rel"]) == results[0].rows[2]["abs_rel"]
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["models"][0]["name"] == ODD and document["published"][0]["remark"] == f"remark {ODD}"


def refuse(name):
    raise AssertionError(f"JSON with {name}")


def test_the_page_has_worst_and_median_with_their_own_figures(tmp_path):
    frames = make_frames()
    sharp = replace(PROTOCOL, sharp=True)
    models, results = evaluate_noise(frames, sharp, good=0.001, bad=0.01)
    page = written(a_task(frames, protocol=sharp), models, results, tmp_path)
    sections = {re.search("<code>(.*?)<", s)[1]: s for s in re.findall(r"<section.*?</section>", page, re.S)}
    ranked = sorted(results[0].rows, key=lambda row: row["abs_rel"])
    for why, row in (("best", ranked[0]), ("median", ranked[4]), ("worst", ranked[-1])):
        section = sections[row["key"]]
        assert why in re.search('why">(.*?)<', section)[1]
        for result in results:
            (own,) = [other for other in result.rows if other["key"] == row["key"]]
            text = re.sub("<.*?>", "", section)
            figures = (
                f"AbsRel {own['abs_rel']:.4f} · δ1 {own['d1']:.4f} · boundary F1 {own['boundary_f1']:.4f}"
            )
            assert figures in text
    assert "boundary F1 ↑" in page and f"{results[0].means['boundary_f1']:.4f}" in page


def test_summaries_hold_no_nan(tmp_path):
    pairs = PairsTask("da2k", [], None, {})
    depth = DepthTask("nyu", [], None, {}, protocol=PROTOCOL)
    write_summary([(depth, [a_result("m", [math.nan])]), (pairs, [pairs.result("m", ())])], tmp_path)
    document = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["benchmarks"]["nyu"]["models"][0]["means"]["abs_rel"] is None
    assert document["points"]["da2k"] == [{"name": "m", "accuracy": None}]
    assert "nan / nan" in (tmp_path / "summary.txt").read_text(encoding="utf-8")
