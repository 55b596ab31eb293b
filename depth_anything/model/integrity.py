"""Digests in model files and checkpoints, written with the file and verified before its tensors are used.

torch verifies neither the CRC32 records of its zip files nor anything in a safetensors file, so bytes that a disk or a
copy changed would silently become other weights. The digest is inside the file, so it cannot be lost or swapped.

- A zip file of torch has the SHA-256 of itself in the zip comment, which all readers skip.
- A safetensors file has it in its metadata, over names, shapes and bytes of its tensors.

Files without a digest still load: zip files are verified by their CRC32 records, others cannot be verified. The cost
is one sequential read of the file, at 2 GB/s for SHA-256 on a current CPU core (7 GB/s for CRC32).
"""

import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch

DIGEST_KEY = "sha256"
"""Metadata key of the digest in a safetensors file."""

_CHANGED = "its bytes are not those that were written"

_COMMENT = re.compile(rb"sha256:[0-9a-f]{64}")
_COMMENT_BYTES = len("sha256:") + 64
_LENGTH_BYTES = 2  # the length of a zip's comment, in front of it
_ZIP_END, _ZIP_END_BYTES = b"PK\x05\x06", 22  # the last record of a zip file without a comment
_CHUNK = 1 << 22


class _HashingFile:
    """A writable file that hashes the bytes written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save_with_digest(content: Mapping[str, Any], path: Path) -> str:
    """Save an object like `torch.save`, with its digest. The bytes do not depend on the path.

    Args:
        content: As for `torch.save`.
        path: The file, written in place; for a file that others read, pass a temporary path.

    Returns:
        The digest, for `has_digest`.

    Raises:
        OSError: If it cannot be written.
    """
    with path.open("wb+") as file:
        hashing = _HashingFile(file)
        torch.save(content, hashing)
        comment = f"sha256:{hashing.digest.hexdigest()}".encode()
        file.seek(-_LENGTH_BYTES, os.SEEK_END)
        assert file.read() == bytes(_LENGTH_BYTES), "torch writes a zip comment itself"
        file.seek(-_LENGTH_BYTES, os.SEEK_END)
        file.write(len(comment).to_bytes(_LENGTH_BYTES, "little") + comment)
    return comment.decode()


def has_digest(path: Path, digest: str) -> bool:
    """Read a file of `save_with_digest`, and return whether its bytes are those that were written.

    Args:
        path: The file. Unlike `find_damage` this takes no file for one without a digest.
        digest: As `save_with_digest` returned it.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        return _read_digest(file, path.stat().st_size) == digest


def tensor_digest(file: BinaryIO, header: Mapping[str, Any]) -> str:
    """Hash the tensors of a safetensors file.

    Args:
        file: The file, at the first byte after its header.
        header: Its parsed header.

    Returns:
        64 hexadecimal digits of SHA-256 over name, type, shape and offsets of each tensor, and all bytes.
    """
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())
    _hash_file(digest, file)
    return digest.hexdigest()


def find_damage(path: Path) -> str:
    """Return what is wrong with the bytes of a model file or checkpoint; "" if they are as they were written.

    The whole file is read; the result is cached until size, time or inode change.

    Args:
        path: A zip file of torch or a safetensors file, with or without a digest. Other files, and those that their
            reader will reject anyway, return "".

    Raises:
        OSError: If the file cannot be read now, which is not damage.
    """
    state = path.stat()
    return _find_damage(path, state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=64)
def _find_damage(path: Path, size: int, changed_ns: int, number: int) -> str:
    with path.open("rb") as file:
        head = file.read(9)
        if head[8:] == b"{":
            return _check_safetensors(file, size)
        if head.startswith(b"PK\x03\x04"):
            return _check_zip(file, size)
    return ""


def _check_safetensors(file: BinaryIO, size: int) -> str:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        return ""
    try:
        header = json.loads(file.read(length))
        wanted = header["__metadata__"][DIGEST_KEY]
    except (ValueError, KeyError, TypeError, RecursionError):  # no valid header, or no digest
        return ""
    if tensor_digest(file, header) == wanted:
        return ""
    return (
        f'{_CHANGED}; a program that changes tensors on purpose must leave "{DIGEST_KEY}" out of the metadata'
    )


def _check_zip(file: BinaryIO, size: int) -> str:
    file.seek(max(0, size - _COMMENT_BYTES))
    if not _COMMENT.fullmatch(file.read()):
        return _CHANGED if _has_trailing_bytes(file, size) else _check_crc(file)
    return "" if _read_digest(file, size) else _CHANGED


def _read_digest(file: BinaryIO, size: int) -> str:
    """Return the digest in the comment of a zip file if it is that of the file's bytes, else ""."""
    file.seek(max(0, size - _COMMENT_BYTES - _LENGTH_BYTES))
    length, comment = file.read(_LENGTH_BYTES), file.read()
    if int.from_bytes(length, "little") != _COMMENT_BYTES:
        return ""
    digest = hashlib.sha256()
    file.seek(0)
    _hash_file(digest, file, size - _COMMENT_BYTES - _LENGTH_BYTES)
    digest.update(bytes(_LENGTH_BYTES))  # the state before the digest was added
    written = f"sha256:{digest.hexdigest()}"
    return written if comment == written.encode() else ""


def _has_trailing_bytes(file: BinaryIO, size: int) -> bool:
    """Return whether bytes follow the end of a zip file. torch writes none, so they are a damaged digest."""
    file.seek(max(0, size - 65_557))  # zip readers look this far for the end
    tail = file.read()
    end = tail.rfind(_ZIP_END)
    return end >= 0 and (end + _ZIP_END_BYTES != len(tail) or any(tail[-_LENGTH_BYTES:]))


def _check_crc(file: BinaryIO) -> str:
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            if not any(member.CRC for member in archive.infolist()):
                return ""  # written after torch.serialization.set_crc32_options(False)
            broken = archive.testzip()
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # EINVAL: a seek before the start, which is damage
            raise
        return f"{_CHANGED}: {error}"
    except Exception as error:  # damaged bytes make zipfile raise many types
        return f"it is cut short or overwritten: {str(error).strip() or type(error).__name__}"
    return f"the CRC32 of {broken} is wrong" if broken else ""


def _hash_file(digest: Any, file: BinaryIO, count: int | None = None) -> None:
    """Hash `count` bytes of a file from its position, or all to its end."""
    while count is None or count > 0:
        chunk = file.read(_CHUNK if count is None else min(_CHUNK, count))
        if not chunk:
            return
        digest.update(chunk)
        count = None if count is None else count - len(chunk)
