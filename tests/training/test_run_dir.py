"""Who may write to a run folder, which configs are one run, and where it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from depth_anything.disk import temporary_path
from depth_anything.training.resume import config_differences
from depth_anything.training.run_dir import RunDir, launch_id, step_from_name

CONFIG = {
    "stage": "teacher",
    "steps": 10,
    "seed": 0,
    "overwrite": False,
    "resume": None,
    "workers": 2,
    "recipe": {"encoder_lr": 1e-3, "schedule": "linear", "steps": 10},
    "module": {"recipe": {"encoder_lr": 1e-3, "steps": 10}},
    "trainer": {"devices": 1, "precision": "32-true"},
}


def config(**changes: Any) -> dict[str, Any]:
    made = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        node, *rest = key.split("__")
        if rest:
            made[node][rest[0]] = value
        else:
            made[node] = value
    return made


def checkpoint(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": 5, "loops": {}, "state_dict": {}}, path)


@pytest.mark.parametrize(
    "changes",
    [{"workers": 7}, {"trainer__devices": 8}, {"overwrite": True}, {"resume": "x"}, {"recipe__steps": 11}],
)
def test_free_keys(changes: dict[str, Any]) -> None:
    assert config_differences(config(), config(**changes)) == {}


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
def test_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    first = RunDir(tmp_path / "run")
    first.claim(config())
    first.lock.release()
    again = RunDir(tmp_path / "run")
    again.claim(config(**changes))  # nothing was trained yet: the first start may have been the mistake
    again.claim(config())
    again.lock.release()
    checkpoint(first.checkpoints / "step-000000005.ckpt")
    with pytest.raises(ValueError, match=rf"{key}=.*type {key}=.*name=.*overwrite=true"):
        RunDir(tmp_path / "run").claim(config(**changes))


def test_more_steps_with_a_constant_schedule_only() -> None:
    constant = {"recipe__schedule": "constant"}
    assert config_differences(config(**constant), config(**constant, steps=20)) == {}
    assert list(config_differences(config(**constant), config(**constant, steps=5))) == ["steps"]


def test_overwrite_sets_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        made = RunDir(tmp_path / "run")
        made.claim(config(seed=seed, overwrite=True))
        made.lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert "seed: 0" in (tmp_path / "run.1" / "config.yaml").read_text()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    made = RunDir(tmp_path / "run")
    made.claim(config(seed=2, overwrite=True))  # a requeued job goes on
    made.lock.release()
    assert not (tmp_path / "run.3").exists()


def test_newest_complete_checkpoint(tmp_path: Path) -> None:
    made = RunDir(tmp_path)
    assert made.newest_checkpoint() is None
    for step in (5, 10):
        checkpoint(made.checkpoints / f"step-{step:09d}.ckpt")
    (made.checkpoints / "step-000000015.ckpt").write_bytes(b"torn")
    (made.checkpoints / ".step-000000020.ckpt.tmp").write_bytes(b"torn")
    newest = made.newest_checkpoint()
    assert newest is not None and step_from_name(newest) == 10


def test_other_ranks_hear_the_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    made = RunDir(tmp_path / "run")
    checkpoint(made.checkpoints / "step-000000005.ckpt")
    assert step_from_name(made.begin(config(), main=True)) == 5
    assert step_from_name(RunDir(tmp_path / "run").begin(config(), main=False)) == 5
    made.lock.release()


def test_finished(tmp_path: Path) -> None:
    """A run is finished by its model and a note, not by checkpoints, which may be deleted for their size."""
    made = RunDir(tmp_path)
    assert not made.finished(10)
    made.model.write_bytes(b"x")
    made.finish(10)
    assert made.finished(10) and made.finished(5) and not made.finished(20)


@pytest.mark.parametrize("exclusive", [True, False])
def test_torn_files_of_killed_writers_go(tmp_path: Path, exclusive: bool) -> None:
    made = RunDir(tmp_path)
    made.checkpoints.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ended = temporary_path(made.config).name.replace(f".{os.getpid()}.", f".{dead.pid}.")
    torn = [tmp_path / ended]
    if exclusive:  # these tell nothing of their writer
        torn += [made.checkpoints / ".step-000000015.ckpt.tmp", tmp_path / ".model.safetensors.5.tmp"]
    alive = temporary_path(made.config)
    for path in (*torn, alive):
        path.write_bytes(b"half")
    made.claim(config(), exclusive=exclusive)
    assert alive.exists()
    made.lock.release()
    assert not [path for path in torn if path.exists()]


def test_launch_tells_starts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    assert launch_id(main=True) == str(os.getpid())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = launch_id(main=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert launch_id(main=False) != first


def test_missing_resume_file(tmp_path: Path) -> None:
    made = RunDir(tmp_path / "run")
    with pytest.raises(ValueError, match="resume=nowhere.ckpt is no checkpoint"):
        made.begin(config(resume="nowhere.ckpt"), main=True)
    made.lock.release()
