"""Signals that end a run: Ctrl-C, SIGTERM, Slurm's SIGUSR1, and SIGHUP of a closed terminal.

Before the first step nothing can be lost, and a signal ends the process at once. From the first step on, and where
other ranks would wait for this one, it is only noted: the ranks agree on a step, save and stop (callbacks.Agreement).
A second Ctrl-C ends the process wherever it is.

Only the standard library is imported here: train.py installs the handlers before its slow imports.
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
"""`timeout` and srun send Ctrl-C to a process and to its group: two signals so close are one press of the keys."""
MAIN_PID_VARIABLE = "DEPTH_ANYTHING_MAIN_PID"
"""Environment variable with the number of the process that lets Lightning launch the other ranks, which inherit it."""


class StoppedBySignal(SystemExit):
    """A signal ends this process; the exit code is 128 + the signal's number.

    It is 0 on the ranks that Lightning launched: at another code it would kill rank 0, whose code is the run's.
    """

    def __init__(self, number: int) -> None:
        """Hold the signal's number."""
        super().__init__(0 if is_launched_by_lightning() else 128 + number)
        self.number = number


class SignalHandler:
    """The signals that this process has received, and whether the next one may end it at once.

    Attributes:
        caught: The first signal's number, 0 for none.
    """

    def __init__(self) -> None:
        """Start without a signal and without handlers."""
        self.caught = 0
        self._process = 0
        self._pressed: float | None = None
        self._held = self._told = False
        self._interruptible = 0

    def install(self) -> None:
        """Install the handlers, or install them again where a library has replaced them."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may
        if self._process != os.getpid():
            self._process = os.getpid()
            atexit.register(self.ignore)  # Python gives the signals back before it ends
        for number in HANDLED_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under nohup
                signal.signal(number, self._receive)

    def ignore(self) -> None:
        """Ignore every signal from here on: this process is about to end, with the exit code that it should have."""
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def hold(self) -> None:
        """Only note signals from here on: training has begun, and only a step boundary can be saved."""
        self._held = True

    def forget(self) -> None:
        """Start anew, as a process without a signal; for programs that run several trainings."""
        self.caught, self._pressed, self._held, self._told = 0, None, False, False

    def check(self) -> None:
        """Stop where a signal was noted, or where its exception was lost in a library.

        Raises:
            Stopped: If there was one and this place may be interrupted.
        """
        if self.caught and self._may_stop():
            self.stop(self.caught)

    def stop(self, number: int) -> NoReturn:
        """Say that a signal to this rank or another one ends the process, and end it.

        Raises:
            Stopped: Always.
        """
        if not self._told:
            self._told = True
            job = os.environ.get("SLURM_JOB_ID")
            unqueued = f" when it is submitted again, as Slurm's job {job} is not queued again" if job else ""
            _print_on_rank0(
                f"stopped by {signal_name(number)}; the same command goes "
                f"on{unqueued if number == signal.SIGUSR1 else ''}"
            )
        raise StoppedBySignal(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end what runs inside, before the first step, even where other ranks wait for this one.

        Raises:
            Stopped: For a signal that comes inside, or that was noted before.
        """
        self._interruptible += 1
        try:
            self.check()
            yield
        finally:
            self._interruptible -= 1

    def _may_stop(self) -> bool:
        return not self._held and (self._interruptible > 0 or _may_exit_alone())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that was forked a moment ago and does not ignore signals yet
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._pressed is not None and now - self._pressed > SAME_KEYPRESS_S:
                _print_on_rank0(
                    "stopped at once by a second Ctrl-C; the same command goes on from the last checkpoint"
                )
                os._exit(128 + number)
            self._pressed = now if self._pressed is None else self._pressed
        if self.caught:
            return
        self.caught = number
        self.check()
        again = " again" if number == signal.SIGINT else ""
        _print_on_rank0(
            f"{signal_name(number)}: saving, then stopping; Ctrl-C{again} ends the run without saving"
        )


signal_handler = SignalHandler()
"""Those of this process."""


def signal_name(number: int) -> str:
    """Name a signal for the user, with its number.

    >>> name_of(15)
    'signal 15 (SIGTERM)'
    """
    return f"signal {number} ({signal.Signals(number).name})"


def is_launched_by_lightning() -> bool:
    """Tell whether Lightning launched this process as a further rank of a run that was started once."""
    return (
        os.environ.get("LOCAL_RANK", "0") != "0"
        and "TORCHELASTIC_RUN_ID" not in os.environ
        and os.environ.get(MAIN_PID_VARIABLE) == str(os.getppid())
    )


def _may_exit_alone() -> bool:
    """Tell whether no other rank will wait for this process: there is none, or its launcher ends them all."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and getattr(distributed, "is_initialized", bool)():
        return False
    return "LOCAL_RANK" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _print_on_rank0(sentence: str) -> None:
    """Write to standard error past Python's buffers, which the interrupted code may be writing to; rank 0 alone."""
    ranks = (os.environ.get(key) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    if next((rank for rank in ranks if rank is not None), "0") == "0":
        os.write(2, f"{sentence}\n".encode())
