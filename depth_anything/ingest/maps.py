"""Read maps of depth or disparity from files: PFM, EXR, NPY, 16-bit PNG, HDF5.

Each reader takes a path or the bytes of a file and returns one channel, (H, W), with the type and the values of the
file. Units, scales and invalid values are left to the caller. A file that is damaged, too large or of another kind
raises `MapError`. Nothing is unpickled, no other file is opened, and no memory is allocated for a size that a header
only claims.
"""

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
from PIL import PngImagePlugin

from depth_anything.ingest.source import is_disk_failure

MAP_SUFFIXES = (".png", ".npy", ".exr", ".pfm", ".h5", ".hdf5")
MAX_FILE_BYTES = 1 << 29
MAX_PIXELS = 1 << 26
"""Size limit of a map, the same as that of a record."""

_MAX_SIDE = 1 << 15
_MAX_HEADER_BYTES = 10_000
_MAX_EXR_BYTES = 1 << 30  # of all channels of an EXR, which the library decodes together
_MAX_CHUNKS = 1 << 16  # of an HDF5 dataset
_CHECKSUM_BYTES = 64  # upper bound of what a checksum adds to an HDF5 chunk
_GZIP, _LZF = 1, 32000  # numbers of HDF5 filters
_SIZE_PRESERVING_FILTERS = (2, 3)  # shuffle and fletcher32
_MAX_LZF_RATIO = 88  # LZF expands 3 bytes to at most 264
_MAX_LZF_BYTES = 1 << 30
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXR_SIGNATURE = b"\x76\x2f\x31\x01"


class MapError(ValueError):
    """A file that holds no map, or a damaged one."""


class EightBitError(MapError):
    """A PNG of 8 bits, whose 256 steps are too few for a map."""


def read_pfm(source: str | Path | bytes) -> np.ndarray:
    """Read a portable float map of one channel.

    The sign of the scale gives the byte order. Its size is ignored, because writers of depth maps do not use it.

    Returns:
        float32 (H, W), first row on top.

    Raises:
        MapError: Another kind of file, three channels, damaged or too large.
    """
    data = read_bytes(source)
    (height, width), scale, start = _parse_pfm_header(data)
    if len(data) - start != height * width * 4:
        raise MapError(
            f"the PFM is damaged: {len(data) - start} bytes follow its header, "
            f"{height * width * 4} are needed for {width} x {height}"
        )
    rows = np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=start).reshape(height, width)
    return np.ascontiguousarray(rows[::-1], np.float32)  # a PFM stores the bottom row first


def read_exr(source: str | Path | bytes, *, channel: str | None = None) -> np.ndarray:
    """Read one channel of an OpenEXR image.

    Args:
        source: Path or bytes.
        channel: Name of the channel, such as Y, Z, R or ViewLayer.Depth.Z. None reads the only channel, or the first
            of several equal ones (a gray image stored as RGB). Alpha is ignored.

    Returns:
        float16, float32 or uint32 (H, W).

    Raises:
        MapError: Another kind of file, damaged, too large, deep, a crop of its display window, or without the channel.
    """
    import OpenEXR

    data = read_bytes(source)
    if not data.startswith(_EXR_SIGNATURE):
        raise MapError("not an OpenEXR file")
    with tempfile.TemporaryDirectory() as folder:  # the library reads only from a path
        path = Path(folder, "map.exr")
        path.write_bytes(data)
        try:
            _read_exr_size(path)
            with OpenEXR.File(str(path), True, False, 0) as file:
                if not file.parts:
                    raise MapError("the EXR is damaged or truncated")
                channels = {name: part.pixels for name, part in file.channels().items()}
        except MapError:
            raise
        except Exception as error:  # the library has a dozen exception types for damaged files
            reason = str(error).replace(str(path), "it") or type(error).__name__
            raise MapError(f"the EXR cannot be read: {reason}") from error
    return _to_2d(_select_channel(channels, channel))


def read_npy(source: str | Path | bytes) -> np.ndarray:
    """Read a NumPy array of numbers, (H, W), (H, W, 1) or (1, H, W).

    Returns:
        (H, W) with the type of the array, in native byte order.

    Raises:
        MapError: Another kind of file, truncated, too large, of another shape, or of Python objects, whose unpickling
            could run code.
    """
    data = read_bytes(source)
    shape, dtype, columns_first, start = _parse_npy_header(data)
    held, needed = len(data) - start, int(np.prod(shape)) * dtype.itemsize
    if held != needed:
        raise MapError(f"the NPY is damaged: {held} bytes follow its header, {needed} are needed")
    values = np.frombuffer(data, dtype, offset=start)
    return _to_2d(values.reshape(shape, order="F" if columns_first else "C"))


