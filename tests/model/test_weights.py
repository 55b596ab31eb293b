"""Files of weights: what is read, what is refused, what is said, and that nothing is ever run."""

import collections
import json
import os
import pickle
import re
import struct
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from depth_anything.model import weights
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS
from depth_anything.model.weights import describe, fingerprint, load_encoder, load_model, save_model

OFFICIAL_TAPS = (1, 2, 3, 5)
RELATIVE = "depth_anything_v2_vits.pth"


@pytest.fixture(autouse=True)
def small_official_encoders(monkeypatch):
    """Let the official names stand for small networks: what is tested is how files are judged, not their size."""
    small = replace(
        ENCODERS["vits"],
        width=48,
        depth=6,
        heads=3,
        taps=OFFICIAL_TAPS,
        features=16,
        out_channels=(6, 12, 24, 48),
        grid=5,
    )
    monkeypatch.setitem(ENCODERS, "vits", small)
    monkeypatch.setitem(ENCODERS, "vitb", replace(small, width=72, hub="vit_base_patch14_dinov2.lvd142m"))
    monkeypatch.setitem(
        ENCODERS,
        "vitg",
        replace(small, depth=5, swiglu=True, taps=(1, 2, 3, 4), hub="vit_giant_patch14_dinov2.lvd142m"),
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DepthAnything("vits")


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refusal(path, **arguments):
    with pytest.raises(ValueError) as raised:
        load_model(path, **arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- round trips -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["vits", "vitg", "vitn", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("settings", [{}, {"max_depth": 80.0, "taps": (0, 1, 2, 4)}])
def test_our_own_format_keeps_everything(tmp_path, encoder, settings):
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


def test_metadata_of_the_file(tmp_path, model):
    save_model(model, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"] == describe(model)
    assert describe(model) | {"version": ""} == {
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
    with pytest.warns(UserWarning, match="does not keep the calibration"):
        save_model(model, tmp_path / RELATIVE, format="official")


def test_any_length_of_header_is_read(tmp_path, model):
    """A safetensors file begins with a length, whose first byte may be that of a pickle."""
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


def test_whoever_reads_the_old_file_keeps_it(tmp_path, model):
    """A file that is being read, mapped into memory perhaps, is replaced by name and never written into."""
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
def test_files_are_as_readable_as_any_other(tmp_path, model, format):
    (tmp_path / "other").write_bytes(b"")
    save_model(model, tmp_path / RELATIVE, format=format)
    assert (tmp_path / RELATIVE).stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("settings", "name", "advice"),
    [
        ({"max_depth": 20.0}, RELATIVE, "load it with max_depth=20"),
        ({"taps": (2, 3, 4, 5)}, RELATIVE, "load it with version=1"),
        ({"max_depth": 80.0}, "depth_anything_v2_metric_hypersim_vits.pth", "load it with max_depth=80"),
    ],
)
def test_official_format_says_what_it_loses(tmp_path, settings, name, advice):
    with pytest.warns(UserWarning, match=re.escape(advice)):
        save_model(DepthAnything("vits", **settings), tmp_path / name, format="official")


def test_official_format_is_silent_where_the_name_says_all(tmp_path):
    metric = DepthAnything("vits", max_depth=20)
    save_model(metric, tmp_path / "depth_anything_v2_metric_hypersim_vits.pth", format="official")
    first = DepthAnything("vits", taps=(2, 3, 4, 5))
    save_model(first, tmp_path / "depth_anything_vits14.pth", format="official")


def test_unknown_format(tmp_path, model):
    with pytest.raises(ValueError, match="format='onnx' is unknown; use safetensors or official"):
        save_model(model, tmp_path / "x", format="onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["safetensors", "official"])
def test_a_failing_save_leaves_the_old_file(tmp_path, model, monkeypatch, format):
    path = tmp_path / RELATIVE
    path.write_bytes(b"old")

    def full(*_, **__):
        next(tmp_path.glob(".*.tmp")).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, path, format=format)
    assert [file.name for file in tmp_path.iterdir()] == [RELATIVE]
    assert path.read_bytes() == b"old"


# --- wrappers and names ----------------------------------------------------------------------------------------


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
def test_wrappers_are_seen_through(tmp_path, model, wrap):
    torch.save(wrap(model.state_dict()), tmp_path / RELATIVE)
    assert same(load_model(tmp_path / RELATIVE), model)


def test_checkpoint_that_describes_itself(tmp_path):
    model = DepthAnything("vits", max_depth=20, taps=(0, 1, 2, 3))
    content = {"state_dict": prefixed(model.state_dict(), "model."), "depth_anything": describe(model)}
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
def test_official_names_are_believed(tmp_path, model, name, taps, max_depth):
    torch.save(model.state_dict(), tmp_path / name)
    read = load_model(tmp_path / name)
    assert (read.encoder, read.taps, read.max_depth) == ("vits", taps, max_depth)


@pytest.mark.parametrize(
    "name", ["model.pth", "depth_anything_vits.pth", "my_depth_anything_v2_vits_metric.pth"]
)
def test_what_nothing_says_is_warned_of_once_each(tmp_path, model, name):
    torch.save(model.state_dict(), tmp_path / name)
    with pytest.warns(UserWarning) as caught:
        read = load_model(tmp_path / name)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert "taken for V2; version=1 or 2" in messages[0] and "taken for disparity; max_depth=" in messages[1]
    assert all(warning.filename == __file__ for warning in caught)
    assert (read.taps, read.max_depth) == (OFFICIAL_TAPS, None)


def test_arguments_answer_what_nothing_says(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    read = load_model(tmp_path / "model.pth", version=1, max_depth=10)
    assert (read.taps, read.max_depth) == ((2, 3, 4, 5), 10.0)


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
            r"reads the blocks \[1, 2, 3, 5\]; version=1 overrides",
            (2, 3, 4, 5),
            None,
        ),
        ("depth_anything_vits14.pth", {"version": 2}, "version=2 overrides", OFFICIAL_TAPS, None),
        (RELATIVE, {"max_depth": 20}, "predicts disparity; max_depth=20 overrides", OFFICIAL_TAPS, 20.0),
        (
            "depth_anything_v2_metric_vkitti_vits.pth",
            {"max_depth": 20},
            "predicts depth up to 80 m; max_depth=20 overrides",
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
    with pytest.warns(UserWarning, match="depth up to 20 m; max_depth=80 overrides"):
        assert load_model(tmp_path / "m.safetensors", max_depth=80).max_depth == 80.0


# --- what is refused -------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(tmp_path, model, zipped):
    content = {**model.state_dict(), "extra": Hostile(tmp_path / "run")}
    torch.save(content, tmp_path / RELATIVE, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / RELATIVE)
    assert "holds code to run (posix.mkdir)" in message and "never unpickled" in message
    assert not (tmp_path / "run").exists()


def test_bare_pickles_are_never_run(tmp_path):
    for protocol in (2, 4):
        (tmp_path / "bare.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "run"), protocol=protocol))
        refusal(tmp_path / "bare.pth")
        with pytest.raises(ValueError):
            load_encoder(DepthAnything("vits"), tmp_path / "bare.pth")
        with pytest.raises(ValueError):
            fingerprint(tmp_path / "bare.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [RELATIVE, "model.safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.9999])
def test_truncated_files(tmp_path, model, name, share):
    path = tmp_path / name
    save_model(model, path, format="official" if name == RELATIVE else "safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert re.search(r"is damaged or cut short \(.+\); fetch it again", refusal(path))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\xff\xd8\xff\xe0" + bytes(100), "a JPEG picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>Not found</html>", "a web page"),
        (b"", "empty"),
        (bytes(1000), "no checkpoint"),
        (b"just words", "no checkpoint"),
    ],
)
def test_other_files_are_named(tmp_path, content, kind):
    (tmp_path / RELATIVE).write_bytes(content)
    message = refusal(tmp_path / RELATIVE)
    assert f"{RELATIVE} is {kind}" in message and "expected an official .pth" in message


def test_missing_file_and_folder(tmp_path):
    assert "none.pth cannot be read (No such file or directory); expected" in refusal(tmp_path / "none.pth")
    assert "is a folder; expected" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor, no state dict"),
        ([torch.ones(3)], "holds a list, no state dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"fc.weight": torch.ones(3), "fc.bias": torch.ones(1)}, "it has fc.weight and 1 more"),
        (
            {"blocks.0.x": torch.ones(1), "patch_embed.proj.weight": torch.ones(1)},
            "an encoder without a depth head",
        ),
        ({"backbone.embeddings.cls_token": torch.ones(1)}, "in the format of transformers"),
        ({"depth_head.x": torch.ones(1)}, "an encoder 0 wide and 0 deep, which is none of vits"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / RELATIVE)
    assert message in refusal(tmp_path / RELATIVE)


def test_wrong_sizes_are_named(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / RELATIVE)
    message = refusal(tmp_path / RELATIVE, encoder="vitb")
    assert "is not vitb: its " in message and ", expected (" in message
    torch.save({n: t for n, t in model.state_dict().items() if "projects" not in n}, tmp_path / RELATIVE)
    assert "is not vits: it lacks depth_head.projects.0.weight and 7 more" in refusal(tmp_path / RELATIVE)
    torch.save({**model.state_dict(), "depth_head.extra": torch.ones(1)}, tmp_path / RELATIVE)
    assert "is not vits: it also has depth_head.extra" in refusal(tmp_path / RELATIVE)


def test_unknown_sizes_are_named(tmp_path):
    other = DepthAnything("vit_tiny_patch16_224")
    torch.save(other.state_dict(), tmp_path / "model.pth")
    assert "192 wide and 12 deep, which is none of vits" in refusal(tmp_path / "model.pth")
    with pytest.warns(UserWarning, match="disparity or depth"):
        assert same(load_model(tmp_path / "model.pth", encoder="vit_tiny_patch16_224"), other)


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ({"taps": "x"}, "has metadata that make no sense"),
        ({"taps": '["a"]'}, "has metadata that make no sense"),
        ({"taps": "[0, 1]"}, "taps=[0, 1] must be four ascending blocks"),
        ({"max_depth": "[]"}, "has metadata that make no sense"),
        ({"max_depth": "-1"}, "max_depth=-1.0 must be a number of metres above 0"),
        ({"input_size": "{}"}, "has metadata that make no sense"),
        ({"encoder": "vitx"}, "encoder=vitx is unknown"),
        ({"calibration": "[1]"}, "has metadata that make no sense"),
        ({"calibration": "3"}, "has metadata that make no sense"),
        ({"calibration": '[1, "a"]'}, "has metadata that make no sense"),
        ({"calibration": "[1, NaN]"}, "must be two finite numbers"),
    ],
)
def test_nonsense_metadata_is_named(tmp_path, model, fact, message):
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors", metadata={**describe(model), **fact})
    assert message in refusal(tmp_path / "m.safetensors")


def test_a_dictionary_that_holds_itself_ends(tmp_path, model):
    content = {"depth_anything": torch.ones(1), **model.state_dict()}
    content["model"] = content
    torch.save(content, tmp_path / RELATIVE)
    assert same(load_model(tmp_path / RELATIVE), model)


def test_version_is_one_or_two(tmp_path, model):
    save_model(model, tmp_path / "m.safetensors")
    assert "version=3 must be 1 or 2" in refusal(tmp_path / "m.safetensors", version=3)


def test_flipped_header_bytes_never_crash(tmp_path, model):
    """Whatever a byte of the header becomes, the file is read or refused."""
    save_model(model, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "bad.safetensors"
    outcomes = set()
    for at in [*range(12), *range(12, 2000, 131)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :])
        try:
            outcomes.add(type(load_model(path)))
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes.add(ValueError)
    assert ValueError in outcomes


def test_loading_draws_no_random_numbers(tmp_path, model):
    timms = DepthAnything("vit_tiny_patch16_224")
    save_model(model, tmp_path / "ours.safetensors")
    save_model(timms, tmp_path / "timms.safetensors")
    before = torch.random.get_rng_state()
    load_model(tmp_path / "ours.safetensors")
    load_model(tmp_path / "timms.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)


# --- fingerprints ----------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_weights_alone(tmp_path, model):
    want = fingerprint(model)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", want)
    save_model(model, tmp_path / "m.safetensors")
    save_model(model, tmp_path / RELATIVE, format="official")
    torch.save({"state_dict": prefixed(model.state_dict(), "model.")}, tmp_path / "last.ckpt")
    for name in ("m.safetensors", RELATIVE, "last.ckpt"):
        assert fingerprint(tmp_path / name) == want
    assert fingerprint(load_model(str(tmp_path / RELATIVE))) == want
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(half, tmp_path / RELATIVE)
    assert fingerprint(tmp_path / RELATIVE) == fingerprint(load_model(tmp_path / RELATIVE)) != want


def test_fingerprint_sees_a_single_bit(model):
    before = fingerprint(model)
    model.depth_head.scratch.output_conv2[2].bias.data.view(torch.int32).add_(1)
    assert fingerprint(model) != before


def test_fingerprint_is_pinned():
    """Labels made by a teacher today must be recognised tomorrow."""
    model = torch.nn.Linear(2, 1)
    model.load_state_dict({"weight": torch.tensor([[1.0, -2.0]]), "bias": torch.tensor([0.5])})
    assert fingerprint(model) == "sha256:848732e20f10737b568ab400e3bb8ef7c00ea24366299215bfdda02344c911ed"


# --- encoders --------------------------------------------------------------------------------------------------


def encoder_state(model):
    return {name: tensor.clone() for name, tensor in model.pretrained.state_dict().items()}


@pytest.mark.parametrize(
    "write",
    [
        lambda model, path: save_model(model, path / RELATIVE, format="official"),
        lambda model, path: save_model(model, path / "m.safetensors"),
        lambda model, path: torch.save(encoder_state(model), path / "dinov2.pth"),
        lambda model, path: torch.save(
            {**encoder_state(model), "head.weight": torch.ones(2)}, path / "timm.pth"
        ),
        lambda model, path: save_file(
            {n: t for n, t in encoder_state(model).items() if n != "mask_token"}, path / "timm.safetensors"
        ),
        lambda model, path: torch.save(
            {"state_dict": prefixed(model.state_dict(), "model.")}, path / "last.ckpt"
        ),
    ],
)
def test_encoders_are_found_in_any_file(tmp_path, model, write):
    write(model, tmp_path)
    fresh = DepthAnything("vits")
    head = {name: tensor.clone() for name, tensor in fresh.depth_head.state_dict().items()}
    load_encoder(fresh, next(tmp_path.iterdir()))
    ours, theirs = encoder_state(fresh), encoder_state(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(fresh.depth_head.state_dict()[name], tensor) for name, tensor in head.items())
    assert not fresh.pretrained.mask_token.requires_grad


def test_giants_layers_under_timms_names(tmp_path):
    model = DepthAnything("vitg")
    state = encoder_state(model)
    timms = {n.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): t for n, t in state.items()}
    assert timms.keys() != state.keys()
    torch.save(timms, tmp_path / "timm.pth")
    fresh = DepthAnything("vitg")
    load_encoder(fresh, tmp_path / "timm.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder_state(fresh).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.update(pos_embed=torch.zeros(1, 257, 48)),
            r"is not the encoder vits: its pos_embed is \(1, 257, 48\), expected \(1, 26, 48\)",
        ),
        (lambda state: state.update(register_tokens=torch.zeros(1, 4, 48)), "it also has register_tokens"),
        (lambda state: state.pop("cls_token"), "it lacks cls_token"),
        (lambda state: state.clear() or state.update(other=torch.ones(1)), "it lacks cls_token and"),
    ],
)
def test_other_encoders_are_refused(tmp_path, model, change, message):
    state = encoder_state(model)
    change(state)
    torch.save(state, tmp_path / "dinov2.pth")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        load_encoder(model, tmp_path / "dinov2.pth")
    assert fingerprint(model) == before


def test_hub_weights_go_through_timm(monkeypatch):
    torch.manual_seed(1)
    published = timm.models.vision_transformer.VisionTransformer(
        img_size=70, patch_size=14, embed_dim=48, depth=6, num_heads=3, num_classes=0, init_values=1.0
    )
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: published)
    model = DepthAnything("vits")
    load_encoder(model, "hub")
    assert torch.equal(model.pretrained.blocks[5].mlp.fc2.weight, published.blocks[5].mlp.fc2.weight)
    again = DepthAnything("vits", pretrained=True)
    assert torch.equal(again.pretrained.pos_embed, published.pos_embed)


def test_saved_tensors_are_the_models(tmp_path, model):
    save_model(model, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert weights.fingerprint(tmp_path / "m.safetensors") == fingerprint(model)
