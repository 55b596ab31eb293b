"""The file format of a depth or disparity map.

`q12` stores 12 bits between the smallest and the largest value of the map: enough for the output of a network, whose
lower bits are noise, at a third of the size of a 16-bit PNG. `f32` stores every bit, for measured depth. `u8` stores
a confidence in [0, 1] in 8 bits, not a depth or disparity. All store the difference of each value to the one above it,
low bytes separate from high bytes, compressed by Zstandard: the smallest of the layouts that a few NumPy passes can
decode (benchmarks/bench_codec.py compares them).

A file starts with a header of 28 bytes, little-endian: magic `DAM1`; crc32 of everything after it; kind (0 f32, 1 q12,
2 u8); flags (which of NaN, +inf, -inf occur: bits 0, 1, 2); steps; height; width; low; high. One Zstandard frame
follows: the byte planes, lowest first, and one packed bit mask per flag. A q12 or u8 value is
low + q * ((high - low) / steps), computed in float64 and rounded once to float32, so that it decodes to the same bits
on every machine.
"""

import math
import struct
import threading
import zlib

import numpy as np
import zstandard

CODECS = ("q12", "f32")
CONFIDENCE_CODEC = "u8"
_HEADER = struct.Struct("<4sIBBHIIff")
_CRC_START = 8  # the crc covers all bytes from here on
_MAGIC = b"DAM1"
_F32, _Q12, _U8 = 0, 1, 2
_U8_STEPS = 255
_SPECIAL_VALUES = (np.nan, np.inf, -np.inf)
_DTYPES: dict[int, np.dtype] = {_F32: np.dtype("<u4"), _Q12: np.dtype("<u2"), _U8: np.dtype("u1")}
# Added to each difference, so that small negative ones leave the high byte 0, and that plane compresses to nothing.
_BIAS = {_F32: 0, _Q12: 128, _U8: 0}
# In exact arithmetic 4095 steps give an error of 1/8190 of the range. Rounding to float32 adds a little, and much for a
# map whose range is small against its values. The first number that keeps the error is used, otherwise f32.
_Q12_STEPS = (4160, 65535)
_Q12_MAX_ERROR = 1 / 8190
_MAX_SIDE = 1 << 15
_MAX_PIXELS = 1 << 26
_ZSTD_BLOCK = 1 << 17  # a zstandard block holds at most this much, and takes at least four bytes
_SUM_BLOCK_ROWS = 16
_DEQUANTIZE_ROWS = 128
_thread_local = threading.local()


def encode(values: np.ndarray, *, codec: str) -> bytes:
    """Encode a map.

    Args:
        values: (H, W) of any float type, converted to float32; NaN (unknown) and infinities are kept exactly.
        codec: "q12" (error ≤ 1/8190 of the range of the finite values, both ends exact), "f32" (lossless), or for
            values in [0, 1] "u8" (error ≤ 1/510, both ends exact).

    Raises:
        ValueError: It is not a map of at most 2^26 pixels, the codec is unknown, or a value is not in [0, 1] for "u8".
    """
    values = np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or not _is_allowed_size(*values.shape):
        raise ValueError(
            f"cannot encode an array of shape {values.shape}: the shape must be (H, W), up to 2^26 pixels"
        )
    if codec == CONFIDENCE_CODEC:
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError('codec "u8" stores values from 0 to 1 only')
        return _pack(_quantize(values, 0.0, 1.0, _U8_STEPS), kind=_U8, steps=_U8_STEPS, low=0.0, high=1.0)
    if codec not in CODECS:
        raise ValueError(f'codec "{codec}" is unknown: use {" or ".join(CODECS)}')
    finite = np.isfinite(values)
    known = values[finite]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    if codec == "f32":
        return _pack(values.view(np.uint32), kind=_F32, low=low, high=high)
    clean = values if known.size == values.size else np.where(finite, values, np.float32(low))
    for steps in _Q12_STEPS:
        levels = _quantize(clean, low, high, steps)
        restored = _dequantize(levels, low, high, steps)
        error = np.abs(restored.astype(np.float64) - clean).max()
        if error <= (high - low) * _Q12_MAX_ERROR and restored.max() == high:
            masks = [values != values, values == np.inf, values == -np.inf]
            return _pack(levels, kind=_Q12, steps=steps, low=low, high=high, masks=masks)
    return _pack(values.view(np.uint32), kind=_F32, low=low, high=high)


