"""Class maps in files: the PNG of a record, and label maps of other data sets.

A class map is uint8 (H, W); see `depth_anything.classes`.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from depth_anything.data.image_headers import check_decode_cost, open_image, picture_decode_cost

CLASSES_FIELD = "classes.png"
"""Field of a record that holds its class map: an 8-bit gray PNG."""


def encode_classes(classes: np.ndarray) -> bytes:
    """Encode a class map, uint8 (H, W), as an 8-bit gray PNG; always the same bytes for the same map."""
    if classes.dtype != np.uint8 or classes.ndim != 2:
        raise ValueError(f"a class map is uint8 (H, W), not {classes.dtype} {classes.shape}")
    return cv2.imencode(".png", classes, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def decode_classes(data: bytes) -> np.ndarray:
    """Decode the `classes.png` of a record, uint8 (H, W).

    Raises:
        ValueError: It is damaged, too large, or not an 8-bit gray PNG.
    """
    return read_label_png(data, modes=("L",)).astype(np.uint8, copy=False)


def read_label_png(data: bytes, *, modes: Sequence[str] = ("L", "P", "I", "I;16", "1")) -> np.ndarray:
    """Decode a PNG of label numbers: gray of 1, 8 or 16 bits, or indices into a palette, unchanged.

    Args:
        data: The file.
        modes: Allowed modes, as Pillow names them. Color is refused: its values are no numbers of classes.

    Returns:
        uint8 or int32 (H, W).

    Raises:
        ValueError: The file is no such PNG, or damaged.
    """
    try:
        picture = open_image(data)
        if picture.format != "PNG":
            raise ValueError(f"it is a {picture.format}, not a PNG: other formats may change the numbers")
        if picture.mode not in modes:
            raise ValueError(f"its pixels are {picture.mode}, not numbers of classes (gray, or a palette)")
        check_decode_cost(picture_decode_cost(picture, data))
        values = np.array(picture)
    except MemoryError as error:
        raise ValueError("there is not enough memory to decode it") from error
    except ValueError:
        raise
    except Exception as error:  # hostile bytes make Pillow raise a dozen types
        raise ValueError(f"it cannot be decoded: {error or type(error).__name__}") from error
    return values if values.dtype == np.uint8 else values.astype(np.int32)


def map_labels(values: np.ndarray, numbers: Mapping[int, int], *, what: str = "label map") -> np.ndarray:
    """Replace stored numbers by numbers of classes.

    Args:
        values: Integers (H, W), at least 0.
        numbers: Stored number to class, or to `IGNORED`. All stored numbers must be in it.
        what: Name of the map, for the error.

    Returns:
        uint8 (H, W).

    Raises:
        ValueError: A pixel has a number that is not in `numbers`; it is named.
    """
    highest = max(int(values.max(initial=0)), max(numbers, default=0))
    if int(values.min(initial=0)) < 0 or highest > 65535:
        raise ValueError(f"its {what} has numbers from {values.min()} to {values.max()}")
    lookup = np.full(highest + 1, -1, np.int16)
    for stored, number in numbers.items():
        if stored >= 0:
            lookup[stored] = number
    mapped = lookup[values]
    if (mapped < 0).any():
        unknown = np.unique(values[mapped < 0]).tolist()
        shown = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        raise ValueError(f"its {what} has numbers that are no class: {shown}")
    return mapped.astype(np.uint8)
