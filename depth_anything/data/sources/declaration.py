"""The yaml that declares a user's own set: its keys, their meaning, and what is said of wrong ones."""

import difflib
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from depth_anything.data.sources import maps
from depth_anything.data.sources.custom import CAMERA, Custom
from depth_anything.data.yaml_text import load_yaml
from depth_anything.licences import check_licence

UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
KEYS = (
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
_MAX_YAML = 1 << 20


def read_yaml(path: str | Path) -> Custom:
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
    if len(data) > _MAX_YAML:
        raise ValueError(f"{path} is larger than 1 MiB, which no such yaml is")
    try:
        given = load_yaml(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: a set is declared by lines such as  images: rgb")
    try:
        return _declared(path.parent, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _declared(folder: Path, given: Mapping[Any, Any]) -> Custom:
    for key in given:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1, 0.5)
            raise ValueError(
                f'"{key}" is no key{f"; did you mean {near[0]}" if near else ""}. Known: {", ".join(KEYS)}'
            )
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("images", "depth"):
        if key not in given:
            raise ValueError(
                f"{key} is missing: write the folder, as  {key}: {'rgb' if key == 'images' else key}"
            )
    words = {
        key: _text(given, key)
        for key in ("images", "depth", "key", "channel", "name", "licence")
        if key in given
    }
    if not re.fullmatch("[A-Za-z0-9_-]+", words.get("name", "x")):
        raise ValueError(f'name: "{words["name"]}" cannot name a set: use A-Z a-z 0-9 _ -')
    if "licence" in words:
        check_licence(words["licence"])
    quantity = _choice(given, "quantity", ("depth", "disparity"))
    distance = _choice(given, "distance", ("planar", "ray"))
    intrinsics = _intrinsics(given["intrinsics"]) if "intrinsics" in given else None
    if distance == "ray" and (quantity == "disparity" or intrinsics is None):
        raise ValueError("distance: ray is for depth, and needs  intrinsics: {fx: …, fy: …, cx: …, cy: …}")
    invalid = given.get("invalid", [])
    invalid = tuple(
        _number("invalid", value) for value in (invalid if isinstance(invalid, list) else [invalid])
    )
    sky, sky_from = (_number(key, given[key]) if key in given else None for key in ("sky", "sky_from"))
    if sky is not None and sky_from is not None:
        raise ValueError("sky is one value, sky_from the least of many: give one of them")
    if any(value == sky or (sky_from is not None and value >= sky_from) for value in invalid):
        raise ValueError("the same stored value is called invalid and sky: it can be one of them")
    if sky_from is not None and quantity == "disparity":
        raise ValueError("the sky of disparity is its least value, not a large one: write  sky: 0")
    return Custom(
        folder,
        words["images"],
        words["depth"],
        name=words.get("name"),
        quantity=quantity,
        scale=_scale(given, quantity),
        invalid=invalid,
        sky=sky,
        sky_from=sky_from,
        intrinsics=intrinsics,
        distance=distance,
        key=words.get("key"),
        channel=words.get("channel"),
        licence=words.get("licence"),
    )


def _text(given: Mapping[str, Any], key: str) -> str:
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise ValueError(f"{key}: {value!r:.80} is no text: put it in quotes")
    return str(value)


def _choice(given: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
    value = given.get(key, known[0])
    if value not in known:
        raise ValueError(f"{key}: {value} is unknown: write {' or '.join(known)}")
    return value


def _number(key: str, value: Any) -> float:
    """A number of the yaml, which takes 1e-3 and 1/256 for text."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and "/" in value:
            return float(Fraction(value.replace(" ", "")))
        return float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{key}: {value} is no number") from None


def _scale(given: Mapping[str, Any], quantity: str) -> float:
    """Metres a stored unit, from `unit` or `scale`."""
    if "unit" in given and "scale" in given:
        raise ValueError("unit and scale say the same: give one of them")
    if given.get("unit") in tuple(UNITS):
        if quantity == "disparity":
            raise ValueError("disparity has no unit: leave it out")
        return UNITS[given["unit"]]
    key = "unit" if "unit" in given else "scale"
    if key not in given:
        if quantity == "disparity":
            return 1.0
        raise ValueError(
            "unit is missing: write  unit: m, cm or mm, or  scale: the metres of a stored 1, as 1/256"
        )
    try:
        scale = _number(key, given[key])
    except ValueError:
        raise ValueError(
            f"{key}: {given[key]} is unknown: write m, cm, mm, or the metres of a stored 1"
        ) from None
    if not 0 < scale < math.inf:
        raise ValueError(f"{key}: {given[key]} must be above 0: the metres of a stored 1")
    return scale


def _intrinsics(value: Any) -> tuple[float, ...]:
    if isinstance(value, list) and len(value) == 4:
        value = dict(zip(CAMERA, value, strict=True))
    if not isinstance(value, dict) or set(value) != set(CAMERA):
        raise ValueError("intrinsics are pixels of the images, as  {fx: 525, fy: 525, cx: 319.5, cy: 239.5}")
    numbers = tuple(_number(f"intrinsics {key}", value[key]) for key in CAMERA)
    if not all(map(math.isfinite, numbers)) or min(numbers[:2]) <= 0:
        raise ValueError(f"intrinsics {numbers}: fx and fy must be above 0")
    return numbers
