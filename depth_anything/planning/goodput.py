"""Goodput of a run that fails now and then: the share of its wall time that is spent in steps which are kept.

`simulate_goodput` draws failures; the closed forms of Young and Daly are its reference. Symbols, all in seconds:

    M  mean time between failures of the job: that of one GPU divided by the number of GPUs
    T  useful work between two checkpoints
    D  time that a checkpoint stops the run
    B  time after that until it is complete, while the run goes on: an asynchronous checkpoint
    R  from a failure to the first step of the next start: detection, queue, imports, reading the checkpoint

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval" (CACM 17, 1974); J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps" (FGCS 22, 2006).
"""

import math
import random
from dataclasses import dataclass

LLAMA3_FAILURES, LLAMA3_DAYS, LLAMA3_GPUS = 419, 54, 16_384
"""Unexpected interruptions, days and H100s of the Llama 3 405B run (arXiv 2407.21783, section 3.3.4 and table 5)."""

GPU_HOURS_PER_FAILURE = LLAMA3_GPUS * LLAMA3_DAYS * 24 / LLAMA3_FAILURES
"""Hours that one GPU runs without stopping its job, as counted for Llama 3: 50,677, nearly six years."""

RSC_GPU_HOURS_PER_FAILURE = 7.9 * 1024
"""The same on Meta's research clusters: 7.9 hours for jobs on 1,024 GPUs (arXiv 2410.21680, A100), 6 times as often."""


@dataclass(frozen=True)
class Interruptions:
    """What stops a job, and what each stop costs.

    Attributes:
        mtbf_s: M, mean seconds between failures of the whole job.
        restart_s: R.
        time_limit_s: Seconds after which the scheduler ends the job, which saves first and is requeued; None for no
            limit. It loses no step and costs D and R.
    """

    mtbf_s: float
    restart_s: float
    time_limit_s: float | None = None


@dataclass(frozen=True)
class Checkpoints:
    """When a job saves.

    Attributes:
        interval_s: T, at least B.
        write_s: D.
        behind_s: B.
    """

    interval_s: float
    write_s: float
    behind_s: float = 0.0


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a simulated job went, in seconds.

    Attributes:
        useful_s: Steps that are kept.
        lost_s: Steps, and parts of checkpoints, after the last checkpoint before a failure.
        writing_s: Complete checkpoints.
        restarting_s: Restarts.
        failures: Number of failures.
    """

    useful_s: float
    lost_s: float
    writing_s: float
    restarting_s: float
    failures: int

    @property
    def wall_s(self) -> float:
        """Wall time."""
        return self.useful_s + self.lost_s + self.writing_s + self.restarting_s

    @property
    def share(self) -> float:
        """Goodput: useful time ÷ wall time."""
        return self.useful_s / self.wall_s


def job_mtbf_s(gpus: int, gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE) -> float:
    """Return M of a job that any failing GPU, host or link stops.

    Example:
        >>> round(job_mtbf_s(16_384) / 3600, 1), round(job_mtbf_s(8) / 86400)
        (3.1, 264)
    """
    return 3600 * gpu_hours_per_failure / gpus


def simulate_goodput(
    interruptions: Interruptions, checkpoints: Checkpoints, *, starts: int, seed: int = 0
) -> Goodput:
    """Simulate a job until it was started so many times, each time after a failure or a time limit.

    Failures are a Poisson process: the time to the next is exponential with mean M, whatever the job does. A start
    first takes R, then T and D alternate. At a failure everything after the last complete checkpoint is lost, which is
    the one before the newest if that is not complete yet. As M does not depend on the past, the time between two starts
    is drawn at once, and whole cycles are counted by division.

    Args:
        interruptions: M, R and the time limit.
        checkpoints: T and D.
        starts: Number of starts; the relative error of the lost time falls with its root.
        seed: Of the failures; equal seeds give equal results.
    """
    draw = random.Random(seed).expovariate
    limit = math.inf if interruptions.time_limit_s is None else interruptions.time_limit_s
    interval, write, restart = checkpoints.interval_s, checkpoints.write_s, interruptions.restart_s
    behind = checkpoints.behind_s
    useful = lost = writing = restarting = 0.0
    count = 0
    for _ in range(starts):
        end = draw(1 / interruptions.mtbf_s)
        failed = end < limit
        end = min(end, limit)
        count += failed
        restarting += min(end, restart)
        running = max(0.0, end - restart)
        cycles = max(0.0, running - (behind if failed else 0.0)) // (interval + write)
        rest = running - cycles * (interval + write)
        useful += cycles * interval
        writing += cycles * write
        if failed:
            lost += rest
        else:  # saves before the limit, instead of when it would have, and waits until that is complete
            useful += max(0.0, rest - write - behind)
            writing += min(rest, write + behind)
    return Goodput(useful, lost, writing, restarting, count)


def expected_goodput(interruptions: Interruptions, checkpoints: Checkpoints) -> float:
    """Return the expected goodput without a time limit, exactly (Daly, equation 20).

    A cycle of T and D takes M·exp(R/M)·(exp((T+D)/M) − 1) in the mean, with failures during restarts and checkpoints.
    B is like a longer restart: n cycles are kept if the job fails later than R + n·(T+D) + B.
    """
    m = interruptions.mtbf_s
    cycle = (checkpoints.interval_s + checkpoints.write_s) / m
    late = (interruptions.restart_s + checkpoints.behind_s) / m
    return checkpoints.interval_s / (m * math.exp(late) * math.expm1(cycle))


def first_order_goodput(interruptions: Interruptions, checkpoints: Checkpoints) -> float:
    """Return the goodput to first order (Young), right where T, B and R are far below M.

    1 ÷ (1 + D/T + (T/2 + B + R)/M)
    """
    interval, write = checkpoints.interval_s, checkpoints.write_s
    rework = (interval / 2 + checkpoints.behind_s + interruptions.restart_s) / interruptions.mtbf_s
    return 1 / (1 + write / interval + rework)


def young_interval(write_s: float, mtbf_s: float) -> float:
    """Return the T of the highest goodput to first order: √(2·D·M), seconds.

    Example:
        >>> young_interval(15.0, 3600.0 * 100)
        3286.335345030997
    """
    return math.sqrt(2 * write_s * mtbf_s)


def daly_interval(write_s: float, mtbf_s: float) -> float:
    """Return the T of the highest goodput to higher order (Daly, equation 37): M where D ≥ 2·M."""
    if write_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(write_s / (2 * mtbf_s))
    return young_interval(write_s, mtbf_s) * (1 + x / 3 + x * x / 9) - write_s
