"""`--format controlnet`: the conditioning image, computed by hand, for disparity and for meters."""

import numpy as np
import torch
from PIL import Image

from depth_anything import DepthAnything, Predictor
from depth_anything.inference.files import PredictSettings, predict_files
from depth_anything.visualize import conditioning_image

RNG = np.random.default_rng(0)


def by_hand(disparity: np.ndarray) -> np.ndarray:
    """V1's app.py: (d - min) / (max - min) * 255 in torch's float32, and a cast that truncates."""
    values = torch.from_numpy(disparity)
    values = (values - values.min()) / (values.max() - values.min()) * 255.0
    return values.numpy().astype(np.uint8)


def predicted_file(tmp_path, model):
    pixels = RNG.integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predictor = Predictor(model, device="cpu", input_size=28)
    settings = PredictSettings(formats=("controlnet",))
    result = predict_files(predictor, tmp_path / "a.png", tmp_path / "maps", settings=settings)
    assert {path.name for path in result.written} == {"a.json", "a.png", "a_controlnet.png"}
    picture = Image.open(tmp_path / "maps" / "a_controlnet.png")
    assert (picture.mode, picture.size) == ("RGB", (60, 40))
    return np.asarray(picture), predictor.predict(pixels)


def test_the_file_of_a_relative_model_is_the_hand_computation(tmp_path):
    torch.manual_seed(0)
    picture, disparity = predicted_file(tmp_path, DepthAnything("vitn"))
    assert disparity.max() > disparity.min()
    for channel in range(3):
        np.testing.assert_array_equal(picture[:, :, channel], by_hand(disparity))
    assert picture[np.unravel_index(disparity.argmax(), disparity.shape)].tolist() == [255] * 3


def test_the_file_of_a_metric_model_shows_1_over_depth(tmp_path):
    torch.manual_seed(0)
    picture, depth = predicted_file(tmp_path, DepthAnything("vitn", max_depth=20.0))
    np.testing.assert_array_equal(picture[:, :, 0], by_hand(np.float32(1) / depth))
    assert picture[np.unravel_index(depth.argmin(), depth.shape)].tolist() == [255] * 3


def test_unknown_pixels_sky_and_constant_maps_are_black():
    disparity = RNG.random((5, 6)).astype(np.float32)
    valid = np.ones((5, 6), bool)
    valid[0, 0], disparity[0, 0] = False, 99.0
    masked = conditioning_image(disparity, quantity="disparity", valid=valid)
    assert masked.dtype == np.uint8 and masked.shape == (5, 6, 3)
    assert masked[0, 0].max() == 0 and masked.max() == 255
    assert conditioning_image(np.full((3, 3), 2.0), quantity="disparity").max() == 0
    assert conditioning_image(np.full((3, 3), np.nan), quantity="depth").max() == 0
    depth = np.array([[1.0, 2.0, np.inf, np.nan, 0.0]], np.float32)
    levels = conditioning_image(depth, quantity="depth")[0, :, 0]
    assert levels.tolist() == [0, 0, 0, 0, 255]  # a pixel at 0 m counts as one at 1 mm


def test_levels_are_truncated_and_not_rounded():
    disparity = np.array([[0.0, 0.999, 254.999, 255.0]], np.float32)
    assert conditioning_image(disparity, quantity="disparity")[0, :, 0].tolist() == [0, 0, 254, 255]
