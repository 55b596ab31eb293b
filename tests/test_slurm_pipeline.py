"""slurm/pipeline.sh: what list_stages.py lists, and which jobs it submits, with stand-ins for Slurm's commands."""

import getpass
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from local_servers import FaultyServer

from depth_anything.data.store import open_store
from depth_anything.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

FAKES = {
    "python": '#!/bin/sh\ncat "$RECORDS/stages"\n',
    "squeue": '#!/bin/sh\ncat "$RECORDS/queue"\n',
    "scancel": '#!/bin/sh\necho "cancel $*" >> "$RECORDS/calls"\n',
    "sbatch": """#!/usr/bin/env bash
echo "$*" >> "$RECORDS/calls"
env | grep -E "^(SLURM|SBATCH)" > "$RECORDS/environment"
echo "$((10 + $(wc -l < "$RECORDS/calls")));cluster"
""",
}
KINDS = ("teacher", "labels", "student", "evaluation")


class Pipeline:
    """A project folder; what is finished and queued is written into files."""

    def __init__(self, folder: Path) -> None:
        self.project, self.records = folder / "my project", folder / "records"
        self.records.mkdir()
        shutil.copytree(ROOT / "slurm", self.project / "slurm")
        (self.project / "train.py").touch()
        with (self.project / "slurm" / "cluster.env").open("a") as file:
            print("GPUS_PER_NODE=0 TIME= CPUS_PER_TASK= LABEL_TASKS=3", file=file)
        (folder / "bin").mkdir()
        for name, text in FAKES.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.path = f"{folder / 'bin'}:{os.environ['PATH']}"

    def run(
        self,
        *words: str,
        finished: Sequence[str] = (),
        queue: Sequence[str] = (),
        cwd: Path | None = None,
        more_students: Sequence[str] = (),
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run the script; `queue` holds "KIND ID STATE"."""
        stages = [
            "\t".join([kind, f"{kind}@out", "finished" if kind in finished else "open", f"'x={kind} y'"])
            for kind in KINDS
        ]
        stages[3:3] = [f"student\t{name}@out\topen\t" for name in more_students]
        (self.records / "stages").write_text("\n".join(stages) + "\n")
        jobs = [row.split() for row in queue]
        lines = [f"{job}|{state}|{self.project}|{kind}@out\n" for kind, job, state in jobs]
        lines += [f"{job}|{state}|/elsewhere|{kind}@out\n" for kind, job, state in [("teacher", "99", "R")]]
        (self.records / "queue").write_text("".join(lines))
        (self.records / "calls").write_text("")
        known = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        environment = {**known, "PATH": self.path, "RECORDS": str(self.records), "SLURM_JOB_ID": "1"}
        environment |= {"PWD": str(cwd or self.project), **variables}
        return subprocess.run(
            ["slurm/pipeline.sh", *words],
            cwd=cwd or self.project,
            env=environment,
            capture_output=True,
            text=True,
        )

    def calls(self) -> list[str]:
        """Return the submissions without what all have, and "cancel ID"."""
        lines = (self.records / "calls").read_text().splitlines()
        for line in lines:
            assert (
                line.startswith("cancel ") or "--parsable " in line and "--kill-on-invalid-dep=yes " in line
            )
        common = r"--(parsable|kill-on-invalid-dep=yes|nodes=1|ntasks-per-node=1) "
        return [re.sub(common, "", line) for line in lines]


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path)


def test_a_dry_run_submits_nothing(pipeline: Pipeline) -> None:
    done = pipeline.run("--dry-run", "size=paper")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[kind, "submit"] for kind in KINDS]
    assert pipeline.calls() == []


def test_dry_run_is_not_an_override(pipeline: Pipeline) -> None:
    done = pipeline.run("size=paper", "dry_run=true")
    assert done.returncode == 1 and "--dry-run" in done.stderr and pipeline.calls() == []


def test_jobs_inherit_the_variables_of_the_user_but_not_those_of_the_job(pipeline: Pipeline) -> None:
    own = {"SLURM_CONF": "/own.conf", "SBATCH_ACCOUNT": "own"}
    pipeline.run(**own, SLURM_MEM_PER_CPU="4")
    seen = (pipeline.records / "environment").read_text().splitlines()
    assert sorted(seen) == ["SBATCH_ACCOUNT=own", "SLURM_CONF=/own.conf"]
    with (pipeline.project / "slurm" / "cluster.env").open("a") as file:
        print("SCRATCH='$PWD/scratch/$SLURM_JOB_ID'", file=file)
    done = pipeline.run(SLURM_JOB_ID="", SLURM_CLUSTERS="north")  # typed outside a job
    assert done.returncode == 0 and not (pipeline.project / "scratch").exists(), done.stderr
    assert "SLURM_CLUSTERS=north" in (pipeline.records / "environment").read_text()


def test_nothing_is_submitted_if_the_queue_is_unknown(pipeline: Pipeline) -> None:
    (Path(pipeline.path.partition(":")[0]) / "squeue").write_text("#!/bin/sh\nexit 1\n")
    done = pipeline.run()
    assert done.returncode == 1 and "squeue does not answer" in done.stderr
    assert not (pipeline.records / "calls").read_text()
    assert pipeline.run("--dry-run").returncode == 0


def test_each_stage_waits_for_what_it_needs(pipeline: Pipeline) -> None:
    done = pipeline.run("size=paper")
    assert done.returncode == 0, done.stderr
    assert pipeline.calls() == [
        "--job-name=teacher@out slurm/train.sbatch x=teacher y",
        "--array=0-2 --job-name=labels@out --dependency=afterok:11 slurm/pseudolabel.sbatch x=labels y",
        "--job-name=student@out --dependency=afterok:11,afterany:12 slurm/train.sbatch x=student y",
        "--array=0-0 --job-name=evaluation@out --dependency=afterok:11:13 slurm/evaluate.sbatch x=evaluation y",
    ]


def test_only_what_is_neither_finished_nor_queued_is_submitted(pipeline: Pipeline) -> None:
    queue = ("labels 7 PD", "labels 7 R")
    done = pipeline.run(finished=["teacher"], queue=queue)
    assert [line.split()[1] for line in done.stdout.splitlines()[:4]] == [
        "finished",
        "queued",
        "submit",
        "submit",
    ]
    assert pipeline.calls() == [
        "--job-name=student@out --dependency=afterany:7 slurm/train.sbatch x=student y",
        "--array=0-0 --job-name=evaluation@out --dependency=afterok:11 slurm/evaluate.sbatch x=evaluation y",
    ]
    pipeline.run(finished=KINDS)
    assert pipeline.calls() == []


def test_a_project_behind_a_symbolic_link_is_the_same(pipeline: Pipeline, tmp_path: Path) -> None:
    """Slurm knows the folder of a job without links."""
    (tmp_path / "link").symlink_to(pipeline.project)
    pipeline.run(finished=["teacher", "labels", "student"], queue=("evaluation 9 PD",), cwd=tmp_path / "link")
    assert pipeline.calls() == []


def test_the_queue_is_read_once(pipeline: Pipeline) -> None:
    """It is slow on large clusters; only the user's own jobs are asked for, since names are used by others too."""
    squeue = Path(pipeline.path.partition(":")[0]) / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$*" >> "$RECORDS/squeue"\n{FAKES["squeue"]}')
    pipeline.run(queue=("student 8 R",))
    (asked,) = (pipeline.records / "squeue").read_text().splitlines()
    assert f"--user={getpass.getuser()}" in asked


def test_what_waits_for_a_failed_job_is_replaced(pipeline: Pipeline) -> None:
    """Slurm has not yet canceled what waits for the teacher; a student that runs is left alone."""
    pipeline.run(queue=("labels 7 PD", "student 8 R", "evaluation 9 PD"))
    calls = pipeline.calls()
    assert [line for line in calls if line.startswith("cancel")] == ["cancel 7", "cancel 9"]
    assert calls[-1].endswith("--dependency=afterok:11:8 slurm/evaluate.sbatch x=evaluation y")
    pipeline.run(
        finished=["teacher", "labels"], queue=("base 8 PD", "evaluation 9 PD"), more_students=["base"]
    )
    assert [line for line in pipeline.calls() if line.startswith("cancel")] == [
        "cancel 9"
    ]  # one student was cancelled
    assert pipeline.calls()[-1].endswith("--dependency=afterok:11:8 slurm/evaluate.sbatch x=evaluation y")
    pipeline.run(queue=("labels 7 R", "labels 7 PD"))  # an array of which a task runs
    assert not [line for line in pipeline.calls() if line.startswith("cancel")]
    pipeline.run(finished=["teacher", "labels"], queue=("evaluation 9 PD",))
    assert pipeline.calls()[1] == "cancel 9"


def load_list_stages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("list_stages", ROOT / "slurm" / "list_stages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


list_stages = load_list_stages()


def make_set(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has all sets of size=paper, as far as the pipeline looks."""
    monkeypatch.chdir(tmp_path)
    names = (
        "blendedmvs hypersim irs tartanair vkitti2 bdd100k landmarks imagenet21k lsun objects365 openimages"
    )
    for name in f"{names} places365 sa1b".split():
        make_set(tmp_path / "data" / name)
    return tmp_path


def test_the_stages_of_the_paper(paper: Path) -> None:
    (paper / "data" / "benchmarks" / "nyu").mkdir(parents=True)
    stages = list(list_stages.list_stages(["size=paper"], []))
    assert [stage.job_name for stage in stages] == [
        "teacher-vitg-paper@outputs", "labels-paper@data", "student-vits-paper@outputs",
        "student-vitb-paper@outputs", "student-vitl-paper@outputs", "evaluation-paper@outputs",
    ]  # fmt: skip
    assert not any(stage.finished for stage in stages)
    assert stages[3].arguments == ["size=paper", "stage=student", "encoder=vitb"]
    assert stages[-1].arguments[:5] == ["--benchmarks", "nyu", "--root", "data/benchmarks", "--weights"]
    assert "student-vitl-paper=outputs/student-vitl-paper" in stages[-1].arguments


def test_a_set_that_is_missing_is_named_before_anything_is_submitted(paper: Path) -> None:
    (paper / "data" / "sa1b" / "manifest.json").unlink()
    with pytest.raises(UserError, match="data/sa1b"):
        list(list_stages.list_stages(["size=paper"], []))


def test_a_pipeline_in_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty_s3: FaultyServer
) -> None:
    """The report stays in the project's folder, which the tasks of its array share."""
    monkeypatch.chdir(tmp_path)
    home = f"s3://bucket/{tmp_path.name}"
    words = ["steps=10", f"output_dir={home}/runs", f"data_dir={home}/data"]
    stages = list(list_stages.list_stages(words, []))
    assert [stage.job_name for stage in stages] == [
        f"teacher-vitt-tiny@{home}/runs", f"labels-tiny@{home}/data", f"student-vitn-tiny@{home}/runs",
        "evaluation-tiny@outputs",
    ]  # fmt: skip
    assert stages[-1].arguments == [
        "--data", f"{home}/data/scenes-validation",
        "--weights", f"teacher-vitt-tiny={home}/runs/teacher-vitt-tiny",
        f"student-vitn-tiny={home}/runs/student-vitn-tiny", "--output", "outputs/evaluation-tiny",
    ]  # fmt: skip

    def finished() -> list[str]:
        return [stage.kind for stage in list_stages.list_stages(words, []) if stage.finished]

    store = open_store(home)
    assert finished() == []
    for run in ("teacher-vitt-tiny", "student-vitn-tiny"):
        store.write(f"runs/{run}/finished.json", json.dumps({"steps": 10}).encode())
        store.write(f"runs/{run}/model.safetensors", b"made")
    report = tmp_path / "outputs" / "evaluation-tiny" / "results.json"
    report.parent.mkdir(parents=True)
    report.touch()
    os.utime(report, (1, 1))
    assert finished() == ["teacher", "student"]  # the report is older than the models
    os.utime(report, (2**32, 2**32))
    store.write("data/labels-tiny/scenes-photographic/manifest.json", b"{}")
    assert finished() == ["teacher", "labels", "student", "evaluation"]
    store.delete("runs/student-vitn-tiny/model.safetensors")
    assert finished() == ["teacher", "labels"]


@pytest.mark.parametrize("key", ["name", "stage", "run_dir", "+name"])
def test_a_key_that_all_stages_would_share_is_rejected(key: str) -> None:
    with pytest.raises(UserError, match=key.lstrip("+")):
        list(list_stages.list_stages([f"{key}=teacher"], []))


def test_another_teacher_and_another_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["teacher=own.safetensors", "encoder=vitn,vitt", "output_dir=out"]
    stages = list(list_stages.list_stages(words, ["--data", "own"]))
    assert [stage.kind for stage in stages] == ["labels", "student", "student", "evaluation"]
    assert "teacher=own.safetensors" in stages[0].arguments and "teacher=" not in str(stages[1].arguments)
    assert stages[-1].arguments == [
        "--data", "own", "--weights", "student-vitn-tiny=out/student-vitn-tiny",
        "student-vitt-tiny=out/student-vitt-tiny", "--output", "out/evaluation-tiny",
    ]  # fmt: skip


def test_what_is_for_training_does_not_go_to_the_labels(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is one of the nodes; the machine that submits does not have it."""
    monkeypatch.delenv("OWN_SCRATCH", raising=False)
    words = ["size=paper", "stage_to=$OWN_SCRATCH/sets", "trainer=fsdp", "encoder=vits"]
    teacher, labels, student = list(list_stages.list_stages(words, ["--data", "own"]))[:3]
    assert teacher.arguments == [*words[:3], "stage=teacher"]
    assert labels.arguments == ["size=paper", "stage=pseudolabel"]
    assert student.arguments == [*words[:3], "stage=student", "encoder=vits"]


def test_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def finished() -> list[str]:
        return [stage.kind for stage in list_stages.list_stages(["steps=10"], []) if stage.finished]

    report = tmp_path / "outputs" / "evaluation-tiny" / "results.json"
    report.parent.mkdir(parents=True)
    report.touch()
    os.utime(report, (1, 1))
    assert finished() == []
    for run in ("teacher-vitt-tiny", "student-vitn-tiny"):
        (tmp_path / "outputs" / run).mkdir()
        (tmp_path / "outputs" / run / "model.safetensors").touch()
        (tmp_path / "outputs" / run / "finished.json").write_text(json.dumps({"steps": 10}))
    assert finished() == ["teacher", "student"]  # the report is older than the models
    report.touch()
    make_set(tmp_path / "data" / "labels-tiny" / "scenes-photographic")
    assert finished() == ["teacher", "labels", "student", "evaluation"]
    (tmp_path / "outputs" / "student-vitn-tiny" / "finished.json").write_text(json.dumps({"steps": 9}))
    assert "student" not in finished()
