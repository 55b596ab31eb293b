"""A masked autoencoder: an encoder that sees a few patches of an image, and a small decoder that predicts the others.

Source: He et al., *Masked Autoencoders Are Scalable Vision Learners*, arXiv 2111.06377 (MAE). The encoder keeps the
names and shapes of `DepthAnything.pretrained`, so that its weights start a depth network. Shapes: B images, N patches
in row-major order, V of them visible, D width of the encoder, P side of a patch in pixels.
"""

import json
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from depth_anything import __version__
from depth_anything.disk import atomic_path
from depth_anything.errors import Argument, UserError
from depth_anything.model.encoder import build_encoder, canonical_encoder_name
from depth_anything.model.tensor_files import WRITE_ERRORS, save_safetensors

MIN_PATCH_VARIANCE = 1e-6
"""Added to the variance of a patch before its values are divided by the deviation."""


class MaskedAutoencoder(nn.Module):
    """An encoder with the decoder that trains it by masked autoencoding; only the encoder is saved.

    Attributes:
        encoder: Name of the encoder.
        pretrained: The encoder (the name in official files).
        patch_size: Side of a patch, pixels.
        input_size: Side of the training crops, pixels.
        licence: License of the weights, if known.
        origin: Where the weights come from, as `DepthAnything.origin`.
        decoder: The decoder: "embed", "mask_token", "blocks", "norm" and "predict".
    """

    def __init__(self, encoder: str, *, width: int = 512, depth: int = 8, heads: int = 16) -> None:
        """Build encoder and decoder with random weights.

        Args:
            encoder: A key of `ENCODERS`, or the name of a timm ViT with absolute positions.
            width: Channels of the decoder, a multiple of 4 and of `heads`. 512, 8 and 16 are the paper's (§4, table
                1; §A.1).
            depth: Transformer blocks of the decoder.
            heads: Attention heads of the decoder.

        Raises:
            UserError: If the encoder is unknown or of another kind, or the width does not fit.
        """
        super().__init__()
        self.encoder = canonical_encoder_name(encoder)
        self.pretrained, spec = build_encoder(self.encoder)
        if not isinstance(self.pretrained, VisionTransformer):
            raise UserError(
                [Argument("encoder", encoder), " has no absolute positions, which masked autoencoding needs"],
                "use vits, vitb, vitl, vitg, vitt, vitn or another plain ViT",
            )
        if width % 4 or width % heads:
            raise UserError(
                [Argument("decoder_width", width), f" is not a multiple of 4 and of its {heads} heads"],
                [Argument("decoder_width", math.lcm(4, heads) * max(1, width // math.lcm(4, heads)))],
            )
        self.patch_size, self.input_size = spec.patch, spec.patch * spec.grid
        self.licence: str | None = None
        self.origin: dict[str, Any] = {}
        self.decoder = nn.Module()
        self.decoder.embed = nn.Linear(spec.width, width)
        self.decoder.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = (Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.decoder.blocks = nn.Sequential(*blocks)
        self.decoder.norm = norm(width)
        self.decoder.predict = nn.Linear(width, spec.patch**2 * 3)
        self._init_decoder()

    def _init_decoder(self) -> None:
        """Initialize linear layers by Xavier uniform (§A.1), and the mask token like a ViT's class token."""
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        for layer in self.decoder.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """List the encoder's trainable parameters."""
        return [p for p in self.pretrained.parameters() if p.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """List the decoder's parameters; they have the rate of a depth network's head."""
        return list(self.decoder.parameters())

    def forward(self, image: Tensor, order: Tensor, visible: int) -> Tensor:
        """Predict every patch of an image from its visible patches.

        Args:
            image: (B, 3, H, W), ImageNet-normalized, H and W multiples of the patch.
            order: int64 (B, N): a permutation of the patches of each image; the first `visible` are seen.
            visible: V, the number of patches that the encoder sees.

        Returns:
            (B, N, 3·P·P): the values of each patch, in the order of `split_patches`.
        """
        grid = (image.shape[2] // self.patch_size, image.shape[3] // self.patch_size)
        return self.decode(self.encode_visible(image, order[:, :visible]), order, grid)

    def encode_visible(self, image: Tensor, visible: Tensor) -> Tensor:
        """Encode the patches at the indices `visible`, int64 (B, V), into tokens (B, prefix + V, D)."""
        encoder = self.pretrained
        tokens = encoder._pos_embed(encoder.patch_embed(image))
        prefix = encoder.num_prefix_tokens
        patches = gather_tokens(tokens[:, prefix:], visible)
        tokens = encoder.norm_pre(torch.cat((tokens[:, :prefix], patches), dim=1))
        for block in encoder.blocks:
            tokens = block(tokens)
        return encoder.norm(tokens)

    def decode(self, tokens: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
        """Put mask tokens in the place of the patches that were not seen, add positions, and predict all patches."""
        decoder, count = self.decoder, order.shape[1]
        tokens = decoder.embed(tokens)
        prefix = self.pretrained.num_prefix_tokens
        hidden = count - (tokens.shape[1] - prefix)
        masked = decoder.mask_token.to(tokens.dtype).expand(tokens.shape[0], hidden, -1)
        patches = gather_tokens(torch.cat((tokens[:, prefix:], masked), dim=1), order.argsort(1))
        patches = patches + _positions_on(grid, tokens.shape[2], tokens.device).to(tokens.dtype)
        tokens = decoder.blocks(torch.cat((tokens[:, :prefix], patches), dim=1))
        predicted: Tensor = decoder.predict(decoder.norm(tokens))[:, prefix:]
        return predicted


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Select the tokens of (B, N, D) at the indices of int64 (B, M): (B, M, D)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Compute sine-cosine position embeddings of two dimensions (MAE §A.1, after Vaswani et al. 2017).

    Args:
        grid: Patches down and across.
        width: Channels, a multiple of 4: half are for the column, half for the row, each sines before cosines, with
            wavelengths from 2π to 10,000 · 2π.

    Returns:
        float32 (1, N, width).
    """
    rates = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(count: int) -> Tensor:
        angle = torch.arange(count, dtype=torch.float64)[:, None] * rates
        return torch.cat((angle.sin(), angle.cos()), dim=1)

    rows, columns = grid
    row = encode(rows)[:, None].expand(rows, columns, -1)
    column = encode(columns)[None].expand(rows, columns, -1)
    return torch.cat((column, row), dim=2).reshape(1, rows * columns, width).float()


@cache
def _positions_on(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Keep the positions on the device, because copying them at every step would synchronize with the CPU."""
    return sine_positions(grid, width).to(device)


def split_patches(image: Tensor, patch: int) -> Tensor:
    """Cut an image (B, 3, H, W) into patches (B, N, patch·patch·3): rows, then columns, then colors."""
    batch, channels, height, width = image.shape
    pieces = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return pieces.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def join_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put patches (B, N, patch·patch·3) together again: (B, 3, H, W); the inverse of `split_patches`."""
    batch, rows, columns = patches.shape[0], *grid
    patch = math.isqrt(patches.shape[2] // 3)
    pieces = patches.reshape(batch, rows, columns, patch, patch, 3)
    return pieces.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, rows * patch, columns * patch)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean of each patch (B, N, C) and divide by its deviation (MAE §3, "reconstruction target").

    Returns:
        The normalized patches, and mean and deviation (B, N, 1).
    """
    mean = patches.mean(2, keepdim=True)
    deviation = (patches.var(2, keepdim=True) + MIN_PATCH_VARIANCE).sqrt()
    return (patches - mean) / deviation, mean, deviation


def masked_patch_loss(prediction: Tensor, target: Tensor, order: Tensor, visible: int) -> Tensor:
    """Compute the mean squared error over the patches that the encoder did not see (MAE §3).

    Args:
        prediction: (B, N, C).
        target: (B, N, C).
        order: int64 (B, N), as in `MaskedAutoencoder.forward`.
        visible: Number of patches that were seen.

    Returns:
        The mean over images, masked patches and values, a scalar in float32.
    """
    hidden = order[:, visible:]
    error = gather_tokens(prediction, hidden).float() - gather_tokens(target, hidden).float()
    return error.square().mean()


def encoder_metadata(model: MaskedAutoencoder) -> dict[str, str]:
    """Build the metadata of an encoder file (docs/contracts.md, encoder files)."""
    return {
        "format": "pt",
        "project": "depth-anything-train",
        "version": __version__,
        "encoder": model.encoder,
        "input_size": json.dumps(model.input_size),
        "licence": model.licence or "unknown",
        **({"origin": json.dumps(model.origin, sort_keys=True)} if model.origin else {}),
    }


def save_encoder(model: MaskedAutoencoder, path: Path) -> None:
    """Write the encoder alone, atomically, with the names of DINOv2 and the metadata of `encoder_metadata`.

    Raises:
        OSError: If the file cannot be written.
    """
    state = {name: t.detach().cpu().contiguous() for name, t in model.pretrained.state_dict().items()}
    with atomic_path(path, make_folder=True, also=WRITE_ERRORS) as temporary:
        save_safetensors(state, temporary, encoder_metadata(model))
