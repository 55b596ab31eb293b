"""`depth-anything evaluate`."""

import json
from dataclasses import replace

import numpy as np
from typing_commands import complaint

from depth_anything import load_model
from depth_anything.cli import main
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard


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
    assert "AbsRel ↓" in out and str(folder / "report.html") in out
    # The network is untrained: most of its fits may be negative.
    assert all("inverted" in line and "mean map" not in line for line in err.splitlines())
    document = json.loads((folder / "results.json").read_text())
    names = [model["name"] for model in document["models"]]
    assert names == ["mean map", "student-vitn-tiny", "again"]
    mean, student, twin = document["models"]
    assert student["means"] == twin["means"] and student["images"] == 6
    assert student["facts"]["fingerprint"].startswith("sha256:") and student["facts"]["encoder"] == "vitn"
    assert mean["means"]["abs_rel"] < student["means"]["abs_rel"]  # the network knows nothing yet
    assert document["data"]["digest"] == open_set(scenes).digest
    assert all(0 <= row["boundary_f1"] <= 1 for row in student["rows"]) and "boundary F1 ↑" in out
    assert document["settings"]["command"].startswith("depth-anything evaluate --weights ")
    assert (folder / "report.html").read_text(encoding="utf-8").count("<figure>") >= 6 * 2 * 3


def test_the_command_gives_the_rows_of_the_function(tmp_path, scenes, weights):
    from depth_anything import Predictor
    from depth_anything.evaluation.evaluate import evaluate
    from depth_anything.evaluation.frames import read_frames
    from depth_anything.evaluation.protocols import PROTOCOLS

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
    rules = replace(PROTOCOLS["da2"], sharp=True)  # as the scenes' manifest says
    expected = evaluate(predictor, read_frames(scenes, limit=3), protocol=rules)
    assert json.loads((folder / "results.json").read_text())["models"][0]["rows"] == list(expected.rows)


def test_evaluate_names_what_it_cannot_read(tmp_path, scenes, weights, capsys):
    assert str(tmp_path / "none") in complaint(
        capsys, "evaluate", "--weights", weights, "--data", tmp_path / "none"
    )
    assert "x.pth" in complaint(capsys, "evaluate", "--weights", tmp_path / "x.pth", "--data", scenes)
    twice = complaint(capsys, "evaluate", "--weights", weights, weights, "--data", scenes)
    assert "'student-vitn-tiny'" in twice and "--weights a=" in twice
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("stage: teacher\n")
    assert str(unfinished) in complaint(capsys, "evaluate", "--weights", unfinished, "--data", scenes)


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
    assert "bare/a/0" in complaint(capsys, *line)
