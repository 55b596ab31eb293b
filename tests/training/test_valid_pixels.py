"""Data without a valid pixel: its share is logged, batches and sets are named, a run of nothing else stops."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

from depth_anything.data.labels import finish_labels, write_label_sidecar
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import TrainingMetrics, TrainingProgress
from depth_anything.training.config import MetricRecipe, Recipe
from depth_anything.training.data import TrainData
from depth_anything.training.lightning import trainer_arguments
from depth_anything.training.loggers import MetricsCSV, read_metrics
from depth_anything.training.metric import Metric
from depth_anything.training.student import Student
from depth_anything.training.valid_pixels import (
    STOP_AFTER_IMAGES,
    STOP_AFTER_STEPS,
    ValidPixelCheck,
    has_valid_target,
)

SIDE, COUNT = 28, 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The work is small: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


GOOD = np.linspace(1, 9, 42, dtype=np.float32)[None].repeat(SIDE, 0)


def write_set(root: Path, *maps: np.ndarray, quantity: str = "depth", **meta: Any) -> str:
    """Write a set of six records whose truth is one of the maps, in turn."""
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


METRES: dict[str, Any] = {"min_depth": 0.001, "max_depth": 80.0}


def fit(
    folder: Path, loader: TrainData, module: DepthModule, *, steps: int, every: int = 1
) -> list[dict[str, str]]:
    """Train as a run does, accumulating two micro-batches, and return the rows of metrics.csv."""
    log = MetricsCSV(folder / "metrics.csv")
    metrics = TrainingMetrics(every=every, batch_size=4)
    callbacks = [metrics, ValidPixelCheck(every=every), TrainingProgress(metrics, seconds=0.0)]
    arguments = trainer_arguments(callbacks=callbacks, max_steps=steps, run_dir=str(folder))
    trainer = pl.Trainer(**{**arguments, "accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2})
    trainer.loggers = [log]
    trainer.fit(module, datamodule=loader)
    return read_metrics(log.path).rows


class Pixelwise(nn.Module):
    """As much of a network as training asks for: each pixel's value is a mix of its colors."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained, self.depth_head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1)
        self.pretrained.blocks: Any = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.depth_head(self.pretrained(image)).sigmoid()[:, 0] * 20 + 0.1

    def encoder_parameters(self) -> Any:
        return self.pretrained.parameters()

    def head_parameters(self) -> Any:
        return self.depth_head.parameters()


def module_of(stage: str) -> DepthModule:
    torch.manual_seed(0)
    numbers: dict[str, Any] = {"steps": 100, "encoder_lr": 1e-5, "head_lr": 1e-5}
    model: Any = Pixelwise()
    if stage == "metric":
        return Metric(model, MetricRecipe(**numbers))
    return (Student if stage == "student" else DepthModule)(model, Recipe(**numbers))


MILLIMETERS = GOOD * 1000
#: What has no truth: stage, map, the data's settings, and what the sentence names.
NOTHING = {
    "millimeters as metres": ("metric", MILLIMETERS, METRES, ["1000", "9000", "max_depth", "80", "unit"]),
    "sky alone, metric": ("metric", GOOD * np.inf, METRES, ["sky"]),
    "nothing known": ("metric", GOOD * np.nan, METRES, ["unknown"]),
    "all nearer than min_depth": ("metric", GOOD / 1e6, METRES, ["1e-06", "min_depth", "unit"]),
    "a teacher's sky": ("teacher", GOOD * np.inf, {}, ["sky"]),
    "a teacher's wall": ("teacher", GOOD * 0 + 4, {}, ["4"]),
    "a teacher's zeros": ("teacher", GOOD * 0, {}, ["unknown"]),
}


