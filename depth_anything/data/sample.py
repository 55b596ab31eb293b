"""A frame, and how it lies in a record: image bytes, `json`, and `depth.<codec>` or `disparity.<codec>`."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from depth_anything.data import codec as map_codec
from depth_anything.data.image_headers import (
    MAX_PIXELS,
    DecodeCost,
    check_decode_cost,
    estimate_decode_cost,
    open_image,
    picture_decode_cost,
)
from depth_anything.preprocess import composite_on_white

__all__ = [
    "MAX_PIXELS",
    "Frame",
    "DecodeCost",
    "decode_image",
    "decode_labels",
    "decode_image_and_meta",
    "decode_record",
    "make_disparity_target",
    "encode_frame",
    "estimate_decode_cost",
    "image_extension",
    "image_warnings",
    "convert_to_target",
    "find_target_field",
]

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELDS = ("depth", "disparity")

_ORIENTATION = 0x0112
_DARK_LEVEL, _MAX_SAMPLED_SIDE = (
    16,
    1000,
)  # of 255, where 4095 of 65535 is 16; rows and columns that are looked at
_TOLERATED_EXTRA_BYTES = 2  # between the last pixel of a JPEG and the mark of its end
_IMREAD_RGB: int | None = getattr(cv2, "IMREAD_COLOR_RGB", None)  # since OpenCV 4.11
_CV2_FLAGS = (cv2.IMREAD_COLOR if _IMREAD_RGB is None else _IMREAD_RGB) | cv2.IMREAD_IGNORE_ORIENTATION


@dataclass
class Frame:
    """One image with what is known about it.

    Attributes:
        key: <set>/<shard>/<record>.
        image: uint8 (H, W, 3) RGB.
        meta: what the record's json holds: source, original size, intrinsics if known, unit, what is sky.
        depth: float32 metres; +inf is sky (meta["sky"] is then "inf"), NaN unknown. Its size may differ from
            the image's, which is then to be resized to it.
        disparity: float32, larger is nearer, known up to scale and shift; NaN unknown.
    """

    key: str
    image: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)
    depth: np.ndarray | None = None
    disparity: np.ndarray | None = None


def decode_image(data: bytes, *, upright: bool = True) -> np.ndarray:
    """Decode an image file to uint8 (H, W, 3) RGB, upright, or else as its pixels are stored.

    Reads JPEG, PNG, WebP, TIFF (BigTIFF, too), BMP, GIF, HEIC, AVIF and JPEG 2000; of several pictures the first. EXIF
    orientation is applied, grey is repeated, 16-bit values are divided by 257, CMYK is converted, what is transparent
    shows white. Colour profiles are ignored, as the authors' reader does.

    Args:
        data: The file.
        upright: Apply the EXIF orientation.

    Raises:
        ValueError: Empty, damaged, cut short, of another format (which is named where it is known), or over 200
            megapixels by its header; or there is not enough memory for it.
    """
    if not data:
        raise ValueError("the image is empty")
    try:
        image = _decode_jpeg(data) if _is_plain_jpeg(data) else None
        if image is not None:
            return image
        picture = open_image(data)
        check_decode_cost(picture_decode_cost(picture, data))
        plain = picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L")
        image = _decode_jpeg(data) if plain else None
        image = _to_rgb(picture) if image is None else image
        return _apply_orientation(image, _exif_orientation(picture)) if upright else image
    except MemoryError as error:
        raise ValueError("there is not enough memory to decode the image: reduce it first") from error
    except Exception as error:  # hostile bytes make Pillow raise a dozen types
        raise ValueError(f"the image cannot be decoded: {error or type(error).__name__}") from error


def image_warnings(data: bytes, image: np.ndarray) -> list[str]:
    """Say what a user may not expect of a decoded image, a sentence each.

    Args:
        data: The file.
        image: What `decode_image` made of it.

    Returns:
        That it holds further pictures; that its 16 bits hold values of 12, so that it is nearly black.
    """
    picture, notes = open_image(data), []
    step = -(-max(image.shape[:2]) // _MAX_SAMPLED_SIDE)
    if _is_16_bit(picture) and np.percentile(image[::step, ::step], 99.9) <= _DARK_LEVEL:
        notes.append(
            "it is nearly black: its 16-bit values use the lowest sixteenth of their range, as 12-bit data do; "
            "scale them to 16 bits first"
        )
    count = (
        1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    )  # phones add a small one to a JPEG
    if count > 1:
        what = "an animation" if picture.format in ("GIF", "WEBP", "PNG", "AVIF") else "several pages"
        notes.append(f"it holds {count} pictures ({what}), of which the first is taken")
    return notes


def decode_record(key: str, fields: Mapping[str, bytes]) -> Frame:
    """Decode a record's fields; those it does not know are left alone.

    Raises:
        ValueError: no image, or a field that cannot be decoded, which is named.
    """
    image, meta = decode_image_and_meta(fields)
    return Frame(key, image, meta, **decode_labels(fields))


def decode_image_and_meta(fields: Mapping[str, bytes]) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode the image of a record, uint8 (H, W, 3) RGB, and its json, {} if it has none; ValueError as above."""
    name = next((name for name in IMAGE_FIELDS if name in fields), None)
    if name is None:
        raise ValueError(
            f"no image among the fields {sorted(fields)}: one of {', '.join(IMAGE_FIELDS)} is needed"
        )
    image = _decode_field(decode_image, fields, name)
    return image, _decode_field(_decode_meta, fields, "json") if "json" in fields else {}


