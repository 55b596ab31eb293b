"""Which configs are the same run, checkpoints of other runs, and the recipe after a resume."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from made_configs import flatten, make_config

from depth_anything import DepthAnything
from depth_anything.training import resume
from depth_anything.training.base import DepthModule
from depth_anything.training.config import RunConfig
from depth_anything.training.recipes import Recipe
from depth_anything.training.resume import (
    FlatConfig,
    check_resume_checkpoint,
    config_differences,
    read_checkpoint_facts,
    read_config,
    resume_policy,
    typed_keys,
)
from depth_anything.training.run_dir import RunDir

SIDE = 28


def resolved(*typed: str) -> RunConfig:
    return make_config("stage=teacher", "encoder=vitn", *typed)


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    return config_differences(flatten(old), flatten(new))


class Rates(pl.Callback):
    """Note what the optimizer steps with, before each of its steps."""

    def __init__(self) -> None:
        self.seen: dict[int, list[dict[str, Any]]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        groups = trainer.optimizers[0].param_groups
        self.seen[trainer.global_step] = [{k: v for k, v in g.items() if k != "params"} for g in groups]


def fit(steps: int, recipe: dict[str, Any], *, save: Path | None = None, resume: Path | None = None) -> Rates:
    torch.manual_seed(0)
    model = DepthAnything("vitn")
    model.input_size, model.origin = SIDE, {"stage": "teacher"}
    rates = Rates()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, callbacks=[rates], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, barebones=False,
    )  # fmt: skip
    batch = {
        "image": torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8),
        "target": torch.rand(2, SIDE, SIDE),
        "valid": torch.ones(2, SIDE, SIDE, dtype=torch.bool),
    }
    module = DepthModule(model, Recipe(**{"steps": steps, "encoder_lr": 1e-4, "head_lr": 1e-3, **recipe}))
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 100, batch_size=None), ckpt_path=resume)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(save)
    return rates


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four of eight steps in a folder of its own."""
    run = tmp_path_factory.mktemp("other")
    path = run / "checkpoints" / "step-000000004.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(4, {"steps": 8}, save=path)
    (run / "config.yaml").write_text(yaml.safe_dump(resolved("steps=8", "image_size=28").as_dict()))
    return path


pytestmark = pytest.mark.filterwarnings("ignore::")  # Lightning's advice on loaders


