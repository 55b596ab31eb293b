"""Model files of semantic segmentation: their metadata, and loading them. Code in a file is never executed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from depth_anything.classes import parse_class_table, table_to_list
from depth_anything.data.local_copy import errors_with_addresses, local_path
from depth_anything.errors import Argument, UserError
from depth_anything.model.metadata import (
    MAX_INPUT_SIZE,
    MAX_TEXT_LENGTH,
    SEGMENTATION_KIND,
    build_shared_metadata,
    parse_metadata,
)
from depth_anything.model.segmentation import (
    HEADS,
    SegmentationHeadBuilder,
    SegmentationModel,
    WindowRule,
    segmentation_head_name,
)
from depth_anything.model.tensor_files import read_tensors

_WRAPPERS = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+|_orig_mod\.|_fsdp_wrapped_module\.")
_PREFIXES = ("pretrained.", "segmentation_head.")
_MASK_TOKEN = "pretrained.mask_token"


def build_segmentation_metadata(model: SegmentationModel) -> dict[str, str]:
    """Build the metadata of a file: all facts that the tensors do not say.

    Returns:
        kind ("segmentation"), encoder, taps, input_size, licence, origin as for depth; head, head_options, classes
        (a list of name and color) and window (short_side and stride) as JSON.
    """
    window = {"short_side": model.window.short_side, "stride": model.window.stride}
    return {
        **build_shared_metadata(model),
        "kind": SEGMENTATION_KIND,
        "head": model.head,
        "head_options": json.dumps(model.head_options, sort_keys=True),
        "classes": json.dumps(table_to_list(model.classes), ensure_ascii=False),
        "window": json.dumps(window),
    }


def is_segmentation_file(path: str | Path) -> bool:
    """Return whether a model file, or the file in the folder of a run, says that it is a segmentation model.

    A file that cannot be read is none; the loader reports what is wrong with it.
    """
    try:
        file = _model_file(Path(path))
        with file.open("rb") as opened:
            head = opened.read(9)
        if head[8:9] == b"{":
            with safe_open(file, framework="pt") as opened:
                metadata: Mapping[str, Any] = opened.metadata() or {}
        elif head.startswith((b"PK\x03\x04", b"\x80")):
            metadata = (
                torch.load(file, map_location="cpu", weights_only=True, mmap=True).get("depth_anything") or {}
            )
        else:
            return False
        return metadata.get("kind") == SEGMENTATION_KIND
    except Exception:  # damaged files raise many types
        return False


def load_segmentation(path: str | Path, *, head: SegmentationHeadBuilder | None = None) -> SegmentationModel:
    """Load a segmentation model from a .safetensors or .ckpt of this project, or the folder of a finished run.

    Args:
        path: The file or folder, or its address in an object store.
        head: Builder of the head, for a model with a head of its own.

    Returns:
        The model in eval mode, on the CPU, in float32.

    Raises:
        UserError: If the file is no segmentation model, or has a head of its own that is not given.
        ValueError: If the file is missing, damaged, or contains code.
    """
    if isinstance(path, str) and "://" in path:
        with errors_with_addresses():
            return load_segmentation(local_path(path), head=head)
    path = _model_file(Path(path))
    tensors, metadata = read_tensors(path)
    if metadata.get("kind") != SEGMENTATION_KIND:
        raise UserError(
            f"{path} is not a segmentation model",
            "give a file of stage=segmentation; a depth model is the start of one: python train.py stage=segmentation "
            "init=FILE",
        )
    facts = parse_metadata(metadata, path)
    name = str(metadata.get("head", ""))[:MAX_TEXT_LENGTH]
    if name not in HEADS and (head is None or segmentation_head_name(head) != name):
        raise UserError(f"{path} was saved with the head {name}", ["give ", Argument("head", name)])
    options, window = (_parse_json(metadata, key, path) for key in ("head_options", "window"))
    try:
        classes = parse_class_table(_parse_json(metadata, "classes", path))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(options, dict) or "encoder" not in facts:
        raise _damaged(path, "head_options or encoder are missing")
    with torch.random.fork_rng(devices=[]):
        model = SegmentationModel(
            facts["encoder"],
            classes=classes,
            head=name if name in HEADS else head,  # type: ignore[arg-type]
            head_options=options,
            taps=facts.get("taps"),
        )
    _load_tensors(model, {_WRAPPERS.sub("", key): tensor for key, tensor in tensors.items()}, path)
    model.input_size = facts.get("input_size", model.input_size)
    model.window = _parse_window(window, path)
    model.licence, model.origin = facts.get("licence"), facts.get("origin") or {}
    return model.eval()


def _model_file(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def _load_tensors(model: SegmentationModel, tensors: dict[str, torch.Tensor], path: Path) -> None:
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIXES)}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted((expected.keys() ^ own.keys()) - {_MASK_TOKEN}):
        what = "lacks" if name in expected else "also has"
        raise ValueError(
            f"{path} is not a segmentation model of {model.encoder} and {model.head}: it {what} {name}"
        )
    for name, shape in expected.items():
        if name in own and tuple(own[name].shape) != shape:
            raise ValueError(
                f"{path} is not a segmentation model of {model.encoder} and {model.head}: its {name} is "
                f"{tuple(own[name].shape)}, expected {shape}"
            )
    model.load_state_dict(own, strict=False)


def _parse_window(value: Any, path: Path) -> WindowRule:
    short_side, stride = (
        value.get(key) if isinstance(value, dict) else None for key in ("short_side", "stride")
    )
    for number in (stride, *(() if short_side is None else (short_side,))):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_INPUT_SIZE:
            raise _damaged(path, f"window={value!r:.80}")
    assert isinstance(stride, int)
    return WindowRule(short_side, stride)


def _parse_json(metadata: Mapping[str, Any], name: str, path: Path) -> Any:
    try:
        return json.loads(metadata[name])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"{name} is missing or is not JSON") from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} has invalid metadata: {why}", "ask its author for another file")
