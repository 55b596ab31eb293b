"""Moving pictures in: video files through PyAV, folders of frames, lists and folders of either.

A clip is read frame by frame and never held: memory does not grow with its length. Its clock is a fraction and
every frame keeps its own time, so that neither 29.97 nor a variable frame rate drifts from the sound.
"""

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, WebPImagePlugin

from depth_anything.data.sample import decode_image
from depth_anything.data.video_reader import (
    MAX_PIXELS,
    PICTURE_MESSAGE,
    VideoFaults,
    apply_display_matrix,
    display_orientation,
    list_streams,
    open_video,
    read_frames,
)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}
"""What a frame of a folder ends in."""

VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".vob"),
    *(".ts", ".mts", ".m2ts", ".3gp", ".mxf", ".ogv", ".gif"),
}
"""What says that a file is meant to be a video. Others are videos, too, if they can be read as such."""

_UNSPECIFIED, _BT709 = 2, 1  # AVColorSpace
_HD_HEIGHT_PX = 720  # from here on video that does not say is BT.709, below BT.601, as players take it
_EARLY_S, _EARLY = 0.25, 0.05  # seconds, or share, by which pictures may end before the file says
_MAX_TICKS_PER_SECOND = 1 << 24  # ticks a second, at most
_MIN_TICKS_PER_FRAME = 32  # ticks a frame, at least: room for what a file puts at one time
_MAX_FRAME_RATE = 1000  # frames a second
_MAX_START_DELAY_S = 3600  # by which pictures may begin after the sound


class ClipFrame(NamedTuple):
    """A frame: uint8 (H, W, 3) RGB, upright; its time in ticks of its clip; what its own files are called."""

    image: np.ndarray
    pts: int
    name: str


class AudioSink(Protocol):
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
        incomplete: pictures that it should have are missing, told by reading.
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
    incomplete: bool = False

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [self.path]

    @abstractmethod
    def read(self, sound: AudioSink | None = None) -> Iterator[ClipFrame]:
        """Yield the frames in order; the audio goes to `sound` on the way, as it lies in the file."""


