"""Which size an image is given, and the numbers the network sees: the authors' way and transformers', to the digit.

Source: `util/transform.py` and `image2tensor` of the official Depth Anything V2 repository; `DPTImageProcessor` of
transformers 5 with the settings of the published models (518, aspect kept, multiples of 14, bicubic).
"""

import math

import cv2
import numpy as np

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
    new_height, new_width = (_round_to(scale * side, multiple, short_side) for side in (height, width))
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


def closest_shape(height: int, width: int, side: int = 518, multiple: int = 14) -> tuple[int, int]:
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


def preprocess_as_transformers(rgb: np.ndarray, side: int = 518, multiple: int = 14) -> np.ndarray:
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

    shape = closest_shape(rgb.shape[0], rgb.shape[1], side, multiple)
    image = torch.from_numpy(
        np.array(rgb.transpose(2, 0, 1), order="C")
    )  # a copy, as Pillow's arrays are read-only
    resized = resize(image[None], list(shape), interpolation=InterpolationMode.BICUBIC, antialias=True)
    mean, std = ((torch.tensor(values) * 255).tolist() for values in (IMAGENET_MEAN, IMAGENET_STD))
    return normalize(resized.to(torch.float32), mean, std)[0].numpy()


def _round_to(side: float, multiple: int, least: int) -> int:
    rounded = round(side / multiple) * multiple
    return rounded if rounded >= least else math.ceil(side / multiple) * multiple
