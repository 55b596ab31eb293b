"""The batch scripts on a real Slurm: whatever interrupts a run, it ends with the bytes of an unbroken one."""

import os
import signal
import tarfile
from pathlib import Path

import pytest

from depth_anything import DepthAnything, save_model

from .conftest import SCENES, Project

pytestmark = pytest.mark.cluster


def approach_time_limit(project: Project, job: str) -> None:
    """Set the time limit so that 60 to 120 s are left; Slurm looks for jobs near their limit every 30 s.

    The job has --signal=USR1@60, and Slurm may send the signal 30 s earlier than that.
    """
    hours, minutes, _ = project.slurm.show(job)["RunTime"].split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    project.slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


def test_an_interrupted_training_ends_with_the_bytes_of_an_unbroken_one(
    project: Project, unbroken: tuple[Project, str], data: Path
) -> None:
    """Two tasks. Starting a process takes most of the time, so that one run gets all interruptions."""
    slurm, log = project.slurm, project.logs
    job = project.train(data, options=("--signal=USR1@60",), hold="start 5 15 25")

    project.wait_until_held(job, "start")
    slurm.run("scancel", "--signal=USR1", job)
    project.wait_until_restarted(job, 1)
    assert f"stopped by signal 10 (SIGUSR1); the batch script queues Slurm's job {job} again" in log()
    assert project.steps == []

    project.wait_until_held(job, "5")
    approach_time_limit(project, job)
    project.wait_until_restarted(job, 2)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert f"(SIGUSR1) saved at step 10; the batch script queues Slurm's job {job} again" in log()

    project.wait_until_held(job, "15")
    slurm.run("scontrol", "requeue", job)
    project.wait_until_held(job, "25")
    assert "(SIGTERM) saved at step 20; start the same command again to continue" in log()

    os.kill(project.pid(job, "25", rank=1), signal.SIGKILL)
    assert project.wait_until_ended(job) == "FAILED"
    assert project.steps[-1] == 25 and slurm.show(job)["Restarts"] == "3"

    job = project.train(data, hold="35")
    project.wait_until_held(job, "35")
    slurm.run("scancel", job)
    assert project.wait_until_ended(job) == "CANCELLED"
    assert "(SIGTERM) saved at step 40" in log() and slurm.show(job)["Restarts"] == "0"

    job = project.train(data)
    assert project.wait_until_ended(job) == "COMPLETED", log()
    whole, whole_job = unbroken
    assert whole.wait_until_ended(whole_job) == "COMPLETED", whole.logs()
    for text in (log(), whole.logs()):
        assert text.count("finished: ") == 1 and "Traceback" not in text, text
    assert project.model == whole.model


def test_tasks_of_a_labeling_array_come_and_go(project: Project, data: Path, tmp_path: Path) -> None:
    """SIGUSR1 to one task requeues it alone: its sibling goes on, and a cancelled one is not revived."""
    save_model(DepthAnything("vitt"), tmp_path / "teacher.safetensors")
    arguments = (
        f"teacher={tmp_path / 'teacher.safetensors'}", f"labels={tmp_path / 'labels'}", f"data_dir={data}",
        f"output_dir={project.folder / 'outputs'}", "workers=1", "trainer=cpu", *SCENES,
    )  # fmt: skip
    array = project.submit("pseudolabel.sbatch", *arguments, options=("--array=0-3",), hold="label")
    tasks = [f"{array}_{number}" for number in range(4)]
    for task in tasks:
        project.wait_until_held(task, "label", ranks=1)
    # The last task of an array has the array's own id.
    untouched, cancelled, killed, signalled = tasks
    started = project.slurm.show(untouched)["StartTime"]
    project.slurm.run("scancel", cancelled)
    os.kill(project.pid(killed, "label"), signal.SIGKILL)
    assert project.wait_until_ended(cancelled) == "CANCELLED"
    assert project.wait_until_ended(killed) == "FAILED"
    project.slurm.run("scancel", "--signal=USR1", signalled)
    project.wait_until_restarted(signalled)
    added = project.submit("pseudolabel.sbatch", *arguments, options=("--array=7",))
    (project.folder / "go").touch()
    for task in (signalled, untouched, f"{added}_7"):
        assert project.wait_until_ended(task) == "COMPLETED", project.logs()
    assert [project.slurm.show(task)["Restarts"] for task in tasks] == ["0", "0", "0", "1"]
    assert project.slurm.show(untouched)["StartTime"] == started
    assert project.slurm.state(cancelled) == "CANCELLED"
    (labels,) = (tmp_path / "labels").iterdir()
    images = []
    for shard in labels.glob("*.tar"):
        with tarfile.open(shard) as members:
            images += sorted({name.partition(".")[0] for name in members.getnames()})
    assert len(images) == len(set(images)) == 48
    assert (labels / "manifest.json").is_file() and not list(labels.glob(".*.lease"))
