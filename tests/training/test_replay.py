"""Replay in stage=metric: share of general images, their targets and their losses."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_configs import make_config

from depth_anything import DepthAnything
from depth_anything.data.labels import finish_labels, write_label_sidecar
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.data.transforms import normalize
from depth_anything.losses import invariant_losses, silog_loss
from depth_anything.training.batch_plan import repeat_for_share
from depth_anything.training.data import TrainData
from depth_anything.training.metric import MIN_DEPTH_M, Metric
from depth_anything.training.recipes import MetricRecipe
from depth_anything.training.resume import FlatConfig, config_differences
from depth_anything.training.stage_networks import required_folders

SIDE, COUNT = 28, 6


def write_set(root: Path, *, count: int = COUNT, meta: dict[str, Any], **truth: float) -> str:
    image = np.zeros((SIDE, 42, 3), np.uint8)
    fields = {name: np.full((SIDE, 42), value, np.float32) for name, value in truth.items()}
    keys = [f"{root.name}/0/{i}" for i in range(count)]
    records = [(key, encode_frame(Frame(key, image, {}, **fields), codec="f32")) for key in keys]
    write_manifest(root, name=root.name, shards=[write_shard(root / "0.tar", records)], meta=meta)
    return str(root)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A set in meters, photographs with pseudo-labels of 0.5, and a set with its own disparity."""
    root = tmp_path_factory.mktemp("sets")
    made = {
        "rooms": write_set(root / "rooms", meta={"quantity": "depth", "unit": "m"}, depth=4.0),
        "photos": write_set(root / "photos", meta={}),
        "films": write_set(root / "films", meta={"quantity": "disparity", "unit": "px"}, disparity=7.0),
        "bare": write_set(root / "bare", meta={}),
        "labels": str(root / "labels"),
    }
    label = Frame("", np.zeros((1, 1, 3), np.uint8), disparity=np.full((SIDE, 42), 0.5, np.float32))
    field = {"disparity.f32": encode_frame(label, codec="f32")["disparity.f32"]}
    photos = open_set(made["photos"])
    info = write_shard(root / "labels/photos/0.tar", [(f"photos/0/{i}", field) for i in range(COUNT)])
    write_label_sidecar(
        root / "labels/photos",
        info,
        image_set="photos",
        image=photos.shards[0],
        teacher={"fingerprint": "sha256:0", "file": "teacher"},
        preprocessing="518",
        codec="f32",
        values=(0.5, 0.5),
        skipped={},
    )
    assert finish_labels(root / "labels/photos", photos)
    return made


def data(roots: dict[str, str], **changes: Any) -> TrainData:
    made = TrainData(
        **{
            "sets": {"rooms": roots["rooms"]},
            "labels": roots["labels"],
            "images": {name: roots[name] for name in ("photos", "films", "bare")},
            "replay": ["photos", "films"],
            "replay_share": 0.5,
            "seed": 0,
            "batch_size": 2,
            "micro_batch": 2,
            "patch": 14,
            "streams": 4,
            "image_size": SIDE,
            "workers": 0,
            "sky": "invalid",
            "perturb": False,
            "min_depth": 0.001,
            "max_depth": 20.0,
            "run_dir": "nowhere",
            **changes,
        }
    )
    made.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1)  # type: ignore[assignment]
    return made


def test_metric_sets_give_meters_and_replayed_sets_disparity(roots: dict[str, str]) -> None:
    opened = data(roots).open()
    came: Counter[str] = Counter()
    for n in range(opened.stream.records):
        name = opened.stream.locate(n)[1].split("/")[0]
        batch = opened[n]
        came[name] += 1
        assert batch["metric"].tolist() == [name == "rooms"] and batch["metric"].dtype == torch.bool
        assert set(batch["target"].unique().tolist()) == {{"rooms": 4.0, "photos": 0.5, "films": 7.0}[name]}
    assert came == {"rooms": 2 * COUNT, "photos": COUNT, "films": COUNT}  # half and half


def test_without_replay_batches_have_no_metric_flag(roots: dict[str, str]) -> None:
    opened = data(roots, replay=None).open()
    assert opened.stream.records == COUNT and "metric" not in opened[0]


def test_a_replacement_record_has_its_own_kind_of_target(roots: dict[str, str]) -> None:
    """Where a whole set is damaged, a record of another one stands in, with that one's kind of truth."""
    opened = data(roots, replay=["photos"]).open()
    place = {name: values for name, values in opened[0].items() if name != "failed"}
    for shard, kind, value in (("rooms/0", True, 4.0), ("photos/0", False, 0.5)):
        arrays = {name: values.numpy().copy() for name, values in place.items()}
        opened.write_sample(shard, 0, 0, arrays)
        assert arrays["metric"].tolist() == [kind] and arrays["target"].max() == value


