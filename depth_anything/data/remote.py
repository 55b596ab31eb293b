"""Fetch shards from http(s), s3, gs and other addresses.

http and https are read by range over kept-alive connections, object stores by range through fsspec. All other
addresses (pipe:, http servers without ranges) are copied whole into the cache of `cache.py`. Which errors are retried,
replace a record or stop the run is in `retry.py`.
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
from collections.abc import Iterator, Mapping
from contextlib import closing
from hashlib import sha256
from select import select
from time import monotonic
from typing import Any, BinaryIO
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

import urllib3

from depth_anything.data import cache
from depth_anything.data.address import is_http, redact_secrets
from depth_anything.data.retry import PermanentError, RetryableError, retry, short_reason
from depth_anything.data.tar_index import TarIndex
from depth_anything.data.tars import ShardError, ShardInfo

_TIMEOUT_S = 30.0
_MIN_BYTES_PER_S = 1000  # a slower server counts as stalled
_CHUNK = 1 << 18
_MAX_FILE_BYTES = 1 << 30  # of a manifest or an index
_MAX_REDIRECTS = 5
_MAX_CONNECTIONS = 32
_RETRY_STATUSES = frozenset((408, 425, 429))  # and every status from 500 up
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "depth-anything-train"}
_PIP_EXTRAS = {"s3": "remote", "s3a": "remote", "gs": "remote", "gcs": "remote"}

_pools: dict[str, Any] = {}  # connection pools by proxy, "" for none
_without_ranges: set[str] = set()  # prefixes whose server ignores Range
_announced: set[str] = set()  # prefixes whose whole copies were announced
os.register_at_fork(after_in_child=_pools.clear)


def fetch(address: str) -> bytes:
    """Read a small file whole.

    Raises:
        ShardError: It does not exist, or access is denied.
        StorageUnavailable: It cannot be read for now.
    """
    return retry(address, lambda: b"".join(_limit_size(address, _read_whole(address), _MAX_FILE_BYTES)))


def fetch_range(
    address: str, start: int, count: int, *, table: TarIndex, total_bytes: int | None, fresh: bool = False
) -> bytes:
    """Read part of a shard.

    Args:
        address: Address of the tar.
        start: First byte.
        count: Number of bytes; fewer are returned where the file ends.
        table: Index of the tar.
        total_bytes: Size of all shards that will be read, for the message about whole copies.
        fresh: Ignore a local copy.

    Raises:
        ShardError: The tar does not exist, access is denied, or it is not the tar of the index.
        StorageUnavailable: It cannot be read for now.
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
    with cache.open_shard_copy(
        f"{table.hash} {table.bytes}",
        table.bytes,
        lambda file: copy_whole_shard(address, table, file),
        fresh=fresh,
    ) as file:
        return os.pread(file.fileno(), count, start)


def _announce_whole_copies(prefix: str, total_bytes: int | None) -> None:
    # The main process prints it or, if that reads nothing, the worker that creates the folder.
    worker = multiprocessing.parent_process() is not None
    if prefix in _announced or (worker and cache.cache_folder().exists()):
        return
    _announced.add(prefix)
    limit = cache.cache_limit_bytes()
    size = f"{total_bytes / 1e9:.3f} GB in total" if total_bytes else "as much as the shards have"
    again = "" if (total_bytes or 0) <= limit else ", so shards will be copied again and again"
    print(
        f"{redact_secrets(prefix)}: byte ranges are not supported, so whole shards are copied to "
        f"{cache.cache_folder()}: {size}, of which at most {limit / 1e9:g} GB are kept{again}; "
        "DEPTH_ANYTHING_CACHE=FOLDER and DEPTH_ANYTHING_CACHE_GB=N change that",
        file=sys.stderr,
    )


def copy_whole_shard(address: str, table: TarIndex | ShardInfo, file: BinaryIO) -> None:
    """Copy a shard into a file and check it against its index, or against its line of the manifest."""

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


