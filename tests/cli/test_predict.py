"""`depth-anything predict`."""

import json

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image
from typing_commands import complaint, read_png

from depth_anything import DepthAnything, load_model, save_model
from depth_anything.cli import main
from depth_anything.cli.predict_command import run_images


def test_predict_a_folder(tmp_path, weights, capsys):
    photos, maps = tmp_path / "photos", tmp_path / "maps"
    for name, size in (("a.jpg", (40, 60)), ("a.png", (60, 40)), ("deep/ünï.png", (30, 30))):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    line = ["predict", str(photos), "--weights", str(weights), "--output", str(maps), "--input-size", "28"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert "3 images predicted, 1 file skipped" in out and "larger is nearer" in out
    assert err.startswith("skipped notes.txt: ") and err.count("\n") == 1
    made = sorted(path.relative_to(maps).as_posix() for path in maps.rglob("*.*"))
    stems = ("a_jpg", "a_png", "deep/ünï")
    assert made == sorted(f"{stem}{end}" for stem in stems for end in (".json", ".png", "_disparity.png"))
    raw, text = read_png(maps / "a_jpg_disparity.png")
    assert raw.dtype == np.uint16 and raw.shape == (40, 60)
    assert text["quantity"] == "disparity" and text["larger"] == "nearer"
    assert read_png(maps / "a_jpg.png")[0].shape == (40, 60 + 50 + 60, 3)


def test_16_bit_png_restores_the_values(tmp_path, weights):
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


def test_predict_does_not_read_its_own_output(tmp_path, weights, capsys):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    for _ in range(2):
        line = ["predict", str(tmp_path), "--weights", str(weights), "--output", str(tmp_path / "maps")]
        assert main([*line, "--input-size", "28"]) == 0
        assert "1 image predicted, 0 files skipped" in capsys.readouterr().out
    same = complaint(capsys, "predict", tmp_path, "--weights", weights, "--output", tmp_path)
    assert "another --output" in same


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


def test_evaluate_uses_the_models_input_size(tmp_path, scenes):
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


def test_errors_are_one_line(tmp_path, weights, capsys):
    (tmp_path / "empty").mkdir()
    rest = ("--weights", weights, "--output", tmp_path / "maps")
    assert "none.jpg" in complaint(capsys, "predict", tmp_path / "none.jpg", *rest)
    assert str(tmp_path / "empty") in complaint(capsys, "predict", tmp_path / "empty", *rest)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert "broken.jpg: " in complaint(capsys, "predict", tmp_path / "broken.jpg", *rest)


# Several sources


def photo(path, *, level=0, size=(30, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)
    return path


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def type_predict(weights, *arguments, output):
    line = ["predict", *arguments, "--weights", weights, "--outdir", output, "--input-size", "28"]
    return main([str(word) for word in [*line, "--format"]])


def test_several_images_and_folders_at_once(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("p/a.png", "p/b.png", "q/a.png"):
        photo(tmp_path / name)
    assert type_predict(weights, "p/a.png", "p/b.png", output="one") == 0
    assert below(tmp_path / "one") == ["a.json", "a.png", "b.json", "b.png"]
    assert type_predict(weights, "p", tmp_path / "q", "p/a.png", output="two") == 0
    stems = ("p/a_png", "p/a_png_2", "p/b", "q/a")
    assert below(tmp_path / "two") == sorted(f"{stem}{end}" for stem in stems for end in (".json", ".png"))
    assert json.loads((tmp_path / "two/q/a.json").read_text())["image"].endswith("q/a.png")
    assert run_images(["--img-path", "p/a.png", "q", "--weights", str(weights), "--input-size", "28"]) == 0
    assert below(tmp_path / "vis_depth") == ["p/a.json", "p/a.png", "q/a.json", "q/a.png"]


def test_a_missing_source_does_not_stop_the_rest(tmp_path, weights, capsys):
    given = [photo(tmp_path / "a.png"), tmp_path / "none.jpg", photo(tmp_path / "b.png")]
    assert type_predict(weights, *given, output=tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert "2 images predicted, 1 file skipped" in out and "none.jpg" in err
    assert below(tmp_path / "out") == ["a.json", "a.png", "b.json", "b.png"]
    said = complaint(capsys, "predict", tmp_path / "x.jpg", tmp_path / "y.jpg", "--weights", weights)
    assert "x.jpg" in said


def test_the_exit_code_is_1_if_an_image_of_a_folder_is_damaged(tmp_path, weights, capsys):
    photo(tmp_path / "p/a.png")
    (tmp_path / "p/b.jpg").write_bytes(b"\xff\xd8\xff broken")
    (tmp_path / "p/c.jpg").mkdir()
    (tmp_path / "p/d.jpg").symlink_to("nowhere")
    (tmp_path / "p/notes.txt").write_text("no image")
    assert type_predict(weights, tmp_path / "p", output=tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert "1 image predicted, 3 files skipped" in out
    assert all(name in err for name in ("b.jpg", "d.jpg", "notes.txt")) and "c.jpg" not in err
    for name in ("b.jpg", "d.jpg"):
        (tmp_path / "p" / name).unlink()
    assert type_predict(weights, tmp_path / "p", output=tmp_path / "out") == 0  # notes.txt is no failure


def test_the_exit_code_is_1_if_a_listed_file_is_no_image(tmp_path, weights):
    photo(tmp_path / "a.png")
    (tmp_path / "notes").write_text("no image")
    (tmp_path / "list.txt").write_text("a.png\nnotes\n")
    assert type_predict(weights, tmp_path / "list.txt", output=tmp_path / "out") == 1


@pytest.mark.parametrize("several", [False, True])
def test_a_video_is_refused_with_the_command_for_it(tmp_path, weights, capsys, several):
    film = tmp_path / "clip.mp4"
    film.write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(5000))
    if not several:
        assert "depth-anything video" in complaint(capsys, "predict", film, "--weights", weights)
        return
    assert type_predict(weights, film, photo(tmp_path / "a.png"), output=tmp_path / "out") == 1
    assert "depth-anything video" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["HEIC", "AVIF", "JPEG2000"])
def test_heic_avif_and_jpeg_2000_are_read(tmp_path, weights, kind):
    path = tmp_path / "a.img"
    image = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    if kind == "HEIC":
        pillow_heif.from_pillow(image).save(path)
    else:
        image.save(path, kind)
    assert type_predict(weights, path, output=tmp_path / "out") == 0
    assert below(tmp_path / "out") == ["a.json", "a.png"]


def test_an_animation_and_dark_16_bits_are_noted(tmp_path, weights, capsys):
    frames = [Image.fromarray(np.full((30, 40, 3), level, np.uint8)) for level in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((30, 40), 4095, np.uint16)).save(tmp_path / "b.png")
    assert type_predict(weights, tmp_path / "a.gif", tmp_path / "b.png", output=tmp_path / "out") == 0
    animation, dark = capsys.readouterr().err.splitlines()
    assert "a.gif: " in animation and "2 pictures" in animation
    assert "b.png: " in dark and "12-bit" in dark


def test_control_characters_in_names_are_escaped(tmp_path, weights, capsys):
    photo(tmp_path / "p/a.png")
    (tmp_path / "p/x\n\x1b[2J\udcff.jpg").write_bytes(b"\xff\xd8\xff")
    assert type_predict(weights, tmp_path / "p", output=tmp_path / "out\x1b[1m") == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and err.count("\n") == 1 and out.count("\n") == 1
    assert r"x\n\x1b[2J\udcff.jpg" in err and r"out\x1b[1m" in out
    said = complaint(capsys, "predict", tmp_path / "no\nne\x1b.jpg", "--weights", weights)
    assert r"no\nne\x1b.jpg" in said


def test_a_nonfinite_map_names_its_image(tmp_path, capsys):
    model = DepthAnything("vitn")
    with torch.no_grad():
        list(model.parameters())[-1].fill_(torch.nan)
    save_model(model, tmp_path / "m.safetensors")
    line = (
        "predict",
        photo(tmp_path / "a.png"),
        "--weights",
        tmp_path / "m.safetensors",
        "--outdir",
        tmp_path / "out",
    )
    said = complaint(capsys, *line, "--input-size", "28")
    assert "a.png" in said and "NaN" in said
    assert below(tmp_path) == ["a.png", "m.safetensors"] or not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "run"),
    [("--output", main), ("--outdir", main), ("--output", run_images), ("--outdir", run_images)],
)
def test_the_flag_that_was_typed_is_named(tmp_path, weights, capsys, flag, run):
    photo(tmp_path / "a.png")
    line = ["--img-path", str(tmp_path / "a.png"), "--weights", str(weights)]
    line = [*(["predict"] if run is main else []), *line, f"{flag}={tmp_path}"]
    assert run(line) == 2
    other = {"--output": "--outdir", "--outdir": "--output"}[flag]
    said = capsys.readouterr().err
    assert f"another {flag}," in said and other not in said


@pytest.mark.parametrize(("run", "flag"), [(main, "--output"), (run_images, "--outdir")])
def test_the_flag_of_a_folder_that_was_not_typed_is_named(tmp_path, weights, capsys, monkeypatch, run, flag):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "a.png")
    (tmp_path / "vis_depth").write_text("a file")
    line = [*(["predict"] if run is main else []), "--img-path", "a.png", "--weights", str(weights)]
    assert run(line) == 2
    assert f"another {flag}" in capsys.readouterr().err
