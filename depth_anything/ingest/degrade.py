"""Degrade exact depth as depth sensors do, and write a degraded copy of a labeled set.

Depth Anything V2 (§2) names two faults of real labels: noise (holes at glass and edges, wrong depth) and missing
detail. `degrade` reproduces them on exact depth, so that networks trained on either can be compared on equal images.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depth_anything.data.address import redact_secrets
from depth_anything.data.reader import Records
from depth_anything.data.sample import IMAGE_FIELDS, decode_record
from depth_anything.data.shards import open_set
from depth_anything.data.tars import ShardSet
from depth_anything.errors import UserError
from depth_anything.ingest.source import DatasetInfo, RawSample
from depth_anything.ingest.writer import write_source

DEGRADATION_VERSION = 1
"""Increase it when the result of a seed changes; it is a setting of every degraded set."""


@dataclass(frozen=True)
class DepthSensor:
    """What a depth sensor loses.

    Attributes:
        cell: Side of a sensor pixel, in pixels of the image. Phones measure 256 x 192 points beside images of 1920 x
            1440 pixels (ARKit), a cell of 7.5; Kinect v1's correlation window is 9 pixels wide (Khoshelham and
            Elberink, Sensors 12(2), 2012).
        disparity_step: Quantization step of disparity, 1 / meters: Kinect v1 measures eighths of a pixel with a focal
            length of 580 pixels and a base of 7.5 cm, 0.125 / (580 * 0.075), which is 7 cm at 5 m (same source).
        noise: Standard deviation of disparity before it is quantized, in steps.
        base: Distance of projector and camera times the focal length, as a share of the width of the image, in meters:
            0.075 * 580 / 640 for Kinect v1. What the projector cannot see has no depth.
        max_depth: Meters; farther points and the sky have no depth. 80 m is the range of KITTI's LiDAR.
        hole_share: Share of the area of random holes, as glass, dark and shiny surfaces leave.
        hole_size: Size of these holes, as a share of the height.
    """

    cell: int = 4
    disparity_step: float = 0.125 / (580 * 0.075)
    noise: float = 1.0
    base: float = 0.075 * 580 / 640
    max_depth: float = 80.0
    hole_share: float = 0.1
    hole_size: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: Naming the value.
        """
        if self.cell < 1 or self.disparity_step <= 0 or self.max_depth <= 0 or self.hole_size <= 0:
            raise UserError(f"{self} needs a cell of at least 1, and a step, a range and holes above 0")
        if not 0 <= self.hole_share < 1 or self.noise < 0 or self.base < 0:
            raise UserError(f"{self} needs hole_share from 0 to below 1, and noise and base of at least 0")


def degrade(depth: np.ndarray, *, seed: int, sensor: DepthSensor | None = None) -> np.ndarray:
    """Degrade exact depth as a depth sensor does. The same arguments always give the same map.

    In this order:

    1. Coarse, mixed pixels: a sensor pixel of `cell` x `cell` image pixels measures the mean depth of its surface, so
       that at an edge it lies between the foreground and the background.
    2. Holes: what the projector does not see, left of near objects; sky and everything beyond `max_depth`; and random
       blobs of `hole_share` of the area.
    3. Noise and quantization of disparity, whose effect on depth grows with the square of the distance.

    Args:
        depth: Float (H, W), planar depth in meters; +inf is sky, NaN unknown.
        seed: Seed of the random numbers, at least 0.
        sensor: What is lost; None: `DepthSensor()`.

    Returns:
        Float32 (H, W), meters; NaN where the sensor has no value. The input is not changed.

    Raises:
        ValueError: The map is not two-dimensional or holds no floating-point numbers.

    Example:
        >>> depth = np.full((4, 8), 2.0, np.float32)
        >>> depth[:, 6:] = 4.0
        >>> exact = DepthSensor(cell=4, disparity_step=1e-9, noise=0, base=0, hole_share=0)
        >>> degrade(depth, seed=0, sensor=exact)[0].round(3).tolist()
        [2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]
    """
    if depth.ndim != 2 or not depth.size or not np.issubdtype(depth.dtype, np.floating):
        raise ValueError(f"depth must be floating point (H, W), not {depth.dtype} {depth.shape}")
    sensor = sensor or DepthSensor()
    draw = np.random.Generator(np.random.Philox(seed))
    height, width = depth.shape
    coarse = _mean_of_cells(depth.astype(np.float64), sensor.cell)
    unknown = ~(np.isfinite(coarse) & (coarse > 0) & (coarse <= sensor.max_depth))
    coarse[unknown] = sensor.max_depth
    unknown |= _hidden_from_projector(coarse, sensor.base * coarse.shape[1])
    unknown |= _random_blobs(draw, coarse.shape, share=sensor.hole_share, size=sensor.hole_size)
    steps = 1 / (coarse * sensor.disparity_step) + sensor.noise * draw.standard_normal(coarse.shape)
    measured = 1 / (np.maximum(np.round(steps), 1) * sensor.disparity_step)
    measured[unknown | (measured > sensor.max_depth)] = np.nan
    full = measured.repeat(sensor.cell, 0).repeat(sensor.cell, 1)[:height, :width]
    return np.ascontiguousarray(full, np.float32)


