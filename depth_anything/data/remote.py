"""Bytes from addresses that are no folders: http and https by range on lasting connections, what fsspec opens
(s3, gs and others) by range, all else (pipe and WebDataset's other openers) by whole shards in a local cache.

Who says no for good (404, 403, another size) raises ShardError: a record's own fault, for which another stands
in. Who does not answer for now (5xx, refused, reset, cut short, stalled) is named once on stderr and asked again
after 0.5 s, 1 s, 2 s and so on; when that is spent, Outage stops the run. Nothing is held in forked processes
but what they open themselves.
"""

import functools
import http.client
import logging
import multiprocessing
import netrc
import os
import re
import ssl
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from select import select
from time import monotonic, sleep
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import urllib3

from depth_anything.data import cache
from depth_anything.data.address import is_http, is_remote, redact_secrets
from depth_anything.data.tar_index import TarIndex
from depth_anything.data.tars import PATH_ERRNOS, ShardError, StorageUnavailable
from depth_anything.errors import SAME_COMMAND

__all__ = ["RESUME_HINT", "PermanentError", "is_remote", "retry", "fetch", "fetch_range"]

T = TypeVar("T")

_TIMEOUT_S, _RETRIES, _FIRST_WAIT_S, _LONGEST_WAIT_S = 30.0, 6.0, 0.5, 60.0
_MIN_BYTES_PER_S = 1000  # bytes a second below which a server counts as stalled
_CHUNK = 1 << 18
_MAX_FILE_BYTES = 1 << 30  # of a manifest or an index
_MAX_REDIRECTS = 5
_MAX_REPORTED = 20
_MAX_CONNECTIONS = 32
_RETRY_STATUSES = frozenset((408, 425, 429))  # besides all from 500 up
RESUME_HINT = (SAME_COMMAND, ", and it goes on")
_PIP_EXTRAS = {"s3": "remote", "s3a": "remote", "gs": "remote", "gcs": "remote"}

_pools: dict[str, Any] = {}  # by proxy, "" for none
_without_ranges: set[str] = set()  # prefixes whose server has no ranges
_reported: set[str] = set()  # addresses that have failed for a moment
_announced: set[str] = set()
os.register_at_fork(after_in_child=_pools.clear)


class PermanentError(ShardError):
    """An address of which nothing can be had, however often it is asked."""


class RetryableError(Exception):
    """An address that may answer when asked again."""

    def __init__(
        self, reason: str, *, wait: float = 0.0, quiet: bool = False, hopeless: bool = False
    ) -> None:
        """Say why.

        Args:
            reason: in a few words.
            wait: seconds that the server asks for.
            quiet: it is no more than a connection that had grown old: at once again, without a word.
            hopeless: the run must stop, as asking again will not help.
        """
        super().__init__(reason)
        self.reason, self.wait, self.quiet, self.hopeless = reason, wait, quiet, hopeless


def fetch(address: str) -> bytes:
    """Read a whole small file.

    Raises:
        ShardError: it is not there, or not for us.
        Outage: it cannot be had for now.
    """
    return retry(address, lambda: b"".join(_limit_size(address, _read_whole(address), _MAX_FILE_BYTES)))


def fetch_range(
    address: str, start: int, count: int, *, table: TarIndex, total_bytes: int | None, fresh: bool = False
) -> bytes:
    """Read part of a shard.

    Args:
        address: of the tar.
        start: first byte.
        count: bytes; fewer come where the file ends.
        table: the tar's index.
        total_bytes: of all shards that will be read, for the line that announces whole copies.
        fresh: whatever is kept of it locally is not to be trusted.

    Raises:
        ShardError: it is not there, not for us, or not the tar of the index.
        Outage: it cannot be had for now.
    """
    if count == 0:
        return b""
    prefix = address.rpartition("/")[0]
    if prefix not in _without_ranges:
        data = retry(address, lambda: _read_part(address, start, count, table.bytes))
        if data is not None:
            return data
        _without_ranges.add(prefix)
    _announce_whole_copies(prefix, total_bytes)
    key = f"{table.hash} {table.bytes}"
    with cache.open_shard_copy(
        key, table.bytes, lambda file: _copy_whole_shard(address, table, file), fresh=fresh
    ) as file:
        return os.pread(file.fileno(), count, start)


