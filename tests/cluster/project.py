"""A project folder on the cluster of the tests, and the server from which its jobs fork Python."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from .slurm_cluster import SlurmCluster, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
#: Scenes of 42×56 px in 4 shards a set; a pass is 12 steps of four images. Two ranks compare their signals every ten
#: steps.
SCENES = (
    "image_size=42",
    *(f"sources.scenes.{name}.count={count}"
      for name, count in (("synthetic", 48), ("photographic", 48), ("validation", 8))),
    *(f"++sources.scenes.{name}.{key}" for name in ("synthetic", "photographic", "validation")
      for key in ("height=42", "width=56", "per_shard=12")),
)  # fmt: skip
SETTINGS = "workers=1", "checkpoint.every=5", "logging.every=1", "validation.every=1000", "validation.limit=4"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
CLUSTER_ENV = """
GPUS_PER_NODE=0 CPUS_PER_TASK=1 TIME=60 LABEL_TASKS=2 EVALUATE_TASKS=2 SHARD_TASKS=2 CRASH_RESTARTS=1
ACCOUNT= PARTITION= CPU_PARTITION= QOS= MEMORY_PER_CPU= MORE_OPTIONS= GPU_OPTION= NODES=1 MODULES= CONTAINER= SCRATCH=
"""


class SharedForkServer:
    """A server of tests/fork_server.py that takes commands from any process, and a `python` that sends them.

    Attributes:
        bin: Folder of that `python`, for PATH.
        environment: What it needs.
    """

    def __init__(self, folder: Path) -> None:
        """Start the server; it is ready in some ten seconds, and commands wait for it."""
        queue = folder / "fork-server"
        os.mkfifo(queue)
        self.bin = folder / "bin"
        self.bin.mkdir()
        own = Path(__file__).with_name("fork_python.py").read_text()
        (self.bin / "python").write_text(f"#!{sys.executable} -SEs\n{own}")
        (self.bin / "python").chmod(0o755)
        self.environment = {"FORK_SERVER": str(queue)}
        both = os.open(queue, os.O_RDWR)  # a writer remains, so that the server never reads an end
        # The server ends with this process, also if it is killed.
        command = ["setpriv", "--pdeathsig", "TERM", sys.executable, str(ROOT / "tests" / "fork_server.py")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(command, stdin=both, env=environment, start_new_session=True)
        os.close(both)

    def close(self) -> None:
        """End the server. Its commands end by themselves, or with the processes that sent them."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


class Project:
    """A project folder with the scripts of slurm/, whose train.py is held_train.py.

    Attributes:
        slurm: The cluster.
        folder: Jobs are submitted from here, and write their logs here.
        jobs: Ids of the submitted jobs.
    """

    def __init__(self, slurm: SlurmCluster, folder: Path, server: SharedForkServer) -> None:
        """Create the folder."""
        self.slurm, self.folder, self.server = slurm, folder, server
        self.jobs: list[str] = []
        (folder / "slurm").mkdir(parents=True)
        (folder / "train.py").symlink_to(Path(__file__).with_name("held_train.py"))
        for script in SCRIPTS.iterdir():
            if script.suffix in (".sh", ".sbatch", ".py"):
                shutil.copy(script, folder / "slurm" / script.name)
        (folder / "slurm" / "list_stages.py").unlink()
        (folder / "slurm" / "list_stages.py").symlink_to(SCRIPTS / "list_stages.py")
        (folder / "slurm" / "cluster.env").write_text(CLUSTER_ENV)

    def environment(self, *, hold: str = "", own_python: bool = False) -> dict[str, str]:
        """Return what a command in the folder needs besides the cluster's.

        Args:
            hold: Places at which the processes wait; see held_train.py.
            own_python: Start a new Python instead of a fork of the server.
        """
        folders = [*([] if own_python else [str(self.server.bin)]), str(Path(sys.executable).parent)]
        return {
            **self.server.environment,
            "PATH": os.pathsep.join([*folders, os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "MASTER_ADDR": "127.0.0.1",  # node1 and node2 are not names of machines
            "HOLD": hold,
            "HOLD_FOLDER": str(self.folder),
        }

    def submit(
        self,
        script: str,
        *arguments: str,
        options: tuple[str, ...] = (),
        hold: str = "",
        own_python: bool = False,
    ) -> str:
        """Submit a script of slurm/ with submit.sh and return the job's id.

        Args:
            script: train, pseudolabel, evaluate or shard.
            arguments: Of the script.
            options: Of sbatch.
            hold: See `environment`.
            own_python: See `environment`.
        """
        environment = self.environment(hold=hold, own_python=own_python)
        self.jobs.append(
            self.run("slurm/submit.sh", "--parsable", *options, script, *arguments, **environment).strip()
        )
        return self.jobs[-1]

    def submit_pipeline(self, *command: str, hold: str = "") -> dict[str, str]:
        """Run slurm/pipeline.sh and return the jobs that it submits: kind of the stage → id."""
        printed = self.run(*command, **self.environment(hold=hold))
        rows = [line.split() for line in printed.splitlines() if line.startswith("submitted ")]
        self.jobs += [row[-1] for row in rows]
        return {kind: job for _, kind, *_, job in rows}

    def run(self, *command: str, **environment: str) -> str:
        """Run a command in the folder and return its output.

        Raises:
            RuntimeError: If it fails, with what it printed.
        """
        return self.slurm.run(*command, cwd=self.folder, environment=environment or self.environment())

    def pid(self, job: str, place: str, rank: int = 0) -> int:
        """Return the PID of a process that waits at a place; 0 while it does not."""
        file = self.folder / f"held-{job}-{place}-{rank}"
        return int(file.read_text() or 0) if file.exists() else 0

    def wait_until_held(self, job: str, place: str, *, ranks: int = 2) -> None:
        """Wait until all processes of a job wait at a place."""
        what = f"job {job} at {place}"
        wait_until(
            lambda: all(self.pid(job, place, rank) for rank in range(ranks)), what, details=self.details
        )

    def wait_until_ended(self, job: str) -> str:
        """Wait until a job has ended, after any restarts, and return its state."""
        wait_until(lambda: self.slurm.state(job) in ENDED, f"end of job {job}", details=self.details)
        return self.slurm.state(job)

    def wait_until_restarted(self, job: str, restarts: int = 1) -> None:
        """Wait until Slurm has queued a job again, as often as it should."""
        what = f"restart {restarts} of job {job}"
        wait_until(lambda: int(self.slurm.show(job)["Restarts"]) == restarts, what, details=self.details)

    def logs(self) -> str:
        """Return what all jobs printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("slurm-*.out")))

    def details(self) -> str:
        """Return the queue and what all jobs printed."""
        return self.slurm.run("squeue", "--all", "--states=all") + self.logs()

    def steps(self, run: str) -> list[int]:
        """Return the steps that have a checkpoint in a run folder."""
        paths = (self.folder / "outputs" / run).glob("checkpoints/step-*.ckpt")
        return sorted(int(path.stem[5:]) for path in paths)

    def model(self, run: str) -> bytes:
        """Return the file of a trained model."""
        return (self.folder / "outputs" / run / "model.safetensors").read_bytes()

    def close(self) -> None:
        """Kill the jobs of this folder, and wait until they have ended."""
        self.slurm.end_jobs(*self.jobs)
