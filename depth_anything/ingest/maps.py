"""Maps of depth or disparity as their files hold them: PFM, EXR, NPY, 16-bit PNG, HDF5.

Each reader takes a path or the bytes of a file and returns one channel, (H, W), in the file's own type and by
the file's own values: units, scales and invalid values are the business of whoever knows the set. What is
damaged, cut short, too large or of another kind is a ValueError with the reason in a sentence; the caller knows
the name. Nothing is unpickled, no other file is opened, and nothing is allocated for a size that a header only
claims.
"""

import ast
import io
import itertools
import math
import os
import re
import stat
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depth_anything.ingest.source import is_disk_failure

MAP_SUFFIXES = (".png", ".npy", ".exr", ".pfm", ".h5", ".hdf5")
MAX_FILE_BYTES = 1 << 29  # of a file
MAX_PIXELS = 1 << 26  # as much as a record may hold
_MAX_SIDE = 1 << 15
_MAX_HEADER_BYTES = 10_000  # bytes; a header longer than that says more than a map has to say
_MAX_EXR_BYTES = 1 << 30  # bytes of all channels of an EXR, which the library decodes together
_MAX_CHUNKS = 1 << 16  # of an HDF5 dataset
_CHECKSUM_BYTES = 64  # bytes that a checksum may add to a piece
_GZIP, _LZF = 1, 32000  # HDF5's numbers of these filters
_SIZE_PRESERVING_FILTERS = (2, 3)  # shuffle and fletcher32
_MAX_LZF_RATIO = 88  # the most that lzf can grow: 264 bytes of 3
_MAX_LZF_BYTES = 1 << 30
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class MapError(ValueError):
    """A file that holds no map, or a damaged one; the sentence says why."""


def read_pfm(source: str | Path | bytes) -> np.ndarray:
    """Read a portable float map of one channel.

    Its rows lie bottom-up and are turned; the sign of its scale says the order of bytes, its size is ignored, as
    every writer of depth maps has it.

    Returns:
        float32 (H, W), first row on top.

    Raises:
        NoMap: Not such a file, of three channels, cut short or too large.
    """
    data = read_bytes(source)
    (height, width), scale, start = _pfm_header(data)
    if len(data) - start != height * width * 4:
        held = f"{len(data) - start} bytes follow its header"
        raise MapError(f"the PFM is damaged: {held}, {height * width * 4} are needed for {width} x {height}")
    rows = np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=start).reshape(height, width)
    return np.ascontiguousarray(rows[::-1], np.float32)


def read_exr(source: str | Path | bytes, *, channel: str | None = None) -> np.ndarray:
    """Read one channel of an OpenEXR picture.

    Args:
        source: Path or bytes.
        channel: Its name, as Y, Z, R or ViewLayer.Depth.Z; None: the only one, or where all channels hold the
            same (a grey picture written as RGB) the first. An opaque A does not count.

    Returns:
        float16, float32 or uint32 (H, W).

    Raises:
        NoMap: Not such a file, damaged, too large, deep, its picture is not the whole of its window, or the
            channel is not there; those that are, are named.
    """
    import OpenEXR

    data = read_bytes(source)
    if not data.startswith(b"\x76\x2f\x31\x01"):
        raise MapError("not an OpenEXR file")
    with tempfile.TemporaryDirectory() as folder:  # the library reads paths only
        path = Path(folder, "map.exr")
        path.write_bytes(data)
        try:
            _exr_size(path)
            with OpenEXR.File(str(path), True, False, 0) as file:
                if not file.parts:
                    raise MapError("the EXR is damaged, or cut short")
                found = {name: part.pixels for name, part in file.channels().items()}
        except MapError:
            raise
        except Exception as error:  # the library has a dozen types of its own for what is damaged
            why = str(error).replace(str(path), "it") or type(error).__name__
            raise MapError(f"the EXR cannot be read: {why}") from error
    return _to_2d(_select_channel(found, channel))


