"""stage=pseudolabel in one process: labels of each kind of teacher, batches, leases, skipped images, resuming."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_configs import make_config

from depth_anything import DepthAnything, Predictor, load_model, save_model
from depth_anything.data.codec import decode
from depth_anything.data.labels import open_labels, read_label_sidecar
from depth_anything.data.reader import JoinedRecords
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import verify_set, write_manifest
from depth_anything.data.tars import ShardError, ShardSet, write_shard
from depth_anything.model.metadata import build_metadata
from depth_anything.progress import ProgressLine
from depth_anything.teachers.network_teacher import convert_to_disparity, describe_teacher
from depth_anything.training import dry_run, pseudolabel
from depth_anything.training.initialization import load_teacher
from depth_anything.training.provenance import add_provenance
from depth_anything.training.pseudolabel import (
    ImageBatch,
    Lease,
    PseudoLabel,
    ShardBatches,
    ShardData,
)

SIZE = 28
CONFIG = make_config("stage=student", "encoder=vitn")


def write_images(
    root: Path, *, counts: tuple[int, ...] = (5, 3), broken: tuple[int, ...] = (), wide: int = 3
) -> ShardSet:
    """Write shards of noise: every `wide`-th image is wider, and `broken` records of the first shard cannot be read."""
    infos = []
    for number, count in enumerate(counts):
        records = []
        for i in range(count):
            key = f"photos/{number}/{i}"
            width = 56 if i % wide == wide - 1 else 42
            pixels = np.random.default_rng([number, i]).integers(0, 256, (SIZE, width, 3), np.uint8)
            fields = encode_frame(Frame(key, pixels, {}), codec="f32")
            if number == 0 and i in broken:
                fields["jpg"] = b"no picture"
            records.append((key, fields))
        infos.append(write_shard(root / f"{number}.tar", records))
    return write_manifest(root, name="photos", shards=infos, meta={})


def make_teacher(kind: str = "relative") -> DepthAnything:
    """Build a random network whose maps vary; the depth of a metric one covers much of its range."""
    torch.manual_seed(4)
    metric = kind.startswith("metric")
    model = DepthAnything("vitn", max_depth=float(kind.removeprefix("metric")) if metric else None)
    last = model.depth_head.scratch.output_conv2[2]
    with torch.no_grad():
        last.weight *= 6 if metric else 1
    if kind == "calibrated":
        model.calibration = (0.3, 0.02)
    model.input_size = SIZE
    return model.eval()


def make_data(root: Path, model: DepthAnything, *, labels: str = "labels", **changes: Any) -> ShardData:
    settings: dict[str, Any] = {
        "sets": {"photos": str(root / "photos")},
        "labels": str(root / labels),
        "batch_size": 2,
        "image_size": SIZE,
        "workers": 0,
        "patch": model.multiple,
        "precision": "32-true",
        "teacher": describe_teacher(model, "runs/teacher/model.safetensors"),
        "codec": "f32",
    }
    return ShardData(**{**settings, **changes})


@torch.no_grad()
def label(data: ShardData, teacher: DepthAnything) -> str:
    """Label as the command does, in this process and without Lightning's Trainer."""
    if not data.finished():
        module = PseudoLabel(teacher, data)
        module._bar = ProgressLine("labeling", enabled=False)
        for number, batch in enumerate(batches_of(data, image_size=data.image_size)):
            module.predict_step(batch, number)
        module.on_predict_end()
    return data.summary()


def labels_of(root: Path, images: ShardSet, labels: str = "labels") -> dict[str, np.ndarray]:
    joined = JoinedRecords(images, open_labels(root / labels / "photos", images))
    maps = {}
    for shard, count in joined.shards:
        for index in range(count):
            key, fields = joined.read(shard, index)
            [name] = [name for name in fields if name.startswith("disparity.")]
            maps[key] = decode(fields[name])
    return maps


