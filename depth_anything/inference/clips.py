"""Moving pictures in: video files through PyAV, folders of frames, lists and folders of either.

A clip is read frame by frame and never held: memory does not grow with its length. Its clock is a fraction and
every frame keeps its own time, so that neither 29.97 nor a variable frame rate drifts from the sound.
"""

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from depth_anything.data.sample import decode_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}
"""What a frame of a folder ends in."""

_NO_FILM = {"image2", "tty", "hls", "concat", "lrc", "srt", "webvtt"}
"""What FFmpeg opens too: pictures and texts, and playlists, which would lead it to other files."""

_UNSPECIFIED, _BT709 = 2, 1  # AVColorSpace
_HD_LINES = 720  # from here on video that does not say is BT.709, below BT.601, as players take it
_EARLY_S, _EARLY = 0.25, 0.05  # seconds, or share, by which pictures may end before the file says
_FINEST = 1 << 24  # ticks a second, at most


class Picture(NamedTuple):
    """A frame: uint8 (H, W, 3) RGB, upright; its time in ticks of its clip; what its own files are called."""

    image: np.ndarray
    pts: int
    name: str


class Sound(Protocol):
    """Where the audio of a clip goes."""

    def add_audio(self, stream: Any) -> None:
        """Make room for a stream, before the first picture."""

    def write_audio(self, packet: Any, start: Fraction) -> None:
        """Take a packet; `start` seconds are its clip's zero."""


@dataclass
class Clip(ABC):
    """What is known of a clip before it is read.

    Attributes:
        name: its path as the list or the folder has it.
        path: the file, or the folder of its frames.
        height: of an upright frame, pixels.
        width: of an upright frame, pixels.
        rate: frames a second.
        time_base: seconds a tick.
        frames: how many there should be, None if the file does not say.
        pixel_aspect: width of a pixel over its height.
        notes: what went otherwise than it should, filled while reading.
    """

    name: str
    path: Path
    height: int = 0
    width: int = 0
    rate: Fraction = Fraction(24)
    time_base: Fraction = Fraction(1, 24)
    frames: int | None = None
    pixel_aspect: Fraction = Fraction(1)
    notes: list[str] = field(default_factory=list)

    @abstractmethod
    def read(self, sound: Sound | None = None) -> Iterator[Picture]:
        """Yield the frames in order; the audio goes to `sound` on the way, as it lies in the file."""


