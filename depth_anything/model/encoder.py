"""The image encoder: a timm Vision Transformer, for DINOv2's sizes with DINOv2's names and position rule."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import depth_anything.model.timm_import  # noqa: F401  # isort: skip  # before timm
import timm
import torch
from timm.layers import Mlp
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from depth_anything.errors import Argument, UserError, error_reason
from depth_anything.licenses import spdx_name


@dataclass(frozen=True)
class EncoderSpec:
    """What sets one encoder apart from another, and the size of the head that goes with it.

    Attributes:
        width: Channels D of a token.
        depth: Transformer blocks.
        heads: Attention heads.
        taps: The four blocks (from 0) that the head reads.
        features: Channels of the head's fusion path.
        out_channels: Channels of the four levels before fusion.
        patch: Side of a patch, pixels.
        grid: Side, in patches, of the square that the position embedding was made for.
        hub: timm's name of published weights; None where there are none.
        swiglu: A gated feed-forward instead of GELU.
    """

    width: int
    depth: int
    heads: int
    taps: tuple[int, int, int, int]
    features: int
    out_channels: tuple[int, int, int, int]
    patch: int = 14
    grid: int = 37
    hub: str | None = None
    swiglu: bool = False


# The authors' four: their dinov2.py and dpt.py. The two tiny ones are ours: from random weights they learn several
# times as much a second from 10 × 10 small patches as from 7 × 7 large ones. Their grid is that of the 70 px crops
# they learn from, for a larger one would be trained only where 70 px happens to sample it.
ENCODERS = {
    "vits": EncoderSpec(
        384, 12, 6, (2, 5, 8, 11), 64, (48, 96, 192, 384), hub="vit_small_patch14_dinov2.lvd142m"
    ),
    "vitb": EncoderSpec(
        768, 12, 12, (2, 5, 8, 11), 128, (96, 192, 384, 768), hub="vit_base_patch14_dinov2.lvd142m"
    ),
    "vitl": EncoderSpec(
        1024, 24, 16, (4, 11, 17, 23), 256, (256, 512, 1024, 1024), hub="vit_large_patch14_dinov2.lvd142m"
    ),
    "vitg": EncoderSpec(
        1536,
        40,
        24,
        (9, 19, 29, 39),
        384,
        (1536, 1536, 1536, 1536),
        hub="vit_giant_patch14_dinov2.lvd142m",
        swiglu=True,
    ),
    "vitt": EncoderSpec(192, 4, 3, (0, 1, 2, 3), 32, (24, 48, 96, 192), patch=7, grid=10),
    "vitn": EncoderSpec(96, 4, 3, (0, 1, 2, 3), 32, (12, 24, 48, 96), patch=7, grid=10),
}


POSITION_RULES = ("official", "transformers")


def resample_positions(positions: Tensor, height: int, width: int, rule: str = "official") -> Tensor:
    """Fit a position embedding to another grid, exactly as the released models or as transformers does.

    The authors add 0.1 to both sides and pass a scale factor, and so sample the grid with a step of
    side / (n + 0.1); only a square of the original side is left as it is (DINOv2, vision_transformer.py,
    interpolate_pos_encoding). transformers passes the size, and samples with a step of side / n.

    Args:
        positions: (1, 1 + side·side, D), the class position first.
        height: Patches down.
        width: Patches across.
        rule: One of `POSITION_RULES`.

    Returns:
        (1, 1 + height·width, D), in float32 at least.
    """
    side = math.isqrt(positions.shape[1] - 1)
    exporting = torch.compiler.is_exporting()
    if not exporting and height == side and width == side:
        return positions
    positions = positions.to(torch.promote_types(positions.dtype, torch.float32))
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if rule == "transformers":
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=False)
    elif exporting:  # a scale factor would stay what it is in the example
        grid = _resample_by_matrices(grid, height, width)
    else:
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    return torch.cat((positions[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


def _resample_by_matrices(grid: Tensor, height: int, width: int) -> Tensor:
    """Do what the official rule does to (1, D, side, side) in operations that sizes may be unknown to."""
    side = grid.shape[2]
    # As sums over tensors, since a number read from a size would be a constant in the exported graph.
    down, across = torch.ones(height, device=grid.device).sum(), torch.ones(width, device=grid.device).sum()
    kept = (down == side) & (across == side)
    rows = _cubic_weights(side, height, torch.where(kept, 1.0, side / (down.double() + 0.1)).float())
    columns = _cubic_weights(side, width, torch.where(kept, 1.0, side / (across.double() + 0.1)).float())
    return rows.to(grid.dtype) @ grid @ columns.to(grid.dtype).T


def _cubic_weights(side: int, length: int, step: Tensor) -> Tensor:
    """Weigh `side` samples for each of `length` new ones, (length, side): Keys' cubic, a = −0.75, edges repeated."""
    source = (torch.arange(length, device=step.device) + 0.5) * step - 0.5
    nearby = source.floor()[:, None] + torch.arange(-1, 3, device=step.device)
    x = (source[:, None] - nearby).abs()
    near = (1.25 * x - 2.25) * x * x + 1
    far = ((-0.75 * x + 3.75) * x - 6) * x + 3
    weight = torch.where(x <= 1, near, far)
    taken = nearby.clamp(0, side - 1)[..., None] == torch.arange(side, device=step.device)
    return (weight[..., None] * taken).sum(1)


