"""Models for other programs: ONNX and torch.export, at any size and batch, and proved before they are left.

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
"""The oldest that has every operation of the network."""

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""How far from the network's map, as a share of its range, an exported program may be."""

_EXAMPLE_SHAPE = (2, 6, 8)
"""Images, and patches down and across, that a program is traced with; two, since one would stay one."""

Program = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ExportCheck:
    """An exported program held against the network on one batch.

    Attributes:
        shape: (B, H, W) of the batch.
        difference: The largest difference of a value, in the output's unit.
        share: The same as a share of the range of the network's map.
        relative: The mean of the difference relative to the value.
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
    """Write a model for other programs, run what was written, and leave it only if it gives the network's map.

    Programs take float32 (B, 3, H, W) as `DepthAnything.forward` does, of any batch and of any sides that are three or
    more patches, and give float32 (B, H, W). A calibrated model's gives metres. Beside a program lies NAME.json, which
    says what it is and what was measured.

    Args:
        model: On any device; it stays as it is.
        path: The file, or for transformers the folder.
        to: One of `FORMATS`.
        precision: "fp32", or for programs "fp16": half the size; scores, softmax and norms stay in float32.
        opset: Of ONNX, `OPSET` or a newer one that the installed ONNX Runtime runs.
        position_rule: Of a program, as `DepthAnything.forward` takes it.

    Returns:
        What was measured; nothing for formats of weights, whose bytes are compared instead.

    Raises:
        ValueError: For a model that the format cannot hold, a package that is missing, a version of operators that
            cannot be written or run, or a program that differs; nothing is left.
        OSError: If it cannot be written.
    """
    path = Path(path)
    _check_arguments(to, precision, opset, position_rule)
    if to not in PROGRAM_FORMATS:
        save_model(model, path, format=to)
        if to != "transformers":  # that has its own inside
            _write_card(model, path, to=to)
        if fingerprint(path) != fingerprint(model):
            raise ValueError(f"{path} does not hold the model's weights; the disk or the format failed")
        return []
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; give the name of a file, as {path / ('model.' + SUFFIXES[to])}"
        )
    network = copy.deepcopy(model).cpu().eval()
    module = ExportModule(network, precision=precision, position_rule=position_rule)
    facts = {**program_metadata(network, precision=precision), "position_rule": module.position_rule}
    program = trace_program(module)
    with atomic_files(path, also=WRITE_ERRORS) as folder:
        file = folder / path.name
        {"onnx": _write_onnx, "torch": _write_torch}[to](program, file, facts, opset)
        run = {"onnx": run_onnx, "torch": run_torch}[to](file)
        checks = check_program(run, network, module.reference)
        _check_tolerance(checks, path, tolerance=TOLERANCE[precision])
        report = {"file": path.name, "made": facts, "tolerance": TOLERANCE[precision]}
        report["checks"] = [asdict(row) for row in checks]
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{path.name}.json").write_text(text, encoding="utf-8")
    _write_card(model, path, to=to, checks=checks)
    return checks


SUFFIXES = {"onnx": "onnx", "torch": "pt2"}


def _check_arguments(to: str, precision: str, opset: int, position_rule: str | None) -> None:
    """Refuse what does not exist, and what would be ignored."""
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
    table = {"How far it is from the network": f"```text\n{format_checks(checks)}\n```"} if checks else {}
    write_card(
        build_card(model, file=path.name, form=to, title=path.stem, measured=table),
        path.parent,
        file=path.name,
    )


def program_metadata(model: DepthAnything, *, precision: str) -> dict[str, str]:
    """Say what a program gives and what it must be given, as strings for its metadata."""
    facts = {**build_metadata(model), "precision": precision}
    del facts["format"]
    if model.calibration is not None:
        facts |= {"quantity": "depth", "unit": "m"}
    return facts | {
        "patch": str(model.patch_size),
        "multiple": str(model.multiple),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "fingerprint": fingerprint(model),
    }


def format_checks(checks: Sequence[ExportCheck]) -> str:
    """Lay out what was measured as a table."""
    rows = [("batch × height × width", "largest difference", "of the range", "mean relative")]
    for row in checks:
        shape = " × ".join(str(n) for n in row.shape)
        rows.append((shape, f"{row.difference:.1e}", f"{row.share:.1e}", f"{row.relative:.1e}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class ExportModule(nn.Module):
    """A network as a program gives it: float32 in and out, in metres where it is calibrated."""

    def __init__(self, network: DepthAnything, *, precision: str, position_rule: str | None = None) -> None:
        """Wrap a network; for fp16 a copy of it in half precision."""
        super().__init__()
        self.position_rule = position_rule or network.position_rule
        network.check_position_rule(self.position_rule)
        self.calibration = network.calibration
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.network = to_half_precision(network) if precision == "fp16" else network

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (B, 3, H, W) to its map (B, H, W)."""
        output = self.network(image.to(self.dtype), position_rule=self.position_rule)
        return self.finish(output.float())

    def finish(self, output: Tensor) -> Tensor:
        """Make metres of a calibrated disparity, as the predictor does; else leave the output as it is."""
        if self.calibration is None:
            return output
        scale, shift = self.calibration
        return 1 / (scale * output + shift).clamp(1 / FARTHEST_M, 1 / NEAREST_M)

    @torch.no_grad()
    def reference(self, network: DepthAnything, image: Tensor) -> Tensor:
        """What the program should give: the untouched network's map, finished alike."""
        return self.finish(network(image, position_rule=self.position_rule))


