"""Export models to ONNX and torch.export programs for any image size and batch; each file is verified.

Shapes: B images, H W pixels.
"""

import copy
import importlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depth_anything.disk import atomic_files
from depth_anything.errors import Argument, UserError, error_reason
from depth_anything.inference.predictor import FARTHEST_M, NEAREST_M
from depth_anything.model.card import build_card, write_card
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import DINOv2
from depth_anything.model.metadata import build_metadata
from depth_anything.model.tensor_files import WRITE_ERRORS
from depth_anything.model.weights import fingerprint, save_model
from depth_anything.preprocess import IMAGENET_MEAN, IMAGENET_STD

PROGRAM_FORMATS = ("onnx", "torch")
FORMATS = (*PROGRAM_FORMATS, "transformers", "official", "safetensors")
PRECISIONS = ("fp32", "fp16")

OPSET = 18
"""The oldest ONNX operator set that has every operation of the network."""

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Maximum difference between program and network, as a share of the range of the network's map."""

_EXAMPLE_SHAPE = (2, 6, 8)
"""Batch, rows and columns of patches for tracing; tracing would fix a batch of 1."""

Program = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ExportCheck:
    """Difference between an exported program and the network on one batch.

    Attributes:
        shape: (B, H, W) of the batch.
        difference: Maximum absolute difference, in the output's unit.
        share: The same as a share of the range of the network's map.
        relative: Mean relative difference.
    """

    shape: tuple[int, int, int]
    difference: float
    share: float
    relative: float


def export_model(
    model: DepthAnything,
    path: str | Path,
    *,
    to: str,
    precision: str = "fp32",
    opset: int = OPSET,
    position_rule: str | None = None,
) -> list[ExportCheck]:
    """Export a model and verify the file; it is written only if its output equals the network's.

    Programs take float32 (B, 3, H, W) as `DepthAnything.forward` does, of any batch size and sides of three or more
    patches, and return float32 (B, H, W); a calibrated model returns meters. One with a canonical focal length, which
    is in the metadata, returns the depth of that camera: meters are output · focal / canonical_focal, with the focal
    length in pixels of the program's input. NAME.json next to a program holds its
    metadata and the measured differences.

    Args:
        model: The model, on any device; it is not changed.
        path: Path of the file, or of the folder for transformers.
        to: One of `FORMATS`.
        precision: "fp32", or for programs "fp16": half the size; attention scores, softmax and norms stay float32.
        opset: ONNX operator set: `OPSET`, or a newer one that the installed ONNX Runtime supports.
        position_rule: For programs: as for `DepthAnything.forward`.

    Returns:
        The measured differences; empty for formats of weights, whose bytes are compared instead.

    Raises:
        ValueError: The format cannot hold the model, a package is missing, the opset cannot be written or run, or the
            program differs from the network; no file is left.
        OSError: The file cannot be written.
    """
    path = Path(path)
    _check_arguments(to, precision, opset, position_rule)
    if to not in PROGRAM_FORMATS:
        save_model(model, path, format=to)
        if to != "transformers":  # it contains its own card
            _write_card(model, path, to=to)
        if fingerprint(path) != fingerprint(model):
            raise ValueError(f"{path} does not hold the model's weights: the disk or the format failed")
        return []
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder: give the path of a file, such as {path / ('model.' + SUFFIXES[to])}"
        )
    network = copy.deepcopy(model).cpu().eval()
    module = ExportModule(network, precision=precision, position_rule=position_rule)
    metadata = {**program_metadata(network, precision=precision), "position_rule": module.position_rule}
    program = trace_program(module)
    with atomic_files(path, also=WRITE_ERRORS) as folder:
        file = folder / path.name
        {"onnx": _write_onnx, "torch": _write_torch}[to](program, file, metadata, opset)
        run = {"onnx": run_onnx, "torch": run_torch}[to](file)
        checks = check_program(run, network, module.reference)
        _check_tolerance(checks, path, tolerance=TOLERANCE[precision])
        report = {"file": path.name, "made": metadata, "tolerance": TOLERANCE[precision]}
        report["checks"] = [asdict(row) for row in checks]
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{path.name}.json").write_text(text, encoding="utf-8")
    _write_card(model, path, to=to, checks=checks)
    return checks


SUFFIXES = {"onnx": "onnx", "torch": "pt2"}


