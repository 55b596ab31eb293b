"""A source for tests of the writer: small images with analytic depth, some of which are rejected."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from depth_anything.ingest.source import DatasetInfo, RawSample
from depth_anything.ingest.writer import write_source

INFO = DatasetInfo(
    name="toy",
    title="a toy",
    records=23,
    layout="toy.txt with a name a line",
    get="made by its test",
    licence="CC0-1.0",
    leave_out=("dull/*",),
)
SIZE = (12, 16)


def fill(raw, count=23):
    """Write the names of the records: two are left out, and some are rejected, among them a whole shard of four."""
    raw.mkdir(parents=True)
    bad = {4, 5, 6, 7, 9}
    names = [f"room/{k:02d}{'-bad' if k in bad else ''}" for k in range(count)]
    (raw / "toy.txt").write_text("\n".join([*names, "dull/0", "dull/1"]))
    return raw


def write(raw, root, **options):
    """Write the records as a set named toy, four per shard."""
    return write_source(sys.modules[__name__], raw, root, **{"per_shard": 4, "name": "toy", **options})


def depth_of(number):
    """Return depth in meters, float64, with every kind of invalid value."""
    depth = np.linspace(1, 5, SIZE[0] * SIZE[1]).reshape(SIZE) + number
    depth[0, :5] = np.nan, np.inf, -np.inf, -2.0, 0.0
    depth[1, 0] = 1e300  # overflows float32
    return depth


def masks():
    """Return the masks of the sky, the last row, and of a mirror, which covers a part of the sky."""
    sky, mirror = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    sky[-1] = True
    mirror[-1, :3] = True
    mirror[5, 5:8] = True
    return sky, mirror


def find(raw: Path, *, seconds: str | None = None):
    """List the names, and append to the file "found" for each call."""
    with open(raw / "found", "a") as file:
        file.write("x")
    for name in (raw / "toy.txt").read_text().splitlines():
        yield f"{name}\t{seconds or 0}"
    return {".txt": 3}


def read(raw: Path, line: str) -> RawSample:
    """Return the sample of a line, after the delay in the line; raise the error that its name asks for."""
    name, seconds = line.split("\t")
    time.sleep(float(seconds))
    if name.endswith("-bad"):
        raise ValueError("its depth is missing")
    if name.endswith("-gone"):
        return RawSample((raw / "no such file").read_bytes())
    if name.endswith("-broken"):
        raise OSError(5, os.strerror(5))
    if name.endswith("-bug"):
        raise KeyError("a bug")
    if name.endswith("-dies"):
        os._exit(9)
    number = int(name.rpartition("/")[2])
    sky, mirror = masks()
    image = np.full((*SIZE, 3), number, np.uint8)
    return RawSample(image, {"unit": "m"}, depth=depth_of(number), sky=sky, invalid={"mirror": mirror})


class Stopped(BaseException):
    """An interruption, as by Ctrl-C."""


def stop_at(patch, call):
    """Raise `Stopped` instead of the call-th replace, link or fsync."""
    calls = []

    def stop(real):
        def counted(*arguments, **options):
            calls.append(real)
            if len(calls) > call:
                raise Stopped
            return real(*arguments, **options)

        return counted

    for name in ("replace", "link", "fsync"):
        patch.setattr(os, name, stop(getattr(os, name)))
