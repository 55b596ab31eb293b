"""Class maps of images of any size: windows that overlap, several scales, and mirrored images, averaged."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from depth_anything.data.transforms import normalize, resize_image
from depth_anything.errors import Argument, UserError
from depth_anything.inference.memory import check_network_memory
from depth_anything.inference.predictor import MAX_ASPECT_RATIO, PRECISIONS, resolve_device
from depth_anything.model.depth_anything import check_input_size
from depth_anything.model.segmentation import SegmentationModel
from depth_anything.preprocess import resize_shape, to_rgb

MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Factors of the multi-scale evaluation of V1's semseg/, which also mirrors the image."""


class SegmentationPredictor:
    """Runs a segmentation network on images of any size.

    Attributes:
        model: The network, in eval mode on its device.
        device: The device it runs on.
        quantity: "classes".
        unit: "class".
        classes: The classes.
        input_size: Side of the square windows, pixels.
        scales: Factors of the short side; scores are averaged over them.
        flip: Whether the mirrored image is averaged, too.
    """

    quantity = "classes"
    unit = "class"
    calibrated = False
    canonical_focal = None
    farthest = None
    resample = "training"
    tiles = None

    def __init__(
        self,
        model: SegmentationModel,
        *,
        device: str = "auto",
        input_size: int | None = None,
        stride: int | None = None,
        short_side: int | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        precision: str = "fp32",
    ) -> None:
        """Move a network to its device and switch it to eval mode.

        Args:
            model: The network; it is moved, not copied.
            device: As for `Predictor`.
            input_size: Side of the windows, pixels, a multiple of the patch; None: the model's own.
            stride: Pixels from one window to the next; None: the model's own.
            short_side: Images are resized to this shorter side, pixels; None: the model's own rule.
            scales: Factors of the short side, such as `MULTI_SCALES`.
            flip: Also predict the mirrored image.
            precision: "fp32", "bf16" or "fp16".

        Raises:
            ValueError: Unknown precision or device, or sizes below 1.
        """
        if precision not in PRECISIONS:
            raise UserError(
                [Argument("precision", repr(precision)), " is unknown"], f"use one of {', '.join(PRECISIONS)}"
            )
        side = check_input_size(model.input_size if input_size is None else input_size)
        self.input_size = max(1, round(side / model.multiple)) * model.multiple
        self.stride = min(
            self.input_size, check_input_size(model.window.stride if stride is None else stride)
        )
        self.short_side = model.window.short_side if short_side is None else check_input_size(short_side)
        if not scales or not all(0 < scale <= 16 for scale in scales):
            raise UserError(f"scales={list(scales)} must be factors above 0", "use 1.0")
        self.scales, self.flip, self.precision = tuple(scales), flip, precision
        self.device = resolve_device(device, model)
        self.model = model.to(self.device).eval()
        self.classes = model.classes

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Predict the class of each pixel of an image, uint8 (H, W, 3) RGB: uint8 (H, W).

        Raises:
            ValueError: The array is no image, or the network outputs NaN or infinity.
        """
        return self.predict_batch([image])[0]

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Convert an image to RGB and check that it can be predicted; thread-safe.

        Raises:
            ValueError: The array is no image, is too elongated, or needs too much memory.
        """
        image = to_rgb(image)
        if max(image.shape[:2]) > MAX_ASPECT_RATIO * min(image.shape[:2]):
            raise UserError(
                f"an image of {image.shape[1]}x{image.shape[0]} is too elongated", "cut it into pieces"
            )
        if self.device.type == "cpu":
            check_network_memory(self.input_size**2)
        return image

    def predict_batch(
        self, images: Sequence[np.ndarray], *, prepared: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Predict the classes of several images, one after another; those of one image are uint8 (H, W)."""
        return [
            self.predict_scores(image).argmax(0).to(torch.uint8).cpu().numpy()
            for image in (map(self.prepare, images) if prepared is None else prepared)
        ]

    @torch.inference_mode()
    def predict_scores(self, image: np.ndarray) -> Tensor:
        """Score the classes of each pixel: the mean over windows, scales and mirror images.

        Args:
            image: uint8 (H, W, 3), RGB.

        Returns:
            float32 (K, H, W) on the device.

        Raises:
            UserError: The network outputs NaN or infinity.
        """
        total: Tensor | None = None
        for scale in self.scales:
            resized = resize_image(np.ascontiguousarray(image), *self._resized_shape(image.shape, scale))
            pixels = normalize(torch.from_numpy(resized)[None].to(self.device))
            for mirrored in (False, True) if self.flip else (False,):
                scores = self._slide(pixels.flip(3) if mirrored else pixels)
                scores = scores.flip(3) if mirrored else scores
                scores = F.interpolate(scores, size=image.shape[:2], mode="bilinear", align_corners=False)[0]
                total = scores if total is None else total + scores
        assert total is not None
        if not bool(torch.isfinite(total).all()):
            fix = "try --precision fp32" if self.precision != "fp32" else "its training diverged"
            raise UserError("the network outputs NaN or infinity", fix)
        return total / (len(self.scales) * (1 + self.flip))

    def _resized_shape(self, shape: Sequence[int], scale: float) -> tuple[int, int]:
        multiple = self.model.multiple
        side = scale * (self.short_side or min(shape[:2]))
        return resize_shape(shape[0], shape[1], max(1, round(side / multiple)) * multiple, multiple)

    def _slide(self, pixels: Tensor) -> Tensor:
        """Average the scores of windows over (1, 3, h, w): (1, K, h, w)."""
        height, width = pixels.shape[2:]
        tops, lefts = (window_starts(side, self.input_size, self.stride) for side in (height, width))
        if len(tops) == len(lefts) == 1:
            return self._forward(pixels)
        total = pixels.new_zeros((1, len(self.classes), height, width))
        count = pixels.new_zeros((1, 1, height, width))
        for top in tops:
            for left in lefts:
                window = (..., slice(top, top + self.input_size), slice(left, left + self.input_size))
                total[window] += self._forward(pixels[window])
                count[window] += 1
        return total / count

    def _forward(self, pixels: Tensor) -> Tensor:
        autocast: AbstractContextManager[object] = nullcontext()
        if (dtype := PRECISIONS[self.precision]) is not None:
            autocast = torch.autocast(self.device.type, dtype=dtype)
        with autocast:
            return self.model(pixels.to(next(self.model.parameters()).dtype)).float()


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows start along a side: every `stride` pixels, the last one at the end of the side.

    Example:
        >>> window_starts(1024, 896, 518)
        [0, 128]
    """
    if length <= window:
        return [0]
    count = -(-(length - window) // stride) + 1
    return [min(number * stride, length - window) for number in range(count)]