def test_todays_recipe_applies_after_resume(other: Path) -> None:
    recipe = {"steps": 10, "head_lr": 1e-7, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    encoder, head = fit(6, recipe, resume=other).seen[4]
    assert head["initial_lr"] == 1e-7 and head["lr"] == pytest.approx(1e-7 * 0.6)
    assert encoder["lr"] == pytest.approx(1e-4 * 0.6)
    assert head["weight_decay"] == encoder["weight_decay"] == 0.1 and head["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_changed_schedule_applies_from_the_next_step(other: Path, schedule: str) -> None:
    _, head = fit(5, {"steps": 8, "schedule": schedule}, resume=other).seen[4]
    assert head["lr"] == pytest.approx(1e-3 * {"constant": 1.0, "cosine": 0.5}[schedule])


def test_an_unchanged_recipe_restores_equal_optimizer_state(other: Path) -> None:
    saved = torch.load(other, weights_only=True)["optimizer_states"][0]["param_groups"]
    now = fit(5, {"steps": 8}, resume=other).seen[4]
    assert now == [{k: v for k, v in group.items() if k != "params"} for group in saved]


def test_the_step_is_read_from_the_checkpoint_not_its_name(other: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "mine.ckpt"
    renamed.write_bytes(other.read_bytes())
    step, facts = read_checkpoint_facts(renamed)
    assert step == 4 and facts == {"encoder": "vitn", "image_size": SIDE, "stage": "teacher"}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["encoder=vitt"], "encoder=vitn"),
        (["image_size=42"], "image_size=28.*init="),
        (["steps=3"], "steps=3.*steps=4"),
    ],
)
def test_another_network_or_fewer_steps_raise(
    other: Path, tmp_path: Path, typed: list[str], words: str, with_config: bool
) -> None:
    path = other
    if not with_config:
        path = tmp_path / "alone.ckpt"
        path.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=f"resume=.*{words}") as caught:
        check_resume_checkpoint(path, resolved("image_size=28", "steps=9", *typed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("typed", ["batch_size=4", "seed=5", "streams=8", "sky=invalid"])
def test_another_position_in_the_data_raises(other: Path, typed: str) -> None:
    with pytest.raises(ValueError, match=rf"now {typed}; type {typed.partition('=')[0]}="):
        check_resume_checkpoint(other, resolved("image_size=28", typed))


def test_another_stage_raises(other: Path) -> None:
    config = replace(resolved("image_size=28"), stage="student")
    with pytest.raises(ValueError, match="stage=teacher, now stage=student"):
        check_resume_checkpoint(other, config)


def test_changes_from_the_checkpoint_of_another_run_are_listed(other: Path) -> None:
    typed = ["recipe.head_lr=1e-7", "steps=12", "recipe.clip_norm=null", "perturb=false"]
    lines = check_resume_checkpoint(other, resolved("image_size=28", *typed))
    assert {line.split(": ")[1].split()[0] for line in lines} == {one.partition("=")[0] for one in typed}
    assert not check_resume_checkpoint(
        other, resolved("image_size=28", "steps=8", "name=x", "photos=y", "init=null")
    )


def test_files_that_are_no_checkpoints_raise(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"no")
    torch.save({"global_step": 3}, tmp_path / "y.ckpt")
    for name in ("x.ckpt", "y.ckpt", "z.ckpt"):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint"):
            check_resume_checkpoint(tmp_path / name, resolved())


@pytest.fixture
def own(tmp_path: Path) -> RunDir:
    """A run's own folder, with a checkpoint of step 5."""
    folder = RunDir(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    torch.save({"global_step": 5, "loops": {}, "state_dict": {}}, folder.checkpoints / "step-000000005.ckpt")
    folder.config.write_text(yaml.safe_dump(resolved("steps=10").as_dict()))
    return folder


@pytest.mark.parametrize(
    "typed",
    ["steps=20", "recipe.head_lr=1e-5", "recipe.weight_decay=0.1", "recipe.schedule=cosine", "steps=7"],
)
def test_resume_with_changes_the_recipe_and_is_recorded(own: RunDir, typed: str) -> None:
    key, _, value = typed.partition("=")
    config = resolved(*dict.fromkeys([*([] if key == "steps" else ["steps=10"]), typed]))
    with pytest.raises(ValueError, match=rf"{key}=.*resume_with=\[{key}\]"):
        own.compare(config)
    for named in (f"resume_with={key}", f"resume_with=[{key}]"):
        with_it = resolved(*([] if key == "steps" else ["steps=10"]), typed, named)
        assert own.compare(with_it, note=False)[0].startswith(f"step 5: {key} ")
    own.claim(with_it)
    own.lock.release()
    saved = yaml.safe_load(own.config.read_text())
    assert str(saved["steps"] if key == "steps" else saved["recipe"][key.partition(".")[2]]) in (
        value, str(float(value)) if key not in ("recipe.schedule",) else value,
    )  # fmt: skip
    assert key in (own.path / "changes.txt").read_text()
    assert own.compare(config) == []  # the same command goes on, with or without resume_with


def test_steps_below_the_checkpoint_raise(own: RunDir) -> None:
    with pytest.raises(ValueError, match="step 5, .*steps=3 .*type steps=5"):
        own.compare(resolved("steps=3", "resume_with=steps"))


def test_resume_with_changes_only_named_keys(own: RunDir) -> None:
    with pytest.raises(ValueError, match="seed=0, now seed=4"):
        own.compare(resolved("steps=20", "seed=4", "resume_with=steps"))
    with pytest.raises(ValueError, match=r"recipe.head_lr=.*resume_with=\[steps,recipe.head_lr\]"):
        own.compare(resolved("steps=20", "recipe.head_lr=1e-5", "resume_with=steps"))


@pytest.mark.parametrize("key", ["seed", "encoder", "batch_size", "recipe.steps", "nothing", "init"])
def test_resume_with_rejects_keys_that_cannot_change(key: str) -> None:
    with pytest.raises(ValueError, match=f"resume_with names {key}"):
        resolved(f"resume_with=[{key}]")


def test_a_finished_run_needs_more_steps_for_a_changed_recipe(own: RunDir) -> None:
    own.model.write_bytes(b"x")
    own.finish(10)
    with pytest.raises(ValueError, match=r"finished.*resume_with=\[steps,recipe.head_lr\] steps="):
        own.compare(resolved("steps=10", "recipe.head_lr=1e-5", "resume_with=recipe.head_lr"))
    assert own.compare(resolved("steps=12", "resume_with=steps"), note=False)


@pytest.mark.parametrize(
    "path",
    [
        "recipe.gm_trim",
        "recipe.clip_norm",
        "recipe.warmup",
        "perturb",
        "sky",
        "validation.protocol",
        "resume_with",
    ],
)
def test_configs_without_newer_keys_are_the_same_run(own: RunDir, path: str) -> None:
    old = resolved("steps=10").as_dict()
    for node in (old, old["module"], old["data"]):
        *parents, name = path.split(".")
        for parent in parents:
            node = node.get(parent, {})
        node.pop(name, None)
    own.config.write_text(yaml.safe_dump(old))
    assert own.compare(resolved("steps=10")) == []


@pytest.mark.parametrize(
    "key", ["+trainer.max_time=00:01:00:00", "+trainer.profiler=simple", "trainer.devices=2"]
)
def test_trainer_arguments_may_change_at_every_start(key: str) -> None:
    assert differences(resolved(), resolved(key)) == {}
    assert differences(resolved(key), resolved()) == {}


def test_a_newer_key_that_is_typed_is_compared_with_its_default() -> None:
    old, typed = resolved().as_dict(), ["recipe.gm_trim=0.2", "recipe.trim=0.0"]
    for node in (old["recipe"], old["module"]["recipe"]):
        del node["gm_trim"], node["trim"]
    new = resolved(*typed)
    assert config_differences(FlatConfig.from_tree(old), flatten(new), typed=typed_keys(typed)) == {
        "recipe.gm_trim": (0.0, 0.2)
    }


def test_a_key_of_another_version_is_named_but_not_suggested(own: RunDir) -> None:
    own.config.write_text(yaml.safe_dump({**resolved("steps=10").as_dict(), "moving_average": 0.9}))
    with pytest.raises(ValueError, match="moving_average=0.9") as caught:
        own.compare(resolved("steps=10"))
    assert "type moving_average" not in str(caught.value)


def test_machine_keys_may_change_and_training_keys_may_not() -> None:
    old = resolved()
    free = resolved(
        "workers=7", "trainer=ddp", "trainer.devices=3", "micro_batch=2", "logger=wandb", "validation.every=3",
        "sources.validation=x", "checkpoint.keep=5", "name=b", "sources.scenes.validation.count=9",
    )  # fmt: skip
    assert differences(old, free) == {}
    for typed in ("seed=1", "sources.labelled.scenes-synthetic=x", "init=x", "trainer.precision=64-true"):
        assert typed.partition("=")[0] in differences(old, resolved(typed)), typed
    assert resume_policy("recipe.head_lr") == "change" and resume_policy("nothing.at.all") == "same"


def test_checkpoint_facts_use_the_names_in_checkpoints() -> None:
    """`describe` and TrainData write them; a renamed field would make resume= blind."""
    from depth_anything.model.metadata import build_metadata
    from depth_anything.training.data import TrainData

    message = build_metadata(DepthAnything("vitn"))
    assert {"encoder", "max_depth", "input_size"} <= message.keys() and json.loads(
        message["max_depth"]
    ) is None
    assert TrainData.__qualname__ == "TrainData"


BOMB = "stage: teacher\na: &a [x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghi"
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "no key"), (b"\0" * 300, "invalid YAML"), (b"\xff\xfe", "invalid YAML"), (b"[1, 2]", "no key"),
        (b"stage: [", "invalid YAML"), (b"stage: teacher\nstage: metric\n", "stage"), (BOMB.encode(), "alias"),
    ],
)  # fmt: skip
def test_damaged_or_exploding_configs_raise(tmp_path: Path, text: bytes, what: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"config.yaml is damaged .*{what}"):
        read_config(path)


