"""stage=segmentation: its numbers, its parameter groups, and a resumed run that equals an unbroken one."""

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from made_configs import make_config
from made_segmentation import CLASSES, HEAD_OPTIONS, write_colors

from depth_anything.errors import UserError
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.segmentation import MASK_HEADS, SegmentationModel
from depth_anything.model.segmentation_files import load_segmentation
from depth_anything.model.weights import save_model
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.lightning import trainer_arguments
from depth_anything.training.recipes import Recipe
from depth_anything.training.segmentation import Segmentation, decay_groups
from depth_anything.training.segmentation_data import SegmentationData
from depth_anything.training.segmentation_setup import build_segmentation_model, open_segmentation_task


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation") / "colors"
    write_colors(folder)
    return folder


def recipe(**changes):
    numbers = {
        "steps": 4,
        "encoder_lr": 1e-3,
        "head_lr": 1e-2,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        **changes,
    }
    return Recipe(**numbers)


def fit(folder, root, head, *, steps, micro_batch=4, checkpoint=None):
    torch.manual_seed(0)
    model = SegmentationModel("vitn", classes=CLASSES, head=head, head_options=HEAD_OPTIONS[head])
    data = SegmentationData(
        sets={"colors": str(root)}, labels=None, seed=0, batch_size=4, micro_batch=micro_batch, patch=14, streams=4,
        image_size=28, workers=0, perturb=True, short_side=42, scale_jitter=(0.5, 1.5), run_dir=str(folder),
    )  # fmt: skip
    module = Segmentation(model, recipe())
    arguments = trainer_arguments(
        callbacks=[Checkpoints(folder / "checkpoints", every=2)], max_steps=steps, run_dir=str(folder)
    )
    trainer = pl.Trainer(**arguments, accelerator="cpu", devices=1, accumulate_grad_batches=4 // micro_batch)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module.model


@pytest.mark.parametrize("head", ["dpt", "mask2former", "eomt"])
def test_a_resumed_run_equals_an_unbroken_one(head, root, tmp_path, one_thread):
    if head in MASK_HEADS:
        pytest.importorskip("transformers")
        pytest.importorskip("scipy")
    whole = fit(tmp_path / "whole", root, head, steps=4)
    fit(tmp_path / "parts", root, head, steps=2)
    checkpoint = tmp_path / "parts" / "checkpoints" / "step-000000002.ckpt"
    resumed = fit(tmp_path / "resumed", root, head, steps=4, checkpoint=checkpoint)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert load_segmentation(checkpoint).classes == CLASSES


def test_micro_batches_change_nothing_but_rounding(root, tmp_path, one_thread):
    whole = fit(tmp_path / "whole", root, "dpt", steps=2)
    parts = fit(tmp_path / "parts", root, "dpt", steps=2, micro_batch=1)
    # Adam turns rounding into steps of a few weights whose gradient is nearly 0; another loss would move all.
    pairs = [(tensor, parts.state_dict()[name]) for name, tensor in whole.state_dict().items()]
    moved = sum(int(((one - other).abs() > 2e-4 + 1e-2 * one.abs()).sum()) for one, other in pairs)
    assert moved < 0.01 * sum(one.numel() for one, _ in pairs)


@pytest.mark.parametrize("head", ["dpt", "mask2former", "eomt"])
def test_norms_and_embeddings_are_not_decayed(head):
    if head in MASK_HEADS:
        pytest.importorskip("transformers")
    model = SegmentationModel("vitn", classes=CLASSES, head=head, head_options=HEAD_OPTIONS[head])
    groups = {group["name"]: group for group in decay_groups(model, encoder_lr=1e-6, head_lr=1e-5)}
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for name in groups if "no_decay" in name for p in groups[name]["params"]}
    assert {"pretrained.pos_embed", "pretrained.cls_token", "pretrained.norm.weight"} <= spared
    assert not any("qkv.weight" in name or "patch_embed.proj" in name or ".fc1" in name for name in spared)
    assert groups["encoder_no_decay"]["weight_decay"] == 0 and "weight_decay" not in groups["encoder"]
    assert groups["encoder"]["lr"] == groups["encoder_no_decay"]["lr"] == 1e-6
    if head == "mask2former":
        assert any("queries_embedder" in name for name in spared) and any(
            "level_embed" in name for name in spared
        )


