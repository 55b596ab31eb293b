"""Frames of films at a steady rate, upright, as JPEG: how BDD100K's videos become images."""

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
"""Frames a second. BDD100K's 100,000 films of 40 s then give 8 million, which is what the paper counts."""

JPEG_QUALITY = 95
MAX_HOURS = 24  # a header may claim anything, and each second is two lines of a listing

_NOT_INSTALLED = "PyAV is not installed: type  pip install 'depth-anything-train[video]'"


def count_frames(path: Path) -> int:
    """Say how many frames a film gives, by the length that its header tells.

    Raises:
        ValueError: It is no film, or its length is not told; or PyAV is missing.
        OSError: Its disk fails.
    """
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
    """Decode the frame shown at `number` / RATE seconds, as a JPEG file.

    Frames asked for in their order cost one pass over the film.

    Raises:
        ValueError: The film is damaged, or ends before.
        OSError: Its disk fails.
    """
    film = _cached_decoder(str(path), os.getpid())
    if number <= film.last:
        _cached_decoder.cache_clear()
        film = _cached_decoder(str(path), os.getpid())
    try:
        image = film.frame(number)
    except ValueError:
        if film.is_checked:
            raise
        _check_disk_readable(path)
        _cached_decoder.cache_clear()
        film = _cached_decoder(str(path), os.getpid())
        film.is_checked = True
        image = film.frame(number)
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


class _ForwardDecoder:
    """A film that is decoded forward.

    Attributes:
        last: The frame that was asked for last.
        is_checked: Its disk gave all of it, so that what cannot be decoded is damaged.
    """

    is_checked = False

    def __init__(self, path: str) -> None:
        from depth_anything.data.video_reader import VideoFaults, read_frames

        self._container = _open_video(Path(path))
        self.last = -1
        stream = _video_stream(self._container)
        stream.thread_type = "SLICE"  # workers have a core each
        self._step = 1 / Fraction(stream.average_rate or FRAMES_PER_SECOND)
        self._start = (stream.start_time or 0) * Fraction(stream.time_base)
        self._frames = read_frames(self._container, stream, rate=1 / self._step, faults=VideoFaults())
        self._shown: Any = None
        self._next: Any = None

    def __del__(self) -> None:
        if hasattr(self, "_container"):
            self._container.close()

    def frame(self, number: int) -> np.ndarray:
        """Return the frame that is on the screen at this time, uint8 (H, W, 3) RGB, upright."""
        from depth_anything.data.video_reader import apply_display_matrix

        time, self.last = float(self._start) + number / FRAMES_PER_SECOND, number
        while self._next is None or float(self._next[0]) <= time + 1e-6:
            if self._next is not None:
                self._shown = self._next
            self._next = next(self._frames, None)
            if self._next is None:
                if self._shown is None or time >= self._end_of_last():
                    raise ValueError(f"the film ends before {number / FRAMES_PER_SECOND:g} s")
                break
        shown: Any = self._shown or self._next
        return apply_display_matrix(shown[1].to_ndarray(format="rgb24"), shown[1])

    def _end_of_last(self) -> float:
        """Return when the last frame leaves the screen, in seconds."""
        time, frame = self._shown
        lasts = frame.duration * frame.time_base if frame.duration and frame.time_base else self._step
        return float(time + lasts)


@lru_cache(maxsize=1)
def _cached_decoder(path: str, process: int) -> _ForwardDecoder:
    return _ForwardDecoder(path)


def _open_video(path: Path) -> Any:
    try:
        from depth_anything.data.video_reader import open_video
    except ImportError as error:
        raise ValueError(_NOT_INSTALLED) from error
    path.stat()  # one that is gone is no damaged film
    try:
        return open_video(path)
    except ValueError:
        _check_disk_readable(path)
        return open_video(path)


def _check_disk_readable(path: Path) -> None:
    """Read a film that cannot be decoded, which raises OSError if its disk fails: FFmpeg says the same of damage."""
    if path.is_file():  # to open a pipe is to wait for ever
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass


def _video_stream(container: Any) -> Any:
    from depth_anything.data.video_reader import list_streams

    return list_streams(container)[0]
