"""Where sets, labels and runs are written: a folder, or a prefix of an object store (s3://, gs://).

An object appears under its name complete or not at all: a single request writes it, or the last one of a multipart
upload. `ObjectStore.write_new` is the only lock: S3 (`If-None-Match: *`) and Google (generation 0) let exactly one of
several writers create an object. Errors that pass are retried as in retry.py.
"""

import errno
import functools
import hashlib
import os
import secrets
import sys
import tempfile
from abc import ABC, abstractmethod
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from depth_anything.data.address import is_remote, join_address, redact_secrets, url_scheme
from depth_anything.data.cache import positive_setting
from depth_anything.data.fsspec_io import (
    ConditionUnsupportedError,
    ObjectExistsError,
    ObjectMissingError,
    classify_write_error,
    open_filesystem,
    run_async,
    supports_fsspec,
)
from depth_anything.data.retry import RetryableError, retry
from depth_anything.data.tars import ShardError
from depth_anything.disk import atomic_path, atomic_write, write_new

T = TypeVar("T")

_SCHEMES = ("s3", "s3a", "gs", "gcs")
_TIMEOUT_S = 30.0
_MIN_BYTES_PER_S = 1000
_PART_BYTES = 50 << 20  # of a multipart upload; S3 takes 10,000 parts, so objects of up to 500 GB
_PARALLEL_PARTS = 4  # parts in memory at a time
_COPY_BYTES = 1 << 20

_unchecked_tags: set[str] = set()  # buckets whose ETags are no checksums of the content, as with KMS keys


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows about an object: its size in bytes, and checksums ("" where it gives none).

    Attributes:
        size: Bytes.
        etag: S3's ETag: the md5 of the content, or the md5 of the md5s of its parts, "-" and their number.
        md5: Google's md5 of the content, hexadecimal.
        modified: When it was written, by the store's clock, in seconds since 1970; 0 where it does not say it.
    """

    size: int
    etag: str = ""
    md5: str = ""
    modified: float = field(default=0.0, compare=False, repr=False)


class Store(ABC):
    """Files under one root, named relative to it.

    Attributes:
        root: The folder or address.
        is_remote: Whether requests go to a server.
    """

    root: str
    is_remote: bool

    @abstractmethod
    def names(self, prefix: str = "") -> set[str]:
        """Return the names of all files that begin with `prefix`; those of subfolders only in an object store."""

    @abstractmethod
    def read(self, name: str, *, first_bytes: int | None = None) -> bytes:
        """Read a small file, or its first bytes. Raises FileNotFoundError if there is none."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically; an existing one is replaced."""

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> bool:
        """Write a small file unless there is one of this name; return whether it was written."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file, if there is one."""

    @abstractmethod
    def staging(self) -> AbstractContextManager[Path]:
        """Yield a local folder in which a shard can be written: this folder, or a temporary one to `publish` from."""

    @abstractmethod
    def publish(self, path: Path, *, replace: bool = False) -> None:
        """Put a finished file of `staging` here under its own name.

        Args:
            path: The file; a folder store has it already.
            replace: Replace a file of other content.

        Raises:
            ShardError: There is a file of other content.
        """

    @abstractmethod
    def fetch(self, name: str, folder: Path) -> None:
        """Make a file available in a folder of `staging`."""

    @property
    @abstractmethod
    def remove_command(self) -> str:
        """The command that removes everything here, for messages."""

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return self.size(name) is not None