def read_png16(source: str | Path | bytes) -> np.ndarray:
    """Read a gray 16-bit PNG.

    Returns:
        uint16 (H, W).

    Raises:
        MapError: Another kind of file, 8 bits, color, damaged (checksums are verified) or too large.
    """
    data = read_bytes(source)
    shape = _parse_png_header(data)
    check_png_checksums(data)
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.shape != shape or values.dtype != np.uint16:
        raise MapError("the PNG is damaged: its pixels cannot be decoded")
    return values


def read_hdf5(source: str | Path | bytes, key: str | None = None) -> np.ndarray:
    """Read a dataset of an HDF5 file, (H, W), (H, W, 1) or (1, H, W).

    Args:
        source: Path or bytes.
        key: Path of the dataset in the file, such as "dataset" or "cameras/depth". None: the only one at the top.

    Returns:
        (H, W) with the type of the dataset, in native byte order.

    Raises:
        MapError: Another kind of file, damaged, too large, without the key, or with values in another file.
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
    except Exception as error:  # the library raises a dozen types for damaged files
        reason = error.args[0] if error.args else type(error).__name__  # str() of a KeyError adds quotes
        raise MapError(f"the HDF5 file cannot be read: {reason}") from error


def read_map(path: Path, *, key: str | None = None, channel: str | None = None) -> np.ndarray:
    """Read a map with the reader for its suffix, one of `MAP_SUFFIXES`; `key` is for HDF5, `channel` for EXR."""
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
    """Return the height and width of a map from its header. Raises MapError, or OSError if the disk fails."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_HEADER_BYTES + 16)
        match path.suffix.lower():
            case ".pfm":
                return _parse_pfm_header(data)[0]
            case ".npy":
                return _height_width(_parse_npy_header(data)[0])
            case ".png":
                return _parse_png_header(data)
            case ".exr":
                return _read_exr_size(path)
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
    """Read a file; bytes are returned as they are.

    Raises:
        MapError: The file does not exist, is not a regular file, or is larger than `MAX_FILE_BYTES`.
        OSError: The disk fails.
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
    """Raise MapError if a shape is not that of a map, or too large, before memory is allocated for it."""
    valid_sides = all(type(side) is int and 1 <= side <= _MAX_SIDE for side in shape)
    sides = [side for side in shape if side != 1] if len(shape) == 3 else shape
    if not valid_sides or len(shape) not in (2, 3) or len(sides) > 2 or (len(shape) == 3 and shape[1] == 1):
        raise MapError(
            f"its shape is {_format_shape(shape)}: a map is (H, W), (H, W, 1) or (1, H, W), "
            f"at most {_MAX_SIDE} per side"
        )
    if np.prod(shape, dtype=float) > MAX_PIXELS:
        raise MapError(f"its {_format_shape(shape)} pixels exceed the limit of {MAX_PIXELS}")


def _format_shape(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape[:6]))}{', …' if len(shape) > 6 else ''})"


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise MapError(f"it holds values of type {dtype.str[:40]}: a map holds integers or floats")


def _to_2d(values: np.ndarray) -> np.ndarray:
    _check_shape(values.shape)
    return np.ascontiguousarray(values.reshape(_height_width(values.shape)), values.dtype.newbyteorder("="))


def _height_width(shape: Sequence[int]) -> tuple[int, int]:
    """Return the height and width of a map's shape, without a first or last side of 1."""
    height, width = shape if len(shape) == 2 else shape[:2] if shape[2] == 1 else shape[1:]
    return int(height), int(width)


def _parse_pfm_header(data: bytes) -> tuple[tuple[int, int], float, int]:
    """Return height and width, the scale, and the offset of the pixels, one white space after the fourth word."""
    match = re.match(rb"\s*(P[fF])\s+(\S{1,40})\s+(\S{1,40})\s+(\S{1,40})\s", data[:200])
    kind = data[:200].split()[:1]
    if kind == [b"PF"]:
        raise MapError("a PFM of three channels (PF): a map has one (Pf)")
    if kind != [b"Pf"]:
        raise MapError("not a PFM: it does not begin with Pf")
    try:
        if match is None:
            raise ValueError
        width, height, scale = int(match[2]), int(match[3]), float(match[4])
    except ValueError:
        raise MapError("the header of the PFM has no width, height and scale") from None
    if scale == 0 or math.isnan(scale):
        raise MapError(f"the scale of the PFM is {scale:g}, so its byte order is unknown")
    _check_shape((height, width))
    return (height, width), scale, match.end()


def _parse_npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Return shape, type, whether the order is Fortran's, and the offset of the values."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError:
        raise MapError("not an NPY file: it does not begin with \\x93NUMPY") from None
    read_header = (
        np.lib.format.read_array_header_1_0 if version < (2, 0) else np.lib.format.read_array_header_2_0
    )
    try:
        shape, columns_first, dtype = read_header(stream, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # hostile headers raise several types
        raise MapError("the header of the NPY is damaged or too long") from error
    if dtype.hasobject:
        raise MapError("the NPY holds Python objects, which are not read: save numbers")
    _check_dtype(dtype)
    _check_shape(shape)
    return shape, dtype, columns_first, stream.tell()


def read_exr_strings(path: Path) -> dict[str, str]:
    """Return the text attributes of an EXR's header, such as `quantity`. Raises MapError for other files."""
    try:
        (header,) = _read_exr_headers(path)
    except Exception as error:  # the library has a dozen exception types for damaged files
        raise MapError("the header of the EXR cannot be read") from error
    return {name: value for name, value in header.items() if isinstance(value, str)}


def _read_exr_headers(path: Path) -> list[dict[str, Any]]:
    import OpenEXR

    with OpenEXR.File(str(path), True, True, 0) as file:  # separate channels, header only, no threads
        return [dict(part.header) for part in file.parts]


def _read_exr_size(path: Path) -> tuple[int, int]:
    """Return the height and width of an EXR that is one plain image."""
    headers = _read_exr_headers(path)
    if len(headers) != 1:
        raise MapError(f"the EXR has {len(headers)} parts: a map has one")
    header = headers[0]
    low, high = (np.asarray(corner, np.int64) for corner in header["dataWindow"])
    width, height = (high - low + 1).tolist()
    _check_shape((height, width))
    count = len(header["channels"])
    if count * height * width * 4 > _MAX_EXR_BYTES:  # as float32; half of it as float16
        raise MapError(
            f"the EXR has {count} channels of {width} x {height} pixels, more than {_MAX_EXR_BYTES >> 30} GiB in all: "
            "write the map to a file of its own"
        )
    if "deep" in str(header["type"]).lower():
        raise MapError("the EXR is deep: a map has one value per pixel")
    window = [np.asarray(corner, np.int64).tolist() for corner in header["displayWindow"]]
    if window != [low.tolist(), high.tolist()]:
        raise MapError(
            f"the EXR holds the pixels {low.tolist()} to {high.tolist()} of an image from {window[0]} "
            f"to {window[1]}: write the whole image"
        )
    return height, width


def _select_channel(channels: dict[str, np.ndarray], channel: str | None) -> np.ndarray:
    names = ", ".join(sorted(channels)[:20])
    if channel is not None:
        if channel not in channels:
            raise MapError(f'the EXR has no channel "{channel}", but {names}')
        return channels[channel]
    values = [channels[name] for name in sorted(channels) if name != "A"] or list(channels.values())
    if not values:
        raise MapError("the EXR has no channel")
    if any(not np.array_equal(values[0], other, equal_nan=True) for other in values[1:]):
        raise MapError(f"the EXR has several channels ({names}): name the channel of the map")
    return values[0]


def png_bit_depth(data: bytes) -> int:
    """Return the bits per channel of a PNG, according to its header."""
    return data[24] if len(data) > 24 else 0


def _parse_png_header(data: bytes) -> tuple[int, int]:
    """Return the height and width of a gray 16-bit PNG."""
    if not data.startswith(_PNG_SIGNATURE):
        raise MapError("not a PNG file")
    if len(data) < 33 or data[8:16] != b"\0\0\0\x0dIHDR":
        raise MapError("the PNG is damaged: it does not begin with IHDR")
    width, height, bits, color_type = struct.unpack_from(">IIBB", data, 16)
    if (bits, color_type) != (16, 0):
        kind = {0: "gray", 2: "RGB", 3: "palette", 4: "gray and alpha", 6: "RGBA"}.get(color_type, "unknown")
        error = EightBitError if bits == 8 else MapError
        raise error(f"the PNG is {kind} with {bits} bits: a map is gray with 16 bits")
    _check_shape((height, width))
    return height, width


def check_png_checksums(data: bytes) -> None:
    """Raise MapError if a PNG is truncated or a checksum of its chunks differs; decoders do not check this."""
    try:
        PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()
    except Exception as error:  # Pillow raises several types for damaged files
        raise MapError(f"the PNG is damaged: {error or type(error).__name__}") from error


def find_hdf5_dataset(file: Any, key: str | None) -> Any:
    """Return a dataset of an open HDF5 file. Links are not followed, because they could lead to another file.

    Args:
        file: An h5py.File.
        key: Path of the dataset in the file. None: the only one at the top.

    Raises:
        MapError: There is no such dataset.
    """
    import h5py

    if key is None:
        names = [name for name in file if _is_hard_link(file, name) and isinstance(file[name], h5py.Dataset)]
        if len(names) != 1:
            raise MapError(f"the HDF5 file has {_format_names(file)} at its top: name the key of the map")
        key = names[0]
    node = file
    for part in [part for part in key.split("/") if part]:
        if not isinstance(node, h5py.Group) or not _is_hard_link(node, part):
            raise MapError(f'the HDF5 file has no dataset "{key}", but {_format_names(node)}')
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise MapError(f'"{key}" in the HDF5 file is a group, not a dataset; it holds {_format_names(node)}')
    return node


def _check_dataset(dataset: Any) -> None:
    _check_shape(dataset.shape)
    _check_dtype(dataset.dtype)
    _check_storage(dataset, MAX_PIXELS)


def _check_storage(dataset: Any, max_values: int) -> None:
    if dataset.is_virtual or dataset.external:
        raise MapError(f'the values of "{dataset.name}" are in another file, which is not opened')
    if dataset.chunks is not None and np.prod(dataset.chunks, dtype=float) > max_values:
        raise MapError(f'"{dataset.name}" has chunks of {_format_shape(dataset.chunks)}, which is too large')


def check_hdf5_cost(dataset: Any, number: int | None = None) -> None:
    """Raise MapError for an HDF5 dataset that could fill the memory, because the library decompresses whole chunks.

    Args:
        dataset: A map, or an image of three channels.
        number: Only `dataset[number]` will be read. None: all of it.
    """
    name, chunks = f'"{dataset.name}"', dataset.chunks
    shape = dataset.shape if number is None else dataset.shape[1:]
    if np.prod(shape, dtype=float) > 3 * MAX_PIXELS:
        raise MapError(f"{name} has the shape {_format_shape(shape)}, which is too large")
    _check_storage(dataset, 3 * MAX_PIXELS)
    if chunks is None:
        return
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(place)[0] for place in range(settings.get_nfilters())]
    compression = [place for place, kind in enumerate(filters) if kind in (_GZIP, _LZF)]
    if len(compression) > 1 or not {_GZIP, _LZF, *_SIZE_PRESERVING_FILTERS}.issuperset(filters):
        raise MapError(
            f"{name} uses HDF5 filters {filters}, which are not read: write it with gzip, lzf or none"
        )
    size = int(np.prod(chunks)) * dataset.dtype.itemsize + _CHECKSUM_BYTES
    for offset in _chunk_offsets(dataset, number) if compression else ():
        skipped_filters, packed = dataset.id.read_direct_chunk(offset)
        if skipped_filters >> compression[0] & 1:
            continue
        if filters[compression[0]] == _LZF:
            if len(packed) > size or len(packed) * _MAX_LZF_RATIO > _MAX_LZF_BYTES:
                raise MapError(f"{name} has an lzf chunk of {len(packed)} bytes: write it in smaller chunks")
        elif len(zlib.decompressobj().decompress(packed, size)) == size:
            raise MapError(
                f"{name} is damaged: a chunk holds more than its size of {size - _CHECKSUM_BYTES} bytes"
            )