def retry(address: str, attempt: Callable[[], T]) -> T:
    """Try until it works, the retries are spent (Outage), or it is no use.

    An OSError of `attempt` is a disk that fails for now, unless it is one of `OF_THE_PATH`, which is raised.
    """
    retries = int(cache.positive_setting("DEPTH_ANYTHING_RETRIES", _RETRIES))
    began, number = monotonic(), 0
    while True:
        try:
            return attempt()
        except RetryableError as later:
            failure = later
        except OSError as error:
            if isinstance(error, StorageUnavailable) or error.errno in PATH_ERRNOS:
                raise
            failure = RetryableError(_short_reason(error), hopeless=isinstance(error, PermissionError))
        number += 1
        if failure.hopeless or number > retries:
            break
        if failure.quiet and number == 1:
            continue
        _report_retry(address, failure.reason)
        sleep(min(max(_FIRST_WAIT_S * 2 ** (number - 1), failure.wait), _LONGEST_WAIT_S))
    tried = f", {number} times in {monotonic() - began:.0f} s" if number > 1 else ""
    raise StorageUnavailable(f"{address} cannot be read for now: {failure.reason}{tried}", RESUME_HINT)


def _report_retry(address: str, reason: str) -> None:
    if address not in _reported and len(_reported) <= _MAX_REPORTED:
        _reported.add(address)
        more = "" if len(_reported) <= _MAX_REPORTED else " (others that do so will not be named)"
        print(f"{redact_secrets(address)}: {redact_secrets(reason)}; asked again{more}", file=sys.stderr)


def _announce_whole_copies(prefix: str, total_bytes: int | None) -> None:
    # The main process says it, or, if that has read nothing, whichever worker makes the folder.
    worker = multiprocessing.parent_process() is not None
    if prefix in _announced or (worker and cache.cache_folder().exists()):
        return
    _announced.add(prefix)
    limit = cache.cache_limit_bytes()
    size = f"in all {total_bytes / 1e9:.3f} GB" if total_bytes else "as much as the shards have"
    short = "" if (total_bytes or 0) <= limit else ", so that shards will be copied again and again"
    print(
        f"{redact_secrets(prefix)}: cannot be read in parts, so whole shards are copied to "
        f"{cache.cache_folder()}, {size}, of which "
        f"at most {limit / 1e9:g} GB are kept{short}; DEPTH_ANYTHING_CACHE=FOLDER and DEPTH_ANYTHING_CACHE_GB=N "
        "change that",
        file=sys.stderr,
    )


def _copy_whole_shard(address: str, table: TarIndex, file: BinaryIO) -> None:
    """Copy a whole shard into a file and hold it against its index."""

    def attempt() -> None:
        digest, size = sha256(), 0
        file.seek(0)
        for chunk in _limit_size(address, _read_whole(address), table.bytes):
            digest.update(chunk)
            size += file.write(chunk)
        if size != table.bytes:
            raise PermanentError(f"{address} is truncated: it ended after {size} of {table.bytes} bytes")
        if f"sha256:{digest.hexdigest()}" != table.hash:
            raise ShardError(f"{address} is damaged, or is not the tar of its index: its hash differs")

    retry(address, attempt)


def _limit_size(address: str, chunks: Iterator[bytes], most: int) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > most:
            raise PermanentError(f"{address} has more than {most} bytes")
        yield chunk


def _read_whole(address: str) -> Iterator[bytes]:
    if is_http(address):
        yield from _http_read(address)
    elif _supports_fsspec(address):
        yield _fsspec_read(address, 0, None)  # from 0, as some ask for the size first otherwise
    else:
        yield from _read_command(address)


def _read_part(address: str, start: int, count: int, shard_bytes: int) -> bytes | None:
    """Ask once for a part; None where there are only wholes."""
    if is_http(address):
        return _http_read_range(address, start, count, shard_bytes)
    if _supports_fsspec(address):
        return _fsspec_read(address, start, start + count)
    return None


# http and https


def _http_read(address: str) -> Iterator[bytes]:
    response = _http_get(address, {})
    try:
        yield from _read_chunks(response)
    finally:
        response.close()


def _http_read_range(address: str, start: int, count: int, shard_bytes: int) -> bytes | None:
    response = _http_get(address, {"Range": f"bytes={start}-{start + count - 1}"})
    try:
        if response.status != 206:
            return None
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if span and span[2] != "*" and int(span[2]) != shard_bytes:
            raise PermanentError(f"{address} has {span[2]} bytes in place of {shard_bytes}")
        if span and int(span[1]) != start:
            raise RetryableError(f"byte {span[1]} came in place of {start}")
        return b"".join(_limit_size(address, _read_chunks(response), count))
    finally:
        response.close()


def _http_get(address: str, headers: Mapping[str, str]) -> Any:
    """Ask once; return what was answered, 200 or 206, its body still to come."""
    url = address
    for _ in range(_MAX_REDIRECTS + 1):
        response = _send_request(url, headers, trusted=_origin(url) == _origin(address))
        if response.status in (200, 206):
            return response
        _discard_response(response)
        if response.status not in (301, 302, 303, 307, 308):
            raise _status_error(address, response)
        try:
            target = urljoin(url, response.headers.get("Location") or "")
            _origin(target)
        except ValueError:
            raise PermanentError(f"{address} sends us to what is no address") from None
        if not is_http(target) or (url.lower().startswith("https:") and target.lower().startswith("http:")):
            raise PermanentError(f"{address} sends us to {target}, where this does not follow")
        url = target
    raise PermanentError(f"{address} cannot be read: it sends us on and on")


