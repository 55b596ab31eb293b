"""The command line as a user types it: its flags (pinned), its words, its exit codes."""

import argparse
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from depth_anything import DepthAnything, __version__, load_model, save_model
from depth_anything.cli import build_parser, main, options, shards
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest, write_shard

# Command → what may follow it: option → default, positionals with None. Public: what is here stays or is renamed
# with a word in CHANGELOG.md.
SURFACE = {
    "export": {
        "--help": None,
        "--weights": None,
        "--encoder": None,
        "--dataset": None,
        "--max-depth": None,
        "--to": None,
        "--output": None,
        "--precision": "fp32",
        "--opset": 18,
    },
    "": {"--help": None, "--version": None, "--traceback": False, "command": None},
    "shard": {"--help": None, "kind": None},
    "shard scenes": {
        "--help": None,
        "output": None,
        "--look": "synthetic",
        "--count": 1024,
        "--seed": 0,
        "--size": (256, 256),
        "--per-shard": 128,
        "--images-only": False,
    },
    "shard images": {
        "--help": None,
        "source": None,
        "output": None,
        "--name": None,
        "--per-shard": 1000,
        "--short-side": None,
        "--licence": None,
    },
    "shard index": {"--help": None, "source": None, "--name": None, "--licence": None},
    "verify": {"--help": None, "set": None, "--decode": False},
    "view": {"--help": None, "set": None, "--images": None, "--count": 16, "--output": "sheet.png"},
    "predict": {
        "--help": None,
        "source": None,
        "--img-path": None,
        "--outdir": "./vis_depth",
        "--weights": None,
        "--encoder": None,
        "--dataset": None,
        "--max-depth": None,
        "--pred-only": False,
        "--grayscale": False,
        "--colormap": None,
        "--format": ("png16",),
        "--save-numpy": False,
        "--focal": None,
        "--max-points": 1_000_000,
        "--batch-size": 1,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
        "--tiles": None,
    },
    "video": {
        "--help": None,
        "source": None,
        "--output": None,
        "--weights": None,
        "--encoder": None,
        "--dataset": None,
        "--max-depth": None,
        "--pred-only": False,
        "--grayscale": False,
        "--colormap": None,
        "--range": "clip",
        "--smooth": 0.0,
        "--format": ("mp4",),
        "--fps": "24",
        "--batch-size": 4,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
        "--tiles": None,
    },
    "demo": {
        "--help": None,
        "--weights": None,
        "--encoder": None,
        "--host": "127.0.0.1",
        "--port": 7860,
        "--max-megapixels": 50.0,
        "--max-megabytes": 30.0,
        "--queue": 16,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
    },
    "calibrate": {
        "--help": None,
        "images": None,
        "--points": (),
        "--point": [],
        "--output": None,
        "--threshold": 0.1,
        "--weights": None,
        "--encoder": None,
        "--dataset": None,
        "--max-depth": None,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
    },
    "evaluate": {
        "--help": None,
        "--weights": None,
        "--data": None,
        "--mean-map": None,
        "--output": None,
        "--limit": None,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
    },
}


def surface_of(parser, name=""):
    found = {name: {}}
    for action in parser._actions:
        title = next((o for o in action.option_strings if o.startswith("--")), action.dest)
        found[name][title] = None if action.default == argparse.SUPPRESS else action.default
        if isinstance(action, argparse._SubParsersAction):
            for child, sub in action.choices.items():
                found |= surface_of(sub, f"{name} {child}".strip())
    return found


def test_the_console_flags_are_pinned():
    assert surface_of(build_parser()) == SURFACE


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    arguments = [
        "--look",
        "photographic",
        "--count",
        "6",
        "--seed",
        "7",
        "--size",
        "56",
        "70",
        "--per-shard",
        "4",
    ]
    assert main(["shard", "scenes", str(root), *arguments]) == 0
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run's folder, finished."""
    run = tmp_path_factory.mktemp("runs") / "student-vitn-tiny"
    run.mkdir()
    save_model(DepthAnything("vitn"), run / "model.safetensors")
    (run / "config.yaml").write_text("stage: student\n")
    return run


