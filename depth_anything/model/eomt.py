"""EoMT, "Your ViT is Secretly an Image Segmentation Model" (arXiv 2503.19108), of transformers' own modules.

Queries join the tokens before the last blocks of the encoder itself; there is no decoder. While training, queries
attend only to the pixels of their own mask, and this masking fades out block after block, so that inference does
without it.

Shapes: B images, Q queries, N patch tokens of width D, h w patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EomtConfig
from transformers.models.eomt import modeling_eomt as theirs

from depth_anything.errors import UserError
from depth_anything.model.encoder import DINOv2
from depth_anything.model.mask_heads import MaskLossOptions, MaskPrediction, parse_options

ANNEALING_POWER = 0.9
"""Exponent of the fading of the attention masks, the authors'."""

_SEED_STEP = 7_368_787


@dataclass(frozen=True)
class EoMTOptions(MaskLossOptions):
    """Options of the head.

    Attributes:
        queries: Number of queries.
        blocks: Number of the last blocks that process queries.
        upscales: Doublings of the patch grid for the masks.
    """

    queries: int = 200
    blocks: int = 4
    upscales: int = 2


class EoMTHead(nn.Module):
    """Queries, mask head, upscaling and class predictor of EoMT; it runs the encoder itself.

    Attributes:
        mask_share: float (blocks,), the share of queries in each of the last blocks that attend to their mask only:
            1 at the start of training, 0 at its end. It is in the state dict.
    """

    last_blocks: ClassVar[bool] = False

    def __init__(self, width: int, *, classes: int, options: Mapping[str, Any]) -> None:
        """Build the head with random weights; arguments and errors as for `Mask2FormerHead`."""
        super().__init__()
        chosen: EoMTOptions = parse_options(EoMTOptions, dict(options), "eomt")
        if min(chosen.queries, chosen.blocks, chosen.points) < 1:
            raise UserError(
                "head=eomt needs at least one query, block and point", "type head_options.blocks=4"
            )
        config = EomtConfig(  # type: ignore[call-arg]  # num_labels is of its base class
            hidden_size=width,
            num_queries=chosen.queries,
            num_blocks=chosen.blocks,
            num_upscale_blocks=chosen.upscales,
            num_labels=classes,
            no_object_weight=chosen.no_object_weight,
            class_weight=chosen.class_weight,
            mask_weight=chosen.mask_weight,
            dice_weight=chosen.dice_weight,
            train_num_points=chosen.points,
            oversample_ratio=chosen.oversample,
            importance_sample_ratio=chosen.uncertain_share,
        )
        self.blocks = chosen.blocks
        self.query = nn.Embedding(chosen.queries, width)
        self.upscale_block = theirs.EomtScaleBlock(config)
        self.mask_head = theirs.EomtMaskHead(config)
        self.class_predictor = nn.Linear(width, classes + 1)
        weights = {
            "loss_cross_entropy": chosen.class_weight,
            "loss_mask": chosen.mask_weight,
            "loss_dice": chosen.dice_weight,
        }
        self.criterion = theirs.EomtLoss(config, weights)
        self.register_buffer("mask_share", torch.ones(chosen.blocks))
        self.mask_share: Tensor

    def anneal(self, done: float) -> None:
        """Set `mask_share` for a share of the training that is done, 0 to 1.

        The masks of the last blocks fade out one after another, the first of them first; each takes an equal part of
        the run between a seventh and six sevenths of it.
        """
        span = 5 / 7 / self.blocks
        for number in range(self.blocks):
            progress = min(1.0, max(0.0, (done - 1 / 7 - number * span) / span))
            self.mask_share[number] = (1.0 - progress) ** ANNEALING_POWER

    def forward(
        self, encoder: nn.Module, image: Tensor, rule: str, samples: Sequence[int] | None = None
    ) -> list[MaskPrediction]:
        """Run the encoder with queries in its last blocks.

        Args:
            encoder: A `DINOv2` with more blocks than `blocks`.
            image: (B, 3, H, W), ImageNet-normalized, sides multiples of the patch.
            rule: Rule of the position embedding.
            samples: In training the number of each image's sample, from which the masked queries are drawn.

        Returns:
            The predictions before each of the last blocks (in training) and after the last one. Masks have
            2 ** upscales times the sides of the grid.
        """
        assert isinstance(encoder, DINOv2)
        patch = encoder.patch_embed.patch_size[0]
        grid = (image.shape[2] // patch, image.shape[3] // patch)
        x = encoder._pos_embed(encoder.patch_embed(image), rule)
        first = len(encoder.blocks) - self.blocks
        for block in encoder.blocks[:first]:
            x = block(x)
        x = torch.cat([self.query.weight[None].expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        predictions: list[MaskPrediction] = []
        shares = self.mask_share.tolist()
        for number, block in enumerate(encoder.blocks[first:]):
            mask = None
            if self.training or shares[number] >= 0.5:
                predictions.append(self._predict(encoder, x, grid))
                chosen = self._masked_queries(shares[number], number, samples, len(x))
                mask = self._attention_mask(predictions[-1].masks, grid, x.shape[1], chosen)
            x = block(x, attn_mask=mask)
        return [*predictions, self._predict(encoder, x, grid)]

    def _predict(self, encoder: DINOv2, x: Tensor, grid: tuple[int, int]) -> MaskPrediction:
        x = encoder.norm(x)
        count = self.query.num_embeddings
        queries, patches = x[:, :count], x[:, count + encoder.num_prefix_tokens :]
        pixels = self.upscale_block(patches.transpose(1, 2).unflatten(2, grid))
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), pixels)
        return MaskPrediction(self.class_predictor(queries), masks)

    def _masked_queries(
        self, share: float, number: int, samples: Sequence[int] | None, batch: int
    ) -> Tensor | None:
        """Draw which queries attend to their mask only, bool (B, Q); None for all of them."""
        if share >= 1 or samples is None:
            return None
        drawn = []
        for sample in samples[:batch]:
            generator = torch.Generator().manual_seed(_SEED_STEP * (sample + 1) + number)
            drawn.append(torch.rand(self.query.num_embeddings, generator=generator) <= share)
        return torch.stack(drawn)

    def _attention_mask(
        self, masks: Tensor, grid: tuple[int, int], length: int, chosen: Tensor | None
    ) -> Tensor:
        """Return which token may attend to which, bool (B, 1, L, L)."""
        count = self.query.num_embeddings
        small = F.interpolate(masks.float(), size=grid, mode="bilinear", align_corners=False)
        own = small.flatten(2) > 0
        if chosen is not None:
            own = own | ~chosen.to(own.device)[..., None]
        allowed = torch.ones(len(masks), length, length, dtype=torch.bool, device=masks.device)
        allowed[:, :count, length - own.shape[2] :] = own
        return allowed[:, None]
