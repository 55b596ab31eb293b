"""`depth-anything predict`."""

import json

import numpy as np
from PIL import Image
from typing_commands import complaint, read_png

from depth_anything import DepthAnything, load_model, save_model
from depth_anything.cli import main


def test_predict_maps_a_folder(tmp_path, weights, capsys):
    photos, maps = tmp_path / "photos", tmp_path / "maps"
    for name, size in (("a.jpg", (40, 60)), ("a.png", (60, 40)), ("deep/ünï.png", (30, 30))):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    line = ["predict", str(photos), "--weights", str(weights), "--output", str(maps), "--input-size", "28"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert "3 images mapped, 1 file skipped" in out and "larger is nearer" in out
    assert err.startswith("skipped notes.txt: ") and err.count("\n") == 1
    made = sorted(path.relative_to(maps).as_posix() for path in maps.rglob("*.*"))
    stems = ("a_jpg", "a_png", "deep/ünï")
    assert made == sorted(f"{stem}{end}" for stem in stems for end in (".json", ".png", "_disparity.png"))
    raw, text = read_png(maps / "a_jpg_disparity.png")
    assert raw.dtype == np.uint16 and raw.shape == (40, 60)
    assert text["quantity"] == "disparity" and text["larger"] == "nearer"
    assert read_png(maps / "a_jpg.png")[0].shape == (40, 60 + 50 + 60, 3)


def test_predict_keeps_values(tmp_path, weights):
    from depth_anything import Predictor

    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    line = ["predict", str(tmp_path / "a.png"), "--weights", str(weights), "--output", str(tmp_path / "maps")]
    assert main([*line, "--input-size", "28"]) == 0
    raw, text = read_png(tmp_path / "maps" / "a_disparity.png")
    low, high = float(text["low"]), float(text["high"])
    values = low + raw / 65535 * (high - low)
    expected = Predictor(load_model(weights / "model.safetensors"), input_size=28).predict(pixels)
    np.testing.assert_allclose(values, expected, atol=(high - low) / 65535)
    assert high > low


def test_predict_passes_over_its_own_output(tmp_path, weights, capsys):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    for _ in range(2):
        line = ["predict", str(tmp_path), "--weights", str(weights), "--output", str(tmp_path / "maps")]
        assert main([*line, "--input-size", "28"]) == 0
        assert "1 image mapped, 0 files skipped" in capsys.readouterr().out
    same = complaint(capsys, "predict", tmp_path, "--weights", weights, "--output", tmp_path)
    assert "another folder" in same


def test_predict_stays_inside_its_output(tmp_path, weights):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text(f"../a.png\n{tmp_path / 'a.png'}\n")
    line = ["predict", str(tmp_path / "lists" / "list.txt"), "--weights", str(weights)]
    assert main([*line, "--output", str(tmp_path / "maps"), "--input-size", "28"]) == 0
    made = sorted(
        path.relative_to(tmp_path / "maps").as_posix() for path in (tmp_path / "maps").rglob("*.png")
    )
    assert made == ["a_png.png", "a_png_2.png", "a_png_2_disparity.png", "a_png_disparity.png"]
    assert not list(tmp_path.glob("a_*"))


def test_the_model_says_what_size_it_sees(tmp_path, scenes):
    model = DepthAnything("vitn")
    model.input_size = 42
    save_model(model, tmp_path / "m.safetensors")
    line = ["evaluate", "--weights", str(tmp_path / "m.safetensors"), "--data", str(scenes), "--limit", "2"]
    rows = []
    for number, more in enumerate(([], ["--input-size", "42"], ["--input-size", "56"])):
        assert main([*line, "--output", str(tmp_path / str(number)), *more]) == 0
        document = json.loads((tmp_path / str(number) / "results.json").read_text())
        rows.append(document["models"][0]["rows"])
        assert document["models"][0]["facts"]["input_size"] == (56 if number == 2 else 42)
    assert rows[0] == rows[1] != rows[2]


def test_predict_refuses_in_one_sentence(tmp_path, weights, capsys):
    (tmp_path / "empty").mkdir()
    rest = ("--weights", weights, "--output", tmp_path / "maps")
    assert "does not exist" in complaint(capsys, "predict", tmp_path / "none.jpg", *rest)
    assert "no image that can be read" in complaint(capsys, "predict", tmp_path / "empty", *rest)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert "broken.jpg: " in complaint(capsys, "predict", tmp_path / "broken.jpg", *rest)
