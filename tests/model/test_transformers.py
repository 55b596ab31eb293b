"""Folders of transformers, verified with transformers: names, outputs, round trips and refusals."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS
from depth_anything.model.transformers import build_config, to_official_names, to_transformers_names
from depth_anything.model.weights import fingerprint, load_encoder, load_model, save_model

RELATIVE = "depth_anything_v2_vits.pth"
TOLERANCE = 1e-5
"""Of the output's range."""

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def network(encoder, **settings):
    """A network with random weights, also scales, biases and positions."""
    torch.manual_seed(0)
    model = DepthAnything(encoder, **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.05, 1)
            elif name.endswith("bias") or "norm" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif name.endswith(("pos_embed", "mask_token")):
                parameter.normal_(std=0.02)
    return model


def theirs(folder):
    return transformers.DepthAnythingForDepthEstimation.from_pretrained(folder).eval()


def image_of(model, *, more=(0, 0)):
    side = model.patch_size * ENCODERS[model.encoder].grid
    sizes = [side + model.patch_size * patches for patches in more]
    return torch.randn(1, 3, *sizes, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model, other, image, *, rule=None):
    """The largest difference of two maps, as a share of their range."""
    ours, its = model(image, position_rule=rule), other(image).predicted_depth
    return ((ours - its).abs().max() / (ours.max() - ours.min())).item()


def edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def refusal(path):
    with pytest.raises(ValueError) as raised:
        load_model(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


SMALL = pytest.mark.usefixtures("small_official_encoders")


# --- the same numbers ------------------------------------------------------------------------------------------


@SMALL
@pytest.mark.parametrize("settings", [{}, {"max_depth": 80.0, "taps": (0, 1, 2, 4)}])
@pytest.mark.parametrize("encoder", ["vits", "vitg", "vitn"])
def test_transformers_predicts_the_same_map(tmp_path, encoder, settings):
    if encoder == "vitn":
        settings = {"max_depth": settings.get("max_depth")}
    model = network(encoder, **settings)
    save_model(model, tmp_path / "hf", format="transformers")
    other = theirs(tmp_path / "hf")
    assert difference(model, other, image_of(model)) < TOLERANCE
    # Off its own square transformers resamples positions by another rule, which can be ours, too.
    assert difference(model, other, image_of(model, more=(2, 5))) > 10 * TOLERANCE
    assert difference(model, other, image_of(model, more=(2, 5)), rule="transformers") < TOLERANCE
    assert difference(model, other, image_of(model), rule="transformers") < TOLERANCE


@SMALL
@pytest.mark.parametrize("max_depth", [None, 20])
def test_a_model_of_transformers_predicts_the_same_map_here(tmp_path, max_depth):
    config = build_config(network("vits", max_depth=max_depth))
    backbone = transformers.Dinov2Config(**config.pop("backbone_config"))
    torch.manual_seed(3)
    other = transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(**config, backbone_config=backbone)
    ).eval()
    other.head.conv3.bias.data.fill_(1)  # else its ReLU may shut at random
    other.save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    assert (model.encoder, model.taps, model.max_depth) == ("vits", (1, 2, 3, 5), max_depth)
    assert difference(model, other, image_of(model)) < TOLERANCE


def test_the_real_small_network_at_518():
    model = network("vits")
    config = build_config(model)
    backbone = transformers.Dinov2Config(**config.pop("backbone_config"))
    with torch.device("meta"):
        other = transformers.DepthAnythingForDepthEstimation(
            transformers.DepthAnythingConfig(**config, backbone_config=backbone)
        ).eval()
    assert model.input_size == 518 and sum(p.numel() for p in other.parameters()) == 24_785_089
    ours = to_official_names({name: torch.empty(0) for name in other.state_dict()})
    assert ours.keys() == model.state_dict().keys()


@SMALL
def test_a_photograph_through_the_pipeline(tmp_path):
    model = network("vits")
    save_model(model, tmp_path / "hf", format="transformers")
    pipe = transformers.pipeline("depth-estimation", model=str(tmp_path / "hf"))
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    found = pipe(Image.fromarray(noise))
    assert found["depth"].size == (80, 60)
    assert found["predicted_depth"].shape == (60, 80) and found["predicted_depth"].isfinite().all()
    processor = pipe.image_processor
    assert (processor.ensure_multiple_of, processor.size.height) == (14, model.input_size)