@pytest.mark.parametrize("case", NOTHING.values(), ids=NOTHING)
def test_a_run_without_a_pixel_to_learn_from_stops(
    tmp_path: Path, case: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, truth, settings, words = case
    root = write_set(tmp_path / "own", truth)
    with pytest.raises(ValueError) as raised:
        fit(tmp_path, data({"own": root}, **settings), module_of(stage), steps=100)
    assert "\n" not in str(raised.value)
    for word in ["the set own", "own/0[", "own/0/", "64 images", *words]:
        assert word in str(raised.value), word
    said = capsys.readouterr().err
    assert "step 1 " in said and "samples 0 to 3" in said and "own/0[" in said
    rows = read_metrics(tmp_path / "metrics.csv").rows
    assert len(rows) == STOP_AFTER_IMAGES // 4 >= STOP_AFTER_STEPS
    assert {row["valid_share"] for row in rows} == {"1.0" if words == ["4"] else "0.0"}


@pytest.mark.parametrize("value", [0.0, 0.5], ids=["zeros", "a constant"])
def test_a_student_whose_labels_are_constant_stops(tmp_path: Path, value: float) -> None:
    photos = write_set(tmp_path / "photos")
    labels = write_labels(tmp_path / "labels", photos, GOOD * 0 + value)
    with pytest.raises(ValueError) as raised:
        fit(tmp_path, data({"photos": photos}, labels=labels, sky=None), module_of("student"), steps=100)
    for word in ("photos/0[", f"{value:g} everywhere"):
        assert word in str(raised.value)


@pytest.mark.parametrize("side", ["metres", "replayed"])
def test_either_side_of_replay_without_truth_stops_the_run(tmp_path: Path, side: str) -> None:
    """The other one's losses would hide it: the run would never learn what is where, or never metres."""
    rooms = write_set(tmp_path / "rooms", MILLIMETERS if side == "metres" else GOOD)
    replayed = write_set(
        tmp_path / "web", GOOD if side == "metres" else GOOD * 0 + 3, quantity="disparity", sky_policy="far"
    )
    settings = {"images": {"web": replayed}, "replay": ["web"], "replay_share": 0.5, "sky": None}
    loader = data({"rooms": rooms}, **METRES, **settings)
    with pytest.raises(ValueError) as raised:
        fit(tmp_path, loader, module_of("metric"), steps=200)
    assert f"the set {'rooms' if side == 'metres' else 'web'} " in str(raised.value)


def test_a_short_run_of_nothing_does_not_end_as_finished(tmp_path: Path) -> None:
    root = write_set(tmp_path / "own", MILLIMETERS)
    with pytest.raises(ValueError, match="own/0"):
        fit(tmp_path, data({"own": root}, **METRES), module_of("metric"), steps=3, every=50)


def test_one_image_of_truth_is_enough_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Crops of sky above a LiDAR's reach are no fault of the set."""
    root = write_set(tmp_path / "own", *[MILLIMETERS] * (COUNT - 1), GOOD)
    rows = fit(tmp_path, data({"own": root}, **METRES), module_of("metric"), steps=30)
    assert len(rows) == 30
    shares = [float(row["valid_share"]) for row in rows]
    assert sum(shares) / 30 == pytest.approx(1 / COUNT) and set(shares) <= {0, 0.25, 0.5}
    assert "none of the last" not in capsys.readouterr().err


def test_a_set_without_truth_among_others_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {
        "good": write_set(tmp_path / "good", GOOD),
        "millis": write_set(tmp_path / "millis", MILLIMETERS),
    }
    rows = fit(tmp_path, data(sets, **METRES), module_of("metric"), steps=60)
    assert len(rows) == 60
    said = [line for line in capsys.readouterr().err.splitlines() if "none of the last" in line]
    assert len(said) == 1 and "millis" in said[0] and "max_depth" in said[0]


def test_the_share_is_the_mean_over_micro_batches_and_in_the_progress_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = GOOD.copy()
    half[: SIDE // 2] = np.nan
    rows = fit(tmp_path, data({"own": write_set(tmp_path / "own", half)}), module_of("teacher"), steps=2)
    assert [float(row["valid_share"]) for row in rows] == [0.5, 0.5]
    assert list(rows[0]).index("valid_share") > list(rows[0]).index("images_per_s")
    assert "valid=50.0%" in capsys.readouterr().err


def test_which_images_have_truth() -> None:
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
    """Two images a rank and step, of two ranks; nothing valid from step 9 on, on one of them or both."""
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
    watch = ValidPixelCheck(lambda trainer: dataset, every=4)
    trainer: Any = SimpleNamespace(global_step=0, max_steps=100, world_size=2, is_global_zero=False)
    module: Any = SimpleNamespace(device="cpu")
    watch.on_train_start(trainer, module)
    for step in range(60):
        trainer.global_step = step
        numbers = torch.arange(4 * step, 4 * step + 2)
        valid = torch.full((2, 3, 3), not (mine and step >= 8))
        watch.on_train_batch_start(
            trainer, module, {"sample": numbers, "target": torch.rand(2, 3, 3), "valid": valid}, step
        )
        if step + 1 == stop:
            with pytest.raises(ValueError, match="last 64 images .16 steps.*own/0"):
                watch.on_step(trainer, module, step + 1)
            return
        watch.on_step(trainer, module, step + 1)
    assert stop is None
