"""A program of `depth-anything export --to onnx` as teacher: `teacher=FILE.onnx`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depth_anything.data.transforms import resize_image
from depth_anything.errors import UserError, error_reason
from depth_anything.model.metadata import printable_line
from depth_anything.teachers.fingerprints import hash_files
from depth_anything.teachers.teacher import (
    LabelMaps,
    MapKind,
    Photographs,
    Teacher,
    TeacherFacts,
    agreed_license,
)

_UNKNOWN = "unknown"


class OnnxTeacher(Teacher):
    """An ONNX program with this project's metadata, run by ONNX Runtime; it sees photographs at the labels' size."""

    resized = True

    def __init__(self, file: str | Path, *, licence: str | None = None) -> None:
        """Open a program.

        Args:
            file: The .onnx file; the weights of a large one are next to it in FILE.data.
            licence: License of the weights, if the metadata do not say it.

        Raises:
            UserError: If the file is missing or damaged, has no metadata, or onnxruntime is not installed.
        """
        super().__init__()
        path = Path(file)
        if not path.is_file():
            raise UserError(
                f"there is no teacher at {path}",
                "type  depth-anything export --to onnx --weights MODEL --output FILE.onnx",
            )
        self.session = _open_session(path)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self._read_metadata(path, metadata)
        self.input_name = self.session.get_inputs()[0].name
        data = path.with_name(f"{path.name}.data")
        self.facts = TeacherFacts(
            fingerprint=hash_files((f.name.removeprefix(path.stem), f) for f in (path, data) if f.is_file()),
            file=str(file),
            licence=agreed_license(str(file), self._licence, licence),
            quantity=self.kind.quantity,
            unit=self.kind.unit,
            conversion=self.kind.conversion,
        )
        self.input_text = (
            f"photographs at the labels' size, bicubic with antialias on uint8, ONNX {self._precision}"
        )

    @torch.no_grad()
    def predict(self, photographs: Photographs) -> LabelMaps:
        """Predict disparity; photographs of another size than the labels are resized first."""
        height, width = photographs.size
        image = np.stack([resize_image(one, height, width) for one in photographs.image.cpu().numpy()])
        inputs = ((image.astype(np.float32) / 255 - self.mean) / self.std).transpose(0, 3, 1, 2)
        [output] = self.session.run(None, {self.input_name: np.ascontiguousarray(inputs)})
        return LabelMaps(self.kind.to_disparity(torch.from_numpy(output)))

    def _read_metadata(self, path: Path, metadata: Mapping[str, str]) -> None:
        try:
            max_depth = json.loads(metadata["max_depth"])
            self.multiple = int(metadata["multiple"])
            self.mean, self.std = (
                np.array(json.loads(metadata[name]), np.float32) for name in ("mean", "std")
            )
            if self.multiple < 1 or self.mean.shape != (3,) or self.std.shape != (3,):
                raise ValueError("multiple, mean or std is invalid")
            self.kind = MapKind(
                metadata["quantity"],
                metadata["unit"],
                None if max_depth is None else float(max_depth),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} has no metadata of this project ({error_reason(error)})",
                "write it with  depth-anything export --to onnx, or type teacher=module:function for another program",
            ) from error
        licence = printable_line(metadata.get("licence", _UNKNOWN))
        self._licence = None if licence in ("", _UNKNOWN) else licence
        self._precision = printable_line(metadata.get("precision", "fp32"))


def _open_session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"teacher={path} needs onnxruntime", "type pip install 'depth-anything-train[teachers]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # the runtime raises many types
        raise UserError(f"{path} cannot be opened by ONNX Runtime ({error_reason(error)})") from error
