"""What a model file says of its model: written by `describe`, read from anyone's file field by field.

A file may come from anywhere. Each fact has a type and a range; what has another is refused in one sentence with the
path, and text becomes one printable line.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm

from depth_anything import __version__
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS

MAX_INPUT_SIZE = 8192
"""Pixels of a short side that a file may ask for."""

MAX_DEPTH_RANGE_M = (1e-3, 1e6)
"""Metres that the largest depth of a metric model may be."""

MAX_TEXT_LENGTH = 10_000
"""Characters of a name, a licence and the like; licences of many sets are joined."""

_UNKNOWN = "unknown"
_JSON_FIELDS = ("taps", "max_depth", "input_size", "origin", "calibration")


def build_metadata(model: DepthAnything) -> dict[str, str]:
    """Say what the tensors of a model do not: the metadata of its safetensors file.

    A Lightning checkpoint that keeps this under "depth_anything" needs no arguments to be loaded either.

    Returns:
        encoder, taps and max_depth (JSON), quantity, unit, input_size (pixels), licence, the project and its version;
        where known also origin (JSON); of a calibrated model calibration (JSON).
    """
    return {
        "format": "pt",
        "project": "depth-anything-train",
        "version": __version__,
        "encoder": model.encoder,
        "taps": json.dumps(model.taps),
        "quantity": model.quantity,
        "unit": model.unit,
        "max_depth": json.dumps(model.max_depth),
        "input_size": json.dumps(model.input_size),
        "licence": model.licence or _UNKNOWN,
        **({"origin": json.dumps(model.origin, sort_keys=True)} if model.origin else {}),
        **({} if model.calibration is None else {"calibration": json.dumps(model.calibration)}),
    }


def parse_metadata(metadata: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Read what `describe` wrote; a file without an encoder in its metadata says nothing.

    Args:
        metadata: Name to text, as the file has it.
        path: The file, for the sentence.

    Returns:
        Any of encoder, taps, max_depth (None for disparity), input_size, licence, origin, calibration.

    Raises:
        ValueError: If a fact has another type or range, or two contradict each other.
    """
    if "encoder" not in metadata:
        return {}
    facts = {name: metadata[name] for name in _PARSERS if name in metadata}
    for name in facts.keys() & set(_JSON_FIELDS):
        facts[name] = _parse_json(name, facts[name], path)
    return validate_metadata(facts, path)


def validate_metadata(facts: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Check facts that a file states of its model, one by one.

    Args:
        facts: As `read_metadata` returns them, and quantity and unit; unchecked, any of them may be missing.
        path: The file, for the sentence.

    Returns:
        The same, checked: without quantity and unit, which follow from max_depth, and text on one line.

    Raises:
        ValueError: As `read_metadata`.
    """
    checked = {}
    for name, value in facts.items():
        try:
            checked[name] = _PARSERS[name](value)
        except _InvalidValue as wanted:
            raise _metadata_error(path, name, value, f"is not {wanted}") from None
    quantity, unit = checked.pop("quantity", None), checked.pop("unit", None)
    if "max_depth" in checked:
        metric = checked["max_depth"] is not None
        if quantity not in (None, "depth" if metric else "disparity"):
            raise _metadata_error(
                path, "quantity", quantity, f"contradicts its max_depth={facts['max_depth']}"
            )
        if unit not in (None, "m" if metric else "relative"):
            raise _metadata_error(path, "unit", unit, f"contradicts its max_depth={facts['max_depth']}")
        if metric and checked.get("calibration") is not None:
            raise _metadata_error(
                path, "calibration", facts["calibration"], "is for disparity, and it gives depth"
            )
    return checked


def printable_line(text: object) -> str:
    """Write text on one line of printable characters: newlines, escapes and the like become `\\n`, `\\x1b`."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text).strip()
    )


class _InvalidValue(Exception):
    """A value is not what its fact must be; the message says what that is."""