def _check_arguments(to: str, precision: str, opset: int, position_rule: str | None) -> None:
    """Refuse unknown values, and options that the format would ignore."""
    programs = " and ".join(PROGRAM_FORMATS)
    if to not in FORMATS:
        raise UserError([Argument("to", repr(to)), " is unknown"], f"use one of {', '.join(FORMATS)}")
    if precision not in PRECISIONS:
        raise UserError(
            [Argument("precision", repr(precision)), " is unknown"], f"use one of {', '.join(PRECISIONS)}"
        )
    if to not in PROGRAM_FORMATS and precision != "fp32":
        raise UserError([Argument("precision", precision), f" is for {programs}; {to} keeps float32"])
    if to not in PROGRAM_FORMATS and position_rule is not None:
        raise UserError(
            [Argument("position_rule", repr(position_rule)), f" is for {programs}; {to} keeps no rule"]
        )
    if to != "onnx" and opset != OPSET:
        raise UserError([Argument("opset", opset), f" is for onnx; {to} has none"])
    if to != "onnx":
        return
    _require_packages("onnx", "onnxscript", "onnxruntime")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OPSET <= opset <= newest:
        raise UserError(
            [Argument("opset", repr(opset)), " cannot be written"],
            f"give {OPSET}, the oldest that has every operation of the network, to {newest}, the newest that the "
            "installed onnx knows",
        )


def _write_card(model: DepthAnything, path: Path, *, to: str, checks: Sequence[ExportCheck] = ()) -> None:
    table = {"Difference from the network": f"```text\n{format_checks(checks)}\n```"} if checks else {}
    write_card(
        build_card(model, file=path.name, form=to, title=path.stem, measured=table),
        path.parent,
        file=path.name,
    )


def program_metadata(model: DepthAnything, *, precision: str) -> dict[str, str]:
    """Build a program's metadata: the meaning of its output and the preprocessing of its input."""
    metadata = {**build_metadata(model), "precision": precision}
    del metadata["format"]
    if model.calibration is not None:
        metadata |= {"quantity": "depth", "unit": "m"}
    return metadata | {
        "patch": str(model.patch_size),
        "multiple": str(model.multiple),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "fingerprint": fingerprint(model),
    }


