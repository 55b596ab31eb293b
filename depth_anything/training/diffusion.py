"""The diffusion pipeline under a ControlNet: loaded from a diffusers folder or the hub, frozen; or a tiny random one.

diffusers and transformers take seconds to import, so they are imported inside the functions.
"""

import hashlib
import json
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depth_anything.disk import atomic_folder
from depth_anything.errors import UserError
from depth_anything.licenses import license_from_card
from depth_anything.model.weights import fingerprint

PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
"""Part of a pipeline → the class that stage=controlnet takes: Stable Diffusion 1 and 2."""

EXAMPLE_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CONDITIONING_CHANNELS = (16, 32, 96, 256)
"""Channels of the convolutions that read the conditioning image: V1's controlnet/config.json and diffusers' default."""

TINY_IMAGE_SIDE = 64
_TINY_TOKENS = 77  # of CLIP


def import_diffusers() -> Any:
    """Import diffusers and hide its progress bars and those of transformers.

    Raises:
        UserError: If one of them is not installed.
    """
    try:
        diffusers, transformers = import_module("diffusers"), import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"stage=controlnet needs diffusers and transformers ({error})",
            'type  pip install "depth-anything-train[controlnet]"',
        ) from error
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    return diffusers


class DiffusionBase:
    """The frozen networks of a Stable Diffusion pipeline, and the noise schedule of its training.

    It is no nn.Module, so that a LightningModule does not train, save, average or copy it.

    Attributes:
        source: The folder or hub name it was loaded from.
        unet, vae, text_encoder, tokenizer: The parts of the pipeline.
        scheduler: diffusers' DDPMScheduler with the betas of the pipeline.
        licence: SPDX name of its license by its card; None if unknown.
    """

    def __init__(self, source: str, parts: dict[str, Any], scheduler: Any, licence: str | None) -> None:
        """Freeze the networks, on the CPU in float32."""
        self.source, self.scheduler, self.licence = source, scheduler, licence
        self.unet, self.vae = parts["unet"], parts["vae"]
        self.text_encoder, self.tokenizer = parts["text_encoder"], parts["tokenizer"]
        for network in self.networks:
            network.eval().requires_grad_(False)
        self._fingerprint = ""

    def __deepcopy__(self, memo: Any) -> "DiffusionBase":
        """Return the same object: a copy of the trained network, as for its average, needs no copy of this."""
        return self

    @property
    def networks(self) -> list[nn.Module]:
        """The frozen networks."""
        return [self.unet, self.vae, self.text_encoder]

    @property
    def multiple(self) -> int:
        """The number of pixels of an image per latent pixel, 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, "sha256:…"."""
        if not self._fingerprint:
            text = " ".join(fingerprint(network) for network in self.networks)
            self._fingerprint = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen networks."""
        return next(self.unet.parameters()).dtype

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the networks to a device, in float32 or a half precision."""
        _ = self.fingerprint  # of float32 weights
        for network in self.networks:
            nn.Module.to(network, device=device, dtype=dtype)  # diffusers' own `to` warns without a reason

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (channels, rows, columns) of the latents of an image."""
        return self.vae.config.latent_channels, height // self.multiple, width // self.multiple

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Sample the latents of images.

        Args:
            images: uint8 (B, H, W, 3), RGB.
            noise: float32 (B, C, h, w), the standard normal values of the sample.

        Returns:
            float32 (B, C, h, w), scaled as the UNet expects.
        """
        pixels = images.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
        posterior = self.vae.encode(pixels).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise) * self.vae.config.scaling_factor

    def tokenize(self, captions: list[str]) -> Tensor:
        """Return the tokens of captions, int64 (B, N), cut and padded to the length of the text encoder."""
        length = self.tokenizer.model_max_length
        options = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens: Tensor = self.tokenizer(captions, **options).input_ids
        return tokens

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return the features of tokens, (B, N, D), for the cross attention of the UNet."""
        features: Tensor = self.text_encoder(tokens)[0]
        return features

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the UNet predicts by the scheduler's prediction_type: the noise, or the velocity."""
        if self.scheduler.config.prediction_type == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise


def load_base(source: str) -> DiffusionBase:
    """Load a Stable Diffusion pipeline from a diffusers folder, or by its hub name. Only safetensors are read.

    Raises:
        UserError: It does not exist, is another kind of pipeline, has no safetensors, or predicts neither noise nor
            velocity.
    """
    diffusers, transformers = import_diffusers(), import_module("transformers")
    check_base_index(source, _read_index(source))
    parts: dict[str, Any] = {}
    for part, name in PARTS.items():
        library = transformers if part in ("text_encoder", "tokenizer") else diffusers
        parts[part] = load_part(getattr(library, name), source, part)
    scheduler = diffusers.DDPMScheduler.from_pretrained(source, subfolder="scheduler")
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the scheduler of base={source} has prediction_type={kind}, not epsilon or v_prediction",
            f"type base={EXAMPLE_BASE}",
        )
    base = DiffusionBase(source, parts, scheduler, read_license(source))
    latents, channels = base.vae.config.latent_channels, base.unet.config.in_channels
    if channels != latents:
        raise UserError(
            f"the UNet of base={source} takes {channels} channels, not the {latents} of its VAE, as those for "
            "inpainting",
            f"type base={EXAMPLE_BASE}",
        )
    return base


