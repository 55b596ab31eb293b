"""Fixtures of the tests on a real Slurm: the cluster, a project folder to submit jobs from, and an unbroken run."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .slurm_cluster import SlurmCluster, missing_packages, wait_until

ROOT = Path(__file__).resolve().parents[2]
#: Scenes of 42×56 px in 4 shards a set; 42 steps of four images. Two ranks compare their signals every ten steps.
SCENES = (
    "image_size=42",
    *(f"sources.scenes.{name}.count={count}"
      for name, count in (("synthetic", 48), ("photographic", 48), ("validation", 8))),
    *(f"++sources.scenes.{name}.{key}" for name in ("synthetic", "photographic", "validation")
      for key in ("height=42", "width=56", "per_shard=12")),
)  # fmt: skip
TRAINING = (
    "stage=teacher", "encoder=vitn", "steps=42", "batch_size=4", "workers=1", "checkpoint.every=5", "logging.every=1",
    "validation.every=1000", "validation.limit=4", "trainer=ddp", "trainer.accelerator=cpu", *SCENES,
)  # fmt: skip
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


class Project:
    """A project folder with the repository's batch scripts, whose train.py is held_train.py.

    Attributes:
        slurm: The cluster.
        folder: Jobs are submitted from here, and write their logs here.
        jobs: Ids of the submitted jobs.
    """

    def __init__(self, slurm: SlurmCluster, folder: Path) -> None:
        """Create the folder."""
        self.slurm, self.folder = slurm, folder
        self.jobs: list[str] = []
        folder.mkdir(exist_ok=True)
        (folder / "train.py").symlink_to(Path(__file__).with_name("held_train.py"))

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), hold: str = "") -> str:
        """Submit a script of slurm/ and return the job's id.

        Args:
            script: Name of the file.
            arguments: Command-line arguments of train.py.
            options: Options of sbatch, besides those of a job without a GPU.
            hold: Places at which the processes wait; see held_train.py.
        """
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "MASTER_ADDR": "127.0.0.1",  # node1 and node2 are not names of machines
            "HOLD": hold,
            "HOLD_FOLDER": str(self.folder),
        }
        tasks = 2 if script == "train.sbatch" else 1
        given = (f"--ntasks-per-node={tasks}", "--gpus-per-node=0", "--cpus-per-task=1", *options)
        path = str(ROOT / "slurm" / script)
        self.jobs.append(self.slurm.submit(*given, path, *arguments, project=self.folder, **environment))
        return self.jobs[-1]

    def train(self, data: Path, *, options: tuple[str, ...] = (), hold: str = "") -> str:
        """Submit the training with two tasks and return the job's id."""
        places = (f"data_dir={data}", f"output_dir={self.folder / 'outputs'}")
        return self.submit("train.sbatch", *TRAINING, *places, options=options, hold=hold)

    def pid(self, job: str, place: str, rank: int = 0) -> int:
        """Return the PID of a process that waits at a place; 0 while it does not."""
        file = self.folder / f"held-{job}-{place}-{rank}"
        return int(file.read_text() or 0) if file.exists() else 0

    def wait_until_held(self, job: str, place: str, *, ranks: int = 2) -> None:
        """Wait until all processes of a job wait at a place."""
        what = f"job {job} at {place}"
        wait_until(lambda: all(self.pid(job, place, rank) for rank in range(ranks)), what, details=self.logs)

    def wait_until_ended(self, job: str) -> str:
        """Wait until a job has ended, after any restarts, and return its state."""
        wait_until(lambda: self.slurm.state(job) in ENDED, f"end of job {job}", details=self.logs)
        return self.slurm.state(job)

    def wait_until_restarted(self, job: str, restarts: int = 1) -> None:
        """Wait until Slurm has queued a job again, as often as it should."""
        what = f"restart {restarts} of job {job}"
        wait_until(lambda: int(self.slurm.show(job)["Restarts"]) == restarts, what, details=self.logs)

    def logs(self) -> str:
        """Return what all jobs printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("slurm-*.out")))

    @property
    def run_dir(self) -> Path:
        """The run folder of the training."""
        return self.folder / "outputs" / "teacher-vitn-tiny"

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint."""
        return sorted(int(path.stem[5:]) for path in self.run_dir.glob("checkpoints/step-*.ckpt"))

    @property
    def model(self) -> bytes:
        """The file of the trained model."""
        return (self.run_dir / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Start a cluster for all tests; skip them where its programs or root's rights are missing."""
    if missing := missing_packages():
        pytest.skip(f"apt-get install --no-install-recommends {' '.join(missing)}")
    if os.geteuid():
        pytest.skip("slurmd starts jobs only as root")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the scenes, which the first job renders."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def unbroken(
    slurm: SlurmCluster, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Project, str]:
    """Submit a training that nothing interrupts, and return its project and job; a test waits for it at its end."""
    made = Project(slurm, tmp_path_factory.mktemp("unbroken"))
    return made, made.train(data)


@pytest.fixture
def project(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Project]:
    """Return a project folder; its jobs are killed at the end."""
    made = Project(slurm, tmp_path / "project")
    yield made
    for job in made.jobs:
        slurm.run("scancel", "--quiet", "--signal=KILL", "--full", job)
        slurm.run("scancel", "--quiet", job)
