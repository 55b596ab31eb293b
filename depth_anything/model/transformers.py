"""The folders of transformers' DepthAnythingForDepthEstimation, read and written without transformers.

Tensors on disk have the names of its version 4, which version 5 reads and writes still; the names that version 5 has
in memory are read, too. It puts refinement levels the other way round, keeps queries, keys and values apart, and
counts taps from 1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depth_anything.errors import error_reason
from depth_anything.licenses import license_from_card
from depth_anything.model.card import CARD_NAME
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS
from depth_anything.model.metadata import validate_metadata
from depth_anything.model.tensor_files import SUPPORTED_FORMATS, read_tensors, save_safetensors
from depth_anything.preprocess import IMAGENET_MEAN, IMAGENET_STD

MODEL_TYPE = "depth_anything"

# Official name → the file's, either way. What stands in braces is copied.
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
        (f"depth_head.scratch.refinenet{4 - i}.{ours}", f"neck.fusion_stage.layers.{i}.{theirs}")
        for i in range(4)
        for ours, theirs in (
            ("out_conv.{}", "projection.{}"),
            ("resConfUnit{}.conv{}.{}", "residual_layer{}.convolution{}.{}"),
        )
    ),
    ("depth_head.scratch.output_conv1.{}", "head.conv1.{}"),
    ("depth_head.scratch.output_conv2.0.{}", "head.conv2.{}"),
    ("depth_head.scratch.output_conv2.2.{}", "head.conv3.{}"),
)
# Official name → the several that it is made of, one above the other.
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
# Version 5's names in memory → the file's.
_V5_NAMES = (
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.mlp\.down_proj\."), ".mlp.weights_out."),
)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\w+)"))


_TO_TRANSFORMERS = tuple((_pattern(ours), theirs) for ours, theirs in _NAME_PAIRS)
_TO_OFFICIAL = tuple((_pattern(theirs), ours) for ours, theirs in _NAME_PAIRS)
_QKV, _QKV_PARTS = _pattern(_FUSED_NAMES[0][0]), _FUSED_NAMES[0][1]
_FUSED_PARTS = tuple((tuple(_pattern(part) for part in theirs), ours) for ours, theirs in _FUSED_NAMES)


def has_transformers_names(names: Mapping[str, Any]) -> bool:
    """Say whether tensors have transformers' names: those of a depth network or of a DINOv2 alone."""
    starts = ("backbone.embeddings.", "neck.", "embeddings.patch_embeddings.", "dinov2.embeddings.")
    return any(name.startswith(starts) for name in names)


