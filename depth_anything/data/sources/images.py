"""Anyone's photographs: a folder, a list file or a tar, made into image shards.

Facts: nothing is known but the pixels, so that a record holds the image and a json with `source`, the file's
own `name` and its `original_size`. Whatever `decode_image` reads is welcome: JPEG, PNG, WebP, TIFF, BMP, GIF;
any EXIF orientation, grey, CMYK, 16-bit, alpha. Upright RGB files of JPEG, PNG or WebP are kept byte for byte,
others become PNG as they are seen. Nothing is unpacked to disk.
"""

import hashlib
import io
import os
import stat
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from depth_anything.data.sample import Frame, decode_image, encode_frame
from depth_anything.data.shards import ShardSet
from depth_anything.data.sources.source import Refused
from depth_anything.data.sources.writing import Record, write_set
from depth_anything.licences import check_licence

MAX_BYTES = 1 << 29  # of one file; a video or an archive among the photographs should not fill the memory
_ORIENTATION = 0x0112
_DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError)  # what reading a broken tar may raise


@dataclass(frozen=True)
class Photograph:
    """A file that may be an image.

    Attributes:
        name: Its path inside its folder or tar, or as the list has it.
        size: Bytes, -1 if unknown.
        read: Returns its bytes; raises ValueError with the reason why it cannot.
    """

    name: str
    size: int
    read: Callable[[], bytes]


def list_photographs(source: str | Path, *, leave_out: str | Path | None = None) -> list[Photograph]:
    """List every file of a folder (recursively), list file (a path a line, relative to it) or tar, by name.

    A compressed tar keeps its own order: it can only be read from the front.

    Args:
        source: The folder, list or tar; a single image counts as a list of one.
        leave_out: A folder inside `source` to pass over: the one that is being written.

    Raises:
        ValueError: If there is nothing at `source`, or it is none of these.
    """
    path = Path(source)
    if path.is_dir():
        found = list(_in_folder(path, Path(leave_out).resolve() if leave_out else None))
    elif not path.is_file():
        raise ValueError(f"{source} does not exist: type the path of a folder, a list of paths, or a tar")
    elif tarfile.is_tarfile(path):
        return _in_tar(path)
    else:
        found = _in_list(path)
    return sorted(found, key=_name)


