"""No command replaces a file that it reads, or that it did not write; its own it writes anew."""

import json
import os

import numpy as np
import pytest
import torch
from made_custom import make_set
from PIL import Image
from typing_commands import complaint

from depth_anything import DepthAnything, load_model, save_model
from depth_anything.cli import main


def type_line(*words):
    return main([str(word) for word in words])


def stays(capsys, path, *line):
    """The command is refused, names the file, and the file is as it was."""
    before = path.read_bytes() if path.is_file() else None
    capsys.readouterr()
    said = complaint(capsys, *line)
    assert str(path) in said and ("was not written by" in said or "is read by" in said)
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("command", ["view", "stats"])
def test_view_and_stats_do_not_replace_a_users_picture(tmp_path, scenes, capsys, command):
    mine = tmp_path / "mine.png"
    line = (command, scenes, "--count", "2", "--output", mine)
    assert type_line(*line) == 0 and type_line(*line) == 0
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(mine)
    stays(capsys, mine, *line)
    mine.unlink()
    os.link(scenes / "manifest.json", mine)
    stays(capsys, mine, *line)
    mine.unlink()
    mine.symlink_to("nowhere")
    stays(capsys, mine, *line)
    mine.unlink()
    mine.mkdir()
    stays(capsys, mine, *line)


def test_a_command_does_not_replace_another_commands_picture(tmp_path, scenes, capsys):
    picture = tmp_path / "a.png"
    assert type_line("view", scenes, "--count", "2", "--output", picture) == 0
    stays(capsys, picture, "stats", scenes, "--count", "2", "--output", picture)


def test_check_reports_do_not_replace_a_users_files(tmp_path, capsys):
    make_set(tmp_path, yaml="unit: mm\n")
    line = ("shard", "custom", tmp_path / "set.yaml", tmp_path / "out", "--check-only")
    assert type_line(*line) == 0 and type_line(*line) == 0
    for name in ("check.png", "check.txt"):
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out" / name).write_bytes(b"mine")
        stays(capsys, tmp_path / "out" / name, *line)


def test_bench_data_does_not_replace_a_users_file(tmp_path, scenes, capsys):
    mine = tmp_path / "figures.json"
    line = (
        "bench-data",
        scenes,
        "--samples",
        "2",
        "--batch-size",
        "1",
        "--image-size",
        "28",
        "--workers",
        "1",
    )
    for content in ("{}", "[1]", "mine"):
        mine.write_text(content)
        stays(capsys, mine, *line, "--json", mine)


