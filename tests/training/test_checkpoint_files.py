"""Checkpoints: which one a run continues from, damaged and lost ones, and how they are written."""

import errno
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from made_configs import make_config
from tiny_training import BatchList, make_batch, make_module, make_trainer
from torch.utils.data import DataLoader

from depth_anything.disk import atomic_path
from depth_anything.model.integrity import find_damage, save_with_digest
from depth_anything.model.tensor_files import WRITE_ERRORS
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.config import RunConfig
from depth_anything.training.lightning import AtomicCheckpointIO
from depth_anything.training.run_dir import RunDir, step_from_name


def config(**changes: Any) -> RunConfig:
    return make_config("stage=teacher", **{"steps": 30, "checkpoint__every": 5, **changes})


def checkpoint(path: Path, *, digest: bool = True) -> None:
    content = {"global_step": step_from_name(path), "loops": {}, "state_dict": {"w": torch.randn(64, 64)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_with_digest(content, path) if digest else torch.save(content, path)


def flip(path: Path, *, place: float = 0.5) -> None:
    """Overwrite 64 bytes of a file."""
    content = bytearray(path.read_bytes())
    start = min(int(len(content) * place), len(content) - 64)
    for i in range(start, start + 64):
        content[i] ^= 0x55
    path.write_bytes(content)


def make_run(path: Path, *steps: int, digest: bool = True) -> RunDir:
    """Make the folder of a stopped run with checkpoints."""
    folder = RunDir(path)
    folder.claim(config())
    folder.lock.release()
    for step in steps:
        checkpoint(folder.checkpoints / f"step-{step:09d}.ckpt", digest=digest)
    return folder


def begin(path: Path, **changes: Any) -> int:
    """Start the run again; return the step from which it continues, 0 for none."""
    folder = RunDir(path)
    try:
        return step_from_name(folder.begin(config(**changes), main=True))
    finally:
        folder.lock.release()


def log_steps(folder: RunDir, last: int) -> None:
    rows = "".join(f"{step},0.5\n" for step in range(1, last + 1))
    folder.metrics.write_text("step,loss\n" + rows)


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "old"])
@pytest.mark.parametrize("how", ["middle", "head", "tail", "cut", "zeros", "empty"])
def test_a_damaged_checkpoint_is_reported_and_the_older_one_used(
    tmp_path: Path, how: str, digest: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", 5, 10, digest=digest)
    newest = folder.checkpoints / "step-000000010.ckpt"
    whole = newest.read_bytes()
    if how in ("cut", "empty"):
        newest.write_bytes(whole[: len(whole) // 2 if how == "cut" else 0])
    elif how == "zeros":
        newest.write_bytes(whole[:-2000] + bytes(2000))
    else:
        flip(newest, place={"middle": 0.5, "head": 0.0, "tail": 1.0}[how])
    assert begin(tmp_path / "run") == 5
    printed = capsys.readouterr().err
    assert str(newest) in printed and "step-000000005.ckpt" in printed
    # The damaged file is renamed, not deleted.
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "step-000000005.ckpt",
        "step-000000010.ckpt.damaged",
    ]
    assert begin(tmp_path / "run") == 5 and capsys.readouterr().err == ""


def test_old_checkpoints_without_a_digest_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", 5, 10, digest=False)
    assert begin(tmp_path / "run") == 10 and capsys.readouterr().err == ""


def test_damaged_checkpoints_do_not_count_towards_keep(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 5, 10, 15)
    flip(folder.checkpoints / "step-000000015.ckpt")
    assert begin(tmp_path / "run") == 10
    make_checkpoints(folder, keep=1).save(fake_trainer(folder), 12)
    assert [path.name for path in folder.checkpoints.glob("*.ckpt")] == ["step-000000012.ckpt"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 5, 10)
    for path in folder.checkpoints.iterdir():
        flip(path)
    log_steps(folder, 12)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(ValueError) as raised:
            begin(tmp_path / "run")
        for word in (str(folder.path), "step-000000010.ckpt", "resume=", "overwrite=true", "name="):
            assert word in str(raised.value)
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert {p: b for p, b in after.items() if p.name != "lock.json"} == {
        p: b for p, b in before.items() if p.name != "lock.json"
    }
    # resume= and overwrite=true are obeyed.
    checkpoint(tmp_path / "copy" / "step-000000010.ckpt")
    assert begin(tmp_path / "run", resume=str(tmp_path / "copy" / "step-000000010.ckpt")) == 10
    assert not list(folder.checkpoints.glob("*.ckpt"))
    assert begin(tmp_path / "run", overwrite=True) == 0
    assert (tmp_path / "run.1" / "metrics.csv").exists()


def test_a_saved_config_without_checkpoint_every_counts_as_0(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    folder.config.write_text("stage: teacher\nsteps: 30\noverwrite: false\n")
    log_steps(folder, 1)
    with pytest.raises(ValueError, match="metrics.csv .* 1;? "):
        begin(tmp_path / "run")


@pytest.mark.parametrize("evidence", ["saved.json", "metrics.csv", "finished.json"])
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "missing"])
def test_lost_checkpoints_are_detected(tmp_path: Path, evidence: str, empty: bool) -> None:
    folder = make_run(tmp_path / "run")
    if empty:
        folder.checkpoints.mkdir()
    if evidence == "saved.json":
        folder.saved.write_text('{"step": 3}')
    elif evidence == "metrics.csv":
        log_steps(folder, 6)  # a checkpoint was due at 5
    else:
        folder.model.write_bytes(b"x")
        folder.finish(20)
    with pytest.raises(ValueError) as raised:
        begin(tmp_path / "run")
    for word in (evidence, str(folder.path), "resume=", "overwrite=true"):
        assert word in str(raised.value)
    assert begin(tmp_path / "run", overwrite=True) == 0


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run")
    log_steps(folder, 5)  # killed while it was saving its fifth step
    assert begin(tmp_path / "run") == 0
    assert str(folder.path) in (printed := capsys.readouterr().err) and "step 5," in printed
    # checkpoint.every of the killed run counts, not that of the new one.
    assert begin(tmp_path / "run", checkpoint__every=2) == 0


def test_a_finished_run_needs_no_checkpoints(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    folder.model.write_bytes(b"x")
    folder.finish(30)
    log_steps(folder, 30)
    folder.saved.write_text('{"step": 30}')
    assert begin(tmp_path / "run") == 0


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "old"])
def test_resume_rejects_a_damaged_file(tmp_path: Path, digest: bool) -> None:
    path = tmp_path / "copy" / "step-000000010.ckpt"
    checkpoint(path, digest=digest)
    flip(path)
    with pytest.raises(ValueError) as raised:
        begin(tmp_path / "run", resume=str(path))
    assert f"resume={path}" in str(raised.value) and "damaged" in str(raised.value)


