"""Types that every dataset reader shares: facts about a dataset, and one sample as it was read."""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depth_anything.classes import ClassTable

FILE_ERRNOS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
"""Error numbers that concern one file. Any other number means that the disk fails, and no record is rejected for it."""

RESUME_ADVICE = "when the disk is back, type the same command; it continues where it stopped"


def is_disk_failure(error: BaseException) -> bool:
    """Return whether an error is a failing disk. Errors of decoders and of decompression have no error number."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in FILE_ERRNOS


def resize_intrinsics(
    intrinsics: Mapping[str, float], before: tuple[int, int], after: tuple[int, int]
) -> dict[str, float]:
    """Convert camera intrinsics to those of the resized image.

    Args:
        intrinsics: Any of fx, fy, cx, cy in pixels; the center of the upper left pixel is (0, 0).
        before: Height and width of the image that they belong to.
        after: Height and width of the resized image.
    """
    rows, columns = after[0] / before[0], after[1] / before[1]
    convert = {
        "fx": lambda fx: fx * columns,
        "fy": lambda fy: fy * rows,
        "cx": lambda cx: (cx + 0.5) * columns - 0.5,
        "cy": lambda cy: (cy + 0.5) * rows - 0.5,
    }
    return {name: convert[name](value) if name in convert else value for name, value in intrinsics.items()}


def same_aspect_ratio(size: tuple[int, int], other: tuple[int, ...]) -> bool:
    """Return whether two sizes (height, width) have the same aspect ratio, up to a pixel of the second."""
    scale = max(other[0] / size[0], other[1] / size[1])
    return abs(other[0] - size[0] * scale) <= 1 and abs(other[1] - size[1] * scale) <= 1


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset that are known without reading it.

    Attributes:
        name: Name of the set and of its command, `depth-anything shard NAME`.
        title: Name that its authors use.
        records: Number of records that the paper uses, or that the set has.
        layout: Where its files are below the raw folder.
        get: Where to download it, and its size.
        licence: SPDX identifier or LicenseRef-…; copied to the manifest and to trained models.
        sky: "far" (disparity 0) or "invalid": the default treatment of sky pixels in training.
        leave_out: Glob patterns of record names that are skipped by default.
        sharp: Depth is dense and as sharp as the images, so that evaluation also scores boundaries.
        classes: Classes of its class maps; empty if it has none.
    """

    name: str
    title: str
    records: int
    layout: str
    get: str
    licence: str
    sky: str = "far"
    leave_out: tuple[str, ...] = ()
    sharp: bool = False
    classes: ClassTable = ()


@dataclass(frozen=True)
class RawSample:
    """One sample as a reader returns it, before pixels are checked.

    Attributes:
        image: The bytes of the image file, or uint8 (H, W, 3) RGB if the set has no image file.
        meta: Fields of the record's JSON: unit, intrinsics if known, and other facts about the pixels.
        depth: float (H, W), planar depth (z) in meta["unit"]. NaN, infinite, zero and negative values are allowed;
            they are counted and become NaN.
        disparity: float (H, W), larger is nearer, as stored; the same rule applies.
        sky: bool (H, W), sky pixels according to the set.
        invalid: Reason to bool (H, W): other pixels without a usable value.
        classes: uint8 (H, W) of the image's size, numbers of classes, 255 where a pixel is ignored.
        captions: Texts that describe the image.
    """

    image: bytes | np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)
    depth: np.ndarray | None = None
    disparity: np.ndarray | None = None
    sky: np.ndarray | None = None
    invalid: Mapping[str, np.ndarray] = field(default_factory=dict)
    classes: np.ndarray | None = None
    captions: Sequence[str] = ()


class RejectedRecord(ValueError):
    """A record that is not written to the set, with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        """Store the name of the record and the reason."""
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason
