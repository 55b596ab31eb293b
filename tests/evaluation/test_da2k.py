"""DA-2K: a constant map scores 50 %, the order of points changes nothing, wrong signs score what they deserve."""

import json
from pathlib import Path

import benchmark_files as made
import numpy as np
import pytest

from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
from depth_anything.evaluation.benchmarks.da2k import PointPairImage
from depth_anything.evaluation.pairs_task import evaluate_pairs, score_pairs

DA2K = load_benchmark("da2k")


class Maps:
    """Gives the same map, or for each image the one of its place in the order of reading."""

    def __init__(self, maps, quantity="disparity"):
        self.maps, self.quantity = list(maps), quantity

    def predict_batch(self, images):
        return [self.maps.pop(0) for _ in images]


def compared(root):
    return [DA2K.read(root, line) for line in DA2K.find(root)]


@pytest.fixture
def benchmark(tmp_path):
    truth = made.make_da2k(tmp_path)
    return tmp_path, [truth[path] for path in sorted(truth)]


def test_a_true_map_has_100_percent_and_an_inverted_one_0(benchmark):
    root, maps = benchmark
    images = compared(root)
    assert len(images) == 10 and sum(len(image.pairs) for image in images) == 60
    assert evaluate_pairs(Maps(maps), images).means["accuracy"] == 1
    assert (
        evaluate_pairs(Maps([1 / map_ for map_ in maps], "depth"), images, batch_size=3).means["accuracy"]
        == 1
    )
    assert evaluate_pairs(Maps([-map_ for map_ in maps]), images).means["accuracy"] == 0
    assert evaluate_pairs(Maps(maps, "depth"), images).means["accuracy"] == 0


@pytest.mark.parametrize("quantity", ["disparity", "depth"])
def test_a_constant_map_scores_half(benchmark, quantity):
    root, maps = benchmark
    constant = [np.full_like(map_, 3) for map_ in maps]
    score = evaluate_pairs(Maps(constant, quantity), compared(root))
    assert score.means["accuracy"] == 0.5 and score.pairs == 60
    assert set(score.means.values()) == {0.5}


def test_points_in_the_other_order_change_nothing(tmp_path):
    scores = []
    rng = np.random.default_rng(0)
    for swapped in (False, True):
        root = tmp_path / str(swapped)
        truth = made.make_da2k(root, swapped=swapped)
        noisy = [truth[path] + rng.normal(0, 0.1, truth[path].shape) for path in sorted(truth)]
        rng = np.random.default_rng(0)
        scores.append(evaluate_pairs(Maps(noisy), compared(root)))
    assert scores[0].rows == scores[1].rows
    assert 0.5 < scores[0].means["accuracy"] < 1


def test_points_are_rows_and_columns():
    image = np.zeros((10, 40, 3), np.uint8)
    pairs = np.array([[[9, 1], [1, 30]]])
    disparity = np.zeros((10, 40))
    disparity[9, 1] = 1
    pair = PointPairImage("da2k/x", image, scene="indoor", pairs=pairs)
    assert score_pairs(disparity, pair, quantity="disparity").tolist() == [1]
    disparity[9, 1], disparity[1, 9] = 0, 1
    assert score_pairs(disparity, pair, quantity="disparity").tolist() == [0.5]
    assert score_pairs(
        np.repeat(np.repeat(disparity, 2, 0), 2, 1) * 0 + 1, pair, quantity="disparity"
    ).tolist() == [0.5]
    disparity[9, 1] = np.nan
    assert score_pairs(disparity, pair, quantity="disparity").tolist() == [0]
    with pytest.raises(ValueError, match="metres"):
        score_pairs(disparity, pair, quantity="metres")


def test_each_scene_type_has_its_own_accuracy(benchmark):
    root, maps = benchmark
    images = compared(root)
    wrong = [-map_ if image.scene == "aerial" else map_ for image, map_ in zip(images, maps, strict=True)]
    score = evaluate_pairs(Maps(wrong), images)
    assert list(score.means) == [
        "accuracy",
        "indoor",
        "outdoor",
        "non_real",
        "transparent_reflective",
        "aerial",
    ]
    assert score.means["aerial"] == 0 and score.means["indoor"] == 1
    assert score.means["accuracy"] == pytest.approx(1 - 12 / 60)
    assert np.isnan(evaluate_pairs(Maps([]), []).means["accuracy"])


def test_the_folder_above_is_accepted(tmp_path):
    made.make_da2k(tmp_path / "DA-2K")
    assert len(compared(tmp_path)) == 10


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"point1": [36, 0], "point2": [0, 0], "closer_point": "point1"}, "36 rows and 48 columns"),
        ({"point1": [0, 0], "point2": [0, -1], "closer_point": "point1"}, "36 rows and 48 columns"),
        ({"point1": [0, 0], "point2": [0, 1], "closer_point": "point3"}, "images/indoor/a.jpg.*point1"),
        ({"point1": [0], "point2": [0, 1], "closer_point": "point1"}, "images/indoor/a.jpg.*point1"),
        ({"point1": [0, "a"], "point2": [0, 1], "closer_point": "point1"}, "images/indoor/a.jpg.*point1"),
        ([1, 2], "images/indoor/a.jpg.*point1"),
    ],
)
def test_a_bad_pair_is_refused(tmp_path, pair, message):
    made.make_da2k(tmp_path)
    path = Path(tmp_path, "annotations.json")
    read = json.loads(path.read_text())
    path.write_text(json.dumps({**read, "images/indoor/a.jpg": [pair]}))
    with pytest.raises(ValueError, match=message):
        compared(tmp_path)


def test_damaged_annotations_are_refused(tmp_path):
    path = Path(tmp_path, "annotations.json")
    for text in ("{", "[]", '{"a": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="annotations"):
            list(DA2K.find(tmp_path))
    path.write_text('{"images/nowhere/a.jpg": []}')
    with pytest.raises(ValueError, match="images/nowhere/a.jpg.*indoor, outdoor"):
        compared(tmp_path)


def test_a_path_outside_of_the_folder_is_refused(tmp_path):
    Path(tmp_path, "annotations.json").write_text('{"images/indoor/../../../a.jpg": []}')
    with pytest.raises(ValueError, match="images/indoor/../../../a.jpg"):
        compared(tmp_path)
