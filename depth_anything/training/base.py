"""The LightningModule that the stages which train share: batch preparation, losses, optimizer and checkpoints."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from depth_anything.data.transforms import apply_cutmix, normalize
from depth_anything.losses import invariant_losses, scale_shift_invariant_loss
from depth_anything.model.accelerate import accelerate, copy_without_weights, shard
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.lora import lora_metadata
from depth_anything.model.metadata import build_metadata
from depth_anything.training.optimizer import (
    OptimizerFactory,
    adam_factory,
    clip_gradients,
    learning_rate_factor,
    parameter_groups,
)
from depth_anything.training.recipes import ControlNetRecipe, Recipe
from depth_anything.training.resume import apply_recipe
from depth_anything.training.step_guard import StepGuard, poison_loss

__all__ = ["DepthModule", "Recipe"]

LABEL_MAPS = ("confidence", "local", "local_valid", "local_confidence")
"""Maps (B,S,S) that a batch has if the optional fields of labels are used (data/label_fields.py)."""


def continue_from_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Apply today's recipe to a checkpoint, and count the finished batches in micro-batches of today's size."""
    apply_recipe(checkpoint, module.configure_optimizers())
    done = module.trainer.accumulate_grad_batches * checkpoint["global_step"]
    loop = checkpoint["loops"]["fit_loop"]
    for span in ("total", "current"):
        loop["epoch_loop.batch_progress"][span].update(
            ready=done, started=done, processed=done, completed=done
        )
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]


