"""Rules for the values of config keys: what is accepted, how that is described, and an example to type."""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from depth_anything.data.address import is_remote
from depth_anything.errors import UserError

_SHELL_VARIABLE = re.compile(r"\$(\w+)")


@dataclass(frozen=True)
class ValueRule:
    """What the value of a key must be.

    Attributes:
        accepts: Returns whether a value is allowed.
        text: Describes the allowed values, e.g. "a whole number above 0".
        example: An allowed value.
        options: The allowed words of a choice, else empty.
    """

    accepts: Callable[[Any], bool]
    text: str
    example: Any
    options: tuple[str, ...] = ()


def integer(low: int, high: int | None = None, *, example: int, optional: bool = False) -> ValueRule:
    """Accept whole numbers from `low` to `high`, both included; booleans are refused."""

    def accepts(value: Any) -> bool:
        if value is None:
            return optional
        return type(value) is int and low <= value and (high is None or value <= high)

    above = {0: "from 0 up", 1: "above 0"}.get(low, f"from {low} up")
    description = f"a whole number {above if high is None else f'from {low} to {high}'}"
    return ValueRule(accepts, description + (", or null" if optional else ""), example)


def real(
    low: float,
    high: float = math.inf,
    *,
    example: float,
    above: bool = False,
    below: bool = False,
    unit: str = "",
    optional: bool = False,
) -> ValueRule:
    """Accept finite numbers from `low` to `high`; `above` and `below` exclude the bounds themselves."""

    def accepts(value: Any) -> bool:
        if value is None:
            return optional
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    if high == math.inf:
        span = f"above {low:g}" if above else f"from {low:g} up"
    elif above and below:
        span = f"between {low:g} and {high:g}"
    else:
        span = f"{'above' if above else 'from'} {low:g} {'and below' if below else 'to'} {high:g}"
    description = f"a number {unit and unit + ' '}{span}"
    return ValueRule(accepts, description + (", or null" if optional else ""), example)


def flag() -> ValueRule:
    """Accept true and false."""
    return ValueRule(lambda value: type(value) is bool, "true or false", True)


def choice(*options: str, optional: bool = False) -> ValueRule:
    """Accept one of several words."""
    description = f"{', '.join(options[:-1])} or {options[-1]}" if len(options) > 1 else options[0]
    return ValueRule(
        lambda value: (value is None and optional) or (isinstance(value, str) and value in options),
        description + (", or null" if optional else ""),
        options[0],
        options,
    )


def text(description: str, *, example: str, optional: bool = False) -> ValueRule:
    """Accept text that is not empty; a number is read as text, since `name=7` is typed without quotes."""

    def accepts(value: Any) -> bool:
        if value is None:
            return optional
        return type(value) in (str, int, float) and str(value).strip() != ""

    return ValueRule(accepts, description + (", or null" if optional else ""), example)


def _is_betas(value: Any) -> bool:
    beta = real(0, 1, below=True, example=0.9)
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(beta.accepts, value))


def _is_crop_area(value: Any) -> bool:
    share = real(0, 1, above=True, example=0.2)
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(map(share.accepts, value))
        and value[0] <= value[1]
    )


def _is_scale_range(value: Any) -> bool:
    factor = real(0, 100, above=True, example=1.0)
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(factor.accepts, value))
    return bool(pair) and value[0] <= value[1]


def _is_set_names(value: Any) -> bool:
    if value is None or isinstance(value, (bool, str)):
        return value != ""
    return isinstance(value, Sequence) and all(isinstance(name, str) and name for name in value)


def _is_key_names(value: Any) -> bool:
    return isinstance(value, str) or (not isinstance(value, bool) and _is_set_names(value))


def _is_run_name(value: Any) -> bool:
    parts = PurePosixPath(str(value)).parts
    named = text("a name", example="second").accepts(value)
    return named and bool(parts) and parts[0] != "/" and ".." not in parts


def _is_folder(value: Any) -> bool:
    return text("a folder", example="FOLDER").accepts(value) and not _SHELL_VARIABLE.match(str(value))


def _is_local_folder(value: Any) -> bool:
    return value is None or (_is_folder(value) and not is_remote(str(value)))


def _is_node_folder(value: Any) -> bool:
    named = text("a folder", example="FOLDER", optional=True).accepts(value)
    return named and not is_remote(str(value))


def _is_sky(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and policy in ("far", "invalid") for name, policy in value.items())
    return value in (None, "far", "invalid")


def _is_repeat(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and type(n) is int and n >= 1 for name, n in value.items())
    return value is None


def _is_teacher(value: Any) -> bool:
    one = text("a file", example="FILE").accepts
    return bool(value) and all(map(one, value)) if isinstance(value, list) else one(value)


def _is_shares(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, list)
        and bool(value)
        and all(map(real(0, example=1).accepts, value))
        and sum(value) > 0
    )


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and len(set(value)) == len(value) and all(type(n) is int and n >= 0 for n in value)
    if isinstance(value, str):
        return value == "auto" or all(part.strip().isdecimal() for part in value.split(","))
    return type(value) is int and (value >= 1 or value == -1)