def reference(images: ShardSet, teacher: DepthAnything) -> dict[str, np.ndarray]:
    """Predict each photograph with Predictor and convert meters to their reciprocal."""
    from depth_anything.data.reader import Records
    from depth_anything.data.sample import decode_record

    predictor, records = Predictor(teacher, device="cpu", input_size=SIZE), Records(images)
    maps = {}
    for shard, count in records.shards:
        for index in range(count):
            frame = decode_record(*records.read(shard, index))
            map_ = predictor.predict(frame.image)
            maps[frame.key] = 1 / map_ if predictor.quantity == "depth" else map_
    return maps


# --- Values of labels --------------------------

KINDS = ["relative", "metric80", "metric5", "calibrated"]


def as_checkpoint(model: DepthAnything, path: Path) -> Path:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "depth_anything": build_metadata(model)}, path / "last.ckpt")
    return path / "last.ckpt"


def as_file(model: DepthAnything, path: Path) -> Path:
    save_model(model, path / "model.safetensors")
    return path / "model.safetensors"


def as_folder(model: DepthAnything, path: Path) -> Path:
    save_model(model, path / "hf", format="transformers")
    return path / "hf"


@pytest.mark.filterwarnings("ignore:.*keeps the calibration for load_model only")
@pytest.mark.parametrize("save", [as_file, as_checkpoint, as_folder])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_equal_the_disparity_of_predict(
    tmp_path: Path, kind: str, save: Callable[[DepthAnything, Path], Path]
) -> None:
    images = write_images(tmp_path / "photos", counts=(3,))
    file = save(make_teacher(kind), tmp_path)
    teacher = load_teacher(
        make_config("stage=pseudolabel", "encoder=vitn", teacher=str(file), image_size=SIZE)
    )
    label(make_data(tmp_path, teacher, codec="q12"), teacher)
    expected = reference(images, teacher)
    for key, values in labels_of(tmp_path, images).items():
        assert np.corrcoef(values.ravel(), expected[key].ravel())[0, 1] > 0.999
        assert expected[key].std() > 0.005 * expected[key].mean()
        if kind != "relative":
            np.testing.assert_allclose(values, expected[key], atol=np.ptp(expected[key]) / 4000)


@pytest.mark.parametrize(
    ("kind", "quantity", "unit", "conversion"),
    [
        ("relative", "disparity", "relative", None),
        ("metric80", "depth", "m", "1 / depth, depth from 0.08 to 80 m"),
        ("calibrated", "depth", "m", "0.3 * output + 0.02, at least 1/1000 m"),
    ],
)
def test_the_label_set_records_the_conversion(
    tmp_path: Path, kind: str, quantity: str, unit: str, conversion: str | None
) -> None:
    images = write_images(tmp_path / "photos")
    teacher = make_teacher(kind)
    label(make_data(tmp_path, teacher), teacher)
    meta = open_labels(tmp_path / "labels/photos", images).meta
    assert meta["quantity"] == "disparity" and meta["unit"] == ("1/m" if unit == "m" else "relative")
    for record in (meta["teacher"], json.loads((tmp_path / "labels/photos/0.json").read_text())["teacher"]):
        assert (record["quantity"], record["unit"], record["conversion"]) == (quantity, unit, conversion)


def test_zero_infinite_and_unknown_depth_are_converted() -> None:
    meters = torch.tensor([0.0, 1e-9, 0.02, 2.0, 20.0, float("inf"), float("nan")])
    metric = convert_to_disparity(make_teacher("metric20"), meters)
    torch.testing.assert_close(metric, torch.tensor([50, 50, 50, 0.5, 0.05, 0.0, torch.nan]), equal_nan=True)
    half = convert_to_disparity(make_teacher("metric20"), torch.tensor([0.0, 2.0], dtype=torch.float16))
    assert half.dtype == torch.float32 and half.tolist() == [50, 0.5]
    calibrated = convert_to_disparity(make_teacher("calibrated"), torch.tensor([0.0, 1.0, -5.0, torch.nan]))
    torch.testing.assert_close(calibrated, torch.tensor([0.02, 0.32, 1e-3, torch.nan]), equal_nan=True)
    plain = torch.tensor([0.0, 3.0])
    assert torch.equal(convert_to_disparity(make_teacher(), plain), plain)


