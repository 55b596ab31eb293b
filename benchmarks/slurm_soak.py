"""Run the tiny pipeline on a real Slurm under random kills, and compare the result with an unbroken run.

    python -m benchmarks.slurm_soak --minutes 30 --output outputs/slurm_soak.json

As root, with Debian's slurm-wlm and munge; two nodes on this machine. A round is the whole pipeline (teacher, labels in
an array of two, student, evaluation) in a new folder, and `slurm/pipeline.sh` is typed again every few seconds, as by
cron. Meanwhile random processes die of SIGKILL: a rank, srun, the shell of a batch script, a slurmstepd, a slurmd, or
all processes of a node, which then boots again. Models and labels must end with the bytes of the unbroken round, and no
temporary file may be left. Effective time is the wall time of the unbroken round as a share of a broken round's.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.soak import digests

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cluster.project import SCENES, Project, SharedForkServer  # noqa: E402
from cluster.slurm_cluster import NODES, SlurmCluster, missing_packages, process_name  # noqa: E402

PIPELINE = (
    "slurm/pipeline.sh", "batch_size=4", "encoder=vitn", "workers=1", "checkpoint.every=10", "logging.every=10",
    "validation.every=50", "validation.limit=4", *SCENES,
)  # fmt: skip
COMPARED = ("outputs/*/model.safetensors", "data/labels-tiny/**/*.tar", "data/labels-tiny/**/*.json")
VICTIMS = ("rank", "srun", "batch shell", "slurmstepd", "slurmd", "node")
NAMES = {"rank": "python", "srun": "srun", "batch shell": "slurm_script", "slurmstepd": "slurmstepd"}
TYPED_EVERY_S = 5.0
BOOT_S = 3.0


@dataclass
class Round:
    """What happened in one run of the pipeline.

    Attributes:
        seconds: Wall time until everything was finished.
        kills: Victims, counted by kind.
        jobs: Jobs that were submitted; four without kills.
        restarts: How often Slurm started a job again, in all.
        equal: Whether models and labels have the bytes of the unbroken round.
        leftovers: Temporary files that are left.
    """

    seconds: float = 0.0
    kills: dict[str, int] = field(default_factory=dict)
    jobs: int = 0
    restarts: int = 0
    equal: bool = True
    leftovers: list[str] = field(default_factory=list)


class Killer:
    """Kills a random process of a random kind at random times."""

    def __init__(self, slurm: SlurmCluster, rng: random.Random, *, every_s: float) -> None:
        """Kill every `every_s` seconds on average; `rng` chooses times and victims."""
        self.slurm, self.rng, self.every_s = slurm, rng, every_s
        self._next = time.monotonic() + rng.uniform(0.5, 1.5) * every_s
        self._down: dict[str, float] = {}

    def act(self, kills: dict[str, int]) -> None:
        """Boot the nodes whose time has come, and kill if it is time; count the kind of the victim."""
        now = time.monotonic()
        for node in [node for node, up in self._down.items() if now >= up]:
            del self._down[node]
            self.slurm.start_node(node)
        if now < self._next:
            return
        self._next = now + self.rng.uniform(0.5, 1.5) * self.every_s
        kind = self.rng.choice(VICTIMS)
        if kind in ("slurmd", "node"):
            node = self.rng.choice(NODES)
            if node in self._down:
                return
            kill = self.slurm.kill_slurmd if kind == "slurmd" else self.slurm.kill_node
            kill(node)
            self._down[node] = now + BOOT_S
            kills[kind] = kills.get(kind, 0) + 1
            return
        found = [process for process in self.slurm.processes() if self._is(process, NAMES[kind])]
        if found:
            with suppress(ProcessLookupError):
                os.kill(self.rng.choice(found), signal.SIGKILL)
                kills[kind] = kills.get(kind, 0) + 1

    def boot_all(self) -> None:
        """Boot what is down."""
        for node in self._down:
            self.slurm.start_node(node)
        self._down.clear()

    @staticmethod
    def _is(process: int, name: str) -> bool:
        with suppress(OSError):
            return process_name(process) == name
        return False


def run_round(project: Project, arguments: Sequence[str], killer: Killer | None) -> Round:
    """Run the pipeline until it is finished, typing its command again and again."""
    result, start = Round(), time.monotonic()
    jobs: set[str] = set()
    typed_at = float("-inf")
    while True:
        if killer is not None:
            killer.act(result.kills)
        if time.monotonic() - typed_at >= TYPED_EVERY_S:
            typed_at = time.monotonic()
            with suppress(RuntimeError):  # slurmctld or a node may not answer now
                printed = project.run(*arguments)
                jobs |= {line.split()[-1] for line in printed.splitlines() if line.startswith("submitted ")}
                states = [line.split()[1] for line in printed.splitlines() if "@" in line]
                if states and {*states} == {"finished"}:
                    break
        time.sleep(0.2)
    result.seconds, result.jobs = time.monotonic() - start, len(jobs)
    if killer is not None:
        killer.boot_all()
    for job in jobs:
        for line in project.slurm.run("scontrol", "show", "job", "--oneliner", job).splitlines():
            result.restarts += int(dict(word.partition("=")[::2] for word in line.split())["Restarts"])
    result.leftovers = [str(path) for path in project.folder.rglob(".tmp.*")]
    project.slurm.end_jobs()
    return result


def main() -> None:
    """Run rounds until the time is over, print a line each and the sum, and write both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=30, help="start no round after this (default %(default)s)"
    )
    parser.add_argument(
        "--every", type=float, default=10, help="mean seconds between kills (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=200, help="of teacher and student (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of times and victims (default %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    if missing := missing_packages():
        sys.exit(f"error: apt-get install --no-install-recommends {' '.join(missing)}")
    rng = random.Random(options.seed)
    arguments = (*PIPELINE, f"steps={options.steps}")
    with tempfile.TemporaryDirectory() as folder:
        slurm = SlurmCluster(Path(folder) / "slurm")
        server = SharedForkServer(Path(folder))
        rounds: list[Round] = []
        try:
            slurm.start()
            unbroken = Project(slurm, Path(folder) / "unbroken", server)
            run_round(
                unbroken, arguments, None
            )  # the first one also waits for the server and renders the scenes
            whole = digests(unbroken.folder, COMPARED)
            calm = run_round(Project(slurm, Path(folder) / "calm", server), arguments, None)
            print(json.dumps({"unbroken": round(calm.seconds, 1)}), flush=True)
            end = time.monotonic() + 60 * options.minutes
            while not rounds or time.monotonic() < end:
                project = Project(slurm, Path(folder) / f"round-{len(rounds)}", server)
                broken = run_round(project, arguments, Killer(slurm, rng, every_s=options.every))
                broken.equal = bool(whole) and digests(project.folder, COMPARED) == whole
                rounds.append(broken)
                print(json.dumps(asdict(broken)), flush=True)
        finally:
            slurm.stop()
            server.close()
    figures = {
        "rounds": len(rounds),
        "kills": dict(sum((Counter(one.kills) for one in rounds), Counter())),
        "restarts": sum(one.restarts for one in rounds),
        "submitted_again": sum(one.jobs - 4 for one in rounds),
        "effective_time": round(len(rounds) * calm.seconds / sum(one.seconds for one in rounds), 3),
        "unbroken_seconds": round(calm.seconds, 1),
        "seconds_per_kill": round(
            sum(one.seconds - calm.seconds for one in rounds)
            / max(1, sum(sum(one.kills.values()) for one in rounds)),
            1,
        ),
        "equal": all(one.equal for one in rounds),
        "leftovers": sum(len(one.leftovers) for one in rounds),
    }
    print(json.dumps(figures))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**figures, "all": [asdict(one) for one in rounds]}, indent=1))
    if not figures["equal"]:
        sys.exit("a killed pipeline ended differently from the unbroken one")


if __name__ == "__main__":
    main()
