"""Scale and shift from known depths, with outliers."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from depth_anything import DepthAnything, Predictor, load_model, save_model
from depth_anything.cli import main
from depth_anything.evaluation.frames import read_frames
from depth_anything.inference.calibrate import (
    KnownPoint,
    fit_points,
    fit_scale,
    parse_point,
    read_points,
    sample_at_points,
    sample_known_pixels,
)
from depth_anything.inference.predictor import FARTHEST_M

SCALE, SHIFT = 0.21, 0.034


def scattered(count, *, noise=0.0, seed=0):
    """Disparities, and the depths that scale and shift make of them."""
    rng = np.random.default_rng(seed)
    disparity = rng.uniform(0, 5, count)
    return disparity, 1 / (SCALE * disparity + SHIFT) * (1 + noise * rng.normal(size=count))


@pytest.mark.parametrize("count", [2, 3, 12, 400])
def test_exact_points_give_exact_scale_and_shift(count):
    fit = fit_points(*scattered(count))
    assert (fit.scale, fit.shift) == pytest.approx((SCALE, SHIFT), rel=1e-9)
    assert fit.used.all() and fit.abs_rel < 1e-12 and fit.rmse_m < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_40_percent_outliers_do_not_change_the_fit(seed):
    disparity, meters = scattered(40, seed=seed)
    lies = np.random.default_rng(seed + 100).choice(40, 16, replace=False)
    meters[lies] *= np.random.default_rng(seed).choice([0.2, 0.5, 1.8, 6], 16)
    fit = fit_points(disparity, meters)
    assert (fit.scale, fit.shift) == pytest.approx((SCALE, SHIFT), rel=1e-9)
    assert sorted(np.flatnonzero(~fit.used)) == sorted(lies)


def test_noise_is_averaged_and_reported():
    disparity, meters = scattered(200, noise=0.03)
    fit = fit_points(disparity, meters)
    assert fit.scale == pytest.approx(SCALE, rel=0.02) and fit.shift == pytest.approx(SHIFT, rel=0.05)
    assert fit.abs_rel == pytest.approx(0.03 * np.sqrt(2 / np.pi), rel=0.2)
    off = 1 / (fit.scale * disparity + fit.shift) - meters
    assert fit.rmse_m == pytest.approx(np.sqrt(np.mean(off[fit.used] ** 2)))
    np.testing.assert_allclose(fit.depth - meters, off)


def test_near_and_far_points_have_equal_weight():
    """The relative error is fitted, so the far point counts as much as the near ones."""
    fit = fit_points([5, 4.8, 5.2, 0.1], [1, 1.06, 0.97, 60], threshold=0.2)
    assert fit.used.all() and abs(fit.depth[3] / 60 - 1) < 0.1


def test_the_fit_is_deterministic():
    disparity, meters = scattered(300, noise=0.3)
    fits = [fit_points(disparity, meters, threshold=0.5) for _ in range(2)]
    assert fits[0].scale == fits[1].scale and fits[0].shift == fits[1].shift


@pytest.mark.parametrize(
    ("disparity", "meters", "value"),
    [
        ([1.0], [2.0], "got 1"),
        ([], [], "got 0"),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], "the same disparity"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "inverse"),
        ([1.0, 2.0], [1.0, 2.0], "inverse"),
        ([1, 2, 3, 4, 5, 6], [9, 1, 40, 0.3, 2, 0.1], "of 6 .*--threshold"),
    ],
)
def test_invalid_points_are_refused(disparity, meters, value):
    with pytest.raises(ValueError, match=value):
        fit_points(disparity, meters)


def test_points_are_read(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("\ufeffx,y,metres\n\n10,20,1.5\n 3.4 , 5 , 2 \n", encoding="utf-8")
    assert read_points(path) == [KnownPoint(10, 20, 1.5), KnownPoint(3.4, 5, 2)]
    path.write_text("1,2,3")
    assert read_points(path) == [KnownPoint(1, 2, 3)]
    for text, value in [
        ("", "p.csv"),
        ("x,y,metres\n", "p.csv"),
        ("1,2,3\n1,2\n", "line 2: '1,2'"),
        ("1,2,3\n1,2,far\n", "line 2"),
        ("1,2,0\n", "line 1: .* 0 m"),
        ("1,2,-3\n", "-3 m"),
        ("1,2,nan\n", "nan m"),
        ("1,2,inf\n", "inf m"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=value):
            read_points(path)
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="p.csv"):
        read_points(path)


def test_maps_are_sampled_at_points():
    map = np.arange(12, dtype=np.float32).reshape(3, 4)
    points = [parse_point(text) for text in ("0,0,1", "3,2,1", "1.4,0.6,1")]
    assert sample_at_points(map, points, image="a.jpg").tolist() == [0, 11, 5]
    for outside in ("4,0,1", "0,3,1", "-1,0,1", "nan,0,1"):
        with pytest.raises(ValueError, match="a.jpg.* 4 wide and 3 high"):
            sample_at_points(map, [parse_point(outside)], image="a.jpg")


# The scale of a metric model


def test_the_scale_is_the_median_ratio_with_equal_weight_per_image():
    draw = np.random.default_rng(0)
    depth = draw.uniform(1, 20, 101)
    ratio = draw.lognormal(0.2, 0.4, 101)
    fit = fit_scale([depth], [ratio * depth])
    assert fit.scale == pytest.approx(np.median(ratio), rel=1e-12)
    np.testing.assert_allclose(fit.depth, fit.scale * depth)
    assert fit.abs_rel == pytest.approx(np.mean(np.abs(fit.scale / ratio - 1)))
    # 90 points of one image and 3 of another: each image decides half
    fit = fit_scale([np.ones(90), np.ones(3)], [np.full(90, 2.0), np.full(3, 8.0)])
    assert fit.scale == pytest.approx(4) and fit.image_scales.tolist() == [2.0, 8.0]
    fit = fit_scale([np.ones(90), np.ones(3), np.ones(1)], [np.full(90, 2.0), np.full(3, 8.0), [3.0]])
    assert fit.scale == pytest.approx(3)
    assert fit_scale([[2.0]], [[5.0]]).scale == pytest.approx(2.5)


def test_half_of_the_points_may_be_wrong():
    depth = np.random.default_rng(0).uniform(1, 20, 21)
    meters = 1.7 * depth
    meters[:10] *= 50
    assert fit_scale([depth], [meters]).scale == pytest.approx(1.7)


@pytest.mark.parametrize(
    ("depth", "meters"),
    [([], []), ([[]], [[]]), ([[0.0]], [[1.0]]), ([[1.0]], [[np.inf]]), ([[np.nan]], [[1.0]])],
)
def test_a_scale_needs_points_above_zero(depth, meters):
    with pytest.raises(ValueError, match=r"at least one|above 0"):
        fit_scale(depth, meters)


def test_known_pixels_are_spread_over_the_valid_ones():
    depth = np.full((10, 10), 2.0, np.float32)
    depth[:5] = np.nan
    depth[5, 0], depth[5, 1] = np.inf, 0
    assert sample_known_pixels(depth, count=3).tolist() == [52, 76, 99]
    assert len(sample_known_pixels(depth, count=500)) == 48
    assert not len(sample_known_pixels(np.full((2, 2), np.nan)))


# The command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DepthAnything("vitn")
    model.input_size = 28
    save_model(model, "relative.safetensors")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(f"{i}.png")
        map = Predictor(model, device="cpu", input_size=28).predict(pixels)
        rows = [(x, y, 1 / (SCALE * map[y, x] + SHIFT)) for x in range(2, 40, 9) for y in range(1, 30, 7)]
        rows.append((5, 5, 77.0))
        (tmp_path / f"{i}.csv").write_text("\n".join(f"{x},{y},{float(m)!r}" for x, y, m in rows))
    return tmp_path


def test_a_calibrated_model_predicts_meters_without_flags(folder, capsys):
    line = ["calibrate", "0.png", "1.png", "--weights", "relative.safetensors", "--points", "0.csv", "1.csv"]
    assert main([*line, "--output", "metric.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "50 of 52 points used, 2 left out" in out or "of 52 points used" in out
    assert out.count("left out\n") == 2 and "AbsRel 0.0000" in out and "1.png alone: scale 0.21" in out
    model = load_model("metric.safetensors")
    assert model.calibration == pytest.approx((SCALE, SHIFT), rel=1e-3)
    predictor = Predictor(model, device="cpu", input_size=model.input_size)
    assert (predictor.quantity, predictor.unit, model.quantity) == ("depth", "m", "disparity")
    pixels = np.asarray(Image.open("0.png"))
    relative = Predictor(load_model("relative.safetensors"), device="cpu", input_size=28).predict(pixels)
    depth = predictor.predict(pixels)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, 1 / (SCALE * relative + SHIFT), rtol=1e-3)
    np.testing.assert_array_equal(predictor.predict_uncalibrated(pixels), relative)
    assert main(["predict", "0.png", "--weights", "metric.safetensors", "--output", "maps"]) == 0
    assert "(depth, m, larger is farther)" in capsys.readouterr().out
    again = [*line[:4], "metric.safetensors", *line[5:], "--output", "again.safetensors"]
    assert main(again) == 0  # what is calibrated already is calibrated anew, not twice
    assert load_model("again.safetensors").calibration == pytest.approx(model.calibration)


def test_negative_inverse_depth_becomes_the_maximum_depth(folder):
    model = load_model("relative.safetensors")
    model.calibration = (0.5, -50.0)
    depth = Predictor(model, device="cpu", input_size=28).predict(np.zeros((9, 9, 3), np.uint8))
    assert (depth == FARTHEST_M).all()


def test_points_on_the_command_line(folder, capsys):
    points = [f"--point={line}" for line in (folder / "0.csv").read_text().splitlines()[:2]]
    line = ["calibrate", "0.png", "--weights", "relative.safetensors", "--output", "m.safetensors"]
    assert main([*line, *points]) == 0
    assert "two points" in capsys.readouterr().out
    refused = {
        "got 1": [points[0]],
        "--points": [*points, "--points", "0.csv"],
        "need 1 files of points in the same order, not 2": ["--points", "0.csv", "1.csv"],
        "need 1 files of points in the same order, not 0": [],
        "40,2 lies outside 0.png, which is 40 wide": [points[0], "--point", "40,2,1"],
        "--point: '1,2'": ["--point", "1,2"],
    }
    for value, more in refused.items():
        assert main([*line, *more]) == 2
        assert value in capsys.readouterr().err
    assert main([*line[:-1], "m.pth", *points]) == 2
    assert "m.pth" in capsys.readouterr().err


@pytest.fixture
def metric(tmp_path, monkeypatch):
    """An untrained metric model, with and without a canonical focal length, and a set whose depth is known."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DepthAnything("vitn", max_depth=30)
    model.input_size = 28
    save_model(model, "plain.safetensors")
    model.canonical_focal = 25.0
    save_model(model, "canonical.safetensors")
    assert main(["shard", "scenes", "known", "--count", "3", "--size", "28", "42", "--fov", "60", "90"]) == 0
    return tmp_path


