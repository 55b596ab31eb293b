"""The network equals an independent implementation; sizes, initialization, gradients and other heads."""

import hashlib
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from depth_anything.errors import UserError
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.dpt import DPTHead
from depth_anything.model.encoder import ENCODERS
from depth_anything.model.weights import fingerprint, load_model, read_head_name, save_model
from depth_anything.preprocess import preprocess_image

# Official classes on the meta device: tensors in the state dict, parameters, sha256 over their sorted
# "name shape" lines.
OFFICIAL = {
    "vits": (239, 24_785_089, "65256ce9e61be5804908ea35bd7437c64b93c418b052472b1a56133a33e2d2da"),
    "vitb": (239, 97_470_785, "175baabb098c6368d58375f51cad0090e6442d057043e3b7fe1334213fb43ea5"),
    "vitl": (407, 335_315_649, "8f55d1377417f6d1e993bd7ef6d9dec8f662041fc52bb21b7a49db06efb68255"),
    "vitg": (631, 1_258_132_225, "d21b53973f8fb50f1db630e14dc580326d70d477564d4438c551493dc473d9ee"),
}
SMALL = replace(ENCODERS["vits"], width=48, depth=6, heads=3, taps=(1, 2, 4, 5), features=16, grid=5)


@pytest.mark.parametrize("encoder", OFFICIAL)
@pytest.mark.parametrize("max_depth", [None, 20.0])
def test_names_and_shapes_are_the_official_ones(encoder, max_depth):
    with torch.device("meta"):
        model = DepthAnything(encoder, max_depth=max_depth)
    state = model.state_dict()
    lines = "\n".join(sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()))
    count = sum(p.numel() for p in model.parameters())
    assert (len(state), count, hashlib.sha256(lines.encode()).hexdigest()) == OFFICIAL[encoder]


@pytest.mark.parametrize(("encoder", "width"), [("vitt", 192), ("vitn", 96)])
def test_tiny_sizes(encoder, width):
    model = DepthAnything(encoder)
    assert model.pretrained.embed_dim == width
    assert len(model.pretrained.blocks) == 4 and model.taps == (0, 1, 2, 3)
    assert (model.patch_size, model.multiple, model.input_size) == (7, 14, 70)


# --- an independent network: state dict in, map out, float64 ---------------------------------------------------


def linear_map(count, side, align_corners_to=None):
    """Bilinear weights from `side` samples to `count`, corners aligned."""
    at = np.arange(count) * ((side - 1) / (count - 1) if count > 1 else 0)
    low = np.minimum(at.astype(int), side - 1)
    high = np.minimum(low + 1, side - 1)
    matrix = np.zeros((count, side))
    np.add.at(matrix, (np.arange(count), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(count), high), at - low)
    return torch.from_numpy(matrix)


def resize(x, size):
    return torch.einsum(
        "ij,kl,bcjl->bcik", linear_map(size[0], x.shape[2]), linear_map(size[1], x.shape[3]), x
    )


def norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def reference_tokens(state, image, heads, swiglu):
    """DINOv2 as its paper and its released names describe it: every block's output, normalized."""
    p = {name[len("pretrained.") :]: t for name, t in state.items() if name.startswith("pretrained.")}
    batch, _, height, width = image.shape
    h, w = height // 14, width // 14
    patches = image.reshape(batch, 3, h, 14, w, 14).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, -1)
    x = patches @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    x = torch.cat((p["cls_token"].expand(batch, -1, -1), x), 1)
    side = int((p["pos_embed"].shape[1] - 1) ** 0.5)
    positions = p["pos_embed"]
    if (h, w) != (side, side):
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        positions = torch.cat((positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, h * w, -1)), 1)
    x = x + positions
    outputs = []
    for i in range(1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))):
        b = {name.split(".", 2)[2]: t for name, t in p.items() if name.startswith(f"blocks.{i}.")}
        y = norm(x, b["norm1.weight"], b["norm1.bias"]) @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in y.chunk(3, -1))
        y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        x = x + b["ls1.gamma"] * y
        y = norm(x, b["norm2.weight"], b["norm2.bias"])
        if swiglu:
            gate, value = (y @ b["mlp.w12.weight"].T + b["mlp.w12.bias"]).chunk(2, -1)
            y = (gate * gate.sigmoid() * value) @ b["mlp.w3.weight"].T + b["mlp.w3.bias"]
        else:
            y = y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5)) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        x = x + b["ls2.gamma"] * y
        outputs.append(norm(x, p["norm.weight"], p["norm.bias"])[:, 1:])
    return outputs


