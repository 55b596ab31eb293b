"""Mask2Former on a plain ViT, of transformers' own modules, with the numbers of Depth Anything V1.

Source: Mask2Former (arXiv 2112.01527); V1's semseg/ for the feature pyramid of the last four blocks, ×4 ×2 ×1 ×½, as
wide as the encoder, 200 queries, 6 layers of multi-scale deformable attention and 9 decoder layers. Not stated, and
ours: feed-forward layers four times as wide, 32 channels an attention head.

Shapes: B images, Q queries, D width of a token, C channels, h w patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as theirs

from depth_anything.errors import UserError
from depth_anything.model.mask_heads import MaskLossOptions, MaskPrediction, parse_options

_GROUPS = 32
"""transformers' pixel decoder normalizes in groups of this many."""

_HEAD_WIDTH = 32
"""Channels of an attention head, as in Mask2Former (256 channels, 8 heads)."""


@dataclass(frozen=True)
class Mask2FormerOptions(MaskLossOptions):
    """Options of the head.

    Attributes:
        channels: Channels C of pixel decoder and transformer decoder; None: as many as the encoder is wide.
        queries: Number of queries.
        encoder_layers: Layers of multi-scale deformable attention.
        decoder_layers: Layers of the transformer decoder.
    """

    channels: int | None = None
    queries: int = 200
    encoder_layers: int = 6
    decoder_layers: int = 9


class FeaturePyramid(nn.Module):
    """Resize the tokens of four blocks to ×4, ×2, ×1 and ×½ of the patch grid, with learned upsampling.

    mmsegmentation's Feature2Pyramid has a batch norm in place of the group norm here, which does not depend on how a
    batch is divided.
    """

    def __init__(self, width: int) -> None:
        """Build the four levels for tokens of a width D."""
        super().__init__()
        self.fourfold = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.GroupNorm(1, width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.twice = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, tokens: Sequence[Tensor], grid: Sequence[int]) -> list[Tensor]:
        """Map four (B, h·w, D) to (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w) and (B, D, ⌈h/2⌉, ⌈w/2⌉)."""
        maps = [x.transpose(1, 2).unflatten(2, list(grid)) for x in tokens]
        half = F.max_pool2d(maps[3], 2, stride=2, ceil_mode=True)
        return [self.fourfold(maps[0]), self.twice(maps[1]), maps[2], half]


class _Parts(theirs.Mask2FormerPreTrainedModel):
    """transformers' pixel decoder, transformer decoder and class predictor, initialized as transformers does."""

    def __init__(self, config: Any, widths: Sequence[int]) -> None:
        super().__init__(config)
        self.pixel_decoder = theirs.Mask2FormerPixelDecoder(config, feature_channels=list(widths))
        self.transformer_module = theirs.Mask2FormerTransformerModule(config.feature_size, config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()


class Mask2FormerHead(nn.Module):
    """Pixel decoder and transformer decoder on the last four blocks of a ViT."""

    last_blocks: ClassVar[bool] = True
    """Reads the last four blocks in place of the taps of depth."""

    def __init__(self, width: int, *, classes: int, options: Mapping[str, Any]) -> None:
        """Build the head with random weights.

        Args:
            width: Channels D of the tokens.
            classes: Number of classes.
            options: Of `Mask2FormerOptions`.

        Raises:
            UserError: An option is unknown or impossible.
        """
        super().__init__()
        chosen: Mask2FormerOptions = parse_options(Mask2FormerOptions, dict(options), "mask2former")
        channels = chosen.channels or width
        if (
            channels % _GROUPS
            or min(chosen.queries, chosen.encoder_layers, chosen.decoder_layers, chosen.points) < 1
        ):
            raise UserError(
                f"head=mask2former cannot have {channels} channels, {chosen.queries} queries, "
                f"{chosen.encoder_layers} and {chosen.decoder_layers} layers and {chosen.points} points",
                f"type head_options.channels= a multiple of {_GROUPS}, and at least 1 of the others",
            )
        config = Mask2FormerConfig(  # type: ignore[call-arg]  # num_labels is of its base class
            feature_size=channels,
            mask_feature_size=channels,
            hidden_dim=channels,
            encoder_feedforward_dim=4 * channels,
            dim_feedforward=4 * channels,
            num_attention_heads=channels // _HEAD_WIDTH,
            encoder_layers=chosen.encoder_layers,
            decoder_layers=chosen.decoder_layers
            + 1,  # transformers counts the prediction before the first layer
            num_queries=chosen.queries,
            num_labels=classes,
            no_object_weight=chosen.no_object_weight,
            class_weight=chosen.class_weight,
            mask_weight=chosen.mask_weight,
            dice_weight=chosen.dice_weight,
            train_num_points=chosen.points,
            oversample_ratio=chosen.oversample,
            importance_sample_ratio=chosen.uncertain_share,
        )
        self.pyramid = FeaturePyramid(width)
        self.parts = _Parts(config, [width] * 4)
        weights = {
            "loss_cross_entropy": chosen.class_weight,
            "loss_mask": chosen.mask_weight,
            "loss_dice": chosen.dice_weight,
        }
        self.criterion = theirs.Mask2FormerLoss(config, weights)

    def forward(self, tokens: Sequence[Tensor], grid: Sequence[int]) -> list[MaskPrediction]:
        """Predict masks and classes.

        Args:
            tokens: Four (B, h·w, D) of the last four blocks.
            grid: (h, w).

        Returns:
            The predictions before the first decoder layer and after each; the last one is used, and all are trained.
            Masks have four times the sides of the grid.
        """
        pixels = self.parts.pixel_decoder(
            self.pyramid(tokens, grid), output_hidden_states=False, return_dict=True
        )
        decoded = self.parts.transformer_module(
            multi_scale_features=list(pixels.multi_scale_features), mask_features=pixels.mask_features
        )
        classes = [self.parts.class_predictor(x.transpose(0, 1)) for x in decoded.intermediate_hidden_states]
        return [MaskPrediction(*pair) for pair in zip(classes, decoded.masks_queries_logits, strict=True)]
