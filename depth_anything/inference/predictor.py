"""From photographs to maps of their own size."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.preprocess import preprocess_image

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Predictor:
    """A network ready for photographs of any size.

    Attributes:
        model: The network, in eval mode on its device.
        device: Where it runs.
        quantity: "disparity" (larger is nearer) or "depth".
        unit: "m" for depth; "relative" for disparity, which is known up to a scale and a shift.
    """

    def __init__(
        self, model: DepthAnything, *, device: str = "auto", input_size: int = 518, precision: str = "fp32"
    ) -> None:
        """Move a network to its device and put it into eval mode.

        Args:
            model: The network; moved, not copied.
            device: "auto" leaves a network that is on an accelerator there, and takes the first accelerator,
                else the CPU, for any other; or what torch calls a device, as "cuda:1".
            input_size: What the shorter side of an image becomes, pixels; more is sharper and slower.
            precision: "fp32", or "bf16" or "fp16" for the matrix products.

        Raises:
            ValueError: For a precision or device that does not exist here.
        """
        if precision not in _PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown; use one of {', '.join(_PRECISIONS)}")
        self.device = _device(device, model)
        self.model = model.to(self.device).eval()
        self.quantity = model.quantity
        self.unit = model.unit
        self.input_size = input_size
        self._dtype = _PRECISIONS[precision]

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Predict one image's map.

        Args:
            image: uint8 (H, W, 3), RGB.

        Returns:
            float32 (H, W): what `quantity` and `unit` say.

        Raises:
            ValueError: For an array that is no such image.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Predict the maps of several images; those that the network sees at one size run as one batch.

        Args:
            images: Each as `predict` takes it; sizes may differ.

        Returns:
            A map for each image, in the same order and each of its image's size.

        Raises:
            ValueError: For an array that is no image.
        """
        groups: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for i, image in enumerate(images):
            _check_image(image)
            tensor = preprocess_image(image, self.input_size, self.model.patch_size)
            groups.setdefault(tensor.shape, []).append((i, tensor))
        maps: dict[int, np.ndarray] = {}
        for group in groups.values():
            outputs = self._run(torch.from_numpy(np.stack([tensor for _, tensor in group])))
            for (i, _), output in zip(group, outputs, strict=True):
                maps[i] = _resize(output, images[i].shape[:2])
        return [maps[i] for i in range(len(images))]

    @torch.inference_mode()
    def _run(self, batch: Tensor) -> Tensor:
        autocast: AbstractContextManager[object] = nullcontext()
        if self._dtype is not None:
            autocast = torch.autocast(self.device.type, dtype=self._dtype)
        with autocast:
            return self.model(batch.to(self.device, next(self.model.parameters()).dtype)).float()


@torch.inference_mode()
def _resize(output: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    # align_corners as in the authors' infer_image
    resized = F.interpolate(output[None, None], size=shape, mode="bilinear", align_corners=True)
    return resized[0, 0].cpu().numpy()


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"an image must be uint8 of shape (height, width, 3), not {image.dtype} of shape {image.shape}"
        )


def _device(name: str, model: DepthAnything) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ValueError(f"device={name!r} does not exist here; use auto, cpu, cuda or cuda:1") from error
        return device
    current = next(model.parameters()).device
    if current.type != "cpu":
        return current
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
