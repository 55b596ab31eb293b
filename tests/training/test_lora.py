"""lora= of stage=metric: what is trained and how fast, checkpoints, and invalid values."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_configs import flatten, make_config

from depth_anything import DepthAnything, Predictor, load_model, save_model
from depth_anything.model.card import build_card
from depth_anything.model.weights import fingerprint
from depth_anything.training.check_config import validate_config
from depth_anything.training.config import RunConfig
from depth_anything.training.dry_run import print_plan
from depth_anything.training.initialization import build_model
from depth_anything.training.metric import Metric
from depth_anything.training.optimizer import parameter_groups
from depth_anything.training.provenance import add_provenance
from depth_anything.training.recipes import MetricRecipe
from depth_anything.training.resume import FlatConfig, config_differences

pytest.importorskip("peft", reason="pip install 'depth-anything-train[lora]'")
SIDE = 28


def resolved(*overrides: str) -> RunConfig:
    return make_config("stage=metric", *overrides)


def relative(path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        save_model(DepthAnything("vitn"), path)
    return path


def started(path: Path, *overrides: str) -> DepthAnything:
    return build_model(resolved(f"init={relative(path / 'r.safetensors')}", "lora=4", *overrides))


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(0, 256, (3, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator),
        "target": torch.rand(3, SIDE, SIDE, generator=generator) * 20,
        "valid": torch.rand(3, SIDE, SIDE, generator=generator) > 0.5,
    }


def trained(model: DepthAnything, steps: int = 3) -> Metric:
    module = Metric(model, MetricRecipe(steps=100, encoder_lr=1e-2, head_lr=1e-3))
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(steps):
        optimizer.zero_grad()
        module.losses(batch())["loss"].backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("start", ["encoder", "all"])
def test_only_adapters_and_head_are_trained(tmp_path: Path, start: str) -> None:
    model = started(tmp_path, f"start={start}")
    encoder, head = parameter_groups(model, encoder_lr=1.0, head_lr=2.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {".lora_" in names[id(p)] for p in encoder["params"]} == {True} and encoder["lr"] == 1.0
    assert {names[id(p)].split(".")[0] for p in head["params"]} == {"depth_head"}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trained(model)
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {names[id(p)] for group in (encoder, head) for p in group["params"]}


def test_adapters_reduce_the_loss(tmp_path: Path) -> None:
    model = started(tmp_path)
    before = float(
        Metric(model, MetricRecipe(steps=1, encoder_lr=0, head_lr=0)).losses(batch())["loss"].detach()
    )
    module = trained(model, steps=12)
    assert float(module.losses(batch())["loss"].detach()) < 0.9 * before


def test_checkpoints_load_as_plain_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning saves, with what the module adds: load_model and init= need neither peft nor a flag."""
    module = trained(started(tmp_path))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "step-000000003.ckpt")
    picture = batch()["image"][0].numpy()
    live = Predictor(module.model, device="cpu", input_size=SIDE).predict(picture)
    save_model(module.model, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "peft", None)
    for path in (tmp_path / "step-000000003.ckpt", tmp_path / "model.safetensors"):
        read = load_model(path)
        assert (read.max_depth, read.input_size) == (80.0, 70)
        assert fingerprint(read) == fingerprint(module.model)
        meters = Predictor(read, device="cpu", input_size=SIDE).predict(picture)
        torch.testing.assert_close(torch.from_numpy(meters), torch.from_numpy(live), rtol=1e-4, atol=1e-4)
        again = build_model(resolved(f"init={path}", "start=all"))
        assert fingerprint(again) == fingerprint(module.model)


def test_training_resumes_from_its_state_dict(tmp_path: Path) -> None:
    module = trained(started(tmp_path))
    other = Metric(started(tmp_path, "seed=7"), module.recipe)  # type: ignore[arg-type]
    other.load_state_dict(module.state_dict())
    assert fingerprint(other.model) == fingerprint(module.model)


def test_the_card_names_lora(tmp_path: Path) -> None:
    model = add_provenance(started(tmp_path), resolved("lora=4"), [])
    save_model(model, tmp_path / "model.safetensors")
    read = load_model(tmp_path / "model.safetensors")
    assert read.origin["lora"] == 4
    assert "Trained by `train.py stage=metric lora=4` on:" in build_card(
        read, file="m", form="safetensors", title="m"
    )
    whole = add_provenance(build_model(resolved("init=null")), resolved(), [])
    assert "lora" not in whole.origin


# --- configuration ---------------------------------------------------------------------------------------------


def test_adapters_have_their_own_rate_unless_one_is_typed() -> None:
    for typed, rate in (
        ([], 5e-6),
        (["lora=8"], 1e-4),
        (["lora=8", "recipe.encoder_lr=3e-4"], 3e-4),
        (["recipe.encoder_lr=5e-7"], 5e-7),
    ):
        assert resolved("size=paper", "sources=hypersim", *typed).recipe.encoder_lr == rate
    assert resolved("lora=8").recipe.encoder_lr == resolved().recipe.encoder_lr == 1e-3


def test_the_plan_counts_trained_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(resolved("size=paper", "sources=hypersim", "encoder=vits", "lora=8"))
    printed = capsys.readouterr().out
    assert "network     vits: 24,785,089 parameters" in printed  # the network's own
    assert "adapters    LoRA of rank 8" in printed
    assert "group       encoder: 589,824 trained, AdamW, rate 0.0001" in printed
    assert "group       head: 2,654,657 trained" in printed


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("lora=0", "lora=0 must be a whole number above 0.*lora=8"),
        ("lora=true", "lora=true must be"),
        ("lora=2.5", "lora=2.5 must be"),
        ("lora=all", "lora=all must be"),
        ("lora=8,freeze_encoder=true", "freeze_encoder=true; type freeze_encoder=false"),
    ],
)
def test_invalid_ranks_raise(typed: str, message: str) -> None:
    resolved("lora=8")
    with pytest.raises(ValueError, match=message):
        resolved(*typed.split(","))


def test_missing_peft_raises_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    resolved()
    with pytest.raises(ValueError, match=r'type  pip install "depth-anything-train\[lora\]"'):
        validate_config(make_config("stage=metric", lora=8))


def test_another_rank_is_another_run() -> None:
    assert list(config_differences(flatten(resolved("lora=4")), flatten(resolved("lora=8")))) == ["lora"]
    before = {**resolved().as_dict(), "rates": {None: 5e-6}}  # of the version that had this key
    del before["lora"], before["optimizer"]  # and not yet these
    assert not config_differences(FlatConfig.from_tree(before), flatten(resolved()))