def test_a_run_with_a_damaged_config_is_compared_by_its_checkpoint(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunDir(tmp_path)
    folder.checkpoints.mkdir()
    (folder.checkpoints / other.name).write_bytes(other.read_bytes())
    folder.config.write_bytes(b"\0" * 500)
    assert folder.compare(resolved("steps=8", "image_size=28")) == []
    assert "config.yaml is damaged" in capsys.readouterr().err
    for typed, words in (("encoder=vitt", "encoder=vitn"), ("steps=3", "steps=4")):
        with pytest.raises(ValueError, match=words):
            folder.compare(resolved("steps=8", "image_size=28", typed))


@pytest.mark.parametrize("damage", [b"", b"\0" * 20, b"[]", b'{"st'])
def test_damaged_json_files_count_as_absent(own: RunDir, damage: bytes) -> None:
    for path in (own.path / "finished.json", own.best_json, own.saved, own.model, own.best):
        path.write_bytes(damage)
    assert not own.finished(8) and own.read_best() == {} and own.describe_best() == ""


OLD_RUNS = Path(__file__).parents[1] / "fixtures" / "old_runs"


@pytest.mark.parametrize("stage", ["teacher", "student", "metric"])
def test_the_config_of_an_older_version_is_the_same_run(stage: str) -> None:
    """config.yaml as commit 03f1a9e wrote it, with its keys `tiny` and `rates` and without `optimizer`."""
    command = json.loads((OLD_RUNS / "expected.json").read_text())["stages"][stage]["command"]
    old = FlatConfig.read(OLD_RUNS / "runs" / f"{stage}-vitn-tiny" / "config.yaml")
    today = make_config(*command)
    assert config_differences(old, flatten(today), typed=typed_keys(command)) == {}
    other = make_config(*command, "recipe.head_lr=0.125")
    assert set(config_differences(old, flatten(other))) == {"recipe.head_lr"}


def test_a_renamed_class_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    new = resolved()
    old = new.as_dict()
    old["module"]["_target_"] = "depth_anything.training.engine.OldTeacher"
    assert set(config_differences(FlatConfig.from_tree(old), flatten(new))) == {"module._target_"}
    renamed = {"depth_anything.training.engine.OldTeacher": new.module.target}
    monkeypatch.setattr(resume, "RENAMED_TARGETS", renamed)
    assert config_differences(FlatConfig.from_tree(old), flatten(new)) == {}


def test_another_optimizer_is_another_run_also_for_configs_without_the_key() -> None:
    adam, sgd = resolved(), resolved("optimizer=sgd", "recipe.head_lr=1e-3")
    before = adam.as_dict()
    del before["optimizer"]
    assert config_differences(FlatConfig.from_tree(before), flatten(adam)) == {}
    for old in (FlatConfig.from_tree(before), flatten(adam)):
        changed = config_differences(old, flatten(sgd), typed={"optimizer"})
        assert changed["optimizer._target_"] == ("torch.optim.AdamW", "torch.optim.SGD")
    with pytest.raises(ValueError, match="optimizer._target_"):
        resolved("optimizer=sgd", "resume_with=[optimizer._target_]")


def test_a_callback_is_added_on_purpose(own: RunDir) -> None:
    node = "+callbacks.timer._target_=pytorch_lightning.callbacks.Timer"
    with pytest.raises(
        ValueError, match=r"callbacks.timer._target_=.*resume_with=\[callbacks.timer._target_\]"
    ):
        own.compare(resolved("steps=10", node))
    assert own.compare(resolved("steps=10", node, "resume_with=[callbacks]"), note=False)
