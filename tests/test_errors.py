"""Messages keep their parts, so that commands and flags can replace arguments in them."""

import errno
import pickle

import pytest

from depth_anything.data.tars import ShardError, StorageUnavailable
from depth_anything.errors import (
    PSEUDOLABEL_COMMAND,
    SAME_COMMAND,
    Argument,
    ArgumentWarning,
    UserError,
    error_reason,
    format_error,
)


def test_text_is_what_and_fix() -> None:
    error = UserError("labels/a is damaged", ["remove it and ", SAME_COMMAND])
    assert (error.what, error.fix) == ("labels/a is damaged", "remove it and start the same command again")
    assert str(error) == f"{error.what}; {error.fix}"
    assert str(UserError("a.pth is empty")) == "a.pth is empty"
    assert isinstance(error, ValueError) and issubclass(ArgumentWarning, UserWarning)


def test_flags_replace_arguments_and_never_text() -> None:
    parts = ["{a} max_depth=5 of ", Argument("max_depth", 80.0), " or ", Argument("x", "y")]
    flags = {"max_depth": "--max-depth {}"}
    assert str(UserError(parts)) == "{a} max_depth=5 of max_depth=80 or x=y"
    assert format_error(UserError(parts), flags=flags) == "{a} max_depth=5 of --max-depth 80 or x=y"
    assert format_error(ValueError("max_depth=80"), flags=flags) == "max_depth=80"


def test_commands_are_replaced() -> None:
    error = UserError("no labels", ["type ", PSEUDOLABEL_COMMAND, " labels=FOLDER"])
    typed = {PSEUDOLABEL_COMMAND: f"{PSEUDOLABEL_COMMAND.text} sources=own"}
    assert format_error(error, commands=typed) == (
        "no labels; type python train.py stage=pseudolabel sources=own labels=FOLDER"
    )


@pytest.mark.parametrize("kind", [UserError, ShardError, StorageUnavailable])
def test_errors_survive_pickling(kind: type[Exception]) -> None:
    """Loader workers and other ranks send them."""
    error = kind("set/a cannot be read", ["type ", Argument("labels", "b"), " and ", SAME_COMMAND])  # type: ignore[arg-type]
    if isinstance(error, OSError):
        error.errno = errno.EIO
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    assert again.fix_parts == error.fix_parts  # type: ignore[attr-defined]
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


def test_secrets_of_addresses_are_removed_from_both_parts() -> None:
    error = ShardError("https://me:word@host/set is empty", ["copy https://me:word@host/set"])
    assert "word" not in str(error) and "word" not in error.fix


def test_reason_is_one_short_line() -> None:
    assert error_reason(ValueError("first\nsecond")) == "first"
    assert error_reason(KeyError()) == "KeyError" and len(error_reason(ValueError("x" * 500))) == 120
