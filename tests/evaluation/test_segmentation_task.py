"""mIoU: equal to a numpy reference and to torchmetrics, summed over images, resumable, and its report."""

import json

import numpy as np
import pytest
import torch
from made_segmentation import CLASSES, write_colors

from depth_anything.cli import main
from depth_anything.evaluation.confusion import count_confusion, score_confusion, sparse_matrix, sum_matrices
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.segmentation import SegmentationModel, WindowRule
from depth_anything.model.weights import save_model


def reference(truths, predictions, classes):
    """IoU of each class, pixel by pixel in Python's integers."""
    ious = []
    for number in range(classes):
        inter = union = 0
        for truth, found in zip(truths, predictions, strict=True):
            for true, predicted in zip(truth.ravel().tolist(), found.ravel().tolist(), strict=True):
                if true == 255:
                    continue
                inter += true == number and predicted == number
                union += true == number or predicted == number
        ious.append(inter / union if union else float("nan"))
    return ious


def random_maps(seed, classes, count=4, size=(9, 11)):
    draw = np.random.default_rng(seed)
    truths = [
        draw.integers(0, classes - 1, size).astype(np.uint8) for _ in range(count)
    ]  # the last class is absent
    predictions = [
        np.where(draw.random(size) < 0.6, truth, draw.integers(0, classes - 1, size)) for truth in truths
    ]
    for truth in truths:
        truth[draw.random(size) < 0.2] = 255
    return truths, [found.astype(np.uint8) for found in predictions]


@pytest.mark.parametrize("classes", [3, 19, 150])
def test_iou_equals_the_references(classes):
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    truths, predictions = random_maps(classes, classes)
    matrices = [count_confusion(t, p, classes) for t, p in zip(truths, predictions, strict=True)]
    scores = score_confusion(sum_matrices(map(sparse_matrix, matrices), classes))
    expected = reference(truths, predictions, classes)
    np.testing.assert_allclose(scores.iou, expected, rtol=0, atol=1e-9, equal_nan=True)
    assert scores.mean_iou == pytest.approx(np.nanmean(expected), abs=1e-9)
    known = np.stack(truths) != 255
    right = (np.stack(truths) == np.stack(predictions))[known]
    assert scores.accuracy == pytest.approx(right.mean(), abs=1e-12)
    target, found = torch.from_numpy(np.stack(truths)).long(), torch.from_numpy(np.stack(predictions)).long()
    theirs = torchmetrics.MulticlassJaccardIndex(classes, average="none", ignore_index=255)
    theirs = theirs(found.double().long(), target).double().numpy()
    occurs = ~np.isnan(scores.iou)
    np.testing.assert_allclose(scores.iou[occurs], theirs[occurs], atol=1e-6)  # they divide in float32


def test_miou_is_of_the_sum_over_images_and_not_a_mean_of_them():
    one = count_confusion(np.zeros((2, 50), np.uint8), np.zeros((2, 50), np.uint8), 2)
    other = count_confusion(np.array([[0, 1]], np.uint8), np.array([[1, 0]], np.uint8), 2)
    scores = score_confusion(one + other)
    assert scores.iou.tolist() == [100 / 102, 0.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    write_colors(root / "set", count=10)
    torch.manual_seed(0)
    for name, head in (("a", "linear"), ("b", "dpt")):
        model = SegmentationModel("vitn", classes=CLASSES, head=head)
        model.input_size, model.window = 84, WindowRule(28, 56)
        save_model(model, root / f"{name}.safetensors")
    save_model(DepthAnything("vitn"), root / "depth.safetensors")
    return root


def evaluate(folder, *flags):
    weights = [str(folder / "a.safetensors"), str(folder / "b.safetensors")]
    return main(["evaluate", "--weights", *weights, "--data", str(folder / "set"), "--device", "cpu", *flags])


def test_parts_give_the_same_report_as_the_whole(folder):
    assert evaluate(folder, "--output", str(folder / "whole")) == 0
    for part in ("1/2", "2/2"):
        assert evaluate(folder, "--output", str(folder / "parts"), "--part", part) == 0
    whole, parts = (json.loads((folder / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert whole["models"] == parts["models"]
    for model in whole["models"]:
        matrix = np.array(model["confusion"])
        assert matrix.sum() == 10 * 34 * 48  # two rows of each image are ignored
        union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        ious = [matrix[n, n] / union[n] for n in range(3) if union[n]]
        assert model["means"]["miou"] == pytest.approx(np.mean(ious), abs=1e-12)
    page = (folder / "whole" / "report.html").read_text()
    assert "data:image/jpeg" in page and "green" in page
    rows = next((folder / "whole" / "rows").glob("*.jsonl"))
    written = rows.read_bytes()
    assert (
        evaluate(folder, "--output", str(folder / "whole"), "--multi-scale") == 0
    )  # nothing is predicted again
    assert rows.read_bytes() == written


def test_multi_scale_adds_a_line_for_each_model(folder):
    assert evaluate(folder, "--output", str(folder / "scales"), "--multi-scale", "--limit", "1") == 0
    models = json.loads((folder / "scales" / "results.json").read_text())["models"]
    assert [model["name"] for model in models] == ["a", "a multi-scale", "b", "b multi-scale"]
    assert (
        models[1]["facts"]["mirrored"] and models[1]["facts"]["scales"] == "0.5, 0.75, 1, 1.25, 1.5, 1.75, 2"
    )


def test_depth_and_classes_are_not_mixed(folder, tmp_path, capsys):
    assert (
        main(["evaluate", "--weights", str(folder / "depth.safetensors"), "--data", str(folder / "set")]) == 2
    )
    both = [str(folder / "a.safetensors"), str(folder / "depth.safetensors")]
    assert main(["evaluate", "--weights", *both, "--data", str(folder / "set")]) == 2
    write_colors(tmp_path / "colors", count=2)
    manifest = json.loads((tmp_path / "colors" / "manifest.json").read_text())
    manifest["meta"]["classes"].reverse()
    (tmp_path / "colors" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["evaluate", "--weights", both[0], "--data", str(tmp_path / "colors")]) == 2
    assert "red in place of blue" in capsys.readouterr().err