@pytest.mark.parametrize(
    ("own", "general", "share", "expected"),
    [
        (1000, 768, 0.1, {"own": 7}),  # 768 of 7768: 9.9 %
        (50_000, 100, 0.1, {"general": 56}),  # 5600 of 55600: 10.1 %
        (900, 100, 0.1, {"own": 1}),
        (10, 1_000_000, 0.5, {"own": 100_000}),
    ],
)
def test_repeats_approximate_the_share(own: int, general: int, share: float, expected: Any) -> None:
    shards = {"own/a": own - own // 3, "own/b": own // 3, "general/a": general}
    repeat = repeat_for_share(shards, ["general"], share=share, repeat={})
    assert repeat == expected
    of_general = general * repeat.get("general", 1)
    found = of_general / (of_general + own * repeat.get("own", 1))
    assert found == pytest.approx(share, rel=0.02)


def test_repeats_multiply_existing_repeats() -> None:
    shards = {"a/0": 100, "a/1": 100, "b/0": 50, "g/0": 4000}
    repeat = repeat_for_share(shards, ["g"], share=0.5, repeat={"b": 3, "a/1": 2})
    assert repeat == {"a": 9, "a/1": 18, "b": 27}  # 4050 to 4000


def test_each_image_counts_only_in_the_loss_of_its_kind() -> None:
    torch.manual_seed(0)
    net = DepthAnything("vitn", max_depth=20.0)
    given = {
        "image": torch.randint(0, 256, (4, SIDE, SIDE, 3), dtype=torch.uint8),
        "target": torch.rand(4, SIDE, SIDE) * 20 + 0.1,
        "valid": torch.rand(4, SIDE, SIDE) > 0.3,
        "metric": torch.tensor([True, False, True, False]),
    }
    recipe = MetricRecipe(steps=1, encoder_lr=1e-3, head_lr=1e-3, trim=0.1, gm_weight=3.0, silog_weight=10.0)
    parts = Metric(net, recipe).losses(given)
    meters = net(normalize(given["image"])).detach()
    keep = given["metric"]
    silog = silog_loss(meters[keep], given["target"][keep], given["valid"][keep]) / 2  # of 4 images, 2
    others = (1 / meters.clamp(min=MIN_DEPTH_M))[~keep], given["target"][~keep], given["valid"][~keep]
    ssi, gm = (value / 2 for value in invariant_losses(*others, trim=0.1))
    for name, value in (("silog", silog), ("ssi", ssi), ("gm", gm)):
        torch.testing.assert_close(parts[name].detach(), value)
    torch.testing.assert_close(parts["loss"].detach(), 10 * silog + ssi + 3 * gm)
    given["target"][1] *= 5  # scale and shift of a replayed image's disparity say nothing
    again = Metric(net, recipe).losses(given)
    torch.testing.assert_close(again["loss"], parts["loss"])
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_another_share_raises_on_resume(roots: dict[str, str]) -> None:
    first = data(roots).state_dict()
    data(roots).load_state_dict(first)
    for other in (data(roots, replay_share=0.2), data(roots, replay=None)):
        with pytest.raises(ValueError, match="type name=ANOTHER_NAME|is missing"):
            other.load_state_dict(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay": True, "images": {}}, "replay=true.* sources.images has none"),
        ({"replay": ["fotos"]}, r"replay names fotos, and sources.images has .*; type replay=\[photos\]"),
        ({"replay": 3}, "replay=3 is neither true nor names of sets"),
        (
            {"replay": ["rooms"], "images": {"rooms": "x"}},
            "replay names rooms.*rooms2",
        ),
        ({"replay": ["bare"]}, "label"),
        ({"repeat": {"rooms": 0}}, "repeat of rooms .* not 0"),
        ({"repeat": {"photos": "x"}}, "repeat of photos .* not x"),
    ],
)
def test_invalid_replay_raises_one_line_errors(roots: dict[str, str], changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(roots, **changes).open()


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return config_differences(FlatConfig.from_tree(old), FlatConfig.from_tree(new))


def test_without_replay_its_keys_do_not_change_the_run() -> None:
    """Nor does a run of stage=metric from before there was replay have them."""
    old = {"stage": "metric", "steps": 5, "recipe": {"schedule": "poly"}}
    new = {
        **old,
        "labels": "L",
        "replay": None,
        "replay_share": 0.1,
        "recipe": {"schedule": "poly", "trim": 0.1},
    }
    assert differences(old, new) == {}
    assert set(differences(new, {**new, "replay": True})) == {"replay"}
    replaying = {**new, "replay": True}
    assert set(differences(replaying, {**replaying, "labels": "M", "replay_share": 0.2})) == {
        "labels",
        "replay_share",
    }
    student = {**new, "stage": "student"}
    assert set(differences(student, {**student, "labels": "M"})) == {"labels"}


def test_required_folders_include_replayed_sets() -> None:
    config = make_config(
        "stage=metric",
        replay=["q"],
        data__sets={"s": "S"},
        sources__images={"p": "P", "q": "Q"},
        sources__validation=None,
    )
    assert required_folders(config) == ["S", "Q"]
