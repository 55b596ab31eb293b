"""Progress of a long pass on standard error: a tqdm bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import TracebackType
from typing import TypeVar

from depth_anything.data.address import escape_unprintable

T = TypeVar("T")

LINE_INTERVAL_S = 30.0
"""Seconds between lines where there is no terminal."""


class ProgressLine:
    """Counts finished units and shows the rate and the remaining time."""

    def __init__(
        self,
        what: str,
        *,
        total: int | None = None,
        unit: str = "",
        initial: int = 0,
        interval_s: float = LINE_INTERVAL_S,
        enabled: bool = True,
        keep: bool = False,
    ) -> None:
        """Open the display.

        Args:
            what: What is running, as "writing data/own".
            total: Number of units; None if unknown.
            unit: Name of a unit in the singular.
            initial: Units that were finished before.
            interval_s: Seconds between lines where there is no terminal.
            enabled: False shows nothing.
            keep: Leave the bar on the terminal at the end.
        """
        self.what, self.total, self.unit = escape_unprintable(what), total, unit
        self.done = self._initial = initial
        self._interval_s, self._enabled, self._values = interval_s, enabled, ""
        self._start = self._last = time.monotonic()
        self._bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.what,
                total=total,
                initial=initial,
                unit=f" {unit}s" if unit else "it",
                dynamic_ncols=True,
                leave=keep,
            )

    def __enter__(self) -> "ProgressLine":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the display."""
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1, values: Mapping[str, str] | None = None) -> None:
        """Count finished units.

        Args:
            count: How many more.
            values: Name to text, shown behind the rate from now on.
        """
        self.done += count
        if values is not None:
            self._values = ", ".join(f"{name}={value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._values, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._enabled and now - self._last >= self._interval_s:
            self._last = now
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Format the progress after so many seconds.

        Example:
            >>> progress = ProgressLine("reading set", total=300, unit="record", enabled=False)
            >>> progress.update(100)
            >>> progress.line(10.0)
            'reading set: 100 of 300 records, 10.0 a second, 20 s to go'
        """
        rate = (self.done - self._initial) / max(seconds, 1e-9)
        total = f" of {self.total:,}" if self.total else ""
        text = (
            f"{self.what}: {self.done:,}{total}{f' {self.unit}s' if self.unit else ''}, {rate:,.1f} a second"
        )
        if self.total and rate:
            text += f", {format_duration((self.total - self.done) / rate)} to go"
        return f"{text}, {self._values}" if self._values else text


def track(items: Iterable[T], *, what: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yield items and show the progress; arguments as `ProgressLine`, by default the total is len(items)."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressLine(what, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()


def format_duration(seconds: float) -> str:
    """Format a duration by its two largest units.

    Example:
        >>> format_duration(42), format_duration(3725), format_duration(200000)
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