def find_target_field(fields: Mapping[str, bytes], *, meters: bool = False) -> str:
    """Name the field that a record's training target is made of: its disparity or, without one, its depth.

    Args:
        fields: of the record.
        metres: look for depth alone.

    Raises:
        ValueError: it has neither, or no depth where that is asked for.
    """
    for label in ("depth",) if meters else reversed(LABEL_FIELDS):
        for codec in map_codec.CODECS:
            if f"{label}.{codec}" in fields:
                return f"{label}.{codec}"
    if meters:
        raise ValueError("it has no depth, which metres are learnt from")
    raise ValueError("it has neither depth nor disparity: an image without a label")


def decode_labels(fields: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    """Decode the "depth" and the "disparity" among a record's fields; ValueError names the field."""
    labels = {}
    for label in LABEL_FIELDS:
        name = next((f"{label}.{codec}" for codec in map_codec.CODECS if f"{label}.{codec}" in fields), None)
        if name is not None:
            labels[label] = _decode_field(map_codec.decode, fields, name)
    return labels


def encode_frame(
    frame: Frame, *, codec: str, jpeg_quality: int = 95, original: bytes | None = None
) -> dict[str, bytes]:
    """Encode a frame to a record's fields.

    Args:
        frame: its depth and disparity are written where they are given.
        codec: "q12" or "f32", for depth and disparity.
        jpeg_quality: of the image, 4:4:4 from 95 up.
        original: the image file as it came (JPEG, PNG or WebP), kept in place of a JPEG of frame.image.
    """
    if original is not None:
        fields = {image_extension(original): original}
    else:
        out = io.BytesIO()
        subsampling = 0 if jpeg_quality >= 95 else 2
        Image.fromarray(frame.image).save(out, "JPEG", quality=jpeg_quality, subsampling=subsampling)
        fields = {"jpg": out.getvalue()}
    fields["json"] = json.dumps(frame.meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    for label in LABEL_FIELDS:
        values = getattr(frame, label)
        if values is not None:
            fields[f"{label}.{codec}"] = map_codec.encode(values, codec=codec)
    return fields


def image_extension(data: bytes) -> str:
    """Name the record field an image file belongs in: jpg, png or webp.

    Raises:
        ValueError: the file is of another kind, and has to be encoded anew.
    """
    for start, extension in ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"RIFF", "webp")):
        if data.startswith(start):
            return extension
    raise ValueError("only JPEG, PNG and WebP files are kept as they came: encode this image anew")


def make_disparity_target(frame: Frame, *, sky: str = "far") -> tuple[np.ndarray, np.ndarray]:
    """Make the training target of a labelled frame.

    Args:
        frame: with disparity (used as it is) or depth (turned to 1 / depth).
        sky: "far" sets the sky to disparity 0 and valid; "invalid" leaves it out. It is where depth is +inf, or,
            if meta["sky"] is "zero", where disparity is 0.

    Returns:
        disparity float32 (H, W), 0 where not valid, and valid bool (H, W).

    Raises:
        ValueError: the frame has no label.
    """
    label = frame.depth if frame.disparity is None else frame.disparity
    if label is None:
        raise ValueError(f"{frame.key} has neither depth nor disparity: it is an image without a label")
    target, valid = np.array(label, np.float32), np.empty(label.shape, bool)
    quantity = "depth" if frame.disparity is None else "disparity"
    convert_to_target(target, valid, quantity=quantity, sky=sky, meta=frame.meta)
    return target, valid


