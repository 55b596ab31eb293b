"""Run jobs in processes of their own, several at a time, each when those that it needs are finished."""

import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depth_anything.progress import format_duration

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 4.0
"""Of a job besides its steps, for the estimate of the remaining time."""


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        name: Unique name, which is printed.
        kind: A key of `worker.JOBS`.
        arguments: Keyword arguments of that function.
        seconds: Estimate of its duration on one core.
        needs: Names of jobs that must succeed before.
        optional: Its failure is reported and fails neither the jobs that need it nor the command.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any]
    seconds: float = START_SECONDS
    needs: tuple[str, ...] = ()
    optional: bool = False


@dataclass
class Outcome:
    """What became of the jobs.

    Attributes:
        done: Names of the jobs that succeeded.
        failed: Names of the jobs that failed.
        left: Names of the jobs that were not started: they need a failed one, or there was no time.
        seconds: Duration of each finished job.
    """

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run_job(kind: str, arguments: Mapping[str, Any], log: str, threads: int) -> None:
    """Do a job in this process; imports torch here, so that the process that starts the jobs need not."""
    from benchmarks.claims import worker

    worker.run(kind, arguments, Path(log), threads)


def start_context(threads: int) -> Any:
    """Return a context of multiprocessing whose processes start fast: torch is imported once, in a server process."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["benchmarks.claims.worker", "depth_anything.training.run", "torch._dynamo"]
    )
    return context


class Scheduler:
    """Runs jobs and prints a line about each, with the time that the others will take."""

    def __init__(
        self, jobs: Sequence[Job], logs: Path, *, parallel: int, threads: int, seconds: float
    ) -> None:
        """Start nothing yet.

        Args:
            jobs: In the order in which they should start.
            logs: Folder of the output of the jobs.
            parallel: Jobs at a time.
            threads: CPU threads of each.
            seconds: No job starts that would probably end later than this.
        """
        self.waiting = {job.name: job for job in jobs}
        self.jobs, self.logs, self.parallel, self.threads = dict(self.waiting), logs, parallel, threads
        self.limit, self.begin = seconds, time.monotonic()
        self.running: dict[str, tuple[Any, float]] = {}
        self.outcome = Outcome()
        self.context = start_context(threads)

    def run(self) -> Outcome:
        """Run all jobs that can be run; an interruption ends the running ones and returns."""
        work = sum(job.seconds for job in self.jobs.values())
        self._print(
            f"{len(self.jobs)} jobs, {self.parallel} at a time: about {format_duration(work / self.parallel)}"
        )
        try:
            while self.waiting or self.running:
                self._start_ready()
                if not self.running:
                    break
                self._wait()
        except KeyboardInterrupt:
            self._stop()
        self.outcome.left += list(self.waiting)
        return self.outcome

    def _start_ready(self) -> None:
        for name, job in list(self.waiting.items()):
            if len(self.running) >= self.parallel:
                return
            needed = [need for need in job.needs if need in self.jobs]
            if any(need in self.outcome.failed and not self.jobs[need].optional for need in needed) or any(
                need in self.outcome.left for need in needed
            ):
                del self.waiting[name]
                self.outcome.left.append(name)
            elif not any(need in self.waiting or need in self.running for need in needed):
                del self.waiting[name]
                if time.monotonic() - self.begin + job.seconds * self._pace() > self.limit:
                    self.outcome.left.append(name)
                    continue
                process = self.context.Process(
                    target=run_job, args=(job.kind, dict(job.arguments), str(self.log(name)), self.threads)
                )
                process.start()
                self.running[name] = (process, time.monotonic())

    def log(self, name: str) -> Path:
        """Return the file of a job's output."""
        return self.logs / f"{name.replace('/', '_')}.txt"

    def _wait(self) -> None:
        multiprocessing.connection.wait([process.sentinel for process, _ in self.running.values()])
        for name, (process, start) in list(self.running.items()):
            if process.exitcode is None:
                continue
            process.join()
            del self.running[name]
            seconds = time.monotonic() - start
            self.outcome.seconds[name] = seconds
            succeeded = process.exitcode == 0
            (self.outcome.done if succeeded else self.outcome.failed).append(name)
            state = (
                format_duration(seconds) if succeeded else f"failed, see {self.log(name)}{self._reason(name)}"
            )
            count = len(self.outcome.done) + len(self.outcome.failed)
            self._print(
                f"[{count} of {len(self.jobs)}] {name}: {state}; {format_duration(self._remaining())} to go"
            )

    def _reason(self, name: str) -> str:
        try:
            lines = self.log(name).read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f" ({lines[-1]})" if lines else ""

    def _pace(self) -> float:
        """Measured by estimated seconds of the finished jobs; 1 before there are enough."""
        estimated = sum(self.jobs[name].seconds for name in self.outcome.seconds)
        return sum(self.outcome.seconds.values()) / estimated if estimated > 60 else 1.0

    def _remaining(self) -> float:
        now = time.monotonic()
        work = sum(job.seconds for job in self.waiting.values()) * self._pace()
        for name, (_, start) in self.running.items():
            work += max(0.0, self.jobs[name].seconds * self._pace() - (now - start))
        return work / self.parallel

    def _stop(self) -> None:
        """Ask the running jobs to save and stop, as Ctrl-C does, and wait for them."""
        self._print("stopping; the same command continues")
        for process, _ in self.running.values():
            process.terminate()  # SIGTERM: a training writes a checkpoint first
        for name, (process, _) in self.running.items():
            process.join()
            self.outcome.left.append(name)
        self.running.clear()

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
