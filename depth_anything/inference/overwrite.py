"""Overwrite protection: a command replaces only files that it wrote itself, never an input or a user's file.

A command that writes several files per input leaves a record, NAME.json, with the sha256 of each. A single picture
names the command in its EXIF.
"""

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from depth_anything.errors import UserError

COMMAND_KEY = "made_by"
"""Key of the command that wrote the files."""

DIGESTS_KEY = "sha256"
"""Key of the mapping from file name to sha256."""

FOLDERS_KEY = "maps"
"""Key of the mapping from folder name to the number and total bytes of its files."""

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffix of a single picture to Pillow's name of its format; each of them holds EXIF."""

FATAL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Write errors that would also occur for every further output."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class RecordedOutputs:
    """Recognizes the files that a command wrote, by the record NAME.json next to them.

    Attributes:
        command: The command, as the record names it.
        legacy_keys: Keys of records of earlier versions, which have neither command nor digests.
        is_legacy_output: Tells whether such a version wrote a file or folder, given its path and its record's content.
        folder_endings: Endings of the files in output folders.
    """

    command: str
    legacy_keys: frozenset[str]
    is_legacy_output: Callable[[Path, dict[str, Any]], bool]
    folder_endings: tuple[str, ...] = ()

    def check(
        self,
        files: Mapping[Path, Path],
        folders: Mapping[Path, Path] | None = None,
        *,
        inputs: Callable[[], Iterable[Path]],
        fix: str = "give another folder, or move it",
    ) -> set[Path]:
        """Refuse to replace inputs, and files or folders that the command did not write.

        Args:
            files: Each output file, records included, and its record.
            folders: Each output folder and its record.
            inputs: Returns the files that the command reads; called only if an output exists.
            fix: What the user can do, for the error.

        Returns:
            The outputs that exist and may be replaced.

        Raises:
            UserError: As `check_overwrite`; files inside a folder are named.
        """
        existing = {path: record for path, record in (folders or {}).items() if _is_real_folder(path)}
        own_folders = {path for path, record in existing.items() if self._owns_folder(path, record)}
        records = {
            **files,
            **{path: record for path, record in (folders or {}).items() if path not in existing},
        }
        inside = [file for folder in existing for file in folder.iterdir()]

        def is_own(path: Path) -> bool:
            return path.parent in own_folders if path.parent in existing else self._owns(path, records[path])

        replaceable = check_overwrite([*records, *inside], is_own=is_own, inputs=inputs, fix=fix)
        return replaceable.difference(inside) | set(existing)

    def build(
        self,
        digests: Mapping[str, str],
        folders: Mapping[str, tuple[int, int]] | None = None,
        *,
        earlier: Path | None = None,
    ) -> dict[str, Any]:
        """Build the fields of a record that later identify the files as written by this command.

        Args:
            digests: File name to sha256.
            folders: Name of each output folder to the number and total bytes of its files; None for commands without.
            earlier: A record whose entries are kept, if this command wrote it; it need not exist.
        """
        before = read_record(earlier) if earlier else {}
        if before.get(COMMAND_KEY) != self.command:
            before = {}
        record = {COMMAND_KEY: self.command, DIGESTS_KEY: {**before.get(DIGESTS_KEY, {}), **digests}}
        if folders is not None:
            sizes = {name: {"files": files, "bytes": size} for name, (files, size) in folders.items()}
            record[FOLDERS_KEY] = {**before.get(FOLDERS_KEY, {}), **sizes}
        return record

    def _owns(self, path: Path, record: Path) -> bool:
        content = read_record(record)
        if self._is_legacy(content):
            return path == record or self.is_legacy_output(path, content)
        if content.get(COMMAND_KEY) != self.command:
            return False
        digests = content.get(DIGESTS_KEY)
        return path == record or (isinstance(digests, dict) and digests.get(path.name) == file_sha256(path))

    def _owns_folder(self, folder: Path, record: Path) -> bool:
        """Compare number and total size of the files, as hashing is slow; edits that keep the size are missed."""
        content, files = read_record(record), list(folder.iterdir())
        if not all(file.is_file() and file.name.endswith(self.folder_endings) for file in files):
            return False
        if self._is_legacy(content):
            return self.is_legacy_output(folder, content)
        folders = content.get(FOLDERS_KEY)
        size = sum(file.stat().st_size for file in files)
        return isinstance(folders, dict) and folders.get(folder.name) == {"files": len(files), "bytes": size}

    def _is_legacy(self, content: dict[str, Any]) -> bool:
        return COMMAND_KEY not in content and self.legacy_keys <= content.keys()


def check_overwrite(
    outputs: Collection[Path],
    *,
    is_own: Callable[[Path], bool],
    inputs: Callable[[], Iterable[Path]] = tuple,
    fix: str = "give another folder, or move it",
) -> set[Path]:
    """Refuse to replace an input, or a file that the command did not write; links count as their targets.

    Args:
        outputs: The files that the command will write.
        is_own: Tells whether an existing file was written by this command.
        inputs: Returns the files that the command reads; called only if an output exists.
        fix: What the user can do, for the error.

    Returns:
        The outputs that exist and may be replaced.

    Raises:
        UserError: If any file may not be replaced; names the first, and how many more there are.
    """
    existing = [path for path in outputs if os.path.lexists(path)]
    if not existing:
        return set()
    read = {identity for path in inputs() if (identity := _file_identity(path)) is not None}
    refused: list[str] = []
    for path in existing:
        if _file_identity(path) in read:
            refused.append(f"{path} is read by this command and would be replaced")
        elif path.is_symlink() or not path.is_file() or not is_own(path):
            refused.append(f"{path} was not written by this command and would be replaced")
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(f"{refused[0]}{more}", fix)
    return set(existing)


def save_picture(pixels: np.ndarray, path: Path, *, made_by: str) -> None:
    """Write a picture whose EXIF names the command.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        path: Path; its suffix, a key of `PICTURE_FORMATS`, selects the format.
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


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Read a NAME.json; return {} if there is none or it holds no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_real_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
