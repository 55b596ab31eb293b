"""The three stages one after another with the commands of the README, on small scenes."""

import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from fork_server import ForkServer

from depth_anything import load_model
from depth_anything.data.shards import open_set, verify_set

from .conftest import environment


def test_three_stages_and_a_report(start: Any, tmp_path: Path, fork_server: ForkServer) -> None:
    for stage in ("teacher", "pseudolabel", "student"):
        steps = [] if stage == "pseudolabel" else ["steps=12"]
        result = start(f"stage={stage}", *steps, own_process=stage == "teacher")
        assert result.returncode == 0, result.stderr[-3000:]
        assert "finished" in result.stdout
    images = open_set(str(tmp_path / "data" / "scenes-photographic"))
    labels = tmp_path / "data" / "labels-tiny" / "scenes-photographic"
    assert verify_set(str(labels), decode=True) == []
    assert open_set(str(labels)).records == images.records == 48
    for run in ("teacher-vitt-tiny", "student-vitn-tiny"):
        folder = tmp_path / "outputs" / run
        assert load_model(folder / "model.safetensors").licence == "Apache-2.0"  # the license of the scenes
        text = (folder / "README.md").read_text()
        assert text.startswith("---\n") and "\nlicense: apache-2.0\n" in text and "| abs_rel |" in text
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == list(range(1, 13))
        assert rows[-1]["val_abs_rel"] and list((folder / "pictures").iterdir())
        assert not [p for p in folder.rglob(".*") if p.is_file()]
    # The teacher of the student, with its fingerprint and license.
    assert re.search(r"\| `teacher-vitt-tiny/model\.safetensors` \(sha256:\w+\) \| Apache-2\.0 \|", text)
    mixed = start("stage=student", "steps=2", "mix=true", "data.repeat={scenes-synthetic: 2}", "name=mixed")
    assert mixed.returncode == 0, mixed.stderr[-3000:]
    card = (tmp_path / "outputs" / "mixed" / "README.md").read_text()
    assert "| scenes-photographic | 48 |" in card and "| scenes-synthetic | 48 |" in card
    report = tmp_path / "report"
    data, outputs = tmp_path / "data", tmp_path / "outputs"
    command = [sys.executable, str(Path(sys.executable).with_name("depth-anything"))]
    command += ["evaluate", "--output", str(report)]
    command += [
        "--data",
        str(data / "scenes-validation"),
        "--mean-map",
        str(data / "scenes-synthetic"),
        "--weights",
    ]
    command += [f"teacher={outputs / 'teacher-vitt-tiny'}", f"student={outputs / 'student-vitn-tiny'}"]
    result = fork_server.run(command, cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((report / "results.json").read_text())
    assert "teacher" in result.stdout and os.path.getsize(report / "report.html") > 10_000


def test_official_encoder_in_a_few_steps(start: Any, tmp_path: Path) -> None:
    result = start("stage=teacher", "encoder=vits", "steps=2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert load_model(tmp_path / "outputs" / "teacher-vits-tiny" / "model.safetensors").encoder == "vits"
