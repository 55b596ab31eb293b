"""Augmentation: resize, crop and flip on the CPU in loader workers, color perturbations and CutMix on the device.

The worker draws every random choice about sample n from (seed, n) and sends the numbers with the batch; the device
applies them to the whole micro-batch without synchronizing with the CPU.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from depth_anything.data import codec
from depth_anything.data.stream import (
    CROP,
    CUTMIX,
    PATCH_ORDER,
    PERTURBATION,
    RESIZED_CROP,
    permutation,
    random_uniform,
)
from depth_anything.preprocess import IMAGENET_MEAN, IMAGENET_STD

# The strengths of UniMatch (`dataset/semi.py`), by V1's first author; the papers of V1 and V2 give none. The kernel of
# the blur reaches 6 px to each side, three times the largest sigma.
BRIGHTNESS = CONTRAST = SATURATION = 0.5
HUE = 0.25
BLUR_SIGMA = (0.1, 2.0)
BLUR_RADIUS = 6
PERTURBATIONS = ("brightness", "contrast", "saturation", "hue", "gray", "sigma")  # columns of a perturbation
_CROP_ATTEMPTS, _CROP_ASPECT = 10, 4 / 3  # as torchvision's RandomResizedCrop
_LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision


@dataclass(frozen=True)
class Crop:
    """The square that a sample shows of its resized frame, in pixels."""

    height: int  # of the whole frame after resizing
    width: int
    top: int
    left: int
    side: int
    flip: bool  # mirrored left to right


def draw_crop(height: int, width: int, side: int, *, seed: int, n: int) -> Crop:
    """Draw sample `n`'s square of `side` px in a frame of (height, width); half of all squares are flipped."""
    down, right, mirror = random_uniform(seed, n, 3, purpose=CROP)
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    return Crop(height, width, top, left, side, bool(mirror < 0.5))


def draw_resized_crop(
    height: int, width: int, *, area: tuple[float, float], seed: int, n: int
) -> tuple[int, int, int, int, bool]:
    """Draw sample `n`'s rectangle in an image of (height, width), as torchvision's RandomResizedCrop.

    Args:
        height: Rows of the image.
        width: Columns of the image.
        area: Smallest and largest share of the image that the rectangle covers; its aspect ratio is between 3 / 4
            and 4 / 3.
        seed: Seed of the run.
        n: Number of the sample.

    Returns:
        (top, left, height, width) in pixels, and whether the crop is mirrored. An image of extreme aspect, in which ten
        rectangles do not fit, gives its central part of the nearest allowed aspect.
    """
    mirror, down, right, *draws = random_uniform(seed, n, 3 + 2 * _CROP_ATTEMPTS, purpose=RESIZED_CROP)
    flip = bool(mirror < 0.5)
    for share, shape in zip(draws[::2], draws[1::2], strict=True):
        pixels = height * width * (area[0] + share * (area[1] - area[0]))
        aspect = _CROP_ASPECT ** (2 * shape - 1)
        rows, columns = round((pixels / aspect) ** 0.5), round((pixels * aspect) ** 0.5)
        if 0 < rows <= height and 0 < columns <= width:
            return int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns, flip
    rows, columns = min(height, round(width * _CROP_ASPECT)), min(width, round(height * _CROP_ASPECT))
    return (height - rows) // 2, (width - columns) // 2, rows, columns, flip


def crop_and_resize(
    image: np.ndarray, crop: tuple[int, int, int, int, bool], side: int, *, out: np.ndarray
) -> None:
    """Cut a rectangle of `draw_resized_crop` out of uint8 (H, W, 3), and resize it to `out`, uint8 (side, side, 3)."""
    top, left, height, width, flip = crop
    square = resize_image(np.ascontiguousarray(image[top : top + height, left : left + width]), side, side)
    if flip:
        cv2.flip(np.ascontiguousarray(square), 1, dst=out)
    else:
        out[:] = square


