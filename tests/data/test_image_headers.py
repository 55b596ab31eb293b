"""Format and decode cost of image files, from their headers."""

import io
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import BmpImagePlugin, Image, TiffImagePlugin

from depth_anything.data.image_headers import estimate_decode_cost, is_image_or_video
from depth_anything.data.sample import decode_image, image_warnings

Y, X = np.mgrid[:60, :90]
RAMP = np.stack([X * 2, Y * 4, X + Y], axis=-1).astype(np.uint8)


def file(kind, pixels=RAMP, **options):
    out = io.BytesIO()
    if kind == "HEIC":
        pillow_heif.from_pillow(Image.fromarray(pixels)).save(out, quality=95, **options)
    else:
        Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


@pytest.mark.parametrize("kind", ["HEIC", "AVIF", "JPEG2000"])
def test_formats_of_phones_and_archives_are_read(kind):
    got = decode_image(file(kind))
    assert got.dtype == np.uint8 and got.shape == RAMP.shape
    assert np.abs(got.astype(int) - RAMP).mean() < 2


@pytest.mark.parametrize("kind", ["HEIC", "AVIF", "PNG", "WEBP"])
def test_orientation_is_applied_once_in_each_format(kind):
    got = decode_image(file(kind, exif=turned()))
    assert got.shape == (90, 60, 3)
    assert np.abs(got.astype(int) - np.rot90(RAMP, -1)).mean() < 5


def test_bigtiff_is_read():
    np.testing.assert_array_equal(decode_image(file("TIFF", big_tiff=True)), RAMP)


@pytest.mark.parametrize(
    ("kind", "options", "channels"),
    [
        ("JPEG", {}, 3),
        ("PNG", {}, 3),
        ("WEBP", {}, 3),
        ("TIFF", {}, 3),
        ("BMP", {}, 3),
        ("GIF", {}, 1),
        ("HEIC", {}, 3),
        ("AVIF", {}, 3),
        ("JPEG2000", {}, 3),
    ],
)
def test_decode_cost_of_each_format(kind, options, channels):
    cost = estimate_decode_cost(file(kind, **options))
    assert (cost.width, cost.height, cost.pixels, cost.channels) == (90, 60, 5400, channels)
    assert cost.bytes >= 5400 * (channels + 3)


def test_decode_cost_needs_only_the_header():
    header = struct.pack(">IIBBBBB", 14_000, 14_000, 16, 6, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    cost = estimate_decode_cost(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT")
    assert cost.pixels == 196_000_000 and cost.channels == 4 and cost.bytes == 196_000_000 * 7


# Headers that are smaller than the image inside


def gif(screen, frame):
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02D\x01\0;"


def jpeg2000(*, box, inside, channels=3):
    data = bytearray(file("JPEG2000"))
    place = data.index(b"ihdr") + 4
    data[place : place + 8] = struct.pack(">II", *box[::-1])
    place = data.index(b"\xff\x4f\xff\x51")
    data[place + 8 : place + 16] = struct.pack(">II", *inside)
    data[place + 40 : place + 42] = struct.pack(">H", channels)
    return bytes(data)


def tiff(tile):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in (
        (256, 64),
        (257, 64),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, tile),
        (323, tile),
    ):
        tags[tag] = value
    tags[324], tags[325] = 8, 10
    out = io.BytesIO(b"II*\0" + struct.pack("<I", 8))
    out.seek(8)
    tags.save(out)
    return out.getvalue()


def webp(width, height):
    body = (
        b"VP8X"
        + struct.pack("<IB3x", 10, 0)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize(
    "data",
    [
        gif((10, 10), (60_000, 60_000)),
        jpeg2000(box=(90, 60), inside=(60_000, 60_000)),
        jpeg2000(box=(60_000, 60_000), inside=(90, 60)),
        tiff(60_000),
        webp(16_000, 16_000),
    ],
    ids=["gif", "codestream", "box", "tile", "webp"],
)
def test_small_header_with_a_large_image_inside_is_refused(data):
    with pytest.raises(ValueError, match="200 megapixels"):
        decode_image(data)


def test_thousands_of_channels_are_refused():
    with pytest.raises(ValueError, match="9000 channels"):
        decode_image(jpeg2000(box=(90, 60), inside=(90, 60), channels=9000))


# Files that are not supported images


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64), "depth-anything video"),
        (b"\0\0\0\x14ftypqt  \0\0\2\0qt  " + bytes(64), "depth-anything video"),
        (b"\0\0\x10\0moov" + bytes(64), "depth-anything video"),
        (b"\x1a\x45\xdf\xa3" + bytes(64), "depth-anything video"),
        (b"RIFF\x10\0\0\0AVI LIST", "depth-anything video"),
        ((b"\x47" + bytes(187)) * 3, "depth-anything video"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(64), "raw file"),
        (b"FUJIFILMCCD-RAW ", "raw file"),
        (b"MM\0+\0\x08\0\0", "BigTIFF"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\0\0\1\0\1\0", "icon"),
        (b"%PDF-1.7", "PDF"),
        (b"\x76\x2f\x31\x01", "OpenEXR"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x93NUMPY\1\0", "NumPy"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "audio"),
        (b"not at all", "neither JPEG"),
    ],
)
def test_other_formats_are_named_in_the_error(data, words):
    for read in (decode_image, estimate_decode_cost):
        with pytest.raises(ValueError, match=words):
            read(data)
    assert is_image_or_video(data) == (words != "neither JPEG")


def test_camera_raw_files_are_refused():
    for tags in ({50706: b"\1\4\0\0"}, {254: 1, 330: 8}):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in tags.items():
            info[tag] = value
        with pytest.raises(ValueError, match="raw file"):
            decode_image(file("TIFF", tiffinfo=info))


# Warnings about decoded images


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_further_pictures_give_a_warning(kind):
    more = [Image.fromarray(RAMP[::-1].copy())]
    data = file(kind, save_all=True, append_images=more)
    got = decode_image(data)
    notes = image_warnings(data, got)
    assert len(notes) == 1 and "2 pictures" in notes[0]
    assert np.abs(got.astype(int) - RAMP).mean() < 12  # a GIF has few colors
    assert not image_warnings(file(kind), RAMP)


def sixteen_bit_color(levels):
    """A PNG with 16 bits per channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.repeat(levels[..., None], 3, axis=2))
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


@pytest.mark.parametrize(
    "make", [lambda levels: file("PNG", levels), lambda levels: file("TIFF", levels), sixteen_bit_color]
)
def test_twelve_bit_values_in_sixteen_bits_give_a_warning(make):
    levels = np.linspace(0, 4095, 5400).reshape(60, 90).astype(np.uint16)
    for factor, noted in ((1, True), (16, False)):
        data = make(levels * factor)
        notes = image_warnings(data, decode_image(data))
        assert len(notes) == noted and all("12-bit" in note for note in notes)


def test_too_little_memory_is_a_value_error(monkeypatch):
    def too_little(self):
        raise MemoryError

    data = file("BMP")
    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", too_little)
    with pytest.raises(ValueError, match="memory"):
        decode_image(data)
