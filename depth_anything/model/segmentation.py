"""The network of semantic segmentation: the ViT encoder of Depth Anything and a head that scores classes.

Shapes: B images, H W pixels, N patch tokens of width D, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from depth_anything.classes import ClassTable
from depth_anything.errors import Argument, UserError
from depth_anything.model.depth_anything import OFFICIAL_PATCH
from depth_anything.model.encoder import DINOv2, EncoderSpec, build_encoder, canonical_encoder_name
from depth_anything.model.mask_heads import mask_loss, pixel_scores, require_transformers
from depth_anything.model.segmentation_heads import DPTClassHead, LinearHead, pixel_loss

HEADS = ("linear", "dpt", "mask2former", "eomt")
"""Heads by name; any other is built by a `SegmentationHeadBuilder`."""

MASK_HEADS = ("mask2former", "eomt")

SegmentationHeadBuilder = Callable[..., nn.Module]
"""Builds a head of pixels: called as `LinearHead`, returns a module with its `forward`."""


@dataclass(frozen=True)
class WindowRule:
    """How images are cut for the network.

    Attributes:
        short_side: Images are resized to this shorter side, pixels; None keeps their size, up to whole patches.
        stride: Pixels from one square window to the next. The side of the windows is the model's `input_size`.
    """

    short_side: int | None
    stride: int


class SegmentationModel(nn.Module):
    """A ViT encoder and a head that map an image to a score of each class at each pixel.

    Attributes:
        encoder: Name of the encoder.
        taps: The four encoder blocks (from 0) that the head reads.
        classes: The classes.
        head: "linear", "dpt", "mask2former", "eomt", or the import path of another head.
        head_options: Options of the head.
        patch_size: Side of a patch in pixels; image sides must be multiples of it.
        multiple: Images are resized to multiples of this.
        input_size: Side of the square that the model was trained with, pixels.
        window: How larger images are cut.
        licence: License of the weights, if known.
        origin: Where the weights come from, as in `DepthAnything`.
        pretrained: The encoder, with the parameter names of `DepthAnything`.
        segmentation_head: The head.
    """

    quantity = "classes"
    unit = "class"
    max_depth = None
    calibration = None

    def __init__(
        self,
        encoder: str = "vitl",
        *,
        classes: ClassTable,
        head: str | SegmentationHeadBuilder = "dpt",
        head_options: Mapping[str, Any] | None = None,
        taps: Sequence[int] | None = None,
    ) -> None:
        """Build the network with random weights.

        Args:
            encoder: As in `DepthAnything`.
            classes: The classes; their numbers are the places.
            head: A name of `HEADS`, or a builder of another head, which is called with the arguments of `LinearHead`.
            head_options: Options of mask2former and eomt; see their modules.
            taps: Four ascending encoder blocks, from 0; None for the head's own.

        Raises:
            UserError: If encoder, head or options are unknown, or do not go together.
        """
        super().__init__()
        self.encoder = canonical_encoder_name(encoder)
        self.pretrained, spec = build_encoder(self.encoder)
        self.classes = classes
        self.head = head if isinstance(head, str) else segmentation_head_name(head)
        self.head_options = dict(head_options or {})
        self.patch_size = spec.patch
        self.multiple = OFFICIAL_PATCH if OFFICIAL_PATCH % spec.patch == 0 else spec.patch
        self.input_size = spec.patch * spec.grid
        self.window = WindowRule(None, self.input_size)
        self.licence: str | None = None
        self.origin: dict[str, Any] = {}
        self.segmentation_head = self._build_head(head, spec)
        last = tuple(range(spec.depth - 4, spec.depth))
        usual = last if getattr(self.segmentation_head, "last_blocks", False) else spec.taps
        self.taps = tuple(usual if taps is None else taps)
        if (
            len(self.taps) != 4
            or list(self.taps) != sorted(set(self.taps))
            or not 0 <= self.taps[0] <= self.taps[-1] < spec.depth
        ):
            raise UserError(
                [
                    Argument("taps", list(self.taps)),
                    f" must be four ascending blocks from 0 to {spec.depth - 1}",
                ]
            )
        for block in self.pretrained.blocks[self.taps[-1] + 1 :]:
            block.requires_grad_(self.head == "eomt")

    def _build_head(self, head: str | SegmentationHeadBuilder, spec: EncoderSpec) -> nn.Module:
        if isinstance(head, str) and head not in HEADS:
            raise UserError([Argument("head", head), " is unknown"], f"use one of {', '.join(HEADS)}")
        if self.head not in MASK_HEADS and self.head_options:
            first = next(iter(self.head_options))
            raise UserError(f"head={self.head} has no option {first}", "leave head_options out")
        count = len(self.classes)
        if isinstance(head, str) and head in MASK_HEADS:
            require_transformers(head)
            if head == "mask2former":
                from depth_anything.model.mask2former import Mask2FormerHead

                return Mask2FormerHead(spec.width, classes=count, options=self.head_options)
            from depth_anything.model.eomt import EoMTHead

            if not isinstance(self.pretrained, DINOv2):
                raise UserError(
                    f"head=eomt needs an encoder of DINOv2's kind, not {self.encoder}", "type encoder=vits"
                )
            built = EoMTHead(spec.width, classes=count, options=self.head_options)
            if built.blocks > spec.depth:
                raise UserError(f"{self.encoder} has {spec.depth} blocks", "type head_options.blocks=4")
            return built
        builder = {"linear": LinearHead, "dpt": DPTClassHead}[head] if isinstance(head, str) else head
        return builder(spec.width, features=spec.features, out_channels=spec.out_channels, classes=count)

    @property
    def position_rule(self) -> str:
        """Rule for resizing the position embedding: "official", or "timm" for timm's ViTs."""
        return "official" if isinstance(self.pretrained, DINOv2) else "timm"

    def encoder_parameters(self) -> list[nn.Parameter]:
        """List the encoder's trainable parameters."""
        return [p for p in self.pretrained.parameters() if p.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """List the head's trainable parameters."""
        return [p for p in self.segmentation_head.parameters() if p.requires_grad]

    def forward(self, image: Tensor) -> Tensor:
        """Score the classes of each pixel.

        Args:
            image: (B, 3, H, W), ImageNet-normalized, H and W multiples of `patch_size`.

        Returns:
            (B, K, H, W) float32, at least 0; of heads of pixels probabilities. The largest is the class.

        Raises:
            ValueError: If a side is not a multiple of the patch.
        """
        output = self._run_head(image, None)
        if self.head in MASK_HEADS:
            return pixel_scores(output[-1], image.shape[2:])
        return output.float().softmax(1)

    def losses(self, image: Tensor, target: Tensor, samples: Sequence[int]) -> dict[str, Tensor]:
        """Compute the loss of a micro-batch, the mean over its images, and its parts.

        Args:
            image: As in `forward`.
            target: Integers (B, H, W), the class of each pixel, 255 where it is ignored.
            samples: Number of each image's sample, which seeds what the loss draws.

        Returns:
            "loss"; for heads of masks also "classes", "masks" and "dice".
        """
        output = self._run_head(image, samples)
        if self.head in MASK_HEADS:
            criterion: Any = self.segmentation_head.criterion
            return mask_loss(output, target, samples, criterion)
        with torch.autocast(image.device.type, enabled=False):
            return {"loss": pixel_loss(output, target)}

    def _run_head(self, image: Tensor, samples: Sequence[int] | None) -> Any:
        height, width = image.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"sides of {height}×{width} must be multiples of the patch size {self.patch_size}"
            )
        if self.head == "eomt":
            return self.segmentation_head(self.pretrained, image, self.position_rule, samples)
        if isinstance(self.pretrained, DINOv2):
            tokens = self.pretrained.encode_blocks(image, self.taps, self.position_rule)
        else:
            tokens = self.pretrained.forward_intermediates(
                image,
                indices=list(self.taps),
                norm=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        grid = (height // self.patch_size, width // self.patch_size)
        if self.head == "mask2former":
            return self.segmentation_head(tokens, grid)
        return self.segmentation_head(tokens, grid, (height, width))


def segmentation_head_name(head: SegmentationHeadBuilder) -> str:
    """Return the name of a head: of `HEADS`, or the import path of its class or function."""
    target: Any = head.func if isinstance(head, partial) else head
    return f"{target.__module__}.{target.__qualname__}"