def iter_images(source: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Decode the photographs of a folder, list file or tar in order; what is no image is passed over.

    Yields:
        The file's name and its image, uint8 (H, W, 3) RGB, upright.

    Raises:
        ValueError: As `list_photographs`.
    """
    for photograph in list_photographs(source):
        try:
            image = decode_image(photograph.read())
        except ValueError:
            continue
        yield photograph.name, image


def write_images(
    source: str | Path,
    root: str | Path,
    *,
    name: str | None = None,
    per_shard: int = 1000,
    short_side: int | None = None,
    licence: str | None = None,
) -> ShardSet:
    """Write photographs as a set of image shards, or return the set if it is there already.

    What is no image, or a broken one, is left out; the manifest counts it by reason and names the first
    hundred, NAME.skipped.json beside each shard names all. May be killed and started again.

    Args:
        source: Folder, list file or tar (see `list_photographs`).
        root: Folder of the set.
        name: Of the set; None: the folder's.
        per_shard: Files a shard.
        short_side: Reduce larger images to this many pixels on the shorter side, as JPEG of quality 95; None
            leaves every image as it is.
        licence: Of the photographs, an SPDX name; kept in the manifest, and may be given later.

    Raises:
        ValueError: If there is nothing at `source`, not one readable image, or `root` holds another set.
    """
    photographs = list_photographs(source, leave_out=root)
    if not photographs:
        raise ValueError(f"{source} holds no files: type the path of a folder, a list of paths, or a tar")
    listing = hashlib.sha256()
    for photograph in photographs:
        listing.update(os.fsencode(photograph.name) + b"\0%d\n" % photograph.size)
    settings = {"source": "images", "files": listing.hexdigest(), "short_side": short_side}

    def record(prefix: str, number: int) -> Record:
        photograph = photographs[number]
        shown = photograph.name.encode("utf-8", "backslashreplace").decode()
        key = f"{prefix}/{number:07d}"
        try:
            return key, _fields(key, shown, photograph.read(), short_side)
        except ValueError as error:
            raise Refused(shown, str(error)) from error

    return write_set(
        root,
        name=name,
        settings=settings,
        meta={"licence": check_licence(licence)} if licence else {},
        count=len(photographs),
        per_shard=per_shard,
        record=record,
    )


def _fields(key: str, name: str, data: bytes, short_side: int | None) -> dict[str, bytes]:
    """Encode one photograph; ValueError if it is none."""
    image = decode_image(data)
    height, width = image.shape[:2]
    meta = {"source": "images", "name": name, "original_size": [height, width]}
    if short_side is not None and min(height, width) > short_side:
        scale = short_side / min(height, width)
        size = (round(width * scale), round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return encode_frame(Frame(key, image, meta), codec="f32", jpeg_quality=95)
    if not _plain(data):
        data = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    return encode_frame(Frame(key, image, meta), codec="f32", original=data)


def _plain(data: bytes) -> bool:
    """Whether every reader shows this file alike: RGB, upright, opaque, of a format that records may hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode_image has looked at the size
        try:
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        except (OSError, Image.DecompressionBombError):
            return False
    still = not getattr(picture, "is_animated", False) or picture.format == "MPO"
    upright = picture.getexif().get(_ORIENTATION, 1) == 1
    return picture.mode == "RGB" and not picture.has_transparency_data and still and upright


# Where photographs lie


def _name(photograph: Photograph) -> bytes:
    return os.fsencode(photograph.name)


def _in_folder(folder: Path, leave_out: Path | None) -> Iterator[Photograph]:
    for here, folders, files in os.walk(folder):
        for name in list(folders):
            path = Path(here, name)
            if path.is_symlink():
                reason = "a link to a folder, which is not followed"
                yield Photograph(path.relative_to(folder).as_posix(), -1, partial(_refuse, reason))
            if leave_out is not None and path.resolve() == leave_out:
                folders.remove(name)
        for name in files:
            path = Path(here, name)
            yield _file(path.relative_to(folder).as_posix(), path)


def _in_list(path: Path) -> list[Photograph]:
    data = path.read_bytes()
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"II*\0", b"MM\0*", b"BM", b"GIF8")):
        return [_file(path.name, path)]
    if b"\0" in data:
        raise ValueError(f"{path} is neither a tar nor a list of paths, one a line")
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).splitlines()
    return [_file(line.strip(), path.parent / line.strip()) for line in lines if line.strip()]


def _in_tar(path: Path) -> list[Photograph]:
    tar = _Tar(path)
    found = []
    try:
        for member in tar.file:
            if not member.isdir():
                found.append(Photograph(member.name, member.size, partial(tar.read, member)))
    except _DAMAGE as error:
        reason = f"the tar is damaged, and nothing after this file can be found: {error}"
        found.append(Photograph(found[-1].name if found else path.name, -1, partial(_refuse, reason)))
    return found if tar.compressed else sorted(found, key=_name)


class _Tar:
    """A tar that stays open for as long as anyone may read from it."""

    def __init__(self, path: Path) -> None:
        try:
            self.file, self.compressed = tarfile.open(path, "r:"), False
        except tarfile.ReadError:
            self.file, self.compressed = tarfile.open(path, "r:*"), True

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Read a file of the tar; ValueError with the reason if it is no plain file, or not whole."""
        if not member.isreg() or member.issparse():
            raise ValueError("not a regular file")
        _check_size(member.size)
        try:
            file = self.file.extractfile(member)
            data = file.read() if file else b""
        except _DAMAGE as error:
            raise ValueError(f"the tar is damaged here: {error}") from error
        if len(data) != member.size:
            raise ValueError("the tar is cut short inside this file")
        return data


def _file(name: str, path: Path) -> Photograph:
    try:
        size = path.stat().st_size
    except OSError:
        size = -1
    return Photograph(name, size, partial(_read_file, path))


def _read_file(path: Path) -> bytes:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a regular file")
        _check_size(about.st_size)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB, which no photograph has")


def _refuse(reason: str) -> bytes:
    raise ValueError(reason)