def convert_to_target(
    values: np.ndarray,
    valid: np.ndarray,
    *,
    quantity: str,
    sky: str,
    meta: Mapping[str, Any],
    depth_range: tuple[float, float] | None = None,
) -> None:
    """Turn a label to a training target where it lies.

    Args:
        values: float32 (H, W), the label; becomes disparity, or depth, 0 where not valid.
        valid: bool (H, W), filled in.
        quantity: "depth" or "disparity", what the label is.
        sky: "far" or "invalid", as in `disparity_target`.
        meta: the record's, for what is sky in a disparity.
        depth_range: None makes disparity; else depth stays depth, valid from the first to the second of these
            metres, both taken in. The sky then has no value, whatever `sky` says.
    """
    if sky not in ("far", "invalid"):
        raise ValueError(f'sky="{sky}" is unknown: use "far" or "invalid"')
    if depth_range is not None:
        if quantity != "depth":
            raise ValueError("disparity has no metres: a depth is needed")
        np.greater_equal(values, depth_range[0], out=valid)
        valid &= values <= depth_range[1]
    elif quantity == "depth":
        np.greater(values, 0, out=valid)
        if sky == "invalid":
            valid &= values < np.inf
        with np.errstate(over="ignore"):  # of depths below 3e-39, which then are not valid
            np.divide(np.float32(1), values, out=values, where=valid)
        valid &= np.isfinite(values)
    else:
        np.isfinite(values, out=valid)
        if sky == "invalid" and meta.get("sky") == "zero":
            valid &= values != 0
    if not valid.all():
        np.copyto(values, 0, where=~valid)


def _decode_field(decoder: Any, fields: Mapping[str, bytes], name: str) -> Any:
    try:
        return decoder(fields[name])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _decode_meta(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(meta, dict):
        raise ValueError("not a JSON object")
    return meta


def _is_plain_jpeg(data: bytes) -> bool:
    # Whether a file begins as a JPEG of 8 bits in one or three channels without EXIF, as most do in shards. Pillow
    # says the same, but takes a tenth of the time of decoding a small photograph to do so.
    place = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # sequential or progressive: bits, height, width, channels
            height, width = (int.from_bytes(data[place + i : place + i + 2], "big") for i in (5, 7))
            check_decode_cost(DecodeCost("JPEG", width, height, data[place + 9], 0))
            return data[place + 4] == 8 and data[place + 9] in (1, 3) and width > 0 and height > 0
        exif = marker == 0xE1 and data[place + 4 : place + 8] == b"Exif"
        if exif or length < 2 or not (marker in (0xDB, 0xC4, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF):
            return False
        place += 2 + length
    return False


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    # OpenCV is faster than Pillow, but before 5.0 it fills what is missing of a truncated file with black, and
    # says so on stderr only: a file without the mark of its end is left to Pillow.
    if b"\xff\xd9" not in data[-4096:]:
        return None
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")  # OpenCV's library, without OpenCV's way round
    except (
        ValueError
    ) as error:  # of all that the library warns of; most OpenCV and the authors take without a word
        if _is_jpeg_damage(str(error)):
            raise
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _CV2_FLAGS)
        return image if image is None or _IMREAD_RGB is not None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_jpeg_damage(warning: str) -> bool:
    """Tell a picture that is partly grey or shifted from one with a few bytes too many, as some cameras write."""
    extra = re.search(r"(\d+) extraneous bytes before marker", warning)
    if extra:
        return int(extra[1]) > _TOLERATED_EXTRA_BYTES
    return any(
        words in warning for words in ("Corrupt JPEG data", "Unsupported marker", "Bogus", "structure")
    )


def _exif_orientation(picture: Any) -> int:
    if "exif" not in picture.info:
        return 1
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to lose a picture
        return 1


def _apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    # The tag says which edges of the scene the first row and the first column of the file are (EXIF 2.32,
    # 4.6.4).
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    if orientation in (3, 4, 7, 8):
        image = cv2.flip(image, 0)
    if orientation in (2, 3, 6, 7):
        image = cv2.flip(image, 1)
    return image


def _to_rgb(picture: Any) -> np.ndarray:
    picture.load()
    if picture.mode == "F":
        raise ValueError("it holds 32-bit floats, of which none is white by nature")
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        return composite_on_white(np.asarray(picture.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def _is_16_bit(picture: Any) -> bool:
    """Tell whether a picture's file has 16 bits a channel, of which Pillow keeps the upper half of colors."""
    modes = [picture.mode, *(str(tile[3]) for tile in picture.tile)]
    return any("16" in mode for mode in modes) or picture.mode == "I"
