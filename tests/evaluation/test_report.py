"""The report: complete, self-contained, honest about ties, NaN and what is not comparable."""

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
from depth_anything.evaluation.benchmarks.da2k import PairResult
from depth_anything.evaluation.evaluate import METRICS, DepthResult, evaluate
from depth_anything.evaluation.protocols import EvalProtocol
from depth_anything.evaluation.report import choose_examples, collect_examples, write_report, write_summary
from depth_anything.evaluation.reported_results import ReportedResult
from depth_anything.evaluation.table import format_table
from depth_anything.inspect.contact_sheet import contact_sheet, describe_frame

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


def judged(frames, **noises):
    models = {name: Noisy(frames, noise) for name, noise in noises.items()}
    return models, [
        evaluate(model, frames, name=name, model={"fingerprint": "sha256:" + name})
        for name, model in models.items()
    ]


def a_result(name, values, **changes):
    rows = [dict.fromkeys(METRICS, value) | {"key": str(i), "valid": 9} for i, value in enumerate(values)]
    return DepthResult(name, PROTOCOL, tuple(row | changes for row in rows))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    frames = make_frames()
    models, results = judged(frames, good=0.001, bad=0.01)
    why = choose_examples(results, first=2)
    examples = collect_examples(models, frames, why=why, protocol=PROTOCOL)
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(
        results,
        folder,
        examples=examples,
        data={"set": "toy <script>", "digest": "sha256:1234", "limit": None},
        settings={"command": "depth-anything evaluate"},
    )
    return folder, results, examples


def test_examples_are_the_first_and_the_best_median_and_worst(report):
    _, results, examples = report
    errors = {row["key"]: row["abs_rel"] for row in results[0].rows}
    ranked = sorted(errors, key=errors.get)
    reasons = {example.key: example.why for example in examples}
    assert list(reasons)[:2] == ["toy/0/000", "toy/0/001"]
    for key, why in ((ranked[0], "best"), (ranked[4], "median"), (ranked[-1], "worst")):
        assert why in reasons[key]
    assert "first, best" in reasons["toy/0/000"] and len(examples) == len(set(reasons)) == 4


def test_examples_hold_maps_in_metres(report):
    _, _, examples = report
    for example in examples:
        known = np.isfinite(example.truth)
        good, bad = (np.abs(example.predictions[n] - example.truth)[known].mean() for n in ("good", "bad"))
        assert good < bad < 8
        assert example.predictions["good"].dtype == np.float32


def test_page_asks_for_nothing(report):
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


def test_page_shows_what_was_measured(report):
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
    assert (folder / "table.txt").read_text(encoding="utf-8") == format_table(results) + "\n"


def test_table_marks_the_best_in_each_direction():
    table = format_table([a_result("low", [0.1, 0.2]), a_result("high", [0.3, 0.4])])
    low, high = (
        next(line for line in table.splitlines() if line.startswith(name)) for name in ("low", "high")
    )
    assert low.split()[1:] == ["0.1500*", "0.1500", "0.1500", "0.1500"] + ["0.1500*"] * 5
    assert high.split()[1:] == ["0.3500", "0.3500*", "0.3500*", "0.3500*"] + ["0.3500"] * 5
    assert "2 images" in table and "least squares to 1/truth" in table and "80 m" in table
    assert "*" not in format_table([a_result("alone", [0.1])])


def test_ties_share_the_mark_and_nan_never_has_it():
    table = format_table([a_result("a", [0.1]), a_result("b", [0.1]), a_result("c", [float("nan")])])
    a, b, c = table.splitlines()[2:5]
    assert a.count("*") == b.count("*") == 9 and "*" not in c and "nan" in c
    assert "c gives no numbers" in table and "on 1 image (0)" in table


def test_images_left_out_are_named(tmp_path):
    frames = make_frames(3)
    frames[1].depth[:] = np.inf
    models, results = judged(frames, m=0.01)
    examples = collect_examples(models, frames, why=choose_examples(results), protocol=PROTOCOL)
    page = write_report(results, tmp_path, examples=examples).read_text(encoding="utf-8")
    assert "left out of the means: 1 image (toy/0/001)" in format_table(results)
    assert "left out of the means: 1 image (toy/0/001)" in page
    assert json.loads((tmp_path / "results.json").read_text())["models"][0]["rows"][1]["abs_rel"] is None


def test_all_images_empty_is_still_a_report(tmp_path):
    frames = make_frames(2)
    for frame in frames:
        frame.depth[:] = np.nan
    models, results = judged(frames, m=0.01)
    examples = collect_examples(models, frames, why=choose_examples(results), protocol=PROTOCOL)
    assert "nan" in write_report(results, tmp_path, examples=examples).read_text(encoding="utf-8")