class VideoFile(Clip):
    """A video file: its first video stream that is no cover picture."""

    def __init__(self, name: str, path: Path) -> None:
        """Look at a file.

        Raises:
            ValueError: it is none, or no video, or one without a frame that can be decoded.
        """
        super().__init__(name, path)
        self._start = self._first = Fraction(0)
        self._reformatter = VideoReformatter()
        with self._opened() as (container, stream):
            self.rate = Fraction(stream.guessed_rate or stream.average_rate or 24)
            self.time_base, self._grid = _clock(Fraction(stream.time_base), self.rate, stream.average_rate)
            self.frames = stream.frames or None
            self._said = self.frames is not None
            self._seconds = float(container.duration or 0) / 1e6
            if not self.frames:
                self.frames = round(self._seconds * self.rate) or None
            if container.start_time is not None:
                self._start = Fraction(container.start_time, 1_000_000)
            first = next(self._decoded(container, [stream]), None)
            if first is None:
                raise ValueError("not a single frame of it can be decoded")
            self._turns = _quarter_turns(first)
            self._size = (first.height, first.width)
            self.height, self.width = self._size if self._turns % 2 == 0 else self._size[::-1]
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.pixel_aspect = aspect if self._turns % 2 == 0 else 1 / aspect
        self.notes.clear()

    def read(self, sound: Sound | None = None) -> Iterator[Picture]:
        """Yield the frames in order; the audio goes to `sound` on the way, not decoded.

        A file that is cut short or damaged gives the frames that it has; `notes` then says how many.
        """
        self.notes.clear()
        last = done = -1
        with self._opened() as (container, stream):
            streams = [stream]
            if sound is not None:
                for audio in container.streams.audio:
                    if audio.codec_context is not None:
                        sound.add_audio(audio)
                        streams.append(audio)
            for done, frame in enumerate(self._decoded(container, streams, sound)):
                last = max(self._ticks(frame, done), last + 1)
                yield Picture(self._rgb(frame), last, f"{done + 1:06d}")
        if self._said and done + 1 < (self.frames or 0) and self._is_short():
            self.notes.append(f"cut short: it has {done + 1} of {self.frames} frames")
        elif not self._said:
            self._note_early_end(float((last + 1) * self.time_base), done + 1)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        if not self.path.is_file():
            raise ValueError("there is no such file")
        try:
            # an absolute path is never taken for an address; and nothing a file names is fetched
            container = av.open(os.path.abspath(self.path), options={"protocol_whitelist": "file"})
        except (av.FFmpegError, ValueError) as error:
            raise ValueError(f"not a video, or cut off before its index ({_reason(error)})") from error
        with container:
            kind = container.format.name
            if kind == "image2" or kind.endswith("_pipe"):
                raise ValueError("a picture, not a video: for pictures type  depth-anything predict")
            videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not videos or kind in _NO_FILM or videos[0].codec_context is None:
                raise ValueError("there is no video in it")
            videos[0].thread_type = "AUTO"
            yield container, videos[0]

    def _decoded(self, container: Any, streams: list[Any], sound: Sound | None = None) -> Iterator[Any]:
        packets, lost = container.demux(streams), 0
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                if packet.stream.type == "audio":
                    if sound is not None and packet.dts is not None:
                        sound.write_audio(packet, self._start)
                    continue
            except av.FFmpegError as error:
                self.notes.append(f"cut short ({_reason(error)})")
                break
            try:
                yield from packet.decode()
            except av.FFmpegError:
                lost += 1
        if lost:
            self.notes.append(f"damaged: {lost} packets could not be decoded")

    def _ticks(self, frame: Any, number: int) -> int:
        if frame.pts is None:
            return round(number / (self.rate * self.time_base))
        seconds = frame.pts * Fraction(frame.time_base) - self._start
        if number == 0:
            self._first = seconds
        if self._grid:  # what a coarse tick rounded, as Matroska's milliseconds, goes back to where it was
            exact = self._first + round((seconds - self._first) * self.rate) / self.rate
            if abs(exact - seconds) < Fraction(frame.time_base):
                seconds = exact
        return round(seconds / self.time_base)

    def _rgb(self, frame: Any) -> np.ndarray:
        height, width = self._size
        said = int(frame.colorspace) != _UNSPECIFIED
        image = self._reformatter.reformat(
            frame,
            format="rgb24",
            width=width,
            height=height,
            src_colorspace=None if said or height < _HD_LINES else _BT709,
            threads=1,  # to start more takes longer than they save
        ).to_ndarray()
        return np.ascontiguousarray(np.rot90(image, self._turns)) if self._turns else image

    def _note_early_end(self, end: float, count: int) -> None:
        missing = self._seconds - end - float(1 / self.rate)
        if missing > max(_EARLY_S, _EARLY * self._seconds):
            self.notes.append(f"its pictures end early: {count} frames, {end:.2f} s of {self._seconds:.2f} s")

    def _is_short(self) -> bool:
        """Tell a file that lost its end from one whose edit list leaves frames out."""
        with self._opened() as (_, stream):
            entries = stream.index_entries
            last = max((entry.pos + entry.size for entry in entries), default=0)
        return bool(self.notes) or last > self.path.stat().st_size


class FrameFolder(Clip):
    """A folder of frames, in natural order: 2.png comes before 10.png."""

    def __init__(self, name: str, path: Path, files: list[str], *, rate: Fraction) -> None:
        """Look at the first frame.

        Raises:
            ValueError: it cannot be read.
        """
        self._files = sorted(files, key=natural_key)
        first = self._decode(path, self._files[0])
        height, width = first.shape[:2]
        super().__init__(name, path, height, width, rate, 1 / rate, frames=len(files))
        stems = [Path(file).stem for file in self._files]
        self._stems = (
            stems if len(set(stems)) == len(files) else [f"{n:06d}" for n in range(1, len(files) + 1)]
        )

    def read(self, sound: Sound | None = None) -> Iterator[Picture]:
        """Yield the frames; there is no audio.

        Raises:
            ValueError: a frame cannot be read or is of another size; it is named.
        """
        self.notes[:] = _gaps(self._files)
        for number, file in enumerate(self._files):
            image = self._decode(self.path, file)
            if image.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"its frame {file} is {image.shape[1]}×{image.shape[0]}, the first is {self.width}×{self.height}"
                )
            yield Picture(image, number, self._stems[number])

    @staticmethod
    def _decode(folder: Path, file: str) -> np.ndarray:
        try:
            return decode_image((folder / file).read_bytes())
        except ValueError as error:
            raise ValueError(f"its frame {file} cannot be read: {error}") from error


