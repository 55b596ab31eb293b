"""Validate stage=controlnet: the loss of held-out images at fixed noise, and pictures made from their depth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from depth_anything.data.captions import read_captions
from depth_anything.data.reader import Records, RecordSource
from depth_anything.data.sample import decode_record, make_disparity_target
from depth_anything.data.shards import open_set
from depth_anything.data.tars import BadRecord
from depth_anything.data.transforms import Crop, crop_image, crop_map
from depth_anything.disk import atomic_path
from depth_anything.errors import UserError
from depth_anything.preprocess import resize_shape
from depth_anything.training.callbacks import StepCallback, gather_or_raise
from depth_anything.training.config import RunConfig
from depth_anything.training.controlnet import ControlNetModule
from depth_anything.training.diffusion import import_diffusers
from depth_anything.training.heartbeat import heartbeat
from depth_anything.training.run_dir import RunDir
from depth_anything.training.whole_network import evaluation_network
from depth_anything.visualize import make_panel

NUM_PICTURES = 4
"""Number of pictures that are made at each validation."""

GUIDANCE_SCALE = 7.5
"""Weight of the prompt: the default of diffusers' StableDiffusionControlNetPipeline."""


@dataclass(frozen=True)
class HeldOutImage:
    """A validation image: its center square.

    Attributes:
        number: Its number in the set, from which its noise follows.
        image: uint8 (S, S, 3), RGB.
        target: float32 (S, S), disparity, 0 where not valid.
        valid: bool (S, S).
        caption: Its first caption, "" without one.
    """

    number: int
    image: np.ndarray
    target: np.ndarray
    valid: np.ndarray
    caption: str


def read_held_out(
    source: RecordSource, *, limit: int, image_size: int, multiple: int
) -> Iterator[HeldOutImage]:
    """Read the first images of a set, resized as in training, and cut out their center squares.

    Args:
        source: Images with depth or disparity.
        limit: Number of images.
        image_size: Side of the square, pixels.
        multiple: Both sides of a resized image are multiples of it.

    Raises:
        UserError: An image has neither depth nor disparity, or its label is smaller than the square.
    """
    number = 0
    for shard, records in source.shards:
        for index in range(records):
            if number == limit:
                return
            try:
                key, fields = source.read(shard, index)
                frame = decode_record(key, fields)
            except (BadRecord, ValueError):
                continue  # training reports it
            try:
                target, valid = make_disparity_target(frame)
            except ValueError as error:
                raise UserError(
                    f"{error}", "type sources.validation=FOLDER for a set with depth, or null"
                ) from error
            shape = frame.image.shape
            height, width = resize_shape(shape[0], shape[1], image_size, multiple)
            top, left = (height - image_size) // 2, (width - image_size) // 2
            crop = Crop(height, width, top, left, image_size, False)
            try:
                caption = read_captions(fields, frame.meta)[0]
            except ValueError:
                caption = ""
            maps = crop_map(target, crop), crop_map(valid, crop)
            yield HeldOutImage(number, crop_image(frame.image, crop), *maps, caption)
            number += 1


