"""Optional fields of a label: how much each pixel is trusted, and labels of crops of the image with more detail.

    confidence.u8            confidence of each pixel in [0, 1]
    crops.json               {"image": [height, width], "boxes": [[top, left, height, width], …]}
    crop0.disparity.q12      label of the first box: what a teacher predicts when it sees nothing but that box
    crop0.confidence.u8      its confidence

Boxes are in pixels of the upright image, so that a crop is a plain slice of it. They are drawn from a hash of the
record's key: every process and every machine draws the same ones.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from depth_anything.data import codec as map_codec
from depth_anything.data.codec import CODECS
from depth_anything.data.reader import is_label_field
from depth_anything.data.sample import CONFIDENCE_FIELD
from depth_anything.data.stream import LABEL_CROP, random_uniform
from depth_anything.data.transforms import Crop, crop_encoded_map

CROPS_FIELD = "crops.json"
LABEL_WEIGHTS = ("none", "weight", "mask")
"""How a student uses the confidence of labels: not at all, as the weight of a pixel, or as a mask of valid pixels."""


class Box(NamedTuple):
    """A rectangle in pixels of an upright image."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Return the part of an image (H, W, …) inside the box, as a view."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class LabelOptions:
    """How a student uses the optional fields of labels; the defaults ignore them.

    Attributes:
        weight: One of LABEL_WEIGHTS.
        threshold: With weight="mask", the smallest confidence of a valid pixel.
        crop_share: Share of the samples that see one of the label's crops in place of the whole image.
        local: Add the label of one of the crops to each sample that sees the whole image.
    """

    weight: str = "none"
    threshold: float = 0.5
    crop_share: float = 0.0
    local: bool = False


@dataclass(frozen=True)
class LabelView:
    """What a sample sees of a labeled record: the whole image, or one of the crops of its label.

    Attributes:
        prefix: Begins the names of the label's fields: "" for the whole image, "crop0." for the first crop.
        box: Of that crop; None for the whole image.
    """

    prefix: str = ""
    box: Box | None = None


def key_uniform(key: str, purpose: str, count: int) -> list[float]:
    """Return `count` numbers in [0, 1), at most four, drawn from a hash of a record's key and a purpose."""
    digest = hashlib.sha256(f"{purpose}\n{key}".encode()).digest()
    words = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count))
    return [(word >> 11) * 2.0**-53 for word in words]


def draw_boxes(key: str, height: int, width: int, *, count: int, scale: float) -> list[Box]:
    """Draw square boxes in an image, uniformly over all positions, from a hash of its key.

    Args:
        key: The record's key.
        height: Of the upright image, pixels.
        width: Likewise.
        count: Number of boxes.
        scale: Side of a box as a share of the image's short side, in (0, 1].
    """
    side = max(1, round(scale * min(height, width)))
    boxes = []
    for number in range(count):
        down, right = key_uniform(key, f"crop {number}", 2)
        boxes.append(Box(int(down * (height - side + 1)), int(right * (width - side + 1)), side, side))
    return boxes


def encode_boxes(height: int, width: int, boxes: list[Box]) -> bytes:
    """Encode the boxes of an image of (height, width) pixels as crops.json."""
    return json.dumps({"image": [height, width], "boxes": [list(box) for box in boxes]}).encode()


