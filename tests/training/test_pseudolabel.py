"""stage=pseudolabel: labels of each kind of teacher, and what their sets record."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_configs import make_config
from made_labels import SIZE, as_file, label, labels_of, make_data, make_teacher, reference, write_images

from depth_anything import DepthAnything, save_model
from depth_anything.data.codec import decode
from depth_anything.data.labels import open_labels
from depth_anything.data.reader import JoinedRecords
from depth_anything.data.tars import ShardError
from depth_anything.model.metadata import build_metadata
from depth_anything.teachers.network_teacher import convert_to_disparity, describe_teacher
from depth_anything.training import dry_run
from depth_anything.training.initialization import load_teacher
from depth_anything.training.provenance import add_provenance

CONFIG = make_config("stage=student", "encoder=vitn")

KINDS = ["relative", "metric80", "metric5", "calibrated"]


def as_checkpoint(model: DepthAnything, path: Path) -> Path:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "depth_anything": build_metadata(model)}, path / "last.ckpt")
    return path / "last.ckpt"


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


def test_labels_have_the_size_of_the_resized_image(tmp_path: Path) -> None:
    images, teacher = write_images(tmp_path / "photos", counts=(3,)), make_teacher()
    label(make_data(tmp_path, teacher, image_size=42), teacher)
    shapes = {key: values.shape for key, values in labels_of(tmp_path, images).items()}
    assert shapes == {"photos/0/0": (42, 56), "photos/0/1": (42, 56), "photos/0/2": (42, 84)}
