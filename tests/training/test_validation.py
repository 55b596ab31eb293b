"""Validation inside training: the command line's figures, of benchmarks, too; the best network kept and found again."""

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from made_benchmarks import make_da2k, make_kitti

from depth_anything import DepthAnything, load_model
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.training.run_dir import RunDir
from depth_anything.training.validation import ValidationCallback, open_validation_task

ROOT = Path(__file__).parents[2]
NONE = {"every": 2, "limit": 20, "benchmark": None, "root": None, "protocol": None, "max_depth": None}


def config(*, validation: str | None = None, **settings: Any) -> dict[str, Any]:
    return {"validation": {**NONE, **settings}, "sources": {"validation": validation}}


def write_rooms(root: Path, count: int = 11) -> str:
    """Frames whose depth grows downwards, in a set that no whole number of batches makes up."""
    records = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (42, 56, 3), dtype=np.uint8)
        depth = np.linspace(1 + i, 9, 42, dtype=np.float32)[:, None].repeat(56, 1)
        frame = Frame(f"{root.name}/0/{i}", pixels, {"unit": "m"}, depth=depth)
        records.append((frame.key, encode_frame(frame, codec="f32")))
    meta = {"quantity": "depth", "unit": "m", "max_depth": 8.0}
    write_manifest(root, name=root.name, shards=[write_shard(root / "0.tar", records)], meta=meta)
    return str(root)


class Log:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.rows.setdefault(step, {}).update(numbers)


class Run:
    """As much of a trainer and its module as validation asks for."""

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
        self.log = Log()
        self.module: Any = SimpleNamespace(model=DepthAnything("vitn", **network).train(), device="cpu")
        self.module.model.input_size = 42
        self.trainer: Any = SimpleNamespace(
            global_step=step,
            max_steps=9,
            world_size=ranks,
            global_rank=rank,
            is_global_zero=rank == 0,
            loggers=[self.log],
        )
        folder.mkdir(exist_ok=True)
        self.folder = RunDir(folder)
        self.validation = ValidationCallback(
            lambda: open_validation_task(settings), self.folder, every=2, input_size=42
        )
        self.validation.on_train_start(self.trainer, self.module)

    def at(self, step: int, *, shift: float = 0.0) -> dict[str, float]:
        """Validate at a step, the head's last bias moved by so much before."""
        with torch.no_grad():
            self.module.model.depth_head.scratch.output_conv2[2].bias += shift
        self.validation.on_step(self.trainer, self.module, step)
        return self.log.rows.get(step, {})


@pytest.mark.parametrize("max_depth", [None, 5.0])
def test_the_figures_are_those_of_the_command_line(tmp_path: Path, max_depth: float | None) -> None:
    """To the last digit, and by the set's own range although a metric network may end before it."""
    rooms = write_rooms(tmp_path / "rooms")
    run = Run(tmp_path / "run", config(validation=rooms), max_depth=max_depth)
    numbers = run.at(2)
    assert run.module.model.training
    command = [
        "evaluate",
        "--data",
        rooms,
        "--weights",
        str(run.folder.best),
        "--output",
        str(tmp_path / "report"),
    ]
    command += ["--limit", "20", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "depth_anything", *command], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    means = json.loads((tmp_path / "report" / "results.json").read_text())["models"][0]["means"]
    assert numbers == {f"val_{name}": means[name] for name in means}
    assert (run.folder.pictures / "step-000000002.jpg").is_file()


def _rank(rank: int, folder: str, rooms: str) -> None:
    """Validate on one rank of two, and write down what came out."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run = Run(Path(folder, f"run-{rank}"), config(validation=rooms), rank=rank, ranks=2, max_depth=9.0)
    Path(folder, f"{rank}.json").write_text(json.dumps([len(run.validation.lines), run.at(2)]))
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Eleven images: a whole batch for the first, the rest for the second; the first alone keeps the network."""
    rooms = write_rooms(tmp_path / "rooms")
    mp.spawn(_rank, args=(str(tmp_path), rooms), nprocs=2)
    shares, numbers = zip(
        *(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)), strict=True
    )
    alone = Run(tmp_path / "run", config(validation=rooms), max_depth=9.0)
    assert shares == (8, 3) and len(alone.validation.lines) == 11
    assert numbers[0] == numbers[1] == alone.at(2)
    assert (tmp_path / "run-0" / "best.safetensors").is_file()
    assert not (tmp_path / "run-1" / "best.safetensors").exists()


