"""Which size an image is given, and the numbers the network sees: the authors' way and transformers', to the digit.

Source: `util/transform.py` and `image2tensor` of the official Depth Anything V2 repository; `DPTImageProcessor` of
transformers 5 with the settings of the published models (518, aspect kept, multiples of 14, bicubic).
"""

import math
import os
from typing import Any

import cv2
import numpy as np
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue in [0, 1]."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue in [0, 1]."""


def resize_shape(height: int, width: int, short_side: int = 518, multiple: int = 14) -> tuple[int, int]:
    """Compute the size that an image is resized to before the network.

    The shorter side becomes `short_side` and the longer follows; then each is rounded to a multiple of the
    patch, half to even, or up where that would fall below `short_side`. The aspect ratio is therefore kept
    only nearly.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        short_side: at least so many pixels a side.
        multiple: of which both sides shall be; the patch size.

    Returns:
        height and width, pixels.

    Example:
        >>> resize_shape(480, 640)
        (518, 686)
        >>> resize_shape(500, 300)
        (868, 518)
    """
    scale = max(short_side / height, short_side / width)
    new_height, new_width = (
        _round_to_multiple(scale * side, multiple, short_side) for side in (height, width)
    )
    return new_height, new_width


def preprocess_image(rgb: np.ndarray, short_side: int = 518, multiple: int = 14) -> np.ndarray:
    """Resize and normalise an image as the authors do: in float64, bicubic without antialiasing.

    Args:
        rgb: uint8 (H, W, 3), red first.
        short_side: as in `resize_shape`.
        multiple: as in `resize_shape`.

    Returns:
        float32 (3, h, w), contiguous, ImageNet-normalised; bicubic overshoot is not clipped.

    Example:
        >>> preprocess_image(np.zeros((20, 30, 3), np.uint8), short_side=28).shape
        (3, 28, 42)
    """
    height, width = resize_shape(rgb.shape[0], rgb.shape[1], short_side, multiple)
    prepared = np.empty((3, height, width), np.float32)
    for channel, (mean, std) in enumerate(
        zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)
    ):  # 8K in float64 is 800 MB
        resized = cv2.resize(rgb[..., channel] / 255.0, (width, height), interpolation=cv2.INTER_CUBIC)
        prepared[channel] = (resized - mean) / std
    return prepared


def transformers_resize_shape(
    height: int, width: int, side: int = 518, multiple: int = 14
) -> tuple[int, int]:
    """Compute the size that transformers resizes an image to before the network.

    Either the height or the width becomes `side`, whichever changes the image less; the other follows, and both
    are rounded to a multiple of the patch, half to even. A small photograph is therefore enlarged until its
    *longer* side has 518 pixels, where the authors enlarge it until the shorter one has.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        side: what one of the sides becomes, nearly.
        multiple: of which both sides shall be; the patch size. A side is one patch at least, where transformers
            would ask for none and fail.

    Returns:
        height and width, pixels.

    Example:
        >>> closest_shape(240, 320), resize_shape(240, 320)
        ((392, 518), (518, 686))
        >>> closest_shape(1500, 2000)
        (518, 686)
    """
    down, across = side / height, side / width
    scale = across if abs(1 - across) < abs(1 - down) else down
    new_height, new_width = (
        max(round(scale * length / multiple), 1) * multiple for length in (height, width)
    )
    return new_height, new_width


def preprocess_transformers(rgb: np.ndarray, side: int = 518, multiple: int = 14) -> np.ndarray:
    """Resize and normalise an image as transformers does: bicubic with antialiasing, to bytes, then normalised.

    Args:
        rgb: uint8 (H, W, 3), red first.
        side: as in `closest_shape`.
        multiple: as in `closest_shape`.

    Returns:
        float32 (3, h, w), contiguous, ImageNet-normalised.

    Example:
        >>> preprocess_as_transformers(np.zeros((20, 30, 3), np.uint8), side=28).shape
        (3, 14, 28)
    """
    import torch  # half a second with torchvision, which the authors' way does without
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import normalize, resize

    shape = transformers_resize_shape(rgb.shape[0], rgb.shape[1], side, multiple)
    image = torch.from_numpy(
        np.array(rgb.transpose(2, 0, 1), order="C")
    )  # a copy, as Pillow's arrays are read-only
    resized = resize(image[None], list(shape), interpolation=InterpolationMode.BICUBIC, antialias=True)
    mean, std = ((torch.tensor(values) * 255).tolist() for values in (IMAGENET_MEAN, IMAGENET_STD))
    return normalize(resized.to(torch.float32), mean, std)[0].numpy()


def to_rgb(image: Any, *, blue_first: bool = False) -> np.ndarray:
    """Check an image in memory, and convert grey and transparent ones as files of that kind are read.

    Args:
        image: uint8 (H, W, 3); or grey, (H, W) or (H, W, 1), which is repeated; or with an alpha channel at the end,
            (H, W, 4), or grey with alpha, (H, W, 2), where what is transparent shows white.
        blue_first: The channels are blue, green, red and alpha, as cv2 reads them, instead of red, green, blue.

    Returns:
        uint8 (H, W, 3), red first; the array itself where it is so already.

    Raises:
        ValueError: For anything else, of which nothing says what is black and what is white: 16-bit values,
            floats, masks, tensors, other objects.

    Example:
        >>> to_rgb(np.array([[[0, 0, 255, 255], [0, 0, 255, 0]]], np.uint8), blue_first=True).tolist()
        [[[255, 0, 0], [255, 255, 255]]]
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError(f"{_EXPECTED_IMAGE}, not {_describe_object(image)}")
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in image.shape:
        raise ValueError(f"{_EXPECTED_IMAGE}, not {_describe_object(image)}")
    if channels == 3:
        return image[..., ::-1] if blue_first else image
    if channels == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    order = {2: [0, 0, 0, 1], 4: [2, 1, 0, 3] if blue_first else [0, 1, 2, 3]}[channels]
    return composite_on_white(image[..., order])


def composite_on_white(rgba: np.ndarray) -> np.ndarray:
    """Put a transparent image before white.

    Args:
        rgba: uint8 (H, W, 4), alpha last.

    Returns:
        uint8 (H, W, 3).

    Example:
        >>> show_on_white(np.array([[[0, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)).tolist()
        [[[0, 0, 0], [204, 204, 204]]]
    """
    picture = Image.fromarray(np.ascontiguousarray(rgba))
    white = Image.new("RGBA", picture.size, "white")
    return np.array(Image.alpha_composite(white, picture).convert("RGB"))


_EXPECTED_IMAGE = "an image must be uint8 of shape (height, width, 3)"


def _describe_object(image: Any) -> str:
    """Say what was given in place of an image, and what to type where that is known."""
    if isinstance(image, np.ndarray):
        return f"{image.dtype} of shape {image.shape}"
    kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
    if image is None:
        return "None, which cv2.imread gives for a file that it cannot read"
    if isinstance(image, Image.Image):
        return f"a PIL image ({kind}): give np.asarray(image.convert('RGB'))"
    if isinstance(image, str | os.PathLike):
        return f"the path {str(image)!r}: read the file first"
    return f"{kind}: give a NumPy array"


def _round_to_multiple(side: float, multiple: int, least: int) -> int:
    rounded = round(side / multiple) * multiple
    return rounded if rounded >= least else math.ceil(side / multiple) * multiple
