"""Weights in and out: which file is what, what it does not say, and never a line of its code.

Read: the authors' .pth (V1, V2, metric), this project's .safetensors and Lightning .ckpt, transformers folders, and
any of these as wrappers leave them. Files are others' work: whatever is in them ends in a model or in one sentence.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depth_anything.disk import atomic_folder, atomic_path
from depth_anything.errors import Argument, ArgumentWarning, UserError
from depth_anything.model import transformers
from depth_anything.model.card import CARD_NAME, build_card, is_replaceable_card
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS, canonical_encoder_name, load_hub_weights, rename_swiglu
from depth_anything.model.lora import merge_adapters
from depth_anything.model.metadata import MAX_DEPTH_RANGE_M, build_metadata, parse_metadata
from depth_anything.model.official_weights import name_hints, official_license, official_repository
from depth_anything.model.tensor_files import (
    SUPPORTED_FORMATS,
    WRITE_ERRORS,
    read_tensors,
    save_safetensors,
    save_torch,
    summarize_names,
)

_V1_ENCODERS = ("vits", "vitb", "vitl")
# What DDP, Lightning, torch.compile, FSDP and checkpointing put before or into the names of parameters.
_WRAPPERS = re.compile(
    r"^(?:(?:module|model|_orig_mod)\.)+|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."
)
_MASK_TOKEN = "mask_token"  # in official files and in no forward pass; a file may lack it


def load_model(
    path: str | Path,
    *,
    encoder: str | None = None,
    max_depth: float | None = None,
    version: int | None = None,
) -> DepthAnything:
    """Read a model from a file, in whatever format, without running any code that the file may hold.

    The file's own words settle what it is, else its official name, and the shapes settle the encoder. What
    nothing says is V2 and disparity, with a warning for each; an argument that contradicts wins, with a warning.

    Args:
        path: An official .pth (V1, V2 or metric), a .safetensors or Lightning .ckpt of this project, a finished run's
            folder, or a folder of transformers; names may have the prefixes of wrappers, and the state dict may lie
            under "model" or "state_dict".
        encoder: Name of the encoder, for a timm ViT in a file that does not say.
        max_depth: Metres that an output of one stands for in a metric model.
        version: 1 or 2; it settles which four blocks the head reads.

    Returns:
        The model, in eval mode, on the CPU, in float32.

    Raises:
        ArgumentError: For an argument that cannot be, or one that is needed; a ValueError.
        ValueError: If the file is missing, damaged, of another kind or another size, or holds code.
    """
    path = Path(path)
    if version not in (None, 1, 2):
        raise UserError([Argument("version", version), " must be 1 or 2"])
    if max_depth is not None and not MAX_DEPTH_RANGE_M[0] <= max_depth <= MAX_DEPTH_RANGE_M[1]:
        low, high = MAX_DEPTH_RANGE_M
        raise UserError([Argument("max_depth", max_depth), f" must be from {low:g} to {high:g} meters"])
    tensors, said = _read_model(path)
    named = name_hints(path)
    said = {**named, **said}
    name = canonical_encoder_name(encoder or said.get("encoder") or _detect_encoder(tensors, path))
    taps = _resolve_taps(path, name, said, version)
    model = _build_empty(
        name,
        path if encoder is None else None,
        taps=taps,
        max_depth=_resolve_max_depth(path, said, max_depth),
        check=lambda model: _check_tensors(tensors, model, path, name),
    )
    model.load_state_dict(tensors, strict=False)
    model.input_size = said.get("input_size", model.input_size)
    model.licence = said.get("licence") or named.get("licence")
    model.calibration = said.get("calibration")
    model.origin = said.get("origin") or _official_origin(path)
    return model.eval()


def _official_origin(path: Path) -> dict[str, Any]:
    licence = official_license(path)
    if licence is None:
        return {}
    base = official_repository(path)
    return {"start": {"from": path.name, "licence": licence, **({"base": base} if base else {})}}


def save_model(model: DepthAnything, path: str | Path, *, format: str = "safetensors") -> None:
    """Write a model to a file that appears whole or not at all.

    Args:
        model: On any device; adapters are merged into its weights.
        path: The file, or for transformers the folder; what it lies in is made, and an older one is replaced.
        format: "safetensors", which keeps everything that `load_model` needs; "transformers", a folder that
            `DepthAnythingForDepthEstimation.from_pretrained` reads; or "official", the .pth that the authors' code
            reads, which has tensors alone: its name or `load_model`'s arguments must say the rest.

    Raises:
        ValueError: For an unknown format, a model that the format cannot hold, or a folder that is something else.
        OSError: If it cannot be written.
    """
    path = Path(path)
    if format not in ("safetensors", "official", "transformers"):
        raise UserError(f"format={format!r} is unknown", "use safetensors, official or transformers")
    if format == "transformers":
        _save_transformers(model, path)
        return
    if format == "official":
        _warn_lost_facts(model, path)
    with atomic_path(path, make_folder=True, also=WRITE_ERRORS) as temporary:
        if format == "safetensors":
            write_model(model, temporary)
        else:
            save_torch(_plain_state(model), temporary)


def write_model(model: DepthAnything, path: Path) -> None:
    """Write a safetensors file in place; for a file that others read, pass a temporary path."""
    save_safetensors(_plain_state(model), path, build_metadata(model))


def _plain_state(model: DepthAnything) -> dict[str, Tensor]:
    """Return the tensors on the CPU, LoRA adapters merged."""
    return merge_adapters(
        {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    )


def _save_transformers(model: DepthAnything, path: Path) -> None:
    if not transformers.is_replaceable_folder(path):
        raise UserError(
            f"{path} exists and is not a transformers folder of a depth model", "give another name"
        )
    replace_card = is_replaceable_card(path / CARD_NAME)
    with atomic_folder(path, keep_others=True, also=WRITE_ERRORS) as folder:
        transformers.write_folder_files(model, _plain_state(model), build_metadata(model), folder)
        if replace_card:
            title = f"Depth Anything {model.encoder}"
            text = build_card(model, file="path/to/this/folder", form="transformers", title=title)
            (folder / CARD_NAME).write_text(text, encoding="utf-8")
    if model.calibration is not None:
        _warn(f"{path} keeps the calibration for load_model alone; transformers will give disparity")


def read_license(path: str | Path) -> str | None:
    """Tell under which licence the weights of a file or folder are, as far as it or its official name says.

    Raises:
        ValueError: As `load_model`, for a file that is missing or no checkpoint.
    """
    return _read_checkpoint(Path(path))[1].get("licence") or official_license(path)


def has_head(path: str | Path) -> bool:
    """Say whether a file holds a whole depth network; an encoder alone has no head.

    Raises:
        ValueError: As `load_model`, for a file that is missing or no checkpoint.
    """
    return any(name.startswith("depth_head.") for name in _read_checkpoint(Path(path))[0])


def load_encoder(model: DepthAnything, source: str | Path) -> None:
    """Give a model's encoder published weights, DINOv2's as a rule; the head stays as it is.

    Args:
        model: Changed in place.
        source: "hub" for the encoder's weights through timm; else a .pth or .safetensors file of an encoder with
            DINOv2's names or timm's, or of a whole Depth Anything model.

    Raises:
        ValueError: If the weights cannot be had or are not those of this encoder.
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
    """Name a model by its weights: the same for a model and any file of it, whatever the format or device.

    Args:
        model: A model, or a file as `load_model` reads it.

    Returns:
        "sha256:" and the hash over names, shapes and bytes of all tensors, in float32 where the file has less.
    """
    tensors = (
        merge_adapters(model.state_dict()) if isinstance(model, nn.Module) else _read_model(Path(model))[0]
    )
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.endswith(_MASK_TOKEN):
            continue
        tensor = tensor.detach().cpu()
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


