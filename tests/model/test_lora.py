"""LoRA adapters on all layers that feed the head, and merging them into a plain network."""

import sys
from functools import partial

import pytest
import torch

from depth_anything import DepthAnything, load_model, save_model
from depth_anything.model import lora
from depth_anything.model.accelerate import accelerate
from depth_anything.model.card import build_card
from depth_anything.model.lora import adaptable_layers, add_adapters, lora_metadata, merge_adapters
from depth_anything.model.metadata import build_metadata
from depth_anything.model.weights import fingerprint

pytest.importorskip("peft", reason="pip install 'depth-anything-train[lora]'")
# torch 2.15 warns of what its own compiler does.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def network(encoder="vitn", *, rank=3, **settings):
    """Build a network with nonzero adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = DepthAnything(encoder, **settings)
        add_adapters(model, rank)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def images(model, sides=5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, sides * model.patch_size, sides * model.patch_size, generator=generator)


def plain(model):
    """Build the same network without adapters."""
    other = DepthAnything(model.encoder, max_depth=model.max_depth, taps=model.taps)
    other.load_state_dict(merge_adapters(model.state_dict()))
    return other.eval()


# --- where they go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    (
        "encoder",
        "trained",
    ),  # 8 × the sides of qkv, proj, fc1, fc2: 8 × 18 × width a block; SwiGLU's two likewise
    [("vits", 589_824), ("vitb", 1_179_648), ("vitl", 3_145_728), ("vitg", 7_864_320), ("vitn", 49_152)],
)
def test_adapters_are_added_to_every_linear_layer_of_a_frozen_encoder(encoder, trained):
    with torch.device("meta"):
        model = DepthAnything(encoder)
        blocks = len(model.pretrained.blocks)
        linear = {n for n, m in model.pretrained.named_modules() if isinstance(m, torch.nn.Linear)}
        assert set(adaptable_layers(model)) == linear and len(linear) == 4 * blocks
        head = [p.shape for p in model.head_parameters()]
        add_adapters(model, 8)
    assert sum(p.numel() for p in model.encoder_parameters()) == trained
    free = {name for name, p in model.pretrained.named_parameters() if p.requires_grad}
    assert len(free) == 8 * blocks and all(".lora_" in name for name in free)
    assert [p.shape for p in model.head_parameters()] == head  # as before


def test_blocks_after_the_last_tap_have_no_adapters():
    with torch.device("meta"):
        model = DepthAnything("vits", taps=(0, 1, 2, 3))
    assert {name.split(".")[1] for name in adaptable_layers(model)} == {"0", "1", "2", "3"}


@pytest.mark.parametrize("encoder", ["vitn", "vitg", "eva02_tiny_patch14_224"])
def test_every_adapter_learns(small_official_encoders, encoder):
    """DDP would wait forever for a missing gradient; timm's Eva does not call all of its layers."""
    model = network(encoder)
    model(images(model)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad is None for p in model.pretrained.parameters() if not p.requires_grad)


def test_new_adapters_do_not_change_the_output():
    torch.manual_seed(0)
    model = DepthAnything("vitn").eval()
    before = model(images(model))
    add_adapters(model, 4)
    assert torch.equal(model(images(model)), before)


def test_impossible_ranks_and_encoders_are_named(monkeypatch):
    with pytest.raises(ValueError, match="lora=97 .*96.*encoder=vitn.*lora=8"):
        add_adapters(DepthAnything("vitn"), 97)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'peft.*pip install "depth-anything-train\[lora\]".*lora=null'):
        add_adapters(DepthAnything("vitn"), 4)
    monkeypatch.undo()
    monkeypatch.setattr(lora, "_LAYER_NAMES", frozenset())
    with pytest.raises(ValueError, match="encoder=vitn.*lora=null"):
        add_adapters(DepthAnything("vitn"), 4)


# --- merged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["vitn", "vitg", "eva02_tiny_patch14_224"])
def test_the_merged_network_has_plain_names_and_the_same_output(small_official_encoders, encoder):
    model = network(encoder, max_depth=20.0).eval()
    untouched = DepthAnything(encoder, max_depth=20.0).state_dict()
    made = merge_adapters(model.state_dict())
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {
        n: (t.shape, t.dtype) for n, t in untouched.items()
    }
    with torch.no_grad():
        maps, again = model(images(model)), plain(model)(images(model))
        for parameter in (p for n, p in model.named_parameters() if ".lora_B." in n):
            parameter.zero_()
        without = model(images(model))
    torch.testing.assert_close(again, maps, rtol=1e-4, atol=1e-4)
    assert (without - maps).abs().max() > 0.01  # they did say something