class VideoFile(Clip):
    """A video file: the video stream that players show; no cover picture."""

    def __init__(self, name: str, path: Path) -> None:
        """Look at a file.

        Raises:
            ValueError: it is none, or no video, or one without a frame that can be decoded.
        """
        super().__init__(name, path)
        self._first = Fraction(0)
        self._reformatter = VideoReformatter()
        with closing(open_video(path)) as container:
            indexes = [stream.index for stream in list_streams(container)]
        self._others = len(indexes) - 1
        if not any(self._look(index) for index in indexes):
            raise ValueError("not a single frame of it can be decoded")

    def _look(self, index: int) -> bool:
        """Take a stream's facts, if it gives a frame."""
        with closing(open_video(self.path)) as container:
            stream = container.streams[index]
            self._stream, self.rate = index, _frame_rate(stream)
            first, frame = next(
                read_frames(container, stream, rate=self.rate, faults=VideoFaults()), (Fraction(0), None)
            )
            if frame is None:
                return False
            self.time_base, self._grid = _choose_time_base(
                Fraction(stream.time_base), self.rate, stream.average_rate
            )
            self.frames = stream.frames or None
            self._said = self.frames is not None
            self._seconds = float(container.duration or 0) / 1e6
            if self._said and "mov" not in container.format.name:  # there, an edit list may leave some out
                self._seconds = max(self._seconds, float(stream.frames / self.rate))
            if not self.frames:
                self.frames = round(self._seconds * self.rate) or None
            self._start = _start_time(container, first)
            across = display_orientation(frame)[0]
            size = (frame.height, frame.width)
            self.height, self.width = size[::-1] if across else size
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.pixel_aspect = 1 / aspect if across else aspect
        return True

    def read(self, sound: AudioSink | None = None) -> Iterator[ClipFrame]:
        """Yield the frames in order; the audio goes to `sound` on the way, not decoded.

        A file that is cut short or damaged gives the frames that it has; `notes` then says how many.
        """
        self.notes.clear()
        self.incomplete = False
        self._sizes: set[tuple[int, int]] = set()
        faults, last, done, heard = VideoFaults(), -1, -1, Fraction(0)
        with closing(open_video(self.path)) as container:
            stream = container.streams[self._stream]
            stream.thread_type = "AUTO"
            tracks = [track for track in container.streams.audio if track.codec_context is not None]
            if sound:
                for track in tracks:
                    sound.add_audio(track)

            def on_packet(packet: Any) -> None:
                nonlocal heard
                if packet.dts is not None:
                    heard = max(heard, (packet.dts + (packet.duration or 0)) * packet.time_base - self._start)
                if sound:
                    sound.write_audio(packet, self._start)

            frames = read_frames(
                container, stream, rate=self.rate, faults=faults, sound=tracks, on_packet=on_packet
            )
            for done, (seconds, frame) in enumerate(frames):
                last = max(self._ticks(seconds, Fraction(stream.time_base), first=not done), last + 1)
                yield ClipFrame(self._rgb(frame), last, f"{done + 1:06d}")
        self._note_faults(faults, done + 1, end=(last + 1) * self.time_base, heard=heard)

    def _ticks(self, seconds: Fraction, tick: Fraction, *, first: bool) -> int:
        seconds -= self._start
        if first:
            self._first = seconds
        if self._grid:  # what a coarse tick rounded, as Matroska's milliseconds, goes back to where it was
            exact = self._first + round((seconds - self._first) * self.rate) / self.rate
            if abs(exact - seconds) < tick:
                seconds = exact
        return round(seconds / self.time_base)

    def _rgb(self, frame: Any) -> np.ndarray:
        self._sizes.add((frame.height, frame.width))
        across = display_orientation(frame)[0]
        height, width = (self.width, self.height) if across else (self.height, self.width)
        said = int(frame.colorspace) != _UNSPECIFIED
        image = self._reformatter.reformat(
            frame,
            format="rgb24",
            width=width,
            height=height,
            src_colorspace=None if said or frame.height < _HD_HEIGHT_PX else _BT709,
            threads=1,  # to start more takes longer than they save
        ).to_ndarray()
        return apply_display_matrix(image, frame)

    def _note_faults(self, faults: VideoFaults, count: int, *, end: Fraction, heard: Fraction) -> None:
        """Say what went otherwise than it should, and whether pictures are missing."""
        short = bool(faults.end or faults.lost)
        if faults.end:
            self.notes.append(f"cut short ({faults.end})")
        if faults.lost:
            self.notes.append(f"damaged: {faults.lost} packets could not be decoded")
        if faults.early:
            self.notes.append(f"its first {faults.early} packets need pictures before its beginning")
        least = self._seconds - max(_EARLY_S, _EARLY * self._seconds) - float(1 / self.rate)
        early = end < least and not (faults.jumps or faults.repaired_packets)
        cut = early and heard < least  # or else the sound goes on, and the pictures may well end here
        if self._said and count < (self.frames or 0) and (short or cut or self._lost_end()):
            short = True
            self.notes.append(f"cut short: it has {count} of {self.frames} frames")
        elif early and not self._said:
            short = short or cut
            self.notes.append(
                f"its pictures end early: {count} frames, {float(end):.2f} s of {self._seconds:.2f} s"
            )
        if faults.jumps:
            self.notes.append(
                f"its timestamps jump (times: {faults.jumps}): each part follows the one before"
            )
        if faults.repaired_packets:
            self.notes.append(f"wrong timestamps of packets ({faults.repaired_packets}) were put right")
        if len(self._sizes) > 1:
            sizes = ", ".join(f"{width}×{height}" for height, width in sorted(self._sizes))
            self.notes.append(
                f"its frames change size ({sizes}): all are scaled to {self.width}×{self.height}"
            )
        if self._others:
            self.notes.append(f"it has {self._others} more video streams, which are left out")
        self.incomplete = short

    def _lost_end(self) -> bool:
        """Tell a file that lost its end from one whose edit list leaves frames out."""
        with closing(open_video(self.path)) as container:
            entries = container.streams[self._stream].index_entries
            last = max((entry.pos + entry.size for entry in entries), default=0)
        return last > self.path.stat().st_size


