"""LoRA: small trainable matrices beside an encoder's frozen ones, put in from outside and merged on the way out.

peft trains them; merging is arithmetic on tensors and does without. A layer W with adapters A (rank, in) and
B (out, rank) computes x (W + SCALE · B·A)ᵀ.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from depth_anything.model.depth_anything import DepthAnything

LORA_SCALE = 2.0
"""peft's lora_alpha / rank. Adam takes any other one back with its rate, so that it is no option."""

#: What a checkpoint says of the adapters in it.
LORA_METADATA_KEY = "lora_scale"
_LAYER_NAMES = frozenset("qkv q_proj k_proj v_proj proj fc1 fc1_g fc1_x fc2 w12 w3".split())
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def import_peft() -> Any:
    """Import peft, which nothing else here needs.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return import_module("peft")
    except ImportError as error:
        raise ValueError(
            f'lora needs peft ({error}); type  pip install "depth-anything-train[lora]"  or lora=null'
        ) from error


def add_adapters(model: DepthAnything, rank: int) -> None:
    """Freeze a model's encoder and give each linear layer that the head hears of adapters, which start at nothing.

    Call it once, with the weights loaded, before `accelerate` and the optimizer. The state dict then has peft's names;
    `merged` makes the plain ones of it.

    Args:
        model: Changed in place; the head stays as it is.
        rank: Width of the adapters.

    Raises:
        ValueError: If peft is missing, the encoder is built otherwise, or the rank exceeds its width.
    """
    peft = import_peft()
    targets = adaptable_layers(model)
    if not targets:
        raise ValueError(
            f"lora={rank} finds no layers that it knows in encoder={model.encoder}; type lora=null"
        )
    width = model.pretrained.embed_dim
    if rank > width:
        raise ValueError(f"lora={rank} exceeds the {width} channels of encoder={model.encoder}; type lora=8")
    settings = peft.LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, lora_dropout=0.0, target_modules=targets)
    peft.inject_adapter_in_model(settings, model.pretrained)  # freezes what is not an adapter


def adaptable_layers(model: DepthAnything) -> list[str]:
    """List the linear layers, by their names in the encoder, that compute what the head reads."""
    modules = dict(model.pretrained.named_modules())
    return [
        name
        for block in range(model.taps[-1] + 1)
        for name, layer in modules.items()
        if name.startswith(f"blocks.{block}.")
        and isinstance(layer, nn.Linear)
        and _runs_as_module(modules, name)
    ]


def _runs_as_module(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Tell layers that run as modules; timm's Eva takes the bare weight where q and v alone have a bias."""
    owner, _, leaf = name.rpartition(".")
    return leaf in _LAYER_NAMES and (leaf != "qkv" or getattr(modules[owner], "q_bias", None) is None)


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a model has adapters."""
    return any(name.endswith(_LORA_B) for name, _ in model.named_parameters())


def lora_metadata(model: nn.Module) -> dict[str, str]:
    """Say in a checkpoint what its adapters do not: their scale; nothing of a plain model."""
    return {LORA_METADATA_KEY: str(LORA_SCALE)} if has_adapters(model) else {}


def merge_adapters(tensors: Mapping[str, Tensor], scale: float = LORA_SCALE) -> dict[str, Tensor]:
    """Make the tensors of the plain network out of those with adapters, in float64, rounded once.

    Args:
        tensors: A state dict, under any prefix; without adapters it comes back as it is.
        scale: What B·A counts.

    Returns:
        Names, shapes and types as without adapters, on the tensors' device.

    Raises:
        KeyError: If a part of an adapter is missing.
        RuntimeError: If one does not fit its layer.
    """
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    for name in [name for name in plain if name.endswith(_LORA_B)]:
        layer = name.removesuffix(_LORA_B)
        up, down = plain.pop(name), plain.pop(layer + _LORA_A)
        weight = plain[f"{layer}.weight"]
        change = torch.mm(up.double(), down.double()) * scale
        plain[f"{layer}.weight"] = weight.double().add_(change).to(weight.dtype)
    return plain
