"""DA-2K's page: complete, self-contained, with the pairs that each model got wrong drawn into its map."""

import base64
import csv
import json
import re

import cv2
import made_benchmarks as made
import numpy as np
import pytest

from depth_anything.evaluation.benchmarks.catalog import load_benchmark
from depth_anything.evaluation.benchmarks.da2k import PairResult, score_da2k
from depth_anything.evaluation.da2k_report import (
    MAGENTA,
    WHITE,
    YELLOW,
    choose_pair_examples,
    collect_pair_examples,
    draw_pairs,
)
from depth_anything.evaluation.predictions import PrecomputedMaps
from depth_anything.evaluation.report import write_pairs_report
from depth_anything.evaluation.reported_results import find_reported_results
from depth_anything.evaluation.runner import task_from_benchmark

ODD = 'a,b <script>alert(1)</script> ü"'


class OfTruth:
    """The true disparity, recognised by the picture; turned around in photographs from the air."""

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
    truth = made.make_da2k(root)
    trial = task_from_benchmark(load_benchmark("da2k"), root)
    images = [trial.read(line) for line in trial.lines]
    models = {
        ODD: OfTruth(images, truth),
        "metres": OfTruth(images, truth, quantity="depth"),
        "flat": Constant(),
    }
    scores = {name: score_da2k(model, images) for name, model in models.items()}
    folder = root / "report"
    page = write_pairs_report(
        models,
        trial,
        scores,
        folder,
        models={name: {"fingerprint": f"sha256:{name}"} for name in models},
        published=find_reported_results("da2k"),
    )
    return folder, page.read_text(encoding="utf-8"), scores


def test_the_page_asks_for_nothing_and_escapes_names(report):
    _, page, _ = report
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|<script|<link""", page)
    assert page.count("a,b &lt;script&gt;alert(1)&lt;/script&gt; ü&#34;") >= 5
    for needed in ("10 images, 60 pairs", "sha256:flat", "constant map has 50", "prefers-color-scheme: dark"):
        assert needed in page


def test_the_page_has_the_table_ours_and_others(report):
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
    assert table["metres"][2] == "80.0" and table["metres"][7] == "0.0"
    assert table["Depth Anything V2 L"][2:] == ["97.1", "96.4", "93.9", "99.0", "96.3", "99.5"]
    assert "table 3" in table["Marigold"][1] and "only 10 of 1033 images" in page


def test_the_page_shows_first_worst_and_median_with_their_figures(report):
    _, page, scores = report
    sections = re.findall(r"<section.*?</section>", page, re.S)
    why = {re.search("<code>(.*?)<", s)[1]: re.search('why">(.*?)<', s)[1] for s in sections}
    assert why == choose_pair_examples(scores)
    reasons = list(why.values())
    assert reasons[0].startswith("first") and any("median" in reason for reason in reasons)
    assert [why[f"da2k/images/aerial/{name}"] for name in ("a.jpg", "b.png")] == ["first, worst"] * 2
    for section in sections:
        key = re.search("<code>(.*?)<", section)[1]
        rights = [
            f"{row['right']:g} of 6 right" for s in scores.values() for row in s.rows if row["key"] == key
        ]
        assert re.findall(r"[\d.]+ of \d+ right", section) == rights
        pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', section)
        assert len(pictures) == 4
        for picture in pictures:
            assert cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), 1) is not None


def test_files_beside_the_page_parse(report):
    folder, _, scores = report

    def refuse(name):
        raise AssertionError(f"JSON with {name}")

    document = json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert [model["name"] for model in document["models"]] == list(scores) and document["date"]
    assert document["models"][0]["rows"] == list(scores[ODD].rows)
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == 30
        and rows[0]["model"] == ODD
        and float(rows[0]["right"]) == scores[ODD].rows[0]["right"]
    )
    assert ODD in (folder / "table.txt").read_text(encoding="utf-8")


def test_pairs_are_drawn_where_they_lie_in_the_color_of_their_answer():
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


def test_maps_are_nearness_whoever_made_them(tmp_path):
    truth = made.make_da2k(tmp_path)
    images = [load_benchmark("da2k").read(tmp_path, line) for line in load_benchmark("da2k").find(tmp_path)]
    models = {name: OfTruth(images, truth, quantity=name) for name in ("disparity", "depth")}
    for image in images:
        path = tmp_path / "maps" / f"{image.key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, models["depth"].predict_batch([image.image])[0])
    models["files"] = PrecomputedMaps(tmp_path / "maps", quantity="depth")
    examples = collect_pair_examples(models, images, why={image.key: "first" for image in images[::3]})
    assert [example.compared.key for example in examples] == [image.key for image in images[::3]]
    for example in examples:
        for name in ("depth", "files"):
            np.testing.assert_allclose(example.maps[name], example.maps["disparity"], rtol=1e-5)
            assert (example.answers[name] == example.answers["disparity"]).all()


def test_an_image_without_a_pair_is_never_the_worst():
    rows = [
        {"key": str(i), "scene": "indoor", "pairs": p, "right": r}
        for i, (p, r) in enumerate([(2, 2), (0, 0), (2, 0)])
    ]
    assert choose_pair_examples({"m": PairResult(tuple(rows))}, first=0, worst=1) == {
        "2": "worst",
        "0": "median",
    }