class AnimatedWebP(Clip):
    """An animated WebP, which FFmpeg does not read."""

    def __init__(self, name: str, path: Path) -> None:
        """Look at a file.

        Raises:
            ValueError: it is damaged, too large, or a still picture.
        """
        super().__init__(name, path, time_base=Fraction(1, 1000))
        with self._opened() as picture:
            self.width, self.height = picture.size
            if self.width * self.height > MAX_PIXELS:
                raise ValueError(
                    f"its frames are {self.width}×{self.height}, more than {MAX_PIXELS / 1e6:g} megapixels"
                )
            self.frames = getattr(picture, "n_frames", 1)
            if self.frames == 1:
                raise ValueError(PICTURE_MESSAGE)
            self.rate = Fraction(1000, _frame_duration_ms(picture))

    def read(self, sound: AudioSink | None = None) -> Iterator[ClipFrame]:
        """Yield the frames, white where they are transparent; there is no audio."""
        self.notes.clear()
        self.incomplete, time = False, 0
        with self._opened() as picture:
            for number in range(self.frames or 0):
                try:
                    picture.seek(number)
                    image = picture.convert("RGBA")
                except (OSError, EOFError, ValueError):
                    self.incomplete = True
                    self.notes.append(f"cut short: it has {number} of {self.frames} frames")
                    return
                white = Image.new("RGBA", image.size, "white")
                yield ClipFrame(
                    np.asarray(Image.alpha_composite(white, image).convert("RGB")), time, f"{number + 1:06d}"
                )
                time += _frame_duration_ms(picture)

    def _opened(self) -> Image.Image:
        try:
            return WebPImagePlugin.WebPImageFile(self.path)
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise ValueError(f"a WebP that cannot be read ({error})") from error


