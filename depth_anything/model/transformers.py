"""Read and write folders of transformers' DepthAnythingForDepthEstimation without that library.

Tensors in files have the names of version 4, which version 5 still reads and writes; its names in memory are read,
too. It orders the refinement levels the other way, has separate queries, keys and values, and counts taps from 1.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from depth_anything.errors import Argument, UserError, error_reason
from depth_anything.licenses import license_from_card
from depth_anything.model.card import CARD_NAME
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS
from depth_anything.model.metadata import ModelFacts, validate_metadata
from depth_anything.model.tensor_files import SUPPORTED_FORMATS, read_tensors, save_safetensors
from depth_anything.preprocess import IMAGENET_MEAN, IMAGENET_STD

MODEL_TYPE = "depth_anything"

# Official name → transformers' name, used in both directions; {} matches a word.
_NAME_PAIRS = (
    ("pretrained.cls_token", "backbone.embeddings.cls_token"),
    ("pretrained.mask_token", "backbone.embeddings.mask_token"),
    ("pretrained.pos_embed", "backbone.embeddings.position_embeddings"),
    ("pretrained.patch_embed.proj.{}", "backbone.embeddings.patch_embeddings.projection.{}"),
    ("pretrained.norm.{}", "backbone.layernorm.{}"),
    ("pretrained.blocks.{}.norm{}.{}", "backbone.encoder.layer.{}.norm{}.{}"),
    ("pretrained.blocks.{}.attn.proj.{}", "backbone.encoder.layer.{}.attention.output.dense.{}"),
    ("pretrained.blocks.{}.ls{}.gamma", "backbone.encoder.layer.{}.layer_scale{}.lambda1"),
    ("pretrained.blocks.{}.mlp.fc{}.{}", "backbone.encoder.layer.{}.mlp.fc{}.{}"),
    ("pretrained.blocks.{}.mlp.w12.{}", "backbone.encoder.layer.{}.mlp.weights_in.{}"),
    ("pretrained.blocks.{}.mlp.w3.{}", "backbone.encoder.layer.{}.mlp.weights_out.{}"),
    ("depth_head.projects.{}.{}", "neck.reassemble_stage.layers.{}.projection.{}"),
    ("depth_head.resize_layers.{}.{}", "neck.reassemble_stage.layers.{}.resize.{}"),
    *((f"depth_head.scratch.layer{i + 1}_rn.{{}}", f"neck.convs.{i}.{{}}") for i in range(4)),
    *(
        (f"depth_head.scratch.refinenet{4 - i}.{official}", f"neck.fusion_stage.layers.{i}.{theirs}")
        for i in range(4)
        for official, theirs in (
            ("out_conv.{}", "projection.{}"),
            ("resConfUnit{}.conv{}.{}", "residual_layer{}.convolution{}.{}"),
        )
    ),
    ("depth_head.scratch.output_conv1.{}", "head.conv1.{}"),
    ("depth_head.scratch.output_conv2.0.{}", "head.conv2.{}"),
    ("depth_head.scratch.output_conv2.2.{}", "head.conv3.{}"),
)
# Official name → transformers' names of the tensors that are concatenated to it.
_FUSED_NAMES = (
    (
        "pretrained.blocks.{}.attn.qkv.{}",
        tuple(
            f"backbone.encoder.layer.{{}}.attention.attention.{part}.{{}}"
            for part in ("query", "key", "value")
        ),
    ),
    (
        "pretrained.blocks.{}.mlp.w12.{}",
        tuple(f"backbone.encoder.layer.{{}}.mlp.{part}.{{}}" for part in ("gate_proj", "up_proj")),
    ),
)
# Names of version 5 in memory → names in files.
_V5_NAMES = (
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.mlp\.down_proj\."), ".mlp.weights_out."),
)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\w+)"))


_TO_TRANSFORMERS = tuple((_pattern(official), theirs) for official, theirs in _NAME_PAIRS)
_TO_OFFICIAL = tuple((_pattern(theirs), official) for official, theirs in _NAME_PAIRS)
_QKV, _QKV_PARTS = _pattern(_FUSED_NAMES[0][0]), _FUSED_NAMES[0][1]
_FUSED_PARTS = tuple(
    (tuple(_pattern(part) for part in theirs), official) for official, theirs in _FUSED_NAMES
)


def has_transformers_names(names: Iterable[str]) -> bool:
    """Return whether names are those of transformers, of a depth network or of a DINOv2 alone."""
    starts = ("backbone.embeddings.", "neck.", "embeddings.patch_embeddings.", "dinov2.embeddings.")
    return any(name.startswith(starts) for name in names)


def to_official_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors to official names; unknown names are kept.

    Args:
        tensors: With the names of files or of transformers 5 in memory, of a depth network or a DINOv2 alone.

    Returns:
        The same values, with queries, keys and values in one tensor.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(?:dinov2\.)?(?=(?:embeddings|encoder|layernorm)\.)", "backbone.", name)
        for pattern, theirs in _V5_NAMES:
            name = pattern.sub(theirs, name)
        if (place := _find_fused_part(name)) is not None:
            parts.setdefault(place[0], {})[place[1]] = tensor
        else:
            renamed[_rename(name, _TO_OFFICIAL)] = tensor
    for name, tensors_of in parts.items():
        renamed[name] = torch.cat([tensor for _, tensor in sorted(tensors_of.items())])
    return renamed


def to_transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict to the names of transformers' files; the inverse of `to_official_names`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _QKV.fullmatch(name):
            for part, piece in zip(_QKV_PARTS, tensor.chunk(3), strict=True):
                renamed[part.format(*match.groups())] = piece.contiguous()
        else:
            renamed[_rename(name, _TO_TRANSFORMERS)] = tensor
    return renamed


def _find_fused_part(name: str) -> tuple[str, int] | None:
    for patterns, official in _FUSED_PARTS:
        for i, pattern in enumerate(patterns):
            if match := pattern.fullmatch(name):
                return official.format(*match.groups()), i
    return None


def _rename(name: str, table: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, other in table:
        if match := pattern.fullmatch(name):
            return other.format(*match.groups())
    return name


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], ModelFacts]:
    """Read a transformers folder.

    Returns:
        The tensors and metadata of its weight files, and the facts in its config, preprocessor config and card.

    Raises:
        ValueError: If the folder is something else or incomplete.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} is a LoRA adapter without its base model: merge it into its base",
                SUPPORTED_FORMATS,
            )
        raise UserError(f"{folder} is a folder without a config.json", SUPPORTED_FORMATS)
    facts = _read_config(folder)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for file in _weight_files(folder):
        file_tensors, file_metadata = read_tensors(file)
        tensors.update(file_tensors)
        metadata.update(file_metadata)
    return tensors, metadata, facts


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        parts = _read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts:
            raise ValueError(f"{index} has no weight_map that says where the tensors are")
        files = sorted({str(part) for part in parts.values()})
        for file in files:
            if Path(file).name != file or not (folder / file).is_file():
                raise ValueError(f"{folder} is not complete: {index.name} names {file}, which is not there")
        return [folder / file for file in files]
    raise ValueError(
        f"{folder} has a config.json and no weights: model.safetensors or pytorch_model.bin is missing"
    )


