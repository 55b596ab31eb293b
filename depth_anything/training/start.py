"""What a run starts from: its weights, and where they may not come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.weights import load_encoder, load_model


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
    if source != "hub" and config["stage"] == "student" and _is_teacher(Path(source)):
        raise ValueError(
            f"init={source} is a teacher; a student starts from DINOv2 of its size: "
            "type init=hub or init=DINOV2_FILE"
        )
    if (
        source != "hub"
        and Path(source).suffix == ".safetensors"
        and (Path(source).parent / "config.yaml").is_file()
    ):
        model.load_state_dict(load_model(source, encoder=config["encoder"]).state_dict())
    else:
        load_encoder(model, source)
    return model


def twin(config: Mapping[str, Any]) -> DepthAnything | None:
    """Build the frozen DINOv2 that a student's features are aligned with; None where they are not.

    Raises:
        ValueError: If features are to be aligned and there are no DINOv2 weights.
    """
    if not config["recipe"].get("alignment_weight"):
        return None
    if config["init"] is None:
        raise ValueError(
            "feature alignment needs DINOv2's weights; type init=hub, init=DINOV2_FILE or recipe.alignment_weight=0"
        )
    frozen = DepthAnything(config["encoder"])
    load_encoder(frozen, config["init"])
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
    config = path.parent / "config.yaml"
    return config.is_file() and (yaml.safe_load(config.read_text()) or {}).get("stage") == "teacher"
