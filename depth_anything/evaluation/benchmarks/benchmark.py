"""What every benchmark is: its facts, a way to list what lies there, and a way to read a line of that list."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DepthLimits:
    """What a protocol compares on a benchmark.

    Attributes:
        min_depth: Metres; nearer truth is not valid.
        max_depth: Metres; farther truth is not valid.
        cut: What image and truth are cut to before anything else: "kb" (the last 352 rows, 1216 columns in the
            middle) or nothing.
        crop: The part of the truth that counts: one of `protocols.CROPS`, as "garg", or nothing.
    """

    min_depth: float
    max_depth: float
    cut: str = ""
    crop: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: a row of facts with its reader.

    Attributes:
        name: As typed: `--benchmarks NAME`.
        title: As its makers call it.
        images: How many there are; 0: not published.
        layout: Where its files lie below the root.
        get: Where to get it, and how large it is.
        licence: SPDX name, or LicenseRef-….
        find: (root) -> lines, a frame each, the key before the first tab; in a fixed order. ValueError says what
            was looked for, if the layout is not there.
        read: (root, line) -> `data.sample.Frame` with depth in metres, NaN where it is not known (or, for DA-2K,
            `da2k.Compared`: an image and its pairs of points). ValueError if a file is missing or damaged.
        caps: Protocol to what it compares here; the first one is the default.
        sharp: Its truth is dense, and as sharp as its images: boundaries are scored too.
    """

    name: str
    title: str
    images: int
    layout: str
    get: str
    licence: str
    find: Callable[[Path], Iterable[str]]
    read: Callable[[Path, str], Any]
    depth_limits: Mapping[str, DepthLimits] = field(default_factory=dict)
    sharp: bool = False

    @property
    def protocol(self) -> str:
        """The protocol by default."""
        return next(iter(self.depth_limits), self.name)