def schedule_optimizer(optimizer: torch.optim.Optimizer, recipe: Recipe | ControlNetRecipe) -> dict[str, Any]:
    """Return what `configure_optimizers` returns: the optimizer, and its schedule, which advances every step."""

    def factor(step: int) -> float:
        return learning_rate_factor(step, steps=recipe.steps, warmup=recipe.warmup, schedule=recipe.schedule)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class DepthModule(pl.LightningModule):
    """A depth network in training: losses, optimizer, gradient clipping and checkpoint metadata.

    The loss is the mean over the images of the global batch, so it depends neither on the number of devices nor on
    gradient accumulation (docs/contracts.md). A stage overrides `losses`.
    """

    def __init__(self, model: DepthAnything, recipe: Recipe, *, frozen: DepthAnything | None = None) -> None:
        """Store a network with its starting weights, and the hyperparameters.

        Args:
            model: The network to train.
            recipe: The hyperparameters.
            frozen: The same encoder with DINOv2's weights, for feature alignment. It is not part of the state dict, of
                the optimizer or of data parallelism.
        """
        super().__init__()
        # Tuples, so that PyTorch does not register them as submodules.
        self._frozen: tuple[DepthAnything, ...] = ()
        self._plain: tuple[nn.Module, ...] = ()
        if frozen is not None:
            self._frozen = (frozen.eval().requires_grad_(False),)
        self.model = model
        self.recipe = recipe
        self.build_optimizer: OptimizerFactory = adam_factory(recipe)
        self.parts: list[dict[str, Tensor]] = []
        self.grad_norm: Tensor | None = None
        self.step_guard = StepGuard()
        self._accelerated = False

    def configure_model(self) -> None:
        """Apply checkpointing, compilation and, with trainer=fsdp, sharding, in that order."""
        if self._accelerated:  # Lightning may call this hook more than once
            return
        self._accelerated = True
        if self.device_mesh is not None:
            self._plain = (copy_without_weights(self.model),)
        accelerate(self.model, checkpoint=self.recipe.checkpointing, compile=self.recipe.compile)
        if self.device_mesh is not None:
            # Autocast of a CPU computes no norm of float32 tokens with bfloat16 weights.
            half = self.trainer.precision == "bf16-mixed" and self.device_mesh.device_type == "cuda"
            gather_dtype = torch.bfloat16 if half else None
            for network in (self.model, *self._frozen):
                shard(network, self.device_mesh["data_parallel"], gather_dtype=gather_dtype)

    @property
    def plain_model(self) -> nn.Module:
        """A copy of a sharded network as it was before, without weights."""
        return self._plain[0]

    def on_fit_start(self) -> None:
        """Move the frozen network to the device; Lightning moves registered submodules only."""
        for network in self._frozen:
            network.to(device=self.device, dtype=next(self.model.parameters()).dtype)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's metadata to the checkpoint, so that `load_model` reads it like a model file."""
        checkpoint["depth_anything"] = {**build_metadata(self.model), **lora_metadata(self.model)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Apply today's recipe, and count the finished batches in micro-batches of today's size.

        Lightning itself would restore the learning rates and the batch count of the old run.
        """
        continue_from_checkpoint(self, checkpoint)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over two parameter groups, and its schedule, which advances every step."""
        r = self.recipe
        groups = parameter_groups(self.model, encoder_lr=r.encoder_lr, head_lr=r.head_lr)
        return schedule_optimizer(self.build_optimizer(groups), r)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Prepare the inputs of the network and the targets from a batch, on its device.

        Args:
            batch: "image" uint8 (B,S,S,3), "target" (B,S,S), "valid" bool (B,S,S); with perturb=true "perturbation"
                float32 (B,P), with cutmix=true "box" float32 (B,4); those of LABEL_MAPS that are used.

        Returns:
            "clean" and "image" (B,3,S,S), normalized with ImageNet's mean and deviation, in the parameters' dtype
            (the same tensor without perturbation); "target"; "valid"; those of LABEL_MAPS that the batch has; with
            CutMix "region", bool (B,S,S), true where the pixels are from another image.
        """
        dtype = next(self.model.parameters()).dtype
        clean = image = normalize(batch["image"]).to(dtype)
        if "perturbation" in batch:
            image = normalize(batch["image"], batch["perturbation"]).to(dtype)
        given = {"clean": clean, "image": image, "target": batch["target"], "valid": batch["valid"]}
        given |= {name: batch[name] for name in LABEL_MAPS if name in batch}
        return apply_cutmix(given, batch["box"]) if "box" in batch else given

    def disparity_losses(self, prediction: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the ssi and gradient-matching losses of a (B,H,W) disparity in float32, as scalars.

        With CutMix the two parts of an image are normalized and compared separately, and their losses are weighted by
        area (V1, equations 5 to 8). With "local" in `given`, "local" is the ssi loss of the part of the prediction for
        which a teacher has labeled a crop by itself (Distill Any Depth, equation 8).
        """
        r, weight = self.recipe, None
        maps = {name: given[name] for name in ("target", "valid", *LABEL_MAPS) if name in given}
        if "region" in given:
            region = given["region"]
            share = region.float().mean((1, 2))
            prediction = prediction.repeat(2, 1, 1)
            maps = {name: values.repeat(2, 1, 1) for name, values in maps.items()}
            parts = torch.cat([region, ~region])
            maps |= {name: maps[name] & parts for name in ("valid", "local_valid") if name in maps}
            weight = 2 * torch.cat([share, 1 - share])  # the mean is over 2B maps
        with torch.autocast(prediction.device.type, enabled=False):
            ssi, gm = invariant_losses(
                prediction,
                maps["target"],
                maps["valid"],
                scales=r.gm_scales,
                trim=r.trim,
                gradient_trim=r.gm_trim,
                weight=weight,
                normalization=r.normalization,
                levels=r.normalization_levels,
                pixel_weight=maps.get("confidence"),
            )
            if "local" not in maps:
                return {"ssi": ssi, "gm": gm}
            local = scale_shift_invariant_loss(
                prediction,
                maps["local"],
                maps["local_valid"],
                trim=r.trim,
                normalization=r.normalization,
                levels=r.normalization_levels,
                pixel_weight=maps.get("local_confidence"),
                weight=weight,
            )
        return {"ssi": ssi, "gm": gm, "local": local}

    def weighted_sum(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the sum of the disparity losses in `parts`, each times its weight in the recipe."""
        r = self.recipe
        loss = r.ssi_weight * parts["ssi"] + r.gm_weight * parts["gm"]
        return loss + r.local_weight * parts["local"] if "local" in parts else loss

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss terms of the stage, and their weighted sum as "loss"; stages override this."""
        given = self.inputs(batch)
        parts = self.disparity_losses(self.model(given["image"]), given)
        return {"loss": self.weighted_sum(parts), **parts}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch; its terms stay on the device in `parts` until the step is logged.

        `parts` also gets "valid_share", the share of the micro-batch's pixels that are valid, between 0 and 1, if the
        batch has targets.
        """
        parts = self.losses(batch)
        shares = {}
        if "valid" in batch:
            shares["valid_share"] = batch["valid"].mean(dtype=parts["loss"].dtype)
        self.parts.append({**{name: value.detach() for name, value in parts.items()}, **shares})
        return poison_loss(parts["loss"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradient norm and clip it to `clip_norm`; skip the step if it is not finite (`StepGuard`).

        Lightning's own clipping refuses fused optimizers.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        self.grad_norm = clip_gradients(parameters, self.recipe.clip_norm)
        self.step_guard.apply(optimizer, self.grad_norm, [part["loss"] for part in self.parts])