def test_size_paper_has_v1s_numbers():
    config = make_config("stage=segmentation", "size=paper", "init=null")
    assert (config.encoder, config.head, config.batch_size, config.image_size) == (
        "vitl",
        "mask2former",
        16,
        896,
    )
    assert (config.steps, config.window_stride, config.short_side) == (160_000, 426, 896)
    r = config.recipe
    assert (r.head_lr, r.encoder_lr, r.weight_decay, r.clip_norm, r.schedule) == (
        3e-5,
        3e-6,
        0.05,
        0.01,
        "linear",
    )
    assert r.warmup * config.steps == 1500 and list(config.scale_jitter) == [0.5, 2.0]
    streets = make_config("stage=segmentation", "size=paper", "sources=cityscapes", "init=null")
    assert (streets.steps, streets.window_stride, streets.short_side) == (80_000, 518, 1024)
    assert streets.recipe.warmup * streets.steps == 1500
    assert streets.data.sets == {"cityscapes": "data/cityscapes"}


def config_for(root, **changes):
    config = make_config("stage=segmentation", "trainer=cpu")
    config = replace(config, data=replace(config.data, sets={"colors": str(root)}), **changes)
    return replace(
        config, sources=replace(config.sources, classes=None, segmentation=None, validation=str(root))
    )


def test_the_encoder_of_a_depth_checkpoint_starts_the_run(root, tmp_path):
    torch.manual_seed(3)
    depth = DepthAnything("vitn")
    depth.licence = "Apache-2.0"
    save_model(depth, tmp_path / "model.safetensors")
    model = build_segmentation_model(
        config_for(root, init=str(tmp_path / "model.safetensors"), freeze_encoder=True)
    )
    for name, tensor in depth.pretrained.state_dict().items():
        assert torch.equal(model.pretrained.state_dict()[name], tensor)
    assert model.classes == CLASSES and not model.encoder_parameters() and model.head_parameters()
    assert model.origin["start"]["licence"] == "Apache-2.0"
    assert (model.window.stride, model.input_size) == (46, 70)
    with pytest.raises(UserError, match="nothing.safetensors"):
        build_segmentation_model(config_for(root, init="nothing.safetensors"))
    with pytest.raises(ValueError, match="vitt"):
        build_segmentation_model(config_for(root, init=str(tmp_path / "model.safetensors"), encoder="vitt"))


def test_the_validation_set_must_have_the_same_classes(root, tmp_path):
    assert len(open_segmentation_task(config_for(root)).lines) == 10
    write_colors(tmp_path / "other", count=2)
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"green"', '"lime"'))
    config = config_for(root)
    config = replace(config, sources=replace(config.sources, validation=str(tmp_path / "other")))
    with pytest.raises(UserError, match="other classes"):
        open_segmentation_task(config)


def test_keys_of_depth_are_refused():
    with pytest.raises(UserError, match="benchmark"):
        make_config("stage=segmentation", "validation.benchmark=nyu", "validation.root=x")
    with pytest.raises(UserError, match="freeze_encoder"):
        make_config("stage=segmentation", "head=eomt", "freeze_encoder=true")
    with pytest.raises(UserError, match="head"):
        make_config("stage=segmentation", "head=unet")
    with pytest.raises(UserError, match="ssi_weight"):
        make_config("stage=segmentation", "+recipe.ssi_weight=3.0")
    with pytest.raises(UserError, match="scale_jitter"):
        make_config("stage=segmentation", "scale_jitter=[2,1]")