def decode_boxes(fields: Mapping[str, bytes], height: int, width: int) -> list[Box]:
    """Decode the boxes of a record whose image has (height, width) pixels; [] without crops.json.

    Raises:
        ValueError: It is damaged, was made for an image of another size, or a box is outside the image.
    """
    if CROPS_FIELD not in fields:
        return []
    try:
        content = json.loads(fields[CROPS_FIELD])
        size = [int(side) for side in content["image"]]
        boxes = [Box(*(int(value) for value in box)) for box in content["boxes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{CROPS_FIELD} is damaged") from error
    if size != [height, width]:
        raise ValueError(f"{CROPS_FIELD} is for an image of {size} pixels, not [{height}, {width}]")
    for box in boxes:
        inside = box.top + box.height <= height and box.left + box.width <= width
        if min(box) < 0 or min(box.height, box.width) < 1 or not inside:
            raise ValueError(f"{CROPS_FIELD} has the box {list(box)} outside its image of {size} pixels")
    return boxes


def find_crop_field(fields: Mapping[str, bytes], prefix: str) -> str:
    """Return the name of the disparity of a crop of a record, whose names begin with `prefix`, as "crop0.".

    Raises:
        ValueError: It has none.
    """
    names = (f"{prefix}disparity.{codec}" for codec in CODECS)
    name = next((name for name in names if name in fields), None)
    if name is None:
        raise ValueError(f"{prefix}disparity is missing, but {CROPS_FIELD} has its box")
    return name


def check_label_fields(fields: Mapping[str, bytes], image: tuple[int, int] | None) -> None:
    """Decode the optional fields of a label.

    Args:
        fields: Fields of the record.
        image: (height, width) of its image; None if it is not known.

    Raises:
        ValueError: A field (which is named) is damaged, or a box has no label.
    """
    for name in fields:
        if name == CONFIDENCE_FIELD or (
            is_label_field(name) and name.startswith("crop") and name != CROPS_FIELD
        ):
            try:
                map_codec.decode(fields[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    for number, _ in enumerate(decode_boxes(fields, *image) if image else ()):
        find_crop_field(fields, f"crop{number}.")


def choose_view(
    fields: Mapping[str, bytes], image: tuple[int, int], options: LabelOptions, *, seed: int, n: int
) -> tuple[LabelView, LabelView | None]:
    """Choose what sample `n` sees of a record, and the crop whose label is compared with a part of its prediction.

    Args:
        fields: Fields of the record.
        image: (height, width) of its image, pixels.
        options: How the label is used.
        seed: With `n` determines the choice.
        n: Number of the sample.

    Returns:
        The view of the sample, and the one of the local label; None without `options.local`, without crops, or if the
        sample sees a crop itself.

    Raises:
        ValueError: The crops are damaged.
    """
    whole = LabelView()
    if not options.crop_share and not options.local:
        return whole, None
    boxes = decode_boxes(fields, *image)
    if not boxes:
        return whole, None
    share, which = random_uniform(seed, n, 2, purpose=LABEL_CROP)
    number = int(which * len(boxes))
    crop = LabelView(f"crop{number}.", boxes[number])
    find_crop_field(fields, crop.prefix)
    if share < options.crop_share:
        return crop, None
    return whole, crop if options.local else None


def write_extras(
    fields: Mapping[str, bytes],
    view: LabelView,
    local: LabelView | None,
    crop: Crop,
    *,
    image: tuple[int, int],
    options: LabelOptions,
    out: Mapping[str, np.ndarray],
) -> None:
    """Write what a sample uses of the optional fields into the arrays of a batch of one sample.

    Args:
        fields: Fields of the record.
        view: What the sample sees.
        local: The crop whose label is compared with a part of the prediction; None for none.
        crop: The sample's square.
        image: (height, width) of the whole image, pixels.
        options: How the label is used.
        out: "valid", which a mask changes; "confidence" with weight="weight"; "local" and "local_valid" with `local`;
            "local_confidence" with both. A record without the fields has confidence 1 and no valid local pixel.

    Raises:
        ValueError: A field is damaged.
    """
    name = f"{view.prefix}{CONFIDENCE_FIELD}"
    if options.weight == "weight":
        out["confidence"][0] = 1
        if name in fields:
            crop_encoded_map(fields[name], crop, out=out["confidence"][0])
    elif options.weight == "mask" and name in fields:
        trust = np.empty((crop.side, crop.side), np.float32)
        crop_encoded_map(fields[name], crop, out=trust)
        _mask(out["target"][0], out["valid"][0], trust >= options.threshold)
    if not options.local:
        return
    target, valid = out["local"][0], out["local_valid"][0]
    confidence = out["local_confidence"][0] if options.weight == "weight" else None
    target[:], valid[:] = 0, False
    if confidence is not None:
        confidence[:] = 1
    if local is None or local.box is None:
        return
    disparity = find_crop_field(fields, local.prefix)
    valid[:] = place_crop(fields[disparity], local.box, image, crop, out=target)
    name = f"{local.prefix}{CONFIDENCE_FIELD}"
    if options.weight == "none" or name not in fields:
        return
    placed = np.empty_like(target) if confidence is None else confidence
    place_crop(fields[name], local.box, image, crop, out=placed)
    if options.weight == "mask":
        _mask(target, valid, placed >= options.threshold)


def _mask(target: np.ndarray, valid: np.ndarray, keep: np.ndarray) -> None:
    """Make pixels invalid, and their target 0, as for other invalid pixels."""
    valid &= keep
    np.copyto(target, 0, where=~keep)


def place_crop(data: bytes, box: Box, image: tuple[int, int], crop: Crop, *, out: np.ndarray) -> np.ndarray:
    """Write the map of a box of the image into a sample's square: each pixel the value nearest to its center.

    Args:
        data: The encoded map.
        box: The part of the image that the map covers.
        image: (height, width) of the image, pixels.
        crop: The sample's square in the resized image.
        out: float32 (side, side): the values, 0 outside the box.

    Returns:
        bool (side, side): whether the center of a pixel is inside the box, and its value finite.

    Raises:
        ValueError: The bytes are damaged.
    """
    values = map_codec.decode(data)
    rows, down = _nearest(image[0], crop.height, crop.top, crop.side, box.top, box.height, values.shape[0])
    columns, across = _nearest(
        image[1], crop.width, crop.left, crop.side, box.left, box.width, values.shape[1]
    )
    if crop.flip:
        columns, across = columns[::-1], across[::-1]
    placed = values.take(rows, 0).take(columns, 1)
    inside = down[:, None] & across[None] & np.isfinite(placed)
    out[:] = np.where(inside, placed, 0)
    return inside


def _nearest(
    image: int, frame: int, start: int, count: int, box: int, length: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return for pixels start … start + count - 1 of a resized side the pixel of the crop's map under each center.

    Args:
        image: Side of the image, pixels.
        frame: The same side after resizing.
        start: First pixel of the sample in it.
        count: Pixels of the sample.
        box: Where the box begins, pixels of the image.
        length: Its length.
        size: Side of the crop's map, pixels.

    Returns:
        int64 (count,), clipped to the map, and bool (count,): whether the center is inside the box.
    """
    # Everything times 2 * frame, so that it stays in integers.
    center = (2 * np.arange(start, start + count, dtype=np.int64) + 1) * image - 2 * frame * box
    span = 2 * frame * length
    return (center * size // span).clip(0, size - 1), (center >= 0) & (center < span)
