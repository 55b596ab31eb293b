"""Data without valid pixels: their share is logged, batches and sets are reported, and a run of nothing else stops."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from tiny_training import PixelNetwork

from depth_anything.data.labels import finish_labels, write_label_sidecar
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import TrainingMetrics, TrainingProgress
from depth_anything.training.data import TrainData
from depth_anything.training.lightning import trainer_arguments
from depth_anything.training.loggers import MetricsCSV, read_metrics
from depth_anything.training.metric import Metric
from depth_anything.training.recipes import MetricRecipe, Recipe
from depth_anything.training.student import Student
from depth_anything.training.valid_pixels import (
    STOP_AFTER_IMAGES,
    STOP_AFTER_STEPS,
    ValidPixelCheck,
    has_valid_target,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, COUNT = 28, 6


GOOD = np.linspace(1, 9, 42, dtype=np.float32)[None].repeat(SIDE, 0)


def write_set(root: Path, *maps: np.ndarray, quantity: str = "depth", **meta: Any) -> str:
    """Write a set of six records, which take the maps in turn."""
    records = []
    for i in range(COUNT):
        key = f"{root.name}/0/{i}"
        truth: dict[str, Any] = {quantity: np.asarray(maps[i % len(maps)], np.float32)} if maps else {}
        frame = Frame(key, np.full((SIDE, 42, 3), 20 * i, np.uint8), {"sky": "inf"}, **truth)
        records.append((key, encode_frame(frame, codec="f32")))
    facts = {"quantity": quantity, "unit": "m" if quantity == "depth" else "px"} if maps else {}
    info = write_shard(root / "0.tar", records)
    write_manifest(root, name=root.name, shards=[info], meta={**facts, **meta})
    return str(root)


def write_labels(root: Path, photos: str, disparity: np.ndarray) -> str:
    """Write labels of one map for all photographs of a set."""
    images = open_set(photos)
    label = Frame("", np.zeros((1, 1, 3), np.uint8), disparity=np.asarray(disparity, np.float32))
    field = {"disparity.f32": encode_frame(label, codec="f32")["disparity.f32"]}
    folder = root / images.name
    info = write_shard(folder / "0.tar", [(f"{images.name}/0/{i}", field) for i in range(COUNT)])
    write_label_sidecar(
        folder,
        info,
        image_set=images.name,
        image=images.shards[0],
        teacher={"fingerprint": "sha256:0", "file": "teacher"},
        preprocessing="518",
        codec="f32",
        values=(0.5, 0.5),
        skipped={},
    )
    assert finish_labels(folder, images)
    return str(root)


def data(sets: dict[str, str], *, batch_size: int = 4, **changes: Any) -> TrainData:
    return TrainData(
        **{
            "sets": sets,
            "labels": None,
            "seed": 0,
            "batch_size": batch_size,
            "micro_batch": 2,
            "patch": 14,
            "streams": 4,
            "image_size": SIDE,
            "workers": 0,
            "sky": "invalid",
            "perturb": False,
            "run_dir": "nowhere",
            **changes,
        }
    )


METERS: dict[str, Any] = {"min_depth": 0.001, "max_depth": 80.0}


def fit(
    folder: Path, loader: TrainData, module: DepthModule, *, steps: int, every: int = 1
) -> list[dict[str, str]]:
    """Train with two micro-batches a step, and return the rows of metrics.csv."""
    log = MetricsCSV(folder / "metrics.csv")
    metrics = TrainingMetrics(every=every, batch_size=4)
    callbacks = [metrics, ValidPixelCheck(every=every), TrainingProgress(metrics, seconds=0.0)]
    arguments = trainer_arguments(callbacks=callbacks, max_steps=steps, run_dir=str(folder))
    trainer = pl.Trainer(**{**arguments, "accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2})
    trainer.loggers = [log]
    trainer.fit(module, datamodule=loader)
    return read_metrics(log.path).rows


def module_of(stage: str) -> DepthModule:
    torch.manual_seed(0)
    numbers: dict[str, Any] = {"steps": 100, "encoder_lr": 1e-5, "head_lr": 1e-5}
    model: Any = PixelNetwork(max_depth=20.0)
    if stage == "metric":
        return Metric(model, MetricRecipe(**numbers))
    return (Student if stage == "student" else DepthModule)(model, Recipe(**numbers))


MILLIMETERS = GOOD * 1000
#: Cases without a valid target: stage, map, settings of the data, and values that the error names.
NO_VALID_TARGET = {
    "millimeters as meters": ("metric", MILLIMETERS, METERS, ["1000", "9000", "max_depth", "80", "unit"]),
    "sky alone, metric": ("metric", GOOD * np.inf, METERS, ["sky"]),
    "nothing known": ("metric", GOOD * np.nan, METERS, ["unknown"]),
    "all nearer than min_depth": ("metric", GOOD / 1e6, METERS, ["1e-06", "min_depth", "unit"]),
    "a teacher's sky": ("teacher", GOOD * np.inf, {}, ["sky"]),
    "a teacher's wall": ("teacher", GOOD * 0 + 4, {}, ["4"]),
    "a teacher's zeros": ("teacher", GOOD * 0, {}, ["unknown"]),
}


@pytest.mark.parametrize("case", NO_VALID_TARGET.values(), ids=NO_VALID_TARGET)
def test_a_run_without_valid_targets_stops(
    tmp_path: Path, case: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, truth, settings, words = case
    root = write_set(tmp_path / "own", truth)
    with pytest.raises(ValueError) as raised:
        fit(tmp_path, data({"own": root}, **settings), module_of(stage), steps=100)
    assert "\n" not in str(raised.value)
    for word in ["the set own", "own/0[", "own/0/", "64 images", *words]:
        assert word in str(raised.value), word
    printed = capsys.readouterr().err
    assert "step 1 " in printed and "samples 0 to 3" in printed and "own/0[" in printed
    rows = read_metrics(tmp_path / "metrics.csv").rows
    assert len(rows) == STOP_AFTER_IMAGES // 4 >= STOP_AFTER_STEPS
    assert {row["valid_share"] for row in rows} == {"1.0" if words == ["4"] else "0.0"}


@pytest.mark.parametrize("value", [0.0, 0.5], ids=["zeros", "a constant"])
def test_a_student_with_constant_labels_stops(tmp_path: Path, value: float) -> None:
    photos = write_set(tmp_path / "photos")
    labels = write_labels(tmp_path / "labels", photos, GOOD * 0 + value)
    with pytest.raises(ValueError) as raised:
        fit(tmp_path, data({"photos": photos}, labels=labels, sky=None), module_of("student"), steps=100)
    for word in ("photos/0[", f"{value:g} everywhere"):
        assert word in str(raised.value)


@pytest.mark.parametrize("side", ["meters", "replayed"])
def test_replay_stops_if_either_kind_of_set_has_no_valid_target(tmp_path: Path, side: str) -> None:
    """The losses of the other kind would hide it."""
    rooms = write_set(tmp_path / "rooms", MILLIMETERS if side == "meters" else GOOD)
    replayed = write_set(
        tmp_path / "web", GOOD if side == "meters" else GOOD * 0 + 3, quantity="disparity", sky_policy="far"
    )
    settings = {"images": {"web": replayed}, "replay": ["web"], "replay_share": 0.5, "sky": None}
    loader = data({"rooms": rooms}, **METERS, **settings)
    with pytest.raises(ValueError) as raised:
        fit(tmp_path, loader, module_of("metric"), steps=200)
    assert f"the set {'rooms' if side == 'meters' else 'web'} " in str(raised.value)


def test_a_short_run_without_valid_targets_does_not_finish(tmp_path: Path) -> None:
    root = write_set(tmp_path / "own", MILLIMETERS)
    with pytest.raises(ValueError, match="own/0"):
        fit(tmp_path, data({"own": root}, **METERS), module_of("metric"), steps=3, every=50)


def test_one_valid_image_is_enough_to_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set may have crops of sky above the range of a LiDAR."""
    root = write_set(tmp_path / "own", *[MILLIMETERS] * (COUNT - 1), GOOD)
    rows = fit(tmp_path, data({"own": root}, **METERS), module_of("metric"), steps=30)
    assert len(rows) == 30
    shares = [float(row["valid_share"]) for row in rows]
    assert sum(shares) / 30 == pytest.approx(1 / COUNT) and set(shares) <= {0, 0.25, 0.5}
    assert "none of the last" not in capsys.readouterr().err


