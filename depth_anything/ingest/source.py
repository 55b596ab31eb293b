"""What every reader of raw data shares: the facts of its set, and a record as it is read from it."""

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FILE_ERRNOS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
"""Numbers of errors that are one file's own; any other is its disk's, and no reason to leave a record out."""

RESUME_ADVICE = "when the disk is there again, type the same command, which goes on where it stopped"
"""What to do where `is_of_the_disk` holds."""


def is_disk_failure(error: BaseException) -> bool:
    """Whether a disk failed; what decoders and unpackers find wrong with a file has no number."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in FILE_ERRNOS


def resize_intrinsics(
    intrinsics: Mapping[str, float], before: tuple[int, int], after: tuple[int, int]
) -> dict[str, float]:
    """Return the intrinsics of an image that was resized.

    Args:
        intrinsics: fx, fy, cx, cy in pixels, as far as known; the centre of the upper left pixel is at 0, 0.
        before: height and width that they are of.
        after: height and width that they shall be of.
    """
    rows, columns = after[0] / before[0], after[1] / before[1]
    made = {
        "fx": lambda fx: fx * columns,
        "fy": lambda fy: fy * rows,
        "cx": lambda cx: (cx + 0.5) * columns - 0.5,
        "cy": lambda cy: (cy + 0.5) * rows - 0.5,
    }
    return {name: made[name](value) if name in made else value for name, value in intrinsics.items()}


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before anything of it is read.

    Attributes:
        name: Of the set and of its command: `depth-anything shard NAME`.
        title: As its makers call it.
        records: How many the paper takes, or the set's own count.
        layout: Where its files lie below the raw folder.
        get: Where to get it, and how large it is.
        licence: SPDX name, or LicenseRef-…; goes into the manifest and into what is trained on it.
        sky: "far" (disparity 0) or "invalid": what training does with the sky unless told otherwise.
        leave_out: Glob patterns of names that are not taken unless asked for.
        sharp: Its depth is dense and as sharp as its images: evaluation scores boundaries too.
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


@dataclass(frozen=True)
class RawSample:
    """One record as a source reads it, before any rule about what is valid.

    Attributes:
        image: The image file as it is, or uint8 (H, W, 3) RGB where the set has no file to keep.
        meta: For the record's json: unit, intrinsics if known, whatever a user of the pixels must know.
        depth: float (H, W): planar depth (z), in meta["unit"]. NaN, infinite, zero and negative values may
            stand in it: they are counted and become NaN.
        disparity: float (H, W), larger is nearer, as the set stores it; likewise.
        sky: bool (H, W), where the set says that there is sky.
        invalid: Reason to bool (H, W): what else is not to be trusted.
    """

    image: bytes | np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)
    depth: np.ndarray | None = None
    disparity: np.ndarray | None = None
    sky: np.ndarray | None = None
    invalid: Mapping[str, np.ndarray] = field(default_factory=dict)


class RejectedRecord(ValueError):
    """A file that is not taken into the set."""

    def __init__(self, name: str, reason: str) -> None:
        """Name the file and say why."""
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason
