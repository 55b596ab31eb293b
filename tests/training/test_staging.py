"""Sets are copied to a folder of the machine: verified, once, continued after a kill, and never silently left out."""

import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fork_server import ForkedCommand, ForkServer
from local_servers import FaultyServer
from made_configs import make_config
from shard_builders import make

from depth_anything.data import remote, retry
from depth_anything.data.reader import Records
from depth_anything.data.shards import open_set, verify_set
from depth_anything.data.tars import ShardError
from depth_anything.errors import UserError
from depth_anything.training import staging
from depth_anything.training.staging import expand_folder, plan_staging, stage_data, stage_sets

from .test_data import write_labels, write_set


def stage(folder: Path, *roots: Path | str, labels: str | None = None) -> Any:
    plan = plan_staging(folder, {f"set{i}": str(root) for i, root in enumerate(roots)}, labels)
    stage_sets(folder, plan.sets)
    return plan


def test_a_copy_is_the_set(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path / "set")
    (tmp_path / "set" / "000001.idx").unlink()  # it is built from the copy
    plan = stage(tmp_path / "scratch", tmp_path / "set")
    copy = plan.folders[str(tmp_path / "set")]
    assert verify_set(copy) == [] and open_set(copy).digest == made.digest
    for shard in made.shards:
        assert Records(open_set(copy)).read(f"set/{shard.name}", 2) == Records(made).read(
            f"set/{shard.name}", 2
        )
    needed = sum(shard.bytes for shard in made.shards)
    assert (
        f"3 shards of set to {tmp_path / 'scratch'}: {needed * 1.01 / 1e9:.3f} GB" in capfd.readouterr().err
    )


def test_a_second_start_copies_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "set")
    plan = stage(tmp_path / "scratch", tmp_path / "set")
    copy = Path(plan.folders[str(tmp_path / "set")])
    (copy / "000000.tar").write_bytes(b"cut")
    (copy / "000002.idx").unlink()
    copied = []
    original = staging._copy_shard
    monkeypatch.setattr(
        staging, "_copy_shard", lambda *given: (copied.append(given[1].name), original(*given))
    )
    stage(tmp_path / "scratch", tmp_path / "set")
    assert sorted(copied) == ["000000", "000002"] and verify_set(copy) == []


def test_another_content_of_a_set_is_copied_to_another_folder(tmp_path: Path) -> None:
    make(tmp_path / "set")
    first = stage(tmp_path / "scratch", tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    make(tmp_path / "set", shards=2)
    second = stage(tmp_path / "scratch", tmp_path / "set")
    assert first.folders != second.folders


def test_a_tar_that_is_not_that_of_its_manifest_is_not_copied(tmp_path: Path) -> None:
    make(tmp_path / "set")
    tar = tmp_path / "set" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardError, match="000001.tar"):
        stage(tmp_path / "scratch", tmp_path / "set")
    assert not list(tmp_path.glob("scratch/set-*/000001.tar")) and not list(tmp_path.glob("scratch/*/.tmp*"))
    assert not list(tmp_path.glob("scratch/*/manifest.json"))


