"""run.py as users of V1 and V2 type it, and `depth-anything predict` with the same flags."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from depth_anything import DepthAnything, Predictor, load_model, save_model
from depth_anything.cli import build_parser, main, predict_command
from depth_anything.cli.predict_command import run_images

ROOT = Path(__file__).resolve().parent.parent
THEIRS = {
    "--encoder": "vitn",
    "--img-path": "photos",
    "--outdir": "out",
    "--input-size": "28",
    "--pred-only": None,
    "--grayscale": None,
    "--load-from": "w.safetensors",
    "--max-depth": "20",
    "--save-numpy": None,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What a new user has: photographs and weights."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(DepthAnything("vitn"), "w.safetensors")
    Path("photos/deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "deep/a.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(Path("photos", name))
    return tmp_path


def made(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


LINE = ["--img-path", "photos", "--load-from", "w.safetensors", "--input-size", "28", "--device", "cpu"]


def test_the_script_writes_what_theirs_writes(folder, fork_server):
    done = fork_server.run([sys.executable, ROOT / "run.py", *LINE], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "2 images predicted, 0 files skipped" in done.stdout and "larger is nearer" in done.stdout
    assert made("vis_depth") == ["a.json", "a.png", "deep/a.json", "deep/a.png"]
    with Image.open("vis_depth/a.png") as picture:
        assert picture.size == (40 + 50 + 40, 30) and picture.mode == "RGB"


def test_predict_is_the_same_and_adds_values(folder):
    assert run_images([*LINE, "--outdir", "one"]) == 0
    assert main(["predict", *LINE, "--outdir", "two"]) == 0
    assert set(made("two")) - set(made("one")) == {"a_disparity.png", "deep/a_disparity.png"}
    for name in made("one"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes() or name.endswith(".json")


def test_both_have_their_flags_and_the_same_ones():
    def flags(parser):
        return {option for action in parser._actions for option in action.option_strings}

    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    ours, parser = flags(commands["predict"]), argparse.ArgumentParser()
    predict_command._add_predict_flags(parser, formats=())
    assert ours == flags(parser) and set(THEIRS) <= ours
    for flag in ("--weights", "--format", "--colormap", "--device", "--precision", "--tiles", "--resample"):
        assert flag in ours


def test_pred_only_and_grayscale(folder):
    assert run_images([*LINE, "--pred-only", "--grayscale"]) == 0
    picture = np.asarray(Image.open("vis_depth/a.png"))
    assert picture.shape == (30, 40, 3) and (picture == picture[..., :1]).all()
    assert picture.min() == 0 and picture.max() == 255


def test_metres_as_their_metric_run(folder):
    torch.manual_seed(0)
    save_model(DepthAnything("vitn", max_depth=20), "m.safetensors")
    line = ["--encoder", "vitn", "--load-from", "m.safetensors", "--max-depth", "20", "--img-path", "photos"]
    assert run_images([*line, "--outdir", "out", "--input-size", "28", "--save-numpy"]) == 0
    depth = np.load("out/a_raw_depth_meter.npy")
    expected = Predictor(load_model("m.safetensors"), device="cpu", input_size=28).predict(
        np.asarray(Image.open("photos/a.png"))
    )
    np.testing.assert_array_equal(depth, expected)
    assert json.loads(Path("out/a.json").read_text())["unit"] == "m"


def test_ways_to_run_the_network(folder):
    for name, more in {
        "plain": [],
        "theirs": ["--resample", "transformers"],
        "tiles": ["--tiles", "2x3"],
    }.items():
        assert run_images([*LINE, "--outdir", name, "--format", "npy", *more]) == 0
    plain, *others = (np.load(f"{name}/a_disparity.npy") for name in ("plain", "theirs", "tiles"))
    for other in others:
        assert 0 < np.abs(other - plain).max() < 2 * np.ptp(plain) and other.shape == plain.shape
    model = json.loads(Path("tiles/a.json").read_text())["model"]
    assert model["tiles"] == [2, 3] and model["input_size"] == 28


def test_points_with_a_focal_length(folder, capsys):
    assert run_images([*LINE, "--format", "ply", "glb", "--focal", "33", "--max-points", "100"]) == 0
    assert (
        "focal length (2 images, pixels in each .json; set it with --focal): given" in capsys.readouterr().out
    )
    assert {"a_points.ply", "deep/a_points.glb"} <= set(made("vis_depth"))
    assert json.loads(Path("vis_depth/a.json").read_text())["focal_px"] == 33
    assert run_images([*LINE, "--format", "ply"]) == 0
    assert "assumed: 470.4 px for a longer side of 640 px" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([], "--img-path PHOTOS"),
        (["--img-path", "none"], "none does not exist"),
        (["--img-path", "photos", "--weights", "none.pth"], "no weights at none.pth"),
        (
            ["--img-path", "photos", "--weights", "x/depth_anything_v2_vitb.pth"],
            "(license CC-BY-NC-4.0) is at https://huggingface.co/depth-anything/Depth-Anything-V2-Base",
        ),
        (["--img-path", "photos", "--weights", "photos/a.png"], "is a PNG picture"),
        ([*LINE, "--encoder", "vits"], "is not vits"),
        ([*LINE, "--colormap", "nonsense"], "colormap 'nonsense'"),
        ([*LINE, "--save-numpy"], "this model predicts disparity"),
        ([*LINE, "--device", "cuda:77"], "--device 'cuda:77' does not exist here"),
        ([*LINE, "--format", "ply", "--focal", "-1"], "must be above 0"),
        ([*LINE, "--tiles", "99"], "must be 1 to 64 a side"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder, capsys, line, words):
    assert run_images(line) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("run.py: ") and words in lines[0]


def test_without_weights_theirs_are_looked_for(folder, capsys, monkeypatch):
    """In checkpoints/ first; where neither that nor the hub has them, it says which file, where from, which licence."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("depth_anything.model.official_weights._download", lambda *_, **__: 1 / 0)
    line = ["--img-path", "photos", "--input-size", "28"]
    assert run_images(line) == 2
    told = capsys.readouterr().err
    assert "depth_anything_v2_vitl.pth" in told and "huggingface.co/depth-anything/" in told
    assert "CC-BY-NC-4.0" in told and told.count("\n") == 1
    assert run_images([*line, "--encoder", "vits", "--dataset", "hypersim"]) == 2
    assert "depth_anything_v2_metric_hypersim_vits.pth" in capsys.readouterr().err
    assert run_images([*line, "--encoder", "vitx"]) == 2
    assert "vits, vitb, vitl" in capsys.readouterr().err
    save_model(DepthAnything("vits"), "checkpoints/depth_anything_v2_vits.pth", format="official")
    assert run_images([*line, "--encoder", "vits"]) == 0
    notes = json.loads(Path("vis_depth/a.json").read_text())
    assert notes["model"]["weights"] == "checkpoints/depth_anything_v2_vits.pth"
