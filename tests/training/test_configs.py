"""Every shipped combination of configs composes, every `_target_` takes its arguments, and the values are as before."""

import inspect
import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from depth_anything.training.check_config import fill_derived_values

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = sorted(path.stem for path in (CONFIGS / "stage").glob("*.yaml"))
SIZES = sorted(path.stem for path in (CONFIGS / "size").glob("*.yaml"))
TRAINERS = sorted(path.stem for path in (CONFIGS / "trainer").glob("*.yaml"))
SOURCES = sorted(path.stem for path in (CONFIGS / "sources").glob("*.yaml"))
# Arguments that run.py adds to a node.
PASSED_BY_RUN = {
    "module": ("model", "data", "frozen", "networks"),
    "data": ("micro_batch", "patch", "teacher", "codec"),
    "trainer": ("callbacks", "plugins", "max_steps"),
    "optimizer": ("params",),
}


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """Compose a command, with the encoder's rate that `resolve_config` chooses for it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [*overrides])
    filled = cfg.copy()
    fill_derived_values(filled)
    if "recipe" in cfg and "encoder_lr" in cfg.recipe:
        cfg.recipe.encoder_lr = filled.recipe.encoder_lr
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def bind(node: Any, key: str = "") -> int:
    """Bind every `_target_` below a node; return how many there were."""
    if not isinstance(node, dict):
        return 0
    bound = sum(bind(value, name) for name, value in node.items())
    if "_target_" not in node:
        return bound
    module, _, name = node["_target_"].rpartition(".")
    target = getattr(import_module(module), name)
    given = [n for n in PASSED_BY_RUN.get(key, ()) if n in inspect.signature(target).parameters]
    arguments = {k: v for k, v in node.items() if k != "_target_"} | dict.fromkeys(given)
    inspect.signature(target).bind(**arguments)
    return bound + 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("encoder", [None, "vitl"])  # the snapshot below has the others
def test_every_stage_size_and_encoder_composes_and_binds(stage: str, size: str, encoder: str | None) -> None:
    if stage == "controlnet" and encoder:
        return  # it has no encoder
    config = composed(f"stage={stage}", f"size={size}", *([f"encoder={encoder}"] if encoder else []))
    if stage == "controlnet":  # resolve_config leaves out what size=tiny sets for depth networks
        for name in ("encoder_lr", "head_lr", "alignment_weight"):
            config["recipe"].pop(name, None), config["module"]["recipe"].pop(name, None)
    assert bind(config) >= 3
    assert config["name"] == "-".join(filter(None, (stage, config["encoder"], size)))
    assert config["run_dir"] == f"outputs/{config['name']}"


@pytest.mark.parametrize(
    ("trainer", "sources"), [*((name, "scenes") for name in TRAINERS), *(("auto", name) for name in SOURCES)]
)
def test_every_trainer_and_source_composes_and_binds(trainer: str, sources: str) -> None:
    config = composed("stage=teacher", f"trainer={trainer}", f"sources={sources}")
    assert bind(config) >= 3
    assert config["trainer"]["_target_"] == "pytorch_lightning.Trainer"
    assert set(config["sources"]) >= {"labelled", "images", "validation", "scenes"}


@pytest.mark.parametrize(
    "experiment", sorted(path.stem for path in (CONFIGS / "experiment/claims").glob("*"))
)
def test_every_experiment_of_the_claims_composes_and_binds(experiment: str) -> None:
    """None of them needs stage=, and each has a run folder of its own."""
    config = composed(f"experiment=claims/{experiment}")
    assert bind(config) >= 3 and config["stage"] == "student"
    assert config["name"].startswith(experiment) and config["output_dir"] == "outputs/claims/seed-0"


@pytest.mark.parametrize(
    ("typed", "loggers"),
    [
        ("logger=none", []),
        ("logger=csv", []),
        ("logger=tensorboard", ["tensorboard"]),
        ("logger=[csv,wandb,tensorboard]", ["project", "wandb", "tensorboard"]),
        ("logger=[]", []),
    ],
)
def test_one_or_several_loggers_are_chosen(typed: str, loggers: list[str]) -> None:
    config = composed("stage=teacher", "size=paper", typed)
    assert list(config.get("logger") or {}) == loggers
    assert bind(config) >= 3 + len(loggers) - ("project" in loggers)


def test_callbacks_are_chosen_and_added() -> None:
    added = "+callbacks.timer._target_=pytorch_lightning.callbacks.Timer"
    config = composed("stage=teacher", "callbacks=[ema,monitor]", added)
    assert list(config["callbacks"]) == ["ema", "learning_rate", "device", "timer"]
    assert bind(config["callbacks"]) == 4


def test_logger_project_sets_the_project_of_wandb() -> None:
    config = composed("stage=teacher", "logger=wandb", "logger.project=mine")
    assert config["logger"]["wandb"]["project"] == "mine"


def test_size_paper_has_the_papers_numbers() -> None:
    """The paper's §7.1, to the digit."""
    teacher = composed("stage=teacher", "size=paper")
    assert (teacher["encoder"], teacher["batch_size"], teacher["steps"], teacher["image_size"]) == (
        "vitg", 64, 160_000, 518,
    )  # fmt: skip
    student = composed("stage=student", "size=paper")
    assert (student["batch_size"], student["steps"], student["image_size"]) == (192, 480_000, 518)
    for config in (teacher, student):
        recipe = config["recipe"]
        assert (recipe["encoder_lr"], recipe["head_lr"]) == (5e-6, 5e-5)
        assert (recipe["ssi_weight"], recipe["gm_weight"]) == (1.0, 2.0)
        assert config["trainer"]["precision"] == "auto" and config["logger"]["project"]
        assert config["init"] == "hub"
    assert teacher["recipe"]["trim"] == 0 and student["recipe"]["trim"] == 0.1
    assert student["recipe"]["alignment_weight"] > 0 and student["recipe"]["alignment_tolerance"] == 0.85
    assert set(teacher["data"]["sets"]) == {"blendedmvs", "hypersim", "irs", "tartanair", "vkitti2"}
    assert set(student["data"]["sets"]) == {
        "bdd100k", "landmarks", "imagenet21k", "lsun", "objects365", "openimages", "places365", "sa1b",
    }  # fmt: skip
    assert student["labels"] == composed("stage=pseudolabel", "size=paper")["labels"]