def to_official_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of a transformers file their official names; what has none keeps its own.

    Args:
        tensors: Under the names of the file or of transformers 5 in memory, of a depth network or a DINOv2 alone.

    Returns:
        The same bytes; queries, keys and values in one tensor.
    """
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(?:dinov2\.)?(?=(?:embeddings|encoder|layernorm)\.)", "backbone.", name)
        for pattern, theirs in _V5_NAMES:
            name = pattern.sub(theirs, name)
        if (place := _find_fused_part(name)) is not None:
            parts.setdefault(place[0], {})[place[1]] = tensor
        else:
            found[_rename(name, _TO_OFFICIAL)] = tensor
    for name, tensors_of in parts.items():
        found[name] = torch.cat([tensor for _, tensor in sorted(tensors_of.items())])
    return found


def to_transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a state dict the names of a transformers file; the inverse of `official_names`."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _QKV.fullmatch(name):
            for part, piece in zip(_QKV_PARTS, tensor.chunk(3), strict=True):
                found[part.format(*match.groups())] = piece.contiguous()
        else:
            found[_rename(name, _TO_TRANSFORMERS)] = tensor
    return found


def _find_fused_part(name: str) -> tuple[str, int] | None:
    for patterns, ours in _FUSED_PARTS:
        for i, pattern in enumerate(patterns):
            if match := pattern.fullmatch(name):
                return ours.format(*match.groups()), i
    return None


def _rename(name: str, table: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, other in table:
        if match := pattern.fullmatch(name):
            return other.format(*match.groups())
    return name


# --- Folders ----------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Read a folder as the hub has them.

    Returns:
        The tensors as their files name them, the metadata of the files, and what config.json says: taps, max_depth
        and input_size, or the version.

    Raises:
        ValueError: If the folder is something else, or lacks a part.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} is a LoRA adapter, which is no model by itself: merge it into its base; {SUPPORTED_FORMATS}"
            )
        raise ValueError(f"{folder} is a folder without a config.json; {SUPPORTED_FORMATS}")
    said = _read_config(folder)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for file in _weight_files(folder):
        more, about = read_tensors(file)
        tensors.update(more)
        metadata.update(about)
    return tensors, metadata, said


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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = _read_json(path)
    kind = config.get("model_type")
    if kind is None and {"encoder", "features", "out_channels"} <= config.keys():
        return {"version": 1, "max_depth": None}  # V1's own code, pushed to the hub
    if kind == "dinov2":
        return {}
    if kind != MODEL_TYPE:
        what = (
            f"a transformers model of the type {kind!r}" if kind else "of no type that its config.json names"
        )
        raise ValueError(f"{folder} is {what}, not {MODEL_TYPE!r}; {SUPPORTED_FORMATS}")
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
        raise ValueError(f"{path} makes no sense ({error_reason(error)}); fetch it again") from error
    said = validate_metadata(facts, path)
    said |= {"licence": licence} if (licence := _read_card_license(folder)) else {}
    return said | _read_preprocessor(folder / "preprocessor_config.json")


def _read_preprocessor(path: Path) -> dict[str, Any]:
    """Read the short side that images are resized to, in any of the ways in which transformers has written it."""
    size = _read_json(path, {}).get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return {} if size is None else validate_metadata({"input_size": size}, path)


def _read_card_license(folder: Path) -> str | None:
    """Read the licence that the folder's card says, as all the hub's do."""
    path = folder / CARD_NAME
    return license_from_card(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def _taps_from_backbone(backbone: Mapping[str, Any]) -> tuple[int, ...]:
    """Read which blocks the head reads: stage 0 is the embedding, so that 1 is the first block."""
    if backbone.get("out_indices"):
        return tuple(index - 1 for index in backbone["out_indices"])
    return tuple(int(re.sub(r"^stage", "", str(name))) - 1 for name in backbone["out_features"])


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error_reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no config")
    return content


def is_replaceable_folder(folder: Path) -> bool:
    """Say whether a folder is empty or a depth model's, so that a new model may take its place."""
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
    """Describe a model as transformers' config.json does.

    Raises:
        ValueError: If transformers has no such model: another encoder than DINOv2's, or a largest depth that is no
            whole number of metres.
    """
    spec = ENCODERS.get(model.encoder)
    if spec is None:
        raise ValueError(
            f"transformers' depth_anything has only DINOv2 encoders, so {model.encoder} cannot be written for it; "
            "save as safetensors"
        )
    if model.max_depth is not None and model.max_depth != int(model.max_depth):
        raise ValueError(
            f"transformers takes whole metres only, so max_depth={model.max_depth:g} cannot be written for it; "
            "save as safetensors"
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
        # A relative output is multiplied by it, too: null stops version 5.
        "max_depth": 1 if model.max_depth is None else int(model.max_depth),
        "model_type": MODEL_TYPE,
        "neck_hidden_sizes": list(spec.out_channels),
        "patch_size": spec.patch,
        "reassemble_factors": [4, 2, 1, 0.5],
        "reassemble_hidden_size": spec.width,
    }


def build_preprocessor_config(model: DepthAnything) -> dict[str, Any]:
    """Describe how images are prepared, as preprocessor_config.json of the authors' -hf repositories does."""
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
