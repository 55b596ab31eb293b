"""What a command may replace: nothing but what it wrote itself.

A command that writes several files for one input leaves a record, NAME.json, with the sha256 of each. A single
picture carries the command's name in its text.
"""

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

COMMAND_KEY = "made_by"
DIGESTS_KEY = "sha256"
"""Keys of a record: the command, and file name to digest."""

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffix of a single picture to Pillow's name of its format; each of them carries EXIF."""

FATAL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors in writing that no other output would be spared."""

_CHUNK = 1 << 20


def check_overwrite(
    outputs: Iterable[Path],
    *,
    own: Callable[[Path], bool],
    inputs: Callable[[], Iterable[Path]] = tuple,
    way_out: str = "give another folder, or move it",
) -> set[Path]:
    """Refuse to replace an input, or a file that the command did not write; links count as what they lead to.

    Args:
        outputs: The files that the command will write.
        own: Tells whether an existing file was written by this command.
        inputs: Returns the files that the command reads; asked only if an output exists.
        way_out: What to do, for the error.

    Returns:
        The outputs that exist and may be replaced.

    Raises:
        ValueError: Names the first file that stays, and how many more do.
    """
    existing = [path for path in outputs if os.path.lexists(path)]
    if not existing:
        return set()
    read = {identity for path in inputs() if (identity := _file_identity(path)) is not None}
    kept: list[str] = []
    for path in existing:
        if _file_identity(path) in read:
            kept.append(f"{path} is read by this command and would be replaced")
        elif path.is_symlink() or not path.is_file() or not own(path):
            kept.append(f"{path} was not written by this command and would be replaced")
    if kept:
        more = f" (and {len(kept) - 1} more)" if len(kept) > 1 else ""
        raise ValueError(f"{kept[0]}{more}: {way_out}")
    return set(existing)


def build_record(made_by: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Make the part of a NAME.json by which the command knows its files again."""
    return {
        COMMAND_KEY: made_by,
        DIGESTS_KEY: {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }


def is_recorded(path: Path, record: Path, *, made_by: str, older: frozenset[str]) -> bool:
    """Tell whether a file is as a command wrote it, by the record beside it.

    Args:
        path: The file, or the record itself.
        record: NAME.json.
        made_by: The command.
        older: Keys that records of earlier versions have, which name files under "files" and have no digests.
    """
    said = read_record(record)
    if said.get(COMMAND_KEY) != made_by:
        return (
            COMMAND_KEY not in said
            and older <= said.keys()
            and (path == record or path.name in said["files"])
        )
    if path == record:
        return True
    digests = said.get(DIGESTS_KEY)
    return isinstance(digests, dict) and digests.get(path.name) == file_sha256(path)


def save_picture(pixels: np.ndarray, path: Path, *, made_by: str) -> None:
    """Write a picture whose EXIF names the command.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        path: Its suffix, one of `PICTURE_SUFFIXES`, chooses the format.
        made_by: The command.
    """
    from depth_anything.disk import atomic_write

    exif, out = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Software] = made_by
    Image.fromarray(pixels).save(out, PICTURE_FORMATS[path.suffix.lower()], exif=exif)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, out.getvalue())


def is_picture_by(path: Path, made_by: str) -> bool:
    """Tell whether `save_picture` wrote a file for this command."""
    try:
        with Image.open(path, formats=tuple(PICTURE_FORMATS.values())) as picture:
            return picture.getexif().get(ExifTags.Base.Software) == made_by
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Read a NAME.json; {} for what is none, or cannot be read."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
