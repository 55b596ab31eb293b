"""Prediction of classes: windows, scales and mirror images, and the files that predict writes."""

import json

import numpy as np
import pytest
import torch
from made_segmentation import CLASSES, class_map, colored, save
from PIL import Image

from depth_anything.cli import main
from depth_anything.inference.segmentation import SegmentationPredictor, window_starts
from depth_anything.model.segmentation import SegmentationModel, WindowRule
from depth_anything.model.weights import save_model


class ColorModel(SegmentationModel):
    """Scores a class by the channel of its color; what it says of a pixel does not depend on the others."""

    def forward(self, image):
        return image.float().softmax(1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = ColorModel("vitn", classes=CLASSES, head="linear")
    built.input_size, built.window = 28, WindowRule(None, 14)
    return built.eval()


def test_windows_cover_a_side_as_mmsegmentation_places_them():
    for length, window, stride in (
        (1024, 896, 518),
        (2048, 896, 518),
        (900, 896, 426),
        (50, 28, 14),
        (28, 28, 14),
    ):
        count = max(length - window + stride - 1, 0) // stride + 1
        expected = [min(n * stride, max(length - window, 0)) for n in range(count)]
        assert window_starts(length, window, stride) == expected
        covered = np.zeros(length, bool)
        for start in expected:
            covered[start : start + window] = True
        assert covered.all()


def test_sliding_windows_equal_the_whole_image(model):
    image = colored(class_map(0, (42, 70)))
    whole = SegmentationPredictor(model, device="cpu", input_size=70).predict_scores(image)
    slid = SegmentationPredictor(model, device="cpu", input_size=28, stride=14).predict_scores(image)
    torch.testing.assert_close(slid, whole)


@pytest.mark.parametrize("stride", [28, 14])
def test_an_image_that_fits_is_predicted_as_a_whole(stride):
    torch.manual_seed(0)
    network = SegmentationModel("vitn", classes=CLASSES, head="dpt").eval()
    image = np.random.default_rng(0).integers(0, 256, (28, 42, 3)).astype(np.uint8)
    predictor = SegmentationPredictor(network, device="cpu", input_size=42, stride=stride)
    from depth_anything.data.transforms import normalize

    with torch.no_grad():
        expected = network(normalize(torch.from_numpy(image)[None]))[0]
    torch.testing.assert_close(predictor.predict_scores(image), expected)


def test_scales_and_mirror_images_are_averaged(model):
    image = colored(class_map(2, (56, 56), ignored=False))
    single = SegmentationPredictor(model, device="cpu", input_size=56).predict(image)
    multi = SegmentationPredictor(model, device="cpu", input_size=56, scales=(0.5, 1.0, 2.0), flip=True)
    assert (single == class_map(2, (56, 56), ignored=False)).all()
    assert (multi.predict(image) == single).mean() > 0.95
    flipped = SegmentationPredictor(model, device="cpu", input_size=56, flip=True)
    np.testing.assert_array_equal(flipped.predict(image[:, ::-1]), flipped.predict(image)[:, ::-1])


def test_predict_writes_pictures_numbers_and_a_legend(tmp_path):
    torch.manual_seed(1)
    network = SegmentationModel("vitn", classes=CLASSES, head="linear")
    network.input_size, network.window = 28, WindowRule(28, 14)
    save_model(network, tmp_path / "model.safetensors")
    save(tmp_path / "photos" / "a.png", colored(class_map(0)))
    (tmp_path / "photos" / "b.png").write_bytes(b"no image")
    command = ["predict", str(tmp_path / "photos"), "--weights", str(tmp_path / "model.safetensors")]
    assert main([*command, "--device", "cpu", "--output", str(tmp_path / "maps")]) == 1  # for b.png
    with Image.open(tmp_path / "maps" / "a_classes.png") as plain:
        numbers = np.array(plain)
    with Image.open(tmp_path / "maps" / "a_palette.png") as indexed:
        assert numbers.shape == (36, 48) and indexed.mode == "P"
        np.testing.assert_array_equal(np.array(indexed), numbers)
        colors = np.array(indexed.convert("RGB"))
    for number, row in enumerate(CLASSES):
        assert (colors[numbers == number] == row.color).all()
    record = json.loads((tmp_path / "maps" / "a.json").read_text())
    assert [row["name"] for row in record["classes"]] == ["red", "green", "blue"]
    assert sum(row["share"] for row in record["present"]) == pytest.approx(1, abs=1e-4)
    with Image.open(tmp_path / "maps" / "a.png") as picture:
        assert picture.size == (48 * 2 + 50, 36)
    assert (
        main([*command, "--device", "cpu", "--output", str(tmp_path / "maps")]) == 1
    )  # its own files are replaced
    assert main([*command, "--output", str(tmp_path / "other"), "--format", "npy"]) == 2
    assert main([*command, "--output", str(tmp_path / "other"), "--tiles", "2"]) == 2
