"""The batch scripts on a real Slurm: whatever interrupts a run, it ends with the bytes of an unbroken one."""

import os
import signal
import tarfile
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depth_anything import DepthAnything, save_model
from depth_anything.disk import process_exists
from depth_anything.ingest.photographs import write_images

from .project import SCENES, SETTINGS, Project, SharedForkServer
from .slurm_cluster import SlurmCluster, wait_until

pytestmark = pytest.mark.cluster

RUN = "teacher-vitn-tiny"
TRAINING = (
    "stage=teacher", "encoder=vitn", "steps=42", "batch_size=4", "trainer=ddp", "trainer.accelerator=cpu", *SETTINGS,
    *SCENES,
)  # fmt: skip
TWO_TASKS = ("--ntasks-per-node=2",)


class Unbroken:
    """A training without interruption in processes of their own, whose ranks are held while Lightning ends.

    It runs beside the other jobs until its model is asked for.
    """

    def __init__(self, project: Project, data: Path) -> None:
        """Submit the job."""
        self.project = project
        words = (*TRAINING, f"data_dir={data}")
        self.job = project.submit("train", *words, options=TWO_TASKS, hold="teardown", own_python=True)

    @cached_property
    def model(self) -> bytes:
        """The file of the model. SIGTERM does not disturb a training that has ended."""
        self.project.wait_until_held(self.job, "teardown")
        self.project.slurm.run("scancel", "--signal=TERM", self.job)
        assert self.project.wait_until_ended(self.job) == "COMPLETED", self.project.details()
        log = self.project.logs()
        assert log.count("finished: ") == 1 and "Traceback" not in log and "SIGTERM" in log, log
        return self.project.model(RUN)


