"""Every example of docs/extending.md runs, from a folder outside the package."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from depth_anything import DepthAnything, save_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
LONGEST_EXAMPLE = 15
COMMON = ["encoder=vitn", "batch_size=2", "image_size=28", "workers=0", "trainer=cpu"]
FIT = [*COMMON, "steps=2", "logging.every=1", "checkpoint.every=2", "validation.limit=2"]
SCENES = [
    f"sources.scenes.{name}.{key}"
    for name in ("synthetic", "photographic", "validation")
    for key in ("count=4", "height=28", "width=42")
]
CSV = "metrics.csv"
# What each command leaves, and a text in it.
LEFT = {
    "student-smooth": (CSV, "smoothness"),
    "teacher-sgd": ("config.yaml", "torch.optim.SGD"),
    "teacher-radam": ("config.yaml", "torch.optim.RAdam"),
    "teacher-sign": ("config.yaml", "my_optimizers.SignSGD"),
    "teacher-linear": ("config.yaml", "my_heads.LinearHead"),
    "teacher-ema": ("config.yaml", "EMAWeightAveraging"),
    "labels-ground": ("config.yaml", "my_teachers:ground_plane"),
    "labels-mirrored": ("config.yaml", "my_labeling.MirroredTeacher"),
}


def sections() -> dict[str, str]:
    """Return the sections of the page that have commands, by their title."""
    parts = re.split(r"(?m)^## (.+)$", PAGE)[1:]
    return {title: text for title, text in zip(parts[::2], parts[1::2], strict=True) if "```sh" in text}


def examples(text: str) -> dict[str, str]:
    """Return the Python files of a section by their name."""
    return dict(re.findall(r"(?ms)^```python\n# (\w+\.py)\n(.*?)^```$", text))


def commands(text: str) -> list[str]:
    """Return the commands of a section."""
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```$", text)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def environment() -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "WANDB_"))}
    return {**clean, "PYTHONPATH": f"{ROOT}{os.pathsep}my_extensions", "OMP_NUM_THREADS": "1"}


def complete(command: str) -> list[str]:
    """Return a command of the page as it is run here: with this Python, and small."""
    program, *words = shlex.split(command)
    if program == "depth-anything":
        words = ["teacher.safetensors" if word == "outputs/teacher-scans" else word for word in words]
        return [sys.executable, "-m", "depth_anything", *words]
    script = words.pop(0)
    if script != "train.py":
        return [sys.executable, script, *words]
    words = [word.replace("loss=5.0", "loss=100.0") for word in words]  # which two steps reach
    small = COMMON if "stage=pseudolabel" in words else FIT
    scenes = [] if "sources=own" in words else SCENES
    own = any(word.startswith("teacher=") for word in words)
    teacher = ["teacher=teacher.safetensors"] if "stage=pseudolabel" in words and not own else []
    return [sys.executable, str(ROOT / "train.py"), *words, *small, *scenes, *teacher]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two scans, a teacher, and labeled photographs where a student looks for them."""
    (tmp_path / "scans").mkdir()
    depth = np.linspace(1, 5, 28 * 42, dtype=np.float32).reshape(28, 42)
    for number in range(4):
        rgb = np.random.default_rng(number).integers(0, 255, (28, 42, 3), dtype=np.uint8)
        np.savez(tmp_path / f"scans/{number}.npz", rgb=rgb, depth=depth + number)
    save_model(DepthAnything("vitn"), tmp_path / "teacher.safetensors")
    (tmp_path / "my_extensions").mkdir()
    return tmp_path


def run(folder: Path, command: list[str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("title", sections())
def test_an_example_runs_from_a_folder_outside_the_package(title: str, folder: Path) -> None:
    text = sections()[title]
    for name, code in examples(text).items():
        (folder / "my_extensions" / name).write_text(code)
    if "stage=student" in text:
        run(folder, complete("python train.py stage=pseudolabel"))
    for command in commands(text):
        printed = run(folder, complete(command))
        name = re.search(r"\bname=(\S+)", command)
        if name and name[1] in LEFT:
            file, words = LEFT[name[1]]
            assert words in (folder / "outputs" / name[1] / file).read_text()
        if name and name[1] == "teacher-below":
            assert "the loss is below" in printed
    if title == "A benchmark":
        assert "AbsRel" in printed


@pytest.mark.parametrize("title", sections())
def test_an_example_has_at_most_fifteen_lines(title: str) -> None:
    for name, code in examples(sections()[title]).items():
        lines = [
            line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))
        ]
        assert len(lines) <= LONGEST_EXAMPLE, name


def test_every_extension_point_has_an_example() -> None:
    named = " ".join(sections())
    for what in (
        "loss",
        "decoder",
        "augmentation",
        "optimizer",
        "data set",
        "benchmark",
        "callback",
        "logger",
        "teacher",
    ):
        assert what in named