def test_an_unreadable_disk_stops_the_run_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", 5, 10)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("depth_anything.model.integrity._hash_file", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        begin(tmp_path / "run")
    assert len(list(folder.checkpoints.glob("*.ckpt"))) == 2


# Writing checkpoints


def fake_trainer(folder: RunDir, *, ranks: int = 1, content: Any = None) -> Any:
    """The attributes of a Trainer that saving reads, with AtomicCheckpointIO."""
    log = SimpleNamespace(saved=0)
    log.save = lambda: setattr(log, "saved", log.saved + 1)
    fake = SimpleNamespace(
        loggers=[log],
        world_size=ranks,
        is_global_zero=True,
        max_steps=30,
        global_step=0,
        lightning_module=torch.nn.Linear(2, 2),
        callbacks=[],
        default_root_dir=str(folder.path),
        strategy=SimpleNamespace(checkpoint_io=AtomicCheckpointIO()),
    )
    state = content or {"global_step": 1, "loops": {}, "state_dict": {"w": torch.zeros(64, 64)}}
    fake.save_checkpoint = lambda path: fake.strategy.checkpoint_io.save_checkpoint(state, path)
    return fake


def make_checkpoints(folder: RunDir, **settings: Any) -> Checkpoints:
    return Checkpoints(folder.checkpoints, **{"every": 5, **settings})


