"""Read and write files of tensors (safetensors and torch) without executing code in them.

Any content, also hostile, results in tensors or in one error that says what the file is.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from depth_anything.errors import UserError, error_reason
from depth_anything.model import lora
from depth_anything.model.integrity import DIGEST_KEY, find_damage, tensor_digest

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
"""Errors by which safetensors and torch say that a file cannot be written; see `disk.atomic_path`."""

SUPPORTED_FORMATS = (
    "expected an official .pth, a .safetensors or .ckpt of this project, or a transformers folder"
)

# (offset, bytes) to the kind of file.
_FILE_SIGNATURES = {
    (0, b"\xff\xd8\xff"): "a JPEG picture",
    (0, b"\x89PNG"): "a PNG picture",
    (0, b"GIF8"): "a GIF picture",
    (8, b"WEBP"): "a WebP picture",
    (0, b"II*\0"): "a TIFF picture",
    (0, b"MM\0*"): "a TIFF picture",
    (4, b"ftyp"): "a video",
    (0, b"%PDF"): "a PDF document",
    (0, b"version https://git-lfs"): "a Git LFS pointer (fetch the file itself: git lfs pull)",
    (0, b"\x1f\x8b"): "a gzip archive (unpack it first)",
    (0, b"\xfd7zXZ\0"): "an xz archive (unpack it first)",
    (0, b"BZh"): "a bzip2 archive (unpack it first)",
    (0, b"\x28\xb5\x2f\xfd"): "a Zstandard archive (unpack it first)",
    (0, b"7z\xbc\xaf\x27\x1c"): "a 7-Zip archive (unpack it first)",
    (0, b"Rar!"): "a RAR archive (unpack it first)",
    (257, b"ustar"): "a tar archive (unpack it first)",
    (0, b"GGUF"): "a GGUF file",
    (0, b"\x89HDF"): "an HDF5 file",
    (0, b"\x93NUMPY"): "a NumPy array",
    (4, b"TFL3"): "a TensorFlow Lite file, which is for running only",
}
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
# An ONNX file begins with its version, then the field of the exporter's name or of the graph.
_ONNX_START = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a]", re.DOTALL)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and metadata of a checkpoint. The format is detected by content, not by file name.

    Raises:
        ValueError: If the file is missing, damaged, of another kind, or contains code.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
        damage = find_damage(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", SUPPORTED_FORMATS) from error
    if damage:
        raise UserError(f"{path} is damaged or cut short ({damage})", "fetch it again, or give another copy")
    # safetensors first: the length of its header may look like the start of a pickle
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES:
        content, metadata = _read_safetensors(path)
    elif head.startswith((b"PK\x03\x04", b"\x80")):
        content, metadata = _read_torch(path, zipped=head.startswith(b"PK"))
    else:
        raise UserError(f"{path} is {_describe_file(head, path.name)}", SUPPORTED_FORMATS)
    return select_tensors(content, metadata, path), metadata


def select_tensors(content: Mapping[str, Any], metadata: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, with LoRA adapters merged.

    Raises:
        UserError: If there are none, or adapters that cannot be merged.
    """
    tensors = {str(name): t for name, t in content.items() if isinstance(t, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors", SUPPORTED_FORMATS)
    if lora.LORA_METADATA_KEY in metadata:
        tensors = _merge_adapters(tensors, metadata[lora.LORA_METADATA_KEY], path)
    if any("lora_" in name for name in tensors):
        raise UserError(
            f"{path} is a LoRA adapter without its base model: merge it into its base", SUPPORTED_FORMATS
        )
    return tensors


def _describe_file(head: bytes, name: str) -> str:
    """Describe a file that is not a checkpoint, by its first bytes."""
    if not head.strip(b"\0"):
        return "empty" if not head else "zeros at its start, as after an interrupted copy"
    if _ONNX_START.match(head):
        return "an ONNX file, which is for running only"
    for (place, start), kind in _FILE_SIGNATURES.items():
        if head[place:].startswith(start):
            return kind
    # The last character may be cut.
    text = head.decode("utf-8-sig", errors="ignore").strip()
    if (
        len(text.encode()) < len(head.strip()) - 6
        or not text.replace("\n", "").replace("\t", "").isprintable()
    ):
        return "not a checkpoint"
    if text.startswith("<"):
        return "a web page" if "<html" in text.lower() or "<!doctype html" in text.lower() else "an XML text"
    if name.endswith((".index.json", "config.json")):
        return "a part of a folder (give the folder)"
    if text.startswith(("{", "[")):
        return "a JSON text"
    return f"a text, which begins with {text.splitlines()[0][:60]!r}"


def _merge_adapters(tensors: dict[str, Tensor], scale: Any, path: Path) -> dict[str, Tensor]:
    try:
        number = float(scale)
        if not 0 < number < 1e6:
            raise ValueError(f"{lora.LORA_METADATA_KEY}={number:g}")
        return lora.merge_adapters(tensors, number)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has LoRA adapters that do not fit their layers ({error_reason(error)})", "save it again"
        ) from error


def _read_torch(path: Path, *, zipped: bool) -> tuple[Mapping[str, Any], dict[str, Any]]:
    try:
        if path.suffix == ".safetensors":  # torch.load would read a path of this name as safetensors
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"code to run ({named[1]})" if named else "more than tensors"
        raise UserError(f"{path} holds {what}, which is never unpickled", SUPPORTED_FORMATS) from error
    except Exception as error:  # a damaged file can end the reader anywhere
        if kind := _describe_archive(path):
            raise UserError(f"{path} is {kind}", SUPPORTED_FORMATS) from error
        raise UserError(
            f"{path} is damaged or cut short ({error_reason(error)})", "fetch it again"
        ) from error
    metadata = content.get("depth_anything") if isinstance(content, Mapping) else None
    for _ in range(3):  # a dictionary may contain itself
        inner = content.get("state_dict", content.get("model")) if isinstance(content, Mapping) else None
        content = inner if isinstance(inner, Mapping) else content
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict", SUPPORTED_FORMATS)
    return content, dict(metadata) if isinstance(metadata, Mapping) else {}


def _describe_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return None
    inside = {name.partition("/")[2] for name in names}
    if "archive_format" in inside:
        return "a program of torch.export, which is for running only"
    if "data.pkl" in inside and "constants.pkl" not in inside:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays, not a checkpoint"
    weights = [name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".bin", ".safetensors"))]
    return (
        f"a zip archive of {summarize_names(weights)} (unpack it first)"
        if weights
        else "an archive, not a checkpoint"
    )


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            metadata.pop(DIGEST_KEY, None)  # about the bytes, not about the model
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except Exception as error:  # a damaged file can end the reader anywhere
        raise UserError(
            f"{path} is damaged or cut short ({error_reason(error)})", "fetch it again"
        ) from error


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors, metadata and a digest, byte-reproducibly, with the permissions of the umask."""
    save_file(dict(state), path, metadata={**metadata, DIGEST_KEY: "0" * 64})
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"][DIGEST_KEY] = tensor_digest(file, header)
        header["__metadata__"] = dict(
            sorted(header["__metadata__"].items())
        )  # the library has no fixed order
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # the library creates files with mode 0600


def save_torch(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict with torch.save; the bytes do not depend on the path."""
    with path.open("wb") as file:  # torch would store the name of a path in the file
        torch.save(state, file)


def summarize_names(names: Mapping[str, Any] | list[str]) -> str:
    """Return the first name and how many more there are."""
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else str(first)
