"""Near is red, or white in gray, in every picture, for disparity, depth and calibrated models."""

import numpy as np
import pytest
from PIL import Image

from depth_anything.inference.files import PredictSettings, predict_files
from depth_anything.visualize import colorize_by_distance, distance_colormap


class Model:
    """The attributes of a model that the writers read."""

    max_depth, input_size, calibration = None, 28, None


class FakePredictor:
    """A fake predictor: bright pixels are near."""

    input_size, resample, precision, tiles, device = 28, "official", "fp32", None, "cpu"
    canonical_focal = None

    def __init__(self, quantity, *, calibrated=False):
        self.quantity, self.calibrated = quantity, calibrated
        self.unit = "m" if quantity == "depth" else "relative"
        self.farthest = 20.0 if quantity == "depth" else None
        self.model = Model()

    def prepare(self, image):
        return image

    def predict_batch(self, images, *, prepared=None):
        near = [image.mean(axis=2, dtype=np.float32) / 25 + 1 for image in images]
        if self.quantity == "disparity":
            return near
        return [1 / map if self.calibrated else 13 - map for map in near]

    def farthest_of(self, shape, focal=None):
        return self.farthest

    def predict(self, image, *, focal=None):
        return self.predict_batch([image])[0]


KINDS = {
    "relative": FakePredictor("disparity"),
    "metric": FakePredictor("depth"),
    "calibrated": FakePredictor("depth", calibrated=True),
}
RAMP = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 3, axis=2).repeat(48, axis=0)


def nearest_is_warm(picture):
    """Red on the right and blue on the left."""
    left, right = picture[:, :8].mean((0, 1)), picture[:, -8:].mean((0, 1))
    return right[0] > right[2] + 30 and left[2] > left[0] + 30


def nearest_is_white(picture):
    return picture[:, -8:].mean() > 200 and picture[:, :8].mean() < 60


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_show_near_as_red_and_as_white_in_gray(tmp_path, kind):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    for name, settings, holds in (
        ("color", PredictSettings((), pred_only=True), nearest_is_warm),
        ("grey", PredictSettings((), pred_only=True, grayscale=True), nearest_is_white),
        (
            "theirs",
            PredictSettings((), pred_only=True, colormap="inferno"),
            lambda p: p[:, -8:].sum() > p[:, :8].sum(),
        ),
    ):
        predict_files(KINDS[kind], tmp_path / "a.png", tmp_path / name, settings=settings)
        assert holds(np.asarray(Image.open(tmp_path / name / "a.png"))), name


@pytest.mark.parametrize("mode", ["clip", "running", "frame"])
@pytest.mark.parametrize("kind", KINDS)
def test_videos_have_the_colors_of_pictures(tmp_path, kind, mode):
    pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")
    from made_videos import read_video

    from depth_anything.inference.video import VideoSettings, predict_videos

    (tmp_path / "frames").mkdir()
    for number in range(2):
        Image.fromarray(RAMP).save(tmp_path / "frames" / f"{number}.png")
    for grayscale in (False, True):
        settings = VideoSettings(range=mode, pred_only=True, grayscale=grayscale)
        predict_videos(KINDS[kind], tmp_path / "frames", tmp_path / f"{grayscale}", settings=settings)
        settings = PredictSettings((), pred_only=True, grayscale=grayscale)
        predict_files(KINDS[kind], tmp_path / "frames/0.png", tmp_path / f"{grayscale}", settings=settings)
        picture = np.asarray(Image.open(tmp_path / f"{grayscale}" / "0.png")).astype(int)
        (film,) = (tmp_path / f"{grayscale}").glob("*.mp4")
        for _, shown in read_video(film):
            assert (nearest_is_white if grayscale else nearest_is_warm)(shown)
            assert np.abs(shown - picture).mean() < 12  # lossy, and its range leaves out a speck


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_has_the_colors_of_pictures(kind):
    pytest.importorskip("gradio", reason="pip install 'depth-anything-train[demo]'")
    from depth_anything.demo import page
    from depth_anything.inference.formats import display_values

    values, quantity = display_values(KINDS[kind].predict(RAMP), KINDS[kind])
    for color, holds in (("Spectral", nearest_is_warm), ("Gray", nearest_is_white)):
        assert holds(colorize_by_distance(values, quantity=quantity, colormap=page.COLORMAPS[color]))
    legend = page._legend_html(KINDS[kind].predict(RAMP), "Spectral", KINDS[kind])
    first, last = (int(legend.split("rgb(")[part].split(" ")[0]) for part in (1, -1))
    assert first > last  # of red: the bar begins near
    marks = [
        float(part.split("<")[0].removesuffix(" m"))
        for part in legend.split('ticks">')[1].split("<span>")[1:6]
    ]
    assert marks == sorted(marks, reverse=kind == "relative")


def test_colormaps_are_reversed_for_depth():
    assert [distance_colormap("depth", name) for name in ("Spectral_r", "inferno", "gray", "gray_r")] == [
        "Spectral",
        "inferno_r",
        "gray_r",
        "gray",
    ]
    assert distance_colormap("disparity", "inferno") == "inferno"


def test_gray_levels_are_reversed_for_depth():
    map = np.arange(256, dtype=np.float32)[None]
    near, far = (
        colorize_by_distance(map, quantity=q, colormap="gray")[0, :, 0] for q in ("disparity", "depth")
    )
    assert near.tolist() == list(range(256)) and (far == 255 - near).all()