def _mean_of_cells(depth: np.ndarray, cell: int) -> np.ndarray:
    """Return the mean depth of each cell; NaN where half of it or more is unknown, infinite where half is sky."""
    height, width = depth.shape
    rows, columns = -(-height // cell), -(-width // cell)
    padded = np.pad(depth, ((0, rows * cell - height), (0, columns * cell - width)), mode="edge")
    cells = padded.reshape(rows, cell, columns, cell).swapaxes(1, 2).reshape(rows, columns, -1)
    known = np.isfinite(cells) & (cells > 0)
    count = known.sum(-1)
    mean = np.where(known, cells, 0).sum(-1) / np.maximum(count, 1)
    half = cells.shape[-1] / 2
    mean[count < half] = np.nan
    mean[np.isinf(cells).sum(-1) >= half] = np.inf
    return mean


def _hidden_from_projector(depth: np.ndarray, base_px: float) -> np.ndarray:
    """Return the pixels that a projector to the right of the camera does not see: another pixel covers their ray.

    A point at column x and depth z is at column x - base_px / z for the projector. Points whose column there is not
    left of every point to their right in the image are hidden by that point, which is nearer.
    """
    columns = np.arange(depth.shape[1]) - base_px / depth
    right = np.minimum.accumulate(columns[:, ::-1], axis=1)[:, ::-1]
    hidden = np.zeros(depth.shape, bool)
    hidden[:, :-1] = columns[:, :-1] >= right[:, 1:]
    return hidden


def _random_blobs(
    draw: np.random.Generator, shape: tuple[int, int], *, share: float, size: float
) -> np.ndarray:
    """Return blobs of about a size (share of the height) that cover a share of the area."""
    if share == 0:
        return np.zeros(shape, bool)
    side = max(1.0, size * shape[0])
    grid = [max(2, round(length / side)) for length in shape]
    noise = cv2.resize(draw.random(grid), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return noise < np.quantile(noise, share)


@dataclass(frozen=True)
class DegradedSource:
    """A source for `write_source`: the records of a labeled set, their depth degraded. A line is shard, index, seed."""

    records: Records
    seed: int
    sensor: DepthSensor
    INFO: DatasetInfo

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the records."""
        return {
            "version": DEGRADATION_VERSION,
            "of": self.records.set.digest,
            "seed": self.seed,
            "sensor": asdict(self.sensor),
        }

    def find(self, raw: Path) -> Iterable[str]:
        """List the records of the set."""
        number = 0
        for shard, count in self.records.shards:
            for index in range(count):
                yield f"{shard}/{index}\t{number}"
                number += 1

    def read(self, raw: Path, line: str) -> RawSample:
        """Read a record and degrade its depth.

        Raises:
            ValueError: It has no depth, or no pixel of it is left.
        """
        name, _, number = line.partition("\t")
        shard, _, index = name.rpartition("/")
        key, fields = self.records.read(shard, int(index))
        frame = decode_record(key, fields)
        if frame.depth is None:
            raise ValueError("it has no depth in meters")
        seed = self.seed * 10_000_000_000 + int(number)
        depth = degrade(frame.depth, seed=seed, sensor=self.sensor)
        image = next(fields[field] for field in IMAGE_FIELDS if field in fields)
        facts = {key: value for key, value in frame.meta.items() if key not in ("source", "name", "sky")}
        return RawSample(image, {**facts, "unit": "m"}, depth=depth)


def write_degraded(
    root: str,
    output: str | Path,
    *,
    seed: int = 0,
    sensor: DepthSensor | None = None,
    name: str | None = None,
    per_shard: int = 1000,
) -> ShardSet:
    """Write a copy of a labeled set with the same images and degraded depth, which is as large as before.

    An interrupted copy is continued; a finished one is returned.

    Args:
        root: Folder or address of the set, with depth in meters.
        output: Folder of the copy.
        seed: Seed of noise and holes, 0 to 10^9.
        sensor: What is lost; None: `DepthSensor()`.
        name: Name of the copy. None: the name of its folder.
        per_shard: Records per shard.

    Raises:
        ValueError: The set has no depth in meters, or the folder holds another set.
    """
    shard_set = open_set(root)
    quantity, unit = shard_set.meta.get("quantity"), shard_set.meta.get("unit")
    if (quantity, unit) != ("depth", "m"):
        raise UserError(
            f"{redact_secrets(root)} has quantity={quantity} and unit={unit}, and only depth in m can be degraded",
            "choose a labeled set in meters, as  depth-anything shard scenes OUT  writes it",
        )
    info = DatasetInfo(
        name="degraded",
        title=f"{shard_set.name}, its depth degraded",
        records=shard_set.records,
        layout="a set of shards",
        get="depth-anything shard degraded SET OUT",
        licence=shard_set.meta.get("licence") or "",
        sky="invalid",
    )
    source = DegradedSource(Records(shard_set), seed, sensor or DepthSensor(), info)
    written = write_source(source, Path(), output, name=name, per_shard=per_shard)
    assert written is not None, "a single part has every shard"
    return written