@pytest.fixture
def relative(tmp_path):
    torch.manual_seed(0)
    model = DepthAnything("vitn")
    model.input_size = 28
    save_model(model, tmp_path / "relative.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "relative.safetensors"


def test_calibrate_does_not_replace_other_models(tmp_path, relative, capsys):
    points = [word for x, metres in ((3, 5.0), (30, 1.0)) for word in ("--point", f"{x},9,{metres}")]
    line = ["calibrate", tmp_path / "a.png", *points, "--threshold", "10", "--weights"]
    out = tmp_path / "metric.safetensors"
    stays(capsys, relative, *line, relative, "--output", relative)
    (tmp_path / "other.safetensors").symlink_to(relative)
    stays(capsys, tmp_path / "other.safetensors", *line, relative, "--output", tmp_path / "other.safetensors")
    save_model(DepthAnything("vitn"), tmp_path / "trained.safetensors")
    stays(
        capsys,
        tmp_path / "trained.safetensors",
        *line,
        relative,
        "--output",
        tmp_path / "trained.safetensors",
    )
    model = load_model(relative)
    model.calibration = (0.5, 0.1)
    save_model(model, out)  # as an earlier calibration left it
    assert type_line(*line, out, "--output", out) == 2 and load_model(out).calibration == (0.5, 0.1)
    (tmp_path / "a.csv").write_text("3,9,5\n30,9,1\n")
    os.link(tmp_path / "a.csv", tmp_path / "csv.safetensors")
    with_csv = ["calibrate", tmp_path / "a.png", "--points", tmp_path / "a.csv", "--weights", relative]
    stays(capsys, tmp_path / "csv.safetensors", *with_csv, "--output", tmp_path / "csv.safetensors")


@pytest.mark.filterwarnings("ignore:.*does not keep the input size")
@pytest.mark.parametrize("to", ["safetensors", "official"])
def test_export_does_not_replace_other_models(tmp_path, relative, weights, capsys, to):
    ending = {"safetensors": ".safetensors", "official": ".pth"}[to]
    line = ("export", "--weights", relative, "--to", to, "--output")
    stays(capsys, relative, *line, relative)
    mine = tmp_path / "sub" / f"mine{ending}"
    assert type_line(*line, mine) == 0 and type_line(*line, mine) == 0
    other = tmp_path / f"other{ending}"
    other.write_bytes(b"mine")
    stays(capsys, other, *line, other)
    trained = weights / "model.safetensors"  # of a run
    stays(capsys, trained, *line, trained)


def test_export_does_not_replace_another_transformers_folder(tmp_path, relative, capsys):
    line = ("export", "--weights", relative, "--to", "transformers", "--output")
    assert type_line(*line, tmp_path / "own") == 0 and type_line(*line, tmp_path / "own") == 0
    (tmp_path / "others").mkdir()
    (tmp_path / "others/config.json").write_text("{}")
    stays(capsys, tmp_path / "others/config.json", *line, tmp_path / "others")


def test_evaluate_does_not_replace_a_users_files(tmp_path, scenes, weights, capsys):
    line = (
        "evaluate",
        "--weights",
        weights,
        "--data",
        scenes,
        "--limit",
        "1",
        "--input-size",
        "28",
        "--output",
    )
    assert type_line(*line, tmp_path / "own") == 0 and type_line(*line, tmp_path / "own") == 0
    for name in ("results.json", "table.txt", "report.html", "results.csv"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(json.dumps({"mine": 1}))
        stays(capsys, folder / name, *line, folder)
        assert sorted(path.name for path in folder.iterdir()) == [name]  # nothing was judged


def test_names_are_escaped_where_commands_print_them(tmp_path, scenes, capsys):
    for command in ("view", "stats"):
        assert (
            type_line(command, scenes, "--count", "2", "--output", tmp_path / f"{command}\x1b[2J\n.png") == 0
        )
        out = capsys.readouterr().out
        assert "\x1b" not in out and rf"{command}\x1b[2J\n.png" in out


@pytest.mark.parametrize(
    "mine",
    [
        "settings.json",
        "about.json",
        "listing.txt",
        "listing.json",
        "00000.idx",
        "00000.skipped.json",
        "7.pixels.json",
    ],
)
@pytest.mark.parametrize("kind", ["images", "scenes", "merge"])
def test_shards_are_not_written_into_a_folder_with_other_files(tmp_path, capsys, kind, mine):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    lines = {
        "images": ("shard", "images", tmp_path / "a.png", tmp_path / "out"),
        "scenes": ("shard", "scenes", tmp_path / "out", "--count", "1", "--size", "28", "28"),
        "merge": ("merge", tmp_path / "out", tmp_path / "part"),
    }
    assert type_line("shard", "images", tmp_path / "a.png", tmp_path / "part") == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / mine).write_text('{"mine": 1}')
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    said = complaint(capsys, *lines[kind])
    assert str(tmp_path / "out" / mine) in said or "part" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("text", ["[1]", "not json", '{"source": 1}'])
def test_unknown_settings_files_are_named_without_advice_to_remove_the_folder(tmp_path, capsys, text):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "settings.json").write_text(text)
    said = complaint(capsys, "shard", "images", tmp_path / "a.png", tmp_path)
    assert str(tmp_path / "settings.json") in said and "rm -r" not in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("00000.idx", "v1.2 2\nJPG 512 120\n"),  # of NVIDIA DALI
        ("00000.idx", ""),
        ("manifest.json", '{"manifest_version": 3}'),
        ("manifest.json", "[]"),
        ("manifest.json", "CACHE MANIFEST"),
    ],
)
def test_indexing_does_not_replace_other_indexes_and_manifests(tmp_path, scenes, capsys, name, text):
    for tar in scenes.glob("*.tar"):
        os.link(tar, tmp_path / tar.name)
    (tmp_path / name).write_text(text)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert str(tmp_path / name) in complaint(capsys, "shard", "index", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_own_index_is_rebuilt(tmp_path, scenes, capsys):
    for tar in scenes.glob("*.tar"):
        os.link(tar, tmp_path / tar.name)
    line = ("shard", "index", tmp_path)
    assert type_line(*line) == 0
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in (*tmp_path.glob("*.idx"), tmp_path / "manifest.json"):
        path.write_bytes(path.read_bytes()[:60])
    assert type_line(*line) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == made


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".png"])
def test_a_contact_sheet_of_any_format_is_replaced(tmp_path, scenes, suffix):
    line = ("view", scenes, "--count", "2", "--output", tmp_path / f"sheet{suffix}")
    assert type_line(*line) == 0 and type_line(*line) == 0
