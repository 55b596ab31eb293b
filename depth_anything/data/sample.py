"""A frame: an image with its depth or disparity, and how it is encoded as the fields of a record.

Fields are the image file (`jpg`, `png` or `webp`), `json`, and `depth.<codec>`, `disparity.<codec>` or `classes.png`.
"""

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
from depth_anything.data.class_maps import CLASSES_FIELD, decode_classes, encode_classes
from depth_anything.data.image_headers import MAX_PIXELS, check_decode_cost, open_image, picture_decode_cost
from depth_anything.preprocess import composite_on_white

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELDS = ("depth", "disparity")
CONFIDENCE_FIELD = f"confidence.{map_codec.CONFIDENCE_CODEC}"

_ORIENTATION = 0x0112
_DARK_LEVEL = 16  # of 255; a 12-bit value of 4095 in 16 bits becomes 16
_MAX_SAMPLED_SIDE = 1000  # rows and columns that are sampled to find dark images
_TOLERATED_EXTRA_BYTES = 2  # between the last pixel of a JPEG and its end marker
_IMREAD_RGB: int | None = getattr(cv2, "IMREAD_COLOR_RGB", None)  # since OpenCV 4.11
_CV2_FLAGS = (cv2.IMREAD_COLOR if _IMREAD_RGB is None else _IMREAD_RGB) | cv2.IMREAD_IGNORE_ORIENTATION


@dataclass
class Frame:
    """An image with its labels and metadata.

    Attributes:
        key: <set>/<shard>/<record>.
        image: uint8 (H, W, 3) RGB.
        meta: The record's json: source, original size, intrinsics if known, unit, how the sky is encoded.
        depth: float32 (h, w) in meters; +inf is sky (meta["sky"] is then "inf"), NaN unknown. If its size differs
            from that of the image, the image must be resized to it.
        disparity: float32 (h, w), larger is nearer, up to scale and shift; NaN unknown.
        classes: uint8 (H, W), the class of each pixel, 255 where it is ignored.
        confidence: float32 (h, w) in [0, 1], how much each pixel of the label is trusted; None for fully.
    """

    key: str
    image: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)
    depth: np.ndarray | None = None
    disparity: np.ndarray | None = None
    classes: np.ndarray | None = None
    confidence: np.ndarray | None = None


def decode_image(data: bytes, *, upright: bool = True) -> np.ndarray:
    """Decode an image file to uint8 (H, W, 3) RGB.

    Reads JPEG, PNG, WebP, TIFF (and BigTIFF), BMP, GIF, HEIC, AVIF and JPEG 2000; of several pictures the first. Gray
    is repeated, 16-bit values are divided by 257, CMYK is converted, transparency is composited on white. Color
    profiles are ignored, as in the authors' code.

    Args:
        data: The file.
        upright: Apply the EXIF orientation; False returns the pixels as they are stored.

    Raises:
        ValueError: The file is empty, damaged, truncated, of another format (named if it is known), has over 200
            megapixels by its header, or there is not enough memory.
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
    """Describe what may surprise the user about a decoded image: further pictures in the file, or values too dark.

    Args:
        data: The file.
        image: The result of `decode_image`.

    Returns:
        One sentence each.
    """
    picture, warnings = open_image(data), []
    step = -(-max(image.shape[:2]) // _MAX_SAMPLED_SIDE)
    if _is_16_bit(picture) and np.percentile(image[::step, ::step], 99.9) <= _DARK_LEVEL:
        warnings.append(
            "it is nearly black: its 16-bit values use the lowest sixteenth of their range, as 12-bit data do; "
            "scale them to 16 bits first"
        )
    # Phones add a thumbnail to a JPEG (MPO).
    count = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if count > 1:
        what = "an animation" if picture.format in ("GIF", "WEBP", "PNG", "AVIF") else "several pages"
        warnings.append(f"it has {count} pictures ({what}); the first is used")
    return warnings


def decode_record(key: str, fields: Mapping[str, bytes]) -> Frame:
    """Decode the image, the metadata and the labels of a record; other fields are ignored.

    Raises:
        ValueError: There is no image, or a field (which is named) cannot be decoded.
    """
    image, meta = decode_image_and_meta(fields)
    confidence = None
    if CONFIDENCE_FIELD in fields:
        confidence = _decode_field(map_codec.decode, fields, CONFIDENCE_FIELD)
    return Frame(key, image, meta, **decode_labels(fields), confidence=confidence)


def decode_image_and_meta(fields: Mapping[str, bytes]) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode the image of a record, uint8 (H, W, 3) RGB, and its json ({} if it has none).

    Raises:
        ValueError: There is no image, or a field (which is named) cannot be decoded.
    """
    name = next((name for name in IMAGE_FIELDS if name in fields), None)
    if name is None:
        raise ValueError(
            f"no image among the fields {sorted(fields)}: one of {', '.join(IMAGE_FIELDS)} is needed"
        )
    image = _decode_field(decode_image, fields, name)
    return image, _decode_field(_decode_meta, fields, "json") if "json" in fields else {}


def find_target_field(fields: Mapping[str, bytes], *, meters: bool = False) -> str:
    """Return the name of the field that the training target is made from: disparity or, without one, depth.

    Args:
        fields: Fields of the record.
        meters: Accept depth only.

    Raises:
        ValueError: There is no such field.
    """
    for label in ("depth",) if meters else reversed(LABEL_FIELDS):
        for codec in map_codec.CODECS:
            if f"{label}.{codec}" in fields:
                return f"{label}.{codec}"
    if meters:
        raise ValueError("no depth: a metric model is trained on depth in meters")
    raise ValueError("neither depth nor disparity: the image has no label")


