"""Load and save models in every format: official .pth, .safetensors, Lightning .ckpt and transformers folders.

Nothing in a file is ever executed. A file that is damaged, hostile or of another kind raises one clear error.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depth_anything.data.local_copy import errors_with_addresses, local_path
from depth_anything.disk import atomic_folder, atomic_path
from depth_anything.errors import Argument, ArgumentWarning, Text, UserError
from depth_anything.model import transformers
from depth_anything.model.card import CARD_NAME, build_card, is_replaceable_card
from depth_anything.model.depth_anything import DepthAnything, HeadBuilder, head_name
from depth_anything.model.encoder import ENCODERS, canonical_encoder_name, load_hub_weights, rename_swiglu
from depth_anything.model.lora import merge_adapters
from depth_anything.model.masked_autoencoder import MaskedAutoencoder
from depth_anything.model.metadata import (
    MAX_DEPTH_RANGE_M,
    SEGMENTATION_KIND,
    ModelFacts,
    build_metadata,
    parse_metadata,
)
from depth_anything.model.official_weights import name_hints, official_license, official_repository
from depth_anything.model.segmentation import SegmentationModel
from depth_anything.model.segmentation_files import build_segmentation_metadata
from depth_anything.model.sharded_files import is_sharded, read_sharded_tensors
from depth_anything.model.tensor_files import (
    SUPPORTED_FORMATS,
    WRITE_ERRORS,
    read_tensors,
    save_safetensors,
    save_torch,
    summarize_names,
)

FORMATS = ("safetensors", "official", "transformers")

_V1_ENCODERS = ("vits", "vitb", "vitl")
# Prefixes and infixes that DDP, Lightning, torch.compile, FSDP and checkpointing add to parameter names.
_WRAPPERS = re.compile(
    r"^(?:(?:module|model|_orig_mod)\.)+|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."
)
_MASK_TOKEN = "mask_token"  # in official files, unused by the forward pass, and optional


def load_model(
    path: str | Path,
    *,
    encoder: str | None = None,
    max_depth: float | None = None,
    version: int | None = None,
    head: HeadBuilder | None = None,
) -> DepthAnything:
    """Load a model from a file of any supported format. Code in the file is never executed.

    The metadata of the file, else its official name, else the tensor shapes say which model it is. What is still
    unknown is assumed to be V2 and disparity, with a warning. An argument overrides the file, with a warning.

    Args:
        path: An official .pth (V1, V2 or metric), a .safetensors or .ckpt of this project (a file, or the folder that
            trainer=fsdp writes), the folder of a finished run, or a transformers folder. Parameter names may have
            prefixes of wrappers (DDP, compile), and the state dict may be stored under "model" or "state_dict". Also
            the address of any of these in an object store (s3://, gs://), as a text; it is copied to the cache folder.
        encoder: Name of the encoder; needed for a timm ViT in a file without metadata.
        max_depth: Depth in meters that an output of 1 means; for metric models.
        version: 1 or 2: Depth Anything V1 or V2, which read different encoder blocks.
        head: Builder of the decoder, for a model that was saved with another decoder than `DPTHead`.

    Returns:
        The model in eval mode, on the CPU, in float32.

    Raises:
        UserError: If an argument is invalid or missing.
        ValueError: If the file is missing, damaged, of another kind or size, or contains code.
    """
    _check_arguments(version, max_depth)
    if isinstance(path, str) and "://" in path:
        with errors_with_addresses():
            copy = local_path(path)
            return load_model(copy, encoder=encoder, max_depth=max_depth, version=version, head=head)
    path = Path(path)
    tensors, metadata = _read_model(path)
    facts: ModelFacts = {**name_hints(path), **metadata}
    name = canonical_encoder_name(encoder or facts.get("encoder") or _detect_encoder(tensors, path))
    _check_head(path, facts.get("head"), head)
    model = _build_empty(
        name,
        path if encoder is None else None,
        taps=_resolve_taps(path, name, facts, version),
        max_depth=_resolve_max_depth(path, facts, max_depth),
        head=head,
        check=lambda model: _check_tensors(tensors, model, path, name),
    )
    model.load_state_dict(tensors, strict=False)
    model.input_size = facts.get("input_size", model.input_size)
    model.licence = facts.get("licence") or name_hints(path).get("licence")
    model.calibration = facts.get("calibration")
    model.canonical_focal = None if model.max_depth is None else facts.get("canonical_focal")
    model.origin = facts.get("origin") or _official_origin(path)
    return model.eval()


def save_model(
    model: DepthAnything | SegmentationModel, path: str | Path, *, format: str = "safetensors"
) -> None:
    """Write a model atomically.

    Args:
        model: On any device. LoRA adapters are merged into the weights.
        path: The file, or the folder for "transformers". Parent folders are created, an older file is replaced.
        format: "safetensors" keeps everything that `load_model` needs. "transformers" writes a folder for
            `DepthAnythingForDepthEstimation.from_pretrained`. "official" writes the .pth of the authors' code, which
            has tensors only: the file name or arguments of `load_model` must say the rest.

    Raises:
        ValueError: If the format is unknown or cannot hold the model, or the folder holds something else.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if format not in FORMATS:
        raise UserError([Argument("format", repr(format)), " is unknown"], f"use one of {', '.join(FORMATS)}")
    if format != "safetensors" and model.head is not None:
        raise UserError(f"the format {format} cannot hold the head {model.head}", "save as safetensors")
    if format == "transformers" and isinstance(model, DepthAnything):
        _save_transformers(model, path)
        return
    if format == "official" and isinstance(model, DepthAnything):
        _warn_lost_facts(model, path)
    with atomic_path(path, make_folder=True, also=WRITE_ERRORS) as temporary:
        if format == "safetensors":
            write_model(model, temporary)
        else:
            save_torch(_merged_state(model), temporary)


def write_model(model: DepthAnything | SegmentationModel, path: Path) -> None:
    """Write a safetensors file in place; for a file that others read, pass a temporary path."""
    is_depth = not isinstance(model, SegmentationModel)
    metadata = build_metadata(model) if is_depth else build_segmentation_metadata(model)
    save_safetensors(_merged_state(model), path, metadata)


def _merged_state(model: nn.Module) -> dict[str, Tensor]:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return merge_adapters(state)


def _save_transformers(model: DepthAnything, path: Path) -> None:
    if not transformers.is_replaceable_folder(path):
        raise UserError(
            f"{path} exists and is not a transformers folder of a depth model", "give another name"
        )
    replace_card = is_replaceable_card(path / CARD_NAME)
    with atomic_folder(path, keep_others=True, also=WRITE_ERRORS) as folder:
        transformers.write_folder_files(model, _merged_state(model), build_metadata(model), folder)
        if replace_card:
            title = f"Depth Anything {model.encoder}"
            text = build_card(model, file="path/to/this/folder", form="transformers", title=title)
            (folder / CARD_NAME).write_text(text, encoding="utf-8")
    if model.calibration is not None:
        _warn(f"{path} keeps the calibration for load_model only; transformers will predict disparity")
    if model.canonical_focal is not None:
        _warn(
            f"{path} keeps the canonical focal length for load_model only; transformers will predict the depth of a "
            f"camera of {model.canonical_focal:g} px"
        )


def read_license(path: str | Path) -> str | None:
    """Return the license of the weights in a file or folder, if the file or its official name says it.

    Raises:
        ValueError: As `load_model`, if the file is missing or not a checkpoint.
    """
    return _read_checkpoint(Path(path))[1].get("licence") or official_license(path)


def has_head(path: str | Path) -> bool:
    """Return whether a file holds a whole depth network and not only an encoder.

    Raises:
        ValueError: As `load_model`, if the file is missing or not a checkpoint.
    """
    return any(name.startswith("depth_head.") for name in _read_checkpoint(Path(path))[0])


def read_head_name(path: str | Path) -> str | None:
    """Return the head that the metadata of a file names; None for `DPTHead` and if the file does not say it.

    Raises:
        ValueError: As `load_model`, if the file is missing or not a checkpoint.
    """
    return _read_checkpoint(Path(path))[1].get("head")


def load_encoder(model: DepthAnything | MaskedAutoencoder, source: str | Path) -> None:
    """Load pretrained weights into a model's encoder; the head or decoder stays unchanged.

    Args:
        model: Changed in place.
        source: "hub" downloads the encoder's weights through timm. Else a .pth or .safetensors file of an encoder
            with the names of DINOv2 or timm, or of a whole Depth Anything model.

    Raises:
        ValueError: If the weights are not available or belong to another encoder.
    """
    if source == "hub":
        tensors = load_hub_weights(model.encoder)
    else:
        tensors = _encoder_tensors(_read_checkpoint(Path(source))[0])
        if "blocks.0.mlp.w12.weight" in model.pretrained.state_dict():
            tensors = rename_swiglu(tensors)
    _check_tensors(tensors, model.pretrained, source, f"the encoder {model.encoder}")
    model.pretrained.load_state_dict(tensors, strict=False)


def fingerprint(model: nn.Module | str | Path) -> str:
    """Hash the weights of a model; the same for a model and any file of it, in any format and on any device.

    Args:
        model: A model, or a file as `load_model` takes it.

    Returns:
        "sha256:" and the hash over names, shapes and bytes of all tensors, half precisions as float32.
    """
    if isinstance(model, nn.Module):
        tensors = merge_adapters(model.state_dict())
    else:
        tensors, _ = _read_model(local_path(model))
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.endswith(_MASK_TOKEN):
            continue
        tensor = tensor.detach().cpu()
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


def _check_arguments(version: int | None, max_depth: float | None) -> None:
    if version not in (None, 1, 2):
        raise UserError([Argument("version", version), " must be 1 or 2"])
    low, high = MAX_DEPTH_RANGE_M
    if max_depth is not None and not low <= max_depth <= high:
        raise UserError([Argument("max_depth", max_depth), f" must be from {low:g} to {high:g} meters"])


def _check_head(path: Path, saved: str | None, head: HeadBuilder | None) -> None:
    """Raise UserError unless `head` is the one that the file names; a file never makes this code import anything."""
    if saved is not None and saved != head_name(head):
        raise UserError(f"{path} was saved with the head {saved}", ["give ", Argument("head", saved)])


def _build_empty(
    name: str,
    path: Path | None,
    *,
    taps: tuple[int, ...] | None,
    max_depth: float | None,
    head: HeadBuilder | None,
    check: Callable[[DepthAnything], None],
) -> DepthAnything:
    """Build a model whose parameters will be overwritten, if possible without initializing them.

    Args:
        name: The encoder.
        path: The file that names the encoder, for errors; None if an argument does.
        taps: As `DepthAnything`.
        max_depth: As `DepthAnything`.
        head: As `DepthAnything`.
        check: Raises before memory is allocated: a small file may name a large encoder.
    """

    def build() -> DepthAnything:
        return DepthAnything(name, taps=taps, max_depth=max_depth, head=head)

    try:
        with torch.device("meta"):
            model = build()
    except ValueError as error:
        if path is None:
            raise
        raise ValueError(f"{path}: {error}") from error
    check(model)
    if name not in ENCODERS or head is not None:  # may have constants that are not in the state dict
        with torch.random.fork_rng(devices=[]):
            return build()
    model.to_empty(device="cpu")
    nn.init.zeros_(model.pretrained.mask_token)
    return model


def _read_model(path: Path) -> tuple[dict[str, Tensor], ModelFacts]:
    """Read a whole model: its tensors under official names, and its metadata."""
    tensors, facts = _read_checkpoint(path)
    if facts.get("kind") == SEGMENTATION_KIND:
        raise UserError(
            f"{path} is a segmentation model, which predicts classes, not depth",
            "use it with  depth-anything predict  or  evaluate , or as init= of a stage, which takes its encoder",
        )
    # A training checkpoint may hold other networks. Names that `to_official_names` left are kept, to be reported.
    prefixes = ("pretrained.", "depth_head.", "backbone.", "neck.", "head.")
    tensors = {name: t for name, t in tensors.items() if name.startswith(prefixes)} or tensors
    if not any(name.startswith("depth_head.") for name in tensors):
        if "patch_embed.proj.weight" in tensors or "pretrained.patch_embed.proj.weight" in tensors:
            raise UserError(f"{path} holds an encoder without a depth head", SUPPORTED_FORMATS)
        raise UserError(
            f"{path} holds no Depth Anything model (it has {summarize_names(tensors)})", SUPPORTED_FORMATS
        )
    return tensors, facts


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], ModelFacts]:
    """Read any checkpoint: its tensors without the prefixes of wrappers, and its metadata."""
    config: ModelFacts = {}
    if is_sharded(path):
        tensors, metadata = read_sharded_tensors(path)
    elif path.is_dir() and not _is_run_folder(path):
        tensors, metadata, config = transformers.read_folder(path)
    else:
        tensors, metadata = read_tensors(path / "model.safetensors" if path.is_dir() else path)
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if transformers.has_transformers_names(tensors):
        tensors = transformers.to_official_names(tensors)
    facts = parse_metadata(metadata, path)
    licence = facts.get("licence") or config.get("licence")  # the file's may be several, a card's is one
    return tensors, {**facts, **config, "licence": licence}


