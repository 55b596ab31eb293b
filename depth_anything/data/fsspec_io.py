"""Open the file systems of fsspec (s3, gs and others), and tell their errors apart."""

import logging
from collections.abc import Callable
from typing import Any

from depth_anything.data.address import url_scheme
from depth_anything.data.retry import PermanentError, RetryableError, short_reason
from depth_anything.data.tars import ShardError

_MAX_CONNECTIONS = 32
_S3, _GCS = ("s3", "s3a"), ("gs", "gcs")
_PIP_EXTRAS = dict.fromkeys((*_S3, *_GCS), "remote")
_MISSING = (404, "404")
_FORBIDDEN = ("", "403", "AccessDenied", "Forbidden", "AllAccessDisabled")
_KEYS_HINT = {
    **dict.fromkeys(_S3, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
    **dict.fromkeys(
        _GCS, "set GOOGLE_APPLICATION_CREDENTIALS=FILE, or type  gcloud auth application-default login"
    ),
}
_MAKE_BUCKET = {
    **dict.fromkeys(_S3, "correct the name, or type  aws s3 mb s3://{}"),
    **dict.fromkeys(_GCS, "correct the name, or type  gcloud storage buckets create gs://{}"),
}


class ObjectMissingError(Exception):
    """There is no object of this name."""


class ObjectExistsError(Exception):
    """There is an object of this name, and it was to be written only if there is none."""


class ConditionUnsupportedError(Exception):
    """The store cannot write an object only if there is none of its name."""


def supports_fsspec(address: str) -> bool:
    """Return whether fsspec has a file system for the scheme of an address.

    Raises:
        ShardError: It has, and needs a package that is not installed.
    """
    scheme = url_scheme(address)
    if scheme == "pipe":
        return False
    import fsspec  # slow to import, and local and http shards do not need it

    if scheme not in fsspec.available_protocols():
        return False
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _PIP_EXTRAS.get(scheme)
        if extra is None:
            return False
        raise ShardError(
            f"{address} needs a package that is not installed: type  pip install 'depth-anything-train[{extra}]'"
        ) from error
    return True


def open_filesystem(address: str, *, timeout: float, **options: Any) -> tuple[Any, str]:
    """Return the file system of an address, with retries of its own switched off, and the path in it.

    Args:
        address: s3://bucket/key or the like.
        timeout: Seconds without data after which a request fails.
        options: More options of the file system.
    """
    import fsspec

    system, path = fsspec.core.url_to_fs(address, **_options(url_scheme(address), timeout), **options)
    system.retries = 1  # of s3fs; `retry` does it, with a message
    return system, path


def run_async(
    system: Any, method: Callable[..., Any], *arguments: Any, timeout: float, **keywords: Any
) -> Any:
    """Run a coroutine method of an asynchronous file system for at most `timeout` seconds."""
    import fsspec

    return fsspec.asyn.sync(system.loop, method, *arguments, timeout=timeout, **keywords)


def _options(scheme: str, timeout: float) -> dict[str, Any]:
    if scheme not in _S3:
        for name in ("gcsfs", "gcsfs.retry"):  # they log a traceback for each attempt
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return {}
    for name in ("botocore", "aiobotocore"):  # they log where they have found keys
        logging.getLogger(name).setLevel(logging.WARNING)
    import fsspec

    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    ours = {"connect_timeout": min(timeout, 10.0), "read_timeout": timeout, "retries": {"max_attempts": 0}}
    return {"config_kwargs": {**ours, "max_pool_connections": _MAX_CONNECTIONS, **configured}}


def _error_code(error: Exception) -> str:
    """Return the code that S3 answered, as "SlowDown"; "" if there is none."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code", ""))
    return ""


def _reason(error: Exception, code: str) -> str:
    return f"{code} {short_reason(error)}".strip() if code not in str(error) else short_reason(error)


def classify_read_error(address: str, error: Exception) -> Exception:
    """Return the PermanentError or RetryableError that an error of a read means."""
    code = _error_code(error)
    reason = _reason(error, code)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if code == "InvalidRange":
        return PermanentError(f"{address} is truncated: it is shorter than its index says")
    if isinstance(error, FileNotFoundError) or status in (403, "403", *_MISSING):
        return PermanentError(f"{address} cannot be read: not found ({reason})")
    if isinstance(error, PermissionError) and code in _FORBIDDEN:
        return PermanentError(f"{address} cannot be read: access denied ({reason})")
    return RetryableError(
        reason, fatal=isinstance(error, PermissionError) or "Credentials" in type(error).__name__
    )


def classify_write_error(address: str, error: Exception) -> Exception:
    """Return what an error of a request to an object store means.

    Returns:
        ObjectMissingError, ObjectExistsError, ConditionUnsupportedError, a PermanentError that says what to type, or a
        RetryableError.
    """
    code, scheme = _error_code(error), url_scheme(address)
    reason = _reason(error, code)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    bucket = address.partition("://")[2].partition("/")[0]
    if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
        return ObjectExistsError(address)
    if code in ("NotImplemented", "501") or isinstance(error, NotImplementedError):
        return ConditionUnsupportedError(reason)
    if code in ("NoSuchBucket", "InvalidBucketName") or "bucket does not exist" in reason:
        make = _MAKE_BUCKET.get(scheme, "correct the name").format(bucket)
        return PermanentError(f"{address}: there is no bucket {bucket} ({reason})", make)
    if code == "NoSuchUpload":  # a rule of the bucket has ended it
        return RetryableError(reason)
    missing = ("NoSuchKey", "404", "InvalidRange")  # no byte of an empty object is in any range
    if isinstance(error, FileNotFoundError) or status in _MISSING or code in missing:
        return ObjectMissingError(address)
    hint = _KEYS_HINT.get(scheme, "check its credentials")
    denied = isinstance(error, PermissionError) and code in _FORBIDDEN
    if denied or status in (403, "403") or str(error).startswith("Forbidden: "):
        return PermanentError(
            f"{address}: access denied ({reason})",
            f"give these keys the right to list, read, write and delete in {bucket}, or {hint}",
        )
    if "Credentials" in type(error).__name__ or isinstance(error, PermissionError):
        return RetryableError(f"{reason} ({hint})", fatal=True)
    if type(error).__name__ in ("EndpointConnectionError", "ConnectTimeoutError") and scheme in _S3:
        return RetryableError(f"{reason} (AWS_ENDPOINT_URL sets the server)")
    return RetryableError(reason)
