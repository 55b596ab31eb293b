"""The network: a ViT encoder whose features after four blocks (taps) a DPT head turns into a map.

Shapes: B images, H W pixels, N patch tokens of width D.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depth_anything.errors import Argument, UserError
from depth_anything.model.dpt import DPTHead
from depth_anything.model.encoder import (
    POSITION_RULES,
    DINOv2,
    build_encoder,
    canonical_encoder_name,
    load_hub_weights,
)
from depth_anything.preprocess import preprocess_image, to_rgb

OFFICIAL_PATCH = 14
"""Patch side of the official models, pixels. Models with smaller patches that divide it see the same image sizes."""

HeadBuilder = Callable[..., nn.Module]
"""Builds a decoder: called as `DPTHead`, returns a module with the `forward` of `DPTHead`."""


class DepthAnything(nn.Module):
    """Depth Anything V2: a ViT encoder and a DPT head that map an image to disparity or to depth in meters.

    The state dict has the names and shapes of the official files. Parameters that the forward pass does not use (the
    mask token, one unit of the head, blocks after the last tap) do not require a gradient.

    Attributes:
        encoder: Name of the encoder.
        taps: The four encoder blocks (from 0) that the head reads.
        max_depth: None, or the largest depth in meters.
        patch_size: Side of a patch in pixels; image sides must be multiples of it.
        multiple: Images are resized to multiples of this: the official 14 wherever whole patches fit.
        input_size: Shorter image side, in pixels, that the model was trained with.
        licence: License of the weights, if known.
        origin: Where the weights come from, as far as known: "start" (from, licence, base), "stage" and "data" of the
            training.
        calibration: None, or (scale, shift) that turn disparity into meters: 1 / (scale · output + shift). `Predictor`
            and exported programs apply them; `forward` returns disparity.
        canonical_focal: None, or the focal length F of the canonical camera of a metric model, in pixels of the
            network's input. `forward` then returns the depth that this camera would have seen; that of a camera with
            focal length f, also in pixels of the input, is output · f / F, which `Predictor` computes (Metric3D,
            arXiv 2307.10984, section 3.1, label transform).
        head: Name of the class of the head; None for `DPTHead`.
        pretrained: The encoder (the name in official files).
        depth_head: The head.
    """

    def __init__(
        self,
        encoder: str = "vitl",
        *,
        max_depth: float | None = None,
        taps: Sequence[int] | None = None,
        pretrained: bool = False,
        head: HeadBuilder | None = None,
    ) -> None:
        """Build the network with random weights; under `torch.device("meta")` without memory.

        Args:
            encoder: "vits", "vitb", "vitl", "vitg" (the official sizes), "vitt", "vitn" (192 and 96 wide, for
                small runs), or the name of any timm ViT.
            max_depth: None for disparity ≥ 0; else the depth in meters that an output of 1 means.
            taps: Four ascending encoder blocks, from 0, instead of the encoder's default.
            pretrained: Download the encoder's pretrained weights (DINOv2) through timm; the head stays random.
            head: Builder of another decoder, called with the arguments of `DPTHead`.

        Raises:
            ValueError: If the encoder is unknown, taps or depth are impossible, or the weights are not available.
        """
        super().__init__()
        self.encoder = canonical_encoder_name(encoder)
        self.pretrained, spec = build_encoder(self.encoder)
        self.taps = _validate_taps(spec.taps if taps is None else taps, spec.depth)
        if max_depth is not None and not 0 < max_depth < float("inf"):
            raise UserError(
                [Argument("max_depth", max_depth), " must be meters above 0, or None for disparity"]
            )
        self.max_depth = None if max_depth is None else float(max_depth)
        self.patch_size = spec.patch
        self.multiple = OFFICIAL_PATCH if OFFICIAL_PATCH % spec.patch == 0 else spec.patch
        self.input_size = spec.patch * spec.grid
        self.licence: str | None = None
        self.origin: dict[str, Any] = {}
        self.calibration: tuple[float, float] | None = None
        self.canonical_focal: float | None = None
        for block in self.pretrained.blocks[self.taps[-1] + 1 :]:
            block.requires_grad_(False)
        self.head = head_name(head)
        self.depth_head = (head or DPTHead)(
            spec.width, features=spec.features, out_channels=spec.out_channels, max_depth=self.max_depth
        )
        if pretrained:
            mismatch = self.pretrained.load_state_dict(load_hub_weights(self.encoder), strict=False)
            assert set(mismatch.missing_keys) <= {"mask_token"} and not mismatch.unexpected_keys

    @property
    def quantity(self) -> str:
        """Quantity of the output: "disparity" (larger is nearer) or "depth"."""
        return "disparity" if self.max_depth is None else "depth"

    @property
    def unit(self) -> str:
        """Unit of the output: "m" for depth, "relative" for disparity (up to a scale and a shift)."""
        return "relative" if self.max_depth is None else "m"

    @property
    def position_rule(self) -> str:
        """Default rule for resizing the position embedding: "official", or "timm" for timm's ViTs."""
        return "official" if isinstance(self.pretrained, DINOv2) else "timm"

    def check_position_rule(self, rule: str) -> None:
        """Check that `forward` can follow a rule.

        Raises:
            ValueError: If the rule is unknown, or another than timm's for an encoder of timm.
        """
        if rule == self.position_rule:
            return
        if not isinstance(self.pretrained, DINOv2):
            raise ValueError(
                f"position_rule={rule!r} is for DINOv2's encoders; {self.encoder} keeps timm's rule"
            )
        if rule not in POSITION_RULES:
            raise ValueError(f"position_rule={rule!r} is unknown; use one of {', '.join(POSITION_RULES)}")

    def encoder_parameters(self) -> list[nn.Parameter]:
        """List the encoder's trainable parameters."""
        return [p for p in self.pretrained.parameters() if p.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """List the head's trainable parameters."""
        return [p for p in self.depth_head.parameters() if p.requires_grad]

    def forward(
        self, image: Tensor, return_features: bool = False, position_rule: str | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict a map of the image's size.

        Args:
            image: (B, 3, H, W), ImageNet-normalized, H and W multiples of `patch_size`.
            return_features: Also return the encoder's final tokens, at no extra cost.
            position_rule: How the position embedding is resized: "official" as in the released models,
                "transformers" as in that library, None for `DepthAnything.position_rule`.

        Returns:
            (B, H, W): disparity ≥ 0, larger is nearer; or meters, if `max_depth` is set. With
            `return_features` also the result of `features`.

        Raises:
            ValueError: If a side is not a multiple of the patch, or the encoder does not have the position rule.
        """
        last = len(self.pretrained.blocks) - 1
        blocks = self.taps if not return_features else tuple(dict.fromkeys((*self.taps, last)))
        tokens = self._tokens(image, blocks, position_rule)
        grid = (image.shape[2] // self.patch_size, image.shape[3] // self.patch_size)
        output = self.depth_head(tokens[:4], grid, image.shape[2:])
        return (output, tokens[-1]) if return_features else output

    def features(self, image: Tensor) -> Tensor:
        """Encode an image into the final, normalized patch tokens.

        Args:
            image: As in `forward`.

        Returns:
            (B, N, D), in row-major order.
        """
        return self._tokens(image, (len(self.pretrained.blocks) - 1,), None)[0]

    def _tokens(self, image: Tensor, blocks: Sequence[int], position_rule: str | None) -> list[Tensor]:
        height, width = image.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"sides of {height}×{width} must be multiples of the patch size {self.patch_size}"
            )
        rule = position_rule or self.position_rule
        self.check_position_rule(rule)
        if isinstance(self.pretrained, DINOv2):
            return self.pretrained.encode_blocks(image, blocks, rule)
        return self.pretrained.forward_intermediates(
            image, indices=list(blocks), norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
        )

    @torch.no_grad()
    def infer_image(self, bgr: np.ndarray, input_size: int | None = None) -> np.ndarray:
        """Predict the map of one image, with the interface of the official class.

        Neither a calibration nor a focal length is applied; `Predictor` does that.

        Args:
            bgr: uint8 (H, W, 3), channels in the order of cv2. Gray and transparent images are converted by
                `preprocess.to_rgb`.
            input_size: The shorter side after resizing, pixels; None for the model's `input_size` (518 for the
                official weights).

        Returns:
            float32 (H, W).

        Raises:
            ValueError: If the array is not an image, or the size is below 1.
        """
        rgb = to_rgb(bgr, blue_first=True)
        size = check_input_size(self.input_size if input_size is None else input_size)
        pixels = preprocess_image(rgb, size, self.multiple)
        image = torch.from_numpy(pixels)
        output = self(image[None].to(next(self.parameters()))).float()
        output = F.interpolate(output[:, None], rgb.shape[:2], mode="bilinear", align_corners=True)
        return output[0, 0].cpu().numpy()


def head_name(head: HeadBuilder | None) -> str | None:
    """Return the import path of a head's class or function; None for `DPTHead`."""
    target: Any = head.func if isinstance(head, partial) else head
    return None if target in (None, DPTHead) else f"{target.__module__}.{target.__qualname__}"


def check_input_size(input_size: Any) -> int:
    """Check the shorter side after resizing, and return it.

    Raises:
        UserError: If it is not a whole number of pixels above 0.
    """
    if isinstance(input_size, bool) or not isinstance(input_size, int | np.integer) or input_size < 1:
        raise UserError(
            [Argument("input_size", repr(input_size)), " must be a whole number of pixels above 0"]
        )
    return int(input_size)


def _validate_taps(taps: Sequence[int], depth: int) -> tuple[int, ...]:
    if len(taps) != 4 or sorted(set(taps)) != list(taps) or taps[0] < 0 or taps[-1] >= depth:
        raise UserError(
            [Argument("taps", list(taps)), f" must be four ascending blocks from 0 to {depth - 1}"]
        )
    return tuple(int(tap) for tap in taps)
