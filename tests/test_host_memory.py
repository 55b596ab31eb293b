"""Memory of the machine and of the container, from files as Linux has them."""

from pathlib import Path

import pytest

from depth_anything import host_memory


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    return tmp_path


def test_free_memory_is_the_minimum_of_machine_and_container(files: Path) -> None:
    assert host_memory.free_memory() is None and host_memory.describe_memory() == ""
    (files / "meminfo").write_text("MemTotal: 8192 kB\nMemAvailable:    4096 kB\n")
    assert host_memory.free_memory() == 4 << 20 and host_memory.total_memory() == 8 << 20
    group = files / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    (group / "memory.stat").write_text("anon 1000000\nfile 2000000\n")
    assert host_memory.free_memory() == 4 << 20
    (group / "memory.max").write_text("1500000\n")
    assert host_memory.free_memory() == 500_000 and host_memory.total_memory() == 1_500_000


def test_the_limit_of_a_slurm_job_is_found_below_the_root(files: Path) -> None:
    (files / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 9000 kB\n")
    (files / "own").write_text("0::/system.slice/job_7/step_0\n")
    step = files / "cgroup/system.slice/job_7/step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step / "memory.events").write_text("oom 1\noom_kill 1\n")
    (step.parent / "memory.max").write_text("4000000\n")
    (step.parent / "memory.stat").write_text("anon 3000000\n")
    (step.parent / "memory.events").write_text("low 0\noom_kill 2\n")
    assert host_memory.free_memory() == 1_000_000 and host_memory.count_oom_kills() == 2


def test_version_1_of_cgroups(files: Path) -> None:
    (files / "own").write_text("5:cpu:/a\n9:memory:/slurm/job_7\n0::/\n")
    job = files / "cgroup/memory/slurm/job_7"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("5000\n")
    (job / "memory.stat").write_text("cache 9\ntotal_rss 2000\n")
    assert host_memory.free_memory() == 3000
