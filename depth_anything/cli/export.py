"""`depth-anything export`: a model for other programs."""

import argparse
from pathlib import Path
from typing import Any

from depth_anything.cli.options import add_command, add_weights, load


def add_export(commands: Any) -> None:
    """Declare `export`."""
    export = add_command(
        commands, "export", "write a model for other programs, checked against itself", run=_export
    )
    add_weights(export)
    export.add_argument(
        "--to",
        required=True,
        choices=("onnx", "torch", "transformers", "official", "safetensors"),
        help="ONNX; a program of torch.export; a transformers folder; the authors' .pth; this project's own",
    )
    export.add_argument("--output", required=True, metavar="PATH", help="the file; a folder for transformers")
    export.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="of an onnx or torch program; its input and output stay float32 (%(default)s)",
    )
    export.add_argument("--opset", type=int, default=18, metavar="N", help="of onnx (%(default)s)")


def _export(options: argparse.Namespace) -> None:
    from depth_anything.export import export_model, format_checks

    model, facts = load(
        options.weights,
        input_size=None,
        encoder=options.encoder,
        dataset=options.dataset,
        max_depth=options.max_depth,
        version=options.weights_version,
    )
    output = Path(options.output)
    checks = export_model(model, output, to=options.to, precision=options.precision, opset=options.opset)
    if checks:
        print(format_checks(checks))
    print(f"exported: {output} (licence: {model.licence or 'unknown'})")
