"""Errors and warnings for users: what is wrong, and what to type.

A message contains function arguments and commands as objects. A command line replaces them by its own flags and by the
command that the user typed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Argument:
    """A function argument in a message.

    Attributes:
        name: Name of the parameter.
        value: The value that was passed, or the value to pass. Pass `repr(value)` for text from users.
    """

    name: str
    value: object


@dataclass(frozen=True)
class Command:
    """A shell command in a message."""

    text: str


SAME_COMMAND = Command("start the same command again")
PSEUDOLABEL_COMMAND = Command("python train.py stage=pseudolabel")

Part = str | Argument | Command
Text = Part | Sequence[Part]


class UserMessage(Exception):
    """Base of errors and warnings for users: a problem and its fix.

    Example:
        >>> error = UserError([Argument("version", 3), " must be 1 or 2"], ["type ", Argument("version", 2)])
        >>> str(error)
        'version=3 must be 1 or 2; type version=2'
        >>> error.what, error.fix
        ('version=3 must be 1 or 2', 'type version=2')
    """

    def __init__(self, what: Text, fix: Text = "") -> None:
        """Store the parts of the message.

        Args:
            what: What is wrong, and where.
            fix: What the user can do; "" if nothing is known.
        """
        self.what_parts, self.fix_parts = _parts(what), _parts(fix)
        super().__init__(format_parts(self.parts))

    @property
    def what(self) -> str:
        """What is wrong."""
        return format_parts(self.what_parts)

    @property
    def fix(self) -> str:
        """What to do; "" if nothing is known."""
        return format_parts(self.fix_parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The whole message."""
        return (*self.what_parts, "; ", *self.fix_parts) if self.fix_parts else self.what_parts

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parts, and `errno` of an OSError."""
        state = {**self.__dict__, "errno": self.errno} if isinstance(self, OSError) else self.__dict__
        return type(self), (self.what_parts, self.fix_parts), state


class UserError(UserMessage, ValueError):
    """A mistake that the user can correct."""


class ArgumentWarning(UserMessage, UserWarning):
    """A default was assumed; an argument can set the value."""


def format_error(
    error: BaseException | str,
    *,
    flags: Mapping[str, str] | None = None,
    commands: Mapping[Command, str] | None = None,
) -> str:
    """Format a message with the flags and commands that a user can type.

    Args:
        error: Any exception, warning or text; only a `UserMessage` has parts to replace.
        flags: Argument name to template, with {} for the value. Other arguments are written as NAME=VALUE.
        commands: Command to replacement text.

    Example:
        >>> error = UserError("it is metric", ["give ", Argument("max_depth", 20)])
        >>> format_error(error, flags={"max_depth": "--max-depth {}"})
        'it is metric; give --max-depth 20'
    """
    if not isinstance(error, UserMessage):
        return str(error)
    return format_parts(error.parts, flags=flags or {}, commands=commands or {})


def error_reason(error: BaseException) -> str:
    """Return the first line of an error, at most 120 characters."""
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


def format_parts(
    parts: Sequence[Part],
    *,
    flags: Mapping[str, str] | None = None,
    commands: Mapping[Command, str] | None = None,
) -> str:
    """Join the parts of a message; arguments as `format_error`."""
    return "".join(_format_part(part, flags or {}, commands or {}) for part in parts)


def _parts(text: Text) -> tuple[Part, ...]:
    if isinstance(text, str | Argument | Command):
        return (text,) if text != "" else ()
    return tuple(text)


def _format_part(part: Part, flags: Mapping[str, str], commands: Mapping[Command, str]) -> str:
    if isinstance(part, Command):
        return commands.get(part, part.text)
    if not isinstance(part, Argument):
        return part
    value = f"{part.value:g}" if isinstance(part.value, float) else str(part.value)
    return flags[part.name].format(value) if part.name in flags else f"{part.name}={value}"