def _metadata_error(path: str | Path, name: str, value: Any, why: str) -> ValueError:
    shown = printable_line(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ValueError(
        f"{path} has metadata that make no sense: {name}={shown} {why}; ask whoever made the file for another"
    )


def _parse_json(name: str, text: Any, path: str | Path) -> Any:
    try:
        if not isinstance(text, str):
            raise ValueError
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _metadata_error(path, name, text, "is not JSON") from None


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_LENGTH:
        raise _InvalidValue(f"text of at most {MAX_TEXT_LENGTH} characters")
    return printable_line(value)


def _parse_encoder(value: Any) -> str:
    name = _parse_text(value)
    if name not in ENCODERS and not timm.is_model(name):
        raise _InvalidValue(f"one of {', '.join(ENCODERS)} or the name of a timm ViT")
    return name


def _choice_parser(*names: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            raise _InvalidValue(" or ".join(names))
        return value

    return read


def _parse_int(value: Any, *, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _InvalidValue(f"a whole number from {least} to {most}")
    return value


def _parse_float(value: Any, *, least: float, most: float) -> float:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not least <= value <= most:  # not a number compares as neither
        raise _InvalidValue(f"a number from {least:g} to {most:g}")
    return float(value)


def _parse_taps(value: Any) -> tuple[int, ...]:
    try:
        taps = tuple(_parse_int(tap, least=0, most=999) for tap in value)
    except (TypeError, _InvalidValue):
        taps = ()
    if len(taps) != 4 or list(taps) != sorted(set(taps)):
        raise _InvalidValue("four blocks, from 0 and ascending")
    return taps


def _parse_calibration(value: Any) -> tuple[float, float]:
    wanted = _InvalidValue("two finite numbers, scale above 0 and shift")
    if not isinstance(value, list) or len(value) != 2:
        raise wanted
    try:
        scale, shift = (_parse_float(number, least=-1e30, most=1e30) for number in value)
    except _InvalidValue:
        raise wanted from None
    if not scale > 0 or not math.isfinite(1 / scale):
        raise wanted
    return scale, shift


def _parse_license(value: Any) -> str | None:
    text = _parse_text(value)
    return None if text in ("", _UNKNOWN) else text


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _parse_mapping(
    value: Any, *, required: Mapping[str, Callable[[Any], Any]], others: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """Check a mapping by its keys; those that are not known here stay as they are, and nothing reads them."""
    if not isinstance(value, dict) or not required.keys() <= value.keys():
        raise _InvalidValue(f"a mapping with {', '.join(required)}" if required else "a mapping")
    readers = {**required, **others}
    checked = {}
    for key, inner in value.items():
        try:
            checked[key] = readers[key](inner) if key in readers else inner
        except _InvalidValue as wanted:
            raise _InvalidValue(f"a mapping whose {key} is {wanted}") from None
    return checked


def _parse_data(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _InvalidValue("a list")
    return [_parse_data_row(row) for row in value]


_parse_teacher = partial(
    _parse_mapping, required={"file": _parse_text}, others={"licence": _optional(_parse_text)}
)
_parse_data_row = partial(
    _parse_mapping,
    required={"set": _parse_text, "records": partial(_parse_int, least=0, most=10**15)},
    others={"licence": _optional(_parse_text), "teacher": _optional(_parse_teacher)},
)
_parse_start = partial(
    _parse_mapping,
    required={"from": _parse_text},
    others={"licence": _optional(_parse_text), "base": _optional(_parse_text)},
)
_parse_origin = partial(
    _parse_mapping,
    required={},
    others={
        "start": _parse_start,
        "stage": _parse_text,
        "data": _parse_data,
        "lora": partial(_parse_int, least=1, most=100_000),
    },
)

_PARSERS: dict[str, Callable[[Any], Any]] = {
    "encoder": _parse_encoder,
    "taps": _parse_taps,
    "quantity": _choice_parser("disparity", "depth"),
    "unit": _choice_parser("relative", "m"),
    "max_depth": _optional(partial(_parse_float, least=MAX_DEPTH_RANGE_M[0], most=MAX_DEPTH_RANGE_M[1])),
    "input_size": partial(_parse_int, least=1, most=MAX_INPUT_SIZE),
    "licence": _parse_license,
    "origin": _parse_origin,
    "calibration": _optional(_parse_calibration),
}
