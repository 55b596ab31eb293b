"""Data sets of a run: sky, repeats, mixed sets, and what a checkpoint requires of them."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_configs import make_config

from depth_anything.data.labels import finish_labels, write_label_sidecar
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.training.batch_plan import format_override, select_sets
from depth_anything.training.data import TrainData
from depth_anything.training.stage_networks import required_folders

SIDE, COUNT = 28, 6
TEACHER = {"fingerprint": "sha256:0", "file": "teacher"}


def write_set(root: Path, *, labelled: bool, policy: str | None = None) -> str:
    """Write one shard of frames whose upper half is sky."""
    depth = np.full((SIDE, 42), 2.0, np.float32)
    depth[: SIDE // 2] = np.inf
    image = np.zeros((SIDE, 42, 3), np.uint8)
    records = []
    for i in range(COUNT):
        frame = Frame(f"{root.name}/0/{i}", image, {"sky": "inf"}, depth=depth if labelled else None)
        records.append((frame.key, encode_frame(frame, codec="f32")))
    meta = {"sky_policy": policy} if policy else {}
    write_manifest(root, name=root.name, shards=[write_shard(root / "0.tar", records)], meta=meta)
    return str(root)


def write_labels(root: Path, images: str) -> None:
    """Label every image of a set with 0.5."""
    made_from = open_set(images)
    label = Frame("", np.zeros((1, 1, 3), np.uint8), disparity=np.full((SIDE, 42), 0.5, np.float32))
    field = {"disparity.f32": encode_frame(label, codec="f32")["disparity.f32"]}
    info = write_shard(root / "0.tar", [(f"{made_from.name}/0/{i}", field) for i in range(COUNT)])
    write_label_sidecar(
        root,
        info,
        image_set=made_from.name,
        image=made_from.shards[0],
        teacher=TEACHER,
        preprocessing="518",
        codec="f32",
        values=(0.5, 0.5),
        skipped={},
    )
    assert finish_labels(root, made_from)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sets")
    made = {name: write_set(root / name, labelled=True) for name in ("far", "plain")}
    made["masked"] = write_set(root / "masked", labelled=True, policy="invalid")
    made["odd"] = write_set(root / "odd", labelled=True, policy="green")
    made["photos"] = write_set(root / "photos", labelled=False)
    write_labels(root / "labels" / "photos", made["photos"])
    return {**made, "labels": str(root / "labels")}


def student(roots: dict[str, str], **changes: Any) -> TrainData:
    labelled = {name: roots[name] for name in ("plain", "masked", "odd")}
    return module(
        roots,
        **{"sets": {"photos": roots["photos"]}, "labels": roots["labels"], "labelled": labelled, **changes},
    )


def teacher(roots: dict[str, str], *names: str, **changes: Any) -> TrainData:
    return module(roots, **{"sets": {name: roots[name] for name in names}, "labels": None, **changes})


def module(roots: dict[str, str], **changes: Any) -> TrainData:
    made = TrainData(
        **{
            "seed": 0,
            "batch_size": 2,
            "micro_batch": 2,
            "patch": 14,
            "streams": 4,
            "image_size": SIDE,
            "workers": 0,
            "sky": None,
            "perturb": False,
            "run_dir": "nowhere",
            **changes,
        }
    )
    made.trainer = SimpleNamespace(global_step=0)
    return made


def one_pass(data: TrainData) -> tuple[Counter[str], dict[str, set[float]]]:
    """Count how often each set comes in a pass, and which targets it has where valid."""
    opened = data.open()
    came, targets = Counter[str](), {}
    for n in range(opened.stream.records):
        name = opened.stream.locate(n)[1].split("/")[0]
        batch = opened[n]
        came[name] += 1
        targets.setdefault(name, set()).update(batch["target"][batch["valid"]].tolist())
    return came, targets


def test_no_set_is_mixed_by_default(roots: dict[str, str]) -> None:
    assert one_pass(student(roots)) == ({"photos": COUNT}, {"photos": {0.5}})


def test_pseudo_labels_and_labeled_sets_are_mixed(roots: dict[str, str]) -> None:
    data = student(roots, mix=["plain", "masked"], repeat={"masked": 3})
    came, targets = one_pass(data)
    assert came == {"photos": COUNT, "plain": COUNT, "masked": 3 * COUNT}
    assert targets == {"photos": {0.5}, "plain": {0.0, 0.5}, "masked": {0.5}}  # 0 is sky, 0.5 is 2 m
    assert [type(source).__name__ for source in data.open().sources] == [
        "JoinedRecords",
        "Records",
        "Records",
    ]


def test_select_sets(roots: dict[str, str]) -> None:
    labelled = {"a": "A", "b": "B"}
    assert (
        select_sets(None, labelled, key="mix")
        == select_sets(False, labelled, key="mix")
        == select_sets([], labelled, key="mix")
        == {}
    )
    assert select_sets(True, labelled, key="mix") == labelled
    assert select_sets("b", labelled, key="mix") == select_sets(["b", "b"], labelled, key="mix") == {"b": "B"}
    with pytest.raises(
        ValueError, match=r"mix names hypersin, and sources.labelled has a, hypersim; .*\[hypersim\]"
    ):
        select_sets(["a", "hypersin"], {"a": "A", "hypersim": "H"}, key="mix")
    for mix, known in ((True, {}), (3, labelled), ("a", {})):
        with pytest.raises(ValueError, match="mix.*type mix="):
            select_sets(mix, known, key="mix")
    with pytest.raises(ValueError, match="mix names photos.*photos2"):
        student(roots, labelled={"photos": roots["plain"]}, mix=True).open()
    with pytest.raises(ValueError, match="holds images without depth"):
        student(roots, labelled={"bare": roots["photos"]}, mix=True).open()


def test_required_folders_include_mixed_sets() -> None:
    sets = {
        "data__sets": {"p": "P"},
        "sources__labelled": {"s": "S", "t": "T"},
        "sources__validation": "V",
    }
    assert required_folders(make_config("stage=student", mix=True, **sets)) == ["P", "S", "T", "V"]
    assert required_folders(make_config("stage=student", **sets)) == ["P", "V"]
    assert required_folders(make_config("stage=teacher", **sets)) == ["P", "V"]


@pytest.mark.parametrize(
    ("sky", "rules"),
    [
        (None, {"far": "far", "masked": "invalid"}),
        ("far", {"far": "far", "masked": "far"}),
        ("invalid", {"far": "invalid", "masked": "invalid"}),
        ({"far": "invalid"}, {"far": "invalid", "masked": "invalid"}),
        ({"masked": "far"}, {"far": "far", "masked": "far"}),
    ],
)
def test_sky_policy_of_each_set(roots: dict[str, str], sky: Any, rules: dict[str, str]) -> None:
    data = teacher(roots, "far", "masked", sky=sky)
    assert data.open().sky == data.state_dict()["sky"] == rules
    _, targets = one_pass(data)
    assert targets == {name: {0.0, 0.5} if rule == "far" else {0.5} for name, rule in rules.items()}


@pytest.mark.parametrize(
    ("names", "sky", "message"),
    [
        (["far"], "green", "sky=green is unknown; type sky=far"),
        (["far"], {"far": "green"}, "sky=green of far"),
        (["far"], {"fra": "far"}, "sky names fra.* far$"),
        (["far"], 3, "sky=3 is unknown"),
        (["far", "odd"], None, "odd .*sky_policy=green; type sky={odd: far}"),
    ],
)
def test_unknown_sky_policies_raise(roots: dict[str, str], names: list[str], sky: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher(roots, *names, sky=sky).open()


def test_the_checkpoint_state_pins_sky_and_repeat(roots: dict[str, str]) -> None:
    data = teacher(roots, "far", "masked")
    kept = data.state_dict()
    data.load_state_dict(kept)
    teacher(roots, "far", "masked", sky={"masked": "invalid", "far": "far"}).load_state_dict(kept)
    other = teacher(roots, "far", "masked", sky="far")
    with pytest.raises(ValueError, match=r"masked invalid.*type  'sky=\{far:far,masked:invalid\}'"):
        other.load_state_dict(kept)
    with pytest.raises(ValueError, match="type  data.repeat=null"):
        teacher(roots, "far", "masked", repeat={"far": 2}).load_state_dict(kept)
    with pytest.raises(ValueError, match="the set plain .*name="):
        student(roots, mix=["plain"]).load_state_dict(student(roots).state_dict())
    old = {key: value for key, value in kept.items() if key not in ("sky", "repeat")}
    other.load_state_dict(old)  # of before there was a choice: far
    with pytest.raises(ValueError, match="sky of masked far"):
        data.load_state_dict(old)


def test_a_changed_sky_policy_in_the_manifest_raises(tmp_path: Path) -> None:
    root = write_set(tmp_path / "a", labelled=True)
    kept = teacher({"a": root}, "a").state_dict()
    made = open_set(root)
    write_manifest(root, name="a", shards=made.shards, meta={"sky_policy": "invalid"})
    assert open_set(root).digest == made.digest  # the pixels are the same
    with pytest.raises(ValueError, match="sky of a far, .*invalid"):
        teacher({"a": root}, "a").load_state_dict(kept)
    assert isinstance(teacher({"a": root}, "a", sky="far").open().sources[0], Records)
    teacher({"a": root}, "a", sky="far").load_state_dict(kept)


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        (None, "k=null"),
        (True, "k=true"),
        (["a", "b"], "'k=[a,b]'"),
        ({"a": "far", "b": None}, "'k={a:far,b:null}'"),
        (5, "k=5"),
    ],
)
def test_format_override(value: Any, typed: str) -> None:
    assert format_override("k", value) == typed


@pytest.mark.parametrize("changes", [{"streams": 8}, {"seed": 1}, {"batch_size": 4}], ids=str)
def test_another_sample_order_raises_on_resume(roots: dict[str, str], changes: dict[str, int]) -> None:
    (key, value), kept = *changes.items(), teacher(roots, "plain").state_dict()
    with pytest.raises(ValueError) as raised:
        teacher(roots, "plain", **changes).load_state_dict(kept)
    assert f"type {key}={kept[key]}" in str(raised.value) and kept[key] != value