class FolderStore(Store):
    """A folder on a disk."""

    is_remote = False

    def __init__(self, root: str | Path) -> None:
        """Name the folder; it may not exist yet."""
        self.root, self.path = str(root), Path(root)

    def names(self, prefix: str = "") -> set[str]:
        """List the folder; no names if there is none."""
        names = os.listdir(self.path) if self.path.is_dir() else []
        return {name for name in names if name.startswith(prefix)}

    def read(self, name: str, *, first_bytes: int | None = None) -> bytes:
        """Read a file."""
        with open(self.path / name, "rb") as file:
            return file.read(-1 if first_bytes is None else first_bytes)

    def size(self, name: str) -> int | None:
        """Return the size of a file, None if there is none."""
        try:
            return os.stat(self.path / name).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file by renaming a temporary one."""
        atomic_write(self.path / name, data)

    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file by linking a temporary one."""
        return write_new(self.path / name, data)

    def delete(self, name: str) -> None:
        """Delete a file, if there is one."""
        (self.path / name).unlink(missing_ok=True)

    def staging(self) -> AbstractContextManager[Path]:
        """Yield the folder itself."""
        return nullcontext(self.path)

    def publish(self, path: Path, *, replace: bool = False) -> None:
        """Do nothing: the file is here."""

    def fetch(self, name: str, folder: Path) -> None:
        """Do nothing: the file is here."""

    @property
    def remove_command(self) -> str:
        """The command of a shell."""
        return f"rm -r {self.root}"