def _build_empty(
    name: str,
    said_by: Path | None,
    *,
    taps: tuple[int, ...] | None,
    max_depth: float | None,
    check: Callable[[DepthAnything], None],
) -> DepthAnything:
    """Build a model whose parameters are about to be overwritten, without drawing random ones if possible.

    Args:
        name: The encoder.
        said_by: The file that names it; None where an argument does.
        taps: As `DepthAnything` takes them.
        max_depth: As `DepthAnything` takes it.
        check: Refuses the model before it costs memory: a small file may name a large encoder.
    """
    try:
        with torch.device("meta"):
            model = DepthAnything(name, taps=taps, max_depth=max_depth)
    except ValueError as error:
        if said_by is None:
            raise
        raise ValueError(f"{said_by}: {error}") from error
    check(model)
    if name not in ENCODERS:  # timm's may hold constants that no file has
        with torch.random.fork_rng(devices=[]):
            return DepthAnything(name, taps=taps, max_depth=max_depth)
    model.to_empty(device="cpu")
    nn.init.zeros_(model.pretrained.mask_token)
    return model


def _read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a whole model: its tensors under official names, and what its files say of it."""
    tensors, said = _read_checkpoint(path)
    # A checkpoint of a training may hold other networks, too; what is left of transformers' names is a surplus.
    ours = ("pretrained.", "depth_head.", "backbone.", "neck.", "head.")
    tensors = {name: t for name, t in tensors.items() if name.startswith(ours)} or tensors
    if not any(name.startswith("depth_head.") for name in tensors):
        if "patch_embed.proj.weight" in tensors or "pretrained.patch_embed.proj.weight" in tensors:
            raise ValueError(f"{path} holds an encoder without a depth head; {SUPPORTED_FORMATS}")
        raise ValueError(
            f"{path} holds no Depth Anything model (it has {summarize_names(tensors)}); {SUPPORTED_FORMATS}"
        )
    return tensors, said


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read any checkpoint into tensors under the names that wrappers had hidden, and what it says of them."""
    config: dict[str, Any] = {}
    if path.is_dir() and not _is_run_folder(path):
        tensors, metadata, config = transformers.read_folder(path)
    else:
        path = path / "model.safetensors" if path.is_dir() else path
        tensors, metadata = read_tensors(path)
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if transformers.has_transformers_names(tensors):
        tensors = transformers.to_official_names(tensors)
    said = parse_metadata(metadata, path)
    licence = said.get("licence") or config.get("licence")  # a card has no room for several
    return tensors, {**said, **config, "licence": licence}


