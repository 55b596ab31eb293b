"""What keeps a video from flickering: one range of values for many frames, and maps that hold still.

Nothing here looks at a later frame; what is seen twice is seen in two passes.
"""

import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

RANGE_MODES = ("clip", "running", "frame")

TAIL_PERCENT = 0.1
"""Percent of a frame's pixels that may lie outside a range at either end, so that no speck sets the colours."""

ATTACK_S, RELEASE_S = 0.1, 2.0
"""How fast a running range widens and narrows, as time constants."""

MAX_CACHE_BYTES = 8 << 30
"""How much disk the maps of a first pass may take."""

_SAMPLE_PX = 1 << 16  # pixels whose percentiles stand for a frame's
_STILL_TOLERANCE = 6.0  # levels of 255 by which a pixel of a still scene may change
_MIN_STILL_SHARE = 0.05  # share of the picture that must hold still, or it is another scene
_LEAK = 0.1  # how much of the correction is forgotten a frame
_MAX_RESIDUAL_SHARE = (
    0.6  # what a change of scale and shift must leave of the difference at most to be taken for one
)


def percentile_range(map: np.ndarray) -> tuple[float, float]:
    """Measure what a frame's colours shall span: its percentiles `TAIL` and 100 - `TAIL`.

    Args:
        map: (H, W) finite float.

    Example:
        >>> low, high = spread(np.linspace(0, 1, 10_001).reshape(1, -1))
        >>> round(low, 4), round(high, 4)
        (0.001, 0.999)
    """
    flat = map.ravel()
    sample = flat[:: -(-flat.size // _SAMPLE_PX)]
    low, high = np.percentile(sample, (TAIL_PERCENT, 100 - TAIL_PERCENT))
    return float(low), float(high)


class SmoothedRange:
    """A range that follows the frames, out quickly and in slowly; it looks at no later frame."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._range: tuple[float, float] | None = None

    def update(self, low: float, high: float, seconds: float) -> tuple[float, float]:
        """Take a frame's range and the seconds since the last one; return the range to show the frame in."""
        if self._range is None:
            self._range = (low, high)
        else:
            before_low, before_high = self._range
            self._range = (
                before_low + _update_rate(low < before_low, seconds) * (low - before_low),
                before_high + _update_rate(high > before_high, seconds) * (high - before_high),
            )
        return self._range


def _update_rate(outward: bool, seconds: float) -> float:
    return float(-np.expm1(-max(seconds, 0.0) / (ATTACK_S if outward else RELEASE_S)))


class TemporalSmoother:
    """Averages each map with those before it, where the picture holds still.

    A disparity is known up to a scale and a shift only, and they may wobble from frame to frame. So each map is
    first brought to the scale and shift of the one before, as they are where the picture held still, if that
    explains the difference of the two: robustly, by means and standard deviations of the maps as the network gave
    them, since a fit by least squares, or to the smoothed map, which has less noise, would shrink the result a
    little every frame. The correction leaks away at 10 % a frame, so that what changes slowly stays. Metres are left
    as they are. Then the result moves from the last one by 1 - strength where the picture held still, wholly where
    it moved. At a cut all starts anew.
    """

    def __init__(self, strength: float, *, align: bool) -> None:
        """Begin with nothing seen.

        Args:
            strength: 0 to below 1; share of the last result.
            align: bring each map to the last one's scale and shift.
        """
        self._strength, self._align = strength, align
        self._gain, self._offset = 1.0, 0.0
        self._last: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # grey picture, map, smooth map

    def __call__(self, image: np.ndarray, map: np.ndarray) -> np.ndarray:
        """Smooth the next map.

        Args:
            image: uint8 (H, W, 3), RGB, of the frame.
            map: float32 (H, W).

        Returns:
            float32 (H, W).
        """
        grey = cv2.blur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (5, 5))
        smooth = map
        if self._last is not None:
            grey_before, map_before, smooth_before = self._last
            change = cv2.absdiff(grey, grey_before).astype(np.float32) / _STILL_TOLERANCE
            still = np.exp(-change * change)
            if still.mean() < _MIN_STILL_SHARE:
                self._gain, self._offset = 1.0, 0.0
            else:
                if self._align:
                    self._follow(map, map_before, still)
                    smooth = np.float32(self._gain) * map + np.float32(self._offset)
                smooth = smooth + (self._strength * still) * (smooth_before - smooth)
        self._last = (grey, map, smooth)
        return smooth

    def _follow(self, map: np.ndarray, before: np.ndarray, still: np.ndarray) -> None:
        """Carry the correction on from the map before to this one."""
        step = int(np.ceil(np.sqrt(map.size / _SAMPLE_PX)))
        held = still[::step, ::step] > 0.5
        gain, offset = _fit_scale_shift(map[::step, ::step][held], before[::step, ::step][held])
        self._offset += self._gain * offset
        self._gain *= gain
        self._gain **= 1 - _LEAK
        self._offset *= 1 - _LEAK


def _fit_scale_shift(map: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """Fit gain * map + offset to `before`, robustly; (1, 0) where that explains little of the difference."""
    usual = float(np.median(np.abs(map - before))) if map.size else 0.0
    gain, offset, kept = 1.0, 0.0, np.ones(map.shape, bool)
    for _ in range(3):
        deviation, deviation_before = float(map[kept].std()) if kept.any() else 0.0, float(before[kept].std())
        if min(deviation, deviation_before) <= 0:
            return 1.0, 0.0
        gain = float(np.clip(deviation_before / deviation, 0.5, 2.0))
        offset = float(before[kept].mean()) - gain * float(map[kept].mean())
        left = np.abs(gain * map + offset - before)
        kept = left <= 2.5 * np.median(left)
    return (gain, offset) if float(np.median(left)) < _MAX_RESIDUAL_SHARE * usual else (1.0, 0.0)


class MapCache:
    """Maps kept on disk between two passes, exact, in a file without a name that goes with the process."""

    def __init__(self, folder: Path, shape: tuple[int, int], *, most_bytes: int = MAX_CACHE_BYTES) -> None:
        """Open a spool.

        Args:
            folder: on whose disk; at most half of what is free there is used.
            shape: of the maps, which are float32.
            most_bytes: how much to keep.
        """
        self._shape, self._bytes = shape, 4 * shape[0] * shape[1]
        self._most = min(most_bytes, shutil.disk_usage(folder).free // 2) // self._bytes
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.count = 0

    def __enter__(self) -> "MapCache":
        """Return itself; leaving gives the disk back."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the disk back."""
        self._file.close()

    def append(self, map: np.ndarray) -> bool:
        """Keep a map, if there is room: from the first that is not kept on, none is."""
        if self.count >= self._most:
            return False
        self._file.seek(self.count * self._bytes)
        self._file.write(np.ascontiguousarray(map, np.float32).data)
        self.count += 1
        return True

    def read(self, number: int) -> np.ndarray:
        """Read a map back."""
        self._file.seek(number * self._bytes)
        return np.frombuffer(self._file.read(self._bytes), np.float32).reshape(self._shape).copy()
