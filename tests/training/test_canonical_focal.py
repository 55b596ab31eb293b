"""stage=metric with canonical_focal: records without intrinsics, the model file, resuming, and the config key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_configs import make_config

from depth_anything import DepthAnything, save_model
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.errors import UserError
from depth_anything.training.data import TrainData
from depth_anything.training.dry_run import print_plan
from depth_anything.training.initialization import build_model


def write_set(root: Path, meta: dict[str, Any]) -> None:
    records = []
    for i in range(3):
        draw = np.random.default_rng(i)
        image = draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        depth = draw.uniform(1, 15, (40, 60)).astype(np.float32)
        frame = Frame(f"{root.name}/0/{i}", image, {"unit": "m", **meta}, depth=depth)
        records.append((frame.key, encode_frame(frame, codec="f32")))
    shards = [write_shard(root / "0.tar", records)]
    write_manifest(root, name=root.name, shards=shards, meta={"quantity": "depth", "unit": "m"})


def data(root: Path, *sets: str, canonical_focal: float | None = None) -> TrainData:
    return TrainData(
        sets={name: str(root / name) for name in sets},
        labels=None,
        seed=3,
        batch_size=4,
        micro_batch=2,
        patch=14,
        streams=2,
        image_size=28,
        workers=0,
        sky="invalid",
        perturb=False,
        min_depth=0.001,
        max_depth=20.0,
        canonical_focal=canonical_focal,
        run_dir=str(root / "run"),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets: `pinhole` has intrinsics, `unknown` has none."""
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "pinhole", {"intrinsics": {"fx": 50.0, "fy": 50.0}})
    write_set(root / "unknown", {})
    return root


def test_a_set_without_intrinsics_is_refused_before_training(root: Path) -> None:
    """The error names the record, its set and what to type; without the option the set is fine."""
    data(root, "unknown").open()
    with pytest.raises(UserError, match=r"unknown/0/0 of .*unknown.*canonical_focal=null.*intrinsics: \{fx"):
        data(root, "pinhole", "unknown", canonical_focal=50).open()
    assert data(root, "pinhole", canonical_focal=50).open().canonical_focal == 50


def test_batches_are_in_canonical_depth(root: Path) -> None:
    """Twice the canonical focal length is twice the depth in a batch, bit for bit."""
    plain, one, two = (
        data(root, "pinhole", canonical_focal=focal).open().__getitems__([0, 1, 2, 3])
        for focal in (None, 20, 40)
    )
    assert plain["image"].equal(two["image"]) and one["valid"].all()
    both = one["valid"] & two["valid"]
    assert both.any() and two["target"][both].equal(2 * one["target"][both])
    scale = one["target"][both] / plain["target"][both]
    torch.testing.assert_close(scale, torch.full_like(scale, float(scale[0])))


class _Position:
    global_step, accumulate_grad_batches = 5, 1


def test_a_checkpoint_resumes_with_its_own_canonical_focal_only(root: Path) -> None:
    """States of runs without the option have no such entry, as those of older versions."""

    def state(focal: Any) -> tuple[Any, dict[str, Any]]:
        module = data(root, "pinhole", canonical_focal=focal)
        module.trainer = _Position()  # type: ignore[assignment]
        return module, module.state_dict()

    states = {focal: state(focal) for focal in (None, 20.0, 40.0)}
    assert "canonical_focal" not in states[None][1]
    for focal, (module, _) in states.items():
        for other, (_, saved) in states.items():
            if focal == other:
                module.load_state_dict(saved)
            else:
                with pytest.raises(UserError, match=f"canonical_focal={'null' if other is None else other}"):
                    module.load_state_dict(saved)


def test_the_network_stores_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that continues from one of another camera says that its scale is off at first."""
    config = make_config("stage=metric", "init=null", "canonical_focal=55")
    model = build_model(config)
    assert model.canonical_focal == 55 and config.data.canonical_focal == 55
    assert build_model(replace(config, canonical_focal=None)).canonical_focal is None
    save_model(model, tmp_path / "first.safetensors")
    capsys.readouterr()
    first = str(tmp_path / "first.safetensors")
    other = replace(config, init=first, start="all", canonical_focal=30)
    assert build_model(other).canonical_focal == 30
    assert "of 55 px" in capsys.readouterr().err
    build_model(replace(config, init=first, start="all"))
    build_model(replace(config, init=first, start="encoder", canonical_focal=30))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["0", "wide", ".inf"])
def test_impossible_values_are_refused(value: str) -> None:
    """The error names the key and an example."""
    with pytest.raises(UserError, match="canonical_focal"):
        make_config("stage=metric", f"canonical_focal={value}")


def test_other_stages_do_not_know_the_key() -> None:
    """It is a key of stage=metric."""
    with pytest.raises(UserError, match="stage=metric"):
        make_config("stage=teacher", "+canonical_focal=5")


def test_dry_run_names_the_camera(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """dry_run=true prints it and reports missing intrinsics as the run would."""
    typed = ["stage=metric", "init=null", "canonical_focal=55", "sources=own", f"output_dir={tmp_path}"]
    print_plan(make_config(*typed, f"photos={root / 'pinhole'}"))
    assert "of a camera of 55 px" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown/0/0"):
        print_plan(make_config(*typed, f"photos={root / 'unknown'}"))


def test_a_network_of_another_camera_is_the_same_network() -> None:
    """The forward pass does not depend on the canonical focal length."""
    torch.manual_seed(0)
    model, image = DepthAnything("vitn", max_depth=20).eval(), torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        before = model(image)
        model.canonical_focal = 40.0
        assert model(image).equal(before)
