"""Frames of videos at a fixed rate, upright, as JPEG files. This is how BDD100K's videos become images."""

import math
import os
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

VIDEO_SUFFIXES = (".mov", ".mp4", ".avi", ".mkv", ".webm", ".m4v")
FRAMES_PER_SECOND = 2
"""With 2 frames per second, BDD100K's 100,000 videos of 40 s give 8 million images, as the paper counts them."""

JPEG_QUALITY = 95
MAX_HOURS = 24
"""Limit of a video's duration, because a header may claim any duration, and each second is two lines of a list."""


def count_frames(path: Path) -> int:
    """Return the number of frames that a video gives, computed from the duration in its header.

    Raises:
        ValueError: The file is not a video, its header has no duration, or PyAV is missing.
        OSError: The disk fails.
    """
    # The reasons are part of the file list, which is hashed: do not change them.
    with _open_video(path) as container:
        stream = _video_stream(container)
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / 1e6
        else:
            raise ValueError("the film does not tell its length")
    if seconds > MAX_HOURS * 3600:
        raise ValueError(f"the film says that it lasts {seconds / 3600:.0f} hours, more than {MAX_HOURS}")
    return max(1, math.floor(seconds * FRAMES_PER_SECOND))


def read_frame(path: Path, number: int) -> bytes:
    """Decode the frame that is on the screen at `number` / FRAMES_PER_SECOND seconds, as a JPEG file.

    Reading the frames in order decodes the video once.

    Raises:
        ValueError: The video is damaged, or ends earlier.
        OSError: The disk fails.
    """
    decoder = _cached_decoder(str(path), os.getpid())
    if number <= decoder.last_number:
        decoder = _restart(path)
    try:
        image = decoder.decode(number)
    except ValueError:
        if decoder.disk_checked:
            raise
        _check_disk_readable(path)
        decoder = _restart(path)
        decoder.disk_checked = True
        image = decoder.decode(number)
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


class _ForwardDecoder:
    """Decodes a video from front to back.

    Attributes:
        last_number: Number of the frame that was requested last.
        disk_checked: The whole file was read without an error, so decoding errors mean that it is damaged.
    """

    disk_checked = False

    def __init__(self, path: str) -> None:
        from depth_anything.data.video_reader import VideoFaults, read_frames

        self._container = _open_video(Path(path))
        self.last_number = -1
        stream = _video_stream(self._container)
        stream.thread_type = "SLICE"  # each worker process uses one core
        self._frame_s = 1 / Fraction(stream.average_rate or FRAMES_PER_SECOND)
        self._start = (stream.start_time or 0) * Fraction(stream.time_base)
        self._frames = read_frames(self._container, stream, rate=1 / self._frame_s, faults=VideoFaults())
        self._current: Any = None
        self._next: Any = None

    def __del__(self) -> None:
        if hasattr(self, "_container"):
            self._container.close()

    def decode(self, number: int) -> np.ndarray:
        """Return the frame on the screen at `number` / FRAMES_PER_SECOND s: uint8 (H, W, 3) RGB, upright."""
        from depth_anything.data.video_reader import apply_display_matrix

        time, self.last_number = float(self._start) + number / FRAMES_PER_SECOND, number
        while self._next is None or float(self._next[0]) <= time + 1e-6:
            if self._next is not None:
                self._current = self._next
            self._next = next(self._frames, None)
            if self._next is None:
                if self._current is None or time >= self._last_frame_end():
                    raise ValueError(f"the video ends before {number / FRAMES_PER_SECOND:g} s")
                break
        frame: Any = self._current or self._next
        return apply_display_matrix(frame[1].to_ndarray(format="rgb24"), frame[1])

    def _last_frame_end(self) -> float:
        """Return the time in seconds at which the last frame leaves the screen."""
        time, frame = self._current
        has_duration = frame.duration and frame.time_base
        return float(time + (frame.duration * frame.time_base if has_duration else self._frame_s))


@lru_cache(maxsize=1)
def _cached_decoder(path: str, process: int) -> _ForwardDecoder:
    return _ForwardDecoder(path)


def _restart(path: Path) -> _ForwardDecoder:
    _cached_decoder.cache_clear()
    return _cached_decoder(str(path), os.getpid())


def _open_video(path: Path) -> Any:
    try:
        from depth_anything.data.video_reader import open_video
    except ImportError as error:
        raise ValueError("PyAV is not installed: type  pip install 'depth-anything-train[video]'") from error
    path.stat()  # raises if the file is missing, which is not damage
    try:
        return open_video(path)
    except ValueError:
        _check_disk_readable(path)
        return open_video(path)


def _check_disk_readable(path: Path) -> None:
    """Read a video that cannot be decoded. Raises OSError if the disk fails; FFmpeg reports that as damage."""
    if path.is_file():  # opening a named pipe would block
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass


def _video_stream(container: Any) -> Any:
    from depth_anything.data.video_reader import list_streams

    return list_streams(container)[0]
