"""Temporal stability of video maps: one color range for many frames, smoothing, and a disk cache for a second pass.

Smoothing and running ranges look at past frames only; a range over the whole clip takes two passes.
"""

import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

RANGE_MODES = ("clip", "running", "frame")

TAIL_PERCENT = 0.1
"""Percent of a frame's pixels outside the range at either end, so that a few outliers do not set the colors."""

ATTACK_S, RELEASE_S = 0.1, 2.0
"""Time constants with which a running range widens and narrows."""

MAX_CACHE_BYTES = 8 << 30
"""Maximum size of the maps of a first pass on disk."""

_SAMPLE_PX = 1 << 16  # number of pixels that percentiles and fits are computed from
_STILL_TOLERANCE = 6.0  # gray levels (of 255) by which a pixel without motion may change
_MIN_STILL_SHARE = 0.05  # below this share of pixels without motion it is a cut
_LEAK = 0.1  # share of the accumulated correction that is forgotten per frame
_MAX_RESIDUAL_SHARE = 0.6  # share of the difference that may remain after a fit for the fit to be accepted


def percentile_range(map: np.ndarray) -> tuple[float, float]:
    """Compute the color range of a frame: the percentiles `TAIL_PERCENT` and 100 - `TAIL_PERCENT`.

    Args:
        map: (H, W) finite float.

    Example:
        >>> low, high = percentile_range(np.linspace(0, 1, 10_001).reshape(1, -1))
        >>> round(low, 4), round(high, 4)
        (0.001, 0.999)
    """
    flat = map.ravel()
    sample = flat[:: -(-flat.size // _SAMPLE_PX)]
    low, high = np.percentile(sample, (TAIL_PERCENT, 100 - TAIL_PERCENT))
    return float(low), float(high)


class SmoothedRange:
    """A color range that follows the frames exponentially: it widens quickly and narrows slowly."""

    def __init__(self) -> None:
        """Start without a range."""
        self._range: tuple[float, float] | None = None

    def update(self, low: float, high: float, seconds: float) -> tuple[float, float]:
        """Return the range to show a frame in, from the frame's own range and the seconds since the last frame."""
        if self._range is None:
            self._range = (low, high)
        else:
            before_low, before_high = self._range
            self._range = (
                before_low + _update_rate(low < before_low, seconds) * (low - before_low),
                before_high + _update_rate(high > before_high, seconds) * (high - before_high),
            )
        return self._range


def _update_rate(widens: bool, seconds: float) -> float:
    return float(-np.expm1(-max(seconds, 0.0) / (ATTACK_S if widens else RELEASE_S)))


class TemporalSmoother:
    """Exponential average of each map with the previous result, where the image does not move.

    Disparity is known up to scale and shift, which may vary from frame to frame. Each map is therefore first aligned
    to the previous one: scale and shift are fitted where the image did not move, and accepted only if they explain
    most of the difference. The fit compares means and standard deviations of the network's own maps. Least squares,
    or a fit to the smoothed map with its lower noise, would shrink the result a little every frame. 10 % of the
    accumulated correction is forgotten per frame, so that slow real changes remain. Depth in meters is not aligned.

    The result then moves from the previous one by 1 - strength where the image did not move, and fully where it did.
    A cut resets the state.
    """

    def __init__(self, strength: float, *, align: bool) -> None:
        """Start without a previous frame.

        Args:
            strength: Weight of the previous result, 0 to below 1.
            align: Align each map to the previous one in scale and shift.
        """
        self._strength, self._align = strength, align
        self._scale, self._shift = 1.0, 0.0
        self._previous: tuple[np.ndarray, np.ndarray, np.ndarray] | None = (
            None  # gray image, map, smoothed map
        )

    def __call__(self, image: np.ndarray, map: np.ndarray) -> np.ndarray:
        """Smooth the map of the next frame.

        Args:
            image: uint8 (H, W, 3), RGB.
            map: float32 (H, W).

        Returns:
            float32 (H, W).
        """
        gray = cv2.blur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (5, 5))
        smooth = map
        if self._previous is not None:
            gray_before, map_before, smooth_before = self._previous
            change = cv2.absdiff(gray, gray_before).astype(np.float32) / _STILL_TOLERANCE
            still = np.exp(-change * change)
            if still.mean() < _MIN_STILL_SHARE:
                self._scale, self._shift = 1.0, 0.0
            else:
                if self._align:
                    self._update_alignment(map, map_before, still)
                    smooth = np.float32(self._scale) * map + np.float32(self._shift)
                smooth = smooth + (self._strength * still) * (smooth_before - smooth)
        self._previous = (gray, map, smooth)
        return smooth

    def _update_alignment(self, map: np.ndarray, before: np.ndarray, still: np.ndarray) -> None:
        """Chain the correction of the previous map with the fit of this map to it."""
        step = int(np.ceil(np.sqrt(map.size / _SAMPLE_PX)))
        mask = still[::step, ::step] > 0.5
        scale, shift = _fit_scale_shift(map[::step, ::step][mask], before[::step, ::step][mask])
        self._shift += self._scale * shift
        self._scale *= scale
        self._scale **= 1 - _LEAK
        self._shift *= 1 - _LEAK


def _fit_scale_shift(map: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """Fit scale * map + shift to `before` without outliers; (1, 0) if that explains little of the difference."""
    difference = float(np.median(np.abs(map - before))) if map.size else 0.0
    scale, shift, inliers = 1.0, 0.0, np.ones(map.shape, bool)
    for _ in range(3):
        std, std_before = float(map[inliers].std()) if inliers.any() else 0.0, float(before[inliers].std())
        if min(std, std_before) <= 0:
            return 1.0, 0.0
        scale = float(np.clip(std_before / std, 0.5, 2.0))
        shift = float(before[inliers].mean()) - scale * float(map[inliers].mean())
        residual = np.abs(scale * map + shift - before)
        inliers = residual <= 2.5 * np.median(residual)
    return (scale, shift) if float(np.median(residual)) < _MAX_RESIDUAL_SHARE * difference else (1.0, 0.0)


class MapCache:
    """Float32 maps of a first pass in an unnamed temporary file, which disappears with the process."""

    def __init__(self, folder: Path, shape: tuple[int, int], *, max_bytes: int = MAX_CACHE_BYTES) -> None:
        """Open an empty cache.

        Args:
            folder: Folder whose disk is used; at most half of its free space.
            shape: (H, W) of the maps.
            max_bytes: Maximum size.
        """
        self._shape, self._map_bytes = shape, 4 * shape[0] * shape[1]
        self._capacity = min(max_bytes, shutil.disk_usage(folder).free // 2) // self._map_bytes
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.count = 0

    def __enter__(self) -> "MapCache":
        """Return itself; leaving frees the disk space."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the disk space."""
        self._file.close()

    def append(self, map: np.ndarray) -> bool:
        """Store a map and return True; return False once the cache is full."""
        if self.count >= self._capacity:
            return False
        self._file.seek(self.count * self._map_bytes)
        self._file.write(np.ascontiguousarray(map, np.float32).data)
        self.count += 1
        return True

    def read(self, index: int) -> np.ndarray:
        """Read a stored map."""
        self._file.seek(index * self._map_bytes)
        return np.frombuffer(self._file.read(self._map_bytes), np.float32).reshape(self._shape).copy()