def format_checks(checks: Sequence[ExportCheck]) -> str:
    """Format the checks as a table."""
    rows = [("batch × height × width", "largest difference", "of the range", "mean relative")]
    for row in checks:
        shape = " × ".join(str(n) for n in row.shape)
        rows.append((shape, f"{row.difference:.1e}", f"{row.share:.1e}", f"{row.relative:.1e}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class ExportModule(nn.Module):
    """A network as it is exported: float32 input and output, in meters if it is calibrated."""

    def __init__(self, network: DepthAnything, *, precision: str, position_rule: str | None = None) -> None:
        """Wrap a network, or for fp16 a copy in half precision."""
        super().__init__()
        self.position_rule = position_rule or network.position_rule
        network.check_position_rule(self.position_rule)
        self.calibration = network.calibration
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.network = to_half_precision(network) if precision == "fp16" else network

    def forward(self, image: Tensor) -> Tensor:
        """Predict the maps (B, H, W) of images (B, 3, H, W)."""
        output = self.network(image.to(self.dtype), position_rule=self.position_rule)
        return self.finish(output.float())

    def finish(self, output: Tensor) -> Tensor:
        """Convert calibrated disparity to meters, as the predictor does; return other output unchanged."""
        if self.calibration is None:
            return output
        scale, shift = self.calibration
        return 1 / (scale * output + shift).clamp(1 / FARTHEST_M, 1 / NEAREST_M)

    @torch.no_grad()
    def reference(self, network: DepthAnything, image: Tensor) -> Tensor:
        """Compute the expected output with the original network."""
        return self.finish(network(image, position_rule=self.position_rule))


def to_half_precision(network: DepthAnything) -> DepthAnything:
    """Copy a network to half precision, except for operations that need float32.

    Attention scores overflow in half precision and their softmax becomes NaN, so they are computed in float32, as are
    norms. The last layer is float32, because rounding its output would show as steps.

    Raises:
        ValueError: The encoder is not a DINOv2 one.
    """
    if not isinstance(network.pretrained, DINOv2):
        raise ValueError(f"fp16 is for DINOv2's encoders; export {network.encoder} in fp32")
    half: Any = copy.deepcopy(network).half()
    norms: list[Any] = [module for module in half.modules() if isinstance(module, nn.LayerNorm)]
    for norm in norms:
        norm.float().forward = MethodType(_layer_norm_fp32, norm)
    for block in half.pretrained.blocks:
        block.attn.forward = MethodType(_attention_fp32, block.attn)
    half.depth_head.scratch.output_conv2[2].float()
    return half


def _layer_norm_fp32(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


def _attention_fp32(attention: Any, x: Tensor, **_: Any) -> Tensor:
    """timm's attention without a mask, with scores and softmax in float32."""
    query, key, value = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (query.float() * attention.scale) @ key.float().transpose(2, 3)
    x = scores.softmax(3).to(x.dtype) @ value
    return attention.proj(x.transpose(1, 2).flatten(2))


def trace_program(module: ExportModule) -> torch.export.ExportedProgram:
    """Trace a network with dynamic image sizes and batch.

    Raises:
        ValueError: The encoder cannot be traced with dynamic sizes.
    """
    patch = module.network.patch_size
    batch, down, across = _EXAMPLE_SHAPE
    image = torch.zeros(batch, 3, down * patch, across * patch)
    rows, columns = torch.export.Dim("rows", min=3), torch.export.Dim("columns", min=3)
    shapes = ({0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * columns},)
    try:
        program = torch.export.export(module, (image,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the tracer raises many types
        raise ValueError(
            f"{module.network.encoder} cannot be exported with dynamic sizes ({error_reason(error)})"
        ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program


def _write_onnx(
    program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str], opset: int
) -> None:
    import onnx

    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=[metadata["quantity"]],
            verbose=False,
        )
    except Exception as error:  # the exporter raises many types
        raise UserError(
            f"the network cannot be written as ONNX ({error_reason(error)})",
            ["give ", Argument("opset", OPSET)],
        ) from error
    assert exported is not None
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()
    exported.model.metadata_props.update(metadata)
    large = sum(t.numel() * t.element_size() for t in program.state_dict.values()) > MAX_ONNX_BYTES
    exported.save(str(file), external_data=large)
    # The exporter silently keeps another version if it cannot convert.
    versions = {item.domain: item.version for item in onnx.load(file, load_external_data=False).opset_import}
    if versions.get("") != opset:
        raise UserError(
            [
                f"the exporter wrote operators of version {versions.get('')} in place of ",
                Argument("opset", opset),
            ],
            ["give ", Argument("opset", OPSET)],
        )


MAX_ONNX_BYTES = 1_900_000_000
"""Protobuf is limited to 2 GB; larger weights go to NAME.data next to the file, where ONNX Runtime finds them."""


def _write_torch(
    program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str], _: int
) -> None:
    with file.open("wb") as opened:
        torch.export.save(program, opened, extra_files={"metadata.json": json.dumps(metadata)})


def run_onnx(file: Path) -> Program:
    """Load an ONNX file with ONNX Runtime, on the CPU."""
    _require_packages("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime raises many types
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open the program ({error_reason(error)})",
            ["give ", Argument("opset", OPSET)],
        ) from error
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


def run_torch(file: Path) -> Program:
    """Load a torch.export program."""
    with file.open("rb") as opened, warnings.catch_warnings():  # torch checks the suffix of a path
        warnings.simplefilter("ignore", UserWarning)  # torch 2.11 warns about its own buffers
        module = torch.export.load(opened).module()

    @torch.no_grad()
    def run(image: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(image)).numpy()

    return run


def check_program(
    run: Program, network: DepthAnything, reference: Callable[[DepthAnything, Tensor], Tensor]
) -> list[ExportCheck]:
    """Compare a program with its network at sizes and batches that reveal a fixed size."""
    _, down, across = _EXAMPLE_SHAPE
    own = max(network.input_size // network.patch_size, 3)
    shapes = [
        (1, across, down),
        (2, across, down),
        (1, down, across),
        (2, 5, 9),
        (1, own, own),
        (1, own, own + 12),
    ]
    draw = torch.Generator().manual_seed(0)
    rows = []
    for batch, height, width in shapes:
        size = (height * network.patch_size, width * network.patch_size)
        image = torch.randn(batch, 3, *size, generator=draw)
        expected = reference(network, image).numpy()
        try:
            output = run(image.numpy())
        except Exception as error:  # the runtime raises many types
            raise ValueError(
                f"the exported program does not run at {size[0]}×{size[1]} ({error_reason(error)})"
            ) from error
        rows.append(_compare(output, expected))
    return rows


def _compare(output: np.ndarray, expected: np.ndarray) -> ExportCheck:
    if output.shape != expected.shape or output.dtype != np.float32:
        raise ValueError(
            f"the exported program returns {output.dtype} {output.shape}, and the network float32 {expected.shape}"
        )
    difference = np.abs(output.astype(np.float64) - expected)
    range_ = max(float(np.ptp(expected)), 1e-6 * float(np.abs(expected).max()), 1e-30)
    share = float(difference.max()) / range_ if np.isfinite(difference).all() else math.inf
    relative = float((difference / np.maximum(np.abs(expected), 1e-3 * range_)).mean())
    batch, height, width = expected.shape
    return ExportCheck((batch, height, width), float(difference.max()), share, relative)


def _check_tolerance(checks: Sequence[ExportCheck], path: Path, *, tolerance: float) -> None:
    worst = max(checks, key=lambda row: row.share)
    if not worst.share <= tolerance:
        shape = "×".join(str(n) for n in worst.shape)
        raise UserError(
            f"{path} would differ from the network by {worst.share:.1e} of its range at {shape}, more than "
            f"{tolerance:.0e}, and was removed",
            ["give another ", Argument("opset", OPSET), " or ", Argument("precision", "fp32")],
        )


def _require_packages(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"exporting to ONNX needs {package}: type pip install 'depth-anything-train[export]'"
            ) from error