def reference_map(state, image, *, taps, heads, swiglu=False, max_depth=None):
    state = {name: t.double() for name, t in state.items()}
    image = image.double()
    outputs = reference_tokens(state, image, heads, swiglu)
    p = {name[len("depth_head.") :]: t for name, t in state.items() if name.startswith("depth_head.")}
    h, w = image.shape[2] // 14, image.shape[3] // 14

    def convolve(x, name, padding=0, stride=1):
        return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), stride=stride, padding=padding)

    def refine(x, name):
        return x + convolve(convolve(x.relu(), f"{name}.conv1", 1).relu(), f"{name}.conv2", 1)

    levels = []
    for i, tap in enumerate(taps):
        x = outputs[tap].transpose(1, 2).reshape(image.shape[0], -1, h, w)
        x = convolve(x, f"projects.{i}")
        if i < 2:
            r = f"resize_layers.{i}"
            x = F.conv_transpose2d(x, p[f"{r}.weight"], p[f"{r}.bias"], stride=(4, 2)[i])
        elif i == 3:
            x = convolve(x, "resize_layers.3", 1, 2)
        levels.append(convolve(x, f"scratch.layer{i + 1}_rn", 1))
    path = None
    for i in (4, 3, 2, 1):
        name, level = f"scratch.refinenet{i}", levels[i - 1]
        path = level if path is None else path + refine(level, f"{name}.resConfUnit1")
        size = levels[i - 2].shape[2:] if i > 1 else (2 * level.shape[2], 2 * level.shape[3])
        path = convolve(resize(refine(path, f"{name}.resConfUnit2"), size), f"{name}.out_conv")
    x = resize(convolve(path, "scratch.output_conv1", 1), (14 * h, 14 * w))
    x = convolve(convolve(x, "scratch.output_conv2.0", 1).relu(), "scratch.output_conv2.2")[:, 0]
    return x.relu() if max_depth is None else x.sigmoid() * max_depth


def lively(model, seed=0):
    """Randomize all weights, so that every part of the network affects the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.state_dict().items():
            if name.endswith("gamma"):
                p.uniform_(0.1, 1, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5, generator=generator)
            elif p.ndim < 2 or "token" in name or "pos_embed" in name:
                p.normal_(0, 0.1, generator=generator)
            else:
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        model.depth_head.scratch.output_conv2[2].bias.fill_(0.5)
    return model.eval()


@pytest.mark.parametrize("size", [(70, 70), (70, 98), (28, 126), (140, 140)])
@pytest.mark.parametrize("max_depth", [None, 1.0])
def test_map_equals_the_reference(monkeypatch, size, max_depth):
    monkeypatch.setitem(ENCODERS, "vits", SMALL)
    model = lively(DepthAnything("vits", max_depth=max_depth))
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    want = reference_map(model.state_dict(), image, taps=SMALL.taps, heads=3, max_depth=max_depth)
    assert want.std() > 0.01
    assert (model(image) - want).abs().max() < 1e-5


def test_map_of_the_giant_equals_the_reference(monkeypatch):
    monkeypatch.setitem(ENCODERS, "vitg", replace(SMALL, swiglu=True))
    model = lively(DepthAnything("vitg"))
    image = torch.randn(1, 3, 56, 84, generator=torch.Generator().manual_seed(1))
    want = reference_map(model.state_dict(), image, taps=SMALL.taps, heads=3, swiglu=True)
    assert (model(image) - want).abs().max() < 1e-5


def test_official_small_at_full_size_equals_the_reference():
    """The real ViT-S at another size than its own, where timm's position rule differs by 0.01 and more."""
    model = lively(DepthAnything("vits"))
    image = torch.randn(1, 3, 84, 112, generator=torch.Generator().manual_seed(1))
    want = reference_map(model.state_dict(), image, taps=(2, 5, 8, 11), heads=6)
    with torch.no_grad():
        assert (model(image) - want).abs().max() < 1e-5


