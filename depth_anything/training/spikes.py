"""Losses of recent steps, and which new loss is far above them."""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

MIN_LOSSES = 8
"""With fewer losses their spread is not known, and only a loss 100 times the largest is a spike."""
MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""


class LossWindow:
    """The losses of the last steps, without spikes.

    A loss is a spike if it exceeds the median by 8 standard deviations, estimated from the median absolute deviation,
    and by twice the median. So neither noise nor an earlier spike hides it, and a smooth loss does not raise alarms.
    After `settled` spikes in a row the loss has a new level, and the window begins again with it.
    """

    def __init__(self, *, length: int = 200, settled: int = 50) -> None:
        """Keep the last `length` losses."""
        self.settled = settled
        self._losses: deque[float] = deque(maxlen=length)
        self._spikes: list[float] = []

    @property
    def spikes_in_a_row(self) -> int:
        """Number of spikes up to the last loss."""
        return len(self._spikes)

    def limit(self) -> float | None:
        """Return the largest loss that is no spike; None before the first loss."""
        if not self._losses:
            return None
        if len(self._losses) < MIN_LOSSES:
            return 100 * max(map(abs, self._losses))
        middle = median(self._losses)
        deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self._losses)
        return middle + max(8 * deviation, 2 * abs(middle))

    def usual(self) -> float | None:
        """Return the median of the losses; None before the first one."""
        return median(self._losses) if self._losses else None

    def add(self, loss: float) -> bool:
        """Add the finite loss of a step; return whether it is a spike."""
        limit = self.limit()
        if limit is None or loss <= limit:
            self._losses.append(loss)
            self._spikes.clear()
            return False
        self._spikes.append(loss)
        if len(self._spikes) >= self.settled:
            self._losses.clear()
            self._losses.extend(self._spikes)
            self._spikes.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, for a checkpoint."""
        return {"losses": list(self._losses), "spikes": list(self._spikes)}

    def load_state_dict(self, state: dict[str, Sequence[float]]) -> None:
        """Continue from a checkpoint."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._spikes = list(state["spikes"])
