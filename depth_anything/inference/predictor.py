"""From photographs to maps of their own size."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from depth_anything.errors import Argument, UserError
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
"""Of an image's sides. As the shorter one is enlarged to `input_size`, a longer image would fill any memory."""

FARTHEST_M = 1000.0
"""What a calibrated model puts beyond stands here, as does what it puts behind the camera."""

NEAREST_M = 1e-4
"""No depth is smaller, so that its inverse is a number."""


class Predictor:
    """A network ready for photographs of any size.

    Attributes:
        model: The network, in eval mode on its device.
        device: Where it runs.
        quantity: "disparity" (larger is nearer) or "depth".
        unit: "m" for depth; "relative" for disparity, which is known up to a scale and a shift.
        calibrated: Whether metres come from disparity, by the scale and shift that the model was given.
        farthest: The largest depth possible, metres; None for disparity.
        input_size: What the shorter side of an image becomes, pixels.
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
    ) -> None:
        """Move a network to its device and put it into eval mode.

        Args:
            model: The network; moved, not copied. A relative one that is calibrated gives metres.
            device: "auto" leaves a network that is on an accelerator there, and takes the first accelerator,
                else the CPU, for any other; or what torch calls a device, as "cuda:1".
            input_size: What the shorter side of an image becomes, pixels; None takes the size that the model was
                made for. More is sharper and slower.
            precision: "fp32", or "bf16" or "fp16" for the matrix products.
            resample: "official" resizes images, positions and maps as the authors do; "transformers" as its
                depth-estimation pipeline does.
            tiles: Rows and columns of overlapping tiles, each seen at `input_size`, or one number for both; None
                sees the image as a whole.

        Raises:
            ValueError: For a precision, device or way to resample that does not exist, a size below 1, or a grid
                without tiles.
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
        # Given to each call, as other threads may run the same model by another rule. A timm ViT has one of its own.
        self._rule = {} if resample == "official" else {"position_rule": resample}
        try:
            model.check_position_rule(self._rule.get("position_rule", model.position_rule))
        except ValueError as error:
            raise UserError([Argument("resample", repr(resample)), f" cannot be: {error}"]) from error
        self.input_size = check_input_size(model.input_size if input_size is None else input_size)
        self.device = _resolve_device(device, model)
        self.model = model.to(self.device).eval()
        self.calibrated = model.calibration is not None
        self.quantity = "depth" if self.calibrated else model.quantity
        self.unit = "m" if self.calibrated else model.unit
        self.farthest = FARTHEST_M if self.calibrated else model.max_depth
        self.precision = precision
        self.resample = resample
        self.tiles = None if tiles is None else parse_grid(tiles)

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Predict one image's map.

        Args:
            image: uint8 (H, W, 3), RGB; grey and transparent images are taken as `preprocess.to_rgb` says.

        Returns:
            float32 (H, W): what `quantity` and `unit` say.

        Raises:
            ValueError: For an array that is no such image, or a network that gives NaN or infinity for it.
        """
        map = self.predict_batch([image])[0]
        check_finite(map, "the image", precision=self.precision)
        return map

    def predict_uncalibrated(self, image: np.ndarray) -> np.ndarray:
        """Predict one image's map as the network gives it, without the model's calibration.

        Args:
            image: As `predict` takes it.

        Returns:
            float32 (H, W): what `model.quantity` says.

        Raises:
            ValueError: As `predict`.
        """
        map = self._maps([image], [self.prepare(image)])[0]
        check_finite(map, "the image", precision=self.precision)
        return map

    def predict_batch(
        self, images: Sequence[np.ndarray], *, prepared: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Predict the maps of several images; those that the network sees at one size run as one batch.

        Args:
            images: Each as `predict` takes it; sizes may differ. Several in one array have four dimensions.
            prepared: What `prepare` made of each, where another thread has done so already.

        Returns:
            A map for each image, in the same order and each of its image's size. It holds NaN if the network gave NaN
            or infinity anywhere in it; `check_numbers` tells.

        Raises:
            ValueError: For an array that is no image, or a single image in place of several.
        """
        if isinstance(images, np.ndarray) and images.ndim != 4:  # else each row would be a grey image
            raise ValueError(
                f"images is one array of shape {images.shape}: give a list of images, as [image]"
            )
        if not isinstance(images, Sequence | np.ndarray) or isinstance(images, str | bytes):
            raise ValueError(f"images must be a list of images, not a {type(images).__name__}")
        prepared = [self.prepare(image) for image in images] if prepared is None else prepared
        return [self._in_metres(map) for map in self._maps(images, prepared)]

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resize and normalise an image for the network; any thread may.

        Args:
            image: As `predict` takes it.

        Returns:
            float32 (3, h, w).

        Raises:
            ValueError: For an array that is no such image, one that is too long, or too large a size for the memory.
        """
        image = to_rgb(image)
        shape_of, preprocess = PREPROCESSING[self.resample]
        (height, width), multiple = image.shape[:2], self.model.multiple
        seen = shape_of(height, width, self.input_size, multiple)
        if seen[0] * seen[1] > MAX_ASPECT_RATIO * max(self.input_size, multiple) ** 2:
            raise ValueError(
                f"{width}x{height} is too long an image: it would be seen at {seen[1]}x{seen[0]}; cut it into pieces"
            )
        if self.device.type == "cpu":
            check_network_memory(seen[0] * seen[1])
        return preprocess(image, self.input_size, multiple)

    def _maps(self, images: Sequence[np.ndarray], prepared: Sequence[np.ndarray]) -> list[np.ndarray]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, pixels in enumerate(prepared):
            groups.setdefault(pixels.shape, []).append(i)
        maps: dict[int, np.ndarray] = {}
        for group in groups.values():
            outputs = self._run(np.stack([prepared[i] for i in group]))
            for i, output in zip(group, outputs, strict=True):
                shape = images[i].shape[:2]
                maps[i] = self._tiled(images[i], output) if self.tiles else self._resize(output, shape)
        return [maps[i] for i in range(len(images))]

    @torch.inference_mode()
    def _run(self, batch: np.ndarray) -> Tensor:
        """Images to maps of the size that the network sees, on its device."""
        autocast: AbstractContextManager[object] = nullcontext()
        if (dtype := PRECISIONS[self.precision]) is not None:
            autocast = torch.autocast(self.device.type, dtype=dtype)
        with autocast:
            image = torch.from_numpy(batch).to(self.device, next(self.model.parameters()).dtype)
            output = self.model(image, **self._rule).float()
        # Resizing, calibration and tiles would hide a single infinity: the whole map becomes NaN instead.
        sound = output.isfinite().flatten(1).all(dim=1)
        return output.where(sound[:, None, None], torch.nan)

    @torch.inference_mode()
    def _resize(self, output: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        # The authors' infer_image aligns corners; transformers' post_process_depth_estimation is cubic.
        official = self.resample == "official"
        mode = "bilinear" if official else "bicubic"
        resized = F.interpolate(output[None, None], size=shape, mode=mode, align_corners=official)
        return resized[0, 0].cpu().numpy()

    def _tiled(self, image: np.ndarray, output: Tensor) -> np.ndarray:
        """Join tiles in disparity, whatever the network gives: there the far is near zero and cannot pull."""
        assert self.tiles is not None
        max_depth = self.model.max_depth

        def disparity(values: Tensor) -> Tensor:
            return 1 / values.clamp(min=NEAREST_M) if max_depth else values

        def tile_at(box: Box) -> Tensor:
            return disparity(self._run(self.prepare(image[box])[None])[0])

        joined = blend_tiles(disparity(output), tile_at, image.shape[:2], self.tiles)
        return 1 / np.maximum(joined, 1 / max_depth) if max_depth else joined

    def _in_metres(self, map: np.ndarray) -> np.ndarray:
        if self.model.calibration is None:
            return map
        scale, shift = self.model.calibration
        inverse = map.astype(np.float64) * scale + shift
        return (1 / inverse.clip(1 / FARTHEST_M, 1 / NEAREST_M)).astype(np.float32)


def check_finite(map: np.ndarray, name: str, *, precision: str) -> None:
    """Refuse a map that holds NaN or infinity.

    Args:
        map: (H, W), as `Predictor.predict_batch` returns it.
        name: Of the image, for the error.
        precision: With which the network ran.

    Raises:
        ValueError: The network gave NaN or infinity anywhere.
    """
    if np.isfinite(map).all():
        return
    way_out = "try --precision fp32"
    if precision == "fp32":
        way_out = "it ran with --precision fp32, so its weights are damaged or its training diverged"
    raise ValueError(f"the network gives no numbers for {name} (NaN or infinity); {way_out}")


def _resolve_device(name: str, model: DepthAnything) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
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
