import io
import struct
import zlib

import numpy as np
import pytest
import zstandard
from PIL import Image

from depth_anything.data.codec import decode, encode, map_size, value_range


def plausible_map(height=518, width=518, noise=3e-4, seed=0):
    """Generate disparity of a floor with boxes and poles before a far sky, with fine noise as of a network."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    values = np.clip(rows / height - 0.4, 0, None) + 0.1 * np.sin(columns / 90)
    for _ in range(30):
        y, x, size = rng.integers(0, height), rng.integers(0, width), rng.integers(3, max(4, height // 4))
        near = rng.uniform(0.2, 1.0)
        box = (slice(y, y + size), slice(x, x + max(2, size // 3)))
        values[box] = np.maximum(values[box], near + 1e-3 * (columns[box] - x))
    return (values + noise * np.ptp(values) * rng.normal(size=values.shape)).astype(np.float32)


def assert_within_bound(values, codec="q12"):
    decoded = decode(encode(values, codec=codec))
    assert decoded.dtype == np.float32 and decoded.shape == values.shape
    for special in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(special(decoded), special(values))
    known = np.isfinite(values)
    if known.any():
        kept, given = decoded[known].astype(np.float64), values[known].astype(np.float64)
        assert kept.min() == given.min() and kept.max() == given.max()
        assert np.abs(kept - given).max() <= np.ptp(given) / 8190
    return decoded


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (15, 3), (16, 2), (17, 5), (33, 64), (518, 686)])
def test_shapes(shape):
    assert_within_bound(np.random.default_rng(1).random(shape, dtype=np.float32))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1),
        (1, 65504),
        (-3, 0),
        (-1, 1e-20),  # rounding makes the formula miss the high end
        (1e-38, 3e-38),
        (1, 1.008716644),  # rounding to float32 needs slightly more than 4160 steps
        (1e4, 1e4 + 1),
        (3e8, 3e8 + 64),
        (-3.4e38, 3.4e38),
        (0, 1e-45),
    ],
)
def test_error_bound_and_extremes_hold_in_float32_for_every_range(low, high):
    rng = np.random.default_rng(2)
    values = (low + (high - low) * rng.random((300, 300))).astype(np.float32)
    values[0, 0], values[-1, -1] = low, high
    assert_within_bound(values)


def test_error_bound_holds_for_values_between_levels():
    # The values farthest from any level are those halfway between two.
    values = ((np.arange(4160 * 2 + 1) / (4160 * 2)).astype(np.float32) + np.float32(0.1)).reshape(1, -1)
    assert_within_bound(values)
    assert_within_bound((np.arange(4095 * 2 + 1) / (4095 * 2)).astype(np.float32).reshape(1, -1))


@pytest.mark.parametrize("value", [0.0, -0.0, 7.25, 3.4e38, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["q12", "f32"])
def test_constant_maps(value, codec):
    values = np.full((5, 9), value, np.float32)
    np.testing.assert_array_equal(decode(encode(values, codec=codec)), values)


def test_nan_and_infinities_are_stored_exactly():
    values = plausible_map(61, 83)
    values[:20] = np.inf
    values[30, 5:50] = np.nan
    values[-1, -1] = -np.inf
    decoded = assert_within_bound(values)
    assert (
        np.isposinf(decoded[:20]).all() and np.isnan(decoded[30, 5:50]).all() and decoded[-1, -1] == -np.inf
    )


def test_f32_is_lossless():
    bits = np.random.default_rng(3).integers(
        0, 2**32, (64, 48), dtype=np.uint32
    )  # with several NaN bit patterns
    decoded = decode(encode(bits.view(np.float32), codec="f32"))
    np.testing.assert_array_equal(decoded.view(np.uint32), bits)


def test_other_layouts_and_types():
    values = plausible_map(40, 60)
    reference = decode(encode(values, codec="q12"))
    for same in (values.astype(np.float64), np.asfortranarray(values), values[::-1][::-1]):
        np.testing.assert_array_equal(decode(encode(same, codec="q12")), reference)
        np.testing.assert_array_equal(decode(encode(same, codec="f32")), values)


def test_decoded_bytes_are_pinned():
    """Decode a q12 file written by hand from the description of the format; compute the formula independently."""
    levels = np.array([[0, 1, 4000], [4160, 17, 300]], np.uint16)
    change = np.array([[0, 1, 4000], [4160, 16, -3700 % 65536]]) + 128
    planes = np.concatenate([(change & 255).ravel(), (change >> 8).ravel()]).astype(np.uint8).tobytes()
    nan_mask = bytes([0b00010000])
    payload = zstandard.ZstdCompressor(level=19).compress(planes + nan_mask)
    rest = struct.pack("<BBHIIff", 1, 1, 4160, 2, 3, -1.5, 2.75) + payload
    decoded = decode(b"DAM1" + struct.pack("<I", zlib.crc32(rest)) + rest)
    expected = (-1.5 + levels * ((2.75 - -1.5) / 4160)).astype(np.float32)
    expected[1, 0] = np.nan
    np.testing.assert_array_equal(decoded, expected)


def test_value_range():
    values = plausible_map(30, 30)
    low, high = values.min(), values.max()
    values[0] = np.nan
    values[1, 0], values[1, 1] = low, high
    for codec in ("q12", "f32"):
        assert value_range(encode(values, codec=codec)) == (low, high)
    assert value_range(encode(np.full((2, 2), np.nan), codec="q12")) == (0, 0)


def test_smaller_than_16_bit_png():
    values = plausible_map()
    levels = np.rint((values - values.min()) * (65535 / np.ptp(values.astype(np.float64)))).astype(np.uint16)
    png = io.BytesIO()
    Image.fromarray(levels).save(png, "PNG")
    assert len(encode(values, codec="q12")) < 0.6 * len(png.getvalue())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 3, 4), ()])
def test_refuses_arrays_that_are_not_maps(shape):
    with pytest.raises(ValueError, match="shape"):
        encode(np.zeros(shape, np.float32), codec="q12")


def test_refuses_unknown_codec():
    with pytest.raises(ValueError, match="q12 or f32"):
        encode(np.zeros((2, 2), np.float32), codec="q16")


def packed(kind=1, flags=0, steps=4160, height=4, width=4, low=0.0, high=1.0, payload=None):
    payload = zstandard.ZstdCompressor().compress(bytes(32)) if payload is None else payload
    rest = struct.pack("<BBHIIff", kind, flags, steps, height, width, low, high) + payload
    return b"DAM1" + struct.pack("<I", zlib.crc32(rest)) + rest


def test_hand_packed_map_decodes():
    np.testing.assert_array_equal(decode(packed()).shape, (4, 4))


@pytest.mark.parametrize(
    "hostile",
    [
        dict(kind=2),
        dict(flags=8),
        dict(flags=1),  # the mask is missing
        dict(steps=0),
        dict(height=0),
        dict(width=5),
        dict(height=30000, width=2000),  # 120 MB out of 40 bytes
        dict(height=2**31, width=2**31),
        dict(low=2.0),
        dict(low=float("nan")),
        dict(high=float("inf")),
        dict(payload=b""),
        dict(payload=b"not a frame at all, but long enough"),
        dict(payload=zstandard.ZstdCompressor().compress(bytes(32)) + b"tail"),
        dict(payload=zstandard.ZstdCompressor().compress(bytes(32))[:-3]),
        # a frame whose header claims a terabyte
        dict(payload=b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + bytes(20)),
        # a frame without its size
        dict(payload=zstandard.ZstdCompressor(write_content_size=False).compress(bytes(32))),
    ],
)
def test_refuses_hostile_files(hostile):
    with pytest.raises(ValueError, match="encoded map"):
        decode(packed(**hostile))


def test_refuses_sizes_the_bytes_cannot_contain_before_allocating():
    import tracemalloc

    rest = struct.pack("<BBHIIff", 1, 0, 4160, 32768, 2048, 0.0, 1.0) + bytes(64)
    tracemalloc.start()
    with pytest.raises(ValueError, match=str(32768 * 2048 * 2)):
        decode(b"DAM1" + struct.pack("<I", zlib.crc32(rest)) + rest)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_every_damage_is_detected():
    data = encode(plausible_map(24, 24), codec="q12")
    rng = np.random.default_rng(4)
    for place in [*range(28), *rng.integers(28, len(data), 200).tolist()]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match="encoded map"):
            decode(bytes(damaged))
    for length in [*range(30), *rng.integers(30, len(data), 50).tolist()]:
        with pytest.raises(ValueError, match="encoded map"):
            decode(data[:length])
    with pytest.raises(ValueError, match="encoded map"):
        decode(data + b"\0")


def test_same_bytes_twice():
    values = plausible_map(100, 100)
    assert encode(values, codec="q12") == encode(values.copy(), codec="q12")


@pytest.mark.parametrize("codec", ["q12", "f32"])
@pytest.mark.parametrize("specials", [False, True])
def test_decoded_part_equals_the_part_of_the_whole(codec, specials):
    values = plausible_map(70, 53)
    if specials:
        values[3:20, 5:9], values[40, ::3], values[69, 52] = np.nan, np.inf, -np.inf
    data = encode(values, codec=codec)
    assert map_size(data) == (70, 53)
    whole = decode(data)
    for rows in (slice(None), slice(0, 1), slice(13, 51), slice(48, 70), slice(69, 70)):
        for columns in (slice(None), slice(0, 7), slice(5, 53), slice(52, 53)):
            part = decode(data, rows=rows, columns=columns)
            assert part.dtype == np.float32
            np.testing.assert_array_equal(part, whole[rows, columns])


def test_part_of_a_damaged_map_is_refused():
    data = bytearray(encode(plausible_map(64, 64), codec="q12"))
    data[-1] ^= 1  # in the last rows, which are not decoded
    with pytest.raises(ValueError, match="checksum"):
        decode(bytes(data), rows=slice(0, 8), columns=slice(0, 8))
    for wrong in (b"", b"DAM1", data[:20], b"PNG." + data[4:]):
        with pytest.raises(ValueError, match="DAM1"):
            map_size(bytes(wrong))
    huge = bytearray(encode(np.zeros((1, 1)), codec="q12"))
    huge[12:20] = struct.pack("<II", 1 << 16, 1 << 16)
    with pytest.raises(ValueError, match="impossible header"):
        map_size(bytes(huge))
