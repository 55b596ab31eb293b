"""Name the rank that hangs, with its stack, and end the job before the timeout of the process group would.

A rank that hangs makes all others wait in the next collective, until NCCL or gloo ends the job after half an hour with
messages of the ranks that waited. Here a thread of every rank publishes where its main thread is (heartbeat.py), over
a connection of its own to the store of the process group. When no rank has made progress for `hang_timeout` seconds,
the ranks compare: the culprit is one that publishes nothing any more, or one that is behind the others.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from depth_anything.disk import atomic_write, read_json_object
from depth_anything.training.heartbeat import Beat, format_main_stack, heartbeat
from depth_anything.training.signals import is_launched_by_lightning

T = TypeVar("T")

HANG_EXIT_CODE = 200
"""Of a run that hung. Above 128 + the largest signal: srun returns the largest code of all ranks."""
_INTERVAL_S = 5.0
_ANSWER_S = 15.0
"""The store answers within milliseconds; its process is stopped, or its node is gone, if it does not in this time."""
_SUSPICIOUS = 0.2
"""Ratio (heartbeat.Beat) from which on a rank publishes its stack and looks whether another one has reported it."""
_BEATS = 3
"""Beats between the two looks at the others."""


@dataclass(frozen=True)
class Peer:
    """The process of a rank; `started` is its start time in clock ticks, which tells it from a later one."""

    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        """Describe it for messages."""
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Diagnosis:
    """Which ranks hang.

    Attributes:
        silent: Ranks that publish no heartbeat any more: stopped, dead, or out of reach.
        behind: Ranks that are alive and behind the others.
        waiting: The other ranks, which wait for these.
        reporter: The rank that prints the report.
    """

    silent: list[int]
    behind: list[int]
    waiting: list[int]
    reporter: int


def diagnose(first: Sequence[Beat | None], second: Sequence[Beat | None]) -> Diagnosis | None:
    """Compare two looks at the heartbeats of all ranks.

    Args:
        first: A beat of each rank; None for a rank that has published none.
        second: The same some beats later.

    Returns:
        None if a rank makes progress.
    """
    numbers = [beat.number if beat is not None else 0 for beat in first]
    here = {rank: beat for rank, beat in enumerate(second) if beat is not None and beat.phase != "ended"}
    ended = {rank for rank, beat in enumerate(second) if beat is not None and beat.phase == "ended"}
    alive = {rank: beat for rank, beat in here.items() if beat.number > numbers[rank]}
    if not alive or any(beat.ratio < 0.5 for beat in alive.values()):
        return None
    silent = [rank for rank in range(len(second)) if rank not in alive and rank not in ended]
    furthest = max(beat.position for beat in alive.values())
    behind = [rank for rank, beat in alive.items() if beat.position < furthest]
    if not behind and any(beat.collective for beat in alive.values()):
        behind = [rank for rank, beat in alive.items() if not beat.collective]
    if silent:  # the others may well wait for these at two places
        behind = []
    waiting = [rank for rank in alive if rank not in behind]
    return Diagnosis(silent, behind, waiting, min(alive))


class Watchdog(pl.Callback):
    """Watches over the ranks from the set-up of the training to its end. It must be the last callback."""

    def __init__(
        self,
        timeout_s: float,
        run_dir: Path,
        *,
        release: Callable[[], None] = lambda: None,
        requeue: Callable[[], None] = lambda: None,
    ) -> None:
        """Allow `timeout_s` seconds without progress.

        Args:
            timeout_s: Four times as much in the first step, for data, for validation and while saving. All are cut to
                0.8 of the timeout of the process group.
            run_dir: Gets hang.txt, the report, and hang.json.
            release: Called on rank 0 before the process ends.
            requeue: Called on the rank that reports, unless the run hung before and has saved no step since.
        """
        self.timeout_s, self.run_dir = timeout_s, run_dir
        self._release, self._requeue = release, requeue
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.store = RankStore()
        self.rank, self.peers = 0, [_this_process()]

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Connect to the other ranks and start the thread."""
        if self._thread is not None:
            return
        heartbeat.reset()
        limit = getattr(trainer.strategy, "_timeout", None) or default_pg_timeout
        self.timeout_s = min(self.timeout_s, 0.8 * limit.total_seconds() / 4)
        self.rank = trainer.global_rank
        if trainer.world_size > 1:
            peers: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(peers, self.peers[0])
            self.peers = peers
            environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
            try:
                self.store = RankStore(
                    environment.main_address,
                    environment.main_port,
                    ranks=len(peers),
                    run=f"{peers[0].pid}-{peers[0].started}",
                )
            except RuntimeError as error:  # torch.distributed.DistError
                print(
                    f"note: no watchdog over the ranks, their store does not answer ({error})",
                    file=sys.stderr,
                )
                return
        self._interval = min(_INTERVAL_S, self.timeout_s / 4)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record that the first micro-batch is awaited."""
        heartbeat.first_step = trainer.global_step
        heartbeat.enter("data", step=trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Record that a micro-batch has arrived."""
        heartbeat.enter("forward", batches=1)

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Any) -> None:
        """Record that the loss is computed."""
        heartbeat.enter("backward")

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record that the gradients are computed."""
        heartbeat.enter("optimizer step")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Record that the callbacks are done, and the next micro-batch is awaited."""
        heartbeat.enter("data", step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Record that a checkpoint is being written, which `on_train_batch_end` ends."""
        heartbeat.enter("saving")

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Stop the thread: from here on a rank may end alone."""
        if self._thread is not None:
            heartbeat.enter("ended")
            self._stop.set()
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout=2 * _ANSWER_S)
            self._thread = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the thread."""
        self.teardown(trainer, module, "fit")

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self._interval):
            before = self._beat(before)
            beat = self._publish()
            if beat.ratio >= _SUSPICIOUS and (self.store.read("reported", ranks=1) or [None])[0]:
                self._exit(HANG_EXIT_CODE)
            if beat.ratio >= 1:
                self._compare()
                before = time.monotonic()
        faulthandler.cancel_dump_traceback_later()
        self._publish()

    def _beat(self, before: float) -> float:
        """Observe the main thread, and let C print all stacks if it keeps Python from running; return the time."""
        now = time.monotonic()
        # A process that was suspended (Ctrl-Z, scontrol suspend) made no progress, and that is no hang.
        heartbeat.observe(min(now - before, 2 * self._interval))
        faulthandler.dump_traceback_later(self.timeout_s * heartbeat.slowness, file=2)
        return now

    def _publish(self) -> Beat:
        beat = heartbeat.beat(self.timeout_s)
        self.store.publish("beat", self.rank, beat.to_json())
        if beat.ratio >= _SUSPICIOUS:
            self.store.publish("stack", self.rank, format_main_stack())
        return beat

    def _compare(self) -> None:
        """Look at all ranks twice; end the process if none makes progress."""
        first = self._read_beats()
        before = time.monotonic()
        for _ in range(_BEATS):
            if self._stop.wait(self._interval):
                return
            before = self._beat(before)
            if self._publish().ratio < 1:
                return
        second = self._read_beats()
        if first is None or second is None:
            unreachable = Diagnosis([0], [], [rank for rank in range(len(self.peers)) if rank], 1)
            beats: list[Beat | None] = [None] * len(self.peers)
            beats[self.rank] = heartbeat.beat(self.timeout_s)
            self._end(unreachable, beats, reachable=False)
            return
        diagnosis = diagnose(first, second)
        if diagnosis is not None:
            self._end(diagnosis, second)

    def _read_beats(self) -> list[Beat | None] | None:
        """Read the beats of all ranks; None if the store does not answer."""
        if len(self.peers) == 1:
            return [heartbeat.beat(self.timeout_s)]
        texts = self.store.read("beat")
        return texts and [Beat.from_json(text) if text else None for text in texts]

    def _end(self, diagnosis: Diagnosis, beats: Sequence[Beat | None], *, reachable: bool = True) -> None:
        """Print the report on one rank, and end this process; a single process on a terminal only prints."""
        if len(self.peers) == 1 and sys.stdin is not None and sys.stdin.isatty():
            stack = [format_main_stack()]
            print(
                format_report(diagnosis, self.peers, beats, [None], stack, seconds=heartbeat.stalled_s),
                file=sys.stderr,
            )
            heartbeat.stalled_s = 0.0  # a person at a debugger may take their time
            return
        here = [rank for rank in diagnosis.silent if self.peers[rank].host == socket.gethostname()]
        for rank in here:
            self.store.publish("state", rank, process_state(self.peers[rank]))
        code = HANG_EXIT_CODE
        if self.rank == diagnosis.reporter:
            self._stop.wait(self._interval)  # until all have published
            code = self._report(diagnosis, beats, reachable=reachable)
            self.store.publish("reported", 0, str(code))
        elif reachable:
            code = self._wait_for_report()
        else:
            print(f"rank {self.rank} ends: rank 0 ({self.peers[0]}) does not answer", file=sys.stderr)
            time.sleep(2 * self._interval)
        self._exit(code, kill=here)  # a launcher that has ended would leave them

    def _exit(self, code: int, *, kill: Sequence[int] = ()) -> None:
        if self.rank == 0:
            _within(_ANSWER_S, self._release)
        sys.stderr.flush()
        for rank in kill:
            kill_process(self.peers[rank])
        # After another code of a rank that Lightning launched it would kill rank 0, whose code is the run's.
        os._exit(0 if is_launched_by_lightning() else code)

    def _wait_for_report(self) -> int:
        """Wait until the report is printed, because a launcher ends all ranks when one has ended."""
        for _ in range(60):
            reported = self.store.read("reported", ranks=1)
            if reported is None or reported[0]:
                return int(reported[0]) if reported else HANG_EXIT_CODE
            time.sleep(0.5)
        return HANG_EXIT_CODE

    def _report(self, diagnosis: Diagnosis, beats: Sequence[Beat | None], *, reachable: bool) -> int:
        """Print the report, write it to hang.txt, queue the job again, and return the exit code."""
        stacks = (self.store.read("stack") if reachable else None) or [None] * len(self.peers)
        stacks[self.rank] = stacks[self.rank] or format_main_stack()
        states = (self.store.read("state") if reachable else None) or [None] * len(self.peers)
        for rank in diagnosis.silent:
            if self.peers[rank].host == socket.gethostname():
                states[rank] = process_state(self.peers[rank])
        text = format_report(diagnosis, self.peers, beats, states, stacks, seconds=heartbeat.stalled_s)
        print(text, file=sys.stderr, flush=True)
        repeated = _within(_ANSWER_S, lambda: self._record(text))
        if repeated:
            again = "it hung before and has saved no step since, so it is not queued again"
        else:
            again = "start the same command again to continue"
        code = 1 if repeated else HANG_EXIT_CODE
        print(f"the run ends with exit code {code}; {again}", file=sys.stderr, flush=True)
        if not repeated:
            _within(4 * _ANSWER_S, self._requeue)
        return code

    def _record(self, text: str) -> bool:
        """Write the report into the run folder; return whether the run hung before and has saved no step since."""
        saved, file = read_json_object(self.run_dir / "saved.json").get("step", 0), self.run_dir / "hang.json"
        before = read_json_object(file).get("saved")
        with suppress(OSError):
            atomic_write(file, json.dumps({"saved": saved}).encode())
            atomic_write(self.run_dir / "hang.txt", f"{text}\n".encode())
        return before == saved


class RankStore:
    """Short texts of each rank, in the store of the process group; a connection of the watchdog alone.

    The main thread may block the connection of torch. A store whose process is stopped never answers, and its reads
    never return: they run in threads that are left behind.
    """

    def __init__(self, host: str = "", port: int = 0, *, ranks: int = 1, run: str = "") -> None:
        """Connect; without a host there is one rank and no store.

        Args:
            host: The host of the store.
            port: Its port.
            ranks: Number of ranks.
            run: Equal on all ranks, and another one after a restart, because torchrun's store outlives the ranks.
        """
        self._host, self._port, self._ranks = host, port, ranks
        self._prefix = f"watchdog/{run}"
        self._store = self._connect() if host else None

    def publish(self, name: str, rank: int, text: str) -> None:
        """Set a text of a rank; lost if there is no connection."""
        store = self._store
        if store is not None:
            with suppress(RuntimeError):  # torch.distributed.DistError
                store.set(f"{self._prefix}/{name}/{rank}", text)

    def read(self, name: str, *, ranks: int | None = None) -> list[Any] | None:
        """Return the texts of all ranks, None for those that are not set; None if the store does not answer."""
        store = self._store
        if store is None:
            return None
        keys = [f"{self._prefix}/{name}/{rank}" for rank in range(ranks or self._ranks)]

        def ask() -> list[Any]:
            there = [True] * len(keys) if store.check(keys) else [store.check([key]) for key in keys]
            values = iter(store.multi_get([key for key, is_set in zip(keys, there, strict=True) if is_set]))
            return [next(values).decode() if is_set else None for is_set in there]

        answer = _within(_ANSWER_S, ask)
        if answer is None:
            self._store = _within(_ANSWER_S, self._connect)  # the old connection may be blocked for good
        return answer

    def _connect(self) -> Any:
        return dist.TCPStore(
            self._host,
            self._port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_ANSWER_S),
        )


def format_report(
    diagnosis: Diagnosis,
    peers: Sequence[Peer],
    beats: Sequence[Beat | None],
    states: Sequence[str | None],
    stacks: Sequence[str | None],
    *,
    seconds: float,
) -> str:
    """Format which ranks hang and where the others wait; equal stacks are printed once."""
    lines = [f"hang: no rank has made progress for {seconds:.0f} s"]
    for rank in diagnosis.silent:
        beat = beats[rank]
        state, last = f" ({states[rank]})" if states[rank] else "", f"; it was last at {beat}" if beat else ""
        lines.append(f"  rank {rank}, {peers[rank]}, does not answer{state}{last}")
    for rank in diagnosis.behind:
        lines.append(f"  rank {rank}, {peers[rank]}, is behind the others: {beats[rank]}")
    if not diagnosis.silent and not diagnosis.behind:
        lines.append("  all ranks are at the same place; if they wait in a collective, look at the network")
    places: dict[str, list[int]] = {}
    for rank in diagnosis.waiting:
        places.setdefault(str(beats[rank]) if beats[rank] else "an unknown place", []).append(rank)
    lines += [f"  waiting: {format_ranks(ranks)} at {place}" for place, ranks in places.items()]
    groups: dict[str, list[int]] = {}
    for rank in [*diagnosis.behind, *diagnosis.waiting]:
        if stack := stacks[rank]:
            groups.setdefault(stack, []).append(rank)
    for stack, ranks in groups.items():
        lines += [f"stack of {format_ranks(ranks)} ({peers[ranks[0]]}):", stack.rstrip()]
    return "\n".join(lines)


def format_ranks(ranks: Iterable[int]) -> str:
    """Format ranks for messages.

    >>> format_ranks([0, 1, 2, 5]), format_ranks([3])
    ('ranks 0-2, 5', 'rank 3')
    """
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(spans) != 1 or spans[0][0] != spans[0][1] else ''} {text}"


def process_state(peer: Peer) -> str:
    """Describe the state of a process of this host, for messages."""
    stat = _read_stat(peer.pid)
    if not stat or stat[19] != peer.started:
        return "the process has died"
    states = {"T": "stopped, as by SIGSTOP", "t": "stopped by a debugger", "Z": "a zombie"}
    states |= {"D": "waits for a disk, a network file system or a driver"}
    return f"state {stat[0]}: {states.get(stat[0], 'running or asleep, and Python does not run')}"


def kill_process(peer: Peer) -> None:
    """Kill a process of this host, unless another process has its number by now."""
    stat = _read_stat(peer.pid)
    if stat and stat[19] == peer.started:
        with suppress(OSError):
            os.kill(peer.pid, signal.SIGKILL)


def _this_process() -> Peer:
    stat = _read_stat(os.getpid())
    return Peer(socket.gethostname(), os.getpid(), stat[19] if stat else "")


def _read_stat(pid: int) -> list[str]:
    """Read /proc/PID/stat from the state on (proc(5): fields 3 and later); [] if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """Call `work` in a thread; None if it raises or does not return in time, and the thread is left behind."""
    results: list[T] = []

    def call() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
