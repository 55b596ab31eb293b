"""How far a long pass has come, told on standard error: a bar on a terminal, else a line every half minute."""

import sys
import time
from types import TracebackType

from depth_anything.data.address import escape_unprintable

LINE_INTERVAL_S = 30.0
"""Seconds between lines where there is no terminal."""


class ProgressLine:
    """Counts what is done, and says at which rate and how long the rest will take."""

    def __init__(self, what: str, *, total: int | None, unit: str = "record") -> None:
        """Begin at nothing.

        Args:
            what: is being done, as "writing data/own".
            total: of all units; None where nobody knows.
            unit: in the singular.
        """
        self.what, self.total, self.unit, self.done = escape_unprintable(what), total, unit, 0
        self._begin = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=self.what, total=total, unit=f" {unit}s", leave=False)

    def __enter__(self) -> "ProgressLine":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """Count `count` more; where there is no terminal, say so once in a while."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._said >= LINE_INTERVAL_S:
            self._said = now
            print(self.line(now - self._begin), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Say how much is done after so many seconds, at which rate, and how long the rest will take."""
        rate = self.done / max(seconds, 1e-9)
        of = f" of {self.total:,}" if self.total else ""
        text = f"{self.what}: {self.done:,}{of} {self.unit}s, {rate:,.1f} a second"
        if self.total and rate:
            text += f", {format_duration((self.total - self.done) / rate)} to go"
        return text


def format_duration(seconds: float) -> str:
    """Write a stretch of time as people say it.

    >>> duration(42), duration(3725), duration(200000)
    ('42 s', '1 h 2 min', '2 d 7 h')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{h} h {m} min"
    return f"{m} min {s} s" if minutes else f"{s} s"
