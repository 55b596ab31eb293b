"""Fingerprints of files: a hash over their names and contents."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from depth_anything.errors import UserError

_BLOCK_BYTES = 1 << 20


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash files by name and content.

    Args:
        files: Name and path of each; the name decides, not the path, so that a copy has the same hash.

    Returns:
        "sha256:" and the hash.

    Raises:
        UserError: If a file cannot be read.
    """
    files = sorted(files)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(8, thread_name_prefix="hash") as pool:  # hashlib releases the GIL
        for (name, _), content in zip(
            files, pool.map(_hash_content, [path for _, path in files]), strict=True
        ):
            digest.update(f"{name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _hash_content(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()
