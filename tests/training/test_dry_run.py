"""dry_run=true prints what a run would do, raises its errors, and needs no data."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from depth_anything import DepthAnything, save_model
from depth_anything.errors import UserError
from depth_anything.scenes.render import write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec
from depth_anything.training import check_places
from depth_anything.training.check_config import resolve_config
from depth_anything.training.config import RunConfig
from depth_anything.training.dry_run import count_devices, print_plan
from depth_anything.training.run_dir import RunDir
from depth_anything.training.run_home import RunHome

CONFIGS = Path(__file__).parents[2] / "configs"
SCENES = SceneSetSpec(look="synthetic", count=2, seed=1, height=70, width=70)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(*typed: str) -> RunConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return resolve_config(compose("train", ["encoder=vitn", *typed]))


def plan(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    print_plan(resolved(*typed))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "devices"),
    [("trainer.devices=4", 4), ("trainer.devices=[0,2]", 2), ("trainer.devices='0,1'", 2), ("trainer.devices='4'", 4),
     ("trainer.devices=4 trainer.num_nodes=2", 8), ("trainer=cpu", 1), ("trainer.devices=-1", None), ("seed=0", None)],
)  # fmt: skip
def test_the_plan_is_for_the_typed_devices(
    typed: str, devices: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolved("stage=teacher", *typed.split())
    assert count_devices(config.trainer) == devices
    print_plan(config)
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " accumulated" in line]
    assert shown == ([str(devices)] if devices else ["1", "8"])  # a batch of 8 has none for 64


@pytest.mark.parametrize(
    "typed",
    [
        "trainer.devices=3",
        "trainer.devices=2 trainer.num_nodes=8",
        "micro_batch=5",
        "trainer=cpu micro_batch=3",
    ],
)
def test_a_batch_that_cannot_be_split_evenly_raises(typed: str) -> None:
    with pytest.raises(ValueError, match="batch=|batch_size=|trainer.devices="):
        print_plan(resolved("stage=teacher", *typed.split()))


def test_missing_files_are_marked_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = plan(capsys, "stage=student", "size=paper", "encoder=vits")
    assert "sa1b: data/sa1b (not found yet)" in shown and "passes      unknown until" in shown
    assert "teacher-vitn-tiny/model.safetensors (not found yet)" in plan(capsys, "stage=pseudolabel")
    remote = plan(capsys, "stage=teacher", "sources=own", "photos='https://me:word@host/own?sig=x'")
    assert "word" not in remote and "sig=" not in remote and "unknown until own" in remote
    assert not list(folder.iterdir())


def test_passes_are_counted_from_sets_and_from_scenes_to_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "passes      4.69 over 768 records" in plan(capsys, "stage=teacher", "steps=450")
    write_scenes(folder / "mine", replace(SCENES, count=6))
    shown = plan(capsys, "stage=teacher", "sources=own", "photos=mine", "steps=15", "image_size=42")
    assert "passes      20 over 6 records" in shown
    own = ("stage=teacher", "sources=own", "photos=mine", "steps=15", "image_size=42", "data.repeat={own:2}")
    assert "passes      10 over 12 records" in plan(capsys, *own)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["stage=teacher", "sources=own", "photos=bare"], "bare holds images without depth"),
        (["stage=teacher", "sources=own", "photos=torn"], "torn"),
        (["stage=student", "init=outputs/teacher/model.safetensors"], "is a teacher"),
        (["stage=student", "recipe.alignment_weight=1"], "init=scratch is not DINOv2"),
        (["stage=teacher", "init=broken.safetensors"], "broken.safetensors"),
        (["stage=teacher", "init=outputs/teacher/model.safetensors", "encoder=vitt"], "is not vitt"),
        (["stage=teacher", "name=teacher", "seed=4"], "seed=0, now seed=4"),
        (["stage=teacher", "resume=nowhere.ckpt"], "nowhere.ckpt is no checkpoint"),
        (["stage=student", "mix=[none]"], "mix names none"),
    ],
)
def test_errors_of_the_run_are_raised(folder: Path, typed: list[str], message: str) -> None:
    write_scenes(folder / "bare", replace(SCENES, labelled=False))
    write_scenes(folder / "torn", SCENES)
    next((folder / "torn").glob("*.tar")).unlink()
    (folder / "broken.safetensors").write_bytes(b"no")
    run = RunDir(folder / "outputs" / "teacher")
    save_model(DepthAnything("vitn"), run.model)
    run.config.write_text(yaml.safe_dump(resolved("stage=teacher").as_dict()))
    with pytest.raises(ValueError, match=message):
        print_plan(resolved(*typed))


def test_labels_of_another_teacher_raise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scenes(folder / "own", replace(SCENES, labelled=False))
    teachers = []
    for seed in range(2):
        torch.manual_seed(seed)
        teachers.append(folder / f"teacher-{seed}.safetensors")
        save_model(DepthAnything("vitn"), teachers[-1])
    from depth_anything.training.run import predict

    common = ("stage=pseudolabel", "sources=own", "photos=own", "labels=labels", "workers=0", "trainer=cpu")
    config = resolved(*common, f"teacher={teachers[0]}")
    predict(RunHome(config, config))
    capsys.readouterr()
    assert "labels" in plan(capsys, *common, f"teacher={teachers[0]}")
    with pytest.raises(ValueError, match="teacher"):
        print_plan(resolved(*common, f"teacher={teachers[1]}"))


def test_a_finished_run_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved("stage=teacher", "name=done")
    run = RunDir(config.run_dir)
    save_model(DepthAnything("vitn"), run.model)
    run.config.write_text(yaml.safe_dump(config.as_dict()))
    run.finish(config.steps)
    assert "is finished" in plan(capsys, "stage=teacher", "name=done")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the answer of the system is replaced."""
    asked: list[Path] = []

    def access(path: Path, mode: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr(check_places.os, "access", access)
    config = resolved("stage=teacher", f"output_dir={tmp_path / 'new'}")
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written.*output_dir=FOLDER"):
        print_plan(config)
    assert asked == [tmp_path]


def test_models_and_checkpoints_in_a_store_are_named_and_not_opened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = "s3://bucket/runs/a/checkpoints/step-000000005.ckpt"
    printed = plan(capsys, "stage=teacher", f"resume={address}", "init=s3://bucket/m.pth")
    assert f"resume      {address}, which is not opened now" in printed
    assert "s3://bucket/m.pth" in printed and "not found" not in printed.split("start ")[1].splitlines()[0]
    printed = plan(capsys, "stage=pseudolabel", "teacher=s3://bucket/runs/a")
    assert "teacher     s3://bucket/runs/a\n" in printed