def _read_config(folder: Path) -> ModelFacts:
    path = folder / "config.json"
    config = _read_json(path)
    kind = config.get("model_type")
    if kind is None and {"encoder", "features", "out_channels"} <= config.keys():
        return {"version": 1, "max_depth": None}  # from PyTorchModelHubMixin of the V1 code
    if kind == "dinov2":
        return {}
    if kind != MODEL_TYPE:
        what = (
            f"a transformers model of the type {kind!r}"
            if kind
            else "a model without a type in its config.json"
        )
        raise UserError(f"{folder} is {what}, not {MODEL_TYPE!r}", SUPPORTED_FORMATS)
    backbone = config.get("backbone_config")
    if not isinstance(backbone, dict) or backbone.get("model_type", "dinov2") != "dinov2":
        other = backbone.get("model_type") if isinstance(backbone, dict) else config.get("backbone")
        raise ValueError(f"{folder} has a backbone of the type {other!r}; only 'dinov2' is read")
    try:
        kind = config.get("depth_estimation_type", "relative")
        if kind not in ("relative", "metric") or (kind == "metric" and config["max_depth"] is None):
            raise ValueError(f"depth_estimation_type={kind!r} with max_depth={config.get('max_depth')!r}")
        facts = {
            "taps": _taps_from_backbone(backbone),
            "max_depth": config["max_depth"] if kind == "metric" else None,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is invalid ({error_reason(error)})", "fetch it again") from error
    valid = {**validate_metadata(facts, path), **_read_preprocessor(folder / "preprocessor_config.json")}
    if licence := _read_card_license(folder):
        valid["licence"] = licence
    return cast(ModelFacts, valid)


def _read_preprocessor(path: Path) -> ModelFacts:
    """Read the shorter image side, in any format that versions of transformers wrote."""
    size = _read_json(path, optional=True).get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return {} if size is None else validate_metadata({"input_size": size}, path)


def _read_card_license(folder: Path) -> str | None:
    """Read the license from the front matter of the folder's model card."""
    path = folder / CARD_NAME
    return license_from_card(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def _taps_from_backbone(backbone: Mapping[str, Any]) -> tuple[int, ...]:
    """Read the blocks that the head reads: stage 0 is the embedding, stage 1 the first block."""
    if backbone.get("out_indices"):
        return tuple(index - 1 for index in backbone["out_indices"])
    return tuple(int(re.sub(r"^stage", "", str(name))) - 1 for name in backbone["out_features"])


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error_reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a config")
    return content


def is_replaceable_folder(folder: Path) -> bool:
    """Return whether a folder is missing, empty or a depth model, so that a new model may replace it."""
    if not folder.exists():
        return True
    config = folder / "config.json"
    try:
        return folder.is_dir() and (
            next(folder.iterdir(), None) is None or _read_json(config).get("model_type") == MODEL_TYPE
        )
    except ValueError:
        return False


def write_folder_files(
    model: DepthAnything, state: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path
) -> None:
    """Write the files that transformers reads into an existing folder.

    Args:
        model: The model of the tensors.
        state: Its tensors under official names, on the CPU.
        metadata: Metadata of the safetensors file.
        folder: Where to write.

    Raises:
        ValueError: If transformers has no such model.
    """
    config, preprocessor = build_config(model), build_preprocessor_config(model)
    save_safetensors(to_transformers_names(state), folder / "model.safetensors", metadata)
    _write_json(config, folder / "config.json")
    _write_json(preprocessor, folder / "preprocessor_config.json")


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_config(model: DepthAnything) -> dict[str, Any]:
    """Build the config.json of transformers.

    Raises:
        UserError: If transformers cannot represent the model: another encoder than DINOv2, or a fractional max_depth.
    """
    spec = ENCODERS.get(model.encoder)
    if spec is None or spec.registers:
        raise UserError(
            f"transformers' depth_anything supports DINOv2 encoders without registers only, not {model.encoder}",
            "save as safetensors",
        )
    if model.max_depth is not None and model.max_depth != int(model.max_depth):
        raise UserError(
            ["transformers supports whole meters only, not ", Argument("max_depth", model.max_depth)],
            "save as safetensors",
        )
    taps = [tap + 1 for tap in model.taps]
    return {
        "architectures": ["DepthAnythingForDepthEstimation"],
        "backbone_config": {
            "apply_layernorm": True,
            "architectures": ["Dinov2Model"],
            "hidden_size": spec.width,
            "image_size": spec.patch * spec.grid,
            "layer_norm_eps": 1e-6,
            "mlp_ratio": 4,
            "model_type": "dinov2",
            "num_attention_heads": spec.heads,
            "num_hidden_layers": spec.depth,
            "out_features": [f"stage{tap}" for tap in taps],
            "out_indices": taps,
            "patch_size": spec.patch,
            "reshape_hidden_states": False,
            "use_swiglu_ffn": spec.swiglu,
        },
        "depth_estimation_type": "relative" if model.max_depth is None else "metric",
        "fusion_hidden_size": spec.features,
        "head_hidden_size": 32,
        "head_in_index": -1,
        # A relative output is multiplied by it, too, and version 5 fails with null.
        "max_depth": 1 if model.max_depth is None else int(model.max_depth),
        "model_type": MODEL_TYPE,
        "neck_hidden_sizes": list(spec.out_channels),
        "patch_size": spec.patch,
        "reassemble_factors": [4, 2, 1, 0.5],
        "reassemble_hidden_size": spec.width,
    }


def build_preprocessor_config(model: DepthAnything) -> dict[str, Any]:
    """Build the preprocessor_config.json, as in the official -hf repositories."""
    return {
        "do_normalize": True,
        "do_pad": False,
        "do_rescale": True,
        "do_resize": True,
        "ensure_multiple_of": model.multiple,
        "image_mean": list(IMAGENET_MEAN),
        "image_processor_type": "DPTImageProcessor",
        "image_std": list(IMAGENET_STD),
        "keep_aspect_ratio": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": model.input_size, "width": model.input_size},
        "size_divisor": None,
    }
