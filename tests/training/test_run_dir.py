"""Run folders: the lock, which configs are the same run, and from which checkpoint a run continues."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_configs import flatten, make_config

from depth_anything.disk import temporary_path
from depth_anything.training.config import RunConfig
from depth_anything.training.resume import config_differences
from depth_anything.training.run_dir import RunDir, launch_id, step_from_name


def config(**changes: Any) -> RunConfig:
    return make_config("stage=teacher", "trainer=cpu", **{"steps": 10, **changes})


def checkpoint(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": 5, "loops": {}, "state_dict": {}}, path)


@pytest.mark.parametrize(
    "changes",
    [{"workers": 7}, {"trainer__devices": 8}, {"overwrite": True}, {"resume": "x"}, {"recipe__steps": 11}],
)
def test_free_keys_may_change(changes: dict[str, Any]) -> None:
    assert config_differences(flatten(config()), flatten(config(**changes))) == {}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"steps": 20}, "steps"),
        ({"recipe__encoder_lr": 1e-4}, "recipe.encoder_lr"),
        ({"trainer__precision": "bf16-mixed"}, "trainer.precision"),
        ({"new": 1}, "new"),
    ],
)
def test_another_config_is_rejected(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    first = RunDir(tmp_path / "run")
    first.claim(config())
    first.lock.release()
    again = RunDir(tmp_path / "run")
    again.claim(config(**changes))  # nothing is trained yet, so the config may change
    again.claim(config())
    again.lock.release()
    checkpoint(first.checkpoints / "step-000000005.ckpt")
    with pytest.raises(ValueError, match=rf"{key}=.*{key}=.*name=.*overwrite=true"):
        RunDir(tmp_path / "run").claim(config(**changes))


def test_more_steps_are_allowed_only_with_a_constant_schedule() -> None:
    constant = {"recipe__schedule": "constant"}
    assert config_differences(flatten(config(**constant)), flatten(config(**constant, steps=20))) == {}
    fewer = config_differences(flatten(config(**constant)), flatten(config(**constant, steps=5)))
    assert list(fewer) == ["steps"]


def test_a_typed_key_is_named_before_those_that_follow_from_it(tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run")
    first.claim(config())
    first.lock.release()
    checkpoint(first.checkpoints / "step-000000005.ckpt")
    other = make_config("stage=student", "trainer=cpu", steps=10)
    with pytest.raises(ValueError, match=r"was started with stage=teacher, now stage=student \(and "):
        RunDir(tmp_path / "run", typed={"stage"}).claim(other)


def test_a_missing_resume_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.ckpt does not exist"):
        RunDir(tmp_path / "run").begin(config(resume=str(tmp_path / "none.ckpt")), main=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that is read-only; root may write into any other folder."""

    def read_only(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x")

    fix = f"make {tmp_path} writable and start the same command again"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=fix):
        patch.setattr(Path, "mkdir", read_only)
        RunDir(tmp_path / "new").begin(config(), main=True)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=fix):
        patch.setattr(Path, "unlink", read_only)
        RunDir(tmp_path / "old").begin(config(), main=True)


def test_overwrite_renames_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        folder = RunDir(tmp_path / "run")
        folder.claim(config(seed=seed, overwrite=True))
        folder.lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert "seed: 0" in (tmp_path / "run.1" / "config.yaml").read_text()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder = RunDir(tmp_path / "run")
    folder.claim(config(seed=2, overwrite=True))  # a requeued job continues
    folder.lock.release()
    assert not (tmp_path / "run.3").exists()


def test_newest_checkpoint_skips_damaged_files(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    assert folder.newest_checkpoint() is None
    for step in (5, 10):
        checkpoint(folder.checkpoints / f"step-{step:09d}.ckpt")
    (folder.checkpoints / "step-000000015.ckpt").write_bytes(b"torn")
    (folder.checkpoints / ".step-000000020.ckpt.tmp").write_bytes(b"torn")
    newest = folder.newest_checkpoint()
    assert newest is not None and step_from_name(newest) == 10


def test_other_ranks_read_the_checkpoint_that_rank_0_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = RunDir(tmp_path / "run")
    checkpoint(folder.checkpoints / "step-000000005.ckpt")
    assert step_from_name(folder.begin(config(), main=True)) == 5
    assert step_from_name(RunDir(tmp_path / "run").begin(config(), main=False)) == 5
    folder.lock.release()


def test_a_run_is_finished_by_its_model_and_finished_json(tmp_path: Path) -> None:
    """Its checkpoints may be deleted."""
    folder = RunDir(tmp_path)
    assert not folder.finished(10)
    folder.model.write_bytes(b"x")
    folder.finish(10)
    assert folder.finished(10) and folder.finished(5) and not folder.finished(20)


@pytest.mark.parametrize("exclusive", [True, False])
def test_temporary_files_of_dead_writers_are_removed(tmp_path: Path, exclusive: bool) -> None:
    folder = RunDir(tmp_path)
    folder.checkpoints.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ended = temporary_path(folder.config).name.replace(f".{os.getpid()}.", f".{dead.pid}.")
    torn = [tmp_path / ended]
    if exclusive:  # names without a process
        torn += [folder.checkpoints / ".step-000000015.ckpt.tmp", tmp_path / ".model.safetensors.5.tmp"]
    alive = temporary_path(folder.config)
    for path in (*torn, alive):
        path.write_bytes(b"half")
    folder.claim(config(), exclusive=exclusive)
    assert alive.exists()
    folder.lock.release()
    assert not [path for path in torn if path.exists()]


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        ({}, ("", 0)),
        ({"SLURM_JOB_ID": "777"}, ("777", 0)),
        ({"SLURM_JOB_ID": "777", "SLURM_RESTART_COUNT": "3"}, ("777", 3)),
    ],
)
def test_the_lock_names_the_start_of_the_slurm_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], start: tuple[str, int]
) -> None:
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    folder = RunDir(tmp_path)
    folder.lock.acquire()
    content = json.loads((tmp_path / "lock.json").read_text())
    folder.lock.release()
    assert (content["job"], content["start"]) == start


def test_launch_id_differs_between_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    assert launch_id(main=True) == str(os.getpid())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = launch_id(main=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert launch_id(main=False) != first


def test_a_missing_resume_file_is_rejected(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    with pytest.raises(ValueError, match="resume=nowhere.ckpt"):
        folder.begin(config(resume="nowhere.ckpt"), main=True)
    folder.lock.release()
