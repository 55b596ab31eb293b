"""The command line of train.py: overrides are parsed, checked and explained before torch is imported."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from depth_anything.data.tars import StorageUnavailable
from depth_anything.errors import PSEUDOLABEL_COMMAND, SAME_COMMAND, UserError
from depth_anything.training import command
from depth_anything.training.command import (
    check_overrides,
    explain_hydra_error,
    format_failure,
    format_help,
    run_command,
    translate_old_keys,
)
from depth_anything.training.config_schema import DEPTH_STAGES, STAGES

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("", ["type stage=controlnet, stage=metric, stage=pretrain, ", "stage=student, stage=teacher"]),
        ("experiment=claim", ["stage=metric, "]),
        ("experiment=claims/mixed lora=8", ["lora", "stage=metric"]),
        ("stage=teachr", ["stage=teachr", "type stage=teacher "]),
        ("stage=teacher size=papr", ["type size=paper "]),
        ("stage=teacher logger=wandbb", ["type logger=wandb "]),
        ("stage=teacher trainer=null", ["trainer=null"]),
        ("stage=teacher +stage=student", ["type stage=student"]),
        ("stage=teacher +experiment=claim", ["type experiment=claim"]),
        ("stage=teacher ~sources", ["~sources"]),
        ("stage=teacher model.head._target_=a.Head", ["+model.head._target_=a.Head"]),
        ("stage=teacher stpes=5", ["stpes", "Type steps=5"]),
        ("stage=teacher +stpes=5", ["Type steps=5"]),
        ("stage=teacher ++stpes=5 dry_run=true", ["Type steps=5"]),
        ("stage=teacher +recipe.head_lrr=1e-4", ["Type recipe.head_lr=1e-4"]),
        ("stage=teacher recipe={head_lrr:1}", ["recipe.head_lrr", "recipe.head_lr=1"]),
        ("stage=teacher +max_depth=10", ["max_depth", "stage=metric "]),
        ("stage=teacher recipe.variance_focus=1", ["recipe.variance_focus", "stage=metric"]),
        ("stage=pseudolabel recipe.head_lr=1", ["recipe.head_lr", "stage=pseudolabel"]),
        ("stage=pseudolabel steps=5", ["steps", "stage=pseudolabel"]),
        ("stage=metric cutmix=true", ["cutmix", "stage=student "]),
        ("stage=teacher checkpoint.evry=5", ["Type checkpoint.every=5"]),
        ("stage=teacher sources.labeled.x=y", ["Type sources.labelled.x=y"]),
        ("stage=teacher trainer.devics=2", ["Type trainer.devices=2"]),
        ("stage=teacher trainer.benchmark=true", ["type +trainer.benchmark=true"]),
        ("stage=teacher data.foo=1", ["data.foo"]),
        ("stage=teacher module.foo=1", ["module.foo"]),
        ("stage=teacher tiny.steps.teachr.vitt=5", ["tiny.steps.teachr.vitt"]),
        ("stage=teacher ~recipe.head_lr", ["~recipe.head_lr"]),
        ("stage=teacher ~data.seed", ["~data.seed"]),
        ("stage=teacher steps 5", ["type steps=5"]),
        ("stage=teacher steps:5", ["type steps=5"]),
        ("stage=teacher steps = 5", ["type steps=5"]),
        ("stage=teacher steps= 5", ["type steps=5"]),
        ("stage=teacher steps =5", ["type steps=5"]),
        ("stage=teacher steps", ["type steps=VALUE"]),
        ("stage=teacher steps=[1", ["steps=[1", "quotes"]),
        ("stage=teacher init=a(1).pth", ["init=a(1).pth", "quotes"]),
    ],
)
def test_wrong_overrides_raise_one_line_errors_with_a_correction(typed: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        check_overrides(typed.split(), [CONFIGS])
    message = str(caught.value)
    assert "\n" not in message and "append to your config" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "typed",
    [
        "stage=teacher",
        "experiment=claims/keep-all-pixels recipe.trim=0.2",
        "experiment=claims/mixed mix=true",
        "stage=metric size=paper sources=nyu max_depth=10 experiment=zoedepth logger=none",
        "stage=student +sources.labelled.mine=data/x mix=[mine] ~sources.images.scenes-photographic",
        "stage=teacher ++sources.scenes.synthetic.per_shard=12 ~experiment logger=null",
        "stage=teacher module._target_=my_stage.X +module.alpha=2 +trainer.benchmark=true",
        "stage=teacher trainer=ddp trainer.strategy.find_unused_parameters=true hydra.job.name=x",
        "stage=metric +recipe.gm_scales=2 recipe={head_lr:1e-4}",
        "stage=teacher,student seed=1,2",
    ],
)
def test_valid_overrides_pass(typed: str) -> None:
    check_overrides(typed.split(), [CONFIGS])


@pytest.mark.parametrize("typed", [["--steps", "5"], ["--steps=5"], ["--head-lr", "5"], ["--stpes", "5"]])
def test_keys_with_dashes_are_corrected(
    typed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "install_redaction", lambda: None)  # for the whole process
    monkeypatch.setattr(sys, "argv", ["train.py", "stage=teacher", *typed])
    with pytest.raises(SystemExit) as end:
        run_command(CONFIGS)
    assert typed[0] in str(end.value.code)
    assert str(end.value.code).endswith(("steps=5", "recipe.head_lr=5"))


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_stages_choices_keys_and_examples(stage: str) -> None:
    page = format_help([f"stage={stage}"], CONFIGS)
    for word in (
        *(f"stage={name} " for name in STAGES),
        "paper, tiny",
        "examples",
        "a whole number",
        "dry_run",
    ):
        assert word in page
    assert ("recipe.head_lr=5e-05" in page) == (stage in DEPTH_STAGES)
    assert ("recipe.mask_ratio=0.75" in page) == (stage == "pretrain")
    assert ("max_depth=" in page.replace("validation.max_depth", "")) == (
        stage == "metric"
    ) or "max_depth=80" in page
    assert all(len(line) <= 150 for line in page.splitlines())


@pytest.mark.parametrize(("flag", "word"), [("--help", "examples"), ("-h", "stages"), ("--version", "Hydra")])
def test_help_and_version_need_no_stage(
    flag: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "install_redaction", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", flag])
    run_command(CONFIGS)
    assert word in capsys.readouterr().out


def test_config_dir_adds_choices(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "mine.yaml").write_text("# @package _global_\nstage: mine\n")
    check_overrides(["stage=mine", "steps=5", "max_depth=3"], [CONFIGS, tmp_path])
    with pytest.raises(ValueError, match="stage=mine is unknown"):
        check_overrides(["stage=mine"], [CONFIGS])


def test_hydra_errors_are_shortened_to_one_line() -> None:
    error = ValueError(
        "Could not override 'x.foo'.\nTo append to your config use +x.foo=1\nKey 'foo' is not in struct"
    )
    assert "append" not in explain_hydra_error(error, ["stage=teacher", "x.foo=1"])
    assert explain_hydra_error(ValueError("one\ntwo"), []) == "one"


def test_several_values_and_missing_environment_variables_are_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = ValueError(
        "Ambiguous value for argument 'encoder=vits,vitb'\n1. To use it as a list, use key=[a,b]"
    )
    assert explain_hydra_error(sweep, []).endswith("type one, as encoder=vits")
    monkeypatch.delenv("NO_FOLDER", raising=False)
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.to_container(OmegaConf.create({"stage_to": "${oc.env:NO_FOLDER}"}), resolve=True)
    explained = explain_hydra_error(caught.value, [])
    assert "stage_to needs the environment variable NO_FOLDER" in explained and "\n" not in explained
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.to_container(OmegaConf.create({"output_dir": "${SCRATCH}/runs"}), resolve=True)
    assert explain_hydra_error(caught.value, []).endswith("type ${oc.env:SCRATCH}")


def test_train_py_reports_a_wrong_key_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "stage=teacher", "stpes=5"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "steps=5" in done.stderr


def test_a_read_only_disk_names_the_command_to_type_again() -> None:
    error = OSError(errno.EROFS, "Read-only file system", "runs/x")
    assert format_failure(error, ["stage=teacher"]) == (
        "runs/x cannot be written (Read-only file system); make runs writable and "
        "type  python train.py stage=teacher  again"
    )


def test_commands_in_errors_repeat_typed_overrides() -> None:
    typed = ["stage=student", "sources=own", "photos=my pictures", "encoder=vits", "steps=5"]
    error = UserError("no labels yet", ["type ", PSEUDOLABEL_COMMAND])
    command = "python train.py stage=pseudolabel sources=own 'photos=my pictures'"
    assert format_failure(error, typed) == f"no labels yet; type {command}"
    same = "python train.py stage=student sources=own 'photos=my pictures' encoder=vits steps=5"
    assert same in format_failure(StorageUnavailable("set/a is gone", SAME_COMMAND), typed)
    assert format_failure(ValueError("image_size=100\n  is odd"), typed) == "image_size=100 is odd"
    assert "word" not in format_failure(ValueError("https://me:word@host/set is gone"), typed)


@pytest.mark.parametrize(
    ("typed", "today"),
    [
        (
            "stage=teacher tiny.steps.teacher.vitt=9 tiny.steps.student.vitn=8",
            "tiny.steps.vitt=9 stage=teacher",
        ),
        ("stage=student tiny.encoder.student=vits", "encoder=vits stage=student"),
        ("stage=student encoder=vitt tiny.encoder.student=vits", "stage=student encoder=vitt"),
        ("stage=student +tiny.perturb.student=true", "perturb=true stage=student"),
        ("stage=metric tiny.max_depth=10", "max_depth=10 stage=metric"),
        ("stage=metric size=paper tiny.max_depth=10", "stage=metric size=paper"),
        ("stage=teacher tiny.init.metric=x.pth", "stage=teacher"),
        (
            "stage=metric size=paper lora=8 rates.8=1e-3",
            "recipe.encoder_lr=1e-3 stage=metric size=paper lora=8",
        ),
        ("stage=metric size=paper rates.None=1e-6", "recipe.encoder_lr=1e-6 stage=metric size=paper"),
        ("stage=metric size=paper rates.8=1e-3", "stage=metric size=paper"),
        ("stage=teacher tiny.rate.vitt=1e-4 --cfg job", "stage=teacher tiny.rate.vitt=1e-4 --cfg job"),
    ],
)
def test_keys_of_earlier_versions_are_translated(typed: str, today: str) -> None:
    assert translate_old_keys(typed.split()) == today.split()
    check_overrides([one for one in today.split() if "=" in one], [CONFIGS])


def test_help_lists_the_groups_and_an_example_of_a_callback() -> None:
    page = format_help([], CONFIGS)
    for word in ("optimizer=", "callbacks=", "logger=", "adam", "wandb", "+callbacks."):
        assert word in page
