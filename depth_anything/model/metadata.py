"""Metadata of model files: written by `build_metadata`, and validated field by field when read.

A file may come from anyone. A field of another type or range raises an error that names the file, and text is reduced
to one printable line.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

import timm

from depth_anything import __version__
from depth_anything.errors import UserError
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS

MAX_INPUT_SIZE = 8192
"""Largest shorter side that a file may ask for, pixels."""

MAX_DEPTH_RANGE_M = (1e-3, 1e6)
"""Range of the largest depth of a metric model, meters."""

MAX_TEXT_LENGTH = 10_000
"""Characters of a name or license; licenses of many sets are joined."""

_UNKNOWN = "unknown"
_JSON_FIELDS = ("taps", "max_depth", "input_size", "origin", "calibration")


class ModelFacts(TypedDict, total=False):
    """Facts about a model, as far as its files or their names say them.

    `max_depth` is None for disparity, and missing if it is unknown.
    """

    encoder: str
    head: str
    version: int
    taps: tuple[int, ...]
    max_depth: float | None
    input_size: int
    licence: str | None
    origin: dict[str, Any]
    calibration: tuple[float, float] | None


def build_metadata(model: DepthAnything) -> dict[str, str]:
    """Build the metadata of a safetensors file: all facts that the tensors do not say.

    A Lightning checkpoint that stores this under "depth_anything" can be loaded without arguments, too.

    Returns:
        encoder, taps and max_depth (JSON), quantity, unit, input_size (pixels), licence, the project and its version.
        If known also origin (JSON), calibration (JSON), and the head unless it is `DPTHead`.
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
        **({"head": model.head} if model.head else {}),
        **({"origin": json.dumps(model.origin, sort_keys=True)} if model.origin else {}),
        **({} if model.calibration is None else {"calibration": json.dumps(model.calibration)}),
    }


def parse_metadata(metadata: Mapping[str, Any], path: str | Path) -> ModelFacts:
    """Parse what `build_metadata` wrote; metadata without an encoder has no facts.

    Args:
        metadata: Name to text.
        path: The file, for errors.

    Raises:
        ValueError: If a field has another type or range, or two fields contradict each other.
    """
    if "encoder" not in metadata:
        return {}
    fields = {name: metadata[name] for name in _PARSERS if name in metadata}
    for name in fields.keys() & set(_JSON_FIELDS):
        fields[name] = _parse_json(name, fields[name], path)
    return validate_metadata(fields, path)


def validate_metadata(fields: Mapping[str, Any], path: str | Path) -> ModelFacts:
    """Validate fields one by one.

    Args:
        fields: Keys of `ModelFacts`, and "quantity" and "unit", which must agree with max_depth; any may be missing.
        path: The file, for errors.

    Raises:
        ValueError: As `parse_metadata`.
    """
    facts: dict[str, Any] = {}
    for name, value in fields.items():
        try:
            facts[name] = _PARSERS[name](value)
        except _InvalidValue as expected:
            raise _metadata_error(path, name, value, f"is not {expected}") from None
    quantity, unit = facts.pop("quantity", None), facts.pop("unit", None)
    if "max_depth" in facts:
        metric, conflict = facts["max_depth"] is not None, f"contradicts its max_depth={fields['max_depth']}"
        if quantity not in (None, "depth" if metric else "disparity"):
            raise _metadata_error(path, "quantity", quantity, conflict)
        if unit not in (None, "m" if metric else "relative"):
            raise _metadata_error(path, "unit", unit, conflict)
        if metric and facts.get("calibration") is not None:
            raise _metadata_error(path, "calibration", fields["calibration"], "is for disparity, not depth")
    return cast(ModelFacts, facts)


def printable_line(text: object) -> str:
    """Reduce text to one line of printable characters: control characters become escapes such as `\\n`, `\\x1b`."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text).strip()
    )


class _InvalidValue(Exception):
    """A value has the wrong type or range; the message says what is expected."""


def _metadata_error(path: str | Path, name: str, value: Any, why: str) -> UserError:
    text = printable_line(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return UserError(f"{path} has invalid metadata: {name}={text} {why}", "ask its author for another file")


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


def _parse_int(value: Any, *, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _InvalidValue(f"a whole number from {low} to {high}")
    return value


def _parse_float(value: Any, *, low: float, high: float) -> float:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not low <= value <= high:  # false for NaN, too
        raise _InvalidValue(f"a number from {low:g} to {high:g}")
    return float(value)


def _parse_taps(value: Any) -> tuple[int, ...]:
    try:
        taps = tuple(_parse_int(tap, low=0, high=999) for tap in value)
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
        scale, shift = (_parse_float(number, low=-1e30, high=1e30) for number in value)
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
    """Check a mapping by its keys. Unknown keys are kept unchanged, and nothing reads them."""
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
    _parse_mapping,
    required={"file": _parse_text},
    others={"licence": _optional(_parse_text), "fingerprint": _optional(_parse_text)},
)
_parse_data_row = partial(
    _parse_mapping,
    required={"set": _parse_text, "records": partial(_parse_int, low=0, high=10**15)},
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
        "lora": partial(_parse_int, low=1, high=100_000),
    },
)

_PARSERS: dict[str, Callable[[Any], Any]] = {
    "encoder": _parse_encoder,
    "head": _parse_text,
    "taps": _parse_taps,
    "quantity": _choice_parser("disparity", "depth"),
    "unit": _choice_parser("relative", "m"),
    "max_depth": _optional(partial(_parse_float, low=MAX_DEPTH_RANGE_M[0], high=MAX_DEPTH_RANGE_M[1])),
    "input_size": partial(_parse_int, low=1, high=MAX_INPUT_SIZE),
    "licence": _parse_license,
    "origin": _parse_origin,
    "calibration": _optional(_parse_calibration),
}
