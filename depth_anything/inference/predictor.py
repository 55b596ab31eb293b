"""Predictor: images of any size to depth or disparity maps of the same size."""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depth_anything.data.intrinsics import resize_focal
from depth_anything.errors import Argument, ArgumentWarning, UserError
from depth_anything.inference.focal import assume_focal_length, check_camera, given_focal_length
from depth_anything.inference.memory import check_network_memory
from depth_anything.inference.tiles import Box, blend_tiles, parse_grid
from depth_anything.model.depth_anything import DepthAnything, check_input_size
from depth_anything.preprocess import (
    preprocess_image,
    preprocess_transformers,
    resize_shape,
    to_rgb,
    transformers_resize_shape,
)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PREPROCESSING = {
    "official": (resize_shape, preprocess_image),
    "transformers": (transformers_resize_shape, preprocess_transformers),
}

MAX_ASPECT_RATIO = 32
"""Maximum ratio of an image's sides: the shorter one becomes `input_size`, so a longer image would exhaust memory."""

FARTHEST_M = 1000.0
"""Maximum depth of a calibrated model; a point at negative inverse depth gets it, too."""

NEAREST_M = 1e-4
"""Minimum depth, which keeps its inverse finite."""


class Predictor:
    """Runs a network on images of any size.

    Attributes:
        model: The network, in eval mode on its device.
        device: The device it runs on.
        quantity: "disparity" (larger is nearer) or "depth".
        unit: "m" for depth; "relative" for disparity, which is known up to scale and shift.
        calibrated: True if meters are computed from disparity by the model's calibration.
        canonical_focal: That of the model: its meters depend on the focal length of each image. None: they do not.
        farthest: The maximum possible depth, meters; None for disparity. With a canonical focal length it is that of
            the canonical camera; see `farthest_of`.
        input_size: Length of the shorter side of the network's input, pixels.
    """

    def __init__(
        self,
        model: DepthAnything,
        *,
        device: str = "auto",
        input_size: int | None = None,
        precision: str = "fp32",
        resample: str = "official",
        tiles: int | tuple[int, int] | None = None,
        focal: float | None = None,
        fov: float | None = None,
    ) -> None:
        """Move a network to its device and switch it to eval mode.

        Args:
            model: The network; it is moved, not copied. A relative model with a calibration predicts meters.
            device: "auto" leaves a network on its accelerator, and moves any other to the first accelerator or the CPU;
                else a torch device such as "cuda:1".
            input_size: Length of the shorter side of the network's input, pixels; None takes the model's own. Larger is
                sharper and slower.
            precision: "fp32"; or "bf16" or "fp16" for the matrix products (autocast).
            resample: "official" resizes images, position embeddings and maps as the authors do; "transformers" as its
                depth-estimation pipeline does.
            tiles: Rows and columns of overlapping tiles, each resized to `input_size`, or one number for both; None
                predicts the image as a whole.
            focal: For models with a canonical focal length: the focal length, in pixels, of images for which `predict`
                is given none. None assumes the authors' field of view of 68 degrees, with a warning.
            fov: The same as a horizontal field of view, degrees.

        Raises:
            ValueError: Unknown precision, device or resample; an input size below 1; a grid without tiles; a focal
                length or field of view out of range.
        """
        if precision not in PRECISIONS:
            raise UserError(
                [Argument("precision", repr(precision)), " is unknown"], f"use one of {', '.join(PRECISIONS)}"
            )
        if resample not in PREPROCESSING:
            raise UserError(
                [Argument("resample", repr(resample)), " is unknown"],
                f"use one of {', '.join(PREPROCESSING)}",
            )
        # An argument of each call, not a setting of the model: other threads may run the model with another rule.
        self._forward_options = {} if resample == "official" else {"position_rule": resample}
        if self._forward_options:
            try:
                model.check_position_rule(resample)
            except ValueError as error:
                raise UserError([Argument("resample", repr(resample)), f" is impossible: {error}"]) from error
        self.input_size = check_input_size(model.input_size if input_size is None else input_size)
        self.device = resolve_device(device, model)
        self.model = model.to(self.device).eval()
        self.calibrated = model.calibration is not None
        self.quantity = "depth" if self.calibrated else model.quantity
        self.unit = "m" if self.quantity == "depth" else "relative"
        self.farthest = FARTHEST_M if self.calibrated else model.max_depth
        self.precision = precision
        self.resample = resample
        self.tiles = None if tiles is None else parse_grid(tiles)
        self.canonical_focal = model.canonical_focal
        check_camera(focal, fov)
        self._focal, self._fov, self._has_warned = focal, fov, False

    def predict(self, image: np.ndarray, *, focal: float | None = None) -> np.ndarray:
        """Predict the map of one image.

        Args:
            image: uint8 (H, W, 3), RGB; gray and transparent images are converted by `preprocess.to_rgb`.
            focal: Focal length in pixels of this image, sqrt(fx · fy), for models with a canonical focal length; others
                ignore it. None: that of the predictor.

        Returns:
            float32 (H, W), in the predictor's `quantity` and `unit`.

        Raises:
            ValueError: The array is not such an image, the focal length is not above 0, or the network outputs NaN or
                infinity.
        """
        map = (self.predict_batch([image]) if focal is None else self.predict_batch([image], focals=[focal]))[
            0
        ]
        check_finite(map, "the image", precision=self.precision)
        return map

    def predict_uncalibrated(self, image: np.ndarray) -> np.ndarray:
        """Predict the map of one image without the model's calibration.

        Args:
            image: As for `predict`.

        Returns:
            float32 (H, W), in `model.quantity`.

        Raises:
            ValueError: As for `predict`.
        """
        map = self._predict_maps([image], [self.prepare(image)])[0]
        check_finite(map, "the image", precision=self.precision)
        return map

    def predict_batch(
        self,
        images: Sequence[np.ndarray],
        *,
        prepared: Sequence[np.ndarray] | None = None,
        focals: Sequence[float | None] | None = None,
    ) -> list[np.ndarray]:
        """Predict the maps of several images; those of one input shape run as one batch.

        Args:
            images: Each as for `predict`, of any size; several images in one array have four dimensions.
            prepared: The result of `prepare` for each image, if another thread has computed it already.
            focals: The focal length of each image, as for `predict`.

        Returns:
            The maps in the order of the images, each of its image's size. A map is all NaN if the network outputs NaN
            or infinity anywhere; see `check_finite`.

        Raises:
            ValueError: An array is not an image, `images` is a single image, or there are fewer or more focal lengths.
        """
        if isinstance(images, np.ndarray) and images.ndim != 4:  # else each row would count as a gray image
            raise UserError(
                f"images is one array of shape {images.shape}", "give a list of images, as [image]"
            )
        if not isinstance(images, Sequence | np.ndarray) or isinstance(images, str | bytes):
            raise ValueError(f"images must be a list of images, not a {type(images).__name__}")
        prepared = [self.prepare(image) for image in images] if prepared is None else prepared
        focals = [None] * len(images) if focals is None else focals
        if len(focals) != len(images):
            raise ValueError(f"{len(images)} images need as many focal lengths, not {len(focals)}")
        for focal in focals:
            check_camera(focal, None)
        maps = self._predict_maps(images, prepared)
        return [
            self._to_meters(map, image.shape, focal)
            for map, image, focal in zip(maps, images, focals, strict=True)
        ]

    def farthest_of(self, shape: tuple[int, ...], focal: float | None = None) -> float | None:
        """Return the maximum possible depth of an image of shape (H, W, …) and focal length `focal`, as `farthest`."""
        if self.farthest is None or self.canonical_focal is None:
            return self.farthest
        return self.farthest * self._canonical_factor(shape, focal)

    def input_focal(self, shape: tuple[int, ...], focal: float) -> float:
        """Convert a focal length in pixels of an image of shape (H, W, …) to pixels of the network's input."""
        input_shape, _ = PREPROCESSING[self.resample]
        return resize_focal(
            focal, shape, input_shape(shape[0], shape[1], self.input_size, self.model.multiple)
        )

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resize and normalize an image for the network; thread-safe.

        Args:
            image: As for `predict`.

        Returns:
            float32 (3, h, w).

        Raises:
            ValueError: The array is not such an image, is too elongated, or the input size needs too much memory.
        """
        image = to_rgb(image)
        input_shape, preprocess = PREPROCESSING[self.resample]
        (height, width), multiple = image.shape[:2], self.model.multiple
        rows, columns = input_shape(height, width, self.input_size, multiple)
        if rows * columns > MAX_ASPECT_RATIO * max(self.input_size, multiple) ** 2:
            raise UserError(
                f"an image of {width}x{height} is too elongated: the network's input would be {columns}x{rows}",
                "cut it into pieces",
            )
        if self.device.type == "cpu":
            check_network_memory(rows * columns)
        return preprocess(image, self.input_size, multiple)

    def _predict_maps(self, images: Sequence[np.ndarray], prepared: Sequence[np.ndarray]) -> list[np.ndarray]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, pixels in enumerate(prepared):
            groups.setdefault(pixels.shape, []).append(i)
        maps: dict[int, np.ndarray] = {}
        for group in groups.values():
            outputs = self._forward(np.stack([prepared[i] for i in group]))
            for i, output in zip(group, outputs, strict=True):
                shape = images[i].shape[:2]
                maps[i] = (
                    self._predict_tiles(images[i], output) if self.tiles else self._resize(output, shape)
                )
        return [maps[i] for i in range(len(images))]

    @torch.inference_mode()
    def _forward(self, batch: np.ndarray) -> Tensor:
        """Run the network: (B, 3, h, w) to (B, h, w) on its device."""
        autocast: AbstractContextManager[object] = nullcontext()
        if (dtype := PRECISIONS[self.precision]) is not None:
            autocast = torch.autocast(self.device.type, dtype=dtype)
        with autocast:
            image = torch.from_numpy(batch).to(self.device, next(self.model.parameters()).dtype)
            output = self.model(image, **self._forward_options).float()
        # Resizing, calibration and tiles could hide a single infinity, so the whole map becomes NaN.
        finite = output.isfinite().flatten(1).all(dim=1)
        return output.where(finite[:, None, None], torch.nan)

    @torch.inference_mode()
    def _resize(self, output: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        # The authors' infer_image aligns corners; transformers' post_process_depth_estimation is bicubic.
        official = self.resample == "official"
        mode = "bilinear" if official else "bicubic"
        resized = F.interpolate(output[None, None], size=shape, mode=mode, align_corners=official)
        return resized[0, 0].cpu().numpy()

    def _predict_tiles(self, image: np.ndarray, output: Tensor) -> np.ndarray:
        """Blend tiles in disparity also for depth: far pixels are near zero there and do not dominate the fit."""
        assert self.tiles is not None
        max_depth = self.model.max_depth

        def to_disparity(values: Tensor) -> Tensor:
            return 1 / values.clamp(min=NEAREST_M) if max_depth else values

        def predict_tile(box: Box) -> Tensor:
            return to_disparity(self._forward(self.prepare(image[box])[None])[0])

        joined = blend_tiles(to_disparity(output), predict_tile, image.shape[:2], self.tiles)
        return 1 / np.maximum(joined, 1 / max_depth) if max_depth else joined

    def _to_meters(self, map: np.ndarray, shape: tuple[int, ...], focal: float | None) -> np.ndarray:
        if self.canonical_focal is not None:
            return map * np.float32(self._canonical_factor(shape, focal))
        if self.model.calibration is None:
            return map
        scale, shift = self.model.calibration
        inverse = map.astype(np.float64) * scale + shift
        return (1 / inverse.clip(1 / FARTHEST_M, 1 / NEAREST_M)).astype(np.float32)

    def _canonical_factor(self, shape: tuple[int, ...], focal: float | None) -> float:
        """Return by what the depth of the canonical camera is multiplied for an image: f / F, pixels of the input."""
        assert self.canonical_focal is not None
        if focal is None:
            given = given_focal_length(shape, focal_px=self._focal, fov_deg=self._fov)
            focal = given.pixels if given else self._assume_focal(shape)
        return self.input_focal(shape, focal) / self.canonical_focal

    def _assume_focal(self, shape: tuple[int, ...]) -> float:
        focal = assume_focal_length(shape).pixels
        if not self._has_warned:
            self._has_warned = True
            degrees = 2 * math.degrees(math.atan(shape[1] / 2 / focal))
            warnings.warn(
                ArgumentWarning(
                    f"the model's meters are proportional to the focal length, and that of an image of "
                    f"{shape[1]}x{shape[0]} is not known: {focal:.0f} px ({degrees:.0f} degrees across) are assumed, "
                    "here and for further such images",
                    ["give ", Argument("focal", "PIXELS"), " or ", Argument("fov", "DEGREES")],
                ),
                stacklevel=2,
            )
        return focal


def check_finite(map: np.ndarray, name: str, *, precision: str) -> None:
    """Refuse a map with NaN or infinity.

    Args:
        map: (H, W), as `Predictor.predict_batch` returns it.
        name: Name of the image, for the error.
        precision: Precision that the network ran with.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    if np.isfinite(map).all():
        return
    fix = "try --precision fp32"
    if precision == "fp32":
        fix = "it ran with --precision fp32, so the weights are damaged or their training diverged"
    raise UserError(f"the network outputs NaN or infinity for {name}", fix)


def resolve_device(name: str, model: nn.Module) -> torch.device:
    """Return the device that a name means for a model; see `Predictor`. Raises UserError if there is none."""
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
            raise UserError(
                [Argument("device", repr(name)), " does not exist here"], "use auto, cpu, cuda or cuda:1"
            ) from error
        return device
    current = next(model.parameters()).device
    if current.type != "cpu":
        return current
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