def draw_patch_order(patches: int, *, seed: int, n: int) -> np.ndarray:
    """Draw sample `n`'s random order of its patches, int64 (patches,): masked autoencoding sees the first ones."""
    return permutation(patches, seed, PATCH_ORDER, n)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 (H, W, 3) by antialiased bicubic; an image of that size is returned unchanged."""
    if image.shape[:2] == (height, width):
        return image
    # The batch axis is added first: then PyTorch sees channels_last strides and uses its fast uint8 kernel.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return pixels.permute(0, 2, 3, 1)[0].numpy()


def crop_image(image: np.ndarray, crop: Crop, *, out: np.ndarray | None = None) -> np.ndarray:
    """Resize an image, uint8 (H, W, 3), and cut the square out of it: uint8 (side, side, 3), contiguous.

    Args:
        image: Resized by antialiased bicubic, unless it already has the size of the frame.
        crop: The square.
        out: Array for the result.
    """
    out = np.empty((crop.side, crop.side, 3), np.uint8) if out is None else out
    image = resize_image(image, crop.height, crop.width)
    square = image[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    if crop.flip:
        return cv2.flip(square, 1, dst=out)  # 30 times as fast as NumPy for three-byte pixels
    out[:] = square
    return out


def crop_map(values: np.ndarray, crop: Crop) -> np.ndarray:
    """Cut the square out of a map (H, W): (side, side), each pixel the value nearest to its center.

    Values are never interpolated, so edges stay sharp, and unknown or infinite pixels do not spread. cv2's
    INTER_NEAREST, which the authors use, shifts the map by up to half a pixel to the upper left of the image.
    """
    if values.shape == (crop.height, crop.width):  # true for most labels, and four times as fast
        square = values[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
        return np.ascontiguousarray(square[:, ::-1] if crop.flip else square)
    rows = _nearest_indices(values.shape[0], crop.height, crop.top, crop.side)
    columns = _nearest_indices(values.shape[1], crop.width, crop.left, crop.side)
    return values.take(rows, 0).take(columns[::-1] if crop.flip else columns, 1)


def crop_encoded_map(data: bytes, crop: Crop, *, out: np.ndarray) -> None:
    """Decode only the square of an encoded map, into `out`, float32 (side, side); equals `crop_map(decode(data))`.

    Raises:
        ValueError: The bytes are damaged, or not of that format.
    """
    height, width = codec.map_size(data)
    if (height, width) == (crop.height, crop.width):
        across = slice(crop.left, crop.left + crop.side)
        values = codec.decode(data, rows=slice(crop.top, crop.top + crop.side), columns=across)
        if crop.flip:
            cv2.flip(values, 1, dst=out)
        else:
            out[:] = values
        return
    rows = _nearest_indices(height, crop.height, crop.top, crop.side)
    columns = _nearest_indices(width, crop.width, crop.left, crop.side)
    top, left = int(rows[0]), int(columns[0])
    part = codec.decode(data, rows=slice(top, int(rows[-1]) + 1), columns=slice(left, int(columns[-1]) + 1))
    columns = columns[::-1] if crop.flip else columns
    np.take(part.take(rows - top, 0), columns - left, 1, out=out, mode="clip")


def _nearest_indices(source: int, target: int, start: int, count: int) -> np.ndarray:
    """Return the `source` pixels under the centers of pixels start … start + count - 1 of `target`."""
    return (2 * np.arange(start, start + count) + 1) * source // (2 * target)


def draw_perturbation(seed: int, n: int) -> np.ndarray:
    """Draw sample `n`'s perturbation, float32 (6,), columns as in PERTURBATIONS.

    Colors are jittered in 80 % of all samples, 20 % become gray and 50 % are blurred, independently. The values
    1, 1, 1, 0, 0, 0 change nothing.
    """
    jitter, light, contrast, saturation, hue, gray, blur, sigma = random_uniform(
        seed, n, 8, purpose=PERTURBATION
    )
    values = [1.0, 1.0, 1.0, 0.0, float(gray < 0.2), 0.0]
    if jitter < 0.8:
        values[0] += BRIGHTNESS * (2 * light - 1)
        values[1] += CONTRAST * (2 * contrast - 1)
        values[2] += SATURATION * (2 * saturation - 1)
        values[3] += HUE * (2 * hue - 1)
    if blur < 0.5:
        values[5] = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * sigma
    return np.array(values, np.float32)


def normalize(image: torch.Tensor, perturbation: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the input of the network: ImageNet-normalized float32 (B, 3, H, W) on the device of the image.

    Args:
        image: uint8 (B, H, W, 3), RGB. The result keeps its memory order, which is channels_last.
        perturbation: float32 (B, 6) of `draw_perturbation`, applied first.
    """
    unit = image.permute(0, 3, 1, 2).float() / 255
    if perturbation is not None:
        unit = perturb(unit, perturbation)
    shift, scale = _imagenet_constants(image.device)
    return torch.addcmul(shift, unit, scale)


