"""Throughput on a clock of the test, wall time over several starts, peaks of devices, and what a log line has."""

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from made_configs import make_config
from tiny_training import fit, make_batch, make_module

from depth_anything.training import throughput
from depth_anything.training.callbacks import PauseEnd, TrainingMetrics, TrainingProgress
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.throughput import Throughput, WallTime, count_flop_per_image, device_peak_flops


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def run_steps(clock: Clock, measured: Throughput, count: int, *, pause: float = 0.0) -> None:
    """Run steps of 1 s of waiting for data, 3 s of work, and a pause after the last one."""
    for i in range(count):
        clock.seconds += 1.0
        measured.receive_batch()
        clock.seconds += 3.0
        measured.count_step()
        measured.end_batch()
        clock.seconds += pause if i == count - 1 else 0.0
        measured.end_pause()


def test_pauses_count_neither_as_steps_nor_as_waits() -> None:
    clock = Clock()
    measured = Throughput(batch_size=8, devices=4, flop_per_image=100, peak_flops=500.0, now=clock)
    run_steps(clock, measured, 5, pause=50.0)
    assert measured.total_useful_s() == 20.0
    numbers = measured.read()
    assert numbers == {
        "images_per_s": 2.0,
        "images_per_s_device": 0.5,
        "step_s": 4.0,
        "data_wait": 0.25,
        "mfu": pytest.approx(2.0 * 100 / (4 * 500.0)),
    }
    run_steps(clock, measured, 10)
    assert measured.read()["step_s"] == 4.0 and measured.useful_s == 60.0
    assert measured.average()["data_wait"] == 0.25
    assert "mfu" not in Throughput(batch_size=8, devices=1, now=clock).average()


def test_a_checkpoint_within_a_pause_has_the_steps_before_it() -> None:
    clock = Clock()
    measured = Throughput(batch_size=8, devices=1, now=clock)
    clock.seconds += 4.0
    measured.receive_batch()
    measured.end_batch()
    clock.seconds += 30.0  # validation; then the checkpoint
    assert measured.total_useful_s() == 4.0


def test_effective_time_leaves_out_what_a_kill_lost(tmp_path: Path) -> None:
    """Two starts: 100 s, of which 60 s are in the checkpoint, and 100 s, of which 80 s are steps."""
    clock = Clock()
    first = WallTime(tmp_path / "time.json", now=clock, began=100.0)
    clock.seconds = 200.0
    first.write(10)
    clock.seconds = 205.0
    first.write(11)  # not written: too soon after the last one; then the process is killed
    clock.seconds = 1000.0
    second = WallTime(tmp_path / "time.json", now=clock, began=1000.0)
    clock.seconds = 1100.0
    assert second.seconds() == 200.0
    second.write(20, now=True)
    starts = json.loads((tmp_path / "time.json").read_text())["starts"]
    assert [(start["seconds"], start["step"]) for start in starts] == [(100.0, 10), (100.0, 20)]
    metrics = TrainingMetrics(every=1, batch_size=8)
    metrics._wall, metrics.throughput = second, Throughput(batch_size=8, devices=1, now=clock)
    metrics.throughput.useful_s = 60.0
    clock.seconds += 100.0  # steps
    assert metrics.effective_time() == pytest.approx(160.0 / 300.0)


@pytest.mark.parametrize("content", ["", "[]", '{"starts": [{"began": "x"}]}'])
def test_a_damaged_file_of_times_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "time.json").write_text(content)
    assert WallTime(tmp_path / "time.json", began=0.0).starts == []


def test_the_start_of_this_process_is_known() -> None:
    began = throughput.process_start()
    assert time.time() - 86_400 < began <= time.time() + 1
    assert os.path.exists("/proc/self/stat")


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.0),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 989.0),
        ("NVIDIA H100 80GB HBM3", "32-true", 494.5),
        ("NVIDIA A100-SXM4-80GB", "32-true", 156.0),
        ("NVIDIA A100-SXM4-80GB", "64-true", None),
        ("A card of next year", "bf16-mixed", None),
    ],
)
def test_peaks_by_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = device_peak_flops(torch.device("cuda"), precision)
    assert peak == (None if tflops is None else tflops * 1e12)
    assert device_peak_flops(torch.device("cpu"), precision) is None


def test_flop_are_those_of_the_method(one_thread: None) -> None:
    student = make_config("stage=student", image_size=28)
    aligned = make_config("stage=student", image_size=28, recipe__alignment_weight=1.0)
    plain, with_encoder = count_flop_per_image(student), count_flop_per_image(aligned)
    assert plain is not None and with_encoder is not None and with_encoder > plain
    assert count_flop_per_image(make_config("stage=pretrain")) is None


def test_a_log_line_has_the_cost_so_far_over_all_starts(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(begin: int, steps: int) -> TrainingMetrics:
        metrics = TrainingMetrics(every=2, batch_size=2, run_dir=tmp_path)
        callbacks: list[Any] = [metrics, Checkpoints(tmp_path / "checkpoints", every=2)]
        callbacks += [TrainingProgress(metrics), PauseEnd(metrics)]
        checkpoint = tmp_path / f"checkpoints/step-{begin:09d}.ckpt" if begin else None
        batches = [make_batch(seed) for seed in range(begin, steps)]
        fit(tmp_path, make_module(), batches, *callbacks, steps=steps, checkpoint=checkpoint)
        return metrics

    first, second = train(0, 4), train(4, 6)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["samples"]) for row in rows] == [4, 8, 12]
    for row in rows:
        assert 0 < float(row["effective_time"]) <= 1 and float(row["step_s"]) > 0
        assert float(row["host_memory_free_gib"]) > 0 and not row.get("mfu")
    saved = torch.load(tmp_path / "checkpoints/step-000000004.ckpt")["callbacks"]["TrainingMetrics"]
    assert second.throughput.useful_s > saved["useful_s"] > 0  # continued
    assert first.throughput.useful_s >= saved["useful_s"] * 0.5
    starts = json.loads((tmp_path / "time.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [4, 6]
    printed = capsys.readouterr().err
    for word in ("12 samples", "images/s", "data wait", "effective time"):
        assert word in printed
