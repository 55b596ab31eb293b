"""The images that networks are judged on: procedural scenes, and RGB-D frames of a folder of real ones."""

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.data.shards import open_set
from depth_anything.data.tars import ShardError
from depth_anything.evaluation.frames import read_frames
from depth_anything.ingest.record import resize_nearest

SCENE_TESTS = {"photographic": 101, "synthetic": 102}
"""Look of unseen scenes to their seed, as in earlier reports."""

MEDIAN_DEPTH = 2.0
"""Meters that the median of a disparity in pixels is set to. Neither AbsRel nor boundary F1 depends on this scale."""


SHARP_SIDE = 112
"""Short side of frames for boundary F1, pixels; that of the procedural scenes."""


@dataclass(frozen=True)
class TestSet:
    """A set of shards with known depth.

    Attributes:
        test: Name of the test that it belongs to; its mean is over sets.
        name: Name of the set.
        root: Folder of its shards.
        sharp: Whether its truth is dense and sharp, so that boundary F1 is measured.
    """

    test: str
    name: str
    root: Path
    sharp: bool


def scene_tests(data: Path) -> list[TestSet]:
    """List the procedural tests."""
    return [TestSet(look, look, data / f"scenes-test-{look}", True) for look in SCENE_TESTS]


def real_tests(real: Path, data: Path) -> list[TestSet]:
    """List the sets of real frames that are reserved for judging and that could be written.

    Sets in meters are the test "real". Those in disparity (of structured light, or labeled by hand) are the test
    "sharp": dense enough for boundary F1.
    """
    tests = []
    for name in judged_sets(real):
        root = data / "real" / "rgbd" / name
        try:
            quantity = open_set(str(root)).meta.get("quantity")
        except ShardError:
            continue  # its frames were rejected, which `depth-anything shard custom` has reported
        sharp = quantity == "disparity"
        tests.append(TestSet("sharp" if sharp else "real", name, root, sharp))
    return tests


def list_tests(data: Path, real: Path | None) -> list[TestSet]:
    """List the procedural tests and, with a folder of real images, the real ones."""
    return scene_tests(data) + (real_tests(real, data) if real is not None else [])


def set_digest(test: TestSet) -> str:
    """Return the digest of the manifest of a set."""
    return open_set(str(test.root)).digest


def list_sets(real: Path) -> list[str]:
    """List the sets of real frames: the folders below rgbd/ that have a set.yaml."""
    return sorted(path.parent.name for path in (real / "rgbd").glob("*/set.yaml"))


def judged_sets(real: Path) -> list[str]:
    """List the sets that are reserved for judging: all but those of the line "Tune on: A, B_*." in README.txt."""
    readme = real / "README.txt"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    line = re.search(r"(?im)^tune on:\s*([^.\n]*)", text)
    patterns = [word.strip() for word in line[1].split(",")] if line else []
    return [name for name in list_sets(real) if not any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def read_test(test: TestSet) -> Iterator[Frame]:
    """Read the frames of a set; a disparity becomes depth up to a scale, at the size of the procedural scenes."""
    for frame in read_frames(test.root):
        yield frame if frame.depth is not None else shrink(with_depth(frame))


def shrink(frame: Frame) -> Frame:
    """Return a frame whose short side is at most `SHARP_SIDE`: the image averaged, of the depth the nearest pixel.

    Boundary F1 does not forgive an edge that is off by a pixel, and networks of 70 px are off by several at full size.
    """
    assert frame.depth is not None
    height, width = frame.image.shape[:2]
    scale = SHARP_SIDE / min(height, width)
    if scale >= 1:
        return frame
    size = round(height * scale), round(width * scale)
    image = cv2.resize(frame.image, size[::-1], interpolation=cv2.INTER_AREA)
    return replace(frame, image=image, depth=resize_nearest(frame.depth, *size))


def with_depth(frame: Frame) -> Frame:
    """Return a frame with depth from its disparity, whose median is `MEDIAN_DEPTH`; unknown pixels are NaN.

    The disparity of a rectified pair is zero at infinity, so depth is its reciprocal up to a scale.
    """
    assert frame.disparity is not None
    known = np.isfinite(frame.disparity) & (frame.disparity > 0)
    depth = np.full(frame.disparity.shape, np.nan, np.float32)
    if known.any():
        depth[known] = 1 / frame.disparity[known]
        depth *= MEDIAN_DEPTH / np.median(depth[known])
    return replace(frame, depth=depth)
