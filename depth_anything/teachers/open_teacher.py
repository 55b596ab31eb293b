"""Choose and open the teacher that `teacher=` names; network_teacher.py has files of this project and of the authors.

transformers:FOLDER, transformers:OWNER/NAME    a depth model of transformers
folder:DIR                                      maps that any program made
FILE.onnx                                       a program of `depth-anything export`
module:function                                 a Python function
"""

import re
from pathlib import Path

from depth_anything.errors import UserError
from depth_anything.licenses import check_license
from depth_anything.teachers.teacher import Teacher

PREFIXES = ("transformers", "folder")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def teacher_kind(spec: str) -> str:
    """Return the kind of teacher that a text names.

    Returns:
        "transformers", "folder", "onnx", "function", or "network" for everything else.

    >>> [teacher_kind(text) for text in ("transformers:apple/DepthPro-hf", "m.onnx", "my_teachers:flat", "m.pth")]
    ['transformers', 'onnx', 'function', 'network']
    """
    prefix, colon, rest = spec.partition(":")
    if colon and rest and prefix in PREFIXES:
        return prefix
    if spec.lower().endswith(".onnx"):
        return "onnx"
    if _FUNCTION.fullmatch(spec) and not Path(spec).exists():
        return "function"
    return "network"


def is_hub_name(name: str) -> bool:
    """Return whether a text can be a repository of the Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION."""
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".")


def is_present(spec: str) -> bool:
    """Return whether a teacher can be opened without a download."""
    kind, name = teacher_kind(spec), spec.partition(":")[2]
    if kind == "transformers":
        from depth_anything.teachers.transformers_teacher import find_folder

        return find_folder(name, download=False) is not None
    if kind == "folder":
        return Path(name).is_dir()
    return kind == "function" or Path(spec).exists()


def open_teacher(
    spec: str,
    *,
    multiple: int,
    quantity: str | None = None,
    unit: str | None = None,
    licence: str | None = None,
) -> Teacher:
    """Open a teacher of any kind but "network".

    Args:
        spec: As `teacher=` takes it.
        multiple: The sides of labels are multiples of it, pixels, unless the teacher needs another.
        quantity: "disparity" or "depth", where the teacher does not say it.
        unit: "m", "1/m" or "relative", where the teacher does not say it.
        licence: SPDX name of the license, where the teacher does not say it.

    Raises:
        UserError: If there is no such teacher, or what it predicts is unknown or contradictory.
    """
    kind, name = teacher_kind(spec), spec.partition(":")[2]
    licence = None if licence is None else check_license(licence)
    options = {"quantity": quantity, "unit": unit, "licence": licence}
    if kind == "transformers":
        from depth_anything.teachers.transformers_teacher import TransformersTeacher

        return TransformersTeacher(name, spec=spec, multiple=multiple, **options)
    if kind == "folder":
        from depth_anything.teachers.folder_teacher import FolderTeacher

        return FolderTeacher(name, spec=spec, multiple=multiple, **options)
    if kind == "function":
        from depth_anything.teachers.callable_teacher import CallableTeacher

        return CallableTeacher(spec, multiple=multiple, **options)
    if kind == "onnx":
        from depth_anything.teachers.onnx_teacher import OnnxTeacher

        check_no_kind(spec, quantity=quantity, unit=unit)
        return OnnxTeacher(spec, licence=licence)
    raise ValueError(f"{spec} is a network")


def check_no_kind(spec: str, *, quantity: str | None, unit: str | None) -> None:
    """Refuse a quantity or unit for a file whose metadata say them.

    Raises:
        UserError: If one is given.
    """
    for name, value in (("teacher_quantity", quantity), ("teacher_unit", unit)):
        if value is not None:
            raise UserError(
                f"{name}={value} is for teachers that do not say what they predict, and {spec} does",
                f"leave {name} out",
            )
