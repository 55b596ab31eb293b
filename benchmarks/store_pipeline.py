"""Run the tiny pipeline with sets, labels and runs on an S3 server, kill each stage, and compare it with a disk's.

    python benchmarks/store_pipeline.py --kills 2 --output benchmarks/results/store_pipeline.md

The server is moto's, on loopback. A process is killed with SIGKILL when the server gets a chosen one of its writes,
which is then refused; before each new start the local folder of the run is deleted, as if the node were lost with its
disk.
"""

import argparse
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from local_servers import FaultyServer, s3, s3_environment  # noqa: E402

from benchmarks.soak import Start, start_process  # noqa: E402

STAGES = ("teacher", "pseudolabel", "student")
SMALL = (
    "batch_size=4",
    "image_size=42",
    "checkpoint.every=3",
    "logging.every=1",
    "validation.every=4",
    "validation.limit=4",
    "sources.scenes.synthetic.count=24",
    "sources.scenes.photographic.count=24",
    "sources.scenes.validation.count=8",
    *(f"++sources.scenes.{name}.{key}" for name in ("synthetic", "photographic", "validation")
      for key in ("height=42", "width=56", "per_shard=8")),
)  # fmt: skip


@dataclass
class StageOutcome:
    """What a stage did: times killed, requests by method, seconds, and the names whose bytes differ from the disk's."""

    stage: str
    kills: int = 0
    seconds: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    files: int = 0
    differing: list[str] = field(default_factory=list)


class Pipeline:
    """Runs stages on a disk and on a server."""

    def __init__(
        self, folder: Path, server: FaultyServer, *, steps: int, start: Start = start_process
    ) -> None:
        """Use `folder` for everything local, and the bucket `bucket` of the server."""
        self.folder, self.server, self.steps, self.start = folder, server, steps, start
        self.disk, self.local = folder / "disk", folder / "local"
        clean = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        self.environment = {
            **clean, **s3_environment(server.address), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
            "DEPTH_ANYTHING_CACHE": str(folder / "cache"), "DEPTH_ANYTHING_TIMEOUT": "60",
        }  # fmt: skip

    def command(self, stage: str, home: str) -> list[str]:
        """Return what to type for a stage with everything under a folder or an address."""
        places = [f"data_dir={home}/data", f"output_dir={home}/runs"]
        places += [f"mirror.folder={self.local}", "mirror.every=0.2"] if "://" in home else []
        steps = [] if stage == "pseudolabel" else [f"steps={self.steps}"]
        return [sys.executable, str(ROOT / "train.py"), f"stage={stage}", *places, *steps, *SMALL]

    def run(self, command: list[str], *, kill_at: int = 0) -> bool:
        """Run a command, killed when the server gets its n-th write; return whether it was killed.

        Raises:
            RuntimeError: It fails by itself, with the end of what it said.
        """
        errors, lock, seen, killed = self.folder / "stderr.txt", threading.Lock(), [0], threading.Event()
        errors.unlink(missing_ok=True)

        def fault(request: str, times: int) -> str | None:
            with lock:
                seen[0] += 1
                if killed.is_set():
                    return "reset"
                if seen[0] != kill_at:
                    return None
                killed.set()
            os.killpg(process.pid, signal.SIGKILL)
            return "reset"

        self.server.write_fault = fault
        process = self.start(command, self.environment, errors)
        code = process.wait()
        self.server.write_fault = lambda request, times: None
        if code and not killed.is_set():
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read_text()[-3000:]}")
        return killed.is_set()

    def run_stage(self, stage: str, kills: Sequence[int]) -> StageOutcome:
        """Run a stage on the disk, then on the server with kills at these writes, and compare the files."""
        self.run(self.command(stage, str(self.disk)))
        outcome, begin = StageOutcome(stage), time.perf_counter()
        self.server.writes.clear()
        self.server.seen.clear()
        for kill_at in kills:
            outcome.kills += self.run(self.command(stage, "s3://bucket"), kill_at=kill_at)
            shutil.rmtree(self.local, ignore_errors=True)
        self.run(self.command(stage, "s3://bucket"))
        shutil.rmtree(self.local, ignore_errors=True)
        outcome.seconds = time.perf_counter() - begin
        outcome.requests = Counter({"GET": len(self.server.seen)})
        outcome.requests.update(method for method, _ in self.server.writes)
        return self.compare(outcome)

    def compare(self, outcome: StageOutcome) -> StageOutcome:
        """Compare the bytes of what a stage made: the sets, and the model or the labels."""
        from depth_anything.data.store import ObjectStore

        place = ObjectStore("s3://bucket")
        found = {name for name in place.names() if not name.startswith("runs/") and "/.probe-" not in name}
        expected = {path.relative_to(self.disk).as_posix(): path for path in self.disk.rglob("data/**/*.*")}
        sets = {
            name.rpartition("/")[0] for name in found
        }  # those of a stage that ran on the disk only are not there
        expected = {name: path for name, path in expected.items() if name.rpartition("/")[0] in sets}
        if outcome.stage != "pseudolabel":
            (model,) = self.disk.glob(f"runs/{outcome.stage}-*/model.safetensors")
            name = model.relative_to(self.disk).as_posix()
            expected[name] = model
            found.add(name)
        outcome.files = len(expected)
        for name in sorted(found | expected.keys()):
            same = False
            if name in expected and place.exists(name):
                # Labels name their teacher's file as it was typed.
                on_disk = expected[name].read_bytes().replace(f"{self.disk}/".encode(), b"s3://bucket/")
                same = place.read(name) == on_disk
            if not same:
                outcome.differing.append(name)
        return outcome


def main() -> None:
    """Run the three stages and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=2, help="kills a stage (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="of a training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    rng, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "bucket").mkdir()
        with s3({"bucket": Path(name) / "bucket"}) as behind, FaultyServer(behind) as server:
            os.environ.update(s3_environment(server.address))
            pipeline = Pipeline(Path(name), server, steps=options.steps)
            for stage in STAGES:
                kills = sorted(rng.sample(range(2, 24), options.kills), reverse=True)
                rows.append(pipeline.run_stage(stage, kills))
                print(rows[-1], flush=True)
    lines = [
        f"`python benchmarks/store_pipeline.py --kills {options.kills} --steps {options.steps} --seed {options.seed}`, "
        f"Python {platform.python_version()}, moto's S3 server on loopback; every start began without local files.",
        "",
        "| stage | kills | files compared | files that differ | GET | PUT | POST | DELETE | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = " | ".join(str(row.requests[method]) for method in ("GET", "PUT", "POST", "DELETE"))
        lines.append(
            f"| {row.stage} | {row.kills} | {row.files} | {len(row.differing)} | {counts} | {row.seconds:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(f"# The tiny pipeline on an object store\n\n{text}")
    if any(row.differing or row.kills < options.kills for row in rows):
        sys.exit(
            "a stage on the server ended differently from the disk's, or was not killed as often as asked"
        )


if __name__ == "__main__":
    main()
