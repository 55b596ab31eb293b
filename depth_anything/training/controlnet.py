"""stage=controlnet: train a ControlNet, conditioned on depth, for a frozen Stable Diffusion (V1's controlnet/)."""

from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from depth_anything.data.captions import caption_texts
from depth_anything.data.stream import DIFFUSION, random_uint64
from depth_anything.errors import UserError
from depth_anything.training.base import continue_from_checkpoint, schedule_optimizer
from depth_anything.training.diffusion import DiffusionBase
from depth_anything.training.optimizer import OptimizerFactory, adam_factory
from depth_anything.training.recipes import ControlNetRecipe
from depth_anything.training.step_guard import StepGuard, poison_loss
from depth_anything.visualize import conditioning_image

__all__ = ["ControlNetModule", "ControlNetRecipe"]

_TO_UNIT = 2.0**-53  # of 53 random bits


class ControlNetPair(NamedTuple):
    """The ControlNet that is trained, diffusers' ControlNetModel, and the frozen pipeline under it."""

    controlnet: Any
    base: DiffusionBase


class DiffusionDraw(NamedTuple):
    """What is random about a training sample.

    Attributes:
        noise: float32 (2, C, h, w), standard normal: that of the VAE's posterior, and the one that is added.
        timestep: At least 0, below the number of steps of the schedule.
        drop_caption: Whether the caption is replaced by an empty one.
    """

    noise: Tensor
    timestep: int
    drop_caption: bool


def draw_diffusion(
    seed: int, n: int, shape: tuple[int, int, int], *, timesteps: int, caption_dropout: float
) -> DiffusionDraw:
    """Draw the noise of sample `n` from its number, on any device and in any micro-batch the same.

    Args:
        seed: Seed of the run.
        n: Number of the sample.
        shape: (C, h, w) of its latents.
        timesteps: Number of steps of the noise schedule.
        caption_dropout: Share of the samples without a caption.
    """
    words = random_uint64(seed, n, 3, purpose=DIFFUSION)
    generator = torch.Generator().manual_seed(int(words[0]))
    noise = torch.randn((2, *shape), generator=generator)
    dropped = float(words[2] >> np.uint64(11)) * _TO_UNIT < caption_dropout
    return DiffusionDraw(noise, int(words[1] % np.uint64(timesteps)), dropped)


