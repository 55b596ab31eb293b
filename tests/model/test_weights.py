"""Saving and loading models: what is kept, and what warns."""

import collections
import json
import os
import re
import struct
import warnings

import pytest
import torch

from depth_anything.errors import UserError
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.metadata import build_metadata
from depth_anything.model.weights import load_model, save_model

pytestmark = pytest.mark.usefixtures("small_official_encoders")
OFFICIAL_TAPS = (1, 2, 3, 5)
RELATIVE = "depth_anything_v2_vits.pth"


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("encoder", ["vits", "vitg", "vitn", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("settings", [{}, {"max_depth": 80.0, "taps": (0, 1, 2, 4)}])
def test_safetensors_keeps_everything(tmp_path, encoder, settings):
    if encoder == "vitn" and settings:
        settings = {"max_depth": 80.0}
    model = DepthAnything(encoder, **settings)
    model.licence, model.input_size = "apache-2.0", 98
    save_model(model, tmp_path / "model.safetensors")
    read = load_model(tmp_path / "model.safetensors")
    assert same(model, read) and not read.training
    for fact in ("encoder", "taps", "max_depth", "quantity", "unit", "input_size", "licence", "patch_size"):
        assert getattr(read, fact) == getattr(model, fact), fact
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in read.named_parameters() if not p.requires_grad]
    image = torch.randn(1, 3, 4 * model.patch_size, 4 * model.patch_size)
    assert torch.equal(read(image), model.eval()(image))


def test_metadata_of_a_safetensors_file(tmp_path, model):
    save_model(model, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    digest = header["__metadata__"].pop("sha256")
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert header["__metadata__"] == build_metadata(model)
    assert build_metadata(model) | {"version": ""} == {
        "format": "pt",
        "project": "depth-anything-train",
        "version": "",
        "encoder": "vits",
        "taps": "[1, 2, 3, 5]",
        "quantity": "disparity",
        "unit": "relative",
        "max_depth": "null",
        "input_size": "70",
        "licence": "unknown",
    }


def test_a_calibration_is_kept(tmp_path, model):
    save_model(model, tmp_path / "plain.safetensors")
    assert load_model(tmp_path / "plain.safetensors").calibration is None
    model.calibration = (0.1 + 0.2, -1e-7)
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert again.calibration == model.calibration and again.quantity == "disparity"
    with pytest.warns(UserWarning, match="calibration"):
        save_model(model, tmp_path / RELATIVE, format="official")


def test_any_length_of_header_is_read(tmp_path, model):
    """A safetensors file begins with a length, whose first byte may look like a pickle."""
    starts = set()
    for count in range(0, 256, 8):
        model.licence = "x" * (1 + count)
        save_model(model, tmp_path / "m.safetensors")
        starts.add((tmp_path / "m.safetensors").read_bytes()[0])
        assert load_model(tmp_path / "m.safetensors").licence == model.licence
    assert 0x80 in starts


def test_official_format_is_a_plain_state_dict(tmp_path, model):
    save_model(model, tmp_path / RELATIVE, format="official")
    state = torch.load(tmp_path / RELATIVE, weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert (
        "pretrained.mask_token" in state
        and "depth_head.scratch.refinenet4.resConfUnit1.conv1.weight" in state
    )
    assert same(load_model(tmp_path / RELATIVE), model)


def test_official_bytes_do_not_depend_on_the_path(tmp_path, model):
    save_model(model, tmp_path / RELATIVE, format="official")
    save_model(model, tmp_path / "sub" / RELATIVE, format="official")
    assert (tmp_path / RELATIVE).read_bytes() == (tmp_path / "sub" / RELATIVE).read_bytes()


def test_open_readers_keep_the_old_file(tmp_path, model):
    """A file that is open or mapped is replaced by a rename and never written in place."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        save_model(model, path)
        assert reader.read() == b"old"


def test_the_same_model_makes_the_same_bytes(tmp_path, model):
    for name in "abcd":
        save_model(model, tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


@pytest.mark.parametrize("format", ["safetensors", "official"])
def test_files_have_the_permissions_of_the_umask(tmp_path, model, format):
    (tmp_path / "other").write_bytes(b"")
    save_model(model, tmp_path / RELATIVE, format=format)
    assert (tmp_path / RELATIVE).stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("settings", "name", "advice"),
    [
        ({"max_depth": 20.0}, RELATIVE, "max_depth=20"),
        ({"taps": (2, 3, 4, 5)}, RELATIVE, "version=1"),
        ({"max_depth": 80.0}, "depth_anything_v2_metric_hypersim_vits.pth", "max_depth=80"),
    ],
)
def test_official_format_warns_of_lost_facts(tmp_path, settings, name, advice):
    with pytest.warns(UserWarning, match=re.escape(advice)):
        save_model(DepthAnything("vits", **settings), tmp_path / name, format="official")


def test_official_format_warns_of_the_lost_input_size(tmp_path, model):
    model.input_size = 98
    with pytest.warns(UserWarning, match="input_size=98") as caught:
        save_model(model, tmp_path / RELATIVE, format="official")
    assert len(caught) == 1


def test_official_format_warns_of_the_lost_encoder(tmp_path):
    with pytest.warns(UserWarning, match="encoder=vit_tiny_patch16_224"):
        save_model(DepthAnything("vit_tiny_patch16_224"), tmp_path / RELATIVE, format="official")


def test_official_format_warns_of_a_metric_name(tmp_path, model):
    with pytest.warns(UserWarning, match="metric_hypersim_vits"):
        save_model(model, tmp_path / "depth_anything_v2_metric_hypersim_vits.pth", format="official")


@pytest.mark.parametrize("format", ["safetensors", "transformers"])
def test_a_calibrated_model_is_not_a_metric_one(tmp_path, format):
    """A calibration is for disparity; with a max_depth, too, depths would be wrong."""
    model = DepthAnything("vits")
    model.calibration = (0.5, 0.25)
    path = tmp_path / "m.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_model(model, path, format=format)
    with pytest.raises(UserError, match=r"m\.safetensors is calibrated.*max_depth=20"):
        load_model(path, max_depth=20.0)
    if format == "transformers":  # one file of the folder says metres, the other has the calibration
        config = json.loads((path / "config.json").read_text())
        config |= {"depth_estimation_type": "metric", "max_depth": 20}
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"m\.safetensors is calibrated.*max_depth=20"):
            load_model(path)


@pytest.mark.parametrize("max_depth", [0, -5, float("nan"), float("inf"), 1e300])
def test_impossible_arguments_are_refused(tmp_path, model, max_depth):
    save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="max_depth="):
        load_model(tmp_path / "m.safetensors", max_depth=max_depth)


def test_official_format_does_not_warn_if_the_name_says_everything(tmp_path):
    metric = DepthAnything("vits", max_depth=20)
    save_model(metric, tmp_path / "depth_anything_v2_metric_hypersim_vits.pth", format="official")
    first = DepthAnything("vits", taps=(2, 3, 4, 5))
    save_model(first, tmp_path / "depth_anything_vits14.pth", format="official")


def test_unknown_format(tmp_path, model):
    with pytest.raises(ValueError, match="format='onnx' .*safetensors, official, transformers"):
        save_model(model, tmp_path / "x", format="onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["safetensors", "official"])
def test_a_failing_save_leaves_the_old_file(tmp_path, model, monkeypatch, format):
    path = tmp_path / RELATIVE
    path.write_bytes(b"old")

    def full(*_, **__):
        next(tmp_path.glob(".tmp.*")).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, path, format=format)
    assert [file.name for file in tmp_path.iterdir()] == [RELATIVE]
    assert path.read_bytes() == b"old"


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def wrap_blocks(state):
    return {re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {}, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: prefixed(state, "module."),
        lambda state: prefixed(state, "_orig_mod."),
        lambda state: prefixed(state, "module._orig_mod.model."),
        lambda state: {"model": prefixed(state, "module."), "epoch": 3, "previous_best": {"d1": 0.9}},
        lambda state: {
            "state_dict": {**prefixed(state, "model."), "loss.weight": torch.ones(1)},
            "global_step": 5,
        },
        wrap_blocks,
        lambda state: collections.OrderedDict(state),
    ],
)
def test_prefixes_of_wrappers_are_removed(tmp_path, model, wrap):
    torch.save(wrap(model.state_dict()), tmp_path / RELATIVE)
    assert same(load_model(tmp_path / RELATIVE), model)


def test_checkpoint_that_describes_itself(tmp_path):
    model = DepthAnything("vits", max_depth=20, taps=(0, 1, 2, 3))
    content = {"state_dict": prefixed(model.state_dict(), "model."), "depth_anything": build_metadata(model)}
    torch.save(content, tmp_path / "last.ckpt")
    read = load_model(tmp_path / "last.ckpt")
    assert (read.max_depth, read.taps) == (20.0, (0, 1, 2, 3)) and same(read, model)


def test_old_files_and_half_precision(tmp_path, model):
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / RELATIVE, _use_new_zipfile_serialization=False)
    read = load_model(tmp_path / RELATIVE)
    assert all(p.dtype == torch.float32 for p in read.parameters())
    assert torch.equal(read.state_dict()["pretrained.pos_embed"], state["pretrained.pos_embed"].float())


def test_a_file_may_lack_the_mask_token(tmp_path, model):
    state = model.state_dict()
    del state["pretrained.mask_token"]
    torch.save(state, tmp_path / RELATIVE)
    assert torch.equal(load_model(tmp_path / RELATIVE).pretrained.mask_token, torch.zeros(1, 48))


@pytest.mark.parametrize(
    ("name", "taps", "max_depth"),
    [
        ("depth_anything_v2_vits.pth", OFFICIAL_TAPS, None),
        ("depth_anything_v2_vits (1).pth", OFFICIAL_TAPS, None),
        ("Depth_Anything_V2_ViTS.pth", OFFICIAL_TAPS, None),
        ("depth_anything_vits14.pth", (2, 3, 4, 5), None),
        ("depth_anything_v2_metric_hypersim_vits.pth", OFFICIAL_TAPS, 20.0),
        ("depth_anything_v2_metric_vkitti_vits.pth", OFFICIAL_TAPS, 80.0),
    ],
)
def test_official_names_set_taps_and_range(tmp_path, model, name, taps, max_depth):
    torch.save(model.state_dict(), tmp_path / name)
    read = load_model(tmp_path / name)
    assert (read.encoder, read.taps, read.max_depth) == ("vits", taps, max_depth)


@pytest.mark.parametrize(
    "name", ["depth_anything_vits14", "depth_anything_v2_metric_hypersim_vits", "depth_anything_v2_vits"]
)
@pytest.mark.parametrize("max_depth", [None, 35.0])
def test_metadata_override_an_official_name(tmp_path, name, max_depth):
    """A file saved under an official name keeps its facts in each format with metadata."""
    model = DepthAnything("vits", max_depth=max_depth, taps=(0, 1, 2, 4))
    model.licence, model.input_size = "apache-2.0", 84
    save_model(model, tmp_path / f"{name}.safetensors")
    torch.save(
        {"state_dict": model.state_dict(), "depth_anything": build_metadata(model)}, tmp_path / f"{name}.ckpt"
    )
    for suffix in ("safetensors", "ckpt"):
        read = load_model(tmp_path / f"{name}.{suffix}")
        assert (read.taps, read.max_depth) == ((0, 1, 2, 4), max_depth)
        assert (read.licence, read.input_size) == ("apache-2.0", 84) and same(read, model)


@pytest.mark.parametrize(
    "name", ["model.pth", "depth_anything_vits.pth", "my_depth_anything_v2_vits_metric.pth"]
)
def test_unknown_facts_warn_once_each(tmp_path, model, name):
    torch.save(model.state_dict(), tmp_path / name)
    with pytest.warns(UserWarning) as caught:
        read = load_model(tmp_path / name)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert "V2" in messages[0] and "version=1" in messages[0]
    assert "disparity" in messages[1] and "max_depth=" in messages[1]
    assert all(warning.filename == __file__ for warning in caught)
    assert (read.taps, read.max_depth) == (OFFICIAL_TAPS, None)


def test_arguments_supply_unknown_facts(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    read = load_model(tmp_path / "model.pth", version=1, max_depth=10)
    assert (read.taps, read.max_depth) == ((2, 3, 4, 5), 10.0)


def test_version_1_is_refused_for_encoders_without_it(tmp_path):
    model = DepthAnything("vitg", taps=(0, 1, 2, 4))
    save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="version=1 .*vits"):
        load_model(tmp_path / "m.safetensors", version=1)
    assert load_model(tmp_path / "m.safetensors", version=2).taps == (0, 1, 2, 4)


def test_tiny_networks_have_no_versions(tmp_path):
    torch.save(DepthAnything("vitt").state_dict(), tmp_path / "model.pth")
    with pytest.warns(UserWarning) as caught:
        assert load_model(tmp_path / "model.pth").encoder == "vitt"
    assert len(caught) == 1 and "disparity or depth" in str(caught[0].message)


@pytest.mark.parametrize(
    ("name", "arguments", "message", "taps", "max_depth"),
    [
        (
            RELATIVE,
            {"version": 1},
            r"\[1, 2, 3, 5\]; version=1 ",
            (2, 3, 4, 5),
            None,
        ),
        ("depth_anything_vits14.pth", {"version": 2}, "version=2 ", OFFICIAL_TAPS, None),
        (RELATIVE, {"max_depth": 20}, "disparity; max_depth=20 ", OFFICIAL_TAPS, 20.0),
        (
            "depth_anything_v2_metric_vkitti_vits.pth",
            {"max_depth": 20},
            "80 m; max_depth=20 ",
            OFFICIAL_TAPS,
            20.0,
        ),
    ],
)
def test_conflicts_warn(tmp_path, model, name, arguments, message, taps, max_depth):
    torch.save(model.state_dict(), tmp_path / name)
    with pytest.warns(UserWarning, match=message) as caught:
        read = load_model(tmp_path / name, **arguments)
    assert len(caught) == 1
    assert (read.taps, read.max_depth) == (taps, max_depth)


def test_conflict_with_metadata_warns_and_agreement_does_not(tmp_path):
    save_model(DepthAnything("vits", max_depth=20), tmp_path / "m.safetensors")
    load_model(tmp_path / "m.safetensors", max_depth=20, version=2, encoder="vit_small_patch14_dinov2")
    with pytest.warns(UserWarning, match="20 m; max_depth=80 "):
        assert load_model(tmp_path / "m.safetensors", max_depth=80).max_depth == 80.0