class ObjectStore(Store):
    """A prefix of an object store. Holds no connection, so it can be pickled and used after a fork."""

    is_remote = True

    def __init__(self, root: str) -> None:
        """Name the prefix; no request is sent."""
        self.root = root.rstrip("/")

    @property
    def conditional(self) -> bool:
        """Whether the store can create an object only if there is none; found out with two small objects, once."""
        return _supports_conditions(self.root)

    def address(self, name: str) -> str:
        """Return the address of an object."""
        return join_address(self.root, name) if name else self.root

    def names(self, prefix: str = "") -> set[str]:
        """List the objects; those in folders have names with a slash. One request per thousand."""
        return set(self.list(prefix))

    def list(self, prefix: str = "") -> dict[str, ObjectInfo]:
        """List the objects whose names begin with `prefix`."""
        base = self._base()
        try:
            rows = self._request("", "find", base, prefix=prefix, detail=True, withdirs=False, doing="read")
        except ObjectMissingError:
            return {}
        return {
            path[len(base) + 1 :]: _object_info(row)
            for path, row in rows.items()
            if row.get("type") != "directory" and path.startswith(f"{base}/")
        }

    def read(self, name: str, *, first_bytes: int | None = None) -> bytes:
        """Read an object."""
        try:
            part = {} if first_bytes is None else {"start": 0, "end": first_bytes}
            return self._request(name, "cat_file", self._path(name), doing="read", **part)
        except ObjectMissingError:
            raise FileNotFoundError(self.address(name)) from None

    def info(self, name: str) -> ObjectInfo | None:
        """Return size and checksums of an object; None if there is none."""
        try:
            row = self._request(name, "info", self._path(name), doing="read")
        except ObjectMissingError:
            return None
        return None if row.get("type") == "directory" else _object_info(row)

    def size(self, name: str) -> int | None:
        """Return the size of an object, None if there is none."""
        info = self.info(name)
        return None if info is None else info.size

    def write(self, name: str, data: bytes) -> None:
        """Write an object with one request."""
        self._request(name, "pipe_file", self._path(name), data, bytes=len(data))

    def write_new(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one; return whether it has this content now.

        Without conditional writes in the store two processes may both succeed.
        """
        if not self.conditional:
            if not self.exists(name):
                self.write(name, data)
            return self.read(name) == data
        return self._create(
            name,
            lambda: self._once(name, "pipe_file", self._path(name), data, mode="create"),
            lambda: self.read(name) == data,
        )

    def _create(self, name: str, create: Callable[[], Any], is_ours: Callable[[], bool]) -> bool:
        """Retry a conditional write; return whether the object has our content.

        An object that exists may be ours: the answer to a request was lost, and we or the HTTP client have repeated it.
        """

        def attempt() -> bool:
            try:
                create()
            except ObjectExistsError:
                return is_ours()
            return True

        return retry(self.address(name), attempt, doing="written")

    def delete(self, name: str) -> None:
        """Delete an object, if there is one."""
        with suppress(ObjectMissingError):
            self._request(name, "rm_file", self._path(name))

    def upload(self, path: Path, name: str, *, new: bool = False) -> bool:
        """Upload a finished local file, in parts if it is large, and check size and checksum of the object.

        Args:
            path: The file.
            name: Name of the object.
            new: Only if there is no object of this name.

        Returns:
            Whether the object has the content of the file now; False only with `new`.

        Raises:
            FileNotFoundError: There is no such file, or it was deleted meanwhile.
        """
        size = path.stat().st_size
        options: dict[str, Any] = {"mode": "create"} if new and self.conditional else {}
        if url_scheme(self.root) in ("s3", "s3a"):
            options |= {"chunksize": _PART_BYTES, "max_concurrency": _PARALLEL_PARTS}
        if new and self.exists(name):
            return self.holds(name, path)

        def put() -> None:
            try:
                self._once(name, "put_file", str(path), self._path(name), bytes=size, **options)
            except ObjectMissingError:
                if not path.exists():
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
                # gcsfs has not found the upload that it wanted to end, and hides why it wanted that.
                if new and self.exists(name):
                    raise ObjectExistsError(name) from None
                raise RetryableError("the upload has failed") from None
            self._check_upload(name, path)

        return self._create(name, put, lambda: self.holds(name, path))

    def holds(self, name: str, path: Path) -> bool:
        """Return whether an object has the content of a local file."""
        info = self.info(name)
        if info is None or info.size != path.stat().st_size:
            return False
        if self._bucket() not in _unchecked_tags and info.md5:
            return info.md5 == _md5(path)
        if self._bucket() not in _unchecked_tags and info.etag and info.etag == _s3_etag(path, info.etag):
            return True
        return self._equal_content(name, path)

    def download(self, name: str, path: Path) -> None:
        """Download an object to a local file, which appears complete or not at all.

        Raises:
            FileNotFoundError: There is no such object.
        """
        info = self.info(name)
        if info is None:
            raise FileNotFoundError(self.address(name))
        with atomic_path(path, make_folder=True) as temporary:

            def attempt() -> None:
                self._once(name, "get_file", self._path(name), str(temporary), bytes=info.size)
                if (size := temporary.stat().st_size) != info.size:
                    raise RetryableError(f"cut short after {size} of {info.size} bytes")

            retry(self.address(name), attempt)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a temporary folder, in TMPDIR; it is removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="depth-anything-upload-") as folder:
            yield Path(folder)

    def publish(self, path: Path, *, replace: bool = False) -> None:
        """Upload a file, unless the same content is there."""
        if self.upload(path, path.name, new=True):
            return
        if not replace:
            raise ShardError(
                f"{self.address(path.name)} has other content than this process has made",
                f"if no other process writes there, delete it and continue: type  {self._delete_command(path.name)}",
            )
        self.upload(path, path.name)

    def fetch(self, name: str, folder: Path) -> None:
        """Download a file into a folder."""
        self.download(name, folder / name)

    @property
    def remove_command(self) -> str:
        """The command of the provider's program."""
        return f"{self._delete_command('')} --recursive"

    def _delete_command(self, name: str) -> str:
        program = "gcloud storage rm" if url_scheme(self.root) in ("gs", "gcs") else "aws s3 rm"
        return f"{program} {self.address(name)}"

    def _check_upload(self, name: str, path: Path) -> None:
        """Compare a new object with its file; RetryableError if it differs."""
        info, size = self.info(name), path.stat().st_size
        if info is None or info.size != size:
            raise RetryableError(f"{None if info is None else info.size} of {size} bytes arrived")
        if self._bucket() in _unchecked_tags or not (info.md5 or info.etag):
            return
        if info.md5 == _md5(path) if info.md5 else info.etag == _s3_etag(path, info.etag):
            return
        if not self._equal_content(name, path):
            raise RetryableError("its checksum differs from that of the file")
        _unchecked_tags.add(self._bucket())  # the store encrypts, and its tags are of the encrypted bytes

    def _equal_content(self, name: str, path: Path) -> bool:
        with tempfile.TemporaryDirectory(prefix="depth-anything-compare-") as folder:
            copy = Path(folder, "copy")
            self.download(name, copy)
            return _md5(copy) == _md5(path)

    def _bucket(self) -> str:
        return self.root.partition("://")[2].partition("/")[0]

    def _base(self) -> str:
        return self._path("").rstrip("/")

    def _path(self, name: str) -> str:
        """Return the path of an object within its file system, which is the address without the scheme."""
        return self.address(name).partition("://")[2]

    def _request(
        self, name: str, method: str, *arguments: Any, doing: str = "written", **options: Any
    ) -> Any:
        return retry(self.address(name), lambda: self._once(name, method, *arguments, **options), doing=doing)

    def _once(self, name: str, method: str, *arguments: Any, bytes: int = 0, **options: Any) -> Any:
        """Send a request once. Raises the errors of `classify_write_error`."""
        timeout = positive_setting("DEPTH_ANYTHING_TIMEOUT", _TIMEOUT_S)
        try:
            system, _ = open_filesystem(self.root, timeout=timeout, use_listings_cache=False)
            if not system.async_impl:
                return getattr(system, method)(*arguments, **options)
            longest = timeout * 4 + bytes / _MIN_BYTES_PER_S
            return run_async(system, getattr(system, f"_{method}"), *arguments, timeout=longest, **options)
        except TypeError:  # a file system whose methods have other arguments
            raise
        except Exception as error:  # each file system raises its own types
            raise classify_write_error(self.address(name), error) from None


def is_object_store(address: str) -> bool:
    """Return whether an address is one of S3 or Google, where files are written; at ftp:// one may see half a file.

    Raises:
        ShardError: It is, and needs a package that is not installed.
    """
    return is_remote(address) and url_scheme(address) in _SCHEMES and supports_fsspec(address)


def open_store(root: str | Path) -> Store:
    """Return the store of a folder or an address.

    Raises:
        ShardError: Nothing can be written at such an address.
    """
    text = str(root).removeprefix("file://")
    if not is_remote(text):
        return FolderStore(root if isinstance(root, Path) else text)
    if not is_object_store(text):
        raise ShardError(
            f"{redact_secrets(text)} can be read only", "type a folder, or an address as s3://BUCKET/PREFIX"
        )
    return ObjectStore(text)


@functools.cache
def _supports_conditions(root: str) -> bool:
    """Try to create one object twice; the second time must fail."""
    store, name = ObjectStore(root), f".probe-{secrets.token_hex(8)}"
    supported = True
    try:
        for attempt in range(2):
            store._request(name, "pipe_file", store._path(name), b"probe", mode="create")
            supported = attempt == 0
    except ObjectExistsError:
        pass
    except (ConditionUnsupportedError, TypeError):
        supported = False
    store.delete(name)
    if not supported:
        print(
            f"{redact_secrets(root)}: this store has no conditional writes, so it cannot keep two processes from the "
            "same work: start one process with share=1/N, one with share=2/N and so on (docs/object-stores.md)",
            file=sys.stderr,
        )
    return supported


def _object_info(row: dict[str, Any]) -> ObjectInfo:
    md5 = ""
    with suppress(Base64Error, ValueError):
        md5 = b64decode(str(row.get("md5Hash") or "")).hex()
    modified = row.get("LastModified") or row.get("mtime")  # of s3fs; of gcsfs
    seconds = modified.timestamp() if isinstance(modified, datetime) else 0.0
    return ObjectInfo(int(row.get("size") or 0), str(row.get("ETag") or "").strip('"'), md5, seconds)


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_COPY_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _s3_etag(path: Path, like: str) -> str:
    """Return the ETag that S3 gives to a file, uploaded whole or in parts as the ETag `like` was."""
    if "-" not in like:
        return _md5(path)
    parts = b""
    with open(path, "rb") as file:
        while chunk := file.read(_PART_BYTES):
            parts += hashlib.md5(chunk, usedforsecurity=False).digest()
    return f"{hashlib.md5(parts, usedforsecurity=False).hexdigest()}-{len(parts) // 16}"
