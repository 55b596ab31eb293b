"""Scale and shift from known depths, with outliers."""

import numpy as np
import pytest
import torch
from PIL import Image

from depth_anything import DepthAnything, Predictor, load_model, save_model
from depth_anything.cli import main
from depth_anything.inference.calibrate import (
    KnownPoint,
    fit_points,
    parse_point,
    read_points,
    sample_at_points,
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


def test_a_metric_model_is_not_calibrated(folder, capsys):
    save_model(DepthAnything("vitn", max_depth=20), "metres.safetensors")
    line = ["calibrate", "0.png", "--weights", "metres.safetensors", "--output", "m.safetensors"]
    assert main([*line, "--points", "0.csv"]) == 2
    assert "metres.safetensors" in capsys.readouterr().err