def read_npy(source: str | Path | bytes) -> np.ndarray:
    """Read a NumPy array of numbers, (H, W), (H, W, 1) or (1, H, W).

    Returns:
        (H, W) in the array's type, bytes in this machine's order.

    Raises:
        NoMap: Not such a file, cut short, too large, of Python objects (which could run code), or of
            another shape.
    """
    data = read_bytes(source)
    shape, dtype, columns_first, start = _npy_header(data)
    held, needed = len(data) - start, int(np.prod(shape)) * dtype.itemsize
    if held != needed:
        raise MapError(f"the NPY is damaged: {held} bytes follow its header, {needed} are needed")
    values = np.frombuffer(data, dtype, offset=start)
    return _to_2d(values.reshape(shape, order="F" if columns_first else "C"))


def read_png16(source: str | Path | bytes) -> np.ndarray:
    """Read a grey PNG of 16 bits.

    Returns:
        uint16 (H, W).

    Raises:
        NoMap: Not such a file, of 8 bits or of colours, damaged (every checksum is looked at), too large.
    """
    data = read_bytes(source)
    shape = _png_header(data)
    check_png_checksums(data)
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.shape != shape or values.dtype != np.uint16:
        raise MapError("the PNG is damaged: its pixels cannot be decoded")
    return values


def read_hdf5(source: str | Path | bytes, key: str | None = None) -> np.ndarray:
    """Read a dataset of an HDF5 file, (H, W), (H, W, 1) or (1, H, W).

    Args:
        source: Path or bytes.
        key: Its path in the file, as "dataset" or "cameras/depth"; None: the only one at the top.

    Returns:
        (H, W) in the dataset's type, bytes in this machine's order.

    Raises:
        NoMap: Not such a file, damaged, too large, the key is not there (those that are, are named), or the
            numbers lie in another file.
    """
    import h5py

    data = read_bytes(source)
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            dataset = find_hdf5_dataset(file, key)
            _check_dataset(dataset)
            check_hdf5_cost(dataset)
            return _to_2d(dataset[()])
    except MapError:
        raise
    except Exception as error:  # damage makes the library raise a dozen types
        why = error.args[0] if error.args else type(error).__name__  # str() of a KeyError has quotes
        raise MapError(f"the HDF5 file cannot be read: {why}") from error


def read_map(path: Path, *, key: str | None = None, channel: str | None = None) -> np.ndarray:
    """Read a file by its ending, one of `ENDINGS`; `key` is for HDF5, `channel` for EXR. As the reader it calls."""
    match path.suffix.lower():
        case ".pfm":
            return read_pfm(path)
        case ".npy":
            return read_npy(path)
        case ".png":
            return read_png16(path)
        case ".exr":
            return read_exr(path, channel=channel)
    return read_hdf5(path, key)


def read_map_size(path: Path, *, key: str | None = None) -> tuple[int, int]:
    """Return height and width of a file of one of `ENDINGS` by its header alone; as `read_map` raises."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_HEADER_BYTES + 16)
        match path.suffix.lower():
            case ".pfm":
                return _pfm_header(data)[0]
            case ".npy":
                return _height_width(_npy_header(data)[0])
            case ".png":
                return _png_header(data)
            case ".exr":
                return _exr_size(path)
        import h5py

        with h5py.File(path, "r", locking=False) as file:
            dataset = find_hdf5_dataset(file, key)
            _check_dataset(dataset)
            return _height_width(dataset.shape)
    except MapError:
        raise
    except Exception as error:
        if is_disk_failure(error):
            raise
        raise MapError(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_bytes(source: str | Path | bytes) -> bytes:
    """Read a file whole.

    Raises:
        ValueError: If it is not there, no plain file, or larger than any map or photograph.
        OSError: If its disk fails.
    """
    if isinstance(source, bytes):
        return source
    try:
        about = os.stat(source)
        if not stat.S_ISREG(about.st_mode):
            raise MapError("not a regular file")
        if about.st_size > MAX_FILE_BYTES:
            raise MapError(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
        return Path(source).read_bytes()
    except OSError as error:
        if is_disk_failure(error):
            raise
        raise MapError(error.strerror or type(error).__name__) from error


def _check_shape(shape: Sequence[Any]) -> None:
    """Refuse what is no map, or larger than a record may be; before anything of that size is made."""
    whole = all(type(side) is int and 1 <= side <= _MAX_SIDE for side in shape)
    sides = [side for side in shape if side != 1] if len(shape) == 3 else shape
    if not whole or len(shape) not in (2, 3) or len(sides) > 2 or (len(shape) == 3 and shape[1] == 1):
        raise MapError(
            f"its shape is {_format_shape(shape)}: a map is (H, W), (H, W, 1) or (1, H, W), up to 32768 a side"
        )
    if np.prod(shape, dtype=float) > MAX_PIXELS:
        raise MapError(f"its {_format_shape(shape)} pixels are more than the limit of 2^26")


def _format_shape(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape[:6]))}{', …' if len(shape) > 6 else ''})"


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise MapError(f"it holds values of type {dtype}: a map holds integers or floats")


def _to_2d(values: np.ndarray) -> np.ndarray:
    _check_shape(values.shape)
    return np.ascontiguousarray(values.reshape(_height_width(values.shape)), values.dtype.newbyteorder("="))


def _height_width(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of a map's shape, whose third side, first or last, is 1."""
    height, width = shape if len(shape) == 2 else shape[:2] if shape[2] == 1 else shape[1:]
    return int(height), int(width)