def decode_labels(fields: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    """Decode the fields "depth", "disparity" and "classes" of a record, as far as it has them.

    Raises:
        ValueError: A field (which is named) cannot be decoded.
    """
    labels = {}
    for label in LABEL_FIELDS:
        name = next((f"{label}.{codec}" for codec in map_codec.CODECS if f"{label}.{codec}" in fields), None)
        if name is not None:
            labels[label] = _decode_field(map_codec.decode, fields, name)
    if CLASSES_FIELD in fields:
        labels["classes"] = _decode_field(decode_classes, fields, CLASSES_FIELD)
    return labels


def encode_frame(
    frame: Frame, *, codec: str, jpeg_quality: int = 95, original: bytes | None = None
) -> dict[str, bytes]:
    """Encode a frame as the fields of a record.

    Args:
        frame: A frame with depth, disparity, both or neither.
        codec: "q12" or "f32", for depth and disparity.
        jpeg_quality: JPEG quality of the image; from 95 up without chroma subsampling.
        original: The original image file (JPEG, PNG or WebP), stored in place of a JPEG of `frame.image`.
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
    if frame.classes is not None:
        fields[CLASSES_FIELD] = encode_classes(frame.classes)
    return fields


def image_extension(data: bytes) -> str:
    """Return the record field of an image file by its first bytes: jpg, png or webp.

    Raises:
        ValueError: It is another format, which must be encoded again.
    """
    for start, extension in ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"RIFF", "webp")):
        if data.startswith(start):
            return extension
    raise ValueError("only JPEG, PNG and WebP files can be stored unchanged: encode this image again")


def make_disparity_target(frame: Frame, *, sky: str = "far") -> tuple[np.ndarray, np.ndarray]:
    """Compute the training target of a labeled frame.

    Args:
        frame: With disparity, which is used unchanged, or depth, which becomes 1 / depth.
        sky: "far" sets the sky to disparity 0 and valid; "invalid" leaves it out. Sky is where depth is +inf or,
            if meta["sky"] is "zero", where disparity is 0.

    Returns:
        disparity float32 (H, W), 0 where not valid, and valid bool (H, W).

    Raises:
        ValueError: The frame has no label.
    """
    label = frame.depth if frame.disparity is None else frame.disparity
    if label is None:
        raise ValueError(f"{frame.key} has neither depth nor disparity: the image has no label")
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
    """Convert a label to a training target in place.

    Args:
        values: float32 (H, W), the label; becomes disparity or depth, 0 where not valid.
        valid: bool (H, W), the output mask.
        quantity: What the label is: "depth" or "disparity".
        sky: "far" or "invalid", as in `make_disparity_target`.
        meta: Metadata of the record; tells how the sky is encoded in a disparity.
        depth_range: None converts to disparity. Otherwise depth stays depth, valid where lowest ≤ depth ≤ highest,
            in meters; the sky is then never valid.

    Raises:
        ValueError: `sky` is another word, or a disparity cannot be converted to meters.
    """
    if sky not in ("far", "invalid"):
        raise ValueError(f'sky="{sky}" is unknown: use "far" or "invalid"')
    if depth_range is not None:
        if quantity != "depth":
            raise ValueError("disparity cannot be converted to meters: the label must be depth")
        np.greater_equal(values, depth_range[0], out=valid)
        valid &= values <= depth_range[1]
    elif quantity == "depth":
        np.greater(values, 0, out=valid)
        if sky == "invalid":
            valid &= values < np.inf
        with np.errstate(over="ignore"):  # depths below 3e-39 become inf, which is not valid
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
    """Tell whether a file starts as an 8-bit JPEG of one or three channels and normal size without EXIF.

    Most images in shards do. Pillow finds the same, but takes a tenth of the time of decoding a small photograph.
    """
    at = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # sequential or progressive: bits, height, width, channels
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return data[at + 4] == 8 and data[at + 9] in (1, 3) and 0 < height * width <= MAX_PIXELS
        exif = marker == 0xE1 and data[at + 4 : at + 8] == b"Exif"
        if exif or length < 2 or not (marker in (0xDB, 0xC4, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF):
            return False
        at += 2 + length
    return False


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    # OpenCV is faster than Pillow, but before 5.0 it fills the missing part of a truncated file with black and warns
    # on stderr only. So a file without the end marker is left to Pillow.
    if b"\xff\xd9" not in data[-4096:]:
        return None
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")  # libjpeg-turbo, as OpenCV uses it, without BGR
    except ValueError as error:  # for every warning of libjpeg-turbo; OpenCV ignores most of them
        if _is_jpeg_damage(str(error)):
            raise
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _CV2_FLAGS)
        return image if image is None or _IMREAD_RGB is not None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_jpeg_damage(warning: str) -> bool:
    """Tell whether a warning means that pixels are lost, unlike the few extra bytes that some cameras write."""
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
    except Exception:  # the pixels of a file with damaged EXIF are fine
        return 1


def _apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    # The tag names the edges of the scene that the first row and the first column of the file are (EXIF 2.32, 4.6.4).
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
        raise ValueError("it has 32-bit floats, for which no value is defined as white")
    if picture.mode.startswith("I"):
        gray = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        return np.repeat(((gray + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        return composite_on_white(np.asarray(picture.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def _is_16_bit(picture: Any) -> bool:
    """Tell whether a file has 16 bits per channel; for color images Pillow returns the upper 8 only."""
    modes = [picture.mode, *(str(tile[3]) for tile in picture.tile)]
    return any("16" in mode for mode in modes) or picture.mode == "I"
