"""Image preprocessing: resizing and normalization, bit-exact to the official code or to transformers.

Source: `util/transform.py` and `image2tensor` of the official Depth Anything V2 repository; `DPTImageProcessor` of
transformers 5 with the settings of the published models (518, kept aspect ratio, multiples of 14, bicubic).
"""

import math
import os
from typing import Any

import cv2
import numpy as np
from PIL import Image

from depth_anything.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue in [0, 1]."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue in [0, 1]."""


def resize_shape(height: int, width: int, short_side: int = 518, multiple: int = 14) -> tuple[int, int]:
    """Compute the size that the official code resizes an image to.

    The shorter side becomes `short_side` and the longer side is scaled alike. Then each is rounded to a multiple of
    the patch size, half to even, or up where that would fall below `short_side`. The aspect ratio may change slightly.

    Args:
        height: Image height, pixels.
        width: Image width, pixels.
        short_side: Shorter side of the result, pixels.
        multiple: Both sides become multiples of this patch size.

    Returns:
        Height and width, pixels.

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
    """Resize and normalize an image like the official code: in float64, bicubic without antialiasing.

    Args:
        rgb: uint8 (H, W, 3) RGB.
        short_side: As in `resize_shape`.
        multiple: As in `resize_shape`.

    Returns:
        float32 (3, h, w), contiguous, ImageNet-normalized; bicubic overshoot is not clipped.

    Example:
        >>> preprocess_image(np.zeros((20, 30, 3), np.uint8), short_side=28).shape
        (3, 28, 42)
    """
    height, width = resize_shape(rgb.shape[0], rgb.shape[1], short_side, multiple)
    prepared = np.empty((3, height, width), np.float32)
    for channel, (mean, std) in enumerate(
        zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)
    ):  # by channel: an 8K image in float64 is 800 MB
        resized = cv2.resize(rgb[..., channel] / 255.0, (width, height), interpolation=cv2.INTER_CUBIC)
        prepared[channel] = (resized - mean) / std
    return prepared


def transformers_resize_shape(
    height: int, width: int, side: int = 518, multiple: int = 14
) -> tuple[int, int]:
    """Compute the size that transformers resizes an image to.

    Either the height or the width becomes `side`, whichever changes the image less; the other is scaled alike, and
    both are rounded to a multiple of the patch size, half to even. A small image is therefore enlarged until its
    *longer* side has 518 pixels, while the official code enlarges it until its shorter side has.

    Args:
        height: Image height, pixels.
        width: Image width, pixels.
        side: One side of the result before rounding, pixels.
        multiple: Both sides become multiples of this patch size, at least one patch (transformers fails there).

    Returns:
        Height and width, pixels.

    Example:
        >>> transformers_resize_shape(240, 320), resize_shape(240, 320)
        ((392, 518), (518, 686))
        >>> transformers_resize_shape(1500, 2000)
        (518, 686)
    """
    down, across = side / height, side / width
    scale = across if abs(1 - across) < abs(1 - down) else down
    new_height, new_width = (
        max(round(scale * length / multiple), 1) * multiple for length in (height, width)
    )
    return new_height, new_width


def preprocess_transformers(rgb: np.ndarray, side: int = 518, multiple: int = 14) -> np.ndarray:
    """Resize and normalize an image like transformers: bicubic with antialiasing, rounded to uint8, normalized.

    Args:
        rgb: uint8 (H, W, 3) RGB.
        side: As in `transformers_resize_shape`.
        multiple: As in `transformers_resize_shape`.

    Returns:
        float32 (3, h, w), contiguous, ImageNet-normalized.

    Example:
        >>> preprocess_transformers(np.zeros((20, 30, 3), np.uint8), side=28).shape
        (3, 14, 28)
    """
    import torch  # takes half a second with torchvision; the official way needs neither
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import normalize, resize

    shape = transformers_resize_shape(rgb.shape[0], rgb.shape[1], side, multiple)
    image = torch.from_numpy(
        np.array(rgb.transpose(2, 0, 1), order="C")
    )  # a copy, because Pillow's arrays are read-only
    resized = resize(image[None], list(shape), interpolation=InterpolationMode.BICUBIC, antialias=True)
    mean, std = ((torch.tensor(values) * 255).tolist() for values in (IMAGENET_MEAN, IMAGENET_STD))
    return normalize(resized.to(torch.float32), mean, std)[0].numpy()


def to_rgb(image: Any, *, blue_first: bool = False) -> np.ndarray:
    """Check an image array, and convert gray and transparent images like files of that kind.

    Args:
        image: uint8 (H, W, 3); or gray, (H, W) or (H, W, 1), which is repeated; or with alpha as the last channel,
            (H, W, 4) or gray (H, W, 2), which is composited on white.
        blue_first: Channels are in the order of cv2, BGR(A), instead of RGB(A).

    Returns:
        uint8 (H, W, 3) RGB; the array itself if it already is.

    Raises:
        UserError: If the image is anything else: 16-bit values, floats, masks, tensors, other objects.

    Example:
        >>> to_rgb(np.array([[[0, 0, 255, 255], [0, 0, 255, 0]]], np.uint8), blue_first=True).tolist()
        [[[255, 0, 0], [255, 255, 255]]]
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise _image_error(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in image.shape:
        raise _image_error(image)
    if channels == 3:
        return image[..., ::-1] if blue_first else image
    if channels == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    order = {2: [0, 0, 0, 1], 4: [2, 1, 0, 3] if blue_first else [0, 1, 2, 3]}[channels]
    return composite_on_white(image[..., order])


def composite_on_white(rgba: np.ndarray) -> np.ndarray:
    """Composite a transparent image on white.

    Args:
        rgba: uint8 (H, W, 4) RGBA.

    Returns:
        uint8 (H, W, 3).

    Example:
        >>> composite_on_white(np.array([[[0, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)).tolist()
        [[[0, 0, 0], [204, 204, 204]]]
    """
    picture = Image.fromarray(np.ascontiguousarray(rgba))
    white = Image.new("RGBA", picture.size, "white")
    return np.array(Image.alpha_composite(white, picture).convert("RGB"))


def _image_error(image: Any) -> UserError:
    """Build the error that says what was passed instead of an image, and what to do where that is known."""
    expected = "an image must be uint8 of shape (height, width, 3)"
    if isinstance(image, np.ndarray):
        return UserError(f"{expected}, not {image.dtype} of shape {image.shape}")
    kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
    if image is None:
        return UserError(f"{expected}, not None", "cv2.imread returns it for a file that it cannot read")
    if isinstance(image, Image.Image):
        return UserError(f"{expected}, not a PIL image ({kind})", "give np.asarray(image.convert('RGB'))")
    if isinstance(image, str | os.PathLike):
        return UserError(f"{expected}, not the path {str(image)!r}", "read the file first")
    return UserError(f"{expected}, not {kind}", "give a NumPy array")


def _round_to_multiple(side: float, multiple: int, minimum: int) -> int:
    rounded = round(side / multiple) * multiple
    return rounded if rounded >= minimum else math.ceil(side / multiple) * multiple
