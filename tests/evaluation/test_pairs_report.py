"""The report of DA-2K: complete, self-contained, with the wrong pairs of each model drawn into its map."""

import base64
import csv
import json
import re

import benchmark_files as files
import cv2
import numpy as np
import pytest

from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
from depth_anything.evaluation.pairs_task import MAGENTA, WHITE, YELLOW, PairsTask, draw_pairs
from depth_anything.evaluation.predictions import PrecomputedMaps
from depth_anything.evaluation.report import write_report
from depth_anything.evaluation.reported_results import find_reported_results
from depth_anything.evaluation.runner import task_from_benchmark

ODD = 'a,b <script>alert(1)</script> ü"'


class TrueDisparity:
    """The true disparity, recognized by the image; inverted in aerial images."""

    def __init__(self, images, truth, *, quantity="disparity"):
        self.quantity = quantity
        self.maps = {image.image.tobytes(): self.map(image, truth) for image in images}

    def map(self, image, truth):
        disparity = truth[image.key.removeprefix("da2k/")]
        disparity = -disparity + 9 if image.scene == "aerial" else disparity
        return (disparity if self.quantity == "disparity" else 1 / disparity).astype(np.float32)

    def predict_batch(self, images):
        return [self.maps[image.tobytes()] for image in images]


class Constant:
    quantity = "disparity"

    def predict_batch(self, images):
        return [np.full(image.shape[:2], 2, np.float32) for image in images]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("da2k")
    truth = files.make_da2k(root)
    task = task_from_benchmark(load_benchmark("da2k"), root)
    images = [task.read(line) for line in task.lines]
    models = {
        ODD: TrueDisparity(images, truth),
        "meters": TrueDisparity(images, truth, quantity="depth"),
        "flat": Constant(),
    }
    results = [
        task.result(name, task.score(model, images), {"fingerprint": f"sha256:{name}"})
        for name, model in models.items()
    ]
    folder = root / "report"
    examples = task.examples(models, results)
    page = write_report(task, results, folder, examples=examples, reported=find_reported_results("da2k"))
    return folder, page.read_text(encoding="utf-8"), results


def test_the_page_is_self_contained_and_escapes_names(report):
    _, page, _ = report
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|<script|<link""", page)
    assert page.count("a,b &lt;script&gt;alert(1)&lt;/script&gt; ü&#34;") >= 5
    for needed in ("10 images, 60 pairs", "sha256:flat", "constant map has 50", "prefers-color-scheme: dark"):
        assert needed in page


def test_the_page_has_measured_and_reported_results(report):
    _, page, _ = report
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr.*?</tr>", page, re.S)]
    table = {re.sub("<.*?>", "", row[0]): row[1:] for row in rows if len(row) > 5}
    assert table["model"][2:] == [
        "right %",
        "indoor",
        "outdoor",
        "non real",
        "transparent reflective",
        "aerial",
    ]
    assert table["flat"] == ["da2k", "measured here", *["50.0"] * 6]
    assert table["meters"][2] == "80.0" and table["meters"][7] == "0.0"
    assert table["Depth Anything V2 L"][2:] == ["97.1", "96.4", "93.9", "99.0", "96.3", "99.5"]
    assert "table 3" in table["Marigold"][1] and "only 10 of 1033 images" in page


def test_the_page_shows_first_worst_and_median_with_their_figures(report):
    _, page, results = report
    sections = re.findall(r"<section.*?</section>", page, re.S)
    why = {re.search("<code>(.*?)<", s)[1]: re.search('why">(.*?)<', s)[1] for s in sections}
    assert why == PairsTask("da2k", [], None, {}).choose_examples(results)
    reasons = list(why.values())
    assert reasons[0].startswith("first") and any("median" in reason for reason in reasons)
    assert [why[f"da2k/images/aerial/{name}"] for name in ("a.jpg", "b.png")] == ["first, worst"] * 2
    for section in sections:
        key = re.search("<code>(.*?)<", section)[1]
        rights = [f"{row['right']:g} of 6 right" for s in results for row in s.rows if row["key"] == key]
        assert re.findall(r"[\d.]+ of \d+ right", section) == rights
        pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', section)
        assert len(pictures) == 4
        for picture in pictures:
            assert cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), 1) is not None


def test_the_json_and_csv_files_parse(report):
    folder, _, results = report

    def refuse(name):
        raise AssertionError(f"JSON with {name}")

    document = json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert [model["name"] for model in document["models"]] == [s.name for s in results] and document["date"]
    assert document["models"][0]["rows"] == list(results[0].rows)
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == 30 and rows[0]["model"] == ODD and float(rows[0]["right"]) == results[0].rows[0]["right"]
    )
    assert ODD in (folder / "table.txt").read_text(encoding="utf-8")


def test_pairs_are_drawn_in_the_color_of_their_score():
    picture = np.full((300, 1200, 3), 90, np.uint8)
    pairs = np.array([[[30, 60], [30, 300]], [[150, 60], [150, 300]], [[270, 60], [270, 300]]])
    drawn = draw_pairs(picture, pairs, np.array([1.0, 0.5, 0.0]))
    assert drawn.shape == (112, 448, 3) and (picture == 90).all()
    scale = 448 / 1200
    for pair, color in zip(pairs, (WHITE, YELLOW, MAGENTA), strict=True):
        near, far = ((pair + 0.5) * scale).astype(int)
        assert tuple(drawn[tuple(near)]) == color  # a disc
        assert tuple(drawn[near[0], (near[1] + far[1]) // 2]) == color
        ring = drawn[far[0] - 8 : far[0] + 9, far[1] + 3 : far[1] + 9].reshape(-1, 3)
        assert (ring == color).all(1).any() and tuple(drawn[far[0] + 3, far[1] + 2]) != color
    assert (draw_pairs(picture, pairs) == WHITE).all(2).any()
    assert not (draw_pairs(picture, pairs) == MAGENTA).all(2).any()


def test_examples_hold_disparity_for_any_quantity(tmp_path):
    truth = files.make_da2k(tmp_path)
    task = task_from_benchmark(load_benchmark("da2k"), tmp_path)
    images = [task.read(line) for line in task.lines]
    models = {name: TrueDisparity(images, truth, quantity=name) for name in ("disparity", "depth")}
    for image in images:
        path = tmp_path / "maps" / f"{image.key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, models["depth"].predict_batch([image.image])[0])
    models["files"] = PrecomputedMaps(tmp_path / "maps", quantity="depth")
    for image in images[::3]:
        example = task.make_example(image, "first", models)
        for name in ("depth", "files"):
            np.testing.assert_allclose(example.maps[name], example.maps["disparity"], rtol=1e-5)
            assert (example.scores[name] == example.scores["disparity"]).all()


def test_an_image_without_a_pair_is_never_the_worst():
    task = PairsTask("da2k", [], None, {})
    pairs = [(2, 2), (0, 0), (2, 0)]
    rows = [{"key": str(i), "scene": "indoor", "pairs": p, "right": r} for i, (p, r) in enumerate(pairs)]
    assert task.choose_examples([task.result("m", rows)], first=0, worst=1) == {"2": "worst", "0": "median"}
