"""Convert raw samples of all data sets to the fields of records, and count pixels by kind."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from depth_anything.classes import IGNORED
from depth_anything.data.captions import CAPTION_FIELD, encode_captions
from depth_anything.data.image_headers import detect_format, open_image
from depth_anything.data.sample import LABEL_FIELDS, Frame, decode_image, encode_frame, image_warnings
from depth_anything.ingest.source import RawSample, resize_intrinsics, same_aspect_ratio
from depth_anything.preprocess import resize_shape

JPEG_QUALITY = 92
"""Quality of images that are resized; benchmarks/bench_resize.py measures the loss."""

PATCH_SIZE = 14
_ORIENTATION_TAG = 0x0112
_JPEG_SIGNATURE = b"\xff\xd8\xff"


@dataclass(frozen=True)
class EncodedRecord:
    """The fields of a record, and facts about its label.

    Attributes:
        fields: Field extension to bytes.
        quantity: "depth", "disparity", "classes" without either, or None if the record is only an image.
        unit: Unit of the label, according to the source.
        pixels: Number of pixels of the label by kind: all, valid, sky, and each reason for an invalid pixel.
        notes: Unexpected properties of the image, for example that it is the first frame of an animation.
    """

    fields: dict[str, bytes]
    quantity: str | None
    unit: str | None
    pixels: Counter[str]
    notes: Sequence[str] = ()


def encode_sample(raw: RawSample, *, source: str, name: str, short_side: int | None = None) -> EncodedRecord:
    """Encode a raw sample as a record.

    In labels, NaN, infinite, negative and zero values and the pixels of `raw.invalid` become NaN. Sky becomes +inf in
    depth and 0 in disparity. Other values are stored unchanged in float32. The image file is stored unchanged if all
    readers decode it to the same upright RGB image (JPEG, PNG or WebP); other images become PNG.

    Args:
        raw: The sample.
        source: Name of its dataset.
        name: Name of the record in that dataset.
        short_side: Resize larger images and their labels to the size that training would use. Images become JPEG of
            quality 92, labels take the nearest value, intrinsics are scaled. None: no image is resized.

    Raises:
        ValueError: The image cannot be decoded, the label does not fit the image, or no pixel of the label is valid.
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
            raise ValueError(f"no pixel of its label is valid: {_format_counts(pixels)}")
        if pixels["sky"]:
            meta.setdefault("sky", "inf" if quantity == "depth" else "zero")
    classes = raw.classes
    if classes is not None:
        _check_classes(classes, (height, width))
        if quantity is None:
            quantity, pixels = "classes", _count_classified(classes)
    data: bytes | None
    size = _reduced_size(height, width, short_side)
    if size is not None:
        from depth_anything.data.transforms import resize_image  # imports torch

        image, data = resize_image(image, *size), None
        if meta.get("intrinsics"):
            meta["intrinsics"] = resize_intrinsics(meta["intrinsics"], (height, width), size)
        label = None if label is None else resize_nearest(label, *size)
        classes = None if classes is None else resize_nearest(classes, *size)
    else:
        data = raw.image if isinstance(raw.image, bytes) and is_plain_rgb(raw.image) else _encode_png(image)
    if label is not None and label.shape != image.shape[:2]:
        meta["label_size"] = list(label.shape)
    meta = {key: value for key, value in meta.items() if value is not None}
    frame = Frame("", image, meta, classes=classes, **({quantity: label} if label is not None else {}))  # type: ignore[arg-type]
    fields = encode_frame(frame, codec="f32", jpeg_quality=JPEG_QUALITY, original=data)
    if raw.captions:
        fields[CAPTION_FIELD] = encode_captions(raw.captions)
    notes = []
    # JPEG has no such properties.
    if isinstance(raw.image, bytes) and not raw.image.startswith(_JPEG_SIGNATURE):
        notes = image_warnings(raw.image, image)
    return EncodedRecord(fields, quantity, meta.get("unit") if quantity else None, pixels, notes)


def mask_invalid(values: np.ndarray, raw: RawSample, *, sky: float) -> tuple[np.ndarray, Counter[str]]:
    """Set the invalid pixels of a label to NaN and its sky pixels to `sky`, and count pixels by kind.

    Each pixel has one kind. In the sky: the last mask of `raw.invalid` that contains it, else sky. Elsewhere: NaN,
    infinite, negative or zero by its value, else the last mask of `raw.invalid` that contains it, else valid.

    Args:
        values: (H, W), any numeric type.
        raw: The masks `sky` and `invalid` of this sample are used.
        sky: Value of sky pixels.

    Returns:
        The label, float32 (H, W), and the number of its pixels by kind.

    Raises:
        ValueError: The values are not a map, or a mask has another size.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"its label has the shape {values.shape}, which is not (H, W)")
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
    is_bad_value = (kind > 0) & (kind < len(names) - 1)
    for name, mask in raw.invalid.items():
        _check_mask(name, mask, values)
        kind[mask & ~is_bad_value] = len(names)
        names.append(name)
    counts = np.bincount(kind.ravel(), minlength=len(names)).tolist()
    out = np.where(kind == 0, values, np.float32(np.nan))
    out[kind == names.index("sky")] = sky
    pixels = Counter({name: count for name, count in zip(names, counts, strict=True) if count})
    pixels["all"] = values.size
    return out, pixels


def _check_classes(classes: np.ndarray, size: tuple[int, int]) -> None:
    """Raise ValueError unless a class map is uint8 of the image's size with a pixel that is not ignored."""
    if classes.dtype != np.uint8 or classes.shape != size:
        rows, columns = (*classes.shape, 0, 0)[:2]
        raise ValueError(
            f"its image has {size[1]} x {size[0]} pixels and its class map {columns} x {rows} ({classes.dtype})"
        )
    if (classes == IGNORED).all():
        raise ValueError("every pixel of its class map is ignored")


def _count_classified(classes: np.ndarray) -> Counter[str]:
    ignored = int((classes == IGNORED).sum())
    counts = Counter({"valid": classes.size - ignored, "all": classes.size})
    return counts + Counter({"ignored": ignored})


def resize_nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a map (H, W), taking the value nearest to the center of each new pixel, as training does."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(values.shape, (height, width), strict=True)
    )
    return values.take(rows, 0).take(columns, 1)


def is_plain_rgb(data: bytes) -> bool:
    """Return whether an image file is upright, opaque, still RGB in a format that records may hold."""
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
    """Return the height and width to which an image is resized; None keeps its size."""
    if short_side is None or min(height, width) < short_side:
        return None
    # A side that is not a multiple of the patch size would be resampled again in training.
    multiple = PATCH_SIZE if short_side % PATCH_SIZE == 0 else 1
    size = resize_shape(height, width, short_side, multiple)
    return size if size != (height, width) else None


def _check_label_size(image: tuple[int, int], label: tuple[int, ...]) -> None:
    """Raise ValueError unless image and label have the same aspect ratio, up to a pixel."""
    if not same_aspect_ratio(image, label):
        raise ValueError(
            f"its image has {image[0]} x {image[1]} pixels and its label {label[0]} x {label[1]}: "
            "the aspect ratios differ"
        )


def _check_mask(name: str, mask: np.ndarray, values: np.ndarray) -> None:
    if mask.shape != values.shape:
        raise ValueError(f"its mask of {name} has the shape {mask.shape}, its label {values.shape}")


def _format_counts(pixels: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in pixels.items() if name != "all")


def _encode_png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()