class FrameFolder(Clip):
    """A folder of frames, in natural order: 2.png comes before 10.png."""

    def __init__(self, name: str, path: Path, files: list[str], *, rate: Fraction) -> None:
        """Look at the first frame.

        Raises:
            ValueError: it cannot be read.
        """
        self._files = sorted(files, key=natural_sort_key)
        first = self._decode(path, self._files[0])
        height, width = first.shape[:2]
        super().__init__(name, path, height, width, rate, 1 / rate, frames=len(files))
        stems = [Path(file).stem for file in self._files]
        self._stems = (
            stems if len(set(stems)) == len(files) else [f"{n:06d}" for n in range(1, len(files) + 1)]
        )

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [self.path / name for name in self._files]

    def read(self, sound: AudioSink | None = None) -> Iterator[ClipFrame]:
        """Yield the frames; there is no audio.

        Raises:
            ValueError: a frame cannot be read or is of another size; it is named.
        """
        self.notes[:] = _missing_frame_notes(self._files)
        for number, file in enumerate(self._files):
            image = self._decode(self.path, file)
            if image.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"its frame {file} is {image.shape[1]}×{image.shape[0]}, the first is {self.width}×{self.height}"
                )
            yield ClipFrame(image, number, self._stems[number])

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
        _add_folder(path, Path(leave_out).resolve() if leave_out else None, rate, clips, skipped)
    elif path.suffix.lower() == ".txt":
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                _add_path(line.strip(), path.parent / line.strip(), rate, clips, skipped)
    else:
        _add_if_readable(clips, skipped, path.name, lambda: _open_clip(path.name, path))
    if not clips:
        first = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"no video in {source} ({first or 'it is empty'})")
    return sorted(clips, key=lambda clip: natural_sort_key(clip.name)), skipped


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """Sort names as people do: by their numbers where they have numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts]


def parse_frame_rate(text: str) -> Fraction:
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


def _add_folder(
    root: Path, leave_out: Path | None, rate: Fraction, clips: list[Clip], skipped: dict[str, str]
) -> None:
    for here, folders, files in os.walk(root):
        folder = Path(here)
        folders[:] = [name for name in folders if leave_out is None or (folder / name).resolve() != leave_out]
        images = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        before = len(clips)
        for name in sorted(set(files) - set(images)):
            _add_path((folder / name).relative_to(root).as_posix(), folder / name, rate, clips, skipped)
        inside = folder.relative_to(root).as_posix()
        if images and len(clips) == before:
            title = folder.resolve().name if folder == root else inside
            _add_if_readable(clips, skipped, title, lambda: FrameFolder(title, folder, images, rate=rate))  # noqa: B023
        else:
            for name in images:
                skipped[(folder / name).relative_to(root).as_posix()] = "a picture beside a video"


def _add_path(name: str, path: Path, rate: Fraction, clips: list[Clip], skipped: dict[str, str]) -> None:
    if path.is_dir():
        images = [file.name for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        if images:
            _add_if_readable(clips, skipped, name, lambda: FrameFolder(name, path, images, rate=rate))
        else:
            skipped[name] = "a folder without frames"
    else:
        _add_if_readable(clips, skipped, name, lambda: _open_clip(name, path))


def _open_clip(name: str, path: Path) -> Clip:
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WEBP":
            return AnimatedWebP(name, path)
    return VideoFile(name, path)


def _add_if_readable(clips: list[Clip], skipped: dict[str, str], name: str, look: Any) -> None:
    try:
        clips.append(look())
    except OSError as error:
        skipped[name] = error.strerror or str(error)
    except (ValueError, MemoryError) as error:
        skipped[name] = str(error) or "it takes more memory than there is"


def _choose_time_base(time_base: Fraction, rate: Fraction, average: Fraction | None) -> tuple[Fraction, bool]:
    """Choose a tick in which all the file's times are whole, and those of the exact rate, too."""
    tick, grid = time_base, False
    if (1 / rate / time_base).denominator != 1:
        finest = math.lcm(time_base.denominator, rate.numerator)
        steady = average is None or abs(average - rate) < rate / 100
        if steady and finest <= _MAX_TICKS_PER_SECOND:
            tick, grid = Fraction(1, finest), True
    while tick * rate * _MIN_TICKS_PER_FRAME > 1 and tick.denominator < _MAX_TICKS_PER_SECOND:
        tick /= 2
    return tick, grid


def _frame_rate(stream: Any) -> Fraction:
    """Frames a second; what a clock of microseconds makes of a rate that is not told is none."""
    for rate in (stream.guessed_rate, stream.average_rate):
        if rate and 0 < rate <= _MAX_FRAME_RATE:
            return Fraction(rate)
    return Fraction(24)


def _frame_duration_ms(picture: Image.Image) -> int:
    """How long the current frame of a WebP is shown; browsers take 100 where it says 10 or less."""
    picture.load()
    duration = round(picture.info.get("duration", 0))
    return duration if duration > 10 else 100


def _start_time(container: Any, first: Fraction) -> Fraction:
    """Choose the time that becomes 0: the container's, unless its timestamps jump before the first picture."""
    if container.start_time is None:
        return first
    start = Fraction(container.start_time, 1_000_000)
    return start if 0 <= first - start <= _MAX_START_DELAY_S else first


def _missing_frame_notes(files: list[str]) -> list[str]:
    found = [re.findall(r"\d+", Path(file).stem) for file in files]
    if not all(found):
        return []
    numbers = [int(digits[-1]) for digits in found]
    missing = numbers[-1] - numbers[0] + 1 - len(numbers)
    return [f"{missing} numbers between its first frame and its last are missing"] if missing > 0 else []
