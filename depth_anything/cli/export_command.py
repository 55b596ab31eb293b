"""`depth-anything export`: write a model as ONNX, torch.export, transformers, official or safetensors."""

import argparse
import re
from pathlib import Path
from typing import Any

from depth_anything.cli.options import (
    add_command,
    add_weight_flags,
    check_output,
    list_weight_files,
    load_weights,
)
from depth_anything.data.address import escape_unprintable

_CARD_FOLDER_NAME = "path/to/this/folder"
"""Name of a transformers folder in its model card."""

_CARD_LINE = re.compile(r"depth-anything wrote this card of (.+), sha256 \w{64}")


def add_export(commands: Any) -> None:
    """Declare `export`."""
    export = add_command(
        commands, "export", "export a model to other formats and verify the result", run=_export
    )
    add_weight_flags(export)
    export.add_argument(
        "--to",
        required=True,
        choices=("onnx", "torch", "transformers", "official", "safetensors"),
        help="ONNX; a torch.export program; a transformers folder; the authors' .pth; this project's format",
    )
    export.add_argument(
        "--output", required=True, metavar="PATH", help="path of the file, or of the folder for transformers"
    )
    export.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="precision of an onnx or torch program; input and output stay float32 (%(default)s)",
    )
    export.add_argument("--opset", type=int, default=18, metavar="N", help="ONNX operator set (%(default)s)")


def _export(options: argparse.Namespace) -> None:
    from depth_anything.export import export_model, format_checks

    output = Path(options.output)
    is_folder = output.is_dir()
    check_output(
        _transformers_files(output) if is_folder else [output],
        own=lambda path: _is_export(path, name=_CARD_FOLDER_NAME if is_folder else path.name),
        inputs=list_weight_files(options.weights),
    )
    model, _ = load_weights(
        options.weights,
        input_size=None,
        encoder=options.encoder,
        dataset=options.dataset,
        max_depth=options.max_depth,
        version=options.weights_version,
    )
    checks = export_model(model, output, to=options.to, precision=options.precision, opset=options.opset)
    if checks:
        print(format_checks(checks))
    if checks and model.canonical_focal is not None:
        print(
            f"meters = output * focal / {model.canonical_focal:g}, with the camera's focal length in pixels of "
            "the program's input; the metadata has it as canonical_focal"
        )
    print(f"exported: {escape_unprintable(output)} (license: {model.licence or 'unknown'})")


def _transformers_files(folder: Path) -> list[Path]:
    """List the files that exporting to a transformers folder replaces."""
    return [folder / name for name in ("config.json", "model.safetensors", "preprocessor_config.json")]


def _is_export(path: Path, *, name: str) -> bool:
    """Recognize exported files by their model card or program report; a training run's model is never one."""
    folder = path.parent
    if (folder / "config.yaml").exists():
        return False
    for card in (folder / "README.md", folder / f"{path.name}.md"):
        try:
            match = _CARD_LINE.search(card.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if match and match[1] == name:
            return True
    return (folder / f"{path.name}.json").exists()