def _is_run_folder(folder: Path) -> bool:
    """Return whether a folder is that of a finished run; a transformers folder has a config.json."""
    return (folder / "model.safetensors").is_file() and not (folder / "config.json").exists()


def _encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "pretrained."
    if any(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in tensors.items() if not name.startswith("head.")}


def _detect_encoder(tensors: Mapping[str, Tensor], path: Path) -> str:
    token = tensors.get("pretrained.cls_token")
    width = token.shape[-1] if token is not None and token.ndim else 0
    blocks = [re.match(r"pretrained\.blocks\.(\d+)\.", name) for name in tensors]
    depth = max((int(block[1]) + 1 for block in blocks if block), default=0)
    registers = tensors.get("pretrained.reg_token")
    count = registers.shape[1] if registers is not None and registers.ndim == 3 else 0
    for name, spec in ENCODERS.items():
        if (spec.width, spec.depth, spec.registers) == (width, depth, count):
            return name
    raise UserError(
        f"{path} has an encoder {width} wide and {depth} deep, which is none of {', '.join(ENCODERS)}",
        ["give its timm name, as ", Argument("encoder", "vit_tiny_patch16_224")],
    )


def _resolve_taps(path: Path, name: str, facts: ModelFacts, version: int | None) -> tuple[int, ...] | None:
    """Choose the four blocks that the head reads; None means the encoder's default."""
    if version is None and "taps" in facts:
        return facts["taps"]
    if name not in _V1_ENCODERS:
        if version == 1:
            known = ", ".join(_V1_ENCODERS)
            raise UserError([Argument("version", 1), f" is for {known}, and {path} is {name}"])
        return facts.get("taps")
    depth = ENCODERS[name].depth
    by_version = {1: tuple(range(depth - 4, depth)), 2: ENCODERS[name].taps}
    saved = facts.get("taps", by_version.get(facts.get("version", 0)))
    if version is not None:
        if saved not in (None, by_version[version]):
            _warn(
                [f"{path} says that its head reads the blocks {list(saved or ())}"],
                [Argument("version", version), " overrides it"],
            )
        return by_version[version]
    if saved is None:
        _warn(
            f"{path} does not say whether it is V1 or V2 and is read as V2",
            ["if it is V1, give ", Argument("version", 1)],
        )
    return saved or by_version[2]


