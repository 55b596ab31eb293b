"""Read the format of an image file from its header, and estimate the memory that decoding needs."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

READABLE_FORMATS = "JPEG, PNG, WebP, TIFF, BMP, GIF, HEIC, AVIF and JPEG 2000"
"""Formats that `open_image` reads."""

MAX_PIXELS = 200_000_000

MAX_CHANNELS = 8
"""No photograph has more; JPEG 2000 allows thousands."""

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
# Types of the first atom in old QuickTime files, which have no ftyp.
_QUICKTIME_ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")

_VIDEO = "a video: type  depth-anything video"
_CAMERA_RAW = "a camera raw file: convert it to JPEG or TIFF first"
_TONE_MAP = "which has no fixed white level: tone-map it to PNG first"
_DOWNLOADED_PAGE = "a web page, as after a failed download: download the image itself"
_CONVERT_FIRST = "which is not supported: convert it to PNG or JPEG first"

# First bytes of files: first the supported formats, then others.
_READABLE_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF, little-endian
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)
_UNREADABLE_SIGNATURES = (
    (b"\x1a\x45\xdf\xa3", _VIDEO),  # Matroska, WebM
    (b"\0\0\x01\xba", _VIDEO),  # MPEG program and elementary streams
    (b"\0\0\x01\xb3", _VIDEO),
    (b"\x30\x26\xb2\x75", _VIDEO),  # WMV
    (b"FLV\x01", _VIDEO),
    (b"OggS\0", _VIDEO),
    (b"MM\0+", f"a big-endian BigTIFF, {_CONVERT_FIRST}"),  # Pillow 12 reads it as a TIFF
    (b"\xff\x0a", f"JPEG XL, {_CONVERT_FIRST}"),
    (b"\0\0\0\x0cJXL ", f"JPEG XL, {_CONVERT_FIRST}"),
    (b"8BPS", f"a Photoshop file, {_CONVERT_FIRST}"),
    (b"\0\0\x01\0", f"an icon, {_CONVERT_FIRST}"),
    (b"\x76\x2f\x31\x01", f"an OpenEXR file, {_TONE_MAP}"),
    (b"#?RADIANCE", f"a Radiance HDR file, {_TONE_MAP}"),
    (b"#?RGBE", f"a Radiance HDR file, {_TONE_MAP}"),
    (b"\x93NUMPY", f"a NumPy array, {_CONVERT_FIRST}"),
    (b"%PDF", f"a PDF, {_CONVERT_FIRST}"),
    (b"<svg", f"an SVG drawing, {_CONVERT_FIRST}"),
    (b"IIRO", _CAMERA_RAW),  # Olympus, Panasonic, Fuji, Sigma
    (b"IIRS", _CAMERA_RAW),
    (b"IIU\0", _CAMERA_RAW),
    (b"FUJIFILMCCD-RAW", _CAMERA_RAW),
    (b"FOVb", _CAMERA_RAW),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: type  git lfs pull"),
    (b"<!DOCTYPE", _DOWNLOADED_PAGE),
    (b"<!doctype", _DOWNLOADED_PAGE),
    (b"<html", _DOWNLOADED_PAGE),
)


@dataclass(frozen=True)
class DecodeCost:
    """Size of a decoded image, read from its header.

    Attributes:
        kind: Format, as "PNG".
        width: Width in pixels, of the largest part that the header names.
        height: Height in pixels, of the same part.
        channels: Stored channels per pixel.
        bytes: Memory of the decoded image and of its conversion to 8-bit RGB.
    """

    kind: str
    width: int
    height: int
    channels: int
    bytes: int

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.width * self.height


def estimate_decode_cost(data: bytes) -> DecodeCost:
    """Estimate the memory that decoding an image file takes, without decoding it. `decode_image` enforces the limit.

    Raises:
        ValueError: It is not an image that can be read; the message names the format if it is known.
    """
    try:
        return picture_decode_cost(open_image(data), data)
    except ValueError:
        raise
    except Exception as error:  # damaged files make Pillow raise a dozen types
        raise ValueError(f"its header cannot be read: {error or type(error).__name__}") from error


def picture_decode_cost(picture: Any, data: bytes) -> DecodeCost:
    """Estimate the memory that decoding takes, for an image that `open_image` has opened."""
    kind = detect_format(data)
    width, height = _largest_size(picture, kind, data)
    channels = len(picture.getbands())
    sample = 4 if picture.mode in ("I", "F") or kind == "JPEG 2000" else 2 if "16" in picture.mode else 1
    if kind == "JPEG 2000":
        channels = max(channels, _jpeg2000_channels(data))
    decoded = max(channels, 4 if channels > 1 else 1) * sample  # Pillow stores four channels for two or more
    return DecodeCost(kind, width, height, channels, width * height * (decoded + 3))


def check_decode_cost(cost: DecodeCost) -> None:
    """Refuse an image that is too large to be decoded safely.

    Raises:
        ValueError: Over 200 megapixels, or more than eight channels.
    """
    if cost.pixels > MAX_PIXELS:
        raise ValueError(f"{cost.width}x{cost.height} pixels exceed the limit of 200 megapixels")
    if cost.channels > MAX_CHANNELS:
        raise ValueError(f"{cost.channels} channels exceed the limit of {MAX_CHANNELS}")


def open_image(data: bytes) -> Any:
    """Open an image file as a Pillow image without decoding it.

    The plugins of Pillow are called directly, because `Image.open` tries dozens of formats, and its limit on pixels is
    a global setting of the calling program.

    Raises:
        ValueError: It is another format; the message names it if it is known.
        Exception: Anything that Pillow raises for a damaged header.
    """
    kind = detect_format(data)
    if kind == "WebP":
        width, height = _webp_size(data)
        check_decode_cost(DecodeCost(kind, width, height, 4, 0))  # before the plugin allocates the image
    if kind == "HEIC":
        from pillow_heif.as_plugin import HeifImageFile  # 50 ms to import

        return HeifImageFile(io.BytesIO(data))
    plugins: dict[str, Any] = {
        "JPEG": JpegImagePlugin.jpeg_factory,
        "PNG": PngImagePlugin.PngImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "AVIF": AvifImagePlugin.AvifImageFile,
        "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    }
    try:
        picture = plugins[kind](io.BytesIO(data))
    except Image.DecompressionBombError:  # a frame larger than its GIF, a tile larger than its TIFF
        raise ValueError("a part of it exceeds the limit of 200 megapixels") from None
    if kind == "TIFF" and _is_camera_raw(picture, data):
        raise ValueError(f"it is {_CAMERA_RAW}")
    return picture


def detect_format(data: bytes) -> str:
    """Return the format of an image file by its first bytes.

    Raises:
        ValueError: It is not a supported format; the message names it if it is known.
    """
    kind = _detect_readable(data)
    if kind is None:
        what = _describe_unreadable(data) or f"neither {READABLE_FORMATS.replace(' and ', ' nor ')}"
        raise ValueError(f"it is {what}")
    return kind


def is_image_or_video(data: bytes) -> bool:
    """Tell whether a file starts like an image of any format, supported or not, or a video, unlike a list of paths."""
    return (_detect_readable(data) or _describe_unreadable(data)) is not None


def _detect_readable(data: bytes) -> str | None:
    for start, kind in _READABLE_SIGNATURES:
        if data.startswith(start) and (kind != "BMP" or not any(data[6:10])):  # a text may start with BM
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    brands = _ftyp_brands(data)
    return "AVIF" if brands & _AVIF_BRANDS else "HEIC" if brands & _HEIF_BRANDS else None


def _describe_unreadable(data: bytes) -> str | None:
    for start, what in _UNREADABLE_SIGNATURES:
        if data.startswith(start):
            return what
    if brands := _ftyp_brands(data):
        return _CAMERA_RAW if b"crx " in brands else _VIDEO
    if data[:4] == b"RIFF":
        return _VIDEO if data[8:12] == b"AVI " else "an audio file"
    stream = len(data) > 376 and all(
        data[offset] == 0x47 for offset in (0, 188, 376)
    )  # MPEG transport stream
    return _VIDEO if stream or data[4:8] in _QUICKTIME_ATOMS else None


def _ftyp_brands(data: bytes) -> set[bytes]:
    """Return the brands of an ISO base media file: video, HEIC, AVIF or Canon raw."""
    if data[4:8] != b"ftyp":
        return set()
    offsets = (8, *range(16, min(int.from_bytes(data[:4], "big"), 256), 4))
    return {data[offset : offset + 4] for offset in offsets}


def _is_camera_raw(picture: Any, data: bytes) -> bool:
    """Detect camera raw files, whose first image is a thumbnail, by DNG version, Canon signature or sub-images."""
    tags = picture.tag_v2
    return 50706 in tags or data[8:10] == b"CR" or (330 in tags and bool(tags.get(254, 0) & 1))


def _largest_size(picture: Any, kind: str, data: bytes) -> tuple[int, int]:
    """Return the largest (width, height) in the header, of the image, GIF frame, TIFF tile or JPEG 2000 codestream."""
    sizes = [(picture.width, picture.height)]
    if kind == "GIF":
        sizes += [(tile[1][2], tile[1][3]) for tile in picture.tile]
    if kind == "TIFF":
        tags = picture.tag_v2
        sizes.append((int(tags.get(322, 0)), int(tags.get(323, 0))))
    if kind == "JPEG 2000" and (offset := data.find(b"\xff\x4f\xff\x51")) >= 0:
        x, y, left, top = (int.from_bytes(data[offset + i : offset + i + 4], "big") for i in (8, 12, 16, 20))
        sizes.append((max(x - left, 0), max(y - top, 0)))
    return max(sizes, key=lambda size: size[0] * size[1])


def _jpeg2000_channels(data: bytes) -> int:
    offset = data.find(b"\xff\x4f\xff\x51")
    return int.from_bytes(data[offset + 40 : offset + 42], "big") if offset >= 0 else 0


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP from its first chunk."""
    kind = data[12:16]
    if kind == b"VP8X":
        return tuple(int.from_bytes(data[offset : offset + 3], "little") + 1 for offset in (24, 27))  # type: ignore[return-value]
    if kind == b"VP8 ":
        return tuple(int.from_bytes(data[offset : offset + 2], "little") & 0x3FFF for offset in (26, 28))  # type: ignore[return-value]
    bits = int.from_bytes(data[21:25], "little") if kind == b"VP8L" else 0
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
