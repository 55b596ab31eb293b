"""The yaml that declares a user's own set: its keys, their meaning, and what is said of wrong ones."""

import difflib
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from depth_anything.data.safe_yaml import load_yaml
from depth_anything.ingest import maps
from depth_anything.ingest.custom import INTRINSIC_KEYS, CustomSet
from depth_anything.licenses import check_license

METERS_PER_UNIT = {"m": 1.0, "cm": 0.01, "mm": 0.001}
DECLARATION_KEYS = (
    "name",
    "images",
    "depth",
    "quantity",
    "unit",
    "scale",
    "invalid",
    "sky",
    "sky_from",
    "intrinsics",
    "distance",
    "key",
    "channel",
    "licence",
)
_MAX_YAML_BYTES = 1 << 20


def load_declaration(path: str | Path) -> CustomSet:
    """Read the yaml of a set; docs/own-data.md has its keys.

    Raises:
        ValueError: It is not there, is no yaml, or says what cannot be; the key is named, and the nearest right
            one of a wrong one.
    """
    path = Path(path)
    try:
        data = maps.read_bytes(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: name the yaml that declares the set") from error
    if len(data) > _MAX_YAML_BYTES:
        raise ValueError(f"{path} is larger than 1 MiB, which no such yaml is")
    try:
        given = load_yaml(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: a set is declared by lines such as  images: rgb")
    try:
        return _parse_declaration(path.parent, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse_declaration(folder: Path, given: Mapping[Any, Any]) -> CustomSet:
    for key in given:
        if key not in DECLARATION_KEYS:
            near = difflib.get_close_matches(str(key), DECLARATION_KEYS, 1, 0.5)
            raise ValueError(
                f'"{key}" is no key{f"; did you mean {near[0]}" if near else ""}. Known: {", ".join(DECLARATION_KEYS)}'
            )
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("images", "depth"):
        if key not in given:
            raise ValueError(
                f"{key} is missing: write the folder, as  {key}: {'rgb' if key == 'images' else key}"
            )
    words = {
        key: _parse_text(given, key)
        for key in ("images", "depth", "key", "channel", "name", "licence")
        if key in given
    }
    if not re.fullmatch("[A-Za-z0-9_-]+", words.get("name", "x")):
        raise ValueError(f'name: "{words["name"]}" cannot name a set: use A-Z a-z 0-9 _ -')
    if "licence" in words:
        check_license(words["licence"])
    quantity = _parse_choice(given, "quantity", ("depth", "disparity"))
    distance = _parse_choice(given, "distance", ("planar", "ray"))
    intrinsics = _parse_intrinsics(given["intrinsics"]) if "intrinsics" in given else None
    if distance == "ray" and (quantity == "disparity" or intrinsics is None):
        raise ValueError("distance: ray is for depth, and needs  intrinsics: {fx: …, fy: …, cx: …, cy: …}")
    invalid = given.get("invalid", [])
    invalid = tuple(
        _parse_number("invalid", value) for value in (invalid if isinstance(invalid, list) else [invalid])
    )
    sky, sky_from = (_parse_number(key, given[key]) if key in given else None for key in ("sky", "sky_from"))
    if sky is not None and sky_from is not None:
        raise ValueError("sky is one value, sky_from the least of many: give one of them")
    if any(value == sky or (sky_from is not None and value >= sky_from) for value in invalid):
        raise ValueError("the same stored value is called invalid and sky: it can be one of them")
    if sky_from is not None and quantity == "disparity":
        raise ValueError("the sky of disparity is its least value, not a large one: write  sky: 0")
    return CustomSet(
        folder,
        words["images"],
        words["depth"],
        name=words.get("name"),
        quantity=quantity,
        scale=_parse_scale(given, quantity),
        invalid=invalid,
        sky=sky,
        sky_from=sky_from,
        intrinsics=intrinsics,
        distance=distance,
        key=words.get("key"),
        channel=words.get("channel"),
        licence=words.get("licence"),
    )


def _parse_text(given: Mapping[str, Any], key: str) -> str:
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise ValueError(f"{key}: {value!r:.80} is no text: put it in quotes")
    return str(value)


def _parse_choice(given: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
    value = given.get(key, known[0])
    if value not in known:
        raise ValueError(f"{key}: {value} is unknown: write {' or '.join(known)}")
    return value


def _parse_number(key: str, value: Any) -> float:
    """A number of the yaml, which takes 1e-3 and 1/256 for text."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and "/" in value:
            return float(Fraction(value.replace(" ", "")))
        return float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{key}: {value} is no number") from None


def _parse_scale(given: Mapping[str, Any], quantity: str) -> float:
    """Metres a stored unit, from `unit` or `scale`."""
    if "unit" in given and "scale" in given:
        raise ValueError("unit and scale say the same: give one of them")
    if given.get("unit") in tuple(METERS_PER_UNIT):
        if quantity == "disparity":
            raise ValueError("disparity has no unit: leave it out")
        return METERS_PER_UNIT[given["unit"]]
    key = "unit" if "unit" in given else "scale"
    if key not in given:
        if quantity == "disparity":
            return 1.0
        raise ValueError(
            "unit is missing: write  unit: m, cm or mm, or  scale: the metres of a stored 1, as 1/256"
        )
    try:
        scale = _parse_number(key, given[key])
    except ValueError:
        raise ValueError(
            f"{key}: {given[key]} is unknown: write m, cm, mm, or the metres of a stored 1"
        ) from None
    if not 0 < scale < math.inf:
        raise ValueError(f"{key}: {given[key]} must be above 0: the metres of a stored 1")
    return scale


def _parse_intrinsics(value: Any) -> tuple[float, ...]:
    if isinstance(value, list) and len(value) == 4:
        value = dict(zip(INTRINSIC_KEYS, value, strict=True))
    if not isinstance(value, dict) or set(value) != set(INTRINSIC_KEYS):
        raise ValueError("intrinsics are pixels of the images, as  {fx: 525, fy: 525, cx: 319.5, cy: 239.5}")
    numbers = tuple(_parse_number(f"intrinsics {key}", value[key]) for key in INTRINSIC_KEYS)
    if not all(map(math.isfinite, numbers)) or min(numbers[:2]) <= 0:
        raise ValueError(f"intrinsics {numbers}: fx and fy must be above 0")
    return numbers
