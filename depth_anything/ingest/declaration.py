"""Parse the YAML file that declares a user's own set (docs/own-data.md)."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from depth_anything.data.address import SET_NAME_RULE, is_set_name
from depth_anything.data.safe_yaml import load_yaml
from depth_anything.ingest.custom import INTRINSIC_KEYS, CustomSet
from depth_anything.ingest.maps import read_bytes
from depth_anything.licenses import check_license

METERS_PER_UNIT = {"m": 1.0, "cm": 0.01, "mm": 0.001}
DECLARATION_KEYS = tuple(
    "name images depth quantity unit scale invalid sky sky_from intrinsics distance key channel licence".split()
)
_MAX_YAML_BYTES = 1 << 20
T = TypeVar("T")


def load_declaration(path: str | Path) -> CustomSet:
    """Read the YAML declaration of a custom data set.

    Raises:
        ValueError: If the file does not exist, is not YAML, has an unknown key (the nearest key is named) or an invalid
            value (its key is named).
    """
    return read_declaration(path, DECLARATION_KEYS, lambda values, folder: _Declaration(values).parse(folder))


def read_declaration(
    path: str | Path, keys: Sequence[str], parse: Callable[[Mapping[Any, Any], Path], T]
) -> T:
    """Read a YAML file of known keys; every error names the file.

    Args:
        path: The file.
        keys: The keys that it may have.
        parse: Converts its values and the path of its folder.

    Raises:
        ValueError: If the file does not exist, is not YAML, has an unknown key (the nearest key is named), or `parse`
            refuses it.
    """
    path = Path(path)
    try:
        data = read_bytes(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: type the path of the YAML file that declares the set") from error
    if len(data) > _MAX_YAML_BYTES:
        raise ValueError(f"{path} has more than {_MAX_YAML_BYTES >> 20} MiB: a declaration is a few lines")
    try:
        values = load_yaml(data)
        if not isinstance(values, dict):
            raise ValueError("a declaration has lines such as  images: rgb")
        for key in values:
            if key not in keys:
                nearest = difflib.get_close_matches(str(key), keys, 1, 0.5)
                raise ValueError(
                    f'unknown key "{key}"{f"; did you mean {nearest[0]}" if nearest else ""}. '
                    f"Keys: {', '.join(keys)}"
                )
        return parse(values, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def declared_text(values: Mapping[Any, Any], key: str) -> str | None:
    """Return the text of a key; a number is read as text. None if the key is missing.

    Raises:
        ValueError: If the value is not a text.
    """
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise ValueError(f"{key}: {value!r:.80} is not a text: put it in quotes")
    return str(value)


def declared_name_and_license(values: Mapping[Any, Any]) -> tuple[str | None, str | None]:
    """Return the name of the set and its license, which may both be missing.

    Raises:
        ValueError: If one of them is invalid.
    """
    name, licence = declared_text(values, "name"), declared_text(values, "licence")
    if name is not None and not is_set_name(name):
        raise ValueError(f'name: "{name}" is not a valid name of a set: {SET_NAME_RULE}')
    if licence is not None:
        check_license(licence)
    return name, licence


class _Declaration:
    """Parses and checks the values of a declaration."""

    def __init__(self, values: Mapping[Any, Any]) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}

    def parse(self, folder: Path) -> CustomSet:
        """Check all keys and build the set; paths are relative to `folder`."""
        for key, example in (("images", "rgb"), ("depth", "depth")):
            if key not in self._values:
                raise ValueError(f"{key} is missing: write its folder, as in  {key}: {example}")
        images, depth = (declared_text(self._values, key) or "" for key in ("images", "depth"))
        dataset_key, channel = (declared_text(self._values, key) for key in ("key", "channel"))
        name, licence = declared_name_and_license(self._values)
        quantity = self._choice("quantity", ("depth", "disparity"))
        distance = self._choice("distance", ("planar", "ray"))
        intrinsics = self._intrinsics()
        if distance == "ray" and (quantity == "disparity" or intrinsics is None):
            raise ValueError(
                "distance: ray applies to depth only, and needs  intrinsics: {fx: …, fy: …, cx: …, cy: …}"
            )
        invalid, sky, sky_from = self._special_values(quantity)
        return CustomSet(
            folder,
            images,
            depth,
            name=name,
            quantity=quantity,
            scale=self._scale(quantity),
            invalid=invalid,
            sky=sky,
            sky_from=sky_from,
            intrinsics=intrinsics,
            distance=distance,
            key=dataset_key,
            channel=channel,
            licence=licence,
        )

    def _choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self._values.get(key, choices[0])
        if value not in choices:
            raise ValueError(f"{key}: {value} is unknown: write {' or '.join(choices)}")
        return value

    def _special_values(self, quantity: str) -> tuple[tuple[float, ...], float | None, float | None]:
        """Return `invalid`, `sky` and `sky_from`."""
        values = self._values.get("invalid", [])
        invalid = tuple(
            _parse_number("invalid", value) for value in (values if isinstance(values, list) else [values])
        )
        sky, sky_from = (
            _parse_number(key, self._values[key]) if key in self._values else None
            for key in ("sky", "sky_from")
        )
        if sky is not None and sky_from is not None:
            raise ValueError("sky is one value and sky_from the least of several: give one of the two keys")
        for value in invalid:
            if value == sky or (sky_from is not None and value >= sky_from):
                raise ValueError(f"the stored value {value:g} is both invalid and sky: it can be one of them")
        if sky_from is not None and quantity == "disparity":
            raise ValueError(
                "sky_from does not apply to disparity, in which the sky is the least value: write  sky: 0"
            )
        return invalid, sky, sky_from

    def _scale(self, quantity: str) -> float:
        """Return the meters per stored unit, from `unit` or `scale`."""
        values = self._values
        if "unit" in values and "scale" in values:
            raise ValueError("unit and scale mean the same: give one of them")
        key = "unit" if "unit" in values else "scale"
        if key not in values:
            if quantity == "disparity":
                return 1.0
            raise ValueError(
                "unit is missing: write  unit: m, cm or mm, or  scale: the meters of a stored 1, as in 1/256"
            )
        value = values[key]
        if key == "unit" and value in tuple(METERS_PER_UNIT):
            if quantity == "disparity":
                raise ValueError(f"unit: {value}: disparity has no unit, so leave the key out")
            return METERS_PER_UNIT[value]
        try:
            scale = _parse_number(key, value)
        except ValueError:
            raise ValueError(
                f"{key}: {value} is unknown: write m, cm, mm, or the meters of a stored 1"
            ) from None
        if not 0 < scale < math.inf:
            raise ValueError(f"{key}: {value} must be above 0: the meters of a stored 1")
        return scale

    def _intrinsics(self) -> tuple[float, ...] | None:
        value = self._values.get("intrinsics")
        if value is None:
            return None
        if isinstance(value, list) and len(value) == len(INTRINSIC_KEYS):
            value = dict(zip(INTRINSIC_KEYS, value, strict=True))
        if not isinstance(value, dict) or set(value) != set(INTRINSIC_KEYS):
            raise ValueError(
                "intrinsics are in pixels of the images, as in  {fx: 525, fy: 525, cx: 319.5, cy: 239.5}"
            )
        numbers = tuple(_parse_number(f"intrinsics {key}", value[key]) for key in INTRINSIC_KEYS)
        if not all(map(math.isfinite, numbers)) or min(numbers[:2]) <= 0:
            raise ValueError(f"intrinsics {numbers}: fx and fy must be above 0")
        return numbers


def _parse_number(key: str, value: Any) -> float:
    """Parse a number; YAML parses 1e-3 and 1/256 as strings."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and "/" in value:
            return float(Fraction(value.replace(" ", "")))
        return float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{key}: {value} is not a number") from None
