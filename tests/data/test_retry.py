"""Which errors are retried, how long the waits are, and when a run stops."""

import errno

import pytest

from depth_anything.data import retry
from depth_anything.data.retry import RetryableError
from depth_anything.data.tars import StorageUnavailable


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Record the waits instead of sleeping."""
    seconds = []
    monkeypatch.setattr(retry, "sleep", seconds.append)
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "2")
    retry._reported.clear()
    return seconds


def attempts(*outcomes):
    """Return a function that raises or returns each outcome in turn."""
    left = list(outcomes)

    def attempt():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return attempt


def test_attempt_of_the_caller_counts(waits):
    """The first attempt of `failed` uses up no retry, and is the first in the message."""
    failed = OSError(errno.EIO, "Input/output error")
    assert retry.retry("a.tar", attempts(failed, b"x"), failed=failed) == b"x"
    assert waits == [0.5, 1.0]
    with pytest.raises(StorageUnavailable, match="a.tar .*Input/output error, 3 times"):
        retry.retry("a.tar", attempts(failed, failed, b"x"), failed=failed)


def test_server_may_ask_for_a_longer_wait(waits):
    assert retry.retry("a.tar", attempts(RetryableError("HTTP 503", wait_s=7.0), 1)) == 1
    assert waits == [7.0]


def test_silent_error_is_retried_at_once_and_reported_when_it_repeats(waits, capsys):
    closed = RetryableError("reset", silent=True)
    assert retry.retry("a.tar", attempts(closed, 1)) == 1
    assert not waits and not capsys.readouterr().err
    assert retry.retry("a.tar", attempts(closed, closed, 1)) == 1
    assert waits == [1.0] and capsys.readouterr().err.startswith("a.tar: reset")


@pytest.mark.parametrize(
    "error", [RetryableError("HTTP 401", fatal=True), PermissionError(errno.EACCES, "no")]
)
def test_fatal_errors_are_not_retried(waits, error):
    with pytest.raises(StorageUnavailable, match="a.tar"):
        retry.retry("a.tar", attempts(error, 1))
    assert not waits


def test_missing_files_are_not_retried(waits):
    with pytest.raises(FileNotFoundError):
        retry.retry("a.tar", attempts(FileNotFoundError(errno.ENOENT, "none"), 1))
    assert not waits


def test_each_address_is_reported_once_and_at_most_twenty(waits, capsys):
    for name in range(30):
        for _ in range(2):
            retry.retry(f"{name}.tar", attempts(RetryableError("HTTP 500"), 1))
    assert len(capsys.readouterr().err.splitlines()) == retry._MAX_REPORTED + 1