def _chunk_offsets(dataset: Any, number: int | None) -> list[tuple[int, ...]]:
    """Return the offsets of the chunks that are stored, of `dataset[number]` or of the whole dataset."""
    stored = dataset.id
    if number is None:
        if stored.get_num_chunks() > _MAX_CHUNKS:
            raise MapError(f'"{dataset.name}" has more than {_MAX_CHUNKS} chunks')
        return [stored.get_chunk_info(place).chunk_offset for place in range(stored.get_num_chunks())]
    steps = [range(0, side, step) for side, step in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)]
    if math.prod(map(len, steps)) > _MAX_CHUNKS:
        raise MapError(f'"{dataset.name}"[{number}] has more than {_MAX_CHUNKS} chunks')
    first = number // dataset.chunks[0] * dataset.chunks[0]
    infos = [stored.get_chunk_info_by_coord((first, *rest)) for rest in itertools.product(*steps)]
    return [info.chunk_offset for info in infos if info.byte_offset is not None]


def _is_hard_link(group: Any, name: str) -> bool:
    """Return whether a member of a group is stored in this file; other links could lead to another file."""
    import h5py

    return name in group and isinstance(group.get(name, getlink=True), h5py.HardLink)


def _format_names(group: Any) -> str:
    return ", ".join(list(group)[:20]) if hasattr(group, "keys") and len(group) else "nothing"
