"""A mistake of the user ends in one error line that says what to type, a nonzero exit code, and no traceback."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

from depth_anything import DepthAnything, save_model

from .conftest import ROOT, SMALL, environment

TEACHER = "some-teacher.safetensors"


def check_error(result: Any, *words: str) -> None:
    assert result.returncode not in (0, -signal.SIGKILL), result.stderr
    printed = result.stderr.strip()
    assert "Traceback" not in printed, printed
    for word in words:
        assert word in printed, (word, printed)
    assert "training:" not in printed, "training began"
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and printed.endswith(errors[0]), printed
    assert "HYDRA_FULL_ERROR" not in printed and "append to your config" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stage=teacherr"], ["teacherr", "pseudolabel", "student", "teacher"]),
        ([], ["stage"]),
        (["stage=teacher", "size=huge"], ["huge", "paper", "tiny"]),
        (["stage=teacher", "encoder=vitx"], ["vitx", "vits"]),
        (["stage=teacher", "stepz=3"], ["stepz", "steps=3"]),
        (["stage=teacher", "+stepz=3", "dry_run=true"], ["stepz", "steps=3"]),
        (["stage=teacher", "+max_depth=10"], ["max_depth", "stage=metric"]),
        (["stage=teacher", "recipe.clip_norm=-1"], ["recipe.clip_norm=-1"]),
        (["stage=teacher", "recipe.schedule=cosin", "dry_run=true"], ["recipe.schedule=cosine"]),
        (["stage=teacher", "trainer.devices=3", "dry_run=true"], ["batch_size=8", "trainer.devices=2"]),
        (["stage=teacher", "recipe.encoder_lr=abc"], ["recipe.encoder_lr=abc"]),
        (["stage=teacher", "recipe.trimm=3"], ["trimm"]),
        (["stage=teacher", "batch_size=16", "micro_batch=5"], ["micro_batch=4 or micro_batch=8"]),
        (["stage=teacher", "recipe.schedule=step"], ["schedule=step", "linear"]),
        (["stage=teacher", "sources=own", "photos=nowhere"], ["nowhere"]),
        (["stage=pseudolabel", "sources=own", "photos=nowhere", f"teacher={TEACHER}"], ["nowhere"]),
        (["stage=teacher", "batch_size=0"], ["batch_size=0"]),
        (["stage=teacher", "steps=-1"], ["steps=-1"]),
        (["stage=teacher", "image_size=100"], ["image_size=98"]),
        (["stage=teacher", "checkpoint.often=1"], ["often"]),
        (["stage=pseudolabel", "teacher=nowhere.safetensors"], ["nowhere.safetensors", "stage=teacher"]),
        (["stage=student"], ["labels-tiny", "stage=pseudolabel"]),
        (["stage=student", "mix=[hypersim]"], ["hypersim", "scenes-synthetic"]),
        (["stage=teacher", "sky=blue"], ["sky=blue", "sky=invalid"]),
        (["stage=teacher", "init=nowhere.pth"], ["nowhere.pth"]),
        (["stage=teacher", "resume=nowhere.ckpt"], ["nowhere.ckpt"]),
    ],
)
def test_mistakes_print_one_error_line(
    start: Any, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    if f"teacher={TEACHER}" in arguments:
        save_model(DepthAnything("vitt"), tmp_path / TEACHER)
    # Before these, a run renders its scenes.
    keys = ("mix=", "init=", "resume=", "teacher=nowhere")
    draws = arguments == ["stage=student"] or any(word.startswith(keys) for word in arguments)
    check_error(start(*arguments, small=draws), *words)


def test_a_second_process_on_the_same_run_is_rejected(
    tmp_path: Path, start: Any, fork_server: ForkServer
) -> None:
    places = [f"data_dir={tmp_path / 'data'}", f"output_dir={tmp_path / 'outputs'}"]
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *places, "stage=teacher", "steps=100000"]
    first = fork_server.start(command, env=environment(), cwd=tmp_path)
    try:
        lock = tmp_path / "outputs" / "teacher-vitt-tiny" / "lock.json"
        deadline = time.monotonic() + 600
        while not lock.is_file() or not lock.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        check_error(start("stage=teacher", "steps=100000"), f"process {first.pid}", "name=")
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def test_another_seed_in_the_same_run_is_rejected(start: Any) -> None:
    assert start("stage=teacher", "steps=2").returncode == 0
    check_error(start("stage=teacher", "steps=2", "seed=5"), "seed=0", "name=", "overwrite=true")
    again = start("stage=teacher", "steps=2")
    assert again.returncode == 0 and "model.safetensors" in again.stdout
