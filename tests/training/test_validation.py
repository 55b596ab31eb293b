"""Validation during training gives the metrics of the command line and keeps the best model."""

import csv
import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from benchmark_files import make_da2k, make_kitti
from fork_server import ForkServer
from made_configs import make_config

from depth_anything import DepthAnything, load_model
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.training.config import RunConfig
from depth_anything.training.run_dir import RunDir
from depth_anything.training.validation import ValidationCallback, open_validation_task

ROOT = Path(__file__).parents[2]


def config(*, validation: str | None = None, **settings: Any) -> RunConfig:
    settings = {"every": 2, "limit": 20, **settings}
    changes = {f"validation__{key}": value for key, value in settings.items()}
    return make_config("stage=teacher", sources__validation=validation, **changes)


def write_rooms(root: Path, count: int = 11) -> str:
    """Write frames whose depth grows downwards; their number is not a multiple of the batch size."""
    records = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (42, 56, 3), dtype=np.uint8)
        depth = np.linspace(1 + i, 9, 42, dtype=np.float32)[:, None].repeat(56, 1)
        frame = Frame(f"{root.name}/0/{i}", pixels, {"unit": "m"}, depth=depth)
        records.append((frame.key, encode_frame(frame, codec="f32")))
    meta = {"quantity": "depth", "unit": "m", "max_depth": 8.0}
    write_manifest(root, name=root.name, shards=[write_shard(root / "0.tar", records)], meta=meta)
    return str(root)


class FakeLogger:
    """Stores the numbers that it gets."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.rows.setdefault(step, {}).update(numbers)


class Run:
    """The attributes of a Trainer and its module that validation reads."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        step: int = 0,
        rank: int = 0,
        ranks: int = 1,
        **network: Any,
    ) -> None:
        torch.manual_seed(1)
        self.log = FakeLogger()
        self.module: Any = SimpleNamespace(model=DepthAnything("vitn", **network).train(), device="cpu")
        self.module.model.input_size = 42
        self.trainer: Any = SimpleNamespace(
            global_step=step,
            max_steps=9,
            world_size=ranks,
            global_rank=rank,
            is_global_zero=rank == 0,
            loggers=[self.log],
            callbacks=[],
        )
        folder.mkdir(exist_ok=True)
        self.run_dir = RunDir(folder)
        self.validation = ValidationCallback(
            lambda: open_validation_task(settings), self.run_dir, every=2, input_size=42
        )
        self.validation.on_train_start(self.trainer, self.module)

    def at(self, step: int, *, shift: float = 0.0) -> dict[str, float]:
        """Add `shift` to the head's last bias, validate at a step, and return the logged numbers."""
        with torch.no_grad():
            self.module.model.depth_head.scratch.output_conv2[2].bias += shift
        self.validation.on_step(self.trainer, self.module, step)
        return self.log.rows.get(step, {})


@pytest.mark.parametrize("max_depth", [None, 5.0])
def test_metrics_equal_those_of_the_command_line(
    tmp_path: Path, max_depth: float | None, one_thread: None, fork_server: ForkServer
) -> None:
    """To the last digit, and over the range of the set even if the network's max_depth is smaller."""
    rooms = write_rooms(tmp_path / "rooms")
    run = Run(tmp_path / "run", config(validation=rooms), max_depth=max_depth)
    numbers = run.at(2)
    assert run.module.model.training
    command = [
        "evaluate",
        "--data",
        rooms,
        "--weights",
        str(run.run_dir.best),
        "--output",
        str(tmp_path / "report"),
    ]
    command += ["--limit", "20", "--device", "cpu"]
    done = fork_server.run([sys.executable, "-m", "depth_anything", *command], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    means = json.loads((tmp_path / "report" / "results.json").read_text())["models"][0]["means"]
    assert numbers == {f"val_{name}": means[name] for name in means}
    assert (run.run_dir.pictures / "step-000000002.jpg").is_file()


def _rank(rank: int, folder: str, rooms: str) -> None:
    """Validate on one rank of two and write the result to a file."""
    torch.set_num_threads(1)  # as the process that it is compared with
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run = Run(Path(folder, f"run-{rank}"), config(validation=rooms), rank=rank, ranks=2, max_depth=9.0)
    Path(folder, f"{rank}.json").write_text(json.dumps([len(run.validation.lines), run.at(2)]))
    dist.destroy_process_group()


def test_two_processes_get_the_metrics_of_one(
    tmp_path: Path, one_thread: None, fork_server: ForkServer
) -> None:
    """Eleven images: a full batch for rank 0, the rest for rank 1; only rank 0 writes the model."""
    rooms = write_rooms(tmp_path / "rooms")
    fork_server.run_ranks(__file__, "_rank", str(tmp_path), rooms)
    counts, numbers = zip(
        *(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)), strict=True
    )
    alone = Run(tmp_path / "run", config(validation=rooms), max_depth=9.0)
    assert counts == (8, 3) and len(alone.validation.lines) == 11
    assert numbers[0] == numbers[1] == alone.at(2)
    assert (tmp_path / "run-0" / "best.safetensors").is_file()
    assert not (tmp_path / "run-1" / "best.safetensors").exists()


