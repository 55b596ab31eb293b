"""What an image file is, and what it costs to decode: from its first bytes and its header, before a pixel is."""

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
"""What `open_image` reads."""

MAX_PIXELS = 200_000_000

MAX_CHANNELS = 8
"""More are no picture; JPEG 2000 could have thousands."""

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_QUICKTIME_ATOMS = (
    b"moov",
    b"mdat",
    b"wide",
    b"free",
    b"skip",
    b"pnot",
)  # films that old QuickTime begins without ftyp

_VIDEO = "a film: map it with  depth-anything video"
_CAMERA_RAW = "a camera's raw file: develop it to JPEG or TIFF first"
_CONVERT_FIRST = "which is not read: convert it to PNG or JPEG first"

# By the bytes that a file begins with; what is read comes first.
_READABLE_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF of the usual byte order
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
    (
        b"MM\0+",
        f"a BigTIFF with the larger byte first, {_CONVERT_FIRST}",
    ),  # Pillow 12 takes it for a small TIFF
    (b"\xff\x0a", f"JPEG XL, {_CONVERT_FIRST}"),
    (b"\0\0\0\x0cJXL ", f"JPEG XL, {_CONVERT_FIRST}"),
    (b"8BPS", f"a Photoshop file, {_CONVERT_FIRST}"),
    (b"\0\0\x01\0", f"an icon, {_CONVERT_FIRST}"),
    (
        b"\x76\x2f\x31\x01",
        "an OpenEXR file, whose values no rule makes a photograph: tone-map it to PNG first",
    ),
    (b"#?RADIANCE", "a Radiance HDR file, whose values no rule makes a photograph: tone-map it to PNG first"),
    (b"#?RGBE", "a Radiance HDR file, whose values no rule makes a photograph: tone-map it to PNG first"),
    (b"\x93NUMPY", f"a NumPy array, {_CONVERT_FIRST}"),
    (b"%PDF", f"a PDF, {_CONVERT_FIRST}"),
    (b"<svg", f"an SVG drawing, {_CONVERT_FIRST}"),
    (b"IIRO", _CAMERA_RAW),  # Olympus, Panasonic, Fuji, Sigma
    (b"IIRS", _CAMERA_RAW),
    (b"IIU\0", _CAMERA_RAW),
    (b"FUJIFILMCCD-RAW", _CAMERA_RAW),
    (b"FOVb", _CAMERA_RAW),
    (b"PK\x03\x04", "a zip: unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file: type  git lfs pull"),
    (b"<!DOCTYPE", "a web page, as failed downloads leave: fetch the image itself"),
    (b"<!doctype", "a web page, as failed downloads leave: fetch the image itself"),
    (b"<html", "a web page, as failed downloads leave: fetch the image itself"),
)


