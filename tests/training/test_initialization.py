"""Starting weights in every format, and how licenses are combined."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_configs import make_config
from PIL import Image

from depth_anything import DepthAnything, load_model, save_model
from depth_anything.cli import main
from depth_anything.data.codec import encode
from depth_anything.data.labels import LabelSetWriter, open_labels
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.shards import open_set
from depth_anything.errors import UserError
from depth_anything.model.metadata import build_metadata
from depth_anything.model.weights import fingerprint
from depth_anything.training.config import ModelConfig
from depth_anything.training.initialization import build_frozen_encoder, build_model, load_teacher
from depth_anything.training.provenance import add_provenance, write_run_card


def config(stage="teacher", **changes):
    start = {"start": "all"} if stage == "metric" else {}
    return make_config(f"stage={stage}", "encoder=vitn", **{"init": None, **start, **changes})


def labeling(teacher, **changes):
    return make_config("stage=pseudolabel", "encoder=vitn", teacher=str(teacher), **changes)


def model(licence=None, **settings):
    torch.manual_seed(9)
    made = DepthAnything("vitn", **settings)
    made.licence = licence
    return made


def as_run(made, path):
    path.mkdir()
    save_model(made, path / "model.safetensors")
    return path


def as_checkpoint(made, path):
    state = {f"model.{name}": tensor for name, tensor in made.state_dict().items()}
    torch.save({"state_dict": state, "depth_anything": build_metadata(made)}, path)
    return path


def as_saved(made, path, **format):
    save_model(made, path, **format)
    return path


FORMATS = {
    "own": lambda made, folder: as_saved(made, folder / "m.safetensors"),
    "run": lambda made, folder: as_run(made, folder / "student-vitn-tiny"),
    "checkpoint": lambda made, folder: as_checkpoint(made, folder / "last.ckpt"),
    "transformers": lambda made, folder: as_saved(made, folder / "hf", format="transformers"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_any_format_starts_a_stage(tmp_path, form):
    made = model("CC-BY-NC-4.0")
    path = FORMATS[form](made, tmp_path)
    started = build_model(config(init=str(path)))
    assert fingerprint(started) == fingerprint(made)
    assert started.origin["start"]["licence"] == "CC-BY-NC-4.0"
    assert fingerprint(load_teacher(labeling(path))) == fingerprint(made)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stage", ["teacher", "student", "metric"])
def test_the_last_convolution_of_a_metric_model_is_kept_only_for_meters(tmp_path, form, stage, capsys):
    path = FORMATS[form](model(max_depth=80.0), tmp_path)
    meters = {"max_depth": 20.0} if stage == "metric" else {}
    started = build_model(config(stage=stage, init=str(path), **meters))
    last = "depth_head.scratch.output_conv2.2.weight"
    same = torch.equal(started.state_dict()[last], model(max_depth=80.0).state_dict()[last])
    assert same == (stage == "metric") and started.quantity == ("depth" if meters else "disparity")
    assert ("80 m" in capsys.readouterr().err) == (stage == "metric")  # a note about the other range


def test_training_drops_a_calibration_and_prints_a_note(tmp_path, capsys):
    made = model()
    made.calibration = (0.3, 0.02)
    path = FORMATS["own"](made, tmp_path)
    assert build_model(config(init=str(path))).calibration is None
    assert "calibrate" in capsys.readouterr().err


def test_official_files_start_a_stage(tmp_path):
    with torch.device("meta"):
        large = DepthAnything("vits")
    state = {name: torch.zeros(t.shape) for name, t in large.state_dict().items()}
    for name, licence, base in (
        ("depth_anything_v2_vits.pth", "Apache-2.0", "depth-anything/Depth-Anything-V2-Small"),
        ("depth_anything_vits14.pth", "Apache-2.0", "LiheYoung/depth_anything_vits14"),
    ):
        torch.save(state, tmp_path / name)
        started = build_model(config(encoder="vits", init=str(tmp_path / name)))
        assert not started.depth_head.projects[0].weight.any()
        assert started.origin["start"] == {"from": name, "licence": licence, "base": base}


def test_an_encoder_file_starts_a_stage(tmp_path):
    torch.save(model().pretrained.state_dict(), tmp_path / "dinov2_vits14_pretrain.pth")
    started = build_model(config(init=str(tmp_path / "dinov2_vits14_pretrain.pth")))
    assert torch.equal(started.pretrained.pos_embed, model().pretrained.pos_embed)
    start = started.origin["start"]
    assert (start["from"], start["licence"]) == ("dinov2_vits14_pretrain.pth", "Apache-2.0")


@pytest.mark.parametrize("whole", [False, True])
def test_a_student_cannot_start_from_a_teacher(tmp_path, whole):
    run = as_run(model(), tmp_path / "teacher")
    (run / "config.yaml").write_text("stage: teacher\n")
    path = run if whole else run / "model.safetensors"
    with pytest.raises(ValueError, match=r"is a teacher.*type init=hub"):
        build_model(config(stage="student", init=str(path)))
    build_model(config(init=str(path)))


def test_feature_alignment_needs_dinov2(tmp_path):
    save_model(model(), tmp_path / "hf", format="transformers")
    settings = config(recipe__alignment_weight=1.0, init=str(tmp_path / "hf"))
    with pytest.raises(ValueError, match="is not DINOv2; type init=hub"):
        build_frozen_encoder(settings)


def test_invalid_weights_raise_one_line_errors(tmp_path):
    (tmp_path / "photos").mkdir()
    for path, message in (
        (tmp_path / "photos", "is a folder without a config.json"),
        (tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(config(init=str(path)))
    with pytest.raises(ValueError, match="there is no teacher at .*none; run `python train.py stage=teacher"):
        load_teacher(labeling(tmp_path / "none"))


# --- licenses --------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def shard(photos, *more):
    return main(["shard", "images", str(photos), str(photos.parent / "set"), *more])


def labelled(photos, teacher):
    images = open_set(photos.parent / "set")
    labels = LabelSetWriter(
        photos.parent / "labels", images, teacher=teacher, preprocessing="70", codec="q12"
    )
    one = encode(np.arange(600, dtype=np.float32).reshape(20, 30), codec="q12")
    for info in images.shards:
        labels.publish(info.name, dict.fromkeys(range(info.records), one), [])
    assert labels.finish()
    return JoinedRecords(images, open_labels(photos.parent / "labels", images))


def test_a_teacher_at_another_image_size_warns(tmp_path):
    save_model(DepthAnything("vitn"), tmp_path / "model.safetensors")
    assert load_teacher(labeling(tmp_path / "model.safetensors")).input_size == 70
    with pytest.warns(UserWarning, match="image_size=70"):
        load_teacher(labeling(tmp_path / "model.safetensors", image_size=518))


def test_licenses_go_from_sets_and_teacher_to_the_card(photos):
    assert shard(photos, "--licence", "CC-BY-4.0") == 0
    images = open_set(photos.parent / "set")
    assert images.meta["licence"] == "CC-BY-4.0"
    joined = labelled(
        photos,
        {"fingerprint": "sha256:ab", "file": "x/depth_anything_v2_vitl.pth"} | {"licence": "CC-BY-NC-4.0"},
    )
    manifest = joined.labels.meta
    assert manifest["licence"] == "CC-BY-4.0 AND CC-BY-NC-4.0"
    assert (manifest["images"]["licence"], manifest["teacher"]["licence"]) == ("CC-BY-4.0", "CC-BY-NC-4.0")
    student = add_provenance(model(), config(stage="student"), [joined])
    assert student.licence == "CC-BY-4.0 AND CC-BY-NC-4.0"
    run = photos.parent / "student"
    save_model(student, run / "model.safetensors")
    write_run_card(student, run, title="student", measured={"abs_rel": "0.12345678"})
    text = (run / "README.md").read_text()
    assert "| set | 3 | CC-BY-4.0 | `depth_anything_v2_vitl.pth` (sha256:ab) | CC-BY-NC-4.0 |" in text
    assert "| abs_rel | 0.1235 |" in text and "Started from random weights." in text
    read = load_model(run)
    assert (read.licence, read.origin) == (student.licence, student.origin)
    again = build_model(config(init=str(run)))
    assert add_provenance(again, config(), []).licence == student.licence


def test_a_license_may_be_added_to_an_existing_set(photos, capsys):
    assert shard(photos) == 0
    before = open_set(photos.parent / "set")
    assert before.meta["licence"] is None
    assert shard(photos, "--licence", "CC0-1.0") == 0
    after = open_set(photos.parent / "set")
    assert after.meta["licence"] == "CC0-1.0" and after.digest == before.digest
    assert shard(photos) == 0 and open_set(photos.parent / "set").meta["licence"] == "CC0-1.0"
    capsys.readouterr()
    assert shard(photos, "--licence", "my own") == 2
    assert "'my own'" in capsys.readouterr().err


def test_indexed_shards_may_have_a_license(photos):
    shard(photos)
    others = photos.parent / "others"
    others.mkdir()
    for path in (photos.parent / "set").glob("*.tar"):
        path.rename(others / path.name)
    assert main(["shard", "index", str(others), "--licence", "MIT"]) == 0
    assert open_set(others).meta["licence"] == "MIT"


def test_unknown_licenses_stay_unknown(photos):
    shard(photos)
    joined = labelled(photos, {"fingerprint": "sha256:ab", "file": "teacher/model.safetensors"})
    assert joined.labels.meta["licence"] is None
    assert add_provenance(model(), config(), [joined]).licence is None
    started = model()
    started.origin = {"start": {"from": "b.pth", "licence": "CC-BY-NC-4.0", "base": None}}
    assert add_provenance(started, config(), [joined]).licence == "CC-BY-NC-4.0 AND unknown"
    assert add_provenance(model(), config(), [Records(open_set(photos.parent / "set"))]).licence is None


def test_no_card_or_origin_has_an_absolute_path(photos, tmp_path):
    shard(photos)
    teacher = {"fingerprint": "sha256:ab", "file": str(tmp_path / "runs" / "teacher" / "model.safetensors")}
    start = FORMATS["own"](model(), tmp_path)
    made = add_provenance(build_model(config(init=str(start))), config(), [labelled(photos, teacher)])
    assert made.origin["data"][0]["teacher"]["file"] == "teacher/model.safetensors"
    assert str(tmp_path) not in str(made.origin)


def test_an_edited_card_is_not_overwritten(tmp_path):
    write_run_card(model(), tmp_path, title="one", measured={})
    (tmp_path / "README.md").write_text("mine")
    write_run_card(model(), tmp_path, title="two", measured={})
    assert (tmp_path / "README.md").read_text() == "mine"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["README.md"]


class LinearHead(torch.nn.Module):
    """Another decoder, named by config."""

    def __init__(self, width, *, features, out_channels, max_depth=None, bias=True):
        super().__init__()
        self.project = torch.nn.Conv2d(width, 1, 1, bias=bias)

    def forward(self, tokens, grid, size):
        level = self.project(tokens[-1].transpose(1, 2).unflatten(2, grid))
        return torch.nn.functional.interpolate(level, size=size)[:, 0].relu()


def test_model_head_names_another_decoder(tmp_path):
    name = f"{LinearHead.__module__}.LinearHead"
    node = {"_target_": name, "bias": False}
    own = replace(config(), model=ModelConfig(head=node))
    built = build_model(own)
    assert built.head == name and built.depth_head.project.bias is None
    path = tmp_path / "own.safetensors"
    save_model(built, path)
    assert fingerprint(build_model(replace(own, init=str(path)))) == fingerprint(built)
    teacher = labeling(path)
    with pytest.raises(UserError, match=re.escape(f"+model.head._target_={name}")):
        load_teacher(teacher)
    assert fingerprint(load_teacher(replace(teacher, model=ModelConfig(head=node)))) == fingerprint(built)


def test_a_model_with_another_head_gives_its_encoder_only(tmp_path):
    other = model()
    save_model(other, tmp_path / "dpt.safetensors")
    node = {"_target_": f"{LinearHead.__module__}.LinearHead"}
    started = build_model(
        replace(config(init=str(tmp_path / "dpt.safetensors")), model=ModelConfig(head=node))
    )
    ours, theirs = started.pretrained.state_dict(), other.pretrained.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