def _limit_size(address: str, chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise PermanentError(f"{address} has more than {limit} bytes")
        yield chunk


def _read_whole(address: str) -> Iterator[bytes]:
    if is_http(address):
        with closing(_http_get(address, {})) as response:
            yield from _read_chunks(response)
    elif _supports_fsspec(address):
        yield _fsspec_read(address, 0, None)  # start=None would make some file systems ask for the size first
    else:
        yield from _read_command(address)


def _read_part(address: str, start: int, count: int, shard_bytes: int) -> bytes | None:
    """Request a range once; None if the address has no ranges."""
    if is_http(address):
        return _http_read_range(address, start, count, shard_bytes)
    if _supports_fsspec(address):
        return _fsspec_read(address, start, start + count)
    return None


def _timeout_s() -> float:
    return cache.positive_setting("DEPTH_ANYTHING_TIMEOUT", _TIMEOUT_S)


# http and https


def _http_read_range(address: str, start: int, count: int, shard_bytes: int) -> bytes | None:
    with closing(_http_get(address, {"Range": f"bytes={start}-{start + count - 1}"})) as response:
        if response.status != 206:
            return None
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if span and span[2] != "*" and int(span[2]) != shard_bytes:
            raise PermanentError(f"{address} has {span[2]} bytes in place of {shard_bytes}")
        if span and int(span[1]) != start:
            raise RetryableError(f"byte {span[1]} was sent in place of {start}")
        return b"".join(_limit_size(address, _read_chunks(response), count))


def _http_get(address: str, headers: Mapping[str, str]) -> Any:
    """Send a GET request and follow redirects; return a response of status 200 or 206, its body unread."""
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
            raise PermanentError(f"{address} redirects to an invalid address") from None
        if not is_http(target) or (url.lower().startswith("https:") and target.lower().startswith("http:")):
            raise PermanentError(f"{address} redirects to {target}, which is not followed")
        url = target
    raise PermanentError(f"{address} cannot be read: more than {_MAX_REDIRECTS} redirects")


def _discard_response(response: Any) -> None:
    """Close a response; a short body is read first, so that the connection can be reused."""
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
        return RetryableError(reason, wait_s=float(wait) if wait.isdecimal() else 0.0)
    if status in (401, 407):  # an expired password or token is not the record's fault
        return RetryableError(reason, fatal=True)
    if status == 416:
        return PermanentError(f"{address} is truncated: it is shorter than its index says")
    return PermanentError(f"{address} cannot be read: {reason}")


def _send_request(url: str, headers: Mapping[str, str], *, trusted: bool) -> Any:
    """Send one request, with the credentials of the address or of ~/.netrc if the host is `trusted`."""
    try:
        parts = urlsplit(url)
        bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))
        sent = {**_HEADERS, **headers, **(_credentials(parts) if trusted else {})}
        return _pool_manager(parts).request(
            "GET", bare, headers=sent, preload_content=False, redirect=False, retries=False
        )
    except (urllib3.exceptions.LocationValueError, urllib3.exceptions.URLSchemeUnknown, ValueError) as error:
        raise PermanentError(f"{url} is not a valid address: {error}") from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _classify_error(error) from None


def _credentials(parts: SplitResult) -> dict[str, str]:
    if parts.username is not None:
        return urllib3.make_headers(basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")
    login = _netrc_hosts().get(parts.hostname or "")
    return urllib3.make_headers(basic_auth=f"{login[0]}:{login[2]}") if login else {}


@functools.cache
def _netrc_hosts() -> Mapping[str, Any]:
    try:
        return netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return {}


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def _pool_manager(parts: SplitResult) -> Any:
    """Return the connection pools of this process, through the proxy that the environment names."""
    proxy = _proxy_url(parts.scheme, parts.hostname or "")
    if proxy not in _pools:
        timeout = _timeout_s()
        options: dict[str, Any] = {
            "num_pools": 16,
            "maxsize": _MAX_CONNECTIONS,
            "timeout": urllib3.Timeout(connect=min(timeout, 10.0), read=timeout),
        }
        if proxy:
            address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            login = (
                f"{unquote(address.username)}:{unquote(address.password or '')}" if address.username else None
            )
            bare = urlunsplit((address.scheme, address.netloc.rpartition("@")[2], "", "", ""))
            _pools[proxy] = urllib3.ProxyManager(
                bare, proxy_headers=urllib3.make_headers(proxy_basic_auth=login), **options
            )
        else:
            _pools[proxy] = urllib3.PoolManager(**options)
    return _pools[proxy]


@functools.cache
def _proxy_url(scheme: str, host: str) -> str:
    return "" if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme, "")


def _read_chunks(response: Any) -> Iterator[bytes]:
    """Yield a body in chunks; RetryableError if it is cut short or slower than `_MIN_BYTES_PER_S`."""
    limit = _timeout_s()
    since, received = monotonic(), 0
    while True:
        try:
            chunk = response.read1(_CHUNK)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise _classify_error(error) from None
        if not chunk:
            break
        yield chunk
        received += len(chunk)
        now = monotonic()
        if now - since > limit:
            if received < limit * _MIN_BYTES_PER_S:
                raise RetryableError(f"stalled: {received} bytes in {now - since:.0f} s")
            since, received = now, 0
    response.release_conn()


