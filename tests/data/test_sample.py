import io
import json
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from depth_anything.data import sample as sample_module
from depth_anything.data.codec import encode
from depth_anything.data.sample import (
    Frame,
    decode_image,
    decode_record,
    encode_frame,
    image_extension,
    make_disparity_target,
)


def picture(height=30, width=44, seed=0):
    """Smooth colors, which JPEG changes little."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def file_of(image, format, **options):
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, format, **options)
    return out.getvalue()


def by_pillow(data):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(decode_image(file_of(picture(), format, **options)), picture())


def test_jpeg():
    for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 95}):
        data = file_of(picture(), "JPEG", **options)
        decoded = decode_image(data)
        assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous
        assert np.abs(decoded.astype(int) - by_pillow(data)).max() <= 2
        assert np.abs(decoded.astype(int) - picture()).mean() < 6


def test_red_is_first():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    for format in ("JPEG", "PNG"):
        assert (decode_image(file_of(red, format)).mean((0, 1)) > [250, -1, -1]).all()
        assert decode_image(file_of(red, format))[..., 1:].max() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(picture(), format, exif=exif)
    decoded = decode_image(data)
    assert decoded.shape == by_pillow(data).shape and decoded.flags.c_contiguous
    assert np.abs(decoded.astype(int) - by_pillow(data)).max() <= 2


@pytest.mark.filterwarnings("ignore")  # warnings of Pillow
def test_image_with_damaged_exif_is_decoded():
    data = file_of(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(decode_image(data), decode_image(file_of(picture(), "JPEG")))


def test_gray_and_bilevel():
    grey = picture()[..., 0]
    np.testing.assert_array_equal(decode_image(file_of(grey, "PNG")), np.stack([grey] * 3, -1))
    decoded = decode_image(file_of(grey, "JPEG"))
    assert decoded.shape == (30, 44, 3) and (decoded[..., 0] == decoded[..., 2]).all()
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(decode_image(file_of(bits, "PNG"))[..., 1], np.asarray(bits) * 255)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits(format):
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    decoded = decode_image(file_of(values, format))
    np.testing.assert_array_equal(decoded[..., 0], np.rint(values / 257).astype(np.uint8))
    assert (decoded[..., 0] == decoded[..., 1]).all() and (decoded[..., 0] == decoded[..., 2]).all()


def test_sixteen_bit_color():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x1234, 0x4321, 0xABCD)
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    decoded = decode_image(b"\x89PNG\r\n\x1a\n" + body)
    assert np.abs(decoded.astype(int) - [[[0, 0x80, 0xFF], [0x12, 0x43, 0xAB]]]).max() <= 1


def test_cmyk():
    cmyk = Image.fromarray(picture()).convert("CMYK")
    for format in ("JPEG", "TIFF"):
        assert np.abs(decode_image(file_of(cmyk, format)).astype(int) - picture()).mean() < 6


def test_transparency_is_composited_on_white():
    colours = np.dstack([picture(), np.full((30, 44), 255, np.uint8)])
    colours[:10, :, 3] = 0
    colours[10:12, :, 3] = 51
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        decoded = decode_image(file_of(Image.fromarray(colours, "RGBA"), format, **options))
        assert (decoded[:10] == 255).all()
        np.testing.assert_array_equal(decoded[12:], picture()[12:])
        mixed = picture()[10:12] * 0.2 + 255 * 0.8
        assert np.abs(decoded[10:12] - mixed).max() <= 1.5
    grey = Image.fromarray(colours[..., [0, 3]], "LA")
    assert (decode_image(file_of(grey, "PNG"))[:10] == 255).all()
    palette = Image.fromarray(picture()).quantize(16)
    np.testing.assert_array_equal(decode_image(file_of(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert (decode_image(file_of(palette, "PNG", transparency=bytes(16))) == 255).all()


def test_first_picture_of_an_animation():
    frames = [Image.fromarray(np.full((5, 6, 3), value, np.uint8)) for value in (40, 200)]
    data = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(decode_image(data).astype(int) - 40).max() <= 2


def test_several_pictures_in_one_jpeg():
    data = file_of(
        Image.fromarray(picture()), "MPO", save_all=True, append_images=[Image.fromarray(picture(seed=1))]
    )
    assert np.abs(decode_image(data).astype(int) - picture()).mean() < 6


def jpeg_header(width, height):
    data = bytearray(file_of(picture(), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png_header(width, height):
    data = bytearray(file_of(picture(), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_decompression_bombs_are_refused_by_their_header():
    import tracemalloc

    tracemalloc.start()
    for bomb in (jpeg_header(65000, 65000), png_header(100_000, 100_000), jpeg_header(20_001, 10_000)):
        with pytest.raises(ValueError, match="200 megapixels"):
            decode_image(bomb)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_what_cannot_be_decoded_is_a_value_error(capfd):
    jpeg, png = file_of(picture(200, 300), "JPEG"), file_of(picture(), "PNG")
    webp, tiff = file_of(picture(), "WEBP"), file_of(picture(), "TIFF")
    for data in (
        b"",
        b"\0" * 100,
        b"\xff\xd8\xff",
        b"RIFF\0\0\0\0WAVE",
        b"II*\0",
        b"BM",
        b"GIF8",
        b"%PDF-1.4",
    ):
        with pytest.raises(ValueError, match="image"):
            decode_image(data)
    for data in (jpeg, png, webp, tiff):
        for share in (0.1, 0.5, 0.9):
            with pytest.raises(ValueError, match="image"):
                decode_image(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="floats"):
        decode_image(file_of(Image.fromarray(np.zeros((3, 3), np.float32)), "TIFF"))
    assert capfd.readouterr().err == ""


def test_jpeg_with_damaged_pixels_is_refused():
    """Decoders continue after the damage with gray or shifted pixels, and warn on stderr at most."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (320, 240))
    whole = cv2.imencode(".jpg", smooth)[1].tobytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + whole[middle + 400 :],
        whole[:middle] + rng.bytes(400) + whole[middle + 400 :],
    ):
        with pytest.raises(ValueError, match="image"):
            decode_image(damaged)
    spare = whole[:-2] + b"\0" + whole[-2:]  # as some cameras write
    assert (decode_image(spare) == decode_image(whole)).all()


