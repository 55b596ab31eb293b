"""Retry reads that fail for a moment, on servers and on local disks.

A permanent error (404, 403, wrong size) is a ShardError: the record is replaced. A retryable error (5xx, refused,
reset, cut short, stalled) is reported once per address on stderr and retried after 0.5 s, 1 s, 2 s and so on. When
the retries are used up, StorageUnavailable stops the run. One loop serves http, fsspec, pipes and local disks;
urllib3's own Retry is switched off, because it covers only the first of these, and no body that is cut short.
"""

import sys
from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

from depth_anything.data.address import redact_secrets
from depth_anything.data.cache import positive_setting
from depth_anything.data.tars import PATH_ERRNOS, ShardError, StorageUnavailable
from depth_anything.errors import SAME_COMMAND

T = TypeVar("T")

RESUME_HINT = (SAME_COMMAND, " to resume")

_RETRIES, _FIRST_WAIT_S, _LONGEST_WAIT_S = 6.0, 0.5, 60.0
_MAX_REPORTED = 20  # addresses whose retries are reported

_reported: set[str] = set()


class PermanentError(ShardError):
    """An address that cannot be read, however often it is tried."""


class RetryableError(Exception):
    """An address that may answer when it is tried again.

    Attributes:
        reason: A few words for the message.
        wait_s: Seconds that the server asks to wait.
        silent: An idle connection was closed: retry at once, without a message.
        fatal: Retrying cannot help: stop the run.
    """

    def __init__(self, reason: str, *, wait_s: float = 0, silent: bool = False, fatal: bool = False) -> None:
        """Store the attributes."""
        super().__init__(reason)
        self.reason, self.wait_s, self.silent, self.fatal = reason, wait_s, silent, fatal


def retry(address: str, attempt: Callable[[], T], *, failed: OSError | None = None, doing: str = "read") -> T:
    """Call `attempt` until it succeeds.

    Args:
        address: Named in messages.
        attempt: The read or write. An OSError that it raises is a disk that fails for now, unless its errno is in
            `PATH_ERRNOS`; then it is raised again.
        failed: Error of a first attempt that the caller has made.
        doing: "read" or "written", for the message.

    Raises:
        StorageUnavailable: DEPTH_ANYTHING_RETRIES are used up, or retrying cannot help.
    """
    retries = int(positive_setting("DEPTH_ANYTHING_RETRIES", _RETRIES))
    start, failures = monotonic(), 0
    error = None if failed is None else _as_retryable(failed)
    while True:
        if error is not None:
            failures += 1
            if error.fatal or failures > retries:
                break
            if not error.silent or failures > 1:
                _report_retry(address, error.reason)
                sleep(min(max(_FIRST_WAIT_S * 2 ** (failures - 1), error.wait_s), _LONGEST_WAIT_S))
        try:
            return attempt()
        except (RetryableError, OSError) as raised:
            error = _as_retryable(raised)
    tried = f", {failures} times in {monotonic() - start:.0f} s" if failures > 1 else ""
    raise StorageUnavailable(f"{address} cannot be {doing} for now: {error.reason}{tried}", RESUME_HINT)


def _as_retryable(error: RetryableError | OSError) -> RetryableError:
    if isinstance(error, RetryableError):
        return error
    if isinstance(error, StorageUnavailable) or error.errno in PATH_ERRNOS:
        raise error
    return RetryableError(short_reason(error), fatal=isinstance(error, PermissionError))


def _report_retry(address: str, reason: str) -> None:
    if address not in _reported and len(_reported) <= _MAX_REPORTED:
        _reported.add(address)
        more = "" if len(_reported) <= _MAX_REPORTED else " (retries of other addresses are not reported)"
        print(f"{redact_secrets(address)}: {redact_secrets(reason)}; retrying{more}", file=sys.stderr)


def short_reason(error: BaseException) -> str:
    """Return the message of an error as one line without secrets."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return redact_secrets(" ".join(str(text).split()))[:300]