def _is_run_folder(folder: Path) -> bool:
    """Tell the folder of a finished run from one of transformers, which has a config.json."""
    return (folder / "model.safetensors").is_file() and not (folder / "config.json").exists()


def _encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if any(name.startswith("pretrained.") for name in tensors):
        inner = "pretrained."
        return {name[len(inner) :]: t for name, t in tensors.items() if name.startswith(inner)}
    return {name: t for name, t in tensors.items() if not name.startswith("head.")}


def _detect_encoder(tensors: Mapping[str, Tensor], path: Path) -> str:
    width = next((t.shape[-1] for name, t in tensors.items() if name == "pretrained.cls_token" and t.ndim), 0)
    blocks = [re.match(r"pretrained\.blocks\.(\d+)\.", name) for name in tensors]
    depth = max((int(block[1]) + 1 for block in blocks if block), default=0)
    for name, spec in ENCODERS.items():
        if (spec.width, spec.depth) == (width, depth):
            return name
    raise UserError(
        f"{path} has an encoder {width} wide and {depth} deep, which is none of {', '.join(ENCODERS)}",
        ["give its timm name, as ", Argument("encoder", "vit_tiny_patch16_224")],
    )


def _resolve_taps(
    path: Path, name: str, said: Mapping[str, Any], version: int | None
) -> tuple[int, ...] | None:
    """Choose the four blocks; None stands for the encoder's own."""
    if version is None and "taps" in said:
        return said["taps"]
    if name not in _V1_ENCODERS:
        if version == 1:
            known = ", ".join(_V1_ENCODERS)
            raise UserError([Argument("version", 1), f" is for {known}, and {path} is {name}"])
        return said.get("taps")
    depth = ENCODERS[name].depth
    of_version = {1: tuple(range(depth - 4, depth)), 2: ENCODERS[name].taps}
    found = said.get("taps", of_version.get(said.get("version")))
    if version is not None:
        if found not in (None, of_version[version]):
            _warn(
                f"{path} says that its head reads the blocks {list(found)}; ",
                Argument("version", version),
                " overrides it",
            )
        return of_version[version]
    if found is None:
        _warn(
            f"{path} does not say whether it is V1 or V2 and is taken for V2; if it is V1, give ",
            Argument("version", 1),
        )
    return found or of_version[2]


