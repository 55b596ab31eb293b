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

READABLE = "JPEG, PNG, WebP, TIFF, BMP, GIF, HEIC, AVIF and JPEG 2000"
"""What `open_image` reads."""

MAX_PIXELS = 200_000_000

MAX_CHANNELS = 8
"""More are no picture; JPEG 2000 could have thousands."""

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_FILM_ATOMS = (
    b"moov",
    b"mdat",
    b"wide",
    b"free",
    b"skip",
    b"pnot",
)  # films that old QuickTime begins without ftyp

_FILM = "a film: map it with  depth-anything video"
_RAW = "a camera's raw file: develop it to JPEG or TIFF first"
_CONVERT = "which is not read: convert it to PNG or JPEG first"

# By the bytes that a file begins with; what is read comes first.
_KINDS = (
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
_OTHERS = (
    (b"\x1a\x45\xdf\xa3", _FILM),  # Matroska, WebM
    (b"\0\0\x01\xba", _FILM),  # MPEG program and elementary streams
    (b"\0\0\x01\xb3", _FILM),
    (b"\x30\x26\xb2\x75", _FILM),  # WMV
    (b"FLV\x01", _FILM),
    (b"OggS\0", _FILM),
    (b"MM\0+", f"a BigTIFF with the larger byte first, {_CONVERT}"),  # Pillow 12 takes it for a small TIFF
    (b"\xff\x0a", f"JPEG XL, {_CONVERT}"),
    (b"\0\0\0\x0cJXL ", f"JPEG XL, {_CONVERT}"),
    (b"8BPS", f"a Photoshop file, {_CONVERT}"),
    (b"\0\0\x01\0", f"an icon, {_CONVERT}"),
    (
        b"\x76\x2f\x31\x01",
        "an OpenEXR file, whose values no rule makes a photograph: tone-map it to PNG first",
    ),
    (b"#?RADIANCE", "a Radiance HDR file, whose values no rule makes a photograph: tone-map it to PNG first"),
    (b"#?RGBE", "a Radiance HDR file, whose values no rule makes a photograph: tone-map it to PNG first"),
    (b"\x93NUMPY", f"a NumPy array, {_CONVERT}"),
    (b"%PDF", f"a PDF, {_CONVERT}"),
    (b"<svg", f"an SVG drawing, {_CONVERT}"),
    (b"IIRO", _RAW),  # Olympus, Panasonic, Fuji, Sigma
    (b"IIRS", _RAW),
    (b"IIU\0", _RAW),
    (b"FUJIFILMCCD-RAW", _RAW),
    (b"FOVb", _RAW),
    (b"PK\x03\x04", "a zip: unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file: type  git lfs pull"),
    (b"<!DOCTYPE", "a web page, as failed downloads leave: fetch the image itself"),
    (b"<!doctype", "a web page, as failed downloads leave: fetch the image itself"),
    (b"<html", "a web page, as failed downloads leave: fetch the image itself"),
)


@dataclass(frozen=True)
class ImageCost:
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


def image_cost(data: bytes) -> ImageCost:
    """Say what an image file costs to decode without decoding it; `decode_image` has the limit.

    Args:
        data: The file.

    Raises:
        ValueError: It is no image that can be read; what it is instead is said where it is known.
    """
    try:
        return cost_of(open_image(data), data)
    except ValueError:
        raise
    except Exception as error:  # hostile bytes make Pillow raise a dozen types
        raise ValueError(f"its header cannot be read: {error or type(error).__name__}") from error


def cost_of(picture: Any, data: bytes) -> ImageCost:
    """Say what a picture that `open_image` made of a file costs to decode."""
    kind = kind_of(data)
    width, height = _largest(picture, kind, data)
    channels = len(picture.getbands())
    sample = 4 if picture.mode in ("I", "F") or kind == "JPEG 2000" else 2 if "16" in picture.mode else 1
    if kind == "JPEG 2000":
        channels = max(channels, _channels_of_jpeg2000(data))
    held = (
        max(channels, 4 if channels > 1 else 1) * sample
    )  # Pillow holds four channels where there are two or more
    return ImageCost(kind, width, height, channels, width * height * (held + 3))


def check_cost(cost: ImageCost) -> None:
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
    kind = kind_of(data)
    if kind == "WebP":
        width, height = _webp_size(data)
        check_cost(ImageCost(kind, width, height, 4, 0))  # its plugin makes room for the picture on opening
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
    if kind == "TIFF" and _is_raw(picture, data):
        raise ValueError(f"it is {_RAW}")
    return picture


def kind_of(data: bytes) -> str:
    """Name the format of an image file by its first bytes.

    Raises:
        ValueError: None that is read; what it is and what to do is said where it is known.
    """
    kind = _kind(data)
    if kind is None:
        what = _other(data) or f"neither {READABLE.replace(' and ', ' nor ')}"
        raise ValueError(f"it is {what}")
    return kind


def is_known(data: bytes) -> bool:
    """Tell whether a file begins as an image of any kind, read or not, or as a film: no list of paths does."""
    return (_kind(data) or _other(data)) is not None


def _kind(data: bytes) -> str | None:
    for start, kind in _KINDS:
        if data.startswith(start) and (
            kind != "BMP" or not any(data[6:10])
        ):  # a list may begin with BMW/a.jpg
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    brands = _brands(data)
    return "AVIF" if brands & _AVIF_BRANDS else "HEIC" if brands & _HEIF_BRANDS else None


def _other(data: bytes) -> str | None:
    for start, what in _OTHERS:
        if data.startswith(start):
            return what
    if brands := _brands(data):
        return _RAW if b"crx " in brands else _FILM
    if data[:4] == b"RIFF":
        return _FILM if data[8:12] == b"AVI " else "a sound file, not an image"
    stream = len(data) > 376 and all(data[place] == 0x47 for place in (0, 188, 376))  # MPEG transport stream
    return _FILM if stream or data[4:8] in _FILM_ATOMS else None


def _brands(data: bytes) -> set[bytes]:
    """What a file of ISO's base format says it holds: films, HEIC, AVIF, Canon's raw files."""
    if data[4:8] != b"ftyp":
        return set()
    places = (8, *range(16, min(int.from_bytes(data[:4], "big"), 256), 4))
    return {data[place : place + 4] for place in places}


def _is_raw(picture: Any, data: bytes) -> bool:
    """Tell a camera's raw file, whose first picture is a thumbnail, by DNG's version, Canon's mark or sub-images."""
    tags = picture.tag_v2
    return 50706 in tags or data[8:10] == b"CR" or (330 in tags and bool(tags.get(254, 0) & 1))


def _largest(picture: Any, kind: str, data: bytes) -> tuple[int, int]:
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


def _channels_of_jpeg2000(data: bytes) -> int:
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
