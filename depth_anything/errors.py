"""Sentences that name the arguments of a function, so that a command can name its flags in their place."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """An argument in a sentence.

    Attributes:
        name: As the function calls it.
        value: What it was given, or what to give it; written as it is, so that text which may be anything comes as its
            `repr`.
    """

    name: str
    value: object


class UserError(ValueError):
    """What is wrong with the arguments of a function, or with what they do not say.

    Made of the parts of a sentence, text and `Argument`. As text it names arguments as Python does.
    """

    def __init__(self, *parts: str | Argument) -> None:
        """Keep the parts of the sentence."""
        super().__init__(*parts)

    def __str__(self) -> str:
        """Write the sentence for Python: max_depth=20."""
        return format_error(self)


class ArgumentWarning(UserWarning):
    """What an argument may settle; its parts are those of `ArgumentError`."""

    def __init__(self, *parts: str | Argument) -> None:
        """Keep the parts of the sentence."""
        super().__init__(*parts)

    def __str__(self) -> str:
        """Write the sentence for Python: max_depth=20."""
        return format_error(self)


def format_error(message: BaseException | str, flags: Mapping[str, str] | None = None) -> str:
    """Write an error or a warning with its arguments as a command takes them.

    Args:
        message: An `ArgumentError` or `ArgumentWarning`; any other message stays as it is.
        flags: Argument to what is typed for it, with {} where the value stands: {"max_depth": "--max-depth {}"}.
            What is not among them is written as Python does.

    Example:
        >>> error = ArgumentError("it is metric: give ", Argument("max_depth", 20))
        >>> spell(error), spell(error, {"max_depth": "--max-depth {}"})
        ('it is metric: give max_depth=20', 'it is metric: give --max-depth 20')
    """
    if not isinstance(message, UserError | ArgumentWarning):
        return str(message)
    return "".join(_format_part(part, flags or {}) for part in message.args)


def _format_part(part: object, flags: Mapping[str, str]) -> str:
    if not isinstance(part, Argument):
        return str(part)
    if part.name in flags:
        return flags[part.name].format(_format_value(part.value))
    return f"{part.name}={_format_value(part.value)}"


def _format_value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