@pytest.fixture(scope="module")
def unbroken(
    slurm: SlurmCluster, server: SharedForkServer, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Unbroken:
    return Unbroken(Project(slurm, tmp_path_factory.mktemp("unbroken") / "project", server), data)


def train(project: Project, data: Path, *, hold: str = "", options: tuple[str, ...] = ()) -> str:
    """Submit the training with two tasks and return the job's id."""
    return project.submit("train", *TRAINING, f"data_dir={data}", options=(*TWO_TASKS, *options), hold=hold)


def approach_time_limit(project: Project, job: str) -> None:
    """Set the time limit so that the signal before it is due; Slurm looks for such jobs every 30 s.

    The script asks for the signal 300 s before the limit, which leaves two minutes at least after the signal.
    """
    hours, minutes, _ = project.slurm.show(job)["RunTime"].split(":")
    limit = 60 * int(hours) + int(minutes) + 4
    project.slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


def check_result(project: Project, unbroken: Unbroken) -> None:
    """Check that a run ended once, and as the unbroken one."""
    assert project.logs().count("finished: ") == 1, project.logs()
    assert project.model(RUN) == unbroken.model


def test_a_training_that_is_stopped_on_purpose_ends_with_the_bytes_of_an_unbroken_one(
    project: Project, unbroken: Unbroken, data: Path
) -> None:
    """SIGUSR1 while starting, the time limit, scontrol requeue, scancel; the same command continues."""
    slurm, log = project.slurm, project.logs
    job = train(project, data, hold="start 5 15")

    project.wait_until_held(job, "start")
    slurm.run("scancel", "--signal=USR1", job)
    project.wait_until_restarted(job, 1)
    assert f"stopped by signal 10 (SIGUSR1); the batch script queues Slurm's job {job} again" in log()
    assert project.steps(RUN) == []

    project.wait_until_held(job, "5")
    approach_time_limit(project, job)
    project.wait_until_restarted(job, 2)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert f"(SIGUSR1) saved at step 10; the batch script queues Slurm's job {job} again" in log()

    project.wait_until_held(job, "15")
    slurm.run("scontrol", "requeue", job)
    project.wait_until_restarted(job, 3)
    wait_until(
        lambda: "(SIGTERM) saved at step 20; start the same command again" in log(), "step 20", details=log
    )
    slurm.run("scancel", job)

    job = train(project, data, hold="35")
    project.wait_until_held(job, "35")
    slurm.run("scancel", job)
    assert project.wait_until_ended(job) == "CANCELLED"
    wait_until(lambda: "(SIGTERM) saved at step 40" in log(), "step 40", details=log)
    assert slurm.show(job)["Restarts"] == "0"

    job = train(project, data)
    assert project.wait_until_ended(job) == "COMPLETED", log()
    check_result(project, unbroken)
    assert "Traceback" not in log(), log()


def test_a_killed_task_and_a_dead_node_cost_minutes(project: Project, unbroken: Unbroken, data: Path) -> None:
    """A job whose process was killed is queued again, as often as cluster.env says; Slurm moves it from a dead node."""
    slurm = project.slurm
    job = train(project, data, hold="5 15 25")
    project.wait_until_held(job, "5")
    os.kill(project.pid(job, "5", rank=1), signal.SIGKILL)
    project.wait_until_restarted(job, 1)
    assert f"job {job} crashed (exit code 137): restart 1 of 1" in project.logs()

    project.wait_until_held(job, "15")
    node = slurm.show(job)["BatchHost"]
    assert unbroken.model  # has ended: it may be on this node
    slurm.kill_node(node)
    project.wait_until_held(job, "25")
    assert slurm.show(job)["Restarts"] == "2" and slurm.show(job)["BatchHost"] != node
    slurm.start_node(node)

    os.kill(project.pid(job, "25", rank=1), signal.SIGKILL)
    assert project.wait_until_ended(job) == "FAILED"
    assert project.steps(RUN)[-1] == 25 and slurm.show(job)["Restarts"] == "2"
    assert "it is not queued again (CRASH_RESTARTS=1" in project.logs()

    job = train(project, data)
    assert project.wait_until_ended(job) == "COMPLETED", project.logs()
    check_result(project, unbroken)
    assert "another rank has ended" in project.logs()
    assert "Traceback" not in project.logs(), project.logs()


def test_a_start_on_a_lost_node_makes_way_for_the_next(
    project: Project, unbroken: Unbroken, data: Path
) -> None:
    """A slurmd is dead, and Slurm gives its node up, while the processes that it started live on."""
    slurm = project.slurm
    job = train(project, data, hold="5", options=("--job-name=bash",))  # a name that Lightning treats apart
    project.wait_until_held(job, "5")
    node, old = slurm.show(job)["BatchHost"], [project.pid(job, "5", rank) for rank in (0, 1)]
    assert unbroken.model  # has ended: it may be on this node
    slurm.kill_slurmd(node)
    try:
        # What SlurmdTimeout does, at once.
        slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        project.wait_until_restarted(job)
        wait_until(
            lambda: f"is written by an earlier start of job {job}, process" in project.logs(),
            "wait",
            details=project.details,
        )
        assert slurm.show(job)["BatchHost"] != node
        assert all(process_exists(process) for process in old)
        (project.folder / "go").touch()
        assert project.wait_until_ended(job) == "COMPLETED", project.logs()
        assert not any(process_exists(process) for process in old)
    finally:
        slurm.start_node(node)
    assert slurm.show(job)["Restarts"] == "1"
    check_result(project, unbroken)


def test_tasks_of_a_labeling_array_come_and_go(project: Project, data: Path, tmp_path: Path) -> None:
    """SIGUSR1 to one task requeues it alone: its sibling goes on, and a cancelled one is not revived."""
    save_model(DepthAnything("vitt"), tmp_path / "teacher.safetensors")
    arguments = (
        f"teacher={tmp_path / 'teacher.safetensors'}", f"labels={tmp_path / 'labels'}", f"data_dir={data}",
        "workers=1", "trainer=cpu", *SCENES,
    )  # fmt: skip
    array = project.submit("pseudolabel", *arguments, options=("--array=0-3",), hold="label")
    tasks = [f"{array}_{number}" for number in range(4)]
    for task in tasks:
        project.wait_until_held(task, "label", ranks=1)
    # The last task of an array has the array's own id.
    untouched, cancelled, killed, signalled = tasks
    started = project.slurm.show(untouched)["StartTime"]
    project.slurm.run("scancel", cancelled)
    os.kill(project.pid(killed, "label"), signal.SIGKILL)
    assert project.wait_until_ended(cancelled) == "CANCELLED"
    project.wait_until_restarted(killed)
    project.slurm.run("scancel", "--signal=USR1", signalled)
    project.wait_until_restarted(signalled)
    added = project.submit("pseudolabel", *arguments, options=("--array=7",))
    (project.folder / "go").touch()
    for task in (signalled, killed, untouched, f"{added}_7"):
        assert project.wait_until_ended(task) == "COMPLETED", project.logs()
    assert [project.slurm.show(task)["Restarts"] for task in tasks] == ["0", "0", "1", "1"]
    assert project.slurm.show(untouched)["StartTime"] == started
    assert project.slurm.state(cancelled) == "CANCELLED"
    assert "Traceback" not in project.logs(), project.logs()
    (labels,) = (tmp_path / "labels").iterdir()
    images = []
    for shard in labels.glob("*.tar"):
        with tarfile.open(shard) as members:
            images += sorted({name.partition(".")[0] for name in members.getnames()})
    assert len(images) == len(set(images)) == 48
    assert (labels / "manifest.json").is_file() and not list(labels.glob(".*.lease"))


def test_an_array_writes_shards_once(project: Project, tmp_path: Path) -> None:
    """A task is lost; the same command writes what is missing, and the bytes are those of one process."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        image = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(image).save(photos / f"{number}.png")
    words = ("images", str(photos), str(tmp_path / "set"), "--name", "own", "--per-shard", "2")
    array = project.submit("shard", *words, options=("--hold",))
    project.slurm.run("scontrol", "release", f"{array}_0")
    assert project.wait_until_ended(f"{array}_0") == "COMPLETED", project.logs()
    project.slurm.run("scancel", array)
    assert len([*(tmp_path / "set").glob("*.tar")]) == 3 and not (tmp_path / "set" / "manifest.json").exists()
    again = project.submit("shard", *words)
    for task in (f"{again}_0", f"{again}_1"):
        assert project.wait_until_ended(task) == "COMPLETED", project.logs()
    write_images(photos, tmp_path / "alone", name="own", per_shard=2)
    names = [path.name for path in (tmp_path / "alone").iterdir() if path.suffix in (".tar", ".idx")]
    for name in (*names, "manifest.json"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert "Traceback" not in project.logs()


PIPELINE = ("slurm/pipeline.sh", "steps=20", "batch_size=4", "encoder=vitn", *SETTINGS, *SCENES)


def actions(printed: str) -> dict[str, str]:
    """Parse the plan of a pipeline: kind of a stage → submit, finished, queued or replace."""
    return {line.split()[0]: line.split()[1] for line in printed.splitlines() if "@" in line}


def test_a_pipeline_goes_on_after_kills(project: Project, slurm: SlurmCluster, tmp_path: Path) -> None:
    """Teacher, labels, student, evaluation; a rank and a batch shell are killed, and the command is typed again."""
    stages = ("teacher", "labels", "student", "evaluation")
    assert actions(project.run(*PIPELINE[:1], "--dry-run", *PIPELINE[1:])) == dict.fromkeys(stages, "submit")
    assert slurm.run("squeue", "--noheader") == "" and not (project.folder / "outputs").exists()
    whole = Project(slurm, tmp_path / "whole", project.server)
    submitted = whole.submit_pipeline(*PIPELINE)
    assert [*submitted] == [*stages]

    first = project.submit_pipeline(*PIPELINE, hold="5")
    project.wait_until_held(first["teacher"], "5", ranks=1)
    assert set(actions(project.run(*PIPELINE)).values()) == {"queued"}
    os.kill(project.pid(first["teacher"], "5"), signal.SIGKILL)

    project.wait_until_held(first["student"], "5", ranks=1)
    assert slurm.show(first["teacher"])["Restarts"] == "1"
    slurm.kill_batch_shell(first["student"])
    assert project.wait_until_ended(first["student"]) == "FAILED"
    assert project.wait_until_ended(first["evaluation"]) == "CANCELLED"

    second = project.submit_pipeline(*PIPELINE)
    assert [*second] == ["student", "evaluation"]
    for one, job in ((project, second["evaluation"]), (whole, submitted["evaluation"])):
        for task in range(2):
            assert one.wait_until_ended(f"{job}_{task}") == "COMPLETED", one.details()
        assert (one.folder / "outputs" / "evaluation-tiny" / "results.json").is_file()
    assert set(actions(project.run(*PIPELINE)).values()) == {"finished"}
    for run in ("teacher-vitt-tiny", "student-vitn-tiny"):
        assert project.model(run) == whole.model(run)
    labels = [sorted((one.folder / "data" / "labels-tiny").rglob("*.tar")) for one in (project, whole)]
    assert [path.read_bytes() for path in labels[0]] == [path.read_bytes() for path in labels[1]] != []
    assert "Traceback" not in whole.logs(), whole.logs()
