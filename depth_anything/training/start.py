"""What a run starts from: its weights, and where they may not come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.weights import has_head, load_encoder, load_model


def network(config: Mapping[str, Any]) -> DepthAnything:
    """Build the network of a run with its starting weights.

    `init` is "hub" (DINOv2 through timm), a DINOv2 file, a model of this project or the authors, or null for
    random weights, drawn from `seed`.

    Raises:
        ValueError: If the file is of another size or kind, or a student would start from a teacher.
    """
    torch.manual_seed(config["seed"])
    model = DepthAnything(config["encoder"])
    model.input_size = config["image_size"]  # kept in the model file: what it was trained to see
    source = config["init"]
    if source is None:
        return model
    if config["stage"] == "student" and _is_teacher(Path(source)):
        raise ValueError(
            f"init={source} is a teacher; a student starts from DINOv2 of its size: "
            "type init=hub or init=DINOV2_FILE"
        )
    if source != "hub" and has_head(source):
        model.load_state_dict(load_model(source, encoder=config["encoder"]).state_dict())
    else:
        load_encoder(model, source)
    return model


def multiple_of(encoder: str) -> int:
    """Look up what an encoder's images are resized to multiples of, pixels, without building its weights."""
    with torch.device("meta"):
        return DepthAnything(encoder).multiple


def twin(config: Mapping[str, Any]) -> DepthAnything | None:
    """Build the frozen DINOv2 that a student's features are aligned with; None where they are not.

    Raises:
        ValueError: If features are to be aligned and there are no DINOv2 weights.
    """
    if not config["recipe"].get("alignment_weight"):
        return None
    source = config["init"]
    if source is None or (source != "hub" and has_head(source)):
        raise ValueError(
            f"features are aligned with DINOv2's, and init={source} is not DINOv2; type init=hub, init=DINOV2_FILE "
            "or recipe.alignment_weight=0"
        )
    frozen = DepthAnything(config["encoder"])
    load_encoder(frozen, source)
    return frozen


def load_teacher(config: Mapping[str, Any]) -> DepthAnything:
    """Load the network that labels.

    Raises:
        ValueError: If there is none where `teacher` points.
    """
    path = Path(config["teacher"])
    if not path.is_file():
        raise ValueError(
            f"there is no teacher at {path}; run `python train.py stage=teacher size={config['size']}` first, "
            "or type teacher=FILE"
        )
    return load_model(path, encoder=config["encoder"])


def _is_teacher(path: Path) -> bool:
    for folder in path.parents[:2]:  # a run's model, or one of its checkpoints
        config = folder / "config.yaml"
        if path.is_file() and config.is_file():
            return (yaml.safe_load(config.read_text()) or {}).get("stage") == "teacher"
    return False