@pytest.mark.parametrize("problem", ["free", "full", "file"])
def test_too_little_space_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any, problem: str
) -> None:
    """It is found before anything is copied, or when the disk is full because of others."""
    made = make(tmp_path / "set")
    if problem == "free":
        free = sum(shard.bytes for shard in made.shards)
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    elif problem == "file":
        (tmp_path / "scratch").write_text("")
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    with pytest.raises(UserError) as raised:
        stage(tmp_path / "scratch", tmp_path / "set")
    assert str(tmp_path / "scratch") in str(raised.value) and "stage_to" in str(raised.value)
    assert not list(tmp_path.glob("scratch/*/*.tar"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server of the folder tmp_path."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for state in (remote._pools, remote._without_ranges, retry._reported, remote._announced):
        state.clear()
    with FaultyServer(tmp_path) as serving:
        yield serving


def test_a_set_of_a_server_is_copied(tmp_path: Path, server: FaultyServer) -> None:
    """Each file is requested once more after an error."""
    made = make(tmp_path / "set")
    server.fault = lambda path, times: "cut" if path.endswith("000001.tar") and not times else None
    plan = stage(tmp_path / "scratch", f"{server.address}/set")
    copy = plan.folders[f"{server.address}/set"]
    assert verify_set(copy) == [] and open_set(copy).digest == made.digest


COPYING = """
import os, signal, sys, time
from pathlib import Path
from depth_anything.training import staging
original, copied = staging._copy_local, []
def copy(source, shard, target):
    if sys.argv[1] == "kill" and shard.name == "000002":
        target.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    copied.append(shard.name)
    Path(f"copying-{os.getpid()}").touch()
    while sys.argv[1] == "wait" and not Path("go").exists():
        time.sleep(0.01)
    original(source, shard, target)
staging._copy_local, staging._THREADS = copy, 1
plan = staging.plan_staging(Path("scratch"), {"set": "set"}, None)
staging.stage_sets(Path("scratch"), plan.sets)
print(",".join(copied))
"""


def test_processes_copy_once_and_a_killed_copy_continues(tmp_path: Path, fork_server: ForkServer) -> None:
    """The first process is killed in the middle of a shard; of two others, one waits for the other."""
    make(tmp_path / "set", shards=4)

    def start(way: str) -> ForkedCommand:
        return fork_server.start(
            [sys.executable, "-c", COPYING, way], cwd=tmp_path, stdout=tmp_path / f"out-{way}"
        )

    def is_copying(process: ForkedCommand) -> bool:
        return (tmp_path / f"copying-{process.pid}").exists()

    def waits_for_lock(process: ForkedCommand) -> bool:
        return bool(re.search(rf"-> FLOCK .* {process.pid} ", Path("/proc/locks").read_text()))

    assert start("kill").wait(300) == -signal.SIGKILL
    first = start("wait")
    while not is_copying(first):
        time.sleep(0.01)
    second = start("second")
    while not waits_for_lock(second) and not is_copying(second):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [first.wait(300), second.wait(300)] == [0, 0]
    assert (tmp_path / "out-wait").read_text() == "000002,000003\n"
    assert (tmp_path / "out-second").read_text() == "\n"
    (copy,) = tmp_path.glob("scratch/set-*")
    assert verify_set(copy) == [] and not list(copy.glob(".tmp*"))


def test_a_run_reads_the_copies_and_has_the_same_digests(tmp_path: Path, capsys: Any) -> None:
    images = write_set(tmp_path / "photos", labelled=False)
    write_labels(tmp_path / "labels" / "photos", images)
    extra = write_set(tmp_path / "extra", labelled=True)
    unused = write_set(tmp_path / "unused", labelled=True)
    config = make_config(
        "stage=student",
        f"stage_to={tmp_path / 'scratch'}",
        f"+sources.images.photos={images}",
        "~sources.images.scenes-photographic",
        f"+sources.labelled.extra={extra}",
        f"+sources.labelled.unused={unused}",
        f"labels={tmp_path / 'labels'}",
        "mix=[extra]",
    )
    arguments = config.data.as_dict()
    staged = stage_data(config, arguments)
    for key, name in (("sets", "photos"), ("labelled", "extra")):
        assert Path(staged[key][name]).is_relative_to(tmp_path / "scratch")
        assert open_set(staged[key][name]).digest == open_set(arguments[key][name]).digest
    assert staged["labelled"]["unused"] == unused
    assert verify_set(Path(staged["labels"]) / "photos", images=staged["sets"]["photos"]) == []
    (tmp_path / "labels" / "photos" / "manifest.json").unlink()
    staged = stage_data(config, arguments)
    assert staged["labels"] == arguments["labels"] and "is not finished" in capsys.readouterr().err


def test_stage_to_may_name_variables_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node has its own value, and the machine that submits has none."""
    config = make_config("stage=teacher", "stage_to=$OWN_SCRATCH/sets")
    assert config.stage_to == "$OWN_SCRATCH/sets"
    monkeypatch.setenv("OWN_SCRATCH", "/scratch/a b/7")
    assert expand_folder(config.stage_to) == Path("/scratch/a b/7/sets")
    monkeypatch.setenv("OWN_SCRATCH", "")
    with pytest.raises(UserError, match="OWN_SCRATCH"):
        stage_data(config, config.data.as_dict())


def test_labeling_copies_nothing() -> None:
    with pytest.raises(UserError, match="stage_to"):
        make_config("stage=pseudolabel", "stage_to=scratch")
