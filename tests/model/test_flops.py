"""FLOP of the official networks: the counter, a closed formula written here, and published counts agree."""

import pytest
import torch

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.flops import count_flops, count_forward_flops

# Encoder: width, depth, FLOP of the MLP per token in units of width²; and the head's channels.
SHAPES = {
    "vits": (384, 12, 16.0, 64, (48, 96, 192, 384)),
    "vitb": (768, 12, 16.0, 128, (96, 192, 384, 768)),
    "vitl": (1024, 24, 16.0, 256, (256, 512, 1024, 1024)),
    "vitg": (1536, 40, 6 * 4096 / 1536, 384, (1536,) * 4),  # SwiGLU of 4096: three products instead of two
}
PATCH = 14


def encoder_flops(encoder: str, height: int, width: int) -> float:
    """Per block 8·N·D² for qkv and the projection, the MLP, and 4·N²·D for attention; and the patch embedding."""
    dim, depth, mlp, _, _ = SHAPES[encoder]
    patches = height * width // PATCH**2
    tokens = patches + 1
    block = (8 + mlp) * tokens * dim**2 + 4 * tokens**2 * dim
    return depth * block + 2 * patches * 3 * PATCH**2 * dim


def head_flops(encoder: str, height: int, width: int) -> float:
    """Twice the weights of each convolution for each pixel that it is applied at; official order of operations.

    The 1×1 convolution of a fusion block is here counted before the enlargement, as this project computes it.
    """
    dim, _, _, features, channels = SHAPES[encoder]
    h, w = height // PATCH, width // PATCH
    pixels = [16 * h * w, 4 * h * w, h * w, ((h + 1) // 2) * ((w + 1) // 2)]
    macs = float(sum(h * w * dim * c for c in channels))  # projections
    macs += h * w * (16 * channels[0] ** 2 + 4 * channels[1] ** 2) + pixels[3] * 9 * channels[3] ** 2
    macs += sum(n * 9 * c * features for n, c in zip(pixels, channels, strict=True))
    macs += 2 * 9 * features**2 * (pixels[3] + 2 * sum(pixels[:3]))  # residual units
    macs += features**2 * sum(pixels)
    macs += 4 * pixels[0] * 9 * features * (features // 2)
    macs += height * width * (9 * (features // 2) * 32 + 32)
    return 2 * macs


def meta_network(encoder: str) -> DepthAnything:
    with torch.device("meta"):
        return DepthAnything(encoder)


@pytest.mark.parametrize("encoder", SHAPES)
def test_counts_are_those_of_the_closed_formula(encoder: str) -> None:
    model = meta_network(encoder)
    formula = encoder_flops(encoder, 518, 518) + head_flops(encoder, 518, 518)
    counted = count_flops(model, 518, 518)
    assert counted.forward == pytest.approx(formula, rel=0.02)
    assert counted.step == pytest.approx(3 * formula, rel=0.02)
    assert counted.recomputed == 0


def test_counts_grow_with_the_frame_as_the_formula() -> None:
    formula = encoder_flops("vits", 518, 686) + head_flops("vits", 518, 686)
    counted = count_forward_flops(meta_network("vits"), 518, 686)
    assert counted == count_flops(meta_network("vits"), 518, 686).forward
    assert counted == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize("encoder", ["vits", "vitb"])
def test_a_frozen_encoder_adds_a_forward_pass_of_the_encoder(encoder: str) -> None:
    plain = count_flops(meta_network(encoder), 518, 518)
    aligned = count_flops(meta_network(encoder), 518, 518, frozen_encoder=True)
    assert aligned.step - plain.step == pytest.approx(encoder_flops(encoder, 518, 518), rel=0.02)


def test_checkpointing_repeats_the_blocks_of_the_encoder_once() -> None:
    counted = count_flops(meta_network("vits"), 518, 518, checkpointing=True)
    plain = count_flops(meta_network("vits"), 518, 518)
    assert (counted.forward, counted.step) == (plain.forward, plain.step)
    assert counted.recomputed == pytest.approx(encoder_flops("vits", 518, 518), rel=0.02)


def test_frozen_parameters_have_no_backward_pass() -> None:
    model = meta_network("vits")
    model.pretrained.requires_grad_(False)
    frozen = count_flops(model, 518, 518)
    head = head_flops("vits", 518, 518)
    assert frozen.step - frozen.forward == pytest.approx(2 * head, rel=0.1)