@pytest.mark.parametrize("name", ["plain", "canonical"])
def test_a_metric_model_is_scaled_by_a_set_with_known_depth(metric, name, capsys):
    line = ["calibrate", "--data", "known", "--weights", f"{name}.safetensors", "--device", "cpu"]
    assert main([*line, "--limit", "2", "--output", "scaled.safetensors"]) == 0
    out = capsys.readouterr().out
    before, after = load_model(f"{name}.safetensors"), load_model("scaled.safetensors")
    scale = after.max_depth / before.max_depth
    predictors = [Predictor(model, device="cpu") for model in (before, after)]
    frames = list(read_frames("known", limit=2))
    ratios = []
    for frame in frames:
        focal = frame.meta["intrinsics"]["fx"]
        maps = [predictor.predict(frame.image, focal=focal) for predictor in predictors]
        np.testing.assert_allclose(maps[1], scale * maps[0], rtol=1e-5)
        chosen = sample_known_pixels(frame.depth)
        ratios.append((frame.depth / maps[0]).reshape(-1)[chosen])
    weights = np.concatenate([np.full(len(values), 1 / len(values)) for values in ratios])
    values = np.concatenate(ratios)
    assert weights[values < 0.999 * scale].sum() < 1.001 and weights[values < 1.001 * scale].sum() > 0.999
    assert "400 points of 2 images" in out and f"{scale:.4g}"[:4] in out
    assert after.canonical_focal == before.canonical_focal
    assert after.origin["calibrated"]["scale"] == pytest.approx(scale)
    # a second calibration starts from the first, and finds nothing to change
    line[line.index("--weights") + 1] = "scaled.safetensors"
    assert main([*line, "--limit", "2", "--output", "again.safetensors"]) == 0
    again = load_model("again.safetensors")
    assert again.max_depth == pytest.approx(after.max_depth, rel=1e-5)
    assert again.origin["calibrated"]["scale"] == pytest.approx(scale, rel=1e-5)
    # its own output may be replaced; a trained model may not
    assert main([*line, "--output", "again.safetensors"]) == 0
    assert main([*line, "--output", "plain.safetensors"]) == 2


