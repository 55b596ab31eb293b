"""From what a source reads to what a shard keeps: one rule for all sets, and every pixel counted by reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from depth_anything.data.image_headers import detect_format, open_image
from depth_anything.data.sample import LABEL_FIELDS, Frame, decode_image, encode_frame, image_warnings
from depth_anything.ingest.source import RawSample, resize_intrinsics
from depth_anything.preprocess import resize_shape

JPEG_QUALITY = 92
"""Of images that are resized; what it costs is in benchmarks/bench_resize.py."""

PATCH_SIZE = 14
_ORIENTATION_TAG = 0x0112
_JPEG_SIGNATURE = b"\xff\xd8\xff"


@dataclass(frozen=True)
class EncodedRecord:
    """A record's fields, and what is known of its label.

    Attributes:
        fields: Extension to bytes.
        quantity: "depth", "disparity", or None of an image alone.
        unit: Of the label, as the source says.
        pixels: Of the label by what they are: all, valid, sky, and each reason why the others are not.
        notes: What a user may not expect of the image, as that it is the first of an animation.
    """

    fields: dict[str, bytes]
    quantity: str | None
    unit: str | None
    pixels: Counter[str]
    notes: Sequence[str] = ()


def encode_sample(raw: RawSample, *, source: str, name: str, short_side: int | None = None) -> EncodedRecord:
    """Make a record of what a source has read.

    Labels: NaN, infinite, negative and zero values and what `raw.invalid` names become NaN; the sky becomes
    +inf in depth and 0 in disparity. Values are kept as they are, in float32. The image file is kept byte for
    byte where every reader shows it alike (upright RGB in JPEG, PNG or WebP), else it becomes PNG.

    Args:
        raw: As read.
        source: Name of the set that it is from.
        name: Of the record in that set.
        short_side: Resize larger images, and their labels, to the size that training would give them; images
            become JPEG of quality 92, labels take the nearest value, and intrinsics become those of the smaller
            image. None, or a smaller image: as it is.

    Raises:
        ValueError: The image cannot be decoded, label and image do not belong together, or not one pixel of
            the label is known.
    """
    image = decode_image(raw.image) if isinstance(raw.image, bytes) else raw.image
    height, width = image.shape[:2]
    meta: dict[str, Any] = {"source": source, "name": name, **raw.meta, "original_size": [height, width]}
    quantity, label, pixels = None, None, Counter[str]()
    for field in LABEL_FIELDS:
        values = getattr(raw, field)
        if values is not None:
            quantity = field
            label, pixels = mask_invalid(values, raw, sky=np.inf if field == "depth" else 0.0)
            _check_label_size((height, width), label.shape)
    if label is not None:
        if not pixels["valid"]:
            raise ValueError("no pixel of its label is valid: " + _format_counts(pixels))
        if pixels["sky"]:
            meta.setdefault("sky", "inf" if quantity == "depth" else "zero")
    data: bytes | None
    size = _reduced_size(height, width, short_side)
    if size is not None:
        from depth_anything.data.transforms import resize_image  # loads torch, which all else does without

        image, data = resize_image(image, *size), None
        if meta.get("intrinsics"):
            meta["intrinsics"] = resize_intrinsics(meta["intrinsics"], (height, width), size)
        label = None if label is None else resize_nearest(label, *size)
    else:
        data = raw.image if isinstance(raw.image, bytes) and is_plain_rgb(raw.image) else _encode_png(image)
    if label is not None and label.shape != image.shape[:2]:
        meta["label_size"] = list(label.shape)
    kept = {key: value for key, value in meta.items() if value is not None}
    frame = Frame("", image, kept, **({quantity: label} if quantity else {}))
    fields = encode_frame(frame, codec="f32", jpeg_quality=JPEG_QUALITY, original=data)
    notes = []
    if isinstance(raw.image, bytes) and not raw.image.startswith(
        _JPEG_SIGNATURE
    ):  # which has nothing to note
        notes = image_warnings(raw.image, image)
    return EncodedRecord(fields, quantity, kept.get("unit") if quantity else None, pixels, notes)


def mask_invalid(values: np.ndarray, raw: RawSample, *, sky: float) -> tuple[np.ndarray, Counter[str]]:
    """Return a label with what is unknown as NaN and the sky as `sky`, float32 (H, W), and its pixels by kind.

    A pixel has one kind. `raw.invalid` is believed before `raw.sky`, and both before the value itself, but
    that what is no positive number is told as such wherever there is no sky.

    Raises:
        ValueError: It is no map, or a mask has another size.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"its label has the shape {values.shape}, not that of a map")
    bad = [
        ("nan", np.isnan(values)),
        ("infinite", np.isinf(values)),
        ("negative", (values < 0) & (values > -np.inf)),
        ("zero", values == 0),
    ]
    kind = np.zeros(values.shape, np.uint8)
    names = ["valid"]
    for name, mask in bad:
        kind[mask] = len(names)
        names.append(name)
    if raw.sky is not None:
        _check_mask("sky", raw.sky, values)
        kind[raw.sky] = len(names)
    names.append("sky")
    told_as_such = (kind > 0) & (kind < len(names) - 1)
    for name, mask in raw.invalid.items():
        _check_mask(name, mask, values)
        kind[mask & ~told_as_such] = len(names)
        names.append(name)
    counts = np.bincount(kind.ravel(), minlength=len(names)).tolist()
    out = np.where(kind == 0, values, np.float32(np.nan))
    out[kind == names.index("sky")] = sky
    pixels = Counter({name: count for name, count in zip(names, counts, strict=True) if count})
    pixels["all"] = values.size
    return out, pixels


def resize_nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a map (H, W) by taking the values nearest to the new pixels' centres, as training does."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(values.shape, (height, width), strict=True)
    )
    return values.take(rows, 0).take(columns, 1)


def is_plain_rgb(data: bytes) -> bool:
    """Whether every reader shows this file alike: RGB, upright, opaque, of a format that records may hold."""
    try:
        if detect_format(data) not in ("JPEG", "PNG", "WebP"):
            return False
        picture = open_image(data)
    except (ValueError, OSError):
        return False
    still = not getattr(picture, "is_animated", False) or picture.format == "MPO"
    upright = picture.getexif().get(_ORIENTATION_TAG, 1) == 1
    return picture.mode == "RGB" and not picture.has_transparency_data and still and upright


def _reduced_size(height: int, width: int, short_side: int | None) -> tuple[int, int] | None:
    """Return the size that an image is to be stored in, None where it stays as it is."""
    if short_side is None or min(height, width) < short_side:
        return None
    # Of a side that is no multiple of the patch nobody could train without resampling again.
    multiple = PATCH_SIZE if short_side % PATCH_SIZE == 0 else 1
    size = resize_shape(height, width, short_side, multiple)
    return size if size != (height, width) else None


def _check_label_size(image: tuple[int, int], label: tuple[int, ...]) -> None:
    """Let a label of another size pass if it is the image's own, smaller or larger: within a pixel."""
    (height, width), (rows, columns) = image, label
    scale = max(rows / height, columns / width)
    if abs(rows - height * scale) > 1 or abs(columns - width * scale) > 1:
        raise ValueError(f"its image has {height} x {width} pixels and its label {rows} x {columns}")


def _check_mask(name: str, mask: np.ndarray, values: np.ndarray) -> None:
    if mask.shape != values.shape:
        raise ValueError(f"its mask of {name} has the shape {mask.shape}, its label {values.shape}")


def _format_counts(pixels: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in pixels.items() if name != "all")


def _encode_png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()