class SwiGLU(nn.Module):
    """The gated feed-forward of DINOv2's giant, under the names its weights have."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: object = None,
        norm_layer: object = None,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take what timm gives any feed-forward; activation, norm and dropout have no place here."""
        super().__init__()
        # Two thirds, as there are three matrices where a plain feed-forward has two; then a multiple of 8.
        hidden = (int(hidden_features * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.w3 = nn.Linear(hidden, in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DINOv2(VisionTransformer):
    """timm's ViT made DINOv2's: its parameter names, its position rule, LayerScale from 1."""

    def __init__(self, spec: EncoderSpec) -> None:
        """Build the encoder with random weights."""
        super().__init__(
            img_size=spec.grid * spec.patch,
            patch_size=spec.patch,
            num_classes=0,
            embed_dim=spec.width,
            depth=spec.depth,
            num_heads=spec.heads,
            init_values=1.0,
            dynamic_img_size=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            mlp_layer=SwiGLU if spec.swiglu else Mlp,
        )
        # Never used here; official files have it and are read strictly.
        self.mask_token = nn.Parameter(torch.zeros(1, spec.width), requires_grad=False)

    def encode_blocks(self, image: Tensor, blocks: Sequence[int], position_rule: str) -> list[Tensor]:
        """Compute the normalized patch tokens after some blocks, as timm's `forward_intermediates` does.

        timm's method has no argument for the position rule, and an attribute of the module would be shared by all
        threads that use it.

        Args:
            image: (B, 3, H, W), sides multiples of the patch.
            blocks: Numbers of blocks, from 0 and ascending; blocks after the last one are not run.
            position_rule: One of `POSITION_RULES`.

        Returns:
            For each block (B, N, D), without the class token.
        """
        x = self._pos_embed(self.patch_embed(image), position_rule)
        found = []
        for i, block in enumerate(self.blocks[: blocks[-1] + 1]):
            x = block(x)
            if i in blocks:
                found.append(self.norm(x)[:, self.num_prefix_tokens :])
        return found

    def _pos_embed(self, x: Tensor, position_rule: str = "official") -> Tensor:
        height, width = x.shape[1], x.shape[2]
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), dim=1)
        positions = resample_positions(self.pos_embed, height, width, position_rule)
        return tokens + positions.to(tokens.dtype)


def canonical_encoder_name(name: str) -> str:
    """Give the table's name for an encoder that timm calls otherwise; any other name stays."""
    for ours, spec in ENCODERS.items():
        if spec.hub and name in (spec.hub, spec.hub.partition(".")[0]):
            return ours
    return name


def build_encoder(name: str) -> tuple[nn.Module, EncoderSpec]:
    """Build an encoder with random weights.

    Args:
        name: A key of `ENCODERS`, or the name of any ViT that timm can run at any size.

    Returns:
        The encoder, and what the head needs to know of it.

    Raises:
        ValueError: For any other name.
    """
    if name in ENCODERS:
        return DINOv2(ENCODERS[name]), ENCODERS[name]
    module = _build_timm_encoder(name, pretrained=False)
    width, depth = module.embed_dim, len(module.blocks)
    if depth < 4:
        raise UserError([Argument("encoder", name), f" has {depth} blocks, and the head reads four"])
    limits = {256: 32, 512: 64, 896: 128, 1280: 256}  # as the authors': 64 at 384, … 384 at 1536
    patch = module.patch_embed.patch_size[0]
    spec = EncoderSpec(
        width,
        depth,
        module.blocks[0].attn.num_heads,
        tuple(depth * i // 4 - 1 for i in (1, 2, 3, 4)),
        next((features for limit, features in limits.items() if width <= limit), 384),
        (width // 8, width // 4, width // 2, width),
        patch=patch,
        grid=module.patch_embed.grid_size[0],
        hub=name,
    )
    return module, spec


def _build_timm_encoder(name: str, *, pretrained: bool) -> nn.Module:
    known = f"use one of {', '.join(ENCODERS)}, or a timm ViT such as vit_tiny_patch16_224"
    if not timm.is_model(name):
        raise UserError([Argument("encoder", name), " is unknown"], known)
    try:
        module = timm.create_model(
            name, pretrained=pretrained, num_classes=0, global_pool="", dynamic_img_size=True
        )
    except (TypeError, AssertionError) as error:  # an architecture that these settings mean nothing to
        raise UserError([Argument("encoder", name), " is not a ViT that runs at any size"], known) from error
    if not isinstance(module, VisionTransformer | Eva):
        raise UserError([Argument("encoder", name), " is not a plain ViT"], known)
    return module


def load_hub_weights(name: str) -> dict[str, Tensor]:
    """Fetch an encoder's published weights through timm, which keeps them in its cache.

    Args:
        name: As `build_encoder` takes it.

    Returns:
        Tensors under the names that the encoder of this name has; without DINOv2's mask token.

    Raises:
        ValueError: If nobody has published weights for it, or they cannot be had.
    """
    hub = ENCODERS[name].hub if name in ENCODERS else name
    if hub is None:
        raise ValueError(f"encoder={name} has no published weights; start it from random ones")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it prints every retry; the sentence below says it once
    try:
        if name not in ENCODERS:
            return _build_timm_encoder(name, pretrained=True).state_dict()
        state = timm.create_model(hub, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # HTTP, cache and disk have exceptions of their own
        raise ValueError(
            f"cannot fetch {hub} ({error_reason(error)}); give a local file of these weights instead"
        ) from error
    finally:
        logger.setLevel(level)
    return rename_swiglu(state) if ENCODERS[name].swiglu else state


def hub_repository(name: str) -> str | None:
    """Tell where on the hub an encoder's published weights are; None where there are none."""
    hub = ENCODERS[name].hub if name in ENCODERS else name
    config = timm.get_pretrained_cfg(hub) if hub else None
    return config.hf_hub_id if config else None


def hub_license(name: str) -> str | None:
    """Tell the licence of an encoder's published weights, as timm states it."""
    hub = ENCODERS[name].hub if name in ENCODERS else name
    config = timm.get_pretrained_cfg(hub) if hub else None
    return spdx_name(config.license) if config and config.license else None


def rename_swiglu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give timm's packed SwiGLU layers DINOv2's names; the tensors are the same."""
    return {
        key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): tensor
        for key, tensor in state.items()
    }
