"""stage=segmentation: train a head for semantic segmentation, and the encoder with it (V1 §4.4 and its semseg/)."""

from typing import Any

import torch
from torch import Tensor, nn

from depth_anything.model.segmentation import SegmentationModel
from depth_anything.model.segmentation_files import build_segmentation_metadata
from depth_anything.training.base import DepthModule
from depth_anything.training.optimizer import learning_rate_factor
from depth_anything.training.recipes import Recipe

EMBEDDINGS = ("cls_token", "pos_embed", "mask_token", "reg_token", "level_embed")
"""Names of parameters that are embeddings and no weights, and are not decayed."""


class Segmentation(DepthModule):
    """The segmentation stage: the loss of the model's head; weight decay spares norms and embeddings.

    The loss is the mean over the images of the global batch, for heads of masks too, so that it depends neither on the
    number of devices nor on gradient accumulation.
    """

    model: Any

    def __init__(self, model: SegmentationModel, recipe: Recipe, *, frozen: None = None) -> None:
        """Store a network with its starting weights, and the hyperparameters.

        Args:
            model: The network to train.
            recipe: The hyperparameters.
            frozen: None; this stage has no feature alignment.
        """
        super().__init__(model, recipe, frozen=frozen)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's metadata to the checkpoint, so that `load_segmentation` reads it like a model file."""
        checkpoint["depth_anything"] = build_segmentation_metadata(self.model)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over four parameter groups, and its schedule, which advances every step."""
        r = self.recipe
        groups = decay_groups(self.model, encoder_lr=r.encoder_lr, head_lr=r.head_lr)
        optimizer = self.build_optimizer(groups)

        def factor(step: int) -> float:
            return learning_rate_factor(step, steps=r.steps, warmup=r.warmup, schedule=r.schedule)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of the head and its parts."""
        if self.model.head == "eomt":
            self.model.segmentation_head.anneal(self.global_step / self.recipe.steps)
        image = self.inputs(batch)["image"]
        return self.model.losses(image, batch["target"], batch["sample"].tolist())


def decay_groups(model: SegmentationModel, *, encoder_lr: float, head_lr: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by encoder and head, and by whether they are decayed.

    Weights of norms, embeddings and tokens are not decayed; biases of other layers are, as in V1's config.

    Returns:
        Groups "encoder", "encoder_no_decay", "head", "head_no_decay", those that are not empty.
    """
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d | nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    spared |= {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] in EMBEDDINGS}
    groups: list[dict[str, Any]] = []
    for name, parameters, rate in (
        ("encoder", model.encoder_parameters(), encoder_lr),
        ("head", model.head_parameters(), head_lr),
    ):
        decayed = [p for p in parameters if id(p) not in spared]
        others = [p for p in parameters if id(p) in spared]
        groups.append({"name": name, "params": decayed, "lr": rate})
        groups.append({"name": f"{name}_no_decay", "params": others, "lr": rate, "weight_decay": 0.0})
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    return [group for group in groups if group["params"]]
