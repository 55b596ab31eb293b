"""Types and ranges of all config keys; impossible values and unknown keys raise before data is read."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from depth_anything.errors import UserError
from depth_anything.training.check_config import (
    find_key,
    list_keys,
    parse_config,
    resolve_config,
    unknown_key_message,
)
from depth_anything.training.check_trainer import SET_BY_RUN
from depth_anything.training.config import RunConfig
from depth_anything.training.config_schema import STAGES
from depth_anything.training.lightning import trainer_arguments
from depth_anything.training.recipes import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"


def resolved(*typed: str) -> RunConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return resolve_config(compose("train", [*typed]))


@pytest.mark.parametrize("size", ["tiny", "paper"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_shipped_config_is_valid_and_has_all_keys_of_the_schema(stage: str, size: str) -> None:
    def paths(node: dict[str, Any], prefix: str = "") -> set[str]:
        return {
            path
            for name, value in node.items()
            for path in (
                prefix + name,
                *(paths(value, f"{prefix}{name}.") if isinstance(value, dict) else ()),
            )
        }

    config = resolved(f"stage={stage}", f"size={size}")
    added = {"recipe.gm_scales", "recipe.gm_trim"} if stage == "metric" else set()  # by +, for replay
    optional = (
        "tiny.",
        "logger",
        "callbacks",
        "model.",
        "sources.metric",
        "sources.max_depth",
        "sources.steps",
        "sources.segmentation.",
        "sources.classes",
    )
    wanted = {key for key in list_keys(stage) if not key.startswith(optional)}
    assert wanted - added <= paths(config.as_dict())


# Composing takes a third of a second: every key with one wrong value, and one key with every wrong value.
RATES = ["recipe.encoder_lr", "recipe.head_lr", "recipe.weight_decay", "recipe.ssi_weight", "recipe.gm_weight",
         "recipe.warmup", "recipe.trim", "recipe.gm_trim", "recipe.clip_norm"]  # fmt: skip
COUNTS = ["steps", "batch_size", "image_size", "streams", "micro_batch", "workers", "seed", "checkpoint.every",
          "checkpoint.keep", "logging.every", "validation.every", "validation.limit", "recipe.gm_scales",
          "trainer.num_nodes", "sources.scenes.synthetic.count"]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, "-0.001") for key in RATES),
        *(("recipe.head_lr", value) for value in (".nan", ".inf", "abc", "true", "[1]")),
        *(("recipe.clip_norm", value) for value in (".nan", "abc")),  # may be null
    ],
)
def test_rates_weights_and_shares_must_be_numbers_in_range(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}=.* must be a number .*type {key}="):
        resolved("stage=teacher", f"{key}={value}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, "-1") for key in COUNTS),
        *(("steps", value) for value in ("2.5", "true", "many")),
        *(("micro_batch", value) for value in ("2.5", "many")),  # may be null
        *(("sources.scenes.synthetic.count", value) for value in ("2.5", "many")),
    ],
)
def test_counts_must_be_whole_numbers(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}=.* must be a whole number .*type {key}="):
        resolved("stage=teacher", f"{key}={value}")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("recipe.betas=0.9", r"recipe.betas=\[0.9,0.999\]"),
        ("recipe.betas=[0.9,1.0]", r"recipe.betas=\[0.9,1.0\] must be"),
        ("recipe.betas=[0.9]", "recipe.betas"),
        ("recipe.clip_norm=0", "recipe.clip_norm=0 .*null"),
        ("recipe.trim=1.0", "recipe.trim=1.0"),
        ("recipe.warmup=500", "recipe.warmup=500"),
        ("recipe.schedule=cosin", "type recipe.schedule=cosine"),
        ("recipe.compile=maybe", "true or false"),
        ("recipe.head_lr=null", "recipe.head_lr=null"),
        ("recipe.ssi_weight=0 recipe.gm_weight=0", "type recipe.ssi_weight=1.0"),
        ("recipe.encoder_lr=0 recipe.head_lr=0", "type recipe.head_lr=5e-5"),
        ("recipe.gm_scales=9", "recipe.gm_scales=9.*image_size=70"),
        ("steps=1e3", "type steps=1000"),
        ("steps=100000000000000000000", "steps=.*to 1000000000"),
        ("image_size=14000000", "image_size=14000000"),
        ("workers=100000", "workers=100000"),
        ("image_size=100", "type image_size=98"),
        ("image_size=7", "type image_size=14"),
        ("sky=blue", "sky=blue.*sky=invalid"),
        ("sky={scenes-synthetic:blue}", "sky="),
        ("sky={scenes-syn:far}", "scenes-syn.*scenes-synthetic"),
        ("data.repeat={scenes-syn:2}", "scenes-syn.*scenes-synthetic"),
        ("data.repeat={scenes-synthetic:0}", "data.repeat"),
        ("data.repeat=3", "data.repeat=3"),
        ("data.seed=5", "type seed=5"),
        ("recipe.steps=5", "type steps=5"),
        ("encoder=vitz", "encoder=vitz.*type encoder=vit"),
        ("encoder=[vits]", "encoder="),
        ("validation.benchmark=nyx validation.root=x", "type validation.benchmark=nyu"),
        ("validation.protocol=da3", "type validation.protocol=da2"),
        ("trainer.devices=0", "trainer.devices=0"),
        ("trainer.devices=[0,0]", "trainer.devices"),
        ("trainer.precision=bf17", "type trainer.precision=bf16"),
        ("trainer.accelerator=cuba", "type trainer.accelerator=cuda"),
        ("trainer.strategy=ddpp", "type trainer.strategy=ddp"),
        ("+trainer.benchmark=maybe", "trainer.benchmark=maybe"),
        ("+trainer.max_steps=5", "type steps=N"),
        ("+trainer.fast_dev_run=true", "type steps=1"),
        ("+trainer.limit_train_batches=3", "type steps=N"),
        ("+trainer.overfit_batches=2", "trainer.overfit_batches"),
        ("+trainer.gradient_clip_val=5", "recipe.clip_norm"),
        ("trainer.strategy=ddp_spawn", "type trainer.strategy=ddp"),
        ("trainer.strategy=fsdp_cpu_offload", "type trainer=fsdp"),
        ("trainer=fsdp trainer.precision=16-mixed", "trainer.precision=16-mixed"),
        ("trainer=fsdp guards.spike=rewind", "type guards.spike=skip"),
        ("+trainer.profiler=foo", "trainer.profiler=foo.*simple"),
        ("+trainer.deterministic=maybe", "trainer.deterministic=maybe"),
        ("+trainer.max_time=soon", "trainer.max_time=soon"),
        ("sources.scenes.synthetic.look=plain", "look=plain.*look=synthetic"),
        ("name=''", "name="),
        ("name=a/../../b", "name=a/../../b .*output_dir.*type name=second"),
        ("name=..", "name=.. .*type name=second"),
        ("name=.", "name=. .*type name=second"),
        ("name=/tmp/b", "name=/tmp/b .*type name=second"),
        ("encoder=../vits", "encoder=../vits .*type encoder=vit"),
        ("++sources.labelled={../own:a}", 'sources.labelled.*"../own".*sources.labelled.NAME=FOLDER'),
        ("++sources.images={a/b:a}", 'sources.images.*"a/b".*sources.images.NAME=FOLDER'),
        ("++sources.classes={..:a}", 'sources.classes.*"..".*sources.classes.NAME=FOLDER'),
        ("init=[a]", "init="),
        ("dry_run=yess", "dry_run"),
        ("resume_with={steps:5}", "resume_with"),
        ("stage_to=s3://bucket/x", "stage_to=s3://bucket/x must be a folder of this machine"),
        ("mirror.folder=gs://bucket/x", "mirror.folder=gs://bucket/x must be a folder of this machine"),
        ("mirror.folder=$TMPDIR", r"type 'mirror\.folder=\$\{oc\.env:TMPDIR\}'"),
        ("output_dir=$SCRATCH/runs", r"type 'output_dir=\$\{oc\.env:SCRATCH\}/runs'"),
    ],
)
def test_impossible_values_raise_one_line_errors(typed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolved("stage=teacher", *typed.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("stage=teacher +max_depth=10", "max_depth is a key of stage=metric "),
        ("stage=teacher +recipe.silog_weight=1", "recipe.silog_weight is a key of stage=metric "),
        ("stage=student +lora=8", "lora is a key of stage=metric "),
        (
            "stage=metric ++recipe.alignment_weight=1",
            "recipe.alignment_weight is a key of stage=student ",
        ),
        ("stage=teacher +data.cutmix=true", "data.cutmix is a key of stage=student "),
        ("stage=pseudolabel +cutmix=true", "cutmix is a key of stage=student "),
        ("stage=teacher +stepz=3", "type steps=3|Type steps=3"),
        ("stage=teacher +recipe.head_lrr=1e-4", "recipe.head_lr"),
        ("stage=teacher +sources.labeled={}", "sources.labelled"),
        ("stage=teacher +sources.scenes.synthetic.colour=1", "colour"),
        ("stage=teacher +tiny.stepz.vitt=1", "Type tiny.steps="),
        ("stage=teacher +data.foo=1", "data.foo"),
        ("stage=teacher +module.foo=1", "module.foo"),
        ("stage=teacher +trainer.foo=1", "trainer.foo"),
        ("stage=teacher ~recipe.head_lr", "recipe.head_lr"),
        ("stage=teacher ~trainer", "trainer"),
        ("stage=teacher recipe=5", "recipe=5"),
        ("stage=teacher logger=wandb +logger.foo=1", "logger.foo"),
        ("stage=segmentation trainer=fsdp", "type trainer=ddp"),
        ("stage=teacher module._target_=nowhere.X", "nowhere"),
        ("stage=teacher module._target_=depth_anything.training.teacher.Techer", "Techer"),
    ],
)
def test_unknown_keys_raise_errors(typed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolved(*typed.split())
    assert "\n" not in str(caught.value)


def test_valid_additions_are_accepted() -> None:
    config = resolved(
        "stage=metric", "+trainer.benchmark=true", "trainer.devices=[0,1]", "+recipe.gm_scales=2", "name=7",
        "recipe.clip_norm=1", "+sources.images.mine=data/x", "trainer=ddp", "logger=wandb", "trainer.precision=64-true",
    )  # fmt: skip
    assert config.trainer.arguments["benchmark"] is True and config.name == "7"
    assert config.sources.images["mine"] == "data/x"


def test_a_users_module_takes_its_own_arguments() -> None:
    own = "module._target_=tests.training.test_check_config.Own"
    assert resolved("stage=teacher", own, "+module.alpha=2").module.arguments["alpha"] == 2
    with pytest.raises(ValueError, match="module.alpa"):
        resolved("stage=teacher", own, "+module.alpa=2")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("+callbacks.timer=5", "callbacks.timer=5 .*callbacks.NAME._target_="),
        ("+callbacks.timer.interval=step", "callbacks.timer._target_="),
        ("+callbacks.timer._target_=pytorch_lightning.callbacks.Tymer", "Tymer"),
        ("+callbacks.timer={_target_:pytorch_lightning.callbacks.Timer,dur:1}", "callbacks.timer.dur"),
        ("logger=wandb +logger.wandb.entitty=x", "logger.wandb.entitty|entitty"),
        ("optimizer._target_=torch.optim.Adamm", "optimizer._target_=torch.optim.Adamm"),
        ("+optimizer.momentum=0.9", "optimizer.momentum"),
    ],
)
def test_nodes_name_a_class_and_its_arguments(typed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved("stage=teacher", *typed.split())


def test_a_config_converts_to_plain_values_and_back() -> None:
    config = resolved("stage=metric", "+callbacks.timer._target_=pytorch_lightning.callbacks.Timer", "lora=4")
    again = parse_config(config.as_dict())
    assert again == config and again.as_dict() == config.as_dict()
    assert config.callbacks["timer"]["_target_"].endswith("Timer") and config.recipe.betas == [0.9, 0.999]
    teacher = resolved("stage=teacher")
    assert teacher.max_depth is None and teacher.lora is None and "max_depth" not in teacher.as_dict()


class Own:
    def __init__(self, model: Any, recipe: Recipe, *, frozen: Any = None, alpha: int = 1) -> None:
        self.alpha = alpha


def test_trainer_arguments_of_the_run_cannot_be_typed(tmp_path: Path) -> None:
    given = trainer_arguments(callbacks=[], max_steps=1, run_dir=str(tmp_path))
    assert given.keys() <= SET_BY_RUN.keys()


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("stpes", "steps"), ("head_lr", "recipe.head_lr"), ("recipe.batch_size", "batch_size"),
        ("lr", "recipe.head_lr"),
        ("epochs", "steps"), ("sources.labeled.x", "sources.labelled.x"), ("trainer.benchmrk", "+trainer.benchmark"),
    ],
)  # fmt: skip
def test_the_closest_key_is_suggested(path: str, near: str) -> None:
    assert find_key(path)[0] is None
    assert unknown_key_message(path, "teacher", value="5").endswith(f"Type {near}=5")


@pytest.mark.parametrize("changes", [{"clip_norm": -1}, {"head_lr": "x"}, {"betas": 0.9}, {"trim": 1.0}])
def test_a_recipe_built_in_python_is_validated(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"recipe.{next(iter(changes))}="):
        Recipe(**{"steps": 10, "encoder_lr": 1e-4, "head_lr": 1e-3, **changes})


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            ("stage=teacher", "output_dir='https://host/x?signature=hidden'"),
            ("can be read only", "s3://BUCKET"),
        ),
        (("stage=teacher", "output_dir=FILE"), ("FILE is a file", "output_dir=FOLDER")),
        (
            ("stage=teacher", "stage_to=FILE/a"),
            ("FILE is a file", "FILE/a cannot be made", "stage_to=FOLDER"),
        ),
        (
            ("stage=teacher", "output_dir=s3://b/x", "mirror.folder=FILE"),
            ("FILE is a file", "mirror.folder="),
        ),
        (("stage=pseudolabel", "labels=https://host/x"), ("https://host/x can be read only",)),
        (("stage=teacher", "output_dir=ftp://host/x"), ("ftp://host/x/", "can be read only")),
        (("stage=pseudolabel", "share=5/4"), ("share=5/4", "share=3/8")),
        (("stage=pseudolabel", "labels=FILE"), ("FILE is a file", "labels=FOLDER")),
        (
            ("stage=pseudolabel", "teacher='https://h/m.pth?key=hidden'"),
            ("teacher=https://h/m.pth", "download"),
        ),
        (("stage=pseudolabel", "teacher=s3://b/m.onnx"), ("teacher=s3://b/m.onnx", "download")),
        (("stage=pseudolabel", "teacher=folder:s3://b/maps"), ("teacher=folder:s3://b/maps", "download")),
        (("stage=teacher", "init=https://h/m.pth"), ("init=https://h/m.pth", "download")),
        (("stage=teacher", "resume=foo://h/m.ckpt"), ("resume=foo://h/m.ckpt", "download")),
        (("stage=teacher", "sources=own", "photos=foo://a"), ("foo://a", "foo:// is unknown")),
    ],
)
def test_places_that_a_run_cannot_use_are_refused_before_it_starts(
    typed: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError) as error:
        resolved(*(one.replace("FILE", str(file)) for one in typed))
    for word in words:
        assert word.replace("FILE", str(file)) in str(error.value)
    assert "hidden" not in str(error.value)


def test_places_that_a_run_can_use(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for places in (
        {"output_dir": f"{tmp_path}/link/new"},
        {"output_dir": "s3://bucket/runs", "init": "gs://bucket/m.pth", "stage_to": str(tmp_path)},
        {"output_dir": f"file://{tmp_path}", "resume": "file:///nowhere/m.ckpt"},
    ):
        resolved("stage=teacher", *(f"{key}={value}" for key, value in places.items()))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            "+callbacks.x._target_=pytorch_lightning.callbacks.EarlyStopping",
            ("needs the argument monitor", "callbacks.x.monitor="),
        ),
        (
            "+callbacks.x._target_=builtins.dict",
            ("callbacks.x._target_=builtins.dict", "package.module.Class"),
        ),
    ],
)
def test_nodes_that_cannot_be_built_are_refused(typed: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        resolved("stage=teacher", typed)
    for word in words:
        assert word in str(error.value)
