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

LARGEST_SIZE = 16_384
"""Pixels of a short side that a file may ask for."""

DEPTHS_M = (1e-3, 1e6)
"""Metres that the largest depth of a metric model may be."""

LONGEST_TEXT = 10_000
"""Characters of a name, a licence and the like; licences of many sets are joined."""

_UNKNOWN = "unknown"
_IN_JSON = ("taps", "max_depth", "input_size", "origin", "calibration")


def describe(model: DepthAnything) -> dict[str, str]:
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


def read_metadata(metadata: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
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
    facts = {name: metadata[name] for name in _FACTS if name in metadata}
    for name in facts.keys() & set(_IN_JSON):
        facts[name] = _parse(name, facts[name], path)
    return check_facts(facts, path)


def check_facts(facts: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
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
            checked[name] = _FACTS[name](value)
        except _Unlike as wanted:
            raise _refusal(path, name, value, f"is not {wanted}") from None
    quantity, unit = checked.pop("quantity", None), checked.pop("unit", None)
    if "max_depth" in checked:
        metric = checked["max_depth"] is not None
        if quantity not in (None, "depth" if metric else "disparity"):
            raise _refusal(path, "quantity", quantity, f"contradicts its max_depth={facts['max_depth']}")
        if unit not in (None, "m" if metric else "relative"):
            raise _refusal(path, "unit", unit, f"contradicts its max_depth={facts['max_depth']}")
        if metric and checked.get("calibration") is not None:
            raise _refusal(path, "calibration", facts["calibration"], "is for disparity, and it gives depth")
    return checked


def print_safely(text: object) -> str:
    """Write text on one line of printable characters: newlines, escapes and the like become `\\n`, `\\x1b`."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text).strip()
    )


class _Unlike(Exception):
    """A value is not what its fact must be; the message says what that is."""


def _refusal(path: str | Path, name: str, value: Any, why: str) -> ValueError:
    shown = print_safely(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ValueError(
        f"{path} has metadata that make no sense: {name}={shown} {why}; ask whoever made the file for another"
    )


def _parse(name: str, text: Any, path: str | Path) -> Any:
    try:
        if not isinstance(text, str):
            raise ValueError
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _refusal(path, name, text, "is not JSON") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise _Unlike(f"text of at most {LONGEST_TEXT} characters")
    return print_safely(value)


def _encoder(value: Any) -> str:
    name = _text(value)
    if name not in ENCODERS and not timm.is_model(name):
        raise _Unlike(f"one of {', '.join(ENCODERS)} or the name of a timm ViT")
    return name


def _one_of(*names: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            raise _Unlike(" or ".join(names))
        return value

    return read


def _whole(value: Any, *, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _Unlike(f"a whole number from {least} to {most}")
    return value


def _number(value: Any, *, least: float, most: float) -> float:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not least <= value <= most:  # not a number compares as neither
        raise _Unlike(f"a number from {least:g} to {most:g}")
    return float(value)


def _taps(value: Any) -> tuple[int, ...]:
    try:
        taps = tuple(_whole(tap, least=0, most=999) for tap in value)
    except (TypeError, _Unlike):
        taps = ()
    if len(taps) != 4 or list(taps) != sorted(set(taps)):
        raise _Unlike("four blocks, from 0 and ascending")
    return taps


def _calibration(value: Any) -> tuple[float, float]:
    wanted = _Unlike("two finite numbers, scale above 0 and shift")
    if not isinstance(value, list) or len(value) != 2:
        raise wanted
    try:
        scale, shift = (_number(number, least=-1e30, most=1e30) for number in value)
    except _Unlike:
        raise wanted from None
    if not scale > 0 or not math.isfinite(1 / scale):
        raise wanted
    return scale, shift


def _licence(value: Any) -> str | None:
    text = _text(value)
    return None if text in ("", _UNKNOWN) else text


def _maybe(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _mapping(
    value: Any, *, required: Mapping[str, Callable[[Any], Any]], others: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """Check a mapping by its keys; those that are not known here stay as they are, and nothing reads them."""
    if not isinstance(value, dict) or not required.keys() <= value.keys():
        raise _Unlike(f"a mapping with {', '.join(required)}" if required else "a mapping")
    readers = {**required, **others}
    checked = {}
    for key, inner in value.items():
        try:
            checked[key] = readers[key](inner) if key in readers else inner
        except _Unlike as wanted:
            raise _Unlike(f"a mapping whose {key} is {wanted}") from None
    return checked


def _rows(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _Unlike("a list")
    return [_row(row) for row in value]


_teacher = partial(_mapping, required={"file": _text}, others={"licence": _maybe(_text)})
_row = partial(
    _mapping,
    required={"set": _text, "records": partial(_whole, least=0, most=10**15)},
    others={"licence": _maybe(_text), "teacher": _maybe(_teacher)},
)
_start = partial(_mapping, required={"from": _text}, others={"licence": _maybe(_text), "base": _maybe(_text)})
_origin = partial(
    _mapping,
    required={},
    others={
        "start": _start,
        "stage": _text,
        "data": _rows,
        "lora": partial(_whole, least=1, most=100_000),
    },
)

_FACTS: dict[str, Callable[[Any], Any]] = {
    "encoder": _encoder,
    "taps": _taps,
    "quantity": _one_of("disparity", "depth"),
    "unit": _one_of("relative", "m"),
    "max_depth": _maybe(partial(_number, least=DEPTHS_M[0], most=DEPTHS_M[1])),
    "input_size": partial(_whole, least=1, most=LARGEST_SIZE),
    "licence": _licence,
    "origin": _origin,
    "calibration": _maybe(_calibration),
}