def test_taps_choose_the_blocks(monkeypatch):
    monkeypatch.setitem(ENCODERS, "vits", SMALL)
    model = lively(DepthAnything("vits", taps=[2, 3, 4, 5]))
    image = torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(1))
    assert model.taps == (2, 3, 4, 5)
    assert (
        model(image) - reference_map(model.state_dict(), image, taps=(2, 3, 4, 5), heads=3)
    ).abs().max() < 1e-5


# --- gradients and start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "taps", "frozen"),
    [
        ("vitn", None, {"pretrained.mask_token"}),
        ("vit_tiny_patch16_224", None, set()),
        ("vit_small_patch16_dinov3", None, set()),
        ("vit_tiny_patch16_224", (0, 1, 2, 3), {f"pretrained.blocks.{i}." for i in range(4, 12)}),
    ],
)
def test_every_trainable_parameter_gets_a_gradient(encoder, taps, frozen):
    """So that DDP runs without find_unused_parameters."""
    model = DepthAnything(encoder, taps=taps)
    model(torch.randn(1, 3, 4 * model.patch_size, 6 * model.patch_size)).square().mean().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {name for name, p in model.named_parameters() if not p.requires_grad}
    frozen = {*frozen, "depth_head.scratch.refinenet4.resConfUnit1."}
    assert {next(start for start in frozen if name.startswith(start)) for name in idle} == frozen
    trainable = [*model.encoder_parameters(), *model.head_parameters()]
    assert {id(p) for p in trainable} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("encoder", "seeds"), [("vitn", 50), ("vitt", 20), ("vits", 4), ("vit_tiny_patch16_224", 4)]
)
def test_output_is_active_at_any_seed(encoder, seeds):
    """Default initialization gives zeros everywhere, and no gradient, for half of all seeds."""
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DepthAnything(encoder)
            side = 4 * model.patch_size
            noise = torch.randn(1, 3, side, side)
            smooth = F.interpolate(torch.randn(1, 3, 3, 3), (side, side), mode="bilinear")
        flat = torch.full_like(noise, -2.1)
        output = model(torch.cat((noise, smooth, flat)))
        assert output.min() > 0.4, seed
        assert output[:2].flatten(1).std(1).min() > 0.005, seed
        if seed < 4:
            output[:2].std((1, 2)).sum().backward()
            assert all(p.grad.abs().max() > 0 for p in model.encoder_parameters()[:3]), seed


def test_metric_starts_mid_range():
    output = DepthAnything("vitn", max_depth=20)(torch.randn(1, 3, 98, 98))
    assert output.min() > 2 and output.max() < 18 and output.std() > 1e-3


# --- interface -------------------------------------------------------------------------------------------------


def test_shapes_quantity_and_unit():
    relative, metric = DepthAnything("vitn"), DepthAnything("vitn", max_depth=80)
    image = torch.randn(2, 3, 56, 84)
    assert relative(image).shape == (2, 56, 84)
    assert (relative.encoder, relative.quantity, relative.unit) == ("vitn", "disparity", "relative")
    assert (metric.max_depth, metric.quantity, metric.unit) == (80.0, "depth", "m")
    metric.depth_head.scratch.output_conv2[2].bias.data.fill_(50.0)
    assert torch.all(metric(image) == 80.0)


@pytest.mark.parametrize("taps", [None, (0, 1, 2, 3)])
def test_features_are_the_final_tokens(taps):
    model = DepthAnything("vit_tiny_patch16_224", taps=taps)
    image = torch.randn(2, 3, 48, 64)
    want = model.pretrained.forward_features(image)[:, 1:]
    output, tokens = model(image, return_features=True)
    assert tokens.shape == (2, 12, 192)
    torch.testing.assert_close(tokens, want)
    torch.testing.assert_close(model.features(image), want)
    torch.testing.assert_close(output, model(image))


def test_prefix_tokens_are_left_out():
    model = DepthAnything("vit_small_patch14_reg4_dinov2")
    assert model.features(torch.randn(1, 3, 28, 42)).shape == (1, 6, 384)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "vit"}, "encoder=vit "),
        (
            {"encoder": "vitn", "taps": [0, 1, 2]},
            "taps=[0, 1, 2] ",
        ),
        ({"encoder": "vitn", "taps": [0, 2, 1, 3]}, "taps=[0, 2, 1, 3] "),
        ({"encoder": "vitn", "taps": [1, 2, 3, 4]}, "taps=[1, 2, 3, 4] "),
        ({"encoder": "vitn", "max_depth": 0}, "max_depth=0 "),
        ({"encoder": "vitn", "pretrained": True}, "encoder=vitn "),
    ],
)
def test_impossible_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DepthAnything(**settings)


