"""Where the main thread of a rank is: its step and phase, its stack, and for how long it has made no progress."""

import json
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType

PHASES = ("start", "forward", "backward", "optimizer step", "validation", "saving", "data", "ended")
"""The phases of a micro-batch in their order; "data" waits for the next one."""
SLOW_PHASES = ("start", "validation", "saving", "data")
"""May take `SLOW` times as long; storage that does not answer is retried, and reported, by the loader itself."""
MOVING_PHASES = ("start", "validation", "saving")
"""Here a stack that changes is progress. In the others it may be an endless loop."""
SLOW = 4.0
_MAX_FRAMES = 30


@dataclass(frozen=True)
class Beat:
    """What a rank tells the others.

    Attributes:
        number: Counts the beats of this rank: one that stays the same comes from a process that does not run.
        step: Optimizer steps that are done.
        batch: Micro-batches that were begun.
        phase: One of `PHASES`.
        ratio: Time without progress, divided by the time that the phase may take.
        collective: Whether the main thread is in a function of torch.distributed, which waits for other ranks.
        place: File, line and function of the innermost frame of this project.
    """

    number: int
    step: int
    batch: int
    phase: str
    ratio: float
    collective: bool
    place: str

    @property
    def position(self) -> tuple[int, int]:
        """Comparable between ranks: the rank with the smallest one is behind the others."""
        return self.batch, PHASES.index(self.phase)

    def to_json(self) -> str:
        """Serialize."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Beat":
        """Parse what `to_json` returns."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        """Describe where the rank is, for messages."""
        at = f", {self.place}" if self.place else ""
        return f"step {self.step}, {self.phase}{at}"


class Heartbeat:
    """Records the progress of the main thread, which calls `enter`; another thread calls `observe` and `beat`."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.reset()

    def reset(self) -> None:
        """Forget everything: a training begins."""
        self.phase, self.step, self.batch, self.first_step = "start", 0, 0, 0
        self.stalled_s = 0.0
        self._progress = self._seen_progress = 0
        self._number = 0
        self._seen_stack: tuple[tuple[str, int], ...] = ()

    def enter(self, phase: str, *, step: int | None = None, batches: int = 0) -> None:
        """Record progress: the main thread begins a phase.

        Args:
            phase: One of `PHASES`.
            step: Optimizer steps that are done, if that has changed.
            batches: Number of micro-batches that begin.
        """
        self.phase, self.step, self.batch = phase, self.step if step is None else step, self.batch + batches
        self._progress += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enter a phase, and the one before at the end."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def slowness(self) -> float:
        """How many times longer than usual the phase may take: the first step may compile the network."""
        return SLOW if self.phase in SLOW_PHASES or self.step <= self.first_step else 1.0

    def observe(self, seconds: float) -> None:
        """Add the time since the last call, in which this process ran, to `stalled_s`; 0 after progress."""
        stack = tuple((frame.f_code.co_name, line) for frame, line in traceback.walk_stack(_main_frame()))
        moves = self.phase in MOVING_PHASES or self.step <= self.first_step
        if self._progress != self._seen_progress or (moves and stack != self._seen_stack):
            self.stalled_s = 0.0
        else:
            self.stalled_s += seconds
        self._seen_progress, self._seen_stack = self._progress, stack

    def beat(self, timeout_s: float) -> Beat:
        """Return the next beat.

        Args:
            timeout_s: Time without progress, seconds, that usual phases may take.
        """
        self._number += 1
        files = [(frame.f_code, line) for frame, line in traceback.walk_stack(_main_frame())]
        ours = next(((code, line) for code, line in files if "/depth_anything/" in code.co_filename), None)
        place = ""
        if ours is not None:
            file = ours[0].co_filename.rpartition("/depth_anything/")[2]
            place = f"{file}:{ours[1]} in {ours[0].co_name}"
        return Beat(
            self._number,
            self.step,
            self.batch,
            self.phase,
            self.stalled_s / (timeout_s * self.slowness),
            any("/torch/distributed/" in code.co_filename for code, _ in files),
            place,
        )


def format_main_stack() -> str:
    """Format the Python stack of the main thread, the innermost call last.

    Lines of source are left out, because the file system that has them may be what hangs.
    """
    frames = list(traceback.walk_stack(_main_frame()))[:_MAX_FRAMES]
    return "\n".join(
        f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'
        for frame, line in reversed(frames)
    )


def _main_frame() -> FrameType:
    return sys._current_frames()[threading.main_thread().ident or 0]


heartbeat = Heartbeat()
"""The heartbeat of this process."""