def test_a_metric_model_is_scaled_by_one_point(metric, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 42, 3), np.uint8)).save("a.png")
    line = [
        "calibrate",
        "a.png",
        "--point",
        "20,14,7.5",
        "--weights",
        "canonical.safetensors",
        "--device",
        "cpu",
    ]
    assert main([*line, "--focal", "33", "--output", "scaled.safetensors"]) == 0
    assert "--fov" not in capsys.readouterr().err
    scaled = Predictor(load_model("scaled.safetensors"), device="cpu")
    image = np.asarray(Image.open("a.png"))
    assert scaled.predict(image, focal=33)[14, 20] == pytest.approx(7.5, rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main([*line, "--output", "scaled.safetensors"]) == 0
    assert "42x28" in (said := capsys.readouterr().err) and "--fov DEGREES" in said


def test_calibration_needs_images_or_a_set_in_meters(metric, capsys):
    line = ["calibrate", "--weights", "plain.safetensors", "--output", "x.safetensors"]
    assert main(line) == 2 and "--data SET" in capsys.readouterr().err
    assert main([*line, "a.png", "--data", "known"]) == 2 and "--data SET" in capsys.readouterr().err
    assert main(["shard", "scenes", "photos", "--count", "2", "--size", "28", "42", "--images-only"]) == 0
    assert main([*line, "--data", "photos"]) == 2 and "quantity=None" in capsys.readouterr().err