def _resolve_max_depth(path: Path, facts: ModelFacts, max_depth: float | None) -> float | None:
    saved = facts.get("max_depth")
    if facts.get("calibration") is not None and (max_depth or saved) is not None:
        wanted = Argument("max_depth", max_depth or saved)
        raise UserError(
            [f"{path} is calibrated: it turns disparity into meters, and ", wanted, " is for depth"]
        )
    if max_depth is not None:
        if "max_depth" in facts and saved != max_depth:
            quantity = "disparity" if saved is None else f"depth up to {saved:g} m"
            _warn(
                f"{path} says that it predicts {quantity}",
                [Argument("max_depth", max_depth), " overrides it"],
            )
        return max_depth
    if "max_depth" not in facts:
        _warn(
            f"{path} does not say whether it predicts disparity or depth and is read as disparity",
            ["if it predicts meters, give ", Argument("max_depth", 20), ", or what its largest depth is"],
        )
    return saved


def _check_tensors(tensors: Mapping[str, Tensor], module: nn.Module, path: str | Path, name: str) -> None:
    """Raise ValueError unless names, shapes and types of tensors are those of a module."""
    expected = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    for key in sorted(expected.keys() & shapes.keys()):
        if not tensors[key].is_floating_point():
            raise ValueError(
                f"{path} is not {name}: its {key} holds {tensors[key].dtype}, not floating-point weights"
            )
        if expected[key] != shapes[key]:
            raise ValueError(f"{path} is not {name}: its {key} is {shapes[key]}, expected {expected[key]}")
    missing = [key for key in expected if key not in shapes and not key.endswith(_MASK_TOKEN)]
    if missing:
        raise ValueError(f"{path} is not {name}: it lacks {summarize_names(missing)}")
    surplus = [key for key in shapes if key not in expected and not key.endswith(_MASK_TOKEN)]
    if surplus:
        raise ValueError(f"{path} is not {name}: it also has {summarize_names(surplus)}")