def map_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) of an encoded map from its header.

    Raises:
        ValueError: The header is invalid.
    """
    return _read_header(data)[4:6]


def decode(data: bytes, *, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
    """Decode an encoded map, or a part of it, to float32 (H, W).

    Args:
        data: The whole file; its checksum is always verified.
        rows: Rows of the part; a step is not supported.
        columns: Columns of the part.

    Raises:
        ValueError: The bytes are damaged, truncated, or not of this format. A size that the bytes cannot contain is
            found before memory is allocated.
    """
    crc, kind, flags, steps, height, width, low, high = _read_header(data)
    if zlib.crc32(memoryview(data)[_CRC_START:]) != crc:
        raise ValueError("the encoded map is damaged: its checksum differs")
    if kind not in _DTYPES or flags > 7:
        raise ValueError(f"the encoded map has an impossible header: kind {kind}, {height}x{width}")
    if kind != _F32 and not (steps and low <= high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"the encoded map has an impossible header: {steps} steps from {low} to {high}")
    pixels, mask_bytes = height * width, -(-height * width // 8)
    length = pixels * _DTYPES[kind].itemsize + mask_bytes * flags.bit_count()
    body = _decompress(memoryview(data)[_HEADER.size :], length)
    bits = _unpack(body, height, width, kind, rows, columns)
    if kind == _F32:
        return bits.view(np.float32)
    values = _dequantize(bits, low, high, steps)
    start = pixels * 2
    for bit, special in enumerate(_SPECIAL_VALUES):
        if flags >> bit & 1:
            packed = np.frombuffer(body, np.uint8, mask_bytes, start)
            mask = np.unpackbits(packed, count=pixels).reshape(height, width)[rows, columns]
            values[mask.view(bool)] = special
            start += mask_bytes
    return values


def value_range(data: bytes) -> tuple[float, float]:
    """Return the smallest and the largest finite value of an encoded map from its header; (0, 0) if there is none."""
    low, high = _read_header(data)[-2:]
    return low, high


def _read_header(data: bytes) -> tuple[int, int, int, int, int, int, float, float]:
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise ValueError("not an encoded map: it does not start with DAM1 and a complete header")
    fields = _HEADER.unpack_from(data)[1:]
    if not _is_allowed_size(*fields[4:6]):
        raise ValueError(f"the encoded map has an impossible header: {fields[4]}x{fields[5]}")
    return fields


def _is_allowed_size(height: int, width: int) -> bool:
    return 1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE and height * width <= _MAX_PIXELS


def _quantize(values: np.ndarray, low: float, high: float, steps: int) -> np.ndarray:
    levels = values.astype(np.float64)
    levels -= low
    if high > low:
        levels *= steps / (high - low)
    return np.rint(levels, out=levels).astype(np.uint16)


def _dequantize(levels: np.ndarray, low: float, high: float, steps: int) -> np.ndarray:
    values = np.empty(levels.shape, np.float32)
    exact = np.empty((_DEQUANTIZE_ROWS, levels.shape[1]))  # few enough rows for the L2 cache
    for top in range(0, len(levels), _DEQUANTIZE_ROWS):
        band = exact[: len(levels) - top]
        band[:] = levels[top : top + _DEQUANTIZE_ROWS]
        band *= (high - low) / steps
        band += low
        values[top : top + _DEQUANTIZE_ROWS] = band
    return values


def _pack(
    bits: np.ndarray,
    *,
    kind: int,
    low: float,
    high: float,
    steps: int = 0,
    masks: list[np.ndarray] | None = None,
) -> bytes:
    dtype = _DTYPES[kind]
    change = bits.astype(dtype)
    change[1:] -= bits[:-1].astype(dtype)
    change += dtype.type(_BIAS[kind])
    body = [change.reshape(-1).view(np.uint8).reshape(-1, dtype.itemsize).T.tobytes()]
    flags = 0
    for bit, mask in enumerate(masks or []):
        if mask.any():
            flags |= 1 << bit
            body.append(np.packbits(mask).tobytes())
    payload = zstandard.ZstdCompressor(level=1).compress(b"".join(body))
    height, width = bits.shape
    header = _HEADER.pack(_MAGIC, 0, kind, flags, steps, height, width, low, high)
    crc = zlib.crc32(payload, zlib.crc32(header[_CRC_START:]))
    return header[:4] + struct.pack("<I", crc) + header[_CRC_START:] + payload


def _decompress(payload: memoryview, size: int) -> bytes:
    if len(payload) < 4 * -(-size // _ZSTD_BLOCK):
        raise ValueError(f"the encoded map is damaged: {len(payload)} bytes cannot contain {size}")
    try:
        declared = zstandard.get_frame_parameters(payload).content_size
        if declared != size:
            raise ValueError(f"the encoded map is damaged: it contains {declared} bytes in place of {size}")
        # One decompressor per thread: it is not thread-safe, and creating one takes as long as decompressing a map.
        if not hasattr(_thread_local, "decompressor"):
            _thread_local.decompressor = zstandard.ZstdDecompressor()
        return _thread_local.decompressor.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"the encoded map is damaged: {error}") from error


def _unpack(body: bytes, height: int, width: int, kind: int, rows: slice, columns: slice) -> np.ndarray:
    dtype, pixels = _DTYPES[kind], height * width
    planes = np.frombuffer(body, np.uint8, pixels * dtype.itemsize).reshape(dtype.itemsize, height, width)
    planes = planes[:, : rows.stop, columns]  # a value depends on the values above it only
    bits = planes[-1].astype(dtype)
    for plane in planes[-2::-1]:
        bits <<= dtype.type(8)
        bits |= plane
    bits -= dtype.type(_BIAS[kind])
    _cumulative_sum_rows(bits)
    return bits[rows.start :]


def _cumulative_sum_rows(bits: np.ndarray) -> None:
    # In place, modulo the dtype, in blocks of rows: numpy.add.accumulate walks along columns, five times as slowly.
    height, width = bits.shape
    blocks = bits[: height - height % _SUM_BLOCK_ROWS].reshape(-1, _SUM_BLOCK_ROWS, width)
    for row in range(1, _SUM_BLOCK_ROWS):
        blocks[:, row] += blocks[:, row - 1]
    for block in range(1, len(blocks)):
        blocks[block] += blocks[block - 1, -1]
    for row in range(max(1, height - height % _SUM_BLOCK_ROWS), height):
        bits[row] += bits[row - 1]
