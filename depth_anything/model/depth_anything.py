"""The network: an encoder, four taps, a DPT head.

Shapes: B images, H W pixels, N patch tokens of width D.
"""

from collections.abc import Sequence
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
"""Pixels: the authors' patch. Smaller patches that fit into it see photographs at the authors' sizes."""


class DepthAnything(nn.Module):
    """Depth Anything V2: an image to disparity, or to depth in metres.

    The state dict has the names and shapes of the official files. What the forward pass never uses (the mask
    token, one unit of the head, blocks after the last tap) does not require a gradient.

    Attributes:
        encoder: Name of the encoder.
        taps: The four encoder blocks (from 0) that the head reads.
        max_depth: None, or the largest depth in metres.
        patch_size: Side of a patch in pixels; an image's sides are multiples of it.
        multiple: What photographs are resized to multiples of: the authors' 14 wherever whole patches fit.
        input_size: Shorter side, in pixels, of the images the encoder was made for.
        licence: Licence of the weights, where one is known.
        origin: Where the weights come from, as far as known: "start" (from, licence, base), "stage" and "data" of the
            training.
        calibration: None, or scale and shift that make metres of a disparity: 1 / (scale · output + shift). They are
            kept with the model and applied by whoever predicts or exports; `forward` gives the disparity.
        pretrained: The encoder (the official name of the module).
        depth_head: The head.
    """

    def __init__(
        self,
        encoder: str = "vitl",
        *,
        max_depth: float | None = None,
        taps: Sequence[int] | None = None,
        pretrained: bool = False,
    ) -> None:
        """Build the network with random weights; under `torch.device("meta")` without memory.

        Args:
            encoder: "vits", "vitb", "vitl", "vitg" (the official sizes), "vitt", "vitn" (192 and 96 wide, for
                small runs), or the name of any timm ViT.
            max_depth: None for disparity ≥ 0; else the depth in metres that an output of one stands for.
            taps: Four encoder blocks, from 0 and ascending, instead of the encoder's own.
            pretrained: Fetch the encoder's published weights (DINOv2's) through timm; the head stays random.

        Raises:
            ValueError: For an unknown encoder, impossible taps or depth, or weights that cannot be had.
        """
        super().__init__()
        self.encoder = canonical_encoder_name(encoder)
        self.pretrained, spec = build_encoder(self.encoder)
        self.taps = _validate_taps(spec.taps if taps is None else taps, spec.depth)
        if max_depth is not None and not 0 < max_depth < float("inf"):
            raise ValueError(
                f"max_depth={max_depth} must be a number of metres above 0, or None for disparity"
            )
        self.max_depth = None if max_depth is None else float(max_depth)
        self.patch_size = spec.patch
        self.multiple = OFFICIAL_PATCH if OFFICIAL_PATCH % spec.patch == 0 else spec.patch
        self.input_size = spec.patch * spec.grid
        self.licence: str | None = None
        self.origin: dict[str, Any] = {}
        self.calibration: tuple[float, float] | None = None
        for block in self.pretrained.blocks[self.taps[-1] + 1 :]:
            block.requires_grad_(False)
        self.depth_head = DPTHead(
            spec.width, features=spec.features, out_channels=spec.out_channels, max_depth=self.max_depth
        )
        if pretrained:
            unmatched = self.pretrained.load_state_dict(load_hub_weights(self.encoder), strict=False)
            assert set(unmatched.missing_keys) <= {"mask_token"} and not unmatched.unexpected_keys

    @property
    def quantity(self) -> str:
        """What the output is: "disparity" (larger is nearer) or "depth"."""
        return "disparity" if self.max_depth is None else "depth"

    @property
    def unit(self) -> str:
        """What the output counts: "m" for depth; "relative" for disparity (up to a scale and a shift)."""
        return "relative" if self.max_depth is None else "m"

    @property
    def position_rule(self) -> str:
        """How `forward` fits the position embedding to other sizes unless told: "official", or "timm" for its ViTs."""
        return "official" if isinstance(self.pretrained, DINOv2) else "timm"

    def check_position_rule(self, rule: str) -> None:
        """Refuse a rule that `forward` cannot follow.

        Raises:
            ValueError: For an unknown rule, or one that is not timm's where the encoder is timm's.
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
            image: (B, 3, H, W), ImageNet-normalised, H and W multiples of `patch_size`.
            return_features: Give the encoder's final tokens too, at no further cost.
            position_rule: How the position embedding is fitted to other sizes: "official" as in the released models,
                "transformers" as in that library. None takes the model's own, `DepthAnything.position_rule`.

        Returns:
            (B, H, W): disparity ≥ 0, larger is nearer; or metres, if `max_depth` is set. With
            `return_features` also what `features` gives.

        Raises:
            ValueError: If a side is no multiple of the patch, or the encoder has no such position rule.
        """
        last = len(self.pretrained.blocks) - 1
        blocks = self.taps if not return_features else tuple(dict.fromkeys((*self.taps, last)))
        tokens = self._tokens(image, blocks, position_rule)
        grid = (image.shape[2] // self.patch_size, image.shape[3] // self.patch_size)
        output = self.depth_head(tokens[:4], grid, image.shape[2:])
        return (output, tokens[-1]) if return_features else output

    def features(self, image: Tensor) -> Tensor:
        """Encode an image into the final, normalised patch tokens.

        Args:
            image: As `forward` takes it.

        Returns:
            (B, N, D), row by row.
        """
        return self._tokens(image, (len(self.pretrained.blocks) - 1,), None)[0]

    def _tokens(self, image: Tensor, blocks: Sequence[int], position_rule: str | None) -> list[Tensor]:
        height, width = image.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"sides of {height}×{width} must be multiples of the patch, {self.patch_size}")
        rule = position_rule or self.position_rule
        self.check_position_rule(rule)
        if isinstance(self.pretrained, DINOv2):
            return self.pretrained.encode_blocks(image, blocks, rule)
        return self.pretrained.forward_intermediates(
            image, indices=list(blocks), norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
        )

    @torch.no_grad()
    def infer_image(self, bgr: np.ndarray, input_size: int | None = None) -> np.ndarray:
        """Predict the map of one photograph, as the authors' class of the same name does.

        A calibration is not applied: `Predictor` does that.

        Args:
            bgr: uint8 (H, W, 3), blue first, as cv2 reads it. Grey and transparent images are taken as
                `preprocess.to_rgb` says.
            input_size: What the shorter side becomes, pixels; None takes the model's own `input_size`, which is the
                authors' 518 for their weights.

        Returns:
            float32 (H, W).

        Raises:
            ValueError: For anything that is no such image, or a size below 1.
        """
        rgb = to_rgb(bgr, blue_first=True)
        size = check_input_size(self.input_size if input_size is None else input_size)
        pixels = preprocess_image(rgb, size, self.multiple)
        image = torch.from_numpy(pixels)
        output = self(image[None].to(next(self.parameters()))).float()
        output = F.interpolate(output[:, None], rgb.shape[:2], mode="bilinear", align_corners=True)
        return output[0, 0].cpu().numpy()


def check_input_size(input_size: Any) -> int:
    """Return the size that images are resized to, if it is a number of pixels.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(input_size, bool) or not isinstance(input_size, int | np.integer) or input_size < 1:
        raise UserError(
            [Argument("input_size", repr(input_size)), " must be a whole number of pixels above 0"]
        )
    return int(input_size)


def _validate_taps(taps: Sequence[int], depth: int) -> tuple[int, ...]:
    if len(taps) != 4 or sorted(set(taps)) != list(taps) or taps[0] < 0 or taps[-1] >= depth:
        raise ValueError(f"taps={list(taps)} must be four ascending blocks out of 0 to {depth - 1}")
    return tuple(int(tap) for tap in taps)