def _discard_response(response: Any) -> None:
    """Be done with an answer that is not wanted; a short one is read, as its connection can then be used again."""
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) <= _CHUNK:
        response.drain_conn()
        response.release_conn()
    response.close()


def _status_error(address: str, response: Any) -> Exception:
    status = response.status
    reason = f"HTTP {status} {http.client.responses.get(status, '')}".strip()
    if status >= 500 or status in _RETRY_STATUSES:
        wait = response.headers.get("Retry-After", "")
        return RetryableError(reason, wait=float(wait) if wait.isdecimal() else 0.0)
    if status in (401, 407):  # a password or a token that has expired is no record's fault
        return RetryableError(reason, hopeless=True)
    if status == 416:
        return PermanentError(f"{address} is truncated: it is shorter than its index says")
    return PermanentError(f"{address} cannot be read: {reason}")


def _send_request(url: str, headers: Mapping[str, str], *, trusted: bool) -> Any:
    """Send one request; credentials of the address or of ~/.netrc go with it to the host that they are for."""
    try:
        parts = urlsplit(url)
        bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))
        sent = {**_HEADERS, **headers, **(_credentials(parts) if trusted else {})}
        return _pool_manager(parts).request(
            "GET", bare, headers=sent, preload_content=False, redirect=False, retries=False
        )
    except (urllib3.exceptions.LocationValueError, urllib3.exceptions.URLSchemeUnknown, ValueError) as error:
        raise PermanentError(f"{url} is no address that can be asked: {error}") from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _classify_error(error) from None


_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "depth-anything-train"}


def _credentials(parts: Any) -> dict[str, str]:
    if parts.username is not None:
        return urllib3.make_headers(basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")
    found = _netrc_hosts().get(parts.hostname or "")
    return urllib3.make_headers(basic_auth=f"{found[0]}:{found[2]}") if found else {}


@functools.cache
def _netrc_hosts() -> Mapping[str, Any]:
    try:
        return netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return {}


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def _pool_manager(parts: Any) -> Any:
    """Return the connections of this process, by way of the proxy that the environment names."""
    proxy = _proxy_url(parts.scheme, parts.hostname or "")
    if proxy not in _pools:
        timeout = cache.positive_setting("DEPTH_ANYTHING_TIMEOUT", _TIMEOUT_S)
        options: dict[str, Any] = {
            "num_pools": 16,
            "maxsize": _MAX_CONNECTIONS,
            "timeout": urllib3.Timeout(connect=min(timeout, 10.0), read=timeout),
        }
        if proxy:
            way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            word = f"{unquote(way.username)}:{unquote(way.password or '')}" if way.username else None
            bare = urlunsplit((way.scheme, way.netloc.rpartition("@")[2], "", "", ""))
            _pools[proxy] = urllib3.ProxyManager(
                bare, proxy_headers=urllib3.make_headers(proxy_basic_auth=word), **options
            )
        else:
            _pools[proxy] = urllib3.PoolManager(**options)
    return _pools[proxy]


@functools.cache
def _proxy_url(scheme: str, host: str) -> str:
    return "" if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme, "")


def _read_chunks(response: Any) -> Iterator[bytes]:
    """Yield a body as it comes, as long as it does come; a cut one raises, by its length."""
    limit = cache.positive_setting("DEPTH_ANYTHING_TIMEOUT", _TIMEOUT_S)
    since, came = monotonic(), 0
    while True:
        try:
            chunk = response.read1(_CHUNK)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise _classify_error(error) from None
        if not chunk:
            break
        yield chunk
        came += len(chunk)
        now = monotonic()
        if now - since > limit:
            if came < limit * _MIN_BYTES_PER_S:
                raise RetryableError(f"stalled: {came} bytes came in {now - since:.0f} s")
            since, came = now, 0
    response.release_conn()