def list_clips(
    source: str | Path, *, rate: Fraction = Fraction(24), leave_out: str | Path | None = None
) -> tuple[list[Clip], dict[str, str]]:
    """Find the clips of a video file, a folder or a list.

    A folder is searched with all below it; a folder that holds images and no video is one clip, its frames. A
    list is a .txt with a path a line, relative to it; a line may name a video or a folder of frames.

    Args:
        source: the file, folder or list.
        rate: frames a second of folders of frames.
        leave_out: a folder to pass over: the one that is being written.

    Returns:
        The clips, by name, and per skipped file why.

    Raises:
        ValueError: there is nothing at `source`, or no clip among it.
    """
    path = Path(source)
    clips: list[Clip] = []
    skipped: dict[str, str] = {}
    if not path.exists():
        raise ValueError(f"{source} does not exist: give a video, a folder of videos or of frames, or a list")
    if path.is_dir():
        _from_folder(path, Path(leave_out).resolve() if leave_out else None, rate, clips, skipped)
    elif path.suffix.lower() == ".txt":
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                _from_line(line.strip(), path.parent / line.strip(), rate, clips, skipped)
    else:
        _add(clips, skipped, path.name, lambda: VideoFile(path.name, path))
    if not clips:
        first = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"no video in {source} ({first or 'it is empty'})")
    return sorted(clips, key=lambda clip: natural_key(clip.name)), skipped


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort names as people do: by their numbers where they have numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts]


def parse_rate(text: str) -> Fraction:
    """Read frames a second: 24, 30000/1001, or 29.97 and its like, which mean the 1001st.

    Raises:
        ValueError: it is no number above 0.

    Example:
        >>> parse_rate("23.976"), parse_rate("25")
        (Fraction(24000, 1001), Fraction(25, 1))
    """
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise ValueError(f"{text!r} is no number of frames a second; give one as 24, 29.97 or 30000/1001")
    slowed = Fraction(math.ceil(rate) * 1000, 1001)
    return slowed if "." in text and abs(rate - slowed) < Fraction(1, 200) else rate


def _from_folder(
    root: Path, leave_out: Path | None, rate: Fraction, clips: list[Clip], skipped: dict[str, str]
) -> None:
    for here, folders, files in os.walk(root):
        folder = Path(here)
        folders[:] = [name for name in folders if leave_out is None or (folder / name).resolve() != leave_out]
        images = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        before = len(clips)
        for name in sorted(set(files) - set(images)):
            _from_line((folder / name).relative_to(root).as_posix(), folder / name, rate, clips, skipped)
        inside = folder.relative_to(root).as_posix()
        if images and len(clips) == before:
            title = folder.resolve().name if folder == root else inside
            _add(clips, skipped, title, lambda: FrameFolder(title, folder, images, rate=rate))  # noqa: B023
        else:
            for name in images:
                skipped[(folder / name).relative_to(root).as_posix()] = "a picture beside a video"


def _from_line(name: str, path: Path, rate: Fraction, clips: list[Clip], skipped: dict[str, str]) -> None:
    if path.is_dir():
        images = [file.name for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        if images:
            _add(clips, skipped, name, lambda: FrameFolder(name, path, images, rate=rate))
        else:
            skipped[name] = "a folder without frames"
    else:
        _add(clips, skipped, name, lambda: VideoFile(name, path))


def _add(clips: list[Clip], skipped: dict[str, str], name: str, look: Any) -> None:
    try:
        clips.append(look())
    except (ValueError, OSError) as error:
        skipped[name] = str(error)


def _clock(time_base: Fraction, rate: Fraction, average: Fraction | None) -> tuple[Fraction, bool]:
    """Choose a tick in which all the file's times are whole, and those of the exact rate, too."""
    if (1 / rate / time_base).denominator == 1:
        return time_base, False
    finest = math.lcm(time_base.denominator, rate.numerator)
    steady = average is None or abs(average - rate) < rate / 100
    return (Fraction(1, finest), True) if steady and finest <= _FINEST else (time_base, False)


def _quarter_turns(frame: Any) -> int:
    """How often the picture has to be turned counterclockwise, as its metadata has it."""
    return round((frame.rotation or 0) / 90) % 4


def _gaps(files: list[str]) -> list[str]:
    found = [re.findall(r"\d+", Path(file).stem) for file in files]
    if not all(found):
        return []
    numbers = [int(digits[-1]) for digits in found]
    missing = numbers[-1] - numbers[0] + 1 - len(numbers)
    return [f"{missing} numbers between its first frame and its last are missing"] if missing > 0 else []


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
