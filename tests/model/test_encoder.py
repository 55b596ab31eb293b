"""The encoder: exact position embedding, timm ViTs, pretrained weights."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

from depth_anything.model.encoder import (
    ENCODERS,
    POSITION_RULES,
    DINOv2,
    build_encoder,
    canonical_encoder_name,
    load_hub_weights,
    rename_swiglu,
    resample_positions,
)


def cubic_weights(side: int, count: int) -> np.ndarray:
    """Rows of bicubic weights (a = -0.75, border repeated) that sample `side` values with the official step."""
    step = side / (count + 0.1)
    matrix = np.zeros((count, side))
    for i in range(count):
        centre = (i + 0.5) * step - 0.5
        base = int(np.floor(centre))
        for j in range(base - 1, base + 3):
            distance, a = abs(centre - j), -0.75
            if distance <= 1:
                weight = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
            else:
                weight = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
            matrix[i, min(max(j, 0), side - 1)] += weight
    return matrix


@pytest.mark.parametrize(("side", "height", "width"), [(37, 37, 49), (37, 10, 10), (37, 1, 1369), (7, 12, 7)])
def test_position_embedding_follows_the_official_rule(side, height, width):
    positions = torch.randn(1, 1 + side * side, 5, generator=torch.Generator().manual_seed(0))
    got = resample_positions(positions, height, width)
    grid = positions[0, 1:].reshape(side, side, 5).double().numpy()
    down, across = cubic_weights(side, height), cubic_weights(side, width)
    want = np.einsum("ij,kl,jlc->ikc", down, across, grid).reshape(-1, 5)
    assert torch.equal(got[0, 0], positions[0, 0])
    np.testing.assert_allclose(got[0, 1:].numpy(), want, atol=2e-5)


def test_position_embedding_is_unchanged_at_its_own_size():
    positions = torch.randn(1, 1 + 37 * 37, 3)
    assert resample_positions(positions, 37, 37) is positions


def test_position_embedding_is_resampled_in_float32():
    positions = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0))
    half = resample_positions(positions.bfloat16(), 9, 9)
    assert half.dtype == torch.float32
    assert torch.equal(half, resample_positions(positions.bfloat16().float(), 9, 9))
    assert resample_positions(positions.double(), 9, 9).dtype == torch.float64


@pytest.mark.parametrize(("height", "width"), [(37, 49), (37, 37), (16, 10), (74, 74), (1, 3), (123, 37)])
@pytest.mark.parametrize("rule", POSITION_RULES)
def test_exported_position_embedding_equals_the_eager_one(monkeypatch, rule, height, width):
    positions = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    eager = resample_positions(positions, height, width, rule)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    exported = resample_positions(positions, height, width, rule)
    torch.testing.assert_close(exported, eager, rtol=0, atol=2e-5)


def test_position_rules_agree_only_at_the_original_size():
    positions = torch.randn(1, 1 + 25, 5, generator=torch.Generator().manual_seed(0))
    assert resample_positions(positions, 5, 5, "transformers") is positions
    official, theirs = (resample_positions(positions, 5, 7, rule) for rule in POSITION_RULES)
    assert (official - theirs).abs().max() > 0.05


def test_attention_is_fused():
    module, _ = build_encoder("vitn")
    assert all(block.attn.fused_attn for block in module.blocks)


def test_timms_names_of_dinov2_are_mapped():
    assert canonical_encoder_name("vit_small_patch14_dinov2") == "vits"
    assert canonical_encoder_name("vit_giant_patch14_dinov2.lvd142m") == "vitg"
    assert canonical_encoder_name("vit_tiny_patch16_224") == "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "patch", "taps"),
    [
        ("vit_tiny_patch16_224", 16, (2, 5, 8, 11)),
        ("vit_small_patch14_reg4_dinov2", 14, (2, 5, 8, 11)),
        ("vit_small_patch16_dinov3", 16, (2, 5, 8, 11)),
        ("vit_large_patch16_224", 16, (5, 11, 17, 23)),
    ],
)
def test_spec_of_timm_vits(name, patch, taps):
    with torch.device("meta"):
        module, spec = build_encoder(name)
    assert (spec.patch, spec.taps, spec.width, spec.depth) == (
        patch,
        taps,
        module.embed_dim,
        len(module.blocks),
    )


@pytest.mark.parametrize(
    "name", ["vitx", "resnet18", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"]
)
def test_other_architectures_are_refused(name):
    with pytest.raises(ValueError, match=f"encoder={name} .*vits, vitb"), torch.device("meta"):
        build_encoder(name)


def test_giant_equals_timms_with_renamed_layers():
    """timm packs the same matrices under other names; its own giant is the reference."""
    spec = replace(ENCODERS["vitg"], width=48, depth=2, heads=2, grid=5)
    theirs = timm.create_model(
        "vit_giant_patch14_dinov2",
        img_size=70,
        embed_dim=48,
        depth=2,
        num_heads=2,
        num_classes=0,
        mlp_ratio=2.66667 * 2,
    )
    hidden = (int(48 * 4 * 2 / 3) + 7) // 8 * 8
    for block in theirs.blocks:
        block.mlp.fc1 = nn.Linear(48, 2 * hidden)
        block.mlp.fc2 = nn.Linear(hidden, 48)
    ours = DINOv2(spec)
    ours.load_state_dict({**rename_swiglu(theirs.state_dict()), "mask_token": torch.zeros(1, 48)})
    image = torch.randn(1, 3, 70, 70)
    torch.testing.assert_close(
        ours.forward_features(image), theirs.forward_features(image), atol=1e-5, rtol=0
    )


def test_registers_equal_timms_which_have_no_position():
    ours = DINOv2(ENCODERS["vitn_reg4"])
    nn.init.normal_(ours.reg_token)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=70,
        patch_size=7,
        embed_dim=96,
        depth=4,
        num_heads=3,
        num_classes=0,
        init_values=1.0,
        reg_tokens=4,
        no_embed_class=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    state = ours.state_dict()
    positions = state.pop("pos_embed")
    state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    del state["mask_token"]
    theirs.load_state_dict(state)
    image = torch.randn(2, 3, 70, 70)
    tokens = ours.encode_blocks(image, (1, 3), "official")
    expected = theirs.forward_intermediates(
        image, indices=[1, 3], norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert tokens[0].shape == (2, 100, 96)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


def test_missing_pretrained_weights_are_refused():
    with pytest.raises(ValueError, match="encoder=vitn "):
        load_hub_weights("vitn")


def test_a_failed_download_names_the_weights(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"vit_small\S+ \(no route to host\)"):
        load_hub_weights("vits")


def test_hub_weights_have_the_encoders_names(monkeypatch):
    spec = replace(ENCODERS["vits"], width=48, depth=4, heads=2, grid=5)
    monkeypatch.setitem(ENCODERS, "vits", spec)
    published = timm.models.vision_transformer.VisionTransformer(
        img_size=70, patch_size=14, embed_dim=48, depth=4, num_heads=2, num_classes=0, init_values=1.0
    )
    asked = []
    monkeypatch.setattr(
        timm, "create_model", lambda name, **settings: asked.append((name, settings)) or published
    )
    state = load_hub_weights("vits")
    assert asked == [("vit_small_patch14_dinov2.lvd142m", {"pretrained": True, "num_classes": 0})]
    assert DINOv2(spec).state_dict().keys() - state.keys() == {"mask_token"}