@cache
def _imagenet_constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -mean / std and 1 / std; cached, because copying them to the device would synchronize with the CPU."""
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return -mean / std, 1 / std


def perturb(image: torch.Tensor, perturbation: torch.Tensor) -> torch.Tensor:
    """Jitter the colors of images, turn them gray and blur them, each by its own row of `perturbation`.

    The steps are torchvision's, in the order of the columns (its ColorJitter shuffles the first four).

    Args:
        image: float (B, 3, H, W), RGB in [0, 1], sides over 6 px.
        perturbation: float (B, 6): factors of brightness, contrast and saturation, shift of the hue in cycles, 1 for
            gray, and the sigma of the blur in pixels (up to 2), 0 for none.
    """
    brightness, contrast, saturation, hue, gray, sigma = (
        perturbation.to(image.dtype).view(-1, 6, 1, 1, 1).unbind(1)
    )
    image = (image * brightness).clamp(0, 1)
    mean = _luma(image).mean((2, 3), keepdim=True)
    image = torch.lerp(mean, image, contrast).clamp(0, 1)
    image = torch.lerp(_luma(image), image, saturation).clamp(0, 1)
    image = _shift_hue(image, hue)
    image = torch.lerp(image, _luma(image), gray)
    return _blur(image, sigma)


def _luma(image: torch.Tensor) -> torch.Tensor:
    red, green, blue = image.split(1, 1)
    return _LUMA_WEIGHTS[0] * red + _LUMA_WEIGHTS[1] * green + _LUMA_WEIGHTS[2] * blue


def _shift_hue(image: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Shift the hue by `shift` cycles, (B, 1, 1, 1); value and saturation (of HSV) stay the same."""
    high, low = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = (image / chroma.clamp_min(1e-12)).split(1, 1)
    sixths = torch.where(
        image[:, :1] == high,
        green - blue,
        torch.where(image[:, 1:2] == high, 2 + blue - red, 4 + red - green),
    )
    sixths = torch.cat([sixths + start for start in (5, 3, 1)], 1) + 6 * shift
    sixths = sixths.remainder(6)
    return high - chroma * torch.minimum(sixths, 4 - sixths).clamp(0, 1)


def _blur(image: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image by a Gaussian of its own `sigma`, (B, 1, 1, 1) in pixels; the border is reflected."""
    batch, channels, height, width = image.shape
    reach = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=image.device, dtype=image.dtype)
    # With sigma 0 the center weight is 1 and the others are 0.
    kernel = torch.exp(-0.5 * (reach / sigma.view(-1, 1).clamp_min(1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = F.pad(image, [BLUR_RADIUS] * 4, mode="reflect").reshape(
        1, batch * channels, height + 12, width + 12
    )
    with torch.autocast(
        image.device.type, enabled=False
    ):  # half precision would cause banding in smooth skies
        planes = F.conv2d(planes, kernel[:, None, :, None], groups=batch * channels)
        planes = F.conv2d(planes, kernel[:, None, None, :], groups=batch * channels)
    return planes.reshape(image.shape)


def draw_cutmix_box(seed: int, n: int) -> np.ndarray:
    """Draw sample `n`'s CutMix box, float32 (4,): top, left, bottom, right as fractions of the sides.

    Half of the boxes are empty; the others cover 2 to 40 % of the image, with an aspect ratio of at most 3.
    """
    mix, area, aspect, down, right = random_uniform(seed, n, 5, purpose=CUTMIX)
    if mix >= 0.5:
        return np.zeros(4, np.float32)
    area, aspect = 0.02 + 0.38 * area, 3 ** (2 * aspect - 1)
    height, width = min(1.0, (area * aspect) ** 0.5), min(1.0, (area / aspect) ** 0.5)
    top, left = down * (1 - height), right * (1 - width)
    return np.array([top, left, top + height, left + width], np.float32)


def apply_cutmix(batch: dict[str, torch.Tensor], box: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fill each sample's box from the previous sample of the micro-batch (the first one's from the last).

    The two parts have disparities of different scale and shift: compute the loss of `valid & region` and that of
    `valid & ~region` separately (V1, equations 5 to 8), never over both at once.

    Args:
        batch: Images (B, 3, H, W) and maps (B, H, W), float or bool, "target" among them; all are mixed.
        box: float (B, 4) of `draw_cutmix_box`.

    Returns:
        The mixed batch, and "region", bool (B, H, W): the pixels inside the box.
    """
    height, width = batch["target"].shape[-2:]
    top, left, bottom, right = box[:, :, None].unbind(1)
    y = (torch.arange(height, device=box.device) + 0.5) / height
    x = (torch.arange(width, device=box.device) + 0.5) / width
    region = ((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None, :]
    inside = {3: region, 4: region[:, None]}
    mixed = {name: torch.where(inside[v.ndim], v.roll(1, 0), v) for name, v in batch.items()}
    return {**mixed, "region": region}
