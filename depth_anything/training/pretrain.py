"""stage=pretrain: train an encoder on images alone by masked autoencoding (He et al. 2022, arXiv 2111.06377)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from depth_anything.data.transforms import normalize
from depth_anything.disk import atomic_path
from depth_anything.model.masked_autoencoder import (
    MaskedAutoencoder,
    encoder_metadata,
    join_patches,
    masked_patch_loss,
    normalize_patches,
    split_patches,
)
from depth_anything.preprocess import IMAGENET_MEAN, IMAGENET_STD
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import StepCallback, gather_or_raise
from depth_anything.training.recipes import PretrainRecipe
from depth_anything.training.run_dir import RunDir
from depth_anything.training.whole_network import evaluation_network
from depth_anything.visualize import make_panel

__all__ = ["Pretrain", "PretrainRecipe", "ReconstructionPictures", "count_visible"]

NUM_PICTURES = 4
"""Number of images whose reconstruction is painted."""


def count_visible(patches: int, mask_ratio: float) -> int:
    """Return how many of an image's patches the encoder sees: the share that is not masked, rounded down, or one.

    >>> count_visible(100, 0.75), count_visible(100, 0.9), count_visible(9, 0.75), count_visible(4, 0.9)
    (25, 10, 2, 1)
    """
    return max(1, int(patches * (1 - mask_ratio) + 1e-9))


class Pretrain(DepthModule):
    """Masked autoencoding: predict the patches that the encoder did not see, from those that it saw."""

    model: MaskedAutoencoder  # type: ignore[assignment]
    recipe: PretrainRecipe

    def __init__(self, model: MaskedAutoencoder, recipe: PretrainRecipe, *, frozen: None = None) -> None:
        """Store a masked autoencoder with its starting weights, and the hyperparameters.

        Args:
            model: The encoder and its decoder.
            recipe: The hyperparameters.
            frozen: None; this stage has no feature alignment.
        """
        super().__init__(model, recipe, frozen=frozen)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the encoder's metadata, so that `init=CHECKPOINT` knows its license."""
        checkpoint["depth_anything"] = encoder_metadata(self.model)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the mean squared error of the masked patches in float32 as "loss".

        Args:
            batch: "image" uint8 (B,S,S,3) and "patch_order" int64 (B,N) of `ImageDataset`.
        """
        image, order = normalize(batch["image"]), batch["patch_order"]
        visible = count_visible(order.shape[1], self.recipe.mask_ratio)
        prediction = self.model(image.to(next(self.model.parameters()).dtype), order, visible)
        with torch.autocast(prediction.device.type, enabled=False):
            target = split_patches(image, self.model.patch_size)
            if self.recipe.normalize_targets:
                target = normalize_patches(target)[0]
            loss = masked_patch_loss(prediction, target, order, visible)
        return {"loss": loss}

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Paint images, what the encoder sees of them, and what the decoder makes of it.

        Normalized predictions get the mean and deviation of the true patch, which the network does not predict.

        Returns:
            Three uint8 arrays (B,S,S,3): images, images with gray masked patches, images with predicted ones.
        """
        image, order = normalize(batch["image"]), batch["patch_order"]
        patches = split_patches(image, self.model.patch_size)
        visible = count_visible(order.shape[1], self.recipe.mask_ratio)
        predicted = self.model(image, order, visible).float()
        if self.recipe.normalize_targets:
            _, mean, deviation = normalize_patches(patches)
            predicted = predicted * deviation + mean
        seen = (order.argsort(1) < visible)[:, :, None]
        grid = (image.shape[2] // self.model.patch_size, image.shape[3] // self.model.patch_size)
        views = (patches, torch.where(seen, patches, 0.0), torch.where(seen, patches, predicted))
        return tuple(_to_pixels(join_patches(view, grid)) for view in views)  # type: ignore[return-value]


def _to_pixels(image: Tensor) -> np.ndarray:
    """Turn normalized (B,3,H,W) into uint8 (B,H,W,3)."""
    pixels = image.permute(0, 2, 3, 1).cpu().numpy() * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    painted: np.ndarray = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return painted


class ReconstructionPictures(StepCallback):
    """Paint the reconstruction of the first images of the stream into pictures/, as validation paints depth maps."""

    def __init__(self, run_dir: RunDir, *, every: int) -> None:
        """Paint every `every` optimizer steps and at the end."""
        self.run_dir, self.every = run_dir, every
        self.batch: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read the first samples of the run; a run that resumes paints the same ones."""
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            batch = trainer.datamodule.open().__getitems__(range(NUM_PICTURES))  # type: ignore[attr-defined]
            self.batch = {name: batch[name].to(module.device) for name in ("image", "patch_order")}

    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Paint when due."""
        if step % self.every and step != trainer.max_steps:
            return

        def write() -> None:
            if trainer.is_global_zero:
                training = module.model.training
                module.model.eval()
                write_panel(module.reconstruct(self.batch), self.run_dir, step)
                module.model.train(training)

        with evaluation_network(trainer, module):
            gather_or_raise(trainer.world_size, write)  # a full disk stops all ranks


def write_panel(views: Sequence[np.ndarray], run_dir: RunDir, step: int) -> None:
    """Write the views of `Pretrain.reconstruct` as a picture of the run folder, a row for each image."""
    rows = [list(row) for row in zip(*views, strict=True)]
    picture = make_panel(rows, titles=["image", "seen", f"step {step}"])
    path = run_dir.pictures / f"step-{step:09d}.jpg"
    with atomic_path(path, make_folder=True) as temporary:
        Image.fromarray(picture).save(temporary, "JPEG", quality=90)
