"""Masked autoencoding equals transformers' ViTMAE; an encoder file keeps weights, license and origin."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depth_anything import DepthAnything, load_model
from depth_anything.errors import UserError
from depth_anything.model.masked_autoencoder import (
    MaskedAutoencoder,
    join_patches,
    masked_patch_loss,
    normalize_patches,
    save_encoder,
    sine_positions,
    split_patches,
)
from depth_anything.model.weights import has_head, load_encoder, read_license

SIDE, PATCHES, VISIBLE = 70, 100, 25


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    torch.manual_seed(3)
    made = MaskedAutoencoder("vitn", width=32, depth=1, heads=4).eval()
    for parameter in made.parameters():  # no zeros, which would hide a missing term
        parameter.data += 0.02 * torch.randn_like(parameter)
    for name, parameter in made.pretrained.named_parameters():
        if name.endswith("gamma"):  # ViTMAE has no LayerScale
            parameter.data.fill_(1.0)
    return made


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def order() -> torch.Tensor:
    return torch.rand(2, PATCHES, generator=torch.Generator().manual_seed(2)).argsort(1)


def copy_block(theirs: Any, state: dict[str, torch.Tensor], prefix: str, width: int) -> None:
    """Copy a timm block into one of ViTMAE, whose query, key and value are separate."""
    layers = dict(theirs.named_modules())

    def fill(name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        layers[name].weight.data, layers[name].bias.data = weight, bias

    both = {name: (state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"]) for name in
            ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    linear = [name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)]
    norms = [name for name, layer in layers.items() if isinstance(layer, torch.nn.LayerNorm)]
    fill(norms[0], *both["norm1"])
    fill(norms[1], *both["norm2"])
    weights, biases = both["attn.qkv"][0].split(width), both["attn.qkv"][1].split(width)
    for part, weight, bias in zip(("q", "k", "v"), weights, biases, strict=True):
        fill(next(n for n in linear if n.endswith((f"{part}_proj", {"q": "query", "k": "key", "v": "value"}[part]))),
             weight, bias)  # fmt: skip
    others = [n for n in linear if not n.endswith(("q_proj", "k_proj", "v_proj", "query", "key", "value"))]
    for name, ours in zip(others, ("attn.proj", "mlp.fc1", "mlp.fc2"), strict=True):
        fill(name, *both[ours])


@pytest.fixture(scope="module")
def reference(model: MaskedAutoencoder) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384, image_size=SIDE,
        patch_size=7, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
        decoder_intermediate_size=128, mask_ratio=0.75, norm_pix_loss=True, layer_norm_eps=1e-6,
        hidden_act="gelu",
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        vit, decoder = theirs.vit, theirs.decoder
        vit.embeddings.cls_token.copy_(state["pretrained.cls_token"])
        vit.embeddings.position_embeddings.copy_(state["pretrained.pos_embed"])
        vit.embeddings.patch_embeddings.projection.weight.copy_(state["pretrained.patch_embed.proj.weight"])
        vit.embeddings.patch_embeddings.projection.bias.copy_(state["pretrained.patch_embed.proj.bias"])
        blocks = [m for m in theirs.modules() if type(m).__name__ == "ViTMAELayer"]
        for i, block in enumerate(blocks):
            prefix = f"pretrained.blocks.{i}" if i < 4 else f"decoder.blocks.{i - 4}"
            copy_block(block, state, prefix, 96 if i < 4 else 32)
        for layer, name in (
            (vit.layernorm, "pretrained.norm"),
            (decoder.decoder_embed, "decoder.embed"),
            (decoder.decoder_norm, "decoder.norm"),
            (decoder.decoder_pred, "decoder.predict"),
        ):
            layer.weight.copy_(state[f"{name}.weight"])
            layer.bias.copy_(state[f"{name}.bias"])
        decoder.mask_token.copy_(state["decoder.mask_token"])
        # Its decoder leaves the positions at zero in some versions, so they are taken from an encoder of that width.
        small = type(vit.embeddings)(transformers.ViTMAEConfig(hidden_size=32, image_size=SIDE, patch_size=7))
        small.initialize_weights()
        decoder.decoder_pos_embed.copy_(small.position_embeddings)
    return theirs


def test_prediction_and_loss_equal_transformers(
    model: MaskedAutoencoder, reference: Any, image: torch.Tensor, order: torch.Tensor
) -> None:
    noise = torch.empty(2, PATCHES).scatter_(
        1, order, torch.linspace(0, 1, PATCHES).expand(2, -1).contiguous()
    )
    with torch.no_grad():
        theirs = reference(image, noise=noise)
        ours = model(image, order, VISIBLE)
        target = normalize_patches(split_patches(image, 7))[0]
        loss = masked_patch_loss(ours, target, order, VISIBLE)
    assert torch.allclose(ours, theirs.logits, atol=2e-5)
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    positions = reference.decoder.decoder_pos_embed[:, 1:]
    assert torch.allclose(sine_positions((10, 10), 32), positions, atol=1e-6)


def test_loss_equals_numpy_on_masked_patches_only() -> None:
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 3, 6, 12)).astype(np.float32)
    order = np.stack([rng.permutation(6) for _ in range(3)])
    errors = [((predicted[i, j] - target[i, j]) ** 2).mean() for i in range(3) for j in order[i, 2:]]
    predicted[np.arange(3)[:, None], order[:, :2]] = np.inf  # seen patches do not count
    loss = masked_patch_loss(*map(torch.from_numpy, (predicted, target, order)), 2)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-6)


def test_normalized_patches_have_mean_0_and_deviation_1() -> None:
    patches = 5 + 3 * torch.randn(2, 4, 147, generator=torch.Generator().manual_seed(0))
    normalized, mean, deviation = normalize_patches(patches)
    assert normalized.mean(2).abs().max() < 1e-5
    assert torch.allclose(normalized.var(2), torch.ones(2, 4), atol=1e-4)
    assert torch.allclose(normalized * deviation + mean, patches, atol=1e-5)


def test_patches_are_rows_of_pixels_and_join_again() -> None:
    image = torch.arange(3 * 14 * 21, dtype=torch.float32).reshape(1, 3, 14, 21)
    patches = split_patches(image, 7)
    assert patches.shape == (1, 6, 147)
    assert torch.equal(patches[0, 4].reshape(7, 7, 3), image[0, :, 7:14, 7:14].permute(1, 2, 0))
    assert torch.equal(join_patches(patches, (2, 3)), image)


def test_masked_pixels_never_influence_the_prediction(
    model: MaskedAutoencoder, image: torch.Tensor, order: torch.Tensor
) -> None:
    hidden = torch.zeros(2, PATCHES, 1).scatter_(1, order[:, VISIBLE:, None], 1.0)
    changed = split_patches(image, 7) + 100 * hidden
    with torch.no_grad():
        same = model(join_patches(changed, (10, 10)), order, VISIBLE)
        assert torch.equal(same, model(image, order, VISIBLE))


def test_an_encoder_file_loads_into_a_depth_network(model: MaskedAutoencoder, tmp_path: Path) -> None:
    model.licence, model.origin = "CC-BY-4.0", {"stage": "pretrain", "data": []}
    save_encoder(model, tmp_path / "model.safetensors")
    depth = DepthAnything("vitn")
    load_encoder(depth, tmp_path / "model.safetensors")
    for name, tensor in model.pretrained.state_dict().items():
        assert torch.equal(depth.pretrained.state_dict()[name], tensor), name
    assert read_license(tmp_path / "model.safetensors") == "CC-BY-4.0"
    assert not has_head(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="vitt"):
        load_encoder(DepthAnything("vitt"), tmp_path / "model.safetensors")


def test_timm_vits_with_absolute_positions_only() -> None:
    with torch.device("meta"):
        made = MaskedAutoencoder("vit_tiny_patch16_224", width=32, depth=1, heads=4)
        assert made(torch.empty(1, 3, 64, 64), torch.empty(1, 16, dtype=torch.long), 4).shape == (1, 16, 768)
        with pytest.raises(UserError, match="eva02_tiny_patch14_224"):
            MaskedAutoencoder("eva02_tiny_patch14_224")
        with pytest.raises(UserError, match="decoder_width"):
            MaskedAutoencoder("vitn", width=30, heads=4)