@pytest.mark.filterwarnings("ignore")  # warnings of Pillow on damaged TIFF and EXIF
def test_random_damage_raises_only_value_error():
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [file_of(picture(), "JPEG", exif=exif)]
    files += [file_of(picture(), format) for format in ("PNG", "WEBP", "TIFF", "BMP", "GIF")]
    for data in files:
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 400), 3):
                damaged[place] = rng.integers(256)
            try:
                assert decode_image(bytes(damaged)).ndim == 3
            except ValueError:
                pass


def test_image_extension():
    for format, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        assert image_extension(file_of(picture(), format)) == extension
    with pytest.raises(ValueError, match="JPEG, PNG and WebP"):
        image_extension(file_of(picture(), "BMP"))


def labelled_frame():
    depth = np.random.default_rng(6).uniform(1, 80, (30, 44)).astype(np.float32)
    depth[:5], depth[7, 7] = np.inf, np.nan
    return Frame("scenes/000000/000001", picture(), {"sky": "inf", "source": "prüfung", "unit": "m"}, depth)


def test_frame_to_fields_and_back():
    frame = labelled_frame()
    fields = encode_frame(frame, codec="f32")
    assert set(fields) == {"jpg", "json", "depth.f32"}
    back = decode_record(frame.key, fields)
    assert (back.key, back.meta, back.disparity) == (frame.key, frame.meta, None)
    np.testing.assert_array_equal(back.depth, frame.depth)
    assert np.abs(back.image.astype(int) - frame.image).mean() < 3
    frame.disparity = frame.image[..., 0].astype(np.float32)
    fields = encode_frame(frame, codec="q12", jpeg_quality=50)
    assert set(fields) == {"jpg", "json", "depth.q12", "disparity.q12"}
    assert np.isposinf(decode_record("k", fields).depth[:5]).all()
    assert encode_frame(frame, codec="q12", jpeg_quality=50) == fields


def test_original_file_is_stored_unchanged():
    data = file_of(picture(), "PNG")
    fields = encode_frame(Frame("k", picture()), codec="q12", original=data)
    assert fields == {"png": data, "json": b"{}"}
    np.testing.assert_array_equal(decode_record("k", fields).image, picture())


def test_record_without_json_and_with_unknown_fields():
    frame = decode_record("k", {"txt": b"a caption", "png": file_of(picture(), "PNG"), "depth.npy": b"?"})
    assert frame.meta == {} and frame.depth is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json": b"{}"}, "json.*jpg, jpeg, png, webp"),
        ({"jpg": b"no"}, "^jpg: the image"),
        ({"png": file_of(picture(), "PNG"), "json": b"{"}, "^json: "),
        ({"png": file_of(picture(), "PNG"), "json": b"\xff\xfe"}, "^json: "),
        ({"png": file_of(picture(), "PNG"), "json": b"[]"}, "^json: "),
        ({"png": file_of(picture(), "PNG"), "json": b"[" * 100_000}, "^json: "),
        ({"png": file_of(picture(), "PNG"), "depth.q12": b"DAM1"}, "^depth.q12: "),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        decode_record("k", fields)


def test_meta_must_be_json():
    with pytest.raises(ValueError, match="JSON"):
        encode_frame(Frame("k", picture(), {"x": float("nan")}), codec="q12")


