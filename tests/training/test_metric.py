"""stage=metric: targets in meters, SILog, starting weights, and commands that need no flag for meters."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from fork_server import ForkServer
from made_configs import make_config
from PIL import Image

from depth_anything import DepthAnything, Predictor, load_model, save_model
from depth_anything.data.sample import Frame, convert_to_target, encode_frame, find_target_field
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import ShardSet, write_shard
from depth_anything.data.transforms import crop_map, draw_crop, normalize
from depth_anything.evaluation.evaluate import evaluate
from depth_anything.model.metadata import build_metadata
from depth_anything.training.config import RunConfig
from depth_anything.training.data import TrainData
from depth_anything.training.initialization import build_model
from depth_anything.training.metric import Metric
from depth_anything.training.optimizer import learning_rate_factor, parameter_groups
from depth_anything.training.recipes import MetricRecipe

ROOT = Path(__file__).parents[2]
RGBD = ROOT.parent / "shared" / "rgbd"
SIDE = 28
LAST = "depth_head.scratch.output_conv2.2."


def lidar(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    """Draw depth as a LiDAR leaves it: a fifth of the lower pixels, nothing above, some beyond any cap."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(2, 30, (height, width)).astype(np.float32)
    depth[rng.random((height, width)) > 0.2] = np.nan
    depth[: height // 3] = np.nan
    depth[-1, ::4] = np.inf
    return depth


def write_set(root: Path, *, depths: list[np.ndarray], meta: dict[str, Any]) -> ShardSet:
    records = []
    for i, depth in enumerate(depths):
        pixels = np.random.default_rng(i).integers(0, 256, (*depth.shape, 3), dtype=np.uint8)
        frame = Frame(f"{root.name}/0/{i}", pixels, {"unit": meta.get("unit")}, depth=depth)
        records.append((frame.key, encode_frame(frame, codec="f32")))
    return write_manifest(root, name=root.name, shards=[write_shard(root / "0.tar", records)], meta=meta)


METERS = {"quantity": "depth", "unit": "m"}


def data(root: Path, *sets: str, **changes: Any) -> TrainData:
    given: dict[str, Any] = {
        "sets": {name: str(root / name) for name in sets},
        "labels": None,
        "seed": 3,
        "batch_size": 4,
        "micro_batch": 2,
        "patch": 14,
        "streams": 2,
        "image_size": SIDE,
        "workers": 0,
        "sky": "invalid",
        "perturb": False,
        "min_depth": 0.001,
        "max_depth": 20.0,
        "run_dir": str(root / "run"),
    }
    return TrainData(**{**given, **changes})


# --- targets ---------------------------------------------------------------------------------------------------


def test_targets_are_meters_within_the_range() -> None:
    values = np.array([[0.5, 1.0, 20.0, 20.5, np.inf, np.nan, 0.0, -1.0]], np.float32)
    valid = np.empty(values.shape, bool)
    for sky in ("far", "invalid"):
        target = values.copy()
        convert_to_target(
            target, valid, quantity="depth", sky=sky, meta={"sky": "inf"}, depth_range=(1.0, 20.0)
        )
        assert valid.tolist() == [[False, True, True, False, False, False, False, False]]
        assert target.tolist() == [[0, 1, 20, 0, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="disparity"):
        convert_to_target(values, valid, quantity="disparity", sky="far", meta={}, depth_range=(1.0, 20.0))


def test_meters_are_read_from_depth_not_disparity() -> None:
    both = {"disparity.f32": b"", "depth.q12": b""}
    assert (find_target_field(both), find_target_field(both, meters=True)) == ("disparity.f32", "depth.q12")
    with pytest.raises(ValueError, match="no depth"):
        find_target_field({"disparity.f32": b""}, meters=True)


def test_sparse_maps_keep_points_and_holes(tmp_path: Path) -> None:
    """Each target pixel equals the nearest pixel of the depth map, and a hole stays a hole."""
    depths = [lidar(i) for i in range(6)]
    write_set(tmp_path / "drive", depths=depths, meta=METERS)
    dataset = data(tmp_path, "drive").open()
    for n in range(6):
        batch = dataset[n]
        _, _, index = dataset.stream.locate(n)
        truth = crop_map(depths[index], draw_crop(28, 42, SIDE, seed=3, n=n))
        inside = (truth >= 0.001) & (truth <= 20)  # NaN and the sky are neither
        assert 0 < inside.sum() < inside.size / 3
        assert np.array_equal(batch["valid"][0].numpy(), inside)
        assert np.array_equal(batch["target"][0].numpy(), np.where(inside, truth, 0))


@pytest.mark.skipif(not RGBD.is_dir(), reason="needs the real frame of ../shared/rgbd")
def test_a_real_lidar_frame_keeps_its_meters(tmp_path: Path) -> None:
    raw = cv2.imread(str(RGBD / "kitti_demo_depth_0000000050.png"), cv2.IMREAD_UNCHANGED)
    depth = np.where(raw > 0, raw / np.float32(256), np.nan).astype(np.float32)
    write_set(tmp_path / "kitti", depths=[depth], meta=METERS)
    batch = data(tmp_path, "kitti", image_size=70, max_depth=80.0).open()[0]
    seen = batch["target"][batch["valid"]].numpy()
    assert 0 < batch["valid"].float().mean() < 0.5
    assert np.isin(seen, depth).all() and seen.min() > 1 and seen.max() <= 80


# --- the step --------------------------------------------------------------------------------------------------


def recipe(**changes: Any) -> MetricRecipe:
    return MetricRecipe(**{"steps": 100, "encoder_lr": 1e-4, "head_lr": 1e-3, **changes})


def model(**settings: Any) -> DepthAnything:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return DepthAnything("vitn", **settings)


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    given = {
        "image": torch.randint(0, 256, (3, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator),
        "target": torch.rand(3, SIDE, SIDE, generator=generator) * 20,
        "valid": torch.rand(3, SIDE, SIDE, generator=generator) > 0.8,
    }
    given["valid"][1] = False  # a crop that no ray of the LiDAR fell into
    return given


def test_the_loss_is_silog_per_image_and_empty_crops_add_zero() -> None:
    given, net = batch(), model(max_depth=20.0)
    parts = Metric(net, recipe(silog_weight=10.0, variance_focus=0.85)).losses(given)
    prediction = net(normalize(given["image"])).detach().double()
    expected = []
    for i in (0, 2):
        d = prediction[i][given["valid"][i]].log() - given["target"][i][given["valid"][i]].double().log()
        expected.append(float((d.square().mean() - 0.85 * d.mean() ** 2).sqrt()))
    assert float(parts["silog"].detach()) == pytest.approx(sum(expected) / 3, rel=1e-5)
    torch.testing.assert_close(parts["loss"], 10 * parts["silog"])
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    given["target"][1] = torch.nan  # what is not valid never matters
    assert Metric(net, recipe(silog_weight=10.0, variance_focus=0.85)).losses(given)["loss"] == parts["loss"]


def test_late_cosine_is_onecycle_with_div_1() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=201, pct_start=0.7, div_factor=1, final_div_factor=1e4
    )
    for step in range(200):
        ours = learning_rate_factor(step, steps=200, warmup=0.0, schedule="late-cosine")
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=0.02)
        optimizer.step()
        theirs.step()
    assert learning_rate_factor(139, steps=200, warmup=0.0, schedule="late-cosine") == 1.0


# --- what it starts from ---------------------------------------------------------------------------------------


def config(**changes: Any) -> RunConfig:
    return make_config("stage=metric", "init=null", **changes)


def same(one: DepthAnything, other: DepthAnything) -> set[str]:
    """Name the tensors that two networks share."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return {name for (name, a), b in pairs if torch.equal(a, b)}


def test_start_copies_the_encoder_or_all_but_the_last_convolution(tmp_path: Path) -> None:
    relative = model()
    relative.licence = "CC-BY-NC-4.0"
    save_model(relative, tmp_path / "r.safetensors")
    names = set(relative.state_dict())
    fresh = build_model(config())
    assert (fresh.quantity, fresh.unit, fresh.max_depth, fresh.depth_head.max_depth) == ("depth", "m", 80, 80)
    started = build_model(config(init=str(tmp_path / "r.safetensors")))
    assert {name for name in names if name.startswith("pretrained.")} <= same(started, relative)
    head = {name for name in names if name.startswith("depth_head.") and name.endswith(".weight")}
    assert not head & same(started, relative) and head <= same(started, fresh)  # new, and drawn from the seed
    assert started.origin["start"]["licence"] == "CC-BY-NC-4.0"
    whole = build_model(config(init=str(tmp_path / "r.safetensors"), start="all"))
    assert names - same(whole, relative) == {f"{LAST}weight", f"{LAST}bias"}
    save_model(whole, tmp_path / "m.safetensors")
    again = build_model(config(init=str(tmp_path / "m.safetensors"), start="all"))
    assert same(again, whole) == names  # metric from metric: the last convolution, too


def test_start_all_copies_the_taps(tmp_path: Path) -> None:
    shallow = DepthAnything("vitt", taps=(0, 1, 2, 3))
    save_model(shallow, tmp_path / "r.safetensors")
    init = str(tmp_path / "r.safetensors")
    assert build_model(config(encoder="vitt", init=init, start="all")).taps == shallow.taps
    assert build_model(config(encoder="vitt", init=init)).taps == DepthAnything("vitt").taps


def test_a_frozen_encoder_is_not_trained() -> None:
    frozen = build_model(config(freeze_encoder=True))
    encoder, head = parameter_groups(frozen, encoder_lr=1.0, head_lr=2.0)
    assert encoder["params"] == [] and head["params"]
    module = Metric(frozen, recipe())
    optimizer = module.configure_optimizers()["optimizer"]
    before = {name: t.clone() for name, t in frozen.state_dict().items()}
    module.losses(batch())["loss"].backward()
    optimizer.step()
    moved = {name for name, t in frozen.state_dict().items() if not torch.equal(t, before[name])}
    assert moved and all(name.startswith("depth_head.") for name in moved)


def test_missing_starting_weights_raise(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"there is no model at .*gone; run `python train.py stage=student size=tiny`"
    ):
        build_model(config(init=str(tmp_path / "gone")))


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "values"),
    [
        ({"quantity": "depth", "unit": "arbitrary"}, "quantity=depth and unit=arbitrary"),
        ({"quantity": "disparity", "unit": "px"}, "quantity=disparity and unit=px"),
        ({"quantity": "depth"}, "quantity=depth and unit=None"),
        ({}, "quantity=None and unit=None"),
    ],
)
def test_a_set_that_is_not_in_meters_raises(tmp_path: Path, meta: Any, values: str) -> None:
    write_set(tmp_path / "good", depths=[lidar(0)], meta=METERS)
    write_set(tmp_path / "films", depths=[lidar(1)], meta=meta)
    with pytest.raises(ValueError, match=f"the set films .*{values}, not depth in m"):
        data(tmp_path, "good", "films").open()
    data(
        tmp_path, "good", "films", min_depth=None, max_depth=None, sky="far"
    ).open()  # for disparity it will do


def test_another_depth_range_raises_on_resume(tmp_path: Path) -> None:
    write_set(tmp_path / "drive", depths=[lidar(0)], meta=METERS)
    first, second = data(tmp_path, "drive"), data(tmp_path, "drive", max_depth=80.0)
    first.trainer = second.trainer = SimpleNamespace(global_step=2)  # type: ignore[assignment]
    first.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"min_depth=0.001 max_depth=20.0; type name="):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("max_depth=null", "max_depth=null .*max_depth=20"),
        ("max_depth=-1", "max_depth=-1 must be"),
        ("min_depth=90", "min_depth=90 must be less than max_depth=80; type min_depth=0.001"),
        ("start=head", "start=head is unknown; type start=encoder"),
        ("freeze_encoder=yess", "freeze_encoder=yess must be true or false"),
        ("replay_share=1.0", "replay_share=1.0 must be a number between 0 and 1"),
        ("replay_share=true", "replay_share=true must be"),
        ("validation.benchmark=nyu", "validation.root=FOLDER"),
        ("validation.root=x", "validation.root=x"),
        ("validation.max_depth=0", "validation.max_depth=0 must be a number"),
        ("validation.max_depth=far", "validation.max_depth=far must be"),
        ("data.sky=far", "data.sky=far.*data.sky=invalid"),
    ],
)
def test_impossible_values_raise_before_data_is_read(typed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config("stage=metric", typed)


# --- commands -----------------------------------------------------------------------------------------------------


def test_every_command_gives_meters_without_a_flag(tmp_path: Path, fork_server: ForkServer) -> None:
    """A run's model and its Lightning checkpoint, through load_model, Predictor, evaluate and run.py."""
    made = build_model(config(max_depth=12.5))
    save_model(made, tmp_path / "run" / "model.safetensors")
    state = {f"model.{name}": tensor for name, tensor in made.state_dict().items()}
    torch.save({"state_dict": state, "depth_anything": build_metadata(made)}, tmp_path / "last.ckpt")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    truth = np.full((60, 80), 6.0, np.float32)
    for path in (tmp_path / "run", tmp_path / "run" / "model.safetensors", tmp_path / "last.ckpt"):
        read = load_model(path)
        predictor = Predictor(read, device="cpu", input_size=read.input_size)
        assert (read.max_depth, read.unit, predictor.quantity, predictor.unit) == (12.5, "m", "depth", "m")
        meters = predictor.predict(pixels)
        assert 0 < meters.min() and meters.max() < 12.5
        (row,) = evaluate(predictor, [Frame("a", pixels, {}, depth=truth)]).rows
        assert row["abs_rel"] == pytest.approx(
            np.mean(np.abs(meters - 6.0) / 6.0), rel=1e-5
        )  # nothing fitted
    Image.fromarray(pixels).save(tmp_path / "a.png")
    command = [sys.executable, str(ROOT / "run.py"), "--weights", str(tmp_path / "run"), "--img-path"]
    command += [str(tmp_path / "a.png"), "--outdir", str(tmp_path / "out"), "--format", "npy"]
    done = fork_server.run(command)
    assert done.returncode == 0, done.stderr
    (saved,) = (tmp_path / "out").rglob("*.npy")
    np.testing.assert_allclose(np.load(saved), meters, rtol=1e-4)