# --- the same bytes --------------------------------------------------------------------------------------------


@SMALL
@pytest.mark.parametrize("encoder", ["vits", "vitg", "vitt"])
def test_renaming_is_invertible(encoder):
    state = network(encoder).state_dict()
    names = to_transformers_names(state)
    assert not names.keys() & state.keys()
    assert sum(t.numel() for t in names.values()) == sum(t.numel() for t in state.values())
    back = to_official_names(names)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@SMALL
def test_names_of_files_and_of_version_5_in_memory(tmp_path):
    for encoder in ("vits", "vitg"):
        model = network(encoder)
        save_model(model, tmp_path / encoder, format="transformers")
        other = theirs(tmp_path / encoder)
        other.save_pretrained(tmp_path / "again")
        ours, its = (load_file(tmp_path / name / "model.safetensors") for name in (encoder, "again"))
        assert ours.keys() == its.keys() and all(torch.equal(ours[name], its[name]) for name in ours)
        memory = other.state_dict()
        assert memory.keys() != ours.keys()  # else the next line shows nothing
        found = to_official_names(memory)
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@SMALL
def test_round_trip_of_every_byte(tmp_path):
    """Official → safetensors → transformers → safetensors → official."""
    first = tmp_path / RELATIVE
    save_model(network("vits"), first, format="official")
    save_model(load_model(first), tmp_path / "one.safetensors")
    save_model(load_model(tmp_path / "one.safetensors"), tmp_path / "hf", format="transformers")
    save_model(load_model(tmp_path / "hf"), tmp_path / "two.safetensors")
    last = tmp_path / "last" / RELATIVE
    save_model(load_model(tmp_path / "two.safetensors"), last, format="official")
    assert last.read_bytes() == first.read_bytes()
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert "pretrained.mask_token" in torch.load(last, weights_only=True)
    assert fingerprint(tmp_path / "hf") == fingerprint(first)


@SMALL
def test_the_same_model_makes_the_same_folder(tmp_path):
    for name in ("one", "two"):
        save_model(network("vits"), tmp_path / name, format="transformers")
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two and {"config.json", "model.safetensors", "preprocessor_config.json"} <= one.keys()
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # what transformers looks for


# --- every form of folder --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, small_official_encoders):
    save_model(network("vits", max_depth=20.0), tmp_path / "hf", format="transformers")
    return tmp_path / "hf"