def load_part(kind: Any, source: str, part: str | None) -> Any:
    """Load a part of a pipeline in float32 from safetensors, of the variant fp16 if there is no other.

    Args:
        kind: Its class.
        source: Folder or hub name.
        part: Subfolder; None for a folder of one model.

    Raises:
        UserError: It cannot be loaded.
    """
    where: dict[str, Any] = {"subfolder": part} if part else {}
    if part == "tokenizer":
        attempts: list[dict[str, Any]] = [where]
    else:
        dtype = "dtype" if part == "text_encoder" else "torch_dtype"
        where |= {"use_safetensors": True, dtype: torch.float32}
        attempts = [where, {**where, "variant": "fp16"}]
    reason = ""
    for options in attempts:
        try:
            return kind.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
        f"{part or kind.__name__} of {source} cannot be loaded ({reason})",
        "give a diffusers folder with safetensors files, as `save_pretrained` writes it",
    )


def _read_index(source: str) -> dict[str, Any]:
    """Read model_index.json.

    Raises:
        UserError: There is no such folder or hub name, or no pipeline in it.
    """
    folder = Path(source)
    try:
        if folder.is_dir():
            index = json.loads((folder / "model_index.json").read_bytes())
        else:
            index = import_diffusers().DiffusionPipeline.load_config(source)
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"base={source} is no diffusers pipeline ({reason})",
            f"type base=FOLDER for one that `save_pretrained` wrote, or a hub name, as base={EXAMPLE_BASE}",
        ) from error
    return index if isinstance(index, dict) else {}


def check_base_index(source: str, index: dict[str, Any]) -> None:
    """Check that model_index.json describes Stable Diffusion 1 or 2.

    Raises:
        UserError: Naming the part that is another.
    """
    for part, expected in PARTS.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else "missing"
        names = (expected, f"{expected}Fast") if part == "tokenizer" else (expected,)
        if found not in names:
            raise UserError(
                f"the {part} of base={source} is {found}, not {expected}: only Stable Diffusion 1 and 2 fit",
                f"type base={EXAMPLE_BASE}",
            )
    if index.get("text_encoder_2"):
        raise UserError(f"base={source} has two text encoders, as SDXL", f"type base={EXAMPLE_BASE}")


def check_base(source: str) -> None:
    """Check the index of a base that is a local folder; nothing is downloaded or imported.

    Raises:
        UserError: As `load_base`, for what the index shows.
    """
    if Path(source).is_dir():
        check_base_index(source, _read_index(source))


def meta_controlnet(source: str) -> Any:
    """Build the ControlNet of a base on the meta device, from the configs of its UNet and VAE.

    Raises:
        UserError: A config cannot be read.
    """
    diffusers = import_diffusers()
    unet, vae = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
    try:
        levels = len(vae.load_config(source, subfolder="vae")["block_out_channels"])
        with torch.device("meta"):
            network = unet.from_config(unet.load_config(source, subfolder="unet"))
            return diffusers.ControlNetModel.from_unet(
                network,
                conditioning_embedding_out_channels=CONDITIONING_CHANNELS[:levels],
                load_weights_from_unet=False,
            )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the UNet or the VAE of base={source} cannot be read ({reason})", f"type base={EXAMPLE_BASE}"
        ) from error


def read_license(source: str) -> str | None:
    """Return the license by the card (README.md) of a folder or hub name; None if it cannot be read."""
    if (card := Path(source, "README.md")).is_file():
        return license_from_card(card.read_text(encoding="utf-8", errors="replace"))
    if Path(source).exists():
        return None
    with suppress(Exception):  # no network, no card, or a private one
        from huggingface_hub import hf_hub_download

        return license_from_card(Path(hf_hub_download(source, "README.md")).read_text(encoding="utf-8"))
    return None


def write_tiny_base(folder: Path, seed: int) -> None:
    """Write a Stable Diffusion pipeline of random weights, of the sizes that diffusers' own tests use.

    The same seed gives the same weights. Its tokens are single letters.

    Args:
        folder: Folder of the pipeline; an existing one is replaced.
        seed: Seed of the weights.
    """
    diffusers, transformers = import_diffusers(), import_module("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=TINY_IMAGE_SIDE // 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=4,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
        tokenizer = _letter_tokenizer(transformers)
        text_encoder = transformers.CLIPTextModel(_tiny_text_config(transformers, tokenizer))
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(folder, sync=False) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        card = "---\nlicense: apache-2.0\n---\n\nRandom weights, written by depth-anything for stage=controlnet.\n"
        (temporary / "README.md").write_text(card)


def _tiny_text_config(transformers: Any, tokenizer: Any) -> Any:
    return transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=_TINY_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _letter_tokenizer(transformers: Any) -> Any:
    """Return a CLIP tokenizer without merges: every byte is a token, with and without the end of a word."""
    # The printable letters that stand for the 256 bytes in GPT-2's vocabulary, which CLIP uses.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_TINY_TOKENS)
