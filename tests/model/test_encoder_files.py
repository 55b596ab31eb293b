"""Fingerprints of weights, and encoders loaded from files of every format."""

import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from depth_anything.model import weights
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.weights import fingerprint, load_encoder, load_model, save_model

pytestmark = pytest.mark.usefixtures("small_official_encoders")
RELATIVE = "depth_anything_v2_vits.pth"


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


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
    """Labels of a teacher must be recognized by later versions."""
    model = torch.nn.Linear(2, 1)
    model.load_state_dict({"weight": torch.tensor([[1.0, -2.0]]), "bias": torch.tensor([0.5])})
    assert fingerprint(model) == "sha256:848732e20f10737b568ab400e3bb8ef7c00ea24366299215bfdda02344c911ed"


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


def test_giant_loads_timms_names(tmp_path):
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
            r"dinov2\.pth .*pos_embed.*\(1, 257, 48\).*\(1, 26, 48\)",
        ),
        (lambda state: state.update(register_tokens=torch.zeros(1, 4, 48)), "register_tokens"),
        (lambda state: state.pop("cls_token"), "cls_token"),
        (lambda state: state.clear() or state.update(other=torch.ones(1)), "cls_token and [0-9]+ more"),
    ],
)
def test_weights_of_other_encoders_are_refused(tmp_path, model, change, message):
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


def test_saved_tensors_equal_the_models(tmp_path, model):
    save_model(model, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert weights.fingerprint(tmp_path / "m.safetensors") == fingerprint(model)