def _resolve_max_depth(path: Path, said: Mapping[str, Any], max_depth: float | None) -> float | None:
    if said.get("calibration") is not None and (max_depth or said.get("max_depth")) is not None:
        wanted = Argument("max_depth", max_depth or said["max_depth"])
        raise UserError(
            [f"{path} is calibrated: it turns disparity into meters, and ", wanted, " is for depth"]
        )
    if max_depth is not None:
        if "max_depth" in said and said["max_depth"] != max_depth:
            was = "disparity" if said["max_depth"] is None else f"depth up to {said['max_depth']:g} m"
            depth = Argument("max_depth", max_depth)
            _warn(f"{path} says that it predicts {was}; ", depth, " overrides it")
        return max_depth
    if "max_depth" not in said:
        _warn(
            f"{path} does not say whether it predicts disparity or depth and is taken for disparity; if it predicts "
            "metres, give ",
            Argument("max_depth", 20),
            ", or what its largest depth is",
        )
    return said.get("max_depth")


def _check_tensors(tensors: Mapping[str, Tensor], module: nn.Module, path: str | Path, name: str) -> None:
    """Refuse tensors that are not exactly those of a module."""
    wanted = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    given = {key: tuple(t.shape) for key, t in tensors.items()}
    for key in sorted(wanted.keys() & given.keys()):
        if not tensors[key].is_floating_point():
            raise ValueError(
                f"{path} is not {name}: its {key} holds {tensors[key].dtype}, no floating-point weights"
            )
        if wanted[key] != given[key]:
            raise ValueError(f"{path} is not {name}: its {key} is {given[key]}, expected {wanted[key]}")
    missing = [key for key in wanted if key not in given and not key.endswith(_MASK_TOKEN)]
    if missing:
        raise ValueError(f"{path} is not {name}: it lacks {summarize_names(missing)}")
    surplus = [key for key in given if key not in wanted and not key.endswith(_MASK_TOKEN)]
    if surplus:
        raise ValueError(f"{path} is not {name}: it also has {summarize_names(surplus)}")


def _warn_lost_facts(model: DepthAnything, path: Path) -> None:
    said = name_hints(path)
    spec = ENCODERS.get(model.encoder)
    needed: list[Argument] = []
    if model.calibration is not None:
        _warn(
            f"{path} does not keep the calibration, and will give disparity; save as safetensors to keep it"
        )
    if said.get("max_depth") is not None and model.max_depth is None:
        _warn(f"{path} has the name of a metric model and holds a relative one; give it another name")
    elif said.get("max_depth") != model.max_depth:
        needed.append(Argument("max_depth", model.max_depth))
    if spec and model.taps != spec.taps and said.get("version") != 1:
        needed.append(Argument("version", 1))
    if spec is None:
        needed.append(Argument("encoder", model.encoder))
    if needed:
        listed = [part for argument in needed for part in (", ", argument)][1:]
        _warn(f"{path} does not keep all of the model: load it with ", *listed, ", or save as safetensors")
    if model.input_size != model.patch_size * model.pretrained.patch_embed.grid_size[0]:
        _warn(
            f"{path} does not keep the size that the model was made for: give ",
            Argument("input_size", model.input_size),
            " to whatever runs it, or save as safetensors",
        )


def _warn(*parts: str | Argument) -> None:
    warnings.warn(ArgumentWarning(parts), stacklevel=4)
