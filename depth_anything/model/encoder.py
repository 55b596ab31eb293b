"""The image encoder: a timm ViT, with DINOv2's parameter names and position embedding for DINOv2's sizes."""

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
    """Size of an encoder and of the head that fits it.

    Attributes:
        width: Channels D of a token.
        depth: Transformer blocks.
        heads: Attention heads.
        taps: The four blocks (from 0) that the head reads.
        features: Channels of the head's fusion path.
        out_channels: Channels of the four levels before fusion.
        patch: Side of a patch, pixels.
        grid: Side of the trained position embedding, patches.
        hub: timm's name of the pretrained weights; None if there are none.
        swiglu: SwiGLU feed-forward layers instead of GELU.
        registers: Register tokens (arXiv 2309.16588) after the class token; the head does not read them.
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
    registers: int = 0


# Source of the first four: dinov2.py and dpt.py of the official repository. vitt and vitn are for small runs from
# random weights, where 10 × 10 small patches learn several times faster than 7 × 7 large ones. Their grid is that of
# the 70 px training crops: of a larger one, only the sampled positions would be trained. vitn_reg4 is vitn with as many
# registers as DINOv2's models with registers have.
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
    "vitn_reg4": EncoderSpec(96, 4, 3, (0, 1, 2, 3), 32, (12, 24, 48, 96), patch=7, grid=10, registers=4),
}


POSITION_RULES = ("official", "transformers")


def resample_positions(positions: Tensor, height: int, width: int, rule: str = "official") -> Tensor:
    """Resize a position embedding exactly as the released models or as transformers does.

    The official code adds 0.1 to both sides and passes a scale factor, which samples the grid with a step of
    side / (n + 0.1); only a square of the original side is not resampled (DINOv2, vision_transformer.py,
    interpolate_pos_encoding). transformers passes the size, which samples with a step of side / n.

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
    elif exporting:  # a scale factor would be a constant of the example's size
        grid = _resample_by_matrices(grid, height, width)
    else:
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    return torch.cat((positions[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


def _resample_by_matrices(grid: Tensor, height: int, width: int) -> Tensor:
    """Apply the official rule to (1, D, side, side) with operations that support dynamic sizes."""
    side = grid.shape[2]
    # Sums over tensors, because a number read from a size would be a constant in the exported graph.
    down, across = torch.ones(height, device=grid.device).sum(), torch.ones(width, device=grid.device).sum()
    kept = (down == side) & (across == side)
    rows = _cubic_weights(side, height, torch.where(kept, 1.0, side / (down.double() + 0.1)).float())
    columns = _cubic_weights(side, width, torch.where(kept, 1.0, side / (across.double() + 0.1)).float())
    return rows.to(grid.dtype) @ grid @ columns.to(grid.dtype).T


def _cubic_weights(side: int, length: int, step: Tensor) -> Tensor:
    """Return weights (length, side) of Keys' cubic resampling, a = −0.75, with repeated edges."""
    source = (torch.arange(length, device=step.device) + 0.5) * step - 0.5
    nearby = source.floor()[:, None] + torch.arange(-1, 3, device=step.device)
    x = (source[:, None] - nearby).abs()
    near = (1.25 * x - 2.25) * x * x + 1
    far = ((-0.75 * x + 3.75) * x - 6) * x + 3
    weight = torch.where(x <= 1, near, far)
    taken = nearby.clamp(0, side - 1)[..., None] == torch.arange(side, device=step.device)
    return (weight[..., None] * taken).sum(1)


class SwiGLU(nn.Module):
    """The SwiGLU feed-forward of DINOv2 giant, with its parameter names."""

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
        """Accept the arguments that timm passes to any feed-forward; activation, norm and dropout are not used."""
        super().__init__()
        # Two thirds, because there are three matrices instead of two, rounded up to a multiple of 8.
        hidden = (int(hidden_features * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.w3 = nn.Linear(hidden, in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DINOv2(VisionTransformer):
    """timm's ViT with DINOv2's parameter names and position rule, and LayerScale initialized to 1."""

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
            reg_tokens=spec.registers,
        )
        if spec.registers:  # they have no position, as in DINOv2; timm would give them one
            positions = torch.zeros(1, 1 + spec.grid**2, spec.width)
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))
        # Not used; official files contain it and are loaded strictly.
        self.mask_token = nn.Parameter(torch.zeros(1, spec.width), requires_grad=False)

    def encode_blocks(self, image: Tensor, blocks: Sequence[int], position_rule: str) -> list[Tensor]:
        """Compute the normalized patch tokens after some blocks, like timm's `forward_intermediates`.

        timm's method has no argument for the position rule, and an attribute would be shared by all threads.

        Args:
            image: (B, 3, H, W), sides multiples of the patch.
            blocks: Block numbers from 0, ascending; blocks after the last one are not run.
            position_rule: One of `POSITION_RULES`.

        Returns:
            For each block (B, N, D), without the class token and the registers.
        """
        x = self._pos_embed(self.patch_embed(image), position_rule)
        tokens = []
        for i, block in enumerate(self.blocks[: blocks[-1] + 1]):
            x = block(x)
            if i in blocks:
                tokens.append(self.norm(x)[:, self.num_prefix_tokens :])
        return tokens

    def _pos_embed(self, x: Tensor, position_rule: str = "official") -> Tensor:
        height, width = x.shape[1], x.shape[2]
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), dim=1)
        positions = resample_positions(self.pos_embed, height, width, position_rule)
        tokens = tokens + positions.to(tokens.dtype)
        if self.reg_token is None:
            return tokens
        registers = self.reg_token.expand(x.shape[0], -1, -1)
        return torch.cat((tokens[:, :1], registers.to(tokens.dtype), tokens[:, 1:]), dim=1)


def canonical_encoder_name(name: str) -> str:
    """Map timm's name of an encoder in `ENCODERS` to its key; other names are returned unchanged."""
    for key, spec in ENCODERS.items():
        if spec.hub and name in (spec.hub, spec.hub.partition(".")[0]):
            return key
    return name


def build_encoder(name: str) -> tuple[nn.Module, EncoderSpec]:
    """Build an encoder with random weights.

    Args:
        name: A key of `ENCODERS`, or the name of a timm ViT that runs at any size.

    Returns:
        The encoder and its size.

    Raises:
        UserError: If the name is another.
    """
    if name in ENCODERS:
        return DINOv2(ENCODERS[name]), ENCODERS[name]
    module = _build_timm_encoder(name, pretrained=False)
    width, depth = module.embed_dim, len(module.blocks)
    if depth < 4:
        raise UserError([Argument("encoder", name), f" has {depth} blocks, and the head reads four"])
    limits = {256: 32, 512: 64, 896: 128, 1280: 256}  # official: 64 at width 384, … 384 at 1536
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
    except (TypeError, AssertionError) as error:  # an architecture without these arguments
        raise UserError([Argument("encoder", name), " is not a ViT that runs at any size"], known) from error
    if not isinstance(module, VisionTransformer | Eva):
        raise UserError([Argument("encoder", name), " is not a plain ViT"], known)
    return module


def load_hub_weights(name: str) -> dict[str, Tensor]:
    """Load pretrained weights of an encoder through timm, which downloads and caches them.

    Args:
        name: As in `build_encoder`.

    Returns:
        A state dict of this encoder, without DINOv2's mask token.

    Raises:
        UserError: If there are no pretrained weights, or they cannot be downloaded.
    """
    hub = ENCODERS[name].hub if name in ENCODERS else name
    if hub is None:
        raise UserError(
            [Argument("encoder", name), " has no pretrained weights"], "start it from random ones"
        )
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it prints every retry; the error below is enough
    try:
        if name not in ENCODERS:
            return _build_timm_encoder(name, pretrained=True).state_dict()
        state = timm.create_model(hub, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # HTTP, cache and disk raise many types
        raise UserError(
            f"cannot download {hub} ({error_reason(error)})", "give a local file of these weights instead"
        ) from error
    finally:
        logger.setLevel(level)
    return rename_swiglu(state) if ENCODERS[name].swiglu else state


def hub_repository(name: str) -> str | None:
    """Return the hub repository of an encoder's pretrained weights; None if there are none."""
    hub = ENCODERS[name].hub if name in ENCODERS else name
    config = timm.get_pretrained_cfg(hub) if hub else None
    return config.hf_hub_id if config else None


def hub_license(name: str) -> str | None:
    """Return the license of an encoder's pretrained weights, as timm states it."""
    hub = ENCODERS[name].hub if name in ENCODERS else name
    config = timm.get_pretrained_cfg(hub) if hub else None
    return spdx_name(config.license) if config and config.license else None


def rename_swiglu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's packed SwiGLU layers to DINOv2's names."""
    return {
        key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): tensor
        for key, tensor in state.items()
    }
