"""A network that outputs NaN or infinity: the image is named and nothing is written for it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from depth_anything.inference.files import predict_files
from depth_anything.inference.predictor import Predictor, check_finite
from depth_anything.model.depth_anything import DepthAnything


def photograph(height, width, level):
    return np.full((height, width, 3), level, np.uint8)


def predictor_with(bad, *, tiles=None, calibration=None, max_depth=None, when=lambda image: image.mean() > 1):
    """A network that outputs one pixel of `bad` for images where `when` holds, and finite values otherwise."""
    model = DepthAnything("vitn", max_depth=max_depth)
    model.calibration = calibration

    def forward(image, **_):
        output = torch.linspace(1, 2, image[:, 0].numel()).reshape(image[:, 0].shape).clone()
        for number, one in enumerate(image):
            if when(one):
                output[number, 1, 1] = bad
        return output

    model.forward = forward
    return Predictor(model, device="cpu", input_size=28, tiles=tiles)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "how",
    [{}, {"calibration": (0.5, 0.1)}, {"max_depth": 20.0}, {"tiles": 2}, {"tiles": 2, "max_depth": 20.0}],
)
def test_a_nonfinite_pixel_fails_its_image_but_not_the_batch(bad, how):
    predictor = predictor_with(bad, **how)
    dark, bright = predictor.predict_batch([photograph(30, 40, 0), photograph(30, 40, 255)])
    check_finite(dark, "dark.png", precision="fp32")
    with pytest.raises(ValueError, match=r"NaN .*bright\.png; try --precision fp32"):
        check_finite(bright, "bright.png", precision="fp16")
    with pytest.raises(ValueError, match="NaN"):
        predictor.predict(photograph(30, 40, 255))
    with pytest.raises(ValueError, match="NaN"):
        predictor.predict_uncalibrated(photograph(30, 40, 255))


def test_a_nonfinite_pixel_is_detected_before_downscaling():
    with pytest.raises(ValueError, match="NaN"):
        predictor_with(np.nan).predict(photograph(4, 6, 255))


def test_a_nonfinite_tile_is_detected():
    """The prediction of the whole image must not replace it."""
    image = photograph(60, 80, 0)
    image[:26, :36] = 255  # in the first tile alone most is bright
    predictor = predictor_with(np.nan, tiles=3, when=lambda one: one.mean() > 0)
    with pytest.raises(ValueError, match="NaN"):
        predictor.predict(image)


def test_nothing_is_written_for_a_nonfinite_map(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, level in (("a", 0), ("b", 255), ("c", 0)):
        Image.fromarray(photograph(30, 40, level)).save(tmp_path / "photos" / f"{name}.png")
    outcome = predict_files(predictor_with(np.inf), tmp_path / "photos", tmp_path / "out", batch_size=3)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == sorted(f"{name}{end}" for name in "ac" for end in (".json", ".png", "_disparity.png"))
    assert list(outcome.failed) == ["b.png"] and "NaN" in outcome.failed["b.png"]
    for path in (tmp_path / "out").glob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
