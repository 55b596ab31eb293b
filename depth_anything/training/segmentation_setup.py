"""What a run of stage=segmentation is made of: its network with starting weights, its validation set, and checks."""

from pathlib import Path

import torch

from depth_anything.classes import ClassTable
from depth_anything.data.shards import open_set
from depth_anything.errors import UserError
from depth_anything.evaluation.segmentation_task import SegmentationTask, task_from_class_set
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import hub_license, hub_repository
from depth_anything.model.mask_heads import require_transformers
from depth_anything.model.segmentation import MASK_HEADS, SegmentationModel, WindowRule
from depth_anything.model.weights import load_encoder, read_license
from depth_anything.training.check_config import build_head
from depth_anything.training.config import RunConfig
from depth_anything.training.segmentation_data import read_classes


def build_segmentation_model(config: RunConfig, classes: ClassTable | None = None) -> SegmentationModel:
    """Build the network of a run with its starting weights.

    `init` is "hub" (DINOv2 through timm), a DINOv2 file, or any checkpoint of this project or of the authors, of which
    the encoder is copied; null is random weights, drawn from `seed`.

    Args:
        config: The resolved config.
        classes: The classes; None reads them from the sets.

    Raises:
        UserError: If the file is missing or of another size, or the head is unknown or not installed.
    """
    source = config.init
    if source not in (None, "hub") and not Path(str(source)).exists():
        raise UserError(f"there is no model at {source}", "type init=FILE, init=hub for DINOv2, or init=null")
    torch.manual_seed(config.seed)
    model = SegmentationModel(
        config.encoder,
        classes=classes or read_classes(config.data.sets),
        head=build_head(config) or config.head,
        head_options=config.head_options,
    )
    model.input_size = config.image_size  # saved in the model file
    stride = config.window_stride or max(1, 2 * config.image_size // 3)
    model.window = WindowRule(config.short_side, min(stride, config.image_size))
    if source is not None:
        load_encoder(model, source)  # type: ignore[arg-type]
        named = hub_repository(config.encoder) if source == "hub" else None
        licence = hub_license(config.encoder) if named else read_license(source)
        path = Path(source)
        short = "/".join(path.parts[-2:]) if path.stem in ("model", "best", "last") else path.name
        model.origin = {"start": {"from": named or short, "licence": licence, "base": named}}
    if config.freeze_encoder:
        model.pretrained.requires_grad_(False)
    return model


def check_segmentation_weights(config: RunConfig) -> None:
    """Check the starting weights of a run if their file exists; nothing is downloaded.

    Raises:
        UserError: As `build_segmentation_model`.
    """
    if config.init not in (None, "hub") and Path(str(config.init)).exists():
        load_encoder(DepthAnything(config.encoder), str(config.init))


def check_segmentation_config(config: RunConfig) -> None:
    """Check the keys of stage=segmentation against each other.

    Raises:
        UserError: Naming the key, and what to type.
    """
    if config.validation.benchmark is not None or config.validation.protocol is not None:
        raise UserError(
            "validation.benchmark and validation.protocol are for depth",
            "type sources.segmentation.validation=FOLDER for a set with class maps",
        )
    if config.head in MASK_HEADS and config.model.head is None:
        require_transformers(config.head)
    if config.freeze_encoder and config.head == "eomt":
        raise UserError(
            "head=eomt runs its queries through the encoder", "type freeze_encoder=false, or head=linear"
        )


def segmentation_validation_folder(config: RunConfig) -> str | None:
    """Return the set that a run of stage=segmentation is validated on; None for none."""
    settings = config.sources.segmentation
    if settings is not None and settings.validation is not None:
        return settings.validation
    return None if config.sources.classes is not None else config.sources.validation


def open_segmentation_task(config: RunConfig) -> SegmentationTask | None:
    """Open what a run is validated on; None for nothing.

    Raises:
        UserError: If the set does not exist, or has other classes than the run.
    """
    root = segmentation_validation_folder(config)
    if root is None:
        return None
    task = task_from_class_set(open_set(root), limit=config.validation.limit)
    wanted = [row.name for row in read_classes(config.data.sets)]
    if [row.name for row in task.classes] != wanted:
        raise UserError(
            f"the validation set {root} has other classes than the sets of the run",
            "type sources.segmentation.validation=FOLDER of a set with the same classes",
        )
    return task
