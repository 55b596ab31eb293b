"""Frames of films at a steady rate, upright, as JPEG: how BDD100K's videos become images."""

import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

FILMS = (".mov", ".mp4", ".avi", ".mkv", ".webm", ".m4v")
RATE = 2
"""Frames a second. BDD100K's 100,000 films of 40 s then give 8 million, which is what the paper counts."""

JPEG_QUALITY = 95
MAX_HOURS = 24  # a header may claim anything, and each second is two lines of a listing

_NOT_INSTALLED = "PyAV is not installed: type  pip install 'depth-anything-train[video]'"


def count_frames(path: Path) -> int:
    """Say how many frames a film gives, by the length that its header tells.

    Raises:
        ValueError: It is no film, or its length is not told; or PyAV is missing.
    """
    with _open(path) as container:
        stream = _picture(container)
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / 1e6
        else:
            raise ValueError("the film does not tell its length")
    if seconds > MAX_HOURS * 3600:
        raise ValueError(f"the film says that it lasts {seconds / 3600:.0f} hours, more than {MAX_HOURS}")
    return max(1, math.floor(seconds * RATE))


def read_frame(path: Path, number: int) -> bytes:
    """Decode the frame shown at `number` / RATE seconds, as a JPEG file.

    Frames asked for in their order cost one pass over the film.

    Raises:
        ValueError: The film is damaged, or ends before.
    """
    film = _film(str(path), os.getpid())
    if number <= film.last:
        _film.cache_clear()
        film = _film(str(path), os.getpid())
    image = film.frame(number)
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


class _Film:
    """A film that is decoded forward."""

    def __init__(self, path: str) -> None:
        self._container = _open(Path(path))
        self.last = -1
        stream = _picture(self._container)
        stream.thread_type = "SLICE"  # workers have a core each
        self._rate = stream.average_rate
        self._start = float((stream.start_time or 0) * stream.time_base)
        self._frames = self._container.decode(stream)
        self._shown: Any = None
        self._next: Any = None

    def __del__(self) -> None:
        if hasattr(self, "_container"):
            self._container.close()

    def frame(self, number: int) -> np.ndarray:
        """Return the frame that is on the screen at this time, uint8 (H, W, 3) RGB, upright."""
        time, self.last = self._start + number / RATE, number
        while self._next is None or _time(self._next) <= time + 1e-6:
            if self._next is not None:
                self._shown = self._next
            self._next = self._following()
            if self._next is None:
                if self._shown is None or time >= _time(self._shown) + self._lasts(self._shown):
                    raise ValueError(f"the film ends before {number / RATE:g} s")
                break
        shown: Any = self._next if self._shown is None else self._shown
        turns = round((shown.rotation or 0) / 90) % 4
        return np.ascontiguousarray(np.rot90(shown.to_ndarray(format="rgb24"), turns))

    def _lasts(self, frame: Any) -> float:
        """Return the seconds that the last frame stays on the screen."""
        if frame.duration:
            return float(frame.duration * frame.time_base)
        return float(1 / self._rate) if self._rate else 0.0

    def _following(self) -> Any:
        import av

        try:
            return next(self._frames, None)
        except (av.FFmpegError, EOFError) as error:
            raise ValueError(f"the film is damaged: {error}") from error


@lru_cache(maxsize=1)
def _film(path: str, process: int) -> _Film:
    return _Film(path)


def _open(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError(_NOT_INSTALLED) from error
    try:
        return av.open(str(path))
    except FileNotFoundError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"not a film that can be read: {error}") from error


def _picture(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("the file has no picture")
    return container.streams.video[0]


def _time(frame: Any) -> float:
    return frame.time if frame.time is not None else 0.0