def _pfm_header(data: bytes) -> tuple[tuple[int, int], float, int]:
    """Height and width, the scale, and where the data begins: one white byte after the fourth word."""
    words: list[bytes] = []
    place = 0
    while len(words) < 4 and place < min(len(data), 200):
        end = place
        while end < len(data) and end - place < 40 and not data[end : end + 1].isspace():
            end += 1
        if end > place:
            words.append(data[place:end])
        place = end + 1
    if words[:1] == [b"PF"]:
        raise MapError("a PFM of three channels (PF): a map has one (Pf)")
    if words[:1] != [b"Pf"]:
        raise MapError("not a PFM: it does not begin with Pf")
    try:
        width, height, scale = int(words[1]), int(words[2]), float(words[3])
    except (ValueError, IndexError):
        raise MapError("the PFM's header has no width, height and scale") from None
    if scale == 0 or scale != scale:
        raise MapError("the PFM's scale is zero or no number, so that the order of its bytes is not known")
    _check_shape((height, width))
    return (height, width), scale, place


def _npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, type, whether columns come first, and where the data begins."""
    if not data.startswith(b"\x93NUMPY") or len(data) < 12:
        raise MapError("not an NPY file: it does not begin with its mark")
    long = data[6] >= 2
    start, size = (
        (12, int.from_bytes(data[8:12], "little")) if long else (10, int.from_bytes(data[8:10], "little"))
    )
    try:
        header = ast.literal_eval(data[start : start + min(size, _MAX_HEADER_BYTES)].decode("latin1"))
        shape, kind, columns_first = tuple(header["shape"]), header["descr"], bool(header["fortran_order"])
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError):
        raise MapError("the NPY's header is damaged, or says more than the shape of a map") from None
    if kind == "|O":
        raise MapError("the NPY holds Python objects, which are not read: save numbers")
    if not isinstance(kind, str) or not re.fullmatch("[<>|=][fiu][1248]", kind) or kind[1:] == "f1":
        raise MapError(f"the NPY holds values of type {str(kind)[:40]}: a map holds integers or floats")
    _check_shape(shape)
    return shape, np.dtype(kind), columns_first, start + size


def read_exr_strings(path: Path) -> dict[str, str]:
    """Return the attributes of an EXR's header that are texts, as `quantity`.

    Raises:
        NoMap: It is none, or damaged.
    """
    try:
        (header,) = _exr_headers(path)
    except Exception as error:  # the library has a dozen types of its own for what is damaged
        raise MapError("the EXR's header cannot be read") from error
    return {name: value for name, value in header.items() if isinstance(value, str)}


def _exr_headers(path: Path) -> list[dict[str, Any]]:
    import OpenEXR

    with OpenEXR.File(str(path), True, True, 0) as file:  # separate channels, header only, no threads
        return [dict(part.header) for part in file.parts]


def _exr_size(path: Path) -> tuple[int, int]:
    """Height and width of an EXR of one plain picture."""
    headers = _exr_headers(path)
    if len(headers) != 1:
        raise MapError(f"the EXR has {len(headers)} parts: a map has one")
    header = headers[0]
    low, high = (np.asarray(corner, np.int64) for corner in header["dataWindow"])
    width, height = (high - low + 1).tolist()
    _check_shape((height, width))
    count = len(header["channels"])
    if count * height * width * 4 > _MAX_EXR_BYTES:  # of float32; half as many of float16
        raise MapError(
            f"the EXR has {count} channels of {width} x {height} pixels, over {_MAX_EXR_BYTES >> 30} GiB in all: "
            "write the map to a file of its own"
        )
    if "deep" in str(header["type"]).lower():
        raise MapError("the EXR is deep: a map has one value a pixel")
    window = [np.asarray(corner, np.int64).tolist() for corner in header["displayWindow"]]
    if window != [low.tolist(), high.tolist()]:
        raise MapError(
            f"the EXR holds the pixels {low.tolist()} to {high.tolist()} of a picture from {window[0]} "
            f"to {window[1]}: write the whole picture"
        )
    return height, width


def _select_channel(found: dict[str, np.ndarray], channel: str | None) -> np.ndarray:
    names = ", ".join(sorted(found)[:20])
    if channel is not None:
        if channel not in found:
            raise MapError(f'the EXR has no channel "{channel}", but {names}')
        return found[channel]
    values = [found[name] for name in sorted(found) if name != "A"] or list(found.values())
    if not values:
        raise MapError("the EXR has no channel")
    if any(not np.array_equal(values[0], other, equal_nan=True) for other in values[1:]):
        raise MapError(f"the EXR has several channels ({names}): say which is the map")
    return values[0]


def _png_header(data: bytes) -> tuple[int, int]:
    """Height and width of a grey PNG of 16 bits."""
    if not data.startswith(_PNG_SIGNATURE):
        raise MapError("not a PNG file")
    if len(data) < 33 or data[8:16] != b"\0\0\0\x0dIHDR":
        raise MapError("the PNG is damaged: it does not begin with its header")
    width, height, bits, colours = struct.unpack_from(">IIBB", data, 16)
    if (bits, colours) != (16, 0):
        kind = {0: "grey", 2: "RGB", 3: "of a palette", 4: "grey and alpha", 6: "RGBA"}.get(colours, "?")
        raise MapError(f"the PNG is {kind} of {bits} bits: a map is grey of 16 bits")
    _check_shape((height, width))
    return height, width


def check_png_checksums(data: bytes) -> None:
    """See that every chunk's checksum holds and that the end is there, which decoders do not; else NoMap."""
    view, place, kind = memoryview(data), len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, place) if place + 12 <= len(data) else (len(data), b"")
        end = place + 8 + size
        if end + 4 > len(data):
            raise MapError("the PNG is cut short")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise MapError("the PNG is damaged: a checksum differs")
        place = end + 4


