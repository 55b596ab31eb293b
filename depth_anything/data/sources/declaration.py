"""The yaml that declares a user's own set: its keys, their meaning, and what is said of wrong ones."""

import difflib
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from depth_anything.data.sources import maps
from depth_anything.data.sources.custom import CAMERA, Custom
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
_MAX_NODES = 10_000
_MAX_SCALAR = 4096  # characters; 1:2:3:… is a number to base 60 in yaml, which takes hours if it is long


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
        given = _Loader.parse(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        what = getattr(error, "problem", None) or error
        raise ValueError(f"{path}:{where} this is no yaml: {what}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: a set is declared by lines such as  images: rgb")
    try:
        return _declared(path.parent, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Loader(yaml.SafeLoader):
    """As safe_load, but a key that comes twice is an error, and so is what a declaration has no use for.

    An alias stands for all of what it means, and ten of them of ten aliases each fill any memory.
    """

    nodes = 0

    @classmethod
    def parse(cls, text: str) -> Any:
        loader = cls(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, and more than anyone would write, before they are made."""
        event, problem = self.peek_event(), ""
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            problem = f"*{event.anchor} is an alias: write out what it stands for"
        elif self.nodes > _MAX_NODES:
            problem = f"it has more than {_MAX_NODES} values"
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_SCALAR:
            problem = f"a value has more than {_MAX_SCALAR} characters"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """Make a dict of a mapping."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f'"{key.value}" comes twice', problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


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