def test_stage_metric_has_the_authors_numbers() -> None:
    """Their dist_train.sh and train.py, and ZoeDepth's route over them."""
    config = composed("stage=metric", "size=paper", "sources=hypersim")
    recipe = config["recipe"]
    assert (config["encoder"], config["batch_size"], config["image_size"]) == ("vitl", 32, 518)
    assert (config["min_depth"], config["max_depth"], config["start"]) == (0.001, 20, "encoder")
    assert (recipe["encoder_lr"], recipe["head_lr"], recipe["weight_decay"]) == (5e-6, 5e-5, 0.01)
    assert (recipe["schedule"], recipe["warmup"], recipe["clip_norm"]) == ("poly", 0, None)
    assert (recipe["variance_focus"], recipe["silog_weight"]) == (0.5, 1)
    assert config["init"] == "outputs/student-vitl-paper/model.safetensors"
    assert config["data"]["sets"] == {"hypersim": "data/hypersim"}
    zoe = composed("stage=metric", "size=paper", "sources=nyu", "max_depth=10", "experiment=zoedepth")
    recipe = zoe["recipe"]
    assert (zoe["batch_size"], zoe["steps"], zoe["data"]["max_depth"]) == (16, 24_231 * 5 // 16, 10)
    assert recipe["encoder_lr"] == pytest.approx(recipe["head_lr"] / 50) and recipe["head_lr"] == 1.61e-4
    assert (recipe["clip_norm"], recipe["silog_weight"], recipe["variance_focus"]) == (0.1, 10, 0.85)


def test_stage_pretrain_has_the_authors_numbers() -> None:
    """MAE's table 8 and PRETRAIN.md; at size=tiny the same method with a small decoder."""
    config = composed("stage=pretrain", "size=paper", "encoder=vitl")
    recipe = config["recipe"]
    assert config["batch_size"] == 4096 and config["steps"] == 800 * (1_281_167 // 4096)
    assert recipe["encoder_lr"] == recipe["head_lr"] == pytest.approx(1.5e-4 * 4096 / 256)
    assert (recipe["betas"], recipe["weight_decay"], recipe["schedule"]) == ([0.9, 0.95], 0.05, "cosine")
    assert (recipe["mask_ratio"], recipe["normalize_targets"], recipe["warmup"]) == (0.75, True, 40 / 800)
    assert (recipe["decoder_width"], recipe["decoder_depth"], recipe["decoder_heads"]) == (512, 8, 16)
    assert set(config["data"]["sets"]) == set(config["sources"]["images"])
    tiny = composed("stage=pretrain")
    assert (tiny["encoder"], tiny["image_size"], tiny["recipe"]["mask_ratio"]) == ("vitn", 70, 0.75)


def test_tiny_is_the_default() -> None:
    config = composed("stage=teacher")
    assert config["size"] == "tiny" and config["encoder"] == "vitt"
    student = composed("stage=student", "encoder=vits")
    assert 10 <= student["steps"] <= 60
    assert student["recipe"]["alignment_weight"] == 0 and student["init"] == "scratch"
    assert composed("stage=student")["encoder"] == "vitn"


def test_stage_files_start_with_command_hardware_result_and_paper() -> None:
    """Each stage file opens with the command, the hardware, the result and the paper's section."""
    for path in (CONFIGS / "stage").glob("*.yaml"):
        head = "\n".join(path.read_text().splitlines()[:8])
        for word in ("Command", "python train.py stage=" + path.stem, "Hardware", "Result", "Paper"):
            assert word in head, (path, word)


# --- composed values stay as they are ----------------------------------------------------------------------------

SNAPSHOT = json.loads((Path(__file__).parent / "composed_configs.json").read_text())
BASES = [command for command in SNAPSHOT if len(command.split()) == 2]
# Keys that came after the snapshot was taken.
NEW_KEYS = (
    "checkpoint.keep_every",
    "checkpoint.asynchronous",
    "optimizer.",
    "callbacks",
    "model.",
    "tiny.",
    "sources.metric.",
    "sources.max_depth",
    "sources.steps",
    "label_",
    "data.label_",
    "agreement_tolerance",
    "crop_share",
    "data.crop_share",
    "data.local_weight",
    *(f"{prefix}recipe.{name}" for name in ("normalization", "local_weight") for prefix in ("", "module.")),
    "teacher_",
    "sources.classes",
    "sources.segmentation",
    "sources.scenes.classes",
    "canonical_focal",
    "data.canonical_focal",
    "hang_timeout",
    "stage_to",
    "guards.",
    "mirror.",
    "share",
    "data.share",
    *(f"sources.scenes.{name}.layout" for name in ("synthetic", "photographic", "validation")),
)
# stage=metric takes from its source what the snapshot lacked: the range, the steps, and which sets are in meters.
METRIC_SOURCES: dict[str, dict[str, Any]] = {
    "kitti": {"max_depth": 80, "data.max_depth": 80},
    "nyu": {"max_depth": 10, "data.max_depth": 10},
    "vkitti2": {"max_depth": 80, "data.max_depth": 80}
    | dict.fromkeys(("steps", "recipe.steps", "module.recipe.steps"), 73346),
}


def snapshot_of(command: str) -> dict[str, Any]:
    """Return the flat composed config that a command had, with the changes that are intended."""
    entry, base = SNAPSHOT[command], SNAPSHOT[" ".join(command.split()[:2])]
    values = dict(base)
    if command not in BASES:
        values = {
            key: value for key, value in {**base, **entry["changed"]}.items() if key not in entry["absent"]
        }
    if (
        "logger._target_" in values
    ):  # logger=wandb is a named node now, and `logger.project` still sets its project
        node = {key: value for key, value in values.items() if key.startswith("logger.")}
        values = {key: value for key, value in values.items() if key not in node}
        values |= {key.replace("logger.", "logger.wandb."): value for key, value in node.items()}
        values["logger.project"] = node["logger.project"]
    if "size=tiny" in command and values.get("init", "") is None:  # other random weights, which learn at once
        values["init"] = "scratch"
    if command.startswith("stage=metric"):
        source = command.partition("sources=")[2].partition(" ")[0]
        if "size=paper" in command:
            values |= METRIC_SOURCES.get(source, {})
        if "sources.labelled.irs" in values:  # sources=paper, of which only Hypersim is used
            values = {k: v for k, v in values.items() if not k.startswith("data.sets.") or "hypersim" in k}
    return values


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in node.items():
        path = f"{prefix}{name}"
        values |= flat(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return values


@pytest.mark.parametrize("base", BASES)
def test_composed_values_equal_the_snapshot(base: str) -> None:
    """Every shipped combination of stage, size, encoder, sources, trainer, logger and experiment."""
    for command in (command for command in SNAPSHOT if command == base or command.startswith(f"{base} ")):
        values = flat(composed(*command.split()))
        old = {key: value for key, value in values.items() if not key.startswith(NEW_KEYS)}
        assert old == snapshot_of(command), command