def test_a_pixel_at_zero_does_not_use_up_the_12_bits(tmp_path: Path) -> None:
    """12 bits are linear between a label's extremes; 1 / a micrometer would leave one value for all other pixels."""
    from depth_anything.data.codec import encode

    depth = torch.linspace(1, 20, 400).reshape(20, 20)
    depth[0, 0] = 0
    values = decode(encode(convert_to_disparity(make_teacher("metric20"), depth).numpy(), codec="q12"))
    others = depth.numpy().ravel()[1:]
    assert np.abs(values.ravel()[1:] * others - 1).max() < 0.13
    assert np.corrcoef(values.ravel()[1:], 1 / others)[0, 1] > 0.999


@pytest.mark.parametrize("second", ["metric80", "metric5", "calibrated"])
def test_labels_of_another_conversion_are_rejected_even_with_the_same_weights(
    tmp_path: Path, second: str
) -> None:
    write_images(tmp_path / "photos")
    teachers = [make_teacher(), make_teacher()]
    teachers[1] = DepthAnything("vitn", max_depth=float(second[6:])) if "metric" in second else teachers[1]
    teachers[1].load_state_dict(teachers[0].state_dict())
    teachers[1].calibration = (0.3, 0.02) if second == "calibrated" else None
    for first, then in (teachers, teachers[::-1]):
        name = f"labels of {first.quantity} {first.calibration}"
        label(make_data(tmp_path, first, labels=name), first)
        with pytest.raises(ShardError, match="labels=FOLDER"):
            make_data(tmp_path, then, labels=name)
        assert make_data(tmp_path, first, labels=name).finished()


def remove_conversion(folder: Path) -> None:
    """Turn a label set into one of an older version, which did not record the conversion."""
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        if path.name == "manifest.json":
            path.unlink()
            continue
        content["teacher"] = {key: content["teacher"][key] for key in ("fingerprint", "file", "licence")}
        path.write_text(json.dumps(content))


def test_old_labels_of_a_relative_teacher_are_continued(tmp_path: Path) -> None:
    images, teacher = write_images(tmp_path / "photos"), make_teacher()
    label(make_data(tmp_path, teacher), teacher)
    before = labels_of(tmp_path, images)
    folder = tmp_path / "labels/photos"
    remove_conversion(folder)
    (folder / "1.json").unlink()
    label(make_data(tmp_path, teacher), teacher)
    assert all(np.array_equal(before[key], values) for key, values in labels_of(tmp_path, images).items())
    assert "unit" not in open_labels(folder, images).meta  # the digest of a set in use must not change
    joined = JoinedRecords(images, open_labels(folder, images))
    assert add_provenance(make_teacher(), CONFIG, [joined]).origin["data"][0]["records"] == 8


def test_old_labels_of_a_metric_teacher_are_rejected(tmp_path: Path) -> None:
    """For labeling and for training, as long as the teacher's file exists."""
    images, teacher = write_images(tmp_path / "photos"), make_teacher("metric80")
    file = as_file(teacher, tmp_path)
    data = make_data(tmp_path, teacher, teacher=describe_teacher(teacher, str(file)))
    label(data, teacher)
    folder = tmp_path / "labels/photos"
    remove_conversion(folder)
    with pytest.raises(ShardError, match=r"model\.safetensors.*labels=FOLDER"):
        make_data(tmp_path, teacher)
    joined = JoinedRecords(images, open_labels(folder, images, allow_partial=True))
    with pytest.raises(ValueError, match=r"labels/photos.*model\.safetensors.*stage=pseudolabel"):
        add_provenance(make_teacher(), CONFIG, [joined])
    save_model(
        DepthAnything("vitn", max_depth=80.0), file
    )  # the file is another model now, so the old labels are unknown
    add_provenance(make_teacher(), CONFIG, [joined])
    file.write_bytes(b"no model")
    add_provenance(make_teacher(), CONFIG, [joined])