def _classify_error(error: Exception) -> RetryableError:
    """Describe an error of a connection in a few words."""
    e = urllib3.exceptions
    cause = error.args[1] if isinstance(error, e.ProtocolError) and len(error.args) > 1 else error
    if isinstance(error, e.ProxyError):
        cause = error.original_error
    if isinstance(cause, e.IncompleteRead | http.client.IncompleteRead):
        received = cause.partial if isinstance(cause.partial, int) else len(cause.partial)
        return RetryableError(f"cut short after {received} bytes, {cause.expected} bytes missing")
    if isinstance(cause, e.NameResolutionError):
        return RetryableError("host name not found")
    if isinstance(cause, e.NewConnectionError):
        return RetryableError(short_reason(cause.__cause__ or cause))
    if isinstance(cause, e.ConnectTimeoutError):
        return RetryableError("connection timed out")
    if isinstance(cause, e.ReadTimeoutError | TimeoutError):
        return RetryableError("stalled: read timed out")
    if isinstance(cause, e.SSLError | ssl.SSLError):
        wrong = "CERTIFICATE_VERIFY_FAILED" in str(cause)
        return RetryableError(f"no secure connection ({short_reason(cause)})", fatal=wrong)
    closed = isinstance(cause, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError)
    return RetryableError(short_reason(cause), silent=closed and not isinstance(error, e.IncompleteRead))


# fsspec: s3, gs and others


def _scheme(address: str) -> str:
    return address.partition(":")[0].lower()


def _supports_fsspec(address: str) -> bool:
    scheme = _scheme(address)
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


def _fsspec_read(address: str, start: int, end: int | None) -> bytes:
    import fsspec

    timeout = _timeout_s()
    try:
        system, path = fsspec.core.url_to_fs(address, **_fsspec_options(_scheme(address), timeout))
        system.retries = 1  # of s3fs; `retry` does it, with a message
        if not system.async_impl:
            return system.cat_file(path, start=start, end=end)
        longest = timeout + (_MAX_FILE_BYTES if end is None else end - start) / _MIN_BYTES_PER_S
        return fsspec.asyn.sync(system.loop, system._cat_file, path, start=start, end=end, timeout=longest)
    except Exception as error:  # each file system raises its own types
        raise _fsspec_error(address, error) from None


def _fsspec_options(scheme: str, timeout: float) -> dict[str, Any]:
    if scheme not in ("s3", "s3a"):
        for name in ("gcsfs", "gcsfs.retry"):  # they log a traceback for each attempt
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return {}
    import fsspec

    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    ours = {"connect_timeout": min(timeout, 10.0), "read_timeout": timeout, "retries": {"max_attempts": 0}}
    return {"config_kwargs": {**ours, "max_pool_connections": _MAX_CONNECTIONS, **configured}}


def _fsspec_error(address: str, error: Exception) -> Exception:
    answer = getattr(error.__cause__, "response", None)
    code = answer.get("Error", {}).get("Code", "") if isinstance(answer, dict) else ""
    reason = f"{code} {short_reason(error)}".strip() if code not in str(error) else short_reason(error)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if code == "InvalidRange":
        return PermanentError(f"{address} is truncated: it is shorter than its index says")
    if isinstance(error, FileNotFoundError) or status in (403, 404, "403", "404"):
        return PermanentError(f"{address} cannot be read: not found ({reason})")
    forbidden = ("", "403", "AccessDenied", "Forbidden", "AllAccessDisabled")
    if isinstance(error, PermissionError) and code in forbidden:
        return PermanentError(f"{address} cannot be read: access denied ({reason})")
    return RetryableError(
        reason, fatal=isinstance(error, PermissionError) or "Credentials" in type(error).__name__
    )


# WebDataset's openers: pipe and others


def _read_command(address: str) -> Iterator[bytes]:
    """Yield what a command prints; RetryableError if it stalls or its exit code is not 0."""
    from webdataset import gopen  # takes 1.5 s to import, and only pipes need it

    timeout = _timeout_s()
    try:
        source = gopen(address)
    except ValueError:
        raise ShardError(
            f'{address} cannot be read: the scheme "{_scheme(address)}" is not supported; '
            "use http, https, s3, gs or pipe"
        ) from None
    try:
        while True:
            if not select([source.stream], [], [], timeout)[0]:
                source.proc.kill()
                raise RetryableError(f"stalled: the command printed nothing for {timeout:g} s")
            chunk = source.stream.read1(_CHUNK)
            if not chunk:
                break
            yield chunk
        status = source.proc.wait()
        if status not in source.ignore_status:
            raise RetryableError(f"the command exited with {status}")
    finally:
        source.stream.close()
        source.proc.kill()  # does nothing if it has exited
        source.proc.wait()