ANY = ValueRule(lambda value: True, "any value", None)
FOLDER = ValueRule(_is_folder, "a folder", "FOLDER")
OPTIONAL_FOLDER = ValueRule(lambda value: value is None or _is_folder(value), "a folder, or null", "FOLDER")
LOCAL_FOLDER = ValueRule(_is_local_folder, "a folder of this machine, or null", "FOLDER")
#: It may begin with a variable, as $TMPDIR, that each machine replaces for itself.
NODE_FOLDER = ValueRule(_is_node_folder, "a folder of this machine, or null", "FOLDER")
OPTIONAL_FILE = text("a file", example="FILE", optional=True)
RUN_NAME = ValueRule(
    _is_run_name,
    "a name below output_dir, without .. in it and not absolute (output_dir=FOLDER chooses another folder)",
    "second",
)
CLASS_PATH = text("the name of a class, as package.module.Class", example="my_stage.MyStage")
LEARNING_RATE = real(0, 1, example=5e-5)
FOCAL = real(1e-3, 1e7, unit="of pixels", optional=True, example=500)
LOSS_WEIGHT = real(0, example=1.0)
FRACTION = real(0, 1, below=True, example=0.1)
OPEN_FRACTION = real(0, 1, above=True, below=True, example=0.1)
SHARE = real(0, 1, example=0.5)
CONFIDENCE = real(0, 1, example=0.5)
SEED = integer(0, 2**64 - 1, example=0)
CROP_AREA = ValueRule(_is_crop_area, "two shares above 0 and up to 1, the smaller one first", [0.2, 1.0])
BETAS = ValueRule(_is_betas, "two numbers from 0 and below 1", [0.9, 0.999])
SCALE_RANGE = ValueRule(_is_scale_range, "two ascending factors above 0", [0.5, 2.0])
SET_NAMES = ValueRule(_is_set_names, "true, null, or names of sets", True)
KEY_NAMES = ValueRule(_is_key_names, "the names of keys, as [recipe.head_lr,steps]", ["recipe.head_lr"])
SKY = ValueRule(_is_sky, "far, invalid, null, or {SET: far or invalid}", "invalid")
REPEAT = ValueRule(_is_repeat, "null or {SET: a whole number above 0}", None)
TEACHER = ValueRule(_is_teacher, "a file, or several as [A,B]", "FILE")
SHARE_OF_WORK = text("K/N, the K-th of N equal shares", example="1/4", optional=True)
SHARES = ValueRule(_is_shares, "null or a number from 0 up for each teacher, as [7,3]", [7, 3])
DEVICES = ValueRule(_is_devices, "auto, -1 for all, a whole number above 0, or a list of device numbers", 1)
PRECISION = ValueRule(lambda value: type(value) in (str, int), "a precision of Lightning", "auto")
STRATEGY = ValueRule(
    lambda value: isinstance(value, (str, Mapping)) and bool(value), "a strategy of Lightning", "auto"
)


def _is_fov(value: Any) -> bool:
    degrees = real(1, 179, example=60)
    return value is None or (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(map(degrees.accepts, value))
        and value[0] <= value[1]
    )


FOV = ValueRule(_is_fov, "null, or two numbers of degrees from 1 to 179, as [40,80]", [40, 80])


def meters(*, example: float, optional: bool = False) -> ValueRule:
    """Accept a distance in meters, above 0."""
    return real(0, above=True, unit="of meters", example=example, optional=optional)


def check_value(name: str, value: Any, rule: ValueRule) -> None:
    """Check a value against the rule of its key.

    Args:
        name: The dotted key, for the message.
        value: As it is in the config.
        rule: Rule of the key.

    Raises:
        UserError: Naming the key, its value, what it must be and a value that is accepted.
    """
    if rule.accepts(value):
        return
    if rule.options:
        closest = difflib.get_close_matches(str(value), rule.options, 1, 0.5) or list(rule.options[:1])
        others = ", ".join(option for option in rule.options if option != closest[0])
        raise UserError(f"{name}={format_value(value)} is unknown", f"type {name}={closest[0]} (or {others})")
    if rule.example == FOLDER.example and (variable := _SHELL_VARIABLE.match(str(value))):
        replaced = f"${{oc.env:{variable[1]}}}{str(value)[variable.end() :]}"
        raise UserError(
            f"{name}={value} has a variable that the shell did not replace", f"type '{name}={replaced}'"
        )
    example = rule.example
    if isinstance(value, float) and value.is_integer() and rule.accepts(int(value)):
        example = int(value)  # steps=1e3
    raise UserError(
        f"{name}={format_value(value)} must be {rule.text}", f"type {name}={format_value(example)}"
    )


def format_value(value: Any) -> str:
    """Format a value as it is typed after `key=` on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{format_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(format_value, value)) + "]"
    return str(value)