class ControlNetValidation(StepCallback):
    """Compute "val_loss" on held-out images and make pictures, which are saved in pictures/ and sent to the loggers.

    Noise and timestep of image k are those of sample k, so that values of different steps can be compared. Without a
    validation set only pictures are made, of the first training images.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        """Validate every `validation.every` optimizer steps and at the end."""
        self.config, self.run_dir, self.every = config, run_dir, config.validation.every
        self.images: list[HeldOutImage] = []
        self.count = 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Read the held-out images: on rank 0 those of the pictures, on each rank its share for the loss."""
        super().on_train_start(trainer, module)
        gather_or_raise(trainer.world_size, lambda: self._read(trainer, module))

    def _read(self, trainer: Any, module: ControlNetModule) -> None:
        root, limit = self.config.sources.validation, self.config.validation.limit
        source: RecordSource
        if root is not None:
            source = Records(open_set(root))
        else:
            source, limit = trainer.datamodule.open().sources[0], NUM_PICTURES
        size = {"image_size": self.config.image_size, "multiple": module.base.multiple}
        self.images = list(read_held_out(source, limit=limit, **size))

    def on_step(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Validate when due."""
        if not self.images or (step % self.every and step != trainer.max_steps):
            return
        training = module.model.training
        module.model.eval()
        with heartbeat.during("validation"), evaluation_network(trainer, module), torch.no_grad():
            if self.config.sources.validation is not None:
                loss = self._loss(trainer, module)
                for logger in trainer.loggers:
                    logger.log_metrics({"val_loss": loss}, step=step)

            def write_picture() -> None:
                if trainer.is_global_zero:
                    self._write_picture(trainer, module, step)

            gather_or_raise(trainer.world_size, write_picture)  # a full disk stops all ranks
        module.model.train(training)

    def _loss(self, trainer: pl.Trainer, module: ControlNetModule) -> float:
        """Return the mean loss of all held-out images, of which each rank computes its share."""
        share = self.images[trainer.global_rank :: trainer.world_size]
        size = max(1, self.config.batch_size // trainer.world_size)
        losses: list[float] = []
        for start in range(0, len(share), size):
            batch = _batch(module, share[start : start + size])
            with trainer.precision_plugin.forward_context():
                losses += module.image_losses(batch).tolist()
        return float(
            np.mean([loss for part in gather_or_raise(trainer.world_size, lambda: losses) for loss in part])
        )

    def _write_picture(self, trainer: pl.Trainer, module: ControlNetModule, step: int) -> None:
        shown = self.images[:NUM_PICTURES]
        conditions = _batch(module, shown)["condition"].cpu().numpy()
        with trainer.precision_plugin.forward_context():
            made = generate_images(
                module,
                conditions,
                [image.caption for image in shown],
                seeds=[image.number for image in shown],
                steps=self.config.validation.sampling_steps,
            )
        rows = [[image.image, *pair] for image, *pair in zip(shown, conditions, made, strict=True)]
        picture = make_panel(rows, titles=["image", "depth", f"step {step}"])
        path: Path = self.run_dir.pictures / f"step-{step:09d}.jpg"
        with atomic_path(path, make_folder=True) as temporary:
            Image.fromarray(picture).save(temporary, "JPEG", quality=90)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("controlnet", [picture], step=step)


def _batch(module: ControlNetModule, images: Sequence[HeldOutImage]) -> dict[str, Any]:
    """Return a prepared batch of held-out images on the device of the module, with all captions."""
    batch = {
        "image": torch.from_numpy(np.stack([image.image for image in images])),
        "target": torch.from_numpy(np.stack([image.target for image in images])),
        "valid": torch.from_numpy(np.stack([image.valid for image in images])),
        "sample": torch.tensor([image.number for image in images]),
    }
    batch |= module.prepare(batch, [image.caption for image in images], caption_dropout=0.0)
    return {name: values.to(module.device) for name, values in batch.items()}


def generate_images(
    module: ControlNetModule,
    conditions: np.ndarray,
    captions: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
) -> list[np.ndarray]:
    """Make an image for each conditioning image with diffusers' pipeline, its UniPC scheduler and fixed noise.

    Args:
        module: The ControlNet and its base.
        conditions: uint8 (B, S, S, 3).
        captions: A prompt for each.
        seeds: Seed of the noise for each, which is drawn on the CPU.
        steps: Number of denoising steps.

    Returns:
        uint8 (S, S, 3) each.
    """
    diffusers, base = import_diffusers(), module.base
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        controlnet=module.model,
        scheduler=diffusers.UniPCMultistepScheduler.from_config(base.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it warns of each caption that CLIP cuts off
    images = []
    for condition, caption, seed in zip(conditions, captions, seeds, strict=True):
        made = pipeline(
            caption,
            Image.fromarray(condition),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        images.append((np.nan_to_num(made).clip(0, 1) * 255).round().astype(np.uint8))
    diffusers.utils.logging.set_verbosity(verbosity)
    return images