def test_validation_runs_only_every_n_steps_and_at_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", config(validation=write_rooms(tmp_path / "rooms", 2)))
    assert run.at(1) == {} and not run.run_dir.best.exists()
    assert run.at(9)  # the last step


def test_a_run_without_a_validation_set_skips_validation(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", config())
    assert run.at(2) == {} and not run.run_dir.best.exists() and run.run_dir.describe_best() == ""


def test_the_best_model_is_kept_when_later_ones_are_worse(tmp_path: Path) -> None:
    settings = config(validation=write_rooms(tmp_path / "rooms"))
    run = Run(tmp_path / "run", settings, max_depth=10.0)
    values = {
        step: run.at(step, shift=shift)["val_abs_rel"] for step, shift in ((2, 3.0), (4, -3.0), (6, 3.0))
    }
    assert values[4] < values[2] == pytest.approx(values[6], rel=1e-3)
    best = json.loads(run.run_dir.best_json.read_text())
    assert {name: best[name] for name in best if name != "judged"} == {
        "step": 4, "metric": "abs_rel", "value": values[4], "images": "rooms", "protocol": "da2",
        "weights": "last",
    }  # fmt: skip
    saved = load_model(run.run_dir.best)
    assert (saved.max_depth, saved.input_size) == (10.0, 42)
    bias = run.module.model.depth_head.scratch.output_conv2[2].bias - 3.0
    torch.testing.assert_close(saved.depth_head.scratch.output_conv2[2].bias, bias)
    assert (
        f"best on rooms: {run.run_dir.best} (step 4, abs_rel {values[4]:.4g})" in run.run_dir.describe_best()
    )
    # A resumed run reads best.json, also one of a later step. A new run, or one with another task, does not.
    later, earlier = (Run(tmp_path / "run", settings, step=step, max_depth=10.0) for step in (5, 3))
    assert later.validation.best == earlier.validation.best == best
    later.at(6, shift=3.0)
    assert json.loads(run.run_dir.best_json.read_text()) == best
    other = config(validation=str(tmp_path / "rooms"), max_depth=3.0)
    other_range = Run(tmp_path / "run", other, step=7, max_depth=10.0)
    assert other_range.validation.best == {}
    assert other_range.at(8, shift=3.0)["val_abs_rel"] > 0
    assert json.loads(run.run_dir.best_json.read_text())["step"] == 8
    make_da2k(tmp_path / "da2k")
    pairs = Run(tmp_path / "run", config(benchmark="da2k", root=str(tmp_path)), step=9)
    assert pairs.validation.best == {} and "val_accuracy" in pairs.at(9)
    new_run = Run(tmp_path / "run", settings, max_depth=10.0)
    assert (
        new_run.run_dir.read_best() == {}
        and not new_run.run_dir.best.exists()
        and new_run.run_dir.describe_best() == ""
    )


def test_a_kill_between_best_safetensors_and_best_json_leaves_no_wrong_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(validation=write_rooms(tmp_path / "rooms", 2))
    run = Run(tmp_path / "run", settings, max_depth=10.0)
    run.at(2, shift=3.0)

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("depth_anything.training.validation.atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        run.at(4, shift=-3.0)
    assert run.run_dir.best.exists() and run.run_dir.read_best() == {} and run.run_dir.describe_best() == ""


def test_a_model_with_nan_metrics_is_never_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", config(validation=write_rooms(tmp_path / "rooms", 2)), max_depth=10.0)
    assert np.isnan(run.at(2, shift=float("nan"))["val_abs_rel"])
    assert not run.run_dir.best.exists() and not run.run_dir.best_json.exists()


def test_a_benchmark_is_scored_by_its_own_protocol(tmp_path: Path) -> None:
    make_kitti(tmp_path / "benchmarks" / "kitti")
    task = open_validation_task(config(benchmark="kitti", root=str(tmp_path / "benchmarks")))
    assert task is not None and task.protocol is not None
    assert (task.protocol.name, task.protocol.eval_crop, task.protocol.max_depth) == ("da2", "garg", 80)
    near = open_validation_task(config(benchmark="kitti", root=str(tmp_path / "benchmarks"), max_depth=20))
    assert near is not None and near.protocol is not None and near.protocol.max_depth == 20.0
    settings = config(benchmark="kitti", root=str(tmp_path / "benchmarks"), validation="not read")
    run = Run(tmp_path / "run", settings, max_depth=80.0)
    assert 0 < run.at(2)["val_abs_rel"] < 100
    with pytest.raises(ValueError, match="zoedepth"):
        Run(
            tmp_path / "relative",
            config(benchmark="kitti", root=str(tmp_path / "benchmarks"), protocol="zoedepth"),
        )


@pytest.mark.parametrize(
    ("meta", "depth", "network", "named"),
    [
        ({"quantity": "depth", "unit": "m"}, False, {}, "photos/0/0"),
        (
            {"quantity": "depth", "unit": "arbitrary"},
            True,
            {"max_depth": 9.0},
            "photos .*arbitrary",
        ),
    ],
)
def test_unusable_images_are_reported_before_training(
    tmp_path: Path, meta: Any, depth: bool, network: Any, named: str
) -> None:
    truth = np.ones((42, 56), np.float32) if depth else None
    frame = Frame("photos/0/0", np.zeros((42, 56, 3), np.uint8), {}, depth=truth)
    info = write_shard(tmp_path / "photos" / "0.tar", [(frame.key, encode_frame(frame, codec="f32"))])
    write_manifest(tmp_path / "photos", name="photos", shards=[info], meta=meta)
    with pytest.raises(ValueError, match=named):
        Run(tmp_path / "run", config(validation=str(tmp_path / "photos")), **network)
    if depth:  # a relative network is compared after fitting a scale
        Run(tmp_path / "relative", config(validation=str(tmp_path / "photos")))


def test_da2k_rejects_options_of_depth_maps(tmp_path: Path) -> None:
    make_da2k(tmp_path / "da2k")
    for settings in ({"protocol": "da2"}, {"max_depth": 3.0}):
        with pytest.raises(ValueError, match="validation.protocol=null validation.max_depth=null"):
            open_validation_task(config(benchmark="da2k", root=str(tmp_path), **settings))


def test_da2k_accuracy_chooses_the_best_model(tmp_path: Path) -> None:
    make_da2k(tmp_path / "da2k")
    run = Run(tmp_path / "run", config(benchmark="da2k", root=str(tmp_path)))
    numbers = run.at(2)
    best = json.loads(run.run_dir.best_json.read_text())
    assert 0 <= numbers["val_accuracy"] <= 1 and "val_indoor" in numbers
    assert (best["metric"], best["value"], best["protocol"]) == ("accuracy", numbers["val_accuracy"], "da2k")
    assert run.at(4)["val_accuracy"] == numbers["val_accuracy"]
    assert json.loads(run.run_dir.best_json.read_text())["step"] == 2  # an equal value does not replace it
    assert (run.run_dir.pictures / "step-000000004.jpg").is_file()


def test_a_run_writes_and_prints_its_best_model(tmp_path: Path, fork_server: ForkServer) -> None:
    """Run train.py: best.json names the step with the best value in metrics.csv."""
    scenes = {name: tmp_path / name for name in ("scenes-synthetic", "scenes-validation")}
    command = [
        "stage=metric",
        "encoder=vitn",
        "init=null",
        "steps=6",
        "validation.every=2",
        "batch_size=2",
        "workers=0",
    ]
    command += [f"data_dir={tmp_path}", f"output_dir={tmp_path}/outputs", "trainer=cpu", "validation.limit=4"]
    command += [f"sources.scenes.{name}.count=8" for name in ("synthetic", "validation")]
    done = fork_server.run([sys.executable, str(ROOT / "train.py"), *command])
    assert done.returncode == 0, done.stderr
    assert all((path / "manifest.json").is_file() for path in scenes.values())
    run_dir = RunDir(tmp_path / "outputs" / "metric-vitn-tiny")
    with open(run_dir.path / "metrics.csv") as file:
        values = {
            int(row["step"]): float(row["val_abs_rel"]) for row in csv.DictReader(file) if row["val_abs_rel"]
        }
    assert set(values) == {2, 4, 6}
    best = run_dir.read_best()
    assert best["step"] == min(values, key=lambda step: values[step]) and best["value"] == min(
        values.values()
    )
    assert f"finished: {run_dir.model}; best on scenes-validation: {run_dir.best}" in done.stdout
    assert load_model(run_dir.best).quantity == "depth"


def write_depths(root: Path, depths: list[float], **meta: Any) -> str:
    """Write frames with one depth each."""
    records = []
    for i, meters in enumerate(depths):
        frame = Frame(
            f"{root.name}/0/{i}",
            np.full((42, 56, 3), 9 * i, np.uint8),
            {"unit": "m"},
            depth=np.full((42, 56), meters, np.float32),
        )
        records.append((frame.key, encode_frame(frame, codec="f32")))
    info = write_shard(root / "0.tar", records)
    write_manifest(root, name=root.name, shards=[info], meta={"quantity": "depth", "unit": "m", **meta})
    return str(root)


@pytest.mark.parametrize(
    ("depths", "measured"),
    [([1500.0, 9000.0], ["1500", "9000"]), ([np.inf, np.inf], ["no finite"]), ([np.nan, 0.0], ["no finite"])],
    ids=["millimeters", "sky", "unknown"],
)
def test_a_validation_set_without_valid_pixels_is_rejected(
    tmp_path: Path, depths: list[float], measured: list[str]
) -> None:
    root = write_depths(tmp_path / "millis", depths)
    with pytest.raises(ValueError) as raised:
        Run(tmp_path / "run", config(validation=root, max_depth=80.0))
    for word in ["millis", "millis/0/0", "millis/0/1", "80", *measured]:
        assert word in str(raised.value)


def test_validation_images_without_valid_pixels_are_reported_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_depths(tmp_path / "some", [2.0, 1500.0, 3.0])
    run = Run(tmp_path / "run", config(validation=root, max_depth=80.0), max_depth=10.0)
    printed = capsys.readouterr().err
    assert "1 of 3" in printed and "some/0/1" in printed and "some/0/0" not in printed
    value = run.at(2)["val_abs_rel"]
    assert np.isfinite(value) and run.run_dir.read_best()["value"] == value


def test_a_full_disk_keeps_the_previous_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(validation=write_rooms(tmp_path / "rooms", 2))
    run = Run(tmp_path / "run", settings, max_depth=10.0)
    run.at(2, shift=3.0)
    before, best = run.run_dir.best.read_bytes(), run.run_dir.read_best()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("depth_anything.model.tensor_files.save_file", full)
    with pytest.raises(OSError) as raised:
        run.at(4, shift=-3.0)
    assert f"{run.run_dir.best} " in str(raised.value) and "No space left" in str(raised.value)
    assert run.run_dir.best.read_bytes() == before and run.run_dir.read_best() == best
    assert sorted(path.name for path in run.run_dir.path.iterdir()) == [
        "best.json",
        "best.safetensors",
        "pictures",
    ]