def in_shards(folder, *, binary):
    """Split the weights of a folder into several files, as transformers does for large models."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name, ending = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    names = sorted(state)
    places = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{name}-0000{i}-of-00002.{ending}"
        content = {tensor: state[tensor] for tensor in part}
        torch.save(content, folder / file) if binary else save_file(content, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{name}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("binary", [False, True])
def test_weights_in_several_files(folder, binary):
    whole = fingerprint(folder)
    in_shards(folder, binary=binary)
    assert fingerprint(folder) == whole
    assert load_model(folder).max_depth == 20.0
    next(folder.glob("*-00002-of-00002.*")).unlink()
    assert "is not complete: " in refusal(folder) and "-00002-of-00002" in refusal(folder)


def test_an_index_cannot_point_outside_its_folder(folder):
    in_shards(folder, binary=False)
    index = folder / "model.safetensors.index.json"
    shutil.move(folder / "model-00001-of-00002.safetensors", folder.parent / "outside.safetensors")
    edit(index, weight_map={"a": "../outside.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert "names ../outside.safetensors, which is not there" in refusal(folder)
    edit(index, weight_map=[])
    assert "has no weight_map" in refusal(folder)


def test_weights_as_a_pickle(folder):
    whole = fingerprint(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert fingerprint(folder) == whole


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_folder_is_never_executed(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    torch.save({**state, "x": Hostile(tmp_path / "run")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "holds code to run (posix.mkdir)" in refusal(folder)
    assert not (tmp_path / "run").exists()


def test_half_precision_is_widened(folder):
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, folder / "model.safetensors")
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert difference(model, theirs(folder).float(), image_of(model)) < TOLERANCE


@SMALL
def test_versions_are_distinguished_by_taps(tmp_path):
    first = network("vits", taps=(2, 3, 4, 5))
    save_model(first, tmp_path / "hf", format="transformers")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["backbone_config"]["out_indices"] == [3, 4, 5, 6]
    assert load_model(tmp_path / "hf", version=1).taps == first.taps
    with pytest.warns(UserWarning, match="version=2"):
        assert load_model(tmp_path / "hf", version=2).taps == (1, 2, 3, 5)
    backbone = {**config["backbone_config"], "out_features": ["stage2", "stage3", "stage4", "stage6"]}
    del backbone["out_indices"]
    edit(tmp_path / "hf" / "config.json", backbone_config=backbone)
    assert load_model(tmp_path / "hf").taps == (1, 2, 3, 5)


def test_config_defines_the_model(folder):
    model = load_model(folder)
    assert (model.max_depth, model.quantity, model.unit) == (20.0, "depth", "m")
    edit(folder / "config.json", max_depth=80)
    assert load_model(folder).max_depth == 80.0
    with pytest.warns(UserWarning, match="80 m; max_depth=10 "):
        assert load_model(folder, max_depth=10).max_depth == 10.0
    edit(folder / "config.json", depth_estimation_type="absent", max_depth="absent")  # V1's first folders
    assert load_model(folder).max_depth is None
    edit(folder / "preprocessor_config.json", size={"height": 392, "width": 392})
    assert load_model(folder).input_size == 392
    for size in (384, {"shortest_edge": 384}):  # as other versions of transformers write it
        edit(folder / "preprocessor_config.json", size=size)
        assert load_model(folder).input_size == 384
    (folder / "preprocessor_config.json").unlink()
    assert load_model(folder).input_size == 70


def test_the_file_alone_is_read_by_its_shapes(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning) as caught:
        model = load_model(tmp_path / "model.safetensors")
    assert len(caught) == 2 and fingerprint(model) == fingerprint(folder)


@SMALL
def test_v1_folders_of_the_official_code(tmp_path):
    first = network("vits", taps=(2, 3, 4, 5))
    tmp_path.joinpath("config.json").write_text(
        json.dumps({"encoder": "vits", "features": 16, "out_channels": [6, 12, 24, 48], "use_bn": False})
    )
    torch.save(first.state_dict(), tmp_path / "pytorch_model.bin")
    model = load_model(tmp_path)
    assert (model.taps, model.max_depth) == (first.taps, None)


@SMALL
def test_dinov2_of_transformers_starts_an_encoder(tmp_path):
    backbone = build_config(network("vits"))["backbone_config"]
    other = transformers.Dinov2Model(transformers.Dinov2Config(**backbone))
    other.save_pretrained(tmp_path / "dinov2")
    model = DepthAnything("vits").eval()
    load_encoder(model, tmp_path / "dinov2")
    image = image_of(model)
    with torch.no_grad():
        tokens = other.eval()(image).last_hidden_state[:, 1:]
        torch.testing.assert_close(model.features(image), tokens, rtol=0, atol=1e-5)
    assert "holds an encoder without a depth head" in refusal(tmp_path / "dinov2")


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["depth_pro", "dpt", "zoedepth", "prompt_depth_anything", "depth_anything_3"]
)
def test_other_models_are_named(folder, kind):
    edit(folder / "config.json", model_type=kind)
    assert f"is a transformers model of the type '{kind}', not 'depth_anything'; expected" in refusal(folder)


def test_broken_folders_are_named(folder):
    config = folder / "config.json"
    backbone = json.loads(config.read_text())["backbone_config"]
    edit(config, backbone_config={**backbone, "model_type": "dinov2_with_registers"})
    assert "has a backbone of the type 'dinov2_with_registers'; only 'dinov2' is read" in refusal(folder)
    edit(config, backbone_config=None, backbone="vit_small_patch14_dinov2")
    assert "has a backbone of the type 'vit_small_patch14_dinov2'" in refusal(folder)
    edit(config, backbone_config={"out_indices": ["a"]})
    assert "config.json makes no sense" in refusal(folder)
    for changes in ({"max_depth": None}, {"max_depth": 20, "depth_estimation_type": "inverse"}):
        edit(config, backbone_config=backbone, **{"depth_estimation_type": "metric", **changes})
        assert f"{config} makes no sense" in refusal(folder)
    edit(config, depth_estimation_type="metric")
    for value in ("far", True, -20, 0, 1e300, [20]):
        edit(config, backbone_config=backbone, max_depth=value)
        assert f"{config} has metadata that make no sense: max_depth={value}" in refusal(folder)
    for taps in ([1, 2, 3], [1.5, 2, 3, 4], [4, 3, 2, 1], [0, 1, 2, 3], [1, 2, 3, 9999999]):
        edit(config, backbone_config={**backbone, "out_indices": taps}, max_depth=20)
        assert f"{config} has metadata that make no sense: taps=" in refusal(folder)
    edit(config, backbone_config={**backbone, "out_indices": [1, 2, 3, 400]})
    assert f"{folder}: taps=[0, 1, 2, 399]" in refusal(folder)
    edit(config, backbone_config=backbone)
    preprocessor = folder / "preprocessor_config.json"
    for size in (-5, {"height": 0}, {"shortest_edge": "a"}, {"height": 1e9}, [518]):
        edit(preprocessor, size=size)
        assert f"{preprocessor} has metadata that make no sense: input_size=" in refusal(folder)
    edit(config, max_depth=20, model_type="absent")
    assert "is of no type that its config.json names" in refusal(folder)
    config.write_text("[]")
    assert "config.json holds a list, no config" in refusal(folder)
    config.write_text("{")
    assert "config.json cannot be read" in refusal(folder)
    config.unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter, which is no model by itself: merge it into its base" in refusal(folder)


def test_lacking_and_surplus_tensors_are_named(folder):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file({**state, "backbone.extra": torch.ones(1)}, weights)
    assert "is not vits: it also has backbone.extra" in refusal(folder)
    save_file({name: t for name, t in state.items() if "head.conv3" not in name}, weights)
    assert "is not vits: it lacks depth_head.scratch.output_conv2.2.weight and 1 more" in refusal(folder)
    save_file(
        {name: t for name, t in state.items() if "layer.0.attention.attention.key" not in name}, weights
    )
    assert "its pretrained.blocks.0.attn.qkv.bias is (96,), expected (144,)" in refusal(folder)
    weights.write_bytes(b"")
    assert "model.safetensors is empty" in refusal(folder)
    weights.unlink()
    assert "has a config.json and no weights: model.safetensors or pytorch_model.bin is missing" in refusal(
        folder
    )


def test_unsupported_models_are_not_written(tmp_path):
    with torch.device("meta"):
        timms = DepthAnything("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="vit_tiny_patch16_224.*safetensors"):
        build_config(timms)
    with pytest.raises(ValueError, match="max_depth=12.5.*safetensors"):
        save_model(DepthAnything("vitn", max_depth=12.5), tmp_path / "hf", format="transformers")
    assert not list(tmp_path.iterdir())


# --- whole or not at all ---------------------------------------------------------------------------------------


def test_a_folder_is_replaced_and_other_files_are_kept(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.txt").write_text("mine, too")
    other = network("vits", taps=(0, 1, 2, 3))
    save_model(other, folder, format="transformers")
    assert load_model(folder).taps == (0, 1, 2, 3)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "pictures" / "a.txt").read_text() == "mine, too"
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_other_folders_and_files_are_not_replaced(folder, tmp_path, small_official_encoders):
    others = tmp_path / "photos"
    others.mkdir()
    save_model(network("vits"), others, format="transformers")  # empty: free to take
    (others / "config.json").unlink()
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (others, file):
        with pytest.raises(ValueError, match=str(path)):
            save_model(network("vits"), path, format="transformers")
    edit(folder / "config.json", model_type="dpt")
    with pytest.raises(ValueError, match=str(folder)):
        save_model(network("vits"), folder, format="transformers")
    assert file.read_text() == "mine"


def test_a_failing_save_leaves_the_old_folder(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    seen = []

    def full(_):
        seen.append([path.name for path in folder.parent.iterdir()])
        if len(seen) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="hf cannot be written .No space left on device"):
        save_model(network("vits"), folder, format="transformers")
    assert len(seen[0]) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@SMALL
def test_a_calibration_is_kept_with_a_warning(tmp_path):
    model = network("vits")
    model.calibration = (0.5, 0.25)
    with pytest.warns(UserWarning, match="calibration"):
        save_model(model, tmp_path / "hf", format="transformers")
    assert load_model(tmp_path / "hf").calibration == (0.5, 0.25)