def test_one_set_without_valid_targets_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {
        "good": write_set(tmp_path / "good", GOOD),
        "millis": write_set(tmp_path / "millis", MILLIMETERS),
    }
    rows = fit(tmp_path, data(sets, **METERS), module_of("metric"), steps=60)
    assert len(rows) == 60
    printed = [line for line in capsys.readouterr().err.splitlines() if "the set millis" in line]
    assert len(printed) == 1 and "millis" in printed[0] and "max_depth" in printed[0]


def test_valid_share_is_the_mean_over_micro_batches_and_shown_in_the_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = GOOD.copy()
    half[: SIDE // 2] = np.nan
    rows = fit(tmp_path, data({"own": write_set(tmp_path / "own", half)}), module_of("teacher"), steps=2)
    assert [float(row["valid_share"]) for row in rows] == [0.5, 0.5]
    assert list(rows[0]).index("valid_share") > list(rows[0]).index("images_per_s")
    assert "valid=50.0%" in capsys.readouterr().err


def test_has_valid_target() -> None:
    target = torch.tensor([[1.0, 2, 3], [1, 1, 1], [1, 2, 3], [1, 2, 3], [5, 0, 0], [0, 0, 7]])[:, None]
    valid = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0]]).bool()[:, None]
    assert has_valid_target(target, valid, False).tolist() == [True, False, False, False, True, False]
    assert has_valid_target(target, valid, True).tolist() == [True, True, False, False, True, True]
    kinds = torch.tensor([False, True, True, False, False, False])
    assert has_valid_target(target, valid, kinds).tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize(
    ("mine", "other", "stop"), [(True, True, 24), (True, False, None), (False, True, None)]
)
def test_ranks_stop_together_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, mine: bool, other: bool, stop: int | None
) -> None:
    """Two ranks with two images a step; from step 9 on one of them or both have no valid target."""
    there: list[list[int]] = []

    def all_reduce(totals: torch.Tensor, op: Any) -> None:
        assert op == dist.ReduceOp.MIN
        empty = max(0, 4 * len(there) + 4 - 8) if other else 0  # steps in a row on the other rank
        there.append([2 * empty, empty, 0, 0, 0, 1])
        totals.copy_(torch.minimum(totals, torch.tensor(there[-1])))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    stream = SimpleNamespace(locate=lambda n: (0, "own/0", n % 7))
    source = SimpleNamespace(name="own", read=lambda shard, index: ("own/0/1", {}))
    dataset: Any = SimpleNamespace(stream=stream, relative=frozenset(), depth_range=(0, 80), sources=[source])
    check = ValidPixelCheck(lambda trainer: dataset, every=4)
    trainer: Any = SimpleNamespace(global_step=0, max_steps=100, world_size=2, is_global_zero=False)
    module: Any = SimpleNamespace(device="cpu")
    check.on_train_start(trainer, module)
    for step in range(60):
        trainer.global_step = step
        numbers = torch.arange(4 * step, 4 * step + 2)
        valid = torch.full((2, 3, 3), not (mine and step >= 8))
        check.on_train_batch_start(
            trainer, module, {"sample": numbers, "target": torch.rand(2, 3, 3), "valid": valid}, step
        )
        if step + 1 == stop:
            with pytest.raises(ValueError, match="64 images .16 steps.*own/0"):
                check.on_step(trainer, module, step + 1)
            return
        check.on_step(trainer, module, step + 1)
    assert stop is None
