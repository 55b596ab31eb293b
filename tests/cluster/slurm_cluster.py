"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd on loopback, in a folder of their own.

Debian's packages slurm-wlm and munge have all programs; nothing of the system's configuration is read or changed.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

#: Program → Debian package.
PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "setpriv": "util-linux"}
NODES = ("node1", "node2")
#: FirstJobId: the ranks of a job meet at a port that follows from its number, also those of another cluster on this
#: machine. cred_expire: a requeued job waits one second longer than this, by default 121 s.
#: KillWait: from SIGTERM to SIGKILL.
#: A node has one core more than it needs, so that jobs that only wait run beside each other.
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldAddr=127.0.0.1
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
MinJobAge=600
KillWait=20
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
)


def missing_packages() -> list[str]:
    """Return the Debian packages whose programs this machine lacks."""
    return sorted({package for name, package in PROGRAMS.items() if find_program(name) is None})


def find_program(name: str) -> str | None:
    """Return the path of a program; daemons are in sbin, which is not on every user's PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def wait_until(
    condition: Callable[[], object], what: str, *, seconds: float = 300, details: Callable[[], str] = str
) -> None:
    """Wait until a condition is true.

    Raises:
        TimeoutError: If it is not true in time; it names `what` was waited for, and has the `details` of that time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"timed out after {seconds:.0f} s: {what}\n{details()}")
        time.sleep(0.2)


def process_name(process: int) -> str:
    """Return the name of a process: slurmstepd, slurm_script (the shell of a batch script), srun, python, …

    Raises:
        OSError: If it is gone.
    """
    folder = Path(f"/proc/{process}")
    script = (folder / "cmdline").read_bytes().split(b"\0")[1:2]
    return (
        "slurm_script"
        if script and script[0].endswith(b"/slurm_script")
        else (folder / "comm").read_text().strip()
    )


class SlurmCluster:
    """The daemons of a cluster, and Slurm's commands on it.

    Attributes:
        folder: Configuration, state and logs of the daemons.
        environment: What Slurm's commands need in their environment.
    """

    def __init__(self, folder: Path) -> None:
        """Write the configuration; nothing is started yet."""
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        known = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SRUN", "SBATCH"))
        }
        self.environment = {**known, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        ports = _free_ports(1 + len(NODES))
        nodes = [NODE.format(name=name, port=port) for name, port in zip(NODES, ports[1:], strict=True)]
        text = CONFIG.format(
            folder=folder,
            controller_port=ports[0],
            first_job=1 + secrets.randbelow(9000),
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle.

        Raises:
            TimeoutError: If a node does not come up.
        """
        munge = [f"--{name}={self.folder}/munge.{name.removesuffix('-file')}" for name in
                 ("socket", "key-file", "pid-file", "log-file", "seed-file")]  # fmt: skip
        self._start("munged", "munged", "--foreground", "--force", *munge)
        wait_until((self.folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(
            lambda: self._command("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == "2", "idle nodes"
        )

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node, as when it boots."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill all processes of a node at once, as when its power fails: slurmd, steps and tasks."""
        self.kill_slurmd(node)
        for process in self.processes(f"SLURMD_NODENAME={node}"):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def kill_slurmd(self, node: str) -> None:
        """Kill the slurmd of a node; what it started runs on."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def kill_batch_shell(self, job: str) -> None:
        """Kill the shell that runs the batch script of a job."""
        for process in self.processes(f"SLURM_JOB_ID={job}"):
            if process_name(process) == "slurm_script":
                os.kill(process, signal.SIGKILL)

    def processes(self, *entries: str) -> list[int]:
        """Return the ids of the processes of jobs whose environment began with some entries, slurmstepd first.

        Args:
            entries: As "SLURM_JOB_ID=7".
        """
        marks = {entry.encode() for entry in (*entries, f"SLURM_CONF={self.folder}/slurm.conf")}
        steps, others = set(), set()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (folder / "environ").read_bytes().split(b"\0")
                if marks <= {*environment} and any(
                    entry.startswith(b"SLURM_JOB_ID=") for entry in environment
                ):
                    others.add(int(folder.name))
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    if process_name(parent) == "slurmstepd":  # it does not have the environment of its tasks
                        steps.add(parent)
        return [*steps, *(others - steps)]

    def _start(self, name: str, program: str, *arguments: str) -> None:
        path = find_program(program)
        assert path is not None
        with open(self.folder / f"{name}.out", "ab") as output:
            # The daemon ends with this process, also if it is killed.
            command = ["setpriv", "--pdeathsig", "TERM", path, *arguments]
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def stop(self) -> None:
        """Kill all jobs and stop the daemons."""
        try:
            self.end_jobs()
        finally:
            daemons = [*reversed(self._daemons.values())]
            for daemon in daemons:
                daemon.send_signal(signal.SIGTERM)
            for daemon in daemons:
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def end_jobs(self, *jobs: str) -> None:
        """Kill some jobs, by default all, and wait until none of them is left.

        Raises:
            TimeoutError: If one is.
        """
        chosen = jobs or ("--user=root",)
        self._command("scancel", "--signal=KILL", "--full", *chosen)  # fails if none runs
        self._command("scancel", *chosen)
        queue = ("squeue", "-h", *([f"--jobs={','.join(jobs)}"] if jobs else []))
        wait_until(lambda: not self._command(*queue).stdout.strip(), "end of the jobs", seconds=60)

    def _command(
        self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        known = {**self.environment, **(environment or {})}
        return subprocess.run(command, env=known, cwd=cwd, capture_output=True, text=True, timeout=300)

    def run(
        self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> str:
        """Run one of Slurm's commands, or one that calls them, and return its output.

        Args:
            command: Its words.
            cwd: Its folder; this process's by default.
            environment: What it needs besides the cluster's.

        Raises:
            RuntimeError: If it fails, with what it printed.
        """
        done = self._command(*command, cwd=cwd, environment=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`, as JobState, Reason, Restarts, ExitCode and StartTime."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()[0].split()
        return dict(word.partition("=")[::2] for word in words)

    def state(self, job: str) -> str:
        """Return the state of a job, as PENDING, RUNNING or COMPLETED."""
        return self.show(job)["JobState"]


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