class ControlNetModule(pl.LightningModule):
    """A ControlNet in training: the mean squared error of the noise, or velocity, that the UNet predicts with it.

    The loss is the mean over the images of the global batch. Noise, timestep and dropped captions of a sample follow
    from its number, so that neither devices nor accumulation nor a restart change them.
    """

    def __init__(self, networks: ControlNetPair, recipe: ControlNetRecipe, *, seed: int) -> None:
        """Store the networks.

        Args:
            networks: The ControlNet to train, and the frozen pipeline, which is not part of the state dict.
            recipe: The hyperparameters.
            seed: Seed of the noise.
        """
        super().__init__()
        self.model, self.base = networks
        self.recipe, self.seed = recipe, seed
        adam: Any = recipe  # it has the betas and the weight decay
        self.build_optimizer: OptimizerFactory = adam_factory(adam)
        self.parts: list[dict[str, Tensor]] = []
        self.grad_norm: Tensor | None = None
        self.step_guard = StepGuard()

    def configure_model(self) -> None:
        """Recompute activations in the backward pass if the recipe says so; the UNet's decoder is part of it."""
        if self.recipe.checkpointing:
            self.model.enable_gradient_checkpointing()
            self.base.unet.enable_gradient_checkpointing()

    def on_fit_start(self) -> None:
        """Move the frozen networks to the device, in the half precision of a mixed-precision run."""
        self.base.move(self.device, self.frozen_dtype())

    def frozen_dtype(self) -> torch.dtype:
        """Return the dtype of the frozen networks: that of autocast, else of the ControlNet."""
        precision = str(self.trainer.precision)
        mixed = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
        return mixed.get(precision, next(self.model.parameters()).dtype)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the fingerprint of the frozen networks."""
        checkpoint["diffusion_base"] = self.base.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Apply today's recipe, and check that the frozen networks are those of the checkpoint.

        Raises:
            UserError: If they are others.
        """
        if checkpoint.get("diffusion_base", self.base.fingerprint) != self.base.fingerprint:
            raise UserError(
                f"the weights of base={self.base.source} are not those that this run was trained with",
                "restore them, or type name=ANOTHER_NAME for a new run",
            )
        continue_from_checkpoint(self, checkpoint)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the ControlNet, and its schedule, which advances every step."""
        group = {"name": "controlnet", "params": list(self.model.parameters()), "lr": self.recipe.lr}
        return schedule_optimizer(self.build_optimizer([group]), self.recipe)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Add what follows from samples and captions, on the CPU: see `prepare`."""
        texts = caption_texts(batch["caption"].numpy())
        return {**batch, **self.prepare(batch, texts, caption_dropout=self.recipe.caption_dropout)}

    def prepare(
        self, batch: dict[str, Any], captions: list[str], *, caption_dropout: float
    ) -> dict[str, Tensor]:
        """Compute conditioning images, tokens, noise and timesteps of a batch on the CPU.

        Args:
            batch: "image" uint8 (B, H, W, 3), "target" float32 (B, H, W) disparity, "valid" bool, "sample" int64 (B,).
            captions: A caption per image.
            caption_dropout: Share of captions that are dropped.

        Returns:
            "condition" uint8 (B, H, W, 3), "tokens" int64 (B, N), "noise" float32 (B, 2, C, h, w), "timestep" int64
            (B,).
        """
        shape = self.base.latent_shape(*batch["target"].shape[1:])
        steps = self.base.scheduler.config.num_train_timesteps
        draws = [
            draw_diffusion(self.seed, n, shape, timesteps=steps, caption_dropout=caption_dropout)
            for n in batch["sample"].tolist()
        ]
        kept = ["" if draw.drop_caption else text for draw, text in zip(draws, captions, strict=True)]
        maps = zip(batch["target"].numpy(), batch["valid"].numpy(), strict=True)
        conditions = [conditioning_image(map_, quantity="disparity", valid=valid) for map_, valid in maps]
        return {
            "condition": torch.from_numpy(np.stack(conditions)),
            "tokens": self.base.tokenize(kept),
            "noise": torch.stack([draw.noise for draw in draws]),
            "timestep": torch.tensor([draw.timestep for draw in draws]),
        }

    def image_losses(self, batch: dict[str, Any]) -> Tensor:
        """Compute the mean squared error of each image of a prepared batch, float32 (B,)."""
        base, dtype = self.base, self.base.dtype
        posterior_noise, noise = batch["noise"].unbind(1)
        latents, timesteps = base.encode_images(batch["image"], posterior_noise), batch["timestep"]
        noisy = base.scheduler.add_noise(latents, noise, timesteps)
        text = base.encode_text(batch["tokens"])
        own = next(self.model.parameters()).dtype
        down, middle = self.model(
            noisy.to(own),
            timesteps,
            encoder_hidden_states=text.to(own),
            controlnet_cond=batch["condition"].permute(0, 3, 1, 2).to(own) / 255,
            return_dict=False,
        )
        prediction = base.unet(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=[residual.to(dtype) for residual in down],
            mid_block_additional_residual=middle.to(dtype),
        ).sample
        error = prediction.float() - base.target(latents, noise, timesteps)
        return error.square().flatten(1).mean(1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch; it stays on the device in `parts` until the step is logged."""
        loss = self.image_losses(batch).mean()
        share = batch["valid"].mean(dtype=loss.dtype)
        self.parts.append({"loss": loss.detach(), "valid_share": share})
        return poison_loss(loss)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradient norm and clip it to `clip_norm`; skip the step if it is not finite (`StepGuard`)."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm or float("inf"))
        self.step_guard.apply(optimizer, self.grad_norm, [part["loss"] for part in self.parts])