@dataclass(frozen=True)
class DecodeCost:
    """What an image costs to decode, by its header.

    Attributes:
        kind: As "PNG".
        width: Pixels, the most that any part of the header says.
        height: Likewise.
        channels: Per pixel, as they are stored.
        bytes: That the decoded image takes while it is decoded and turned to RGB of 8 bits.
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
    """Say what an image file costs to decode without decoding it; `decode_image` has the limit.

    Args:
        data: The file.

    Raises:
        ValueError: It is no image that can be read; what it is instead is said where it is known.
    """
    try:
        return picture_decode_cost(open_image(data), data)
    except ValueError:
        raise
    except Exception as error:  # hostile bytes make Pillow raise a dozen types
        raise ValueError(f"its header cannot be read: {error or type(error).__name__}") from error


def picture_decode_cost(picture: Any, data: bytes) -> DecodeCost:
    """Say what a picture that `open_image` made of a file costs to decode."""
    kind = detect_format(data)
    width, height = _largest_size(picture, kind, data)
    channels = len(picture.getbands())
    sample = 4 if picture.mode in ("I", "F") or kind == "JPEG 2000" else 2 if "16" in picture.mode else 1
    if kind == "JPEG 2000":
        channels = max(channels, _jpeg2000_channels(data))
    held = (
        max(channels, 4 if channels > 1 else 1) * sample
    )  # Pillow holds four channels where there are two or more
    return DecodeCost(kind, width, height, channels, width * height * (held + 3))


def check_decode_cost(cost: DecodeCost) -> None:
    """Refuse an image that is too large to be a photograph.

    Raises:
        ValueError: Over 200 megapixels, or more than eight channels.
    """
    if cost.pixels > MAX_PIXELS:
        raise ValueError(f"{cost.width}x{cost.height} pixels are more than the limit of 200 megapixels")
    if cost.channels > MAX_CHANNELS:
        raise ValueError(f"{cost.channels} channels are more than a photograph has")


def open_image(data: bytes) -> Any:
    """Open an image file as Pillow's picture without decoding it.

    Pillow's plugins are asked for directly: `Image.open` tries dozens of formats, and its own limit on pixels is a
    global that belongs to the caller's program.

    Raises:
        ValueError: It is of another kind; what it is and what to do is said where it is known.
        Exception: Whatever Pillow raises for a damaged header.
    """
    kind = detect_format(data)
    if kind == "WebP":
        width, height = _webp_size(data)
        check_decode_cost(
            DecodeCost(kind, width, height, 4, 0)
        )  # its plugin makes room for the picture on opening
    if kind == "HEIC":
        from pillow_heif.as_plugin import HeifImageFile  # 50 ms that few need

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
    except Image.DecompressionBombError:  # a frame that is larger than its GIF, a tile larger than its TIFF
        raise ValueError("a part of it has more pixels than the limit of 200 megapixels") from None
    if kind == "TIFF" and _is_camera_raw(picture, data):
        raise ValueError(f"it is {_CAMERA_RAW}")
    return picture


def detect_format(data: bytes) -> str:
    """Name the format of an image file by its first bytes.

    Raises:
        ValueError: None that is read; what it is and what to do is said where it is known.
    """
    kind = _detect_readable(data)
    if kind is None:
        what = _describe_unreadable(data) or f"neither {READABLE_FORMATS.replace(' and ', ' nor ')}"
        raise ValueError(f"it is {what}")
    return kind


def is_image_or_video(data: bytes) -> bool:
    """Tell whether a file begins as an image of any kind, read or not, or as a film: no list of paths does."""
    return (_detect_readable(data) or _describe_unreadable(data)) is not None


def _detect_readable(data: bytes) -> str | None:
    for start, kind in _READABLE_SIGNATURES:
        if data.startswith(start) and (
            kind != "BMP" or not any(data[6:10])
        ):  # a list may begin with BMW/a.jpg
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
        return _VIDEO if data[8:12] == b"AVI " else "a sound file, not an image"
    stream = len(data) > 376 and all(data[place] == 0x47 for place in (0, 188, 376))  # MPEG transport stream
    return _VIDEO if stream or data[4:8] in _QUICKTIME_ATOMS else None


def _ftyp_brands(data: bytes) -> set[bytes]:
    """What a file of ISO's base format says it holds: films, HEIC, AVIF, Canon's raw files."""
    if data[4:8] != b"ftyp":
        return set()
    places = (8, *range(16, min(int.from_bytes(data[:4], "big"), 256), 4))
    return {data[place : place + 4] for place in places}


def _is_camera_raw(picture: Any, data: bytes) -> bool:
    """Tell a camera's raw file, whose first picture is a thumbnail, by DNG's version, Canon's mark or sub-images."""
    tags = picture.tag_v2
    return 50706 in tags or data[8:10] == b"CR" or (330 in tags and bool(tags.get(254, 0) & 1))


def _largest_size(picture: Any, kind: str, data: bytes) -> tuple[int, int]:
    """The most pixels that any part of the header asks room for: a frame, a tile, the codestream inside."""
    sizes = [(picture.width, picture.height)]
    if kind == "GIF":
        sizes += [(tile[1][2], tile[1][3]) for tile in picture.tile]
    if kind == "TIFF":
        tags = picture.tag_v2
        sizes.append((int(tags.get(322, 0)), int(tags.get(323, 0))))
    if kind == "JPEG 2000" and (place := data.find(b"\xff\x4f\xff\x51")) >= 0:
        x, y, left, top = (int.from_bytes(data[place + i : place + i + 4], "big") for i in (8, 12, 16, 20))
        sizes.append((max(x - left, 0), max(y - top, 0)))
    return max(sizes, key=lambda size: size[0] * size[1])


def _jpeg2000_channels(data: bytes) -> int:
    place = data.find(b"\xff\x4f\xff\x51")
    return int.from_bytes(data[place + 40 : place + 42], "big") if place >= 0 else 0


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP by its first chunk; nothing where that is none."""
    kind = data[12:16]
    if kind == b"VP8X":
        return tuple(int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))  # type: ignore[return-value]
    if kind == b"VP8 ":
        return tuple(int.from_bytes(data[place : place + 2], "little") & 0x3FFF for place in (26, 28))  # type: ignore[return-value]
    bits = int.from_bytes(data[21:25], "little") if kind == b"VP8L" else 0
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