def names(folder: RunDir) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def test_checkpoints_are_saved_every_n_steps_and_the_newest_kept(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    fake, saves = fake_trainer(folder), make_checkpoints(folder)
    for step in range(1, 31):
        saves.on_step(fake, fake.lightning_module, step)
    assert names(folder) == ["step-000000025.ckpt", "step-000000030.ckpt"]
    assert fake.loggers[0].saved == 6 and folder.saved.read_text() == '{"step": 30}'
    assert all(find_damage(path) == "" for path in folder.checkpoints.iterdir())


def test_the_last_step_is_saved_once(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    fake, saves = fake_trainer(folder), make_checkpoints(folder, every=7)
    saves.on_step(fake, fake.lightning_module, 30)
    saves.save(fake, 30)
    assert names(folder) == ["step-000000030.ckpt"] and fake.loggers[0].saved == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    folder = RunDir(tmp_path)
    fake = fake_trainer(folder)
    fake.lightning_module.bias.data[1] = value
    with pytest.raises(ValueError, match=r"step 5\b.*bias.*recipe\.encoder_lr"):
        make_checkpoints(folder).save(fake, 5)
    assert not folder.checkpoints.exists()


def test_a_checkpoint_is_not_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the new file is complete on the disk, readers see the old one."""
    path = tmp_path / "step-000000005.ckpt"
    checkpoint(path)
    before, is_old = path.read_bytes(), []
    sync = os.fsync

    def record_and_sync(descriptor: int) -> None:
        is_old.append(path.read_bytes() == before)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record_and_sync)
    state = {"global_step": 5, "loops": {}, "state_dict": {"w": torch.ones(64, 64)}}
    AtomicCheckpointIO().save_checkpoint(state, path)
    assert is_old == [True, True, False]  # the file is flushed before it is read back, the folder at the end
    assert torch.load(path)["state_dict"]["w"].mean() == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("size", [1000, 200_000])
def test_a_full_disk_leaves_older_checkpoints_unchanged(tmp_path: Path, size: int) -> None:
    folder = RunDir(tmp_path)
    state = {"global_step": 1, "loops": {}, "state_dict": {"w": torch.zeros(400, 400)}}
    fake, saves = fake_trainer(folder, content=state), make_checkpoints(folder)
    saves.save(fake, 5)
    older = (folder.checkpoints / "step-000000005.ckpt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # a write ends halfway, as on a full disk
    try:
        with pytest.raises(OSError) as raised:
            saves.save(fake, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000000010.ckpt" in str(raised.value) and "enforce" not in str(raised.value)
    assert names(folder) == ["step-000000005.ckpt"]
    assert (folder.checkpoints / "step-000000005.ckpt").read_bytes() == older
    assert folder.saved.read_text() == '{"step": 5}'
    saves.save(fake, 10)  # there is space again
    assert names(folder) == ["step-000000005.ckpt", "step-000000010.ckpt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_error_names_the_folder_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = RunDir(tmp_path)
    fake, saves = fake_trainer(folder), make_checkpoints(folder)

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as raised:
        saves.save(fake, 10)
    message = str(raised.value)
    assert os.strerror(code) in message and str(folder.checkpoints) in message and "\n" not in message
    assert "start the same command again" in message and raised.value.errno == code
    assert names(folder) == []


def test_the_error_number_in_a_librarys_message_is_used(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError) as raised, atomic_path(path, also=WRITE_ERRORS):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert str(path) in str(raised.value) and str(tmp_path) in str(raised.value)
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


# The format of checkpoints


class Data(pl.LightningDataModule):
    """Micro-batches with a state that must not change, as TrainData's."""

    def __init__(self, digest: str = "sha256:1") -> None:
        super().__init__()
        self.digest = digest

    def train_dataloader(self) -> Any:
        return DataLoader(BatchList([make_batch(seed) for seed in range(2)]), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["digest"] != self.digest:
            raise ValueError(f"{state['digest']} is not {self.digest}")


class RenamedData(Data):
    """The same under another name, by which Lightning finds no state."""


class StatelessData(pl.LightningDataModule):
    train_dataloader = Data.train_dataloader


def save_checkpoint(folder: Path, data: Any, *, version: int = 2) -> Path:
    """Write a checkpoint of one step, of version 1 as the code before "run_format" did."""
    trainer = make_trainer(folder, Checkpoints(folder / "checkpoints", every=1), steps=1)
    trainer.fit(make_module(), datamodule=data)
    (path,) = (folder / "checkpoints").iterdir()
    content = torch.load(path, weights_only=True)
    assert content["run_format"] == {"version": 2, "data_state": type(data).__qualname__}
    if version == 1:
        del content["run_format"]
        content["TrainData"] = content.pop(type(data).__qualname__)
    if version == 3:
        content["run_format"]["version"] = 3
    torch.save(content, path)
    return path


def resume(folder: Path, data: Any, checkpoint: Path) -> int:
    trainer = make_trainer(folder, Checkpoints(folder / "checkpoints", every=1), steps=2)
    trainer.fit(make_module(), datamodule=data, ckpt_path=checkpoint)
    return trainer.global_step


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("renamed", [True, False])
def test_the_data_are_compared_even_if_their_class_is_renamed(
    tmp_path: Path, one_thread: None, version: int, renamed: bool
) -> None:
    checkpoint = save_checkpoint(tmp_path, Data(), version=version)
    today = RenamedData if renamed else Data
    with pytest.raises(ValueError, match="sha256:1 is not sha256:2"):
        resume(tmp_path, today("sha256:2"), checkpoint)
    assert resume(tmp_path, today(), checkpoint) == 2


def test_a_checkpoint_without_the_state_of_the_data_is_rejected(tmp_path: Path, one_thread: None) -> None:
    checkpoint = save_checkpoint(tmp_path, StatelessData())
    assert resume(tmp_path / "stateless", StatelessData(), checkpoint) == 2
    with pytest.raises(ValueError, match="Data.*name=ANOTHER_NAME"):
        resume(tmp_path, Data(), checkpoint)


def test_a_checkpoint_of_a_newer_version_is_rejected(tmp_path: Path, one_thread: None) -> None:
    checkpoint = save_checkpoint(tmp_path, Data(), version=3)
    with pytest.raises(ValueError, match="version 3"):
        resume(tmp_path, Data(), checkpoint)