def test_merging_rounds_once_and_leaves_a_plain_network_alone():
    model = network()
    state = model.state_dict()
    name = "pretrained.blocks.2.mlp.fc1"
    up, down = (state[f"{name}.lora_{which}.default.weight"].double() for which in "BA")
    wanted = (state[f"{name}.base_layer.weight"].double() + 2 * up @ down).float()
    assert torch.equal(merge_adapters(state)[f"{name}.weight"], wanted)
    unadapted = DepthAnything("vitn")
    state = unadapted.state_dict()
    assert all(made is state[name] for name, made in merge_adapters(state).items())
    assert not lora_metadata(unadapted) and lora_metadata(model)


def saved_anyhow(model, folder):
    """Save a network in every format and as a Lightning checkpoint; return the paths."""
    save_model(model, folder / "m.safetensors")
    save_model(model, folder / "hf", format="transformers")
    save_model(model, folder / "depth_anything_v2_metric_hypersim_vits.pth", format="official")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {"state_dict": state, "depth_anything": {**build_metadata(model), **lora_metadata(model)}},
        folder / "c.ckpt",
    )
    return [
        folder / name
        for name in ("m.safetensors", "hf", "depth_anything_v2_metric_hypersim_vits.pth", "c.ckpt")
    ]


def test_every_format_is_read_without_peft(model, tmp_path, monkeypatch):
    adapted = network("vits", max_depth=20.0)
    paths = saved_anyhow(adapted, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    wanted = plain(adapted)
    for path in paths:
        read = load_model(path)
        assert (read.encoder, read.max_depth) == ("vits", 20.0)
        assert fingerprint(path) == fingerprint(read) == fingerprint(adapted) == fingerprint(wanted)
        assert torch.equal(read(images(read)), wanted(images(read)))
    for text in (build_card(net, file="m", form="safetensors", title="m") for net in (adapted, wanted)):
        assert f"{sum(p.numel() for p in wanted.parameters()):,} parameters" in text


def test_saving_does_not_change_the_model_in_training(tmp_path):
    """A model that is saved during training keeps its adapters."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "m.safetensors")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


LAYER = "model.pretrained.blocks.1.attn.proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_scale": "much"}, r"c\.ckpt .*save it again"),
        ({"lora_scale": None}, r"c\.ckpt .*save it again"),
        ({f"{LAYER}.lora_A.default.weight": None}, r"c\.ckpt .*save it again"),
        (
            {f"{LAYER}.lora_A.default.weight": torch.ones(7, 5)},
            r"c\.ckpt .*save it again",
        ),
        ({f"{LAYER}.lora_B.default.weight": torch.ones(9)}, r"c\.ckpt .*save it again"),
        ({f"{LAYER}.base_layer.weight": None}, r"c\.ckpt .*save it again"),
        (
            {f"{LAYER}.lora_A.other.weight": torch.ones(3, 96)},
            r"c\.ckpt is a LoRA adapter",
        ),
        ({f"{LAYER}.lora_B.default.weight": None}, r"c\.ckpt is a LoRA adapter"),
    ],
)
def test_invalid_adapters_in_a_checkpoint_are_named(tmp_path, change, message):
    model = network()
    said = {**build_metadata(model), **lora_metadata(model)}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, value in change.items():
        place = said if name == "lora_scale" else state
        place.pop(name, None)
        if value is not None or name == "lora_scale":
            place[name] = value
    torch.save({"state_dict": state, "depth_anything": said}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "c.ckpt")


def test_adapters_without_a_scale_are_refused(tmp_path):
    model = network()
    torch.save(
        {"state_dict": model.state_dict(), "depth_anything": build_metadata(model)}, tmp_path / "c.ckpt"
    )
    with pytest.raises(ValueError, match=r"c\.ckpt is a LoRA adapter"):
        load_model(tmp_path / "c.ckpt")


# --- with the rest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
def test_checkpointing_and_compilation_stay_exact(monkeypatch, checkpoint):
    """Two graphs: the input of the first block requires no gradient, those of the others do."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    one, other = network(), network()
    accelerate(other, checkpoint=checkpoint, compile=True)
    assert list(one.state_dict()) == list(other.state_dict())
    for model in (one, other):
        model(images(model)).square().mean().backward()
    assert len(graphs) == 2 and all(("tag_activation_checkpoint" in code) == checkpoint for code in graphs)
    for got, want in zip(other.parameters(), one.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-4)


def test_bf16_autocast_keeps_master_weights():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        model(images(model)).float().mean().backward()
    learned = [p for p in model.encoder_parameters() if p.grad is not None]
    assert learned and all(p.dtype == p.grad.dtype == torch.float32 for p in learned)
    assert all(p.grad.isfinite().all() for p in learned)