@pytest.mark.parametrize("kind", ["relative", "metric80", "calibrated"])
def test_a_dry_run_rejects_the_same_labels_as_the_run(tmp_path: Path, kind: str) -> None:
    images, teacher = write_images(tmp_path / "photos"), make_teacher(kind)
    file = as_file(teacher, tmp_path)
    label(make_data(tmp_path, teacher, teacher=describe_teacher(teacher, str(file))), teacher)
    config = make_config(
        "stage=pseudolabel",
        "encoder=vitn",
        f"labels={tmp_path / 'labels'}",
        "batch_size=2",
        f"image_size={SIZE}",
        "workers=0",
        "data.codec=f32",
        teacher=str(file),
        data__sets={"photos": images.root},
    )
    dry_run._check_label_teacher(config)
    remove_conversion(tmp_path / "labels/photos")
    if kind == "relative":  # needs no conversion
        dry_run._check_label_teacher(config)
        return
    with pytest.raises(ShardError, match=r"model\.safetensors.*labels=FOLDER"):
        dry_run._check_label_teacher(config)


@pytest.mark.parametrize(
    ("file", "rejected"),
    [("depth_anything_v2_metric_vkitti_vitl.pth", True), ("depth_anything_v2_vitl.pth", False)],
)
def test_old_labels_of_an_official_file_are_recognized_by_its_name(
    tmp_path: Path, file: str, rejected: bool
) -> None:
    images, teacher = write_images(tmp_path / "photos"), make_teacher()
    record = {"fingerprint": "sha256:ab", "file": f"gone/{file}", "licence": "CC-BY-NC-4.0"}
    label(make_data(tmp_path, teacher, teacher=record), teacher)
    joined = JoinedRecords(images, open_labels(tmp_path / "labels/photos", images))
    if rejected:
        with pytest.raises(ValueError, match=file):
            add_provenance(make_teacher(), CONFIG, [joined])
    else:
        add_provenance(make_teacher(), CONFIG, [joined])


# --- NaN and infinity --------------------------


def make_non_finite_teacher(
    *, value: float, keys: set[int] | None = None, max_depth: float | None = None
) -> DepthAnything:
    """Build a teacher that outputs a pixel of `value` for images of these numbers, in the order seen; None: all."""
    model = DepthAnything("vitn", max_depth=max_depth).eval()
    count = [0]
    original = model.forward

    def forward(image: torch.Tensor) -> torch.Tensor:
        output = original(image).clone()  # type: ignore[union-attr]
        for row in output:
            if keys is None or count[0] in keys:
                row[0, 0] = value
            count[0] += 1
        return output

    model.forward = forward  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("value", "max_depth"),
    [(np.nan, None), (np.inf, None), (-np.inf, None), (np.nan, 80.0), (np.inf, 80.0)],
)
def test_one_image_with_nan_is_skipped_and_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], value: float, max_depth: float | None
) -> None:
    images = write_images(tmp_path / "photos", counts=(5, 3))
    teacher = make_non_finite_teacher(
        value=value, keys={2}, max_depth=max_depth
    )  # the third image seen is record 3, in the second batch
    assert "7 labels of photos" in label(make_data(tmp_path, teacher), teacher)
    sidecar = read_label_sidecar(tmp_path / "labels/photos", "0")
    assert sidecar is not None and list(sidecar.skipped) == ["photos/0/3"]
    assert "no numbers" in sidecar.skipped["photos/0/3"]
    assert "'photos/0/3'" in capfd.readouterr().err
    assert set(labels_of(tmp_path, images)) == {
        f"photos/{n}/{i}" for n, c in ((0, 5), (1, 3)) for i in range(c)
    } - {"photos/0/3"}