def to_half_precision(network: DepthAnything) -> DepthAnything:
    """Copy a network into half precision, less what half precision breaks.

    Scores overflow and their softmax becomes NaN (a black picture), so they are computed in float32, as are norms;
    the last layer is float32, or its rounding would show as steps.

    Raises:
        ValueError: For an encoder that is not DINOv2's, whose attention is not known here.
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
    """timm's attention without a mask, its scores and their softmax in float32."""
    query, key, value = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (query.float() * attention.scale) @ key.float().transpose(2, 3)
    x = scores.softmax(3).to(x.dtype) @ value
    return attention.proj(x.transpose(1, 2).flatten(2))


def trace_program(module: ExportModule) -> torch.export.ExportedProgram:
    """Trace a network at sizes and batches that stay open.

    Raises:
        ValueError: If its encoder ties its graph to one size.
    """
    patch = module.network.patch_size
    batch, down, across = _EXAMPLE_SHAPE
    image = torch.zeros(batch, 3, down * patch, across * patch)
    rows, columns = torch.export.Dim("rows", min=3), torch.export.Dim("columns", min=3)
    shapes = ({0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * columns},)
    try:
        program = torch.export.export(module, (image,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the tracer has many of its own
        raise ValueError(
            f"{module.network.encoder} cannot be exported with open sizes ({error_reason(error)})"
        ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of code on this machine
    return program


def _write_onnx(
    program: torch.export.ExportedProgram, file: Path, facts: Mapping[str, str], opset: int
) -> None:
    import onnx

    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=[facts["quantity"]],
            verbose=False,
        )
    except Exception as error:  # the exporter has many of its own
        raise UserError(
            f"the network cannot be written as ONNX ({error_reason(error)})",
            ["give ", Argument("opset", OPSET)],
        ) from error
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()
    made.model.metadata_props.update(facts)
    large = sum(t.numel() * t.element_size() for t in program.state_dict.values()) > MAX_ONNX_BYTES
    made.save(str(file), external_data=large)
    # A version that the exporter cannot convert to is left as another one, without an error.
    said = {item.domain: item.version for item in onnx.load(file, load_external_data=False).opset_import}
    if said.get("") != opset:
        raise UserError(
            [
                f"the exporter wrote operators of version {said.get('')} in place of ",
                Argument("opset", opset),
            ],
            ["give ", Argument("opset", OPSET)],
        )


MAX_ONNX_BYTES = 1_900_000_000
"""Protobuf ends at two gigabytes; more goes into a second file, NAME.data, which ONNX Runtime looks for there."""


def _write_torch(program: torch.export.ExportedProgram, file: Path, facts: Mapping[str, str], _: int) -> None:
    with file.open("wb") as opened:
        torch.export.save(program, opened, extra_files={"metadata.json": json.dumps(facts)})


def run_onnx(file: Path) -> Program:
    """Load an ONNX file into ONNX Runtime, on the CPU."""
    _require_packages("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has many of its own
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open the program ({error_reason(error)})",
            ["give ", Argument("opset", OPSET)],
        ) from error
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


def run_torch(file: Path) -> Program:
    """Load a program of torch.export."""
    with file.open("rb") as opened, warnings.catch_warnings():  # given a path, torch looks at how it ends
        warnings.simplefilter("ignore", UserWarning)  # torch 2.11 finds fault with its own buffers
        module = torch.export.load(opened).module()

    @torch.no_grad()
    def run(image: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(image)).numpy()

    return run


def check_program(
    run: Program, network: DepthAnything, reference: Callable[[DepthAnything, Tensor], Tensor]
) -> list[ExportCheck]:
    """Hold a program against its network where a traced size would show: turned round, at its own square, batched."""
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
        want = reference(network, image).numpy()
        try:
            got = run(image.numpy())
        except Exception as error:  # a fixed size ends in whatever the runtime throws
            raise ValueError(
                f"the exported program does not run at {size[0]}×{size[1]} ({error_reason(error)})"
            ) from error
        rows.append(_compare(got, want))
    return rows


def _compare(got: np.ndarray, want: np.ndarray) -> ExportCheck:
    if got.shape != want.shape or got.dtype != np.float32:
        raise ValueError(
            f"the exported program gives {got.dtype} {got.shape}, and the network float32 {want.shape}"
        )
    difference = np.abs(got.astype(np.float64) - want)
    spread = max(float(np.ptp(want)), 1e-6 * float(np.abs(want).max()), 1e-30)
    share = float(difference.max()) / spread if np.isfinite(difference).all() else math.inf
    relative = float((difference / np.maximum(np.abs(want), 1e-3 * spread)).mean())
    batch, height, width = want.shape
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