def test_disparity_target_of_depth():
    depth = np.array([[2, 0.5, np.inf, np.nan], [0, -1, -np.inf, 1e-45]], np.float32)
    frame = Frame("k", picture(), depth=depth)
    disparity, valid = make_disparity_target(frame)
    np.testing.assert_array_equal(valid, [[True, True, True, False], [False] * 4])
    np.testing.assert_array_equal(disparity, np.array([[0.5, 2, 0, 0], [0] * 4], np.float32))
    assert disparity.dtype == np.float32 and valid.dtype == bool
    disparity, valid = make_disparity_target(frame, sky="invalid")
    np.testing.assert_array_equal(valid, [[True, True, False, False], [False] * 4])
    np.testing.assert_array_equal(depth[0, 2], np.inf)  # the frame is not modified


def test_disparity_target_of_disparity():
    frame = Frame("k", picture(), disparity=np.array([[0, 3, np.nan, np.inf]], np.float32))
    for sky in ("far", "invalid"):
        disparity, valid = make_disparity_target(frame, sky=sky)
        np.testing.assert_array_equal(valid, [[True, True, False, False]])
        np.testing.assert_array_equal(disparity, [[0, 3, 0, 0]])


def test_disparity_target_where_zero_is_sky():
    values = np.array([[0, 0.5, np.nan, 2]], np.float32)
    for meta, sky, told in (
        ({}, "invalid", [True, True, False, True]),
        ({"sky": "zero"}, "far", [True, True, False, True]),
        ({"sky": "zero"}, "invalid", [False, True, False, True]),
    ):
        frame = Frame("k", np.zeros((1, 4, 3), np.uint8), meta, disparity=values.copy())
        target, valid = make_disparity_target(frame, sky=sky)
        assert valid.tolist() == [told] and target.tolist() == [[0, 0.5, 0, 2]]
        np.testing.assert_array_equal(frame.disparity, values)  # the frame is not modified


def test_disparity_target_invalid_arguments():
    with pytest.raises(ValueError, match="a/b/c"):
        make_disparity_target(Frame("a/b/c", picture()))
    with pytest.raises(ValueError, match='"far" or "invalid"'):
        make_disparity_target(labelled_frame(), sky="near")


def test_labels_survive_encoding():
    frame = labelled_frame()
    disparity, valid = make_disparity_target(frame)
    frame = Frame("k", frame.image, disparity=np.where(valid, disparity, np.nan).astype(np.float32))
    record = {
        **encode_frame(Frame("k", frame.image), codec="q12"),
        "disparity.q12": encode(frame.disparity, codec="q12"),
    }
    again, valid_again = make_disparity_target(decode_record("k", record))
    np.testing.assert_array_equal(valid_again, valid)
    assert np.abs(again - disparity)[valid].max() <= np.ptp(disparity[valid]) / 8190 * (1 + 1e-6)
    assert json.loads(record["json"]) == {}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "settings", [{"subsampling": 0}, {"subsampling": 2, "progressive": True}, {"quality": 15}]
)
def test_jpegs_decode_as_in_opencv(mode, settings):
    """simplejpeg and OpenCV ship their own libjpeg-turbo; the pixels must be the same."""
    out = io.BytesIO()
    Image.fromarray(picture(37, 53)).convert(mode).save(out, "JPEG", **settings)
    data = out.getvalue()
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(decode_image(data), expected)
    odd = data[:20] + b"\x00\x00" + data[20:]  # libjpeg-turbo warns of extra bytes
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(odd, colorspace="RGB")
    np.testing.assert_array_equal(decode_image(odd), expected)


def test_plain_jpeg_check_agrees_with_pillow(monkeypatch):
    """Plain files skip Pillow, all others use it, with equal pixels."""
    for mode in ("RGB", "L", "CMYK"):
        for exif in (b"", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"):
            out = io.BytesIO()
            Image.fromarray(picture(20, 30)).convert(mode).save(
                out, "JPEG", exif=exif, comment=b"\xff\xc0 no frame"
            )
            jpeg_bytes, plain = out.getvalue(), mode != "CMYK" and not exif
            assert sample_module._is_plain_jpeg(jpeg_bytes) == plain
            fast = decode_image(jpeg_bytes)
            with monkeypatch.context() as patch:
                patch.setattr(sample_module, "_is_plain_jpeg", lambda data: False)
                np.testing.assert_array_equal(decode_image(jpeg_bytes), fast)
            assert fast.shape == ((30, 20, 3) if exif else (20, 30, 3))
            for end in range(2, 200):
                assert (
                    not sample_module._is_plain_jpeg(jpeg_bytes[:end]) or end > 100
                )  # cut before the frame header