def complaint(capsys, *arguments):
    """Type a command that must be refused in one sentence; return the sentence."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"depth-anything {arguments[0]}: ")
    return lines[0]


def read_png(path):
    with Image.open(path) as picture:
        return np.asarray(picture), picture.text


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom depth_anything.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'matplotlib', 'jinja2', 'tqdm', 'pytorch_lightning', 'hydra'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for arguments in (["--help"], ["--version"], ["evaluate", "--help"], ["shard", "scenes", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "depth-anything" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"depth-anything {__version__}"


def test_python_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "depth_anything", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"depth-anything {__version__}"


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluat"])
    assert stop.value.code == 2 and "'evaluate'" in capsys.readouterr().err


def test_scenes_become_a_set(scenes):
    made = open_set(scenes)
    assert made.records == 6 and len(made.shards) == 2 and made.name == "scenes"


def test_images_become_a_set(tmp_path, capsys):
    for name in ("a.png", "deep/b.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    assert main(["shard", "images", str(tmp_path / "photos"), str(tmp_path / "set"), "--name", "mine"]) == 0
    assert re.search(r"set: +mine\n.*records: +2\n", capsys.readouterr().out, re.DOTALL)
    assert open_set(tmp_path / "set").name == "mine"
    assert "does not exist" in complaint(capsys, "shard", "images", tmp_path / "nowhere", tmp_path / "other")


def test_tars_made_elsewhere_are_indexed(tmp_path, scenes, capsys):
    tar = tmp_path / "others" / "x.tar"
    tar.parent.mkdir()
    tar.write_bytes((scenes / "00000.tar").read_bytes())
    assert main(["shard", "index", str(tar.parent), "--name", "theirs"]) == 0
    assert re.search(r"set: +theirs\n.*records: +4\n", capsys.readouterr().out, re.DOTALL)
    assert main(["verify", str(tar.parent)]) == 0
    assert "no .tar" in complaint(capsys, "shard", "index", tmp_path)


def test_verify_tells_a_sound_set_from_a_damaged_one(tmp_path, scenes, capsys):
    assert main(["verify", str(scenes), "--decode"]) == 0
    assert capsys.readouterr().out == f"{scenes}: sound\n"
    for file in scenes.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "00001.tar").read_bytes())
    data[2000] ^= 1
    (tmp_path / "00001.tar").write_bytes(data)
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "00001.tar" in out and "00000.tar" not in out and "problems" in out


def test_view_draws_a_sheet_and_tells_ranges(tmp_path, scenes, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    assert main(["view", str(scenes), "--count", "4", "--output", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert (
        re.search(r"set: +scenes\n.*records: +6\nshards: +2\n", out, re.DOTALL)
        and open_set(scenes).digest in out
    )
    assert re.search(r"look: +photographic\n", out)
    assert out.count("70 x 56, depth ") == 4 and "median" in out
    picture, _ = read_png(sheet)
    assert picture.shape[1] > 3 * 2 * 224 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 500


def test_view_joins_labels_with_their_images(tmp_path, scenes, capsys):
    images = open_set(scenes)
    shard = images.shards[0]
    maps = [Frame(f"scenes/{shard.name}/{i:07d}", np.zeros((1, 1, 3), np.uint8)) for i in range(4)]
    fields = []
    for frame in maps:
        frame.disparity = np.linspace(1, 9, 28 * 42, dtype=np.float32).reshape(28, 42)
        fields.append((frame.key, {"disparity.q12": encode_frame(frame, codec="q12")["disparity.q12"]}))
    info = write_shard(tmp_path / f"{shard.name}.tar", fields)
    meta = {"images": {"name": images.name, "hashes": {shard.name: shard.hash}}}
    write_manifest(tmp_path, name="labels", shards=[info], meta=meta)
    assert main(["view", str(tmp_path), "--images", str(scenes), "--output", str(tmp_path / "s.png")]) == 0
    assert capsys.readouterr().out.count("70 x 56 (target 42 x 28), disparity 1 to 9, median 5") == 4
    assert "add --images" in complaint(capsys, "view", tmp_path)


def test_evaluate_writes_a_report(tmp_path, scenes, weights, capsys):
    folder = tmp_path / "report"
    arguments = [
        "--data",
        str(scenes),
        "--mean-map",
        str(scenes),
        "--output",
        str(folder),
        "--input-size",
        "56",
    ]
    again = weights / "model.safetensors"
    assert main(["evaluate", "--weights", str(weights), f"again={again}", *arguments, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "AbsRel ↓" in out and str(folder / "report.html") in out and not err
    document = json.loads((folder / "results.json").read_text())
    names = [model["name"] for model in document["models"]]
    assert names == ["mean map", "student-vitn-tiny", "again"]
    mean, student, twin = document["models"]
    assert student["means"] == twin["means"] and student["images"] == 6
    assert student["facts"]["fingerprint"].startswith("sha256:") and student["facts"]["encoder"] == "vitn"
    assert mean["means"]["abs_rel"] < student["means"]["abs_rel"]  # the network knows nothing yet
    assert document["data"]["digest"] == open_set(scenes).digest
    assert document["settings"]["command"].startswith("depth-anything evaluate --weights ")
    assert (folder / "report.html").read_text(encoding="utf-8").count("<figure>") >= 6 * 2 * 3


def test_evaluate_is_the_function(tmp_path, scenes, weights):
    from depth_anything import Predictor
    from depth_anything.evaluation.benchmarks import read_frames
    from depth_anything.evaluation.evaluate import evaluate

    folder = tmp_path / "r"
    line = [
        "evaluate",
        "--weights",
        f"m={weights}",
        "--data",
        str(scenes),
        "--output",
        str(folder),
        "--limit",
        "3",
    ]
    assert main([*line, "--input-size", "56", "--device", "cpu"]) == 0
    predictor = Predictor(load_model(weights / "model.safetensors"), device="cpu", input_size=56)
    expected = evaluate(predictor, read_frames(scenes, limit=3))
    assert json.loads((folder / "results.json").read_text())["models"][0]["rows"] == list(expected.rows)


def test_evaluate_refuses_in_one_sentence(tmp_path, scenes, weights, capsys):
    assert "is not a folder" in complaint(
        capsys, "evaluate", "--weights", weights, "--data", tmp_path / "none"
    )
    assert "no weights at" in complaint(capsys, "evaluate", "--weights", tmp_path / "x.pth", "--data", scenes)
    twice = complaint(capsys, "evaluate", "--weights", weights, weights, "--data", scenes)
    assert "two models are called 'student-vitn-tiny'" in twice
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("stage: teacher\n")
    assert "not finished" in complaint(capsys, "evaluate", "--weights", unfinished, "--data", scenes)


def test_evaluate_refuses_a_set_without_depth(tmp_path, weights, capsys):
    frame = Frame("bare/a/0", np.zeros((28, 28, 3), np.uint8))
    info = write_shard(tmp_path / "a.tar", [(frame.key, encode_frame(frame, codec="f32"))])
    write_manifest(tmp_path, name="bare", shards=[info], meta={})
    line = (
        "evaluate",
        "--weights",
        weights,
        "--data",
        tmp_path,
        "--output",
        tmp_path / "r",
        "--input-size",
        "28",
    )
    assert "no depth in metres" in complaint(capsys, *line)


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
    assert "3 images mapped, 1 files skipped" in out and "larger is nearer" in out
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
        assert "1 images mapped, 0 files skipped" in capsys.readouterr().out
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


def test_warnings_are_one_line(capsys, monkeypatch):
    def warn(options):
        warnings.warn("the file does not say what it is", stacklevel=2)

    monkeypatch.setattr(shards, "_verify", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["verify", "anything"]) == 0
    assert capsys.readouterr().err == "depth-anything: the file does not say what it is\n"


def test_predict_refuses_in_one_sentence(tmp_path, weights, capsys):
    (tmp_path / "empty").mkdir()
    rest = ("--weights", weights, "--output", tmp_path / "maps")
    assert "does not exist" in complaint(capsys, "predict", tmp_path / "none.jpg", *rest)
    assert "no image that can be read" in complaint(capsys, "predict", tmp_path / "empty", *rest)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert "broken.jpg: " in complaint(capsys, "predict", tmp_path / "broken.jpg", *rest)


def test_an_error_shows_its_traceback_only_when_asked(tmp_path, capsys):
    complaint(capsys, "view", tmp_path / "none")
    with pytest.raises(ValueError):
        main(["--traceback", "view", str(tmp_path / "none")])


def test_interrupted(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_verify", interrupt)
    assert main(["verify", "anything"]) == 130
    assert capsys.readouterr().err.strip() == "depth-anything: interrupted"


def test_long_passes_tell_how_far_they_are_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(options.time, "monotonic", lambda: next(clock))
    assert list(options.watch(range(4), what="pass", total=4)) == [0, 1, 2, 3]
    assert capsys.readouterr().err.splitlines() == [
        "pass: 2 of 4, 0.1 a second, 40 s to go",
        "pass: 4 of 4, 0.1 a second, 0 s to go",
    ]