def find_hdf5_dataset(file: Any, key: str | None) -> Any:
    """Return a dataset of an open HDF5 file; links are not followed, as they could lead into another file.

    Args:
        file: Of h5py.
        key: Its path in the file; None: the only one at the top.

    Raises:
        NoMap: It is not there.
    """
    import h5py

    if key is None:
        names = [name for name in file if _is_hard_link(file, name) and isinstance(file[name], h5py.Dataset)]
        if len(names) != 1:
            raise MapError(f"the HDF5 file has {_format_names(file)} at its top: say the key of the map")
        key = names[0]
    here = file
    for part in [part for part in key.split("/") if part]:
        if not isinstance(here, h5py.Group) or not _is_hard_link(here, part):
            raise MapError(f'the HDF5 file has no dataset "{key}", but {_format_names(here)}')
        here = here[part]
    if not isinstance(here, h5py.Dataset):
        raise MapError(f'"{key}" of the HDF5 file is no dataset; it holds {_format_names(here)}')
    return here


def _check_dataset(dataset: Any) -> None:
    _check_shape(dataset.shape)
    _check_dtype(dataset.dtype)
    if dataset.is_virtual or dataset.external:
        raise MapError(f'the numbers of "{dataset.name}" lie in another file, which is not opened')
    if dataset.chunks is not None and np.prod(dataset.chunks, dtype=float) > MAX_PIXELS:
        raise MapError(f'"{dataset.name}" is stored in pieces of {dataset.chunks}, which is too large')