@pytest.mark.parametrize("keys", [None, {0, 1, 2}])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true", "32-true"])
def test_a_teacher_that_outputs_nan_stops_the_run_without_a_shard(
    tmp_path: Path, keys: set[int] | None, precision: str
) -> None:
    write_images(tmp_path / "photos", counts=(5, 3))
    teacher = make_non_finite_teacher(value=np.nan, keys=keys)
    data = make_data(tmp_path, teacher, precision=precision)
    with pytest.raises(ValueError, match="photos/0/") as caught:
        label(data, teacher)
    assert "trainer.precision=32-true" in str(caught.value)
    assert ("teacher=FILE" in str(caught.value)) == (precision == "32-true")
    assert not list((tmp_path / "labels").rglob("*.tar")) and not list((tmp_path / "labels").rglob("*.json"))


def test_more_than_1_percent_of_images_with_nan_stop_the_run(tmp_path: Path) -> None:
    """Over 1 % of 1000 images; before that a shard may have NaN in up to half of its images."""
    teacher = make_teacher()
    write_images(tmp_path / "photos", counts=(5,))
    module = PseudoLabel(teacher, make_data(tmp_path, teacher))
    keys = [f"k{i}" for i in range(100)]
    non_finite = [(0, "no numbers"), (1, "no numbers")]
    for _ in range(9):
        module._check_failures(ImageBatch("photos", "0", 100, [], torch.empty(0)), non_finite, keys)
    with pytest.raises(ValueError, match="k0"):
        module._check_failures(ImageBatch("photos", "0", 100, [], torch.empty(0)), non_finite, keys)


def test_a_set_without_any_label_names_the_reason(tmp_path: Path) -> None:
    """An older version left such sets: each shard finished, each image skipped."""
    images, teacher = write_images(tmp_path / "photos"), make_teacher()
    data = make_data(tmp_path, teacher)
    for shard in images.shards:
        data.labels["photos"].publish(
            shard.name, {}, [(i, "the teacher's output is not finite") for i in range(shard.records)]
        )
    for call in (data.finished, data.summary, lambda: open_labels(tmp_path / "labels/photos", images)):
        with pytest.raises(
            ShardError, match="photos.* 8 of 8 .*the teacher's output is not finite|2 of 2 shards"
        ):
            call()


# --- Leases --------------------------


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def write_lease(path: Path, *, pid: int) -> None:
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))


