"""Models with a canonical focal length: meters of any camera, resizing, EXIF of real formats, files and commands."""

import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from depth_anything import DepthAnything, Predictor, load_model, save_model
from depth_anything.cli import main
from depth_anything.data.sample import decode_image
from depth_anything.errors import ArgumentWarning, UserError
from depth_anything.evaluation.frames import read_frames
from depth_anything.inference.focal import choose_focal_length, fov_to_focal
from depth_anything.model.card import build_card
from depth_anything.model.metadata import build_metadata
from depth_anything.preprocess import resize_shape

FOCAL = 40.0


def photograph(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DepthAnything("vitn", max_depth=20).eval()
    model.input_size, model.canonical_focal = 28, FOCAL
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("canonical") / "canonical.safetensors"
    save_model(model, path)
    return path


def plain_map(model, image, **options):
    """The map of the same network without a canonical focal length."""
    focal, model.canonical_focal = model.canonical_focal, None
    try:
        return Predictor(model, device="cpu", **options).predict(image)
    finally:
        model.canonical_focal = focal


@pytest.mark.parametrize(
    ("height", "width", "size"), [(30, 50, 28), (60, 100, 28), (30, 50, 56), (41, 33, 28)]
)
def test_meters_are_canonical_depth_times_focal_of_the_input(model, height, width, size):
    image = photograph(height, width)
    got = Predictor(model, device="cpu", input_size=size).predict(image, focal=64.0)
    h, w = resize_shape(height, width, size)
    at_input = 64.0 * math.sqrt(h * w / (height * width))
    canonical = plain_map(model, image, input_size=size)
    np.testing.assert_allclose(got, canonical * np.float32(at_input / FOCAL), rtol=1e-6)


def test_twice_the_focal_length_is_twice_the_depth_exactly(model):
    predictor, image = Predictor(model, device="cpu"), photograph(30, 50)
    np.testing.assert_array_equal(
        predictor.predict(image, focal=90.0), 2 * predictor.predict(image, focal=45.0)
    )
    maps = predictor.predict_batch([image, image], focals=[90.0, 45.0])
    np.testing.assert_array_equal(maps[0], 2 * maps[1])
    assert predictor.farthest_of(image.shape, 90.0) == 2 * predictor.farthest_of(image.shape, 45.0)
    assert (maps[1] <= predictor.farthest_of(image.shape, 45.0)).all()


def test_tiles_and_transformers_resampling_scale_alike(model):
    image = photograph(60, 90)
    for options in ({"tiles": 2}, {"resample": "transformers"}):
        predictor = Predictor(model, device="cpu", **options)
        ratio = predictor.predict(image, focal=50.0) / plain_map(model, image, **options)
        np.testing.assert_allclose(ratio, predictor.input_focal(image.shape, 50.0) / FOCAL, rtol=1e-5)


def test_the_focal_length_of_the_predictor_is_used_without_another(model):
    image = photograph(30, 50)
    expected = Predictor(model, device="cpu").predict(image, focal=fov_to_focal(70, 50))
    for options in ({"fov": 70}, {"focal": fov_to_focal(70, 50)}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(Predictor(model, device="cpu", **options).predict(image), expected)
    other = Predictor(model, device="cpu", fov=70).predict(image, focal=30.0)
    np.testing.assert_array_equal(other, Predictor(model, device="cpu").predict(image, focal=30.0))


def test_an_unknown_focal_length_is_assumed_with_one_warning(model):
    predictor, image = Predictor(model, device="cpu"), photograph(48, 64)
    with pytest.warns(ArgumentWarning, match="64x48.*47 px.*focal=PIXELS") as caught:
        first, second = predictor.predict_batch([image, image])
        predictor.predict(image)
    assert len(caught) == 1
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, predictor.predict(image, focal=470.4 * 64 / 640), rtol=1e-5)


def test_other_models_ignore_the_focal_length_and_never_warn(model):
    relative, image = DepthAnything("vitn"), photograph(30, 50)
    relative.input_size = 28
    predictor = Predictor(relative, device="cpu")
    np.testing.assert_array_equal(predictor.predict(image, focal=10.0), predictor.predict(image))
    assert predictor.canonical_focal is None and predictor.farthest_of(image.shape, 10.0) is None


@pytest.mark.parametrize("focal", [0.0, -3.0, float("nan"), float("inf")])
def test_invalid_focal_lengths_are_refused(model, focal):
    predictor = Predictor(model, device="cpu")
    with pytest.raises(UserError, match=f"focal={focal:g}"):
        predictor.predict(photograph(30, 50), focal=focal)
    with pytest.raises(UserError, match=f"focal={focal:g}"):
        Predictor(model, device="cpu", focal=focal)
    with pytest.raises(UserError, match="fov=180"):
        Predictor(model, device="cpu", fov=180.0)
    with pytest.raises(UserError, match=r"focal=5.*fov=50"):
        Predictor(model, device="cpu", focal=5.0, fov=50.0)
    with pytest.raises(ValueError, match="1 images .* 2"):
        predictor.predict_batch([photograph(30, 50)], focals=[1.0, 2.0])


# --- EXIF ----------------------------------------------------------------------------------------------------------


def with_exif(format, size=(400, 300), orientation=1, **tags):
    """An image file with EXIF, as a camera writes it; tags are named as xA405."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    inner = exif.get_ifd(0x8769)
    for tag, value in tags.items():
        inner[int(tag[1:], 16)] = value
    out, picture = io.BytesIO(), Image.new("RGB", size, (90, 120, 60))
    if format == "HEIF":
        heif = pytest.importorskip("pillow_heif")
        heif.from_pillow(picture).save(out, exif=exif.tobytes(), quality=50)
    else:
        picture.save(out, format, exif=exif.tobytes())
    return out.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_exif_of_every_format(format):
    expected = 26 / math.hypot(36, 24) * 500
    data = with_exif(format, xA405=26)
    focal = choose_focal_length(data, decode_image(data).shape)
    assert focal.pixels == pytest.approx(expected) and focal.source.startswith("EXIF: 26 mm")
    data = with_exif(format, x920A=6.0, xA20E=8000.0, xA210=3)  # 800 px per mm
    focal = choose_focal_length(data, decode_image(data).shape)
    assert focal.pixels == pytest.approx(6.0 * 800) and "800 px per mm" in focal.source


def test_exif_of_a_rotated_photograph():
    data = with_exif("JPEG", orientation=6, xA405=26)
    image = decode_image(data)
    assert image.shape == (400, 300, 3)
    assert choose_focal_length(data, image.shape).pixels == pytest.approx(26 / math.hypot(36, 24) * 500)


# --- files ---------------------------------------------------------------------------------------------------------


def test_the_model_file_keeps_the_canonical_focal_length(model, weights, tmp_path):
    assert load_model(weights).canonical_focal == FOCAL
    assert json.loads(build_metadata(model)["canonical_focal"]) == FOCAL
    assert "focal length of 40 px" in build_card(model, file="m.safetensors", form="safetensors", title="m")
    assert 'metadata["canonical_focal"]' in build_card(model, file="m.onnx", form="onnx", title="m")
    plain = DepthAnything("vitn", max_depth=20)
    assert "canonical_focal" not in build_metadata(plain)
    with pytest.warns(UserWarning) as caught:
        save_model(model, tmp_path / "vitn.pth", format="official")
    assert any("camera of 40 px" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("value", ["0", "-5", '"wide"', "true", "[1]", "NaN"])
def test_invalid_canonical_focal_lengths_of_a_file_are_refused(weights, tmp_path, value):
    metadata = {**build_metadata(load_model(weights)), "canonical_focal": value}
    save_file(load_file(weights), tmp_path / "bad.safetensors", metadata)
    with pytest.raises(ValueError, match="canonical_focal"):
        load_model(tmp_path / "bad.safetensors")
    relative = build_metadata(DepthAnything("vitn")) | {"canonical_focal": "40.0"}
    save_file(load_file(weights), tmp_path / "relative.safetensors", relative)
    with pytest.raises(ValueError, match="canonical_focal=40.0 is for depth"):
        load_model(tmp_path / "relative.safetensors")


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph(48, 64)).save("plain.png")
    Path("phone.jpg").write_bytes(with_exif("JPEG", size=(64, 48), xA405=26))
    return tmp_path


def test_predict_uses_flag_exif_or_an_assumption_and_says_so(folder, weights, capsys):
    line = [
        "predict",
        "plain.png",
        "phone.jpg",
        "--weights",
        str(weights),
        "--device",
        "cpu",
        "--format",
        "npy",
    ]
    predictor = Predictor(load_model(weights), device="cpu")
    images = {name: decode_image(Path(name).read_bytes()) for name in ("plain.png", "phone.jpg")}
    assert main([*line, "--output", "auto"]) == 0
    said = capsys.readouterr()
    assert "EXIF: 26 mm" in said.out and said.err.count("--fov DEGREES") == 1 and "1 image " in said.err
    focals = {"plain": 47.04, "phone": 26 / math.hypot(36, 24) * 80}
    for (name, image), (stem, focal) in zip(images.items(), focals.items(), strict=True):
        np.testing.assert_array_equal(
            np.load(f"auto/{stem}_depth.npy"), predictor.predict(image, focal=focal), name
        )
        record = json.loads(Path(f"auto/{stem}.json").read_text())
        assert record["focal_px"] == pytest.approx(focal)
        assert record["model"]["canonical_focal"] == FOCAL
    assert main([*line, "--output", "fov", "--fov", "90"]) == 0
    assert "--fov DEGREES" not in capsys.readouterr().err
    np.testing.assert_array_equal(
        np.load("fov/phone_depth.npy"),
        predictor.predict(images["phone.jpg"], focal=fov_to_focal(90, 64)),
    )


def test_points_of_a_canonical_model_leave_out_what_is_saturated_for_its_camera(folder, weights):
    line = ["predict", "plain.png", "--weights", str(weights), "--device", "cpu", "--format", "ply"]
    for name, focal in (("a", "40"), ("b", "4000")):
        assert main([*line, "--output", name, "--focal", focal]) == 0
    heads = [Path(f"{name}/plain_points.ply").read_bytes()[:300] for name in "ab"]
    counts = [head.split(b"element vertex ")[1].split(b"\n")[0] for head in heads]
    assert counts[0] == counts[1]  # depths beyond max_depth are no sky for a long lens


def test_evaluate_by_the_intrinsics_of_records_equals_predict_with_the_flag(folder, weights, capsys):
    size = ["--size", "56", "70", "--count", "2", "--seed", "4"]
    assert main(["shard", "scenes", "wide", "--fov", "85", "85", *size]) == 0
    focal = 35 / math.tan(math.radians(85) / 2)
    for i, frame in enumerate(read_frames("wide")):
        assert frame.meta["intrinsics"]["fx"] == pytest.approx(focal)
        Image.fromarray(frame.image).save(f"frame{i}.png")
    images = ["frame0.png", "frame1.png"]
    model = ["--weights", str(weights), "--device", "cpu"]
    assert (
        main(["predict", *images, *model, "--format", "npy", "--output", "maps", "--focal", repr(focal)]) == 0
    )
    errors = []
    for number, frame in enumerate(read_frames("wide")):
        depth, truth = np.load(f"maps/frame{number}_depth.npy").astype(np.float64), frame.depth
        valid = (truth >= 1e-3) & (truth <= 80)
        errors.append(np.mean(np.abs(depth.clip(1e-3, 80) - truth)[valid] / truth[valid]))
    capsys.readouterr()
    assert main(["evaluate", *model, "--data", "wide", "--output", "report"]) == 0
    assert "--fov" not in capsys.readouterr().err
    means = json.loads(Path("report/results.json").read_text())["models"][0]["means"]
    assert means["abs_rel"] == pytest.approx(np.mean(errors), rel=1e-6)
