"""Tiny depth models of transformers with random weights, saved as folders that `from_pretrained` loads."""

from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("dpt", "zoedepth", "depth_pro", "depth_anything", "depth_anything-metric", "glpn")
SLOW_FAMILIES = ("dpt-depth",)  # its projection has 256 channels at any size
NEAR_FAMILY = "depth_anything-near-metric"
"""Predicts depth around zero, where 1 / depth magnifies every rounding."""
DINOV2 = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "out_indices": [1, 2, 3, 4],
    "reshape_hidden_states": False,
}


def make_transformers_folder(family: str, folder: Path, *, licence: str | None = "apache-2.0") -> Path:
    """Write a model of a family and its image processor, and a card with a license."""
    torch.manual_seed(5)
    model, processor = BUILDERS[family.partition("-")[0]](family)
    with torch.no_grad():
        for parameter in model.parameters():  # at their initial 0.02 maps would be flat
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
        last = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
        if family in ("dpt-depth", "depth_anything-metric"):  # depth near zero would make the inverse rough
            last.weight.mul_(0.03 if family == "dpt-depth" else 0.1)
            last.bias.fill_(2.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if licence is not None:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# tiny\n")
    return folder


def _depth_anything(family: str) -> tuple[Any, Any]:
    backbone = transformers.Dinov2Config(**{**DINOV2, "apply_layernorm": True})
    metric = {"depth_estimation_type": "metric", "max_depth": 20} if family.endswith("metric") else {}
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
        **metric,
    )
    processor = transformers.DPTImageProcessor(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    return transformers.DepthAnythingForDepthEstimation(config), processor


def _dpt(family: str) -> tuple[Any, Any]:
    extra: dict[str, Any] = {}
    if family == "dpt-depth":  # as facebook/dpt-dinov2-small-nyu
        extra = {"backbone_config": transformers.Dinov2Config(**DINOV2), "add_projection": True}
    config = transformers.DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=48,
        patch_size=14 if extra else 16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=256 if extra else 16,  # the projection has 256 channels
        is_hybrid=False,
        head_in_index=-1,
        **extra,
    )
    side = 56 if extra else 48
    processor = transformers.DPTImageProcessor(
        size={"height": side, "width": side},
        keep_aspect_ratio=bool(extra),
        ensure_multiple_of=14 if extra else 16,
    )
    return transformers.DPTForDepthEstimation(config), processor


def _zoedepth(family: str) -> tuple[Any, Any]:
    backbone = transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = transformers.ZoeDepthConfig(
        backbone_config=backbone,
        backbone_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        bottleneck_features=16,
        bin_embedding_dim=16,
        num_relative_features=16,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
    )
    processor = transformers.ZoeDepthImageProcessor(size={"height": 64, "width": 64}, ensure_multiple_of=32)
    return transformers.ZoeDepthForDepthEstimation(config), processor


def _depth_pro(family: str) -> tuple[Any, Any]:
    vit = {
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
        "use_mask_token": False,
    }
    config = transformers.DepthProConfig(
        patch_size=16,
        fusion_hidden_size=16,
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[12, 12],
        use_fov_model=True,
        image_model_config=vit,
        patch_model_config=vit,
        fov_model_config=vit,
    )
    model = transformers.DepthProForDepthEstimation(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("fov_model.head") and name.endswith("bias"):
                parameter.fill_(0.5)
        last = [
            p for name, p in model.named_parameters() if name.startswith("head.") and name.endswith("bias")
        ][-1]
        last.fill_(0.3)
    return model, transformers.DepthProImageProcessor(size={"height": 64, "width": 64})


def _glpn(family: str) -> tuple[Any, Any]:
    config = transformers.GLPNConfig(
        num_encoder_blocks=4,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
        max_depth=10,
    )
    return transformers.GLPNForDepthEstimation(config), transformers.GLPNImageProcessor()


BUILDERS = {
    "depth_anything": _depth_anything,
    "dpt": _dpt,
    "zoedepth": _zoedepth,
    "depth_pro": _depth_pro,
    "glpn": _glpn,
}