def _official_origin(path: Path) -> dict[str, Any]:
    licence = official_license(path)
    if licence is None:
        return {}
    base = official_repository(path)
    return {"start": {"from": path.name, "licence": licence, **({"base": base} if base else {})}}


def _warn_lost_facts(model: DepthAnything, path: Path) -> None:
    """Warn of everything that an official file, which has tensors only, does not say about a model."""
    facts = name_hints(path)
    spec = ENCODERS.get(model.encoder)
    needed: list[Argument] = []
    if model.calibration is not None:
        _warn(
            f"{path} does not keep the calibration and will predict disparity",
            "save as safetensors to keep it",
        )
    if model.canonical_focal is not None:
        _warn(
            f"{path} does not keep the canonical focal length and will predict the depth of a camera of "
            f"{model.canonical_focal:g} px",
            "save as safetensors to keep it",
        )
    if facts.get("max_depth") is not None and model.max_depth is None:
        _warn(f"{path} has the name of a metric model and holds a relative one", "give it another name")
    elif facts.get("max_depth") != model.max_depth:
        needed.append(Argument("max_depth", model.max_depth))
    if spec and model.taps != spec.taps and facts.get("version") != 1:
        needed.append(Argument("version", 1))
    if spec is None:
        needed.append(Argument("encoder", model.encoder))
    if needed:
        listed = [part for argument in needed for part in (", ", argument)][1:]
        _warn(
            f"{path} does not keep all facts about the model",
            ["load it with ", *listed, ", or save as safetensors"],
        )
    if model.input_size != model.patch_size * model.pretrained.patch_embed.grid_size[0]:
        _warn(
            f"{path} does not keep the input size of the model",
            ["give ", Argument("input_size", model.input_size), " when running it, or save as safetensors"],
        )


def _warn(what: Text, fix: Text = "") -> None:
    warnings.warn(ArgumentWarning(what, fix), stacklevel=4)