def test_what_is_not_comparable_is_refused(tmp_path):
    one = a_result("a", [0.1, 0.2])
    with pytest.raises(ValueError, match="no result"):
        write_report([], tmp_path)
    with pytest.raises(
        ValueError, match="'a' and 'b' were judged by different protocols or on different images"
    ):
        write_report([one, a_result("b", [0.1])], tmp_path)
    other = DepthResult("b", EvalProtocol("x", fitted=()), one.rows)
    with pytest.raises(ValueError, match="different protocols"):
        write_report([one, other], tmp_path)
    assert not list(tmp_path.iterdir())


def test_contact_sheet_holds_images_targets_and_facts():
    frames = make_frames(5)
    frames[1].depth, frames[1].disparity = None, np.ones((20, 30), np.float32)
    frames[2].depth = None
    frames[3].depth[:] = np.nan
    sheet = contact_sheet(frames, columns=2)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    assert sheet.shape[1] > 2 * 2 * 200 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50
    assert describe_frame(frames[4])[0] == "toy/0/004"
    assert re.fullmatch(r"60 x 40, depth 1 to 1\d\.\d m, median \d\.\d+ m", describe_frame(frames[4])[1])
    assert describe_frame(frames[4])[2] == "98% known, 2% sky, 0% unknown"
    assert describe_frame(frames[1])[1] == "60 x 40 (target 30 x 20), disparity 1 to 1, median 1"
    frames[4].meta["unit"], frames[1].meta["unit"] = "arbitrary", "px"
    assert re.fullmatch(r"60 x 40, depth 1 to 1\d\.\d, median \d\.\d+", describe_frame(frames[4])[1])
    assert describe_frame(frames[1])[1].endswith("disparity 1 to 1 px, median 1 px")
    assert "no target" in describe_frame(frames[2])[1] and "0% known" in describe_frame(frames[3])[2]


ODD = 'a,b <script>alert(1)</script> ü"\n=1'


def test_odd_names_are_escaped_everywhere(tmp_path):
    frames = [replace(frame, key=f"{frame.key} {ODD}") for frame in make_frames(3)]
    frames[1].depth[:] = np.inf
    models, results = judged(frames, **{ODD: 0.01})
    examples = collect_examples(models, frames, why=choose_examples(results), protocol=PROTOCOL)
    figure = ReportedResult(
        f"paper {ODD}", "nyu", "da2", {"abs_rel": 0.1}, f"source {ODD}", remark=f"remark {ODD}"
    )
    write_report(
        results,
        tmp_path,
        examples=examples,
        data={f"key {ODD}": f"value {ODD}"},
        settings={"command": ODD},
        published=[figure, replace(figure, protocol=ODD)],
        caution=f"caution {ODD}",
    )
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
    models = {name: Noisy(frames, noise) for name, noise in (("good", 0.001), ("bad", 0.01))}
    results = [evaluate(model, frames, name=name, protocol=sharp) for name, model in models.items()]
    examples = collect_examples(models, frames, why=choose_examples(results, first=0), protocol=sharp)
    page = write_report(results, tmp_path, examples=examples).read_text(encoding="utf-8")
    sections = {re.search('why">(.*?)<', s)[1]: s for s in re.findall(r"<section.*?</section>", page, re.S)}
    assert set(sections) == {"best", "median", "worst"}
    ranked = sorted(results[0].rows, key=lambda row: row["abs_rel"])
    for why, row in (("best", ranked[0]), ("median", ranked[4]), ("worst", ranked[-1])):
        assert f"<code>{row['key']}</code>" in sections[why]
        for result in results:
            (own,) = [other for other in result.rows if other["key"] == row["key"]]
            text = re.sub("<.*?>", "", sections[why])
            figures = (
                f"AbsRel {own['abs_rel']:.4f} · δ1 {own['d1']:.4f} · boundary F1 {own['boundary_f1']:.4f}"
            )
            assert figures in text
    assert "boundary F1 ↑" in page and f"{results[0].means['boundary_f1']:.4f}" in page


def test_summaries_hold_no_nan(tmp_path):
    points = {"da2k": {"m": PairResult(())}}
    write_summary({"nyu": [a_result("m", [math.nan])]}, tmp_path, points=points)
    document = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["benchmarks"]["nyu"]["models"][0]["means"]["abs_rel"] is None
    assert document["points"]["da2k"] == [{"name": "m", "accuracy": None}]
    assert "nan / nan" in (tmp_path / "summary.txt").read_text(encoding="utf-8")
