"""LoRA: trainable low-rank adapters for the frozen linear layers of the encoder.

peft adds and trains them; merging into the weights needs tensors only. A layer W with adapters A (rank, in) and
B (out, rank) computes x (W + LORA_SCALE · B·A)ᵀ.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from depth_anything.errors import UserError
from depth_anything.model.depth_anything import DepthAnything

LORA_SCALE = 2.0
"""lora_alpha / rank of peft. It is not an option: with Adam, another scale equals another learning rate."""

LORA_METADATA_KEY = "lora_scale"
"""Key of a checkpoint's metadata for the scale of its adapters."""

_LAYER_NAMES = frozenset("qkv q_proj k_proj v_proj proj fc1 fc1_g fc1_x fc2 w12 w3".split())
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def import_peft() -> Any:
    """Import peft, an optional dependency.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return import_module("peft")
    except ImportError as error:
        raise UserError(
            f"lora needs peft ({error})", 'type  pip install "depth-anything-train[lora]"  or lora=null'
        ) from error


def add_adapters(model: DepthAnything, rank: int) -> None:
    """Freeze the encoder and add zero-initialized LoRA adapters to every linear layer that feeds the head.

    Call it once, after loading the weights and before `accelerate` and the optimizer. The state dict then has the
    names of peft; `merge_adapters` restores the plain ones.

    Args:
        model: Changed in place; the head stays unchanged.
        rank: Rank of the adapters.

    Raises:
        UserError: If peft is missing, the encoder has no known layers, or the rank exceeds its width.
    """
    peft = import_peft()
    targets = adaptable_layers(model)
    if not targets:
        raise UserError(f"lora={rank} finds no known layers in encoder={model.encoder}", "type lora=null")
    width = model.pretrained.embed_dim
    if rank > width:
        raise UserError(f"lora={rank} exceeds the {width} channels of encoder={model.encoder}", "type lora=8")
    settings = peft.LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, lora_dropout=0.0, target_modules=targets)
    peft.inject_adapter_in_model(settings, model.pretrained)  # freezes what is not an adapter


def adaptable_layers(model: DepthAnything) -> list[str]:
    """List the names of the encoder's linear layers up to the last block that the head reads."""
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
    """Return whether a layer is called; timm's Eva uses only the weight of qkv where q and v have their own bias."""
    owner, _, leaf = name.rpartition(".")
    return leaf in _LAYER_NAMES and (leaf != "qkv" or getattr(modules[owner], "q_bias", None) is None)


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has LoRA adapters."""
    return any(name.endswith(_LORA_B) for name, _ in model.named_parameters())


def lora_metadata(model: nn.Module) -> dict[str, str]:
    """Return the metadata of a checkpoint with adapters: their scale; {} without adapters."""
    return {LORA_METADATA_KEY: str(LORA_SCALE)} if has_adapters(model) else {}


def merge_adapters(tensors: Mapping[str, Tensor], scale: float = LORA_SCALE) -> dict[str, Tensor]:
    """Merge LoRA adapters into the weights, in float64, rounded once.

    Args:
        tensors: A state dict with any prefix; without adapters it is returned unchanged.
        scale: Factor of B·A.

    Returns:
        A state dict without adapters, with the same types and devices.

    Raises:
        KeyError: If a part of an adapter is missing.
        RuntimeError: If an adapter does not fit its layer.
    """
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    for name in [name for name in plain if name.endswith(_LORA_B)]:
        layer = name.removesuffix(_LORA_B)
        up, down = plain.pop(name), plain.pop(layer + _LORA_A)
        weight = plain[f"{layer}.weight"]
        change = torch.mm(up.double(), down.double()) * scale
        plain[f"{layer}.weight"] = weight.double().add_(change).to(weight.dtype)
    return plain