def test_a_lease_is_held_by_one_process_until_released(tmp_path: Path) -> None:
    path = tmp_path / "labels" / ".0.lease"
    first, second = Lease(path, pid=os.getpid()), Lease(path, pid=os.getppid())
    assert first.acquire() and not second.acquire() and not first.acquire()
    assert json.loads(path.read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    first.release()
    first.release()
    assert second.acquire() and json.loads(path.read_text())["pid"] == os.getppid()


# --- Batches --------------------------


def batches_of(data: ShardData, **changes: Any) -> ShardBatches:
    settings: dict[str, Any] = {"image_size": SIZE, "patch": 14, "batch_size": 2, "rank": 0, "world": 1}
    return ShardBatches(data.labels, **{**settings, **changes})


def test_a_shard_is_split_into_batches_of_one_shape_in_a_fixed_order(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", counts=(8, 1))
    data = make_data(tmp_path, make_teacher())
    split = list(batches_of(data).iter_shard("photos", "0"))
    assert [batch.indices for batch in split] == [[0, 1], [3, 4], [2, 5], [6, 7], []]
    assert [tuple(batch.image.shape) for batch in split[:-1]] == [
        (2, 28, width, 3) for width in (42, 42, 56, 42)
    ]
    assert all((batch.set, batch.shard, batch.records) == ("photos", "0", 8) for batch in split)
    again = list(batches_of(data, rank=3, world=5).iter_shard("photos", "0"))
    assert all(torch.equal(one.image, other.image) for one, other in zip(split, again, strict=True))
    single = list(batches_of(data).iter_shard("photos", "1"))
    assert [batch.indices for batch in single] == [[0], []]  # the last batch of a shape may be short


def test_waiting_images_of_many_shapes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When more than MAX_WAITING_BATCHES batches would wait, the shape with most images is yielded."""
    monkeypatch.setattr(pseudolabel, "MAX_WAITING_BATCHES", 1)
    write_images(tmp_path / "photos", counts=(8,), wide=2)
    data = make_data(tmp_path, make_teacher())
    split = list(batches_of(data, batch_size=3).iter_shard("photos", "0"))
    assert [batch.indices for batch in split] == [[0, 2], [1, 3, 5], [4, 6], [7], []]


def test_unreadable_records_are_listed_in_the_last_batch(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", broken=(1, 4))
    last = list(batches_of(make_data(tmp_path, make_teacher())).iter_shard("photos", "0"))[-1]
    assert [index for index, _ in last.failed] == [1, 4] and all(reason for _, reason in last.failed)


def shards_of(batches: ShardBatches) -> Iterator[str]:
    """Yield the shards in order, and publish each as the main process would."""
    for batch in batches:
        if batch.records and not batch.indices:
            labels = batches.labels["photos"]
            labels.publish(batch.shard, {}, [(i, "a test") for i in range(batch.records)])
            Lease.for_shard(labels, batch.shard, pid=os.getpid()).release()
            yield batch.shard


def test_ranks_begin_at_different_shards_and_each_shard_is_taken_once(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", counts=(1,) * 6)
    ranks = [
        shards_of(batches_of(make_data(tmp_path, make_teacher()), rank=rank, world=2)) for rank in (0, 1)
    ]
    taken = [next(ranks[0]), next(ranks[1])]
    assert taken == ["0", "1"]
    for rank in ranks:
        taken += list(rank)
    assert sorted(taken) == ["0", "1", "2", "3", "4", "5"]


def test_a_process_waits_for_leased_shards_and_takes_over_from_a_dead_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "photos", counts=(1, 1))
    data = make_data(tmp_path, make_teacher())
    labels = data.labels["photos"]
    (tmp_path / "labels/photos").mkdir(parents=True)
    write_lease(Path(labels.root, ".0.lease"), pid=os.getppid())
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 2:  # its holder dies
            write_lease(Path(labels.root, ".0.lease"), pid=dead_pid())

    monkeypatch.setattr(time, "sleep", sleep)
    taken = list(shards_of(batches_of(data)))
    assert taken == ["1", "0"] and len(sleeps) == 2


# --- Resuming --------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_labeling_continues_to_the_same_bytes(tmp_path: Path) -> None:
    """One shard is finished, one is leased by a dead process with a temporary file, one is not begun."""
    write_images(tmp_path / "photos", counts=(5, 3, 4), broken=(2,))
    teacher = make_teacher("metric80")
    label(make_data(tmp_path, teacher, labels="unbroken", codec="q12"), teacher)
    data = make_data(tmp_path, teacher, codec="q12")
    module = PseudoLabel(teacher, data)
    module._bar = ProgressLine("labeling", enabled=False)
    batches = batches_of(data)
    with torch.no_grad():
        for batch in [*batches.iter_shard("photos", "0"), next(batches.iter_shard("photos", "1"))]:
            module.predict_step(batch, 0)  # killed here
    root = tmp_path / "labels/photos"
    for shard in "01":  # a process may die between the labels of a shard and its lease
        write_lease(root / f".{shard}.lease", pid=dead_pid())
    (root / ".tmp.left").write_bytes(b"half a shard")
    done = (root / "0.tar").stat().st_mtime_ns
    assert "11 labels of photos" in label(make_data(tmp_path, teacher, codec="q12"), teacher)
    assert (root / "0.tar").stat().st_mtime_ns == done
    unbroken = files_of(tmp_path / "unbroken/photos")
    assert {name: data for name, data in files_of(root).items() if name in unbroken} == unbroken
    assert verify_set(str(root), decode=True) == [] and not list(root.glob(".*.lease"))


def test_a_shard_with_only_unreadable_images_stops_the_run(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", counts=(3, 2), broken=(0, 1, 2))
    teacher = make_teacher()
    with pytest.raises(ValueError, match="3 of 3 .*depth-anything verify"):
        label(make_data(tmp_path, teacher), teacher)
    assert not list((tmp_path / "labels").rglob("0.tar"))


def test_more_than_1_percent_unreadable_images_stop_the_run(tmp_path: Path) -> None:
    """Counted across shards, from 1000 images on: 10 of 1000 pass, 11 do not."""
    teacher = make_teacher()
    write_images(tmp_path / "photos", counts=(5,))
    keys = [f"k{i}" for i in range(500)]

    def shard(failed: int) -> ImageBatch:
        return ImageBatch("photos", "0", 500, [], torch.empty(0), [(i, "cut short") for i in range(failed)])

    good, bad = (PseudoLabel(teacher, make_data(tmp_path, teacher)) for _ in range(2))
    for count in (4, 6):
        good._check_failures(shard(count), [], keys)
    bad._check_failures(shard(5), [], keys)
    with pytest.raises(ValueError, match="11 of 1000 .*cut short"):
        bad._check_failures(shard(6), [], keys)


def test_only_the_first_skipped_images_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher()
    write_images(tmp_path / "photos", counts=(5,))
    module = PseudoLabel(teacher, make_data(tmp_path, teacher))
    batch = ImageBatch("photos", "0", 90, [], torch.empty(0), [(i, "cut short") for i in range(15)])
    for _ in range(2):
        module._check_failures(batch, [(89, "no numbers")], [f"k{i}\x1b[2J" for i in range(90)])
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == pseudolabel.MAX_REPORTED_IMAGES and "\x1b" not in "".join(printed)
    assert "k0" in printed[0] and "k89" in printed[15] and "cut short" in printed[16]


def test_a_skipped_image_keeps_its_reason(tmp_path: Path) -> None:
    images, teacher = write_images(tmp_path / "photos", broken=(1, 4)), make_teacher()
    summary = label(make_data(tmp_path, teacher), teacher)
    assert "6 labels of photos" in summary and "2 skipped" in summary
    sidecar = read_label_sidecar(tmp_path / "labels/photos", "0")
    assert sidecar is not None and list(sidecar.skipped) == ["photos/0/1", "photos/0/4"]
    assert set(labels_of(tmp_path, images)).isdisjoint(sidecar.skipped)


def test_labels_have_the_size_of_the_resized_image(tmp_path: Path) -> None:
    images, teacher = write_images(tmp_path / "photos", counts=(3,)), make_teacher()
    label(make_data(tmp_path, teacher, image_size=42), teacher)
    shapes = {key: values.shape for key, values in labels_of(tmp_path, images).items()}
    assert shapes == {"photos/0/0": (42, 56), "photos/0/1": (42, 56), "photos/0/2": (42, 84)}


def test_a_finished_set_is_not_labelled_again(tmp_path: Path) -> None:
    write_images(tmp_path / "photos")
    teacher = make_teacher()
    label(make_data(tmp_path, teacher), teacher)
    before = files_of(tmp_path / "labels/photos")
    assert label(make_data(tmp_path, load_model(as_file(teacher, tmp_path))), teacher)
    assert files_of(tmp_path / "labels/photos") == before