def test_between_two_times_nothing_is_judged(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", config(validation=write_rooms(tmp_path / "rooms", 2)))
    assert run.at(1) == {} and not run.folder.best.exists()
    assert run.at(9)  # the last step always is


def test_nothing_to_judge_on_is_no_error(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", config())
    assert run.at(2) == {} and not run.folder.best.exists() and run.folder.describe_best() == ""


def test_the_best_stays_when_later_ones_are_worse(tmp_path: Path) -> None:
    settings = config(validation=write_rooms(tmp_path / "rooms"))
    run = Run(tmp_path / "run", settings, max_depth=10.0)
    values = {
        step: run.at(step, shift=shift)["val_abs_rel"] for step, shift in ((2, 3.0), (4, -3.0), (6, 3.0))
    }
    assert values[4] < values[2] == pytest.approx(values[6], rel=1e-3)
    note = json.loads(run.folder.best_json.read_text())
    assert {name: note[name] for name in note if name != "judged"} == {
        "step": 4, "metric": "abs_rel", "value": values[4], "images": "rooms", "protocol": "da2",
    }  # fmt: skip
    kept = load_model(run.folder.best)
    assert (kept.max_depth, kept.input_size) == (10.0, 42)
    bias = run.module.model.depth_head.scratch.output_conv2[2].bias - 3.0
    torch.testing.assert_close(kept.depth_head.scratch.output_conv2[2].bias, bias)
    assert f"best on rooms: {run.folder.best} (step 4, abs_rel {values[4]:.4g})" in run.folder.describe_best()
    # A run that goes on knows it, from before that step, too; one that begins anew, or is judged otherwise, does not.
    later, earlier = (Run(tmp_path / "run", settings, step=step, max_depth=10.0) for step in (5, 3))
    assert later.validation.best == earlier.validation.best == note
    later.at(6, shift=3.0)
    assert json.loads(run.folder.best_json.read_text()) == note
    other = config(validation=str(tmp_path / "rooms"), max_depth=3.0)
    otherwise = Run(tmp_path / "run", other, step=7, max_depth=10.0)
    assert otherwise.validation.best == {}
    assert otherwise.at(8, shift=3.0)["val_abs_rel"] > 0
    assert json.loads(run.folder.best_json.read_text())["step"] == 8
    make_da2k(tmp_path / "da2k")
    pairs = Run(tmp_path / "run", config(benchmark="da2k", root=str(tmp_path)), step=9)
    assert pairs.validation.best == {} and "val_accuracy" in pairs.at(9)
    anew = Run(tmp_path / "run", settings, max_depth=10.0)
    assert (
        anew.folder.read_best() == {} and not anew.folder.best.exists() and anew.folder.describe_best() == ""
    )


def test_a_kill_between_the_network_and_its_note_leaves_no_lie(
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
    assert run.folder.best.exists() and run.folder.read_best() == {} and run.folder.describe_best() == ""


def test_a_network_that_gives_no_numbers_is_never_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", config(validation=write_rooms(tmp_path / "rooms", 2)), max_depth=10.0)
    assert np.isnan(run.at(2, shift=float("nan"))["val_abs_rel"])
    assert not run.folder.best.exists() and not run.folder.best_json.exists()


def test_a_public_benchmark_by_its_own_rules(tmp_path: Path) -> None:
    make_kitti(tmp_path / "benchmarks" / "kitti")
    trial = open_validation_task(config(benchmark="kitti", root=str(tmp_path / "benchmarks")))
    assert trial is not None and trial.protocol is not None
    assert (trial.protocol.name, trial.protocol.crop, trial.protocol.max_depth) == ("da2", "garg", 80)
    near = open_validation_task(config(benchmark="kitti", root=str(tmp_path / "benchmarks"), max_depth=20))
    assert near is not None and near.protocol is not None and near.protocol.max_depth == 20.0
    settings = config(benchmark="kitti", root=str(tmp_path / "benchmarks"), validation="not looked at")
    run = Run(tmp_path / "run", settings, max_depth=80.0)
    assert 0 < run.at(2)["val_abs_rel"] < 100
    with pytest.raises(ValueError, match="'zoedepth' compares metres and fits no disparity"):
        Run(
            tmp_path / "relative",
            config(benchmark="kitti", root=str(tmp_path / "benchmarks"), protocol="zoedepth"),
        )


@pytest.mark.parametrize(
    ("meta", "depth", "network", "message"),
    [
        ({"quantity": "depth", "unit": "m"}, False, {}, "photos/0/0 has no depth in metres to validate on"),
        (
            {"quantity": "depth", "unit": "arbitrary"},
            True,
            {"max_depth": 9.0},
            "depth of photos is in arbitrary, not",
        ),
    ],
)
def test_what_cannot_be_judged_is_said_before_anything_is_trained(
    tmp_path: Path, meta: Any, depth: bool, network: Any, message: str
) -> None:
    truth = np.ones((42, 56), np.float32) if depth else None
    frame = Frame("photos/0/0", np.zeros((42, 56, 3), np.uint8), {}, depth=truth)
    info = write_shard(tmp_path / "photos" / "0.tar", [(frame.key, encode_frame(frame, codec="f32"))])
    write_manifest(tmp_path / "photos", name="photos", shards=[info], meta=meta)
    with pytest.raises(ValueError, match=message):
        Run(tmp_path / "run", config(validation=str(tmp_path / "photos")), **network)
    if depth:  # a scale of its own is no matter where one is fitted
        Run(tmp_path / "relative", config(validation=str(tmp_path / "photos")))


def test_rules_for_maps_say_nothing_of_pairs(tmp_path: Path) -> None:
    make_da2k(tmp_path / "da2k")
    for settings in ({"protocol": "da2"}, {"max_depth": 3.0}):
        with pytest.raises(ValueError, match="pairs of points alone; type validation.protocol=null"):
            open_validation_task(config(benchmark="da2k", root=str(tmp_path), **settings))


def test_pairs_of_points_decide_by_how_many_are_right(tmp_path: Path) -> None:
    make_da2k(tmp_path / "da2k")
    run = Run(tmp_path / "run", config(benchmark="da2k", root=str(tmp_path)))
    numbers = run.at(2)
    note = json.loads(run.folder.best_json.read_text())
    assert 0 <= numbers["val_accuracy"] <= 1 and "val_indoor" in numbers
    assert (note["metric"], note["value"], note["protocol"]) == ("accuracy", numbers["val_accuracy"], "da2k")
    assert run.at(4)["val_accuracy"] == numbers["val_accuracy"]
    assert json.loads(run.folder.best_json.read_text())["step"] == 2  # equal is not better
    assert (run.folder.pictures / "step-000000004.jpg").is_file()


def test_a_run_leaves_its_best_and_says_so(tmp_path: Path) -> None:
    """The real command, small: best.safetensors is the network of the step that metrics.csv calls best."""
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
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((path / "manifest.json").is_file() for path in scenes.values())
    folder = RunDir(tmp_path / "outputs" / "metric-vitn-tiny")
    with open(folder.path / "metrics.csv") as file:
        found = {
            int(row["step"]): float(row["val_abs_rel"]) for row in csv.DictReader(file) if row["val_abs_rel"]
        }
    assert set(found) == {2, 4, 6}
    best = folder.read_best()
    assert best["step"] == min(found, key=lambda step: found[step]) and best["value"] == min(found.values())
    assert f"finished: {folder.model}; best on scenes-validation: {folder.best}" in done.stdout
    assert load_model(folder.best).quantity == "depth"


def write_depths(root: Path, depths: list[float], **meta: Any) -> str:
    """Frames of one depth each."""
    records = []
    for i, metres in enumerate(depths):
        frame = Frame(
            f"{root.name}/0/{i}",
            np.full((42, 56, 3), 9 * i, np.uint8),
            {"unit": "m"},
            depth=np.full((42, 56), metres, np.float32),
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
def test_a_validation_set_without_a_valid_pixel_is_refused_by_name(
    tmp_path: Path, depths: list[float], measured: list[str]
) -> None:
    root = write_depths(tmp_path / "millis", depths)
    with pytest.raises(ValueError) as raised:
        Run(tmp_path / "run", config(validation=root, max_depth=80.0))
    for word in ["millis", "millis/0/0", "millis/0/1", "80", *measured]:
        assert word in str(raised.value)


def test_validation_images_without_a_valid_pixel_are_named_and_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_depths(tmp_path / "some", [2.0, 1500.0, 3.0])
    run = Run(tmp_path / "run", config(validation=root, max_depth=80.0), max_depth=10.0)
    said = capsys.readouterr().err
    assert "1 of 3" in said and "some/0/1" in said and "some/0/0" not in said
    value = run.at(2)["val_abs_rel"]
    assert np.isfinite(value) and run.folder.read_best()["value"] == value


def test_where_the_disk_is_full_the_older_best_network_and_its_note_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(validation=write_rooms(tmp_path / "rooms", 2))
    run = Run(tmp_path / "run", settings, max_depth=10.0)
    run.at(2, shift=3.0)
    before, note = run.folder.best.read_bytes(), run.folder.read_best()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("depth_anything.model.tensor_files.save_file", full)
    with pytest.raises(OSError) as raised:
        run.at(4, shift=-3.0)
    assert f"{run.folder.best} " in str(raised.value) and "No space left" in str(raised.value)
    assert run.folder.best.read_bytes() == before and run.folder.read_best() == note
    assert sorted(path.name for path in run.folder.path.iterdir()) == [
        "best.json",
        "best.safetensors",
        "pictures",
    ]