def test_sides_must_be_multiples_of_the_patch():
    with pytest.raises(ValueError, match="98×100.* 7$"):
        DepthAnything("vitn")(torch.randn(1, 3, 98, 100))


def test_the_map_is_summed_in_full_precision_under_autocast():
    """Eight bits of mantissa would leave a map around one with steps of 1/128."""
    model = DepthAnything("vitn").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(1, 3, 98, 98))
    assert output.dtype == torch.float32
    assert len(output.unique()) > 2000


def test_infer_image_equals_the_official_pipeline():
    model = lively(DepthAnything("vitn"))
    bgr = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    image = torch.from_numpy(preprocess_image(np.ascontiguousarray(bgr[..., ::-1]), 98))
    assert image.shape == (3, 98, 168)
    with torch.no_grad():
        want = resize(model(image[None])[:, None].double(), (37, 61))[0, 0]
    got = model.infer_image(bgr, input_size=98)
    assert got.dtype == np.float32 and got.shape == (37, 61)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_float64_stays():
    model = DepthAnything("vitn").double()
    assert model(torch.randn(1, 3, 56, 70, dtype=torch.float64)).dtype == torch.float64


def test_position_rule_is_not_stored_in_the_model():
    torch.manual_seed(0)
    model = DepthAnything("vitn").eval()
    model.pretrained.pos_embed.data.normal_()
    image = torch.randn(1, 3, model.patch_size * 5, model.patch_size * 4)
    assert model.position_rule == "official"
    with torch.no_grad():
        official = model(image)
        theirs = model(image, position_rule="transformers")
        assert torch.equal(model(image), official)
        assert torch.equal(model(image, position_rule="official"), official)
    assert not torch.equal(theirs, official)
    with pytest.raises(ValueError, match="position_rule='bilinear'.*official, transformers"):
        model(image, position_rule="bilinear")
    with pytest.raises(AttributeError):  # never accepted and then ignored
        model.position_rule = "transformers"


def test_timm_encoders_have_timms_position_rule():
    with torch.device("meta"):
        model = DepthAnything("vit_tiny_patch16_224")
    assert model.position_rule == "timm"
    image = torch.empty(1, 3, 64, 80, device="meta")
    assert model(image, position_rule="timm").shape == (1, 64, 80)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        model(image, position_rule="transformers")


class LinearHead(torch.nn.Module):
    """A decoder that maps each token of the last tap to the pixels of its patch."""

    def __init__(self, width, *, features, out_channels, max_depth=None, scale=1.0):
        super().__init__()
        self.project, self.max_depth, self.scale = torch.nn.Conv2d(width, 1, 1), max_depth, scale

    def forward(self, tokens, grid, size):
        level = self.project(tokens[-1].transpose(1, 2).unflatten(2, grid))
        return self.scale * F.interpolate(level, size=size)[:, 0].relu()


def test_another_head_is_trained_saved_and_loaded_by_its_name(tmp_path):
    model = DepthAnything("vitn", head=partial(LinearHead, scale=2.0)).eval()
    assert model.head == f"{__name__}.LinearHead" and DepthAnything("vitn", head=DPTHead).head is None
    image = torch.randn(1, 3, 70, 70)
    model(image).sum().backward()
    assert model.depth_head.project.weight.grad is not None
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    for head in (None, DPTHead):
        with pytest.raises(UserError, match=f"m.safetensors .*head={model.head}"):
            load_model(path, head=head)
    assert torch.equal(load_model(path, head=partial(LinearHead, scale=2.0))(image), model(image))
    assert read_head_name(path) == model.head
    for format in ("official", "transformers"):
        with pytest.raises(UserError, match=f"{format}.*{model.head}.*safetensors"):
            save_model(model, tmp_path / "other", format=format)


@pytest.mark.filterwarnings("ignore:.*does not say whether it predicts disparity or depth")
def test_a_head_without_metadata_is_given_by_the_argument(tmp_path):
    model = DepthAnything("vitn", head=LinearHead).eval()
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    read = load_model(tmp_path / "plain.pth", head=LinearHead, max_depth=None)
    assert fingerprint(read) == fingerprint(model)