def check_hdf5_cost(dataset: Any, number: int | None = None) -> None:
    """Refuse a dataset of an HDF5 file that could fill the memory; the library unpacks whole pieces.

    Args:
        dataset: A map, or an image of three channels.
        number: Only `dataset[number]` will be read; None: all.

    Raises:
        NoMap: It is too large, its numbers lie in another file, or a compressed piece of it holds more than its size.
    """
    name, pieces = f'"{dataset.name}"', dataset.chunks
    shape = dataset.shape if number is None else dataset.shape[1:]
    if np.prod(shape, dtype=float) > 3 * MAX_PIXELS:
        raise MapError(f"{name} has the shape {_format_shape(shape)}, which is too large")
    if dataset.is_virtual or dataset.external:
        raise MapError(f"the numbers of {name} lie in another file, which is not opened")
    if pieces is None:
        return
    if np.prod(pieces, dtype=float) > 3 * MAX_PIXELS:
        raise MapError(f"{name} is stored in pieces of {_format_shape(pieces)}, which is too large")
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(place)[0] for place in range(settings.get_nfilters())]
    packing = [place for place, kind in enumerate(filters) if kind in (_GZIP, _LZF)]
    if len(packing) > 1 or not {_GZIP, _LZF, *_SIZE_PRESERVING_FILTERS}.issuperset(filters):
        raise MapError(f"{name} is packed in a way that is not read: write it with gzip, lzf or neither")
    size = int(np.prod(pieces)) * dataset.dtype.itemsize + _CHECKSUM_BYTES
    for offset in _chunk_offsets(dataset, number) if packing else ():
        skipped, packed = dataset.id.read_direct_chunk(offset)
        if skipped >> packing[0] & 1:
            continue
        if filters[packing[0]] == _LZF:
            if len(packed) > size or len(packed) * _MAX_LZF_RATIO > _MAX_LZF_BYTES:
                raise MapError(f"{name} has a piece of {len(packed)} bytes of lzf: write it in smaller ones")
        elif len(zlib.decompressobj().decompress(packed, size)) == size:
            raise MapError(f"{name} is damaged: a piece of it holds more than its size")


def _chunk_offsets(dataset: Any, number: int | None) -> list[tuple[int, ...]]:
    """Where the pieces begin that are there."""
    held = dataset.id
    if number is None:
        if held.get_num_chunks() > _MAX_CHUNKS:
            raise MapError(f'"{dataset.name}" is stored in more than {_MAX_CHUNKS} pieces')
        return [held.get_chunk_info(place).chunk_offset for place in range(held.get_num_chunks())]
    steps = [range(0, side, step) for side, step in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)]
    if math.prod(map(len, steps)) > _MAX_CHUNKS:
        raise MapError(f'a part of "{dataset.name}" is stored in more than {_MAX_CHUNKS} pieces')
    first = number // dataset.chunks[0] * dataset.chunks[0]
    infos = [held.get_chunk_info_by_coord((first, *rest)) for rest in itertools.product(*steps)]
    return [info.chunk_offset for info in infos if info.byte_offset is not None]


def _is_hard_link(group: Any, name: str) -> bool:
    """Whether a name is no link, which could lead into another file."""
    import h5py

    return name in group and isinstance(group.get(name, getlink=True), h5py.HardLink)


def _format_names(group: Any) -> str:
    return ", ".join(list(group)[:20]) if hasattr(group, "keys") and len(group) else "nothing"
