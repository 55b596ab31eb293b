"""Handlers of the signals that stop a run: Ctrl-C, SIGTERM, Slurm's SIGUSR1, and SIGHUP of a closed terminal.

Before the first step nothing can be lost, so a signal ends the process at once. From the first step on, and where
other ranks would wait for this one, the signal is only recorded: all ranks agree on a step, save a checkpoint and stop
(callbacks.GracefulStop). A second Ctrl-C ends the process at once.

This module imports only the standard library: train.py installs the handlers before its slow imports.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME_KEYPRESS_S = 0.3
"""`timeout` and srun send SIGINT to a process and to its group: two signals this close count as one Ctrl-C."""
MAIN_PID_VARIABLE = "DEPTH_ANYTHING_MAIN_PID"
"""Environment variable with the PID of the process that had Lightning launch the other ranks, which inherit it."""
SCRIPT_REQUEUES_VARIABLE = "DEPTH_ANYTHING_SCRIPT_REQUEUES"
"""Environment variable with the Slurm job that its batch script queues again after exit code 138 (slurm/README.md).

It holds the job and not just 1, because sbatch hands the environment of a job on to the jobs that it submits.
"""


class StoppedBySignal(SystemExit):
    """Ends this process after a signal; the exit code is 128 + the signal's number.

    The code is 0 on ranks that Lightning launched: after any other code Lightning would kill rank 0, whose exit code
    is the run's.
    """

    def __init__(self, number: int) -> None:
        """Store the signal's number."""
        super().__init__(0 if is_launched_by_lightning() else 128 + number)
        self.number = number


class SignalHandler:
    """Records the signals that this process receives and decides whether they end it at once.

    Attributes:
        received: Number of the first signal received, 0 for none.
    """

    def __init__(self) -> None:
        """Start with no signal received and no handlers installed."""
        self.received = 0
        self._process = 0
        self._first_interrupt: float | None = None
        self._deferred = self._announced = False
        self._interruptible = 0

    def install(self) -> None:
        """Install the handlers, again where a library has replaced them; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self._process != os.getpid():
            self._process = os.getpid()
            atexit.register(self.ignore)  # Python restores the default handlers before it exits
        for number in HANDLED_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)

    def ignore(self) -> None:
        """Ignore all signals from now on: this process is about to exit with its own exit code."""
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def defer(self) -> None:
        """Only record signals from now on: training has begun, and only step boundaries can be saved."""
        self._deferred = True

    def reset(self) -> None:
        """Forget the signals received; for programs that run several trainings in one process."""
        self.received, self._first_interrupt, self._deferred, self._announced = 0, None, False, False

    def raise_if_received(self) -> None:
        """Stop if a signal was recorded, or if a library swallowed the exception of one.

        Raises:
            StoppedBySignal: If there was a signal and the process may stop here.
        """
        if self.received and self._may_stop():
            self.stop(self.received)

    def stop(self, number: int) -> NoReturn:
        """Print that a signal to this rank or another one ends the run, and end this process.

        Raises:
            StoppedBySignal: Always.
        """
        if not self._announced:
            self._announced = True
            job = slurm_job()
            slurm = f"; Slurm's job {job} is not queued again" if job and number == signal.SIGUSR1 else ""
            if batch_script_requeues():
                slurm = ""
            print_on_rank0(f"stopped by {signal_name(number)}{slurm}; {how_to_continue(number)}")
        raise StoppedBySignal(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal stop the code inside before the first step, even where other ranks wait for this one.

        Raises:
            StoppedBySignal: For a signal that arrives inside, or that was recorded before.
        """
        self._interruptible += 1
        try:
            self.raise_if_received()
            yield
        finally:
            self._interruptible -= 1

    def _may_stop(self) -> bool:
        return not self._deferred and (self._interruptible > 0 or _may_exit_alone())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that was just forked and does not ignore signals yet
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt > SAME_KEYPRESS_S:
                print_on_rank0(
                    "stopped at once by a second Ctrl-C; start the same command again to continue after the last save"
                )
                os._exit(128 + number)
            self._first_interrupt = now if self._first_interrupt is None else self._first_interrupt
        if self.received:
            return
        self.received = number
        self.raise_if_received()
        again = " again" if number == signal.SIGINT else ""
        print_on_rank0(
            f"{signal_name(number)}: saving, then stopping; Ctrl-C{again} ends the run without saving"
        )


signal_handler = SignalHandler()
"""The handler of this process."""


def signal_name(number: int) -> str:
    """Return the number and name of a signal for messages.

    >>> signal_name(15)
    'signal 15 (SIGTERM)'
    """
    return f"signal {number} ({signal.Signals(number).name})"


def slurm_job() -> str | None:
    """Return Slurm's job as `scontrol requeue` takes it, ARRAY_TASK for a task of an array; None outside Slurm.

    SLURM_JOB_ID alone is not enough: one task of an array has the id of the whole array, and requeueing that id kills
    the tasks that run and revives the ones that were cancelled.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def batch_script_requeues() -> bool:
    """Return whether the batch script of this Slurm job queues it again after SIGUSR1, and this process must not."""
    job = slurm_job()
    return job is not None and os.environ.get(SCRIPT_REQUEUES_VARIABLE) == job


def how_to_continue(number: int) -> str:
    """Return what continues a run that a signal stopped, as the end of a message."""
    if number == signal.SIGUSR1 and batch_script_requeues():
        return f"the batch script queues Slurm's job {slurm_job()} again"
    return "start the same command again to continue"


def is_launched_by_lightning() -> bool:
    """Return whether Lightning launched this process as a further rank of a run that was started once."""
    return (
        os.environ.get("LOCAL_RANK", "0") != "0"
        and "TORCHELASTIC_RUN_ID" not in os.environ
        and os.environ.get(MAIN_PID_VARIABLE) == str(os.getppid())
    )


def _may_exit_alone() -> bool:
    """Return whether no other rank would wait for this process: there is none, or its launcher ends them all."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and getattr(distributed, "is_initialized", bool)():
        return False
    return "LOCAL_RANK" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def print_on_rank0(message: str) -> None:
    """Write to stderr on rank 0, past Python's buffers: the interrupted code may be writing to them."""
    ranks = (os.environ.get(key) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    if next((rank for rank in ranks if rank is not None), "0") == "0":
        os.write(2, f"{message}\n".encode())