def _classify_error(error: Exception) -> RetryableError:
    """Say in a few words what went wrong on the way."""
    e = urllib3.exceptions
    cause = error.args[1] if isinstance(error, e.ProtocolError) and len(error.args) > 1 else error
    if isinstance(error, e.ProxyError):
        cause = error.original_error
    if isinstance(cause, e.IncompleteRead | http.client.IncompleteRead):
        came = cause.partial if isinstance(cause.partial, int) else len(cause.partial)
        return RetryableError(f"cut short after {came} bytes, {cause.expected} were still to come")
    if isinstance(cause, e.NameResolutionError):
        return RetryableError("its host's name is not known")
    if isinstance(cause, e.NewConnectionError):
        return RetryableError(_short_reason(cause.__cause__ or cause))
    if isinstance(cause, e.ConnectTimeoutError):
        return RetryableError("no connection in time")
    if isinstance(cause, e.ReadTimeoutError | TimeoutError):
        return RetryableError("stalled: nothing came in time")
    if isinstance(cause, e.SSLError | ssl.SSLError):
        wrong = "CERTIFICATE_VERIFY_FAILED" in str(cause)
        return RetryableError(f"no safe connection ({_short_reason(cause)})", hopeless=wrong)
    old = isinstance(cause, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError)
    return RetryableError(_short_reason(cause), quiet=old and not isinstance(error, e.IncompleteRead))


def _short_reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return redact_secrets(" ".join(str(text).split()))[:300]


# fsspec: s3, gs and others


def _scheme(address: str) -> str:
    return address.partition(":")[0].lower()


def _supports_fsspec(address: str) -> bool:
    scheme = _scheme(address)
    if scheme == "pipe":
        return False
    import fsspec  # takes a while, and most reading does without

    if scheme not in fsspec.available_protocols():
        return False
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _PIP_EXTRAS.get(scheme)
        if extra is None:
            return False
        raise ShardError(
            f"{address} needs a package that is not here: type  pip install 'depth-anything-train[{extra}]'"
        ) from error
    return True


def _fsspec_read(address: str, start: int, end: int | None) -> bytes:
    import fsspec

    timeout = cache.positive_setting("DEPTH_ANYTHING_TIMEOUT", _TIMEOUT_S)
    try:
        system, path = fsspec.core.url_to_fs(address, **_fsspec_options(_scheme(address), timeout))
        system.retries = 1  # s3fs's; asking again is done here, and said
        if not system.async_impl:
            return system.cat_file(path, start=start, end=end)
        longest = timeout + (_MAX_FILE_BYTES if end is None else end - start) / _MIN_BYTES_PER_S
        return fsspec.asyn.sync(system.loop, system._cat_file, path, start=start, end=end, timeout=longest)
    except Exception as error:  # its file systems raise what they like
        raise _fsspec_error(address, error) from None


def _fsspec_options(scheme: str, timeout: float) -> dict[str, Any]:
    if scheme not in ("s3", "s3a"):
        for name in ("gcsfs", "gcsfs.retry"):  # which tells each try at length
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return {}
    import fsspec

    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    ours = {"connect_timeout": min(timeout, 10.0), "read_timeout": timeout, "retries": {"max_attempts": 0}}
    return {"config_kwargs": {**ours, "max_pool_connections": _MAX_CONNECTIONS, **given}}


def _fsspec_error(address: str, error: Exception) -> Exception:
    answered = getattr(error.__cause__, "response", None)
    code = answered.get("Error", {}).get("Code", "") if isinstance(answered, dict) else ""
    said = f"{code} {_short_reason(error)}".strip() if code not in str(error) else _short_reason(error)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if code == "InvalidRange":
        return PermanentError(f"{address} is truncated: it is shorter than its index says")
    if isinstance(error, FileNotFoundError) or status in (403, 404, "403", "404"):
        return PermanentError(f"{address} cannot be read: it is not there ({said})")
    forbidden = ("", "403", "AccessDenied", "Forbidden", "AllAccessDisabled")
    if isinstance(error, PermissionError) and code in forbidden:
        return PermanentError(f"{address} cannot be read: it is not for us ({said})")
    wrong = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
    return RetryableError(said, hopeless=wrong)


# WebDataset's openers: pipe and others


def _read_command(address: str) -> Iterator[bytes]:
    """Yield what a command prints; stalling, and ending with other than 0, are failures."""
    from webdataset import gopen  # takes 1.5 s, and most reading does without

    timeout = cache.positive_setting("DEPTH_ANYTHING_TIMEOUT", _TIMEOUT_S)
    try:
        source = gopen(address)
    except ValueError:
        raise ShardError(
            f"{address} cannot be read: nothing here opens {_scheme(address)}; use http, https, s3, gs or pipe"
        ) from None
    try:
        while True:
            if not select([source.stream], [], [], timeout)[0]:
                source.proc.kill()
                raise RetryableError(f"stalled: its command printed nothing for {timeout:g} s")
            chunk = source.stream.read1(_CHUNK)
            if not chunk:
                break
            yield chunk
        status = source.proc.wait()
        if status not in source.ignore_status:
            raise RetryableError(f"its command ended with {status}")
    finally:
        source.stream.close()
        source.proc.kill()  # nothing to one that has ended
        source.proc.wait()
