"""Readers of clips: video files (PyAV), animated WebP, and folders of frames.

Frames are decoded one by one. Times are exact fractions and every frame keeps its own, so neither 29.97 fps nor a
variable frame rate drifts from the audio.
"""

import math
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

from depth_anything.data.image_headers import MAX_PIXELS
from depth_anything.data.sample import decode_image
from depth_anything.data.video_reader import (
    PICTURE_MESSAGE,
    VideoFaults,
    apply_display_matrix,
    display_orientation,
    list_streams,
    open_video,
    read_frames,
)
from depth_anything.preprocess import composite_on_white

_UNSPECIFIED, _BT709 = 2, 1  # AVColorSpace
_HD_HEIGHT_PX = (
    720  # without a color space, players decode frames of this height as BT.709, smaller ones as BT.601
)
_END_TOLERANCE_S, _END_TOLERANCE = (
    0.25,
    0.05,
)  # seconds, and share, by which the video may end before its duration
_MAX_TICKS_PER_SECOND = 1 << 24
_MIN_TICKS_PER_FRAME = 32  # frames with equal times are moved apart by a tick
_MAX_FRAME_RATE = 1000
_MAX_START_DELAY_S = 3600  # by which the video may start after the audio


class ClipFrame(NamedTuple):
    """A frame: uint8 (H, W, 3) RGB, upright; its time in ticks of the clip; the name of its own files."""

    image: np.ndarray
    pts: int
    name: str


class AudioSink(Protocol):
    """Receives the audio of a clip while its frames are read."""

    def add_audio(self, stream: Any) -> None:
        """Add an audio stream, before the first frame."""

    def write_audio(self, packet: Any, start: Fraction) -> None:
        """Receive a packet; the clip starts at `start` seconds."""


@dataclass
class Clip(ABC):
    """A clip and its properties.

    Attributes:
        name: Its path as in the list or relative to the folder.
        path: The file, or the folder of its frames.
        height: Height of an upright frame, pixels.
        width: Width of an upright frame, pixels.
        rate: Frames per second.
        time_base: Seconds per tick.
        frames: Number of frames according to the file; None if it does not say.
        pixel_aspect: Width of a pixel over its height.
        notes: Remarks on faults; filled by reading.
        incomplete: Frames are missing; set by reading.
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
    def read(self, audio: AudioSink | None = None) -> Iterator[ClipFrame]:
        """Yield the frames in order; audio packets are passed to `audio` in file order."""


class VideoFile(Clip):
    """A video file: the video stream that players show; cover pictures are ignored."""

    def __init__(self, name: str, path: Path) -> None:
        """Open a file and read the properties of its video.

        Raises:
            ValueError: There is no such file, it is not a video, or no frame can be decoded.
        """
        super().__init__(name, path)
        self._first_frame_s = Fraction(0)
        self._reformatter = VideoReformatter()
        with closing(open_video(path)) as container:
            indexes = [stream.index for stream in list_streams(container)]
        self._other_streams = len(indexes) - 1
        if not any(self._probe_stream(index) for index in indexes):
            raise ValueError("none of its frames can be decoded")

    def _probe_stream(self, index: int) -> bool:
        """Read the properties of a stream; return False if it has no frame that can be decoded."""
        with closing(open_video(self.path)) as container:
            stream = container.streams[index]
            self._stream_index, self.rate = index, _frame_rate(stream)
            first, frame = next(
                read_frames(container, stream, rate=self.rate, faults=VideoFaults()), (Fraction(0), None)
            )
            if frame is None:
                return False
            self.time_base, self._is_constant_rate = _choose_time_base(
                Fraction(stream.time_base), self.rate, stream.average_rate
            )
            self.frames = stream.frames or None
            self._states_frames = self.frames is not None
            self._duration_s = float(container.duration or 0) / 1e6
            if self._states_frames and "mov" not in container.format.name:  # an edit list may skip some there
                self._duration_s = max(self._duration_s, float(stream.frames / self.rate))
            if not self.frames:
                self.frames = round(self._duration_s * self.rate) or None
            self._start_s = _start_time(container, first)
            is_transposed = display_orientation(frame)[0]
            size = (frame.height, frame.width)
            self.height, self.width = size[::-1] if is_transposed else size
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.pixel_aspect = 1 / aspect if is_transposed else aspect
        return True

    def read(self, audio: AudioSink | None = None) -> Iterator[ClipFrame]:
        """Yield the frames in order; audio packets are passed to `audio` without decoding.

        A file that is cut short or damaged yields the frames that it has, and `notes` says how many.
        """
        self.notes.clear()
        self.incomplete = False
        self._sizes: set[tuple[int, int]] = set()
        faults, pts, index, audio_end = VideoFaults(), -1, -1, Fraction(0)
        with closing(open_video(self.path)) as container:
            stream = container.streams[self._stream_index]
            stream.thread_type = "AUTO"
            tracks = [track for track in container.streams.audio if track.codec_context is not None]
            if audio:
                for track in tracks:
                    audio.add_audio(track)

            def pass_audio(packet: Any) -> None:
                nonlocal audio_end
                if packet.dts is not None:
                    end = (packet.dts + (packet.duration or 0)) * packet.time_base - self._start_s
                    audio_end = max(audio_end, end)
                if audio:
                    audio.write_audio(packet, self._start_s)

            frames = read_frames(
                container, stream, rate=self.rate, faults=faults, sound=tracks, on_packet=pass_audio
            )
            for index, (seconds, frame) in enumerate(frames):
                ticks = self._to_ticks(seconds, Fraction(stream.time_base), is_first=not index)
                pts = max(ticks, pts + 1)
                yield ClipFrame(self._to_rgb(frame), pts, f"{index + 1:06d}")
        self._note_faults(faults, index + 1, end=(pts + 1) * self.time_base, audio_end=audio_end)

    def _to_ticks(self, seconds: Fraction, tick: Fraction, *, is_first: bool) -> int:
        seconds -= self._start_s
        if is_first:
            self._first_frame_s = seconds
        if self._is_constant_rate:  # undo the rounding of a coarse tick, such as Matroska's milliseconds
            exact = self._first_frame_s + round((seconds - self._first_frame_s) * self.rate) / self.rate
            if abs(exact - seconds) < tick:
                seconds = exact
        return round(seconds / self.time_base)

    def _to_rgb(self, frame: Any) -> np.ndarray:
        self._sizes.add((frame.height, frame.width))
        is_transposed = display_orientation(frame)[0]
        height, width = (self.width, self.height) if is_transposed else (self.height, self.width)
        has_colorspace = int(frame.colorspace) != _UNSPECIFIED
        image = self._reformatter.reformat(
            frame,
            format="rgb24",
            width=width,
            height=height,
            src_colorspace=None if has_colorspace or frame.height < _HD_HEIGHT_PX else _BT709,
            threads=1,  # starting more takes longer than they save
        ).to_ndarray()
        return apply_display_matrix(image, frame)

    def _note_faults(self, faults: VideoFaults, count: int, *, end: Fraction, audio_end: Fraction) -> None:
        """Add remarks on what went wrong, and set `incomplete` if frames are missing."""
        incomplete = bool(faults.end or faults.lost)
        if faults.end:
            self.notes.append(f"cut short ({faults.end})")
        if faults.lost:
            self.notes.append(f"damaged: {faults.lost} packets could not be decoded")
        if faults.early:
            self.notes.append(f"its first {faults.early} packets need frames from before its start")
        tolerance = max(_END_TOLERANCE_S, _END_TOLERANCE * self._duration_s)
        min_end = self._duration_s - tolerance - float(1 / self.rate)
        ends_early = end < min_end and not (faults.jumps or faults.repaired_packets)
        is_cut = ends_early and audio_end < min_end  # if the audio goes on, the video may really end here
        if (
            self._states_frames
            and count < (self.frames or 0)
            and (incomplete or is_cut or self._is_truncated())
        ):
            incomplete = True
            self.notes.append(f"cut short: it has {count} of {self.frames} frames")
        elif ends_early and not self._states_frames:
            incomplete = incomplete or is_cut
            self.notes.append(
                f"its frames end early: {count} frames, {float(end):.2f} s of {self._duration_s:.2f} s"
            )
        if faults.jumps:
            self.notes.append(f"its timestamps jump {faults.jumps} times: the parts are joined without gaps")
        if faults.repaired_packets:
            self.notes.append(f"wrong timestamps of {faults.repaired_packets} packets were corrected")
        if len(self._sizes) > 1:
            sizes = ", ".join(f"{width}×{height}" for height, width in sorted(self._sizes))
            self.notes.append(
                f"its frame size changes ({sizes}): all are scaled to {self.width}×{self.height}"
            )
        if self._other_streams:
            self.notes.append(f"it has {self._other_streams} more video streams, which are ignored")
        self.incomplete = incomplete

    def _is_truncated(self) -> bool:
        """Tell a file without its end from one whose edit list skips frames."""
        with closing(open_video(self.path)) as container:
            entries = container.streams[self._stream_index].index_entries
            end = max((entry.pos + entry.size for entry in entries), default=0)
        return end > self.path.stat().st_size


class AnimatedWebP(Clip):
    """An animated WebP, which FFmpeg does not read."""

    def __init__(self, name: str, path: Path) -> None:
        """Open a file and read its properties.

        Raises:
            ValueError: It is damaged, too large, or a still picture.
        """
        super().__init__(name, path, time_base=Fraction(1, 1000))
        with self._open() as picture:
            self.width, self.height = picture.size
            if self.width * self.height > MAX_PIXELS:
                raise ValueError(
                    f"its frames are {self.width}×{self.height}, more than {MAX_PIXELS / 1e6:g} megapixels"
                )
            self.frames = getattr(picture, "n_frames", 1)
            if self.frames == 1:
                raise ValueError(PICTURE_MESSAGE)
            self.rate = Fraction(1000, _frame_duration_ms(picture))

    def read(self, audio: AudioSink | None = None) -> Iterator[ClipFrame]:
        """Yield the frames on a white background; there is no audio."""
        self.notes.clear()
        self.incomplete, time_ms = False, 0
        with self._open() as picture:
            for index in range(self.frames or 0):
                try:
                    picture.seek(index)
                    image = composite_on_white(np.asarray(picture.convert("RGBA")))
                except (OSError, EOFError, ValueError):
                    self.incomplete = True
                    self.notes.append(f"cut short: it has {index} of {self.frames} frames")
                    return
                yield ClipFrame(image, time_ms, f"{index + 1:06d}")
                time_ms += _frame_duration_ms(picture)

    def _open(self) -> Image.Image:
        try:
            return WebPImagePlugin.WebPImageFile(self.path)
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise ValueError(f"a WebP that cannot be read ({error})") from error


class FrameFolder(Clip):
    """A folder of frames in natural order: 2.png comes before 10.png."""

    def __init__(self, name: str, path: Path, files: list[str], *, rate: Fraction) -> None:
        """Read the size of the first frame.

        Raises:
            ValueError: It cannot be read.
        """
        self._files = sorted(files, key=natural_sort_key)
        height, width = self._decode(path, self._files[0]).shape[:2]
        super().__init__(name, path, height, width, rate, 1 / rate, frames=len(files))
        self._stems = [Path(file).stem for file in self._files]
        if len(set(self._stems)) < len(files):
            self._stems = [f"{n:06d}" for n in range(1, len(files) + 1)]

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [self.path / name for name in self._files]

    def read(self, audio: AudioSink | None = None) -> Iterator[ClipFrame]:
        """Yield the frames; there is no audio.

        Raises:
            ValueError: A frame cannot be read or has another size; it is named.
        """
        self.notes[:] = _missing_frame_notes(self._files)
        for index, file in enumerate(self._files):
            image = self._decode(self.path, file)
            if image.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"its frame {file} is {image.shape[1]}×{image.shape[0]}, the first is {self.width}×{self.height}"
                )
            yield ClipFrame(image, index, self._stems[index])

    @staticmethod
    def _decode(folder: Path, file: str) -> np.ndarray:
        try:
            return decode_image((folder / file).read_bytes())
        except ValueError as error:
            raise ValueError(f"its frame {file} cannot be read: {error}") from error


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares digits as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts]


def parse_frame_rate(text: str) -> Fraction:
    """Parse frames per second: 24, 30000/1001, or decimals like 29.97, which mean 30000/1001.

    Raises:
        ValueError: It is not a number above 0 and at most 1000.

    Example:
        >>> parse_frame_rate("23.976"), parse_frame_rate("25")
        (Fraction(24000, 1001), Fraction(25, 1))
    """
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= _MAX_FRAME_RATE:
        raise ValueError(f"{text!r} is not a number of frames per second, such as 24, 29.97 or 30000/1001")
    ntsc = Fraction(math.ceil(rate) * 1000, 1001)
    return ntsc if "." in text and abs(rate - ntsc) < Fraction(1, 200) else rate


def _choose_time_base(time_base: Fraction, rate: Fraction, average: Fraction | None) -> tuple[Fraction, bool]:
    """Choose a tick that represents the file's times and, at a constant rate, those of the exact rate.

    Returns:
        Seconds per tick, and whether times are to be snapped to the exact rate.
    """
    tick, is_constant_rate = time_base, False
    if (1 / rate / time_base).denominator != 1:
        ticks_per_second = math.lcm(time_base.denominator, rate.numerator)
        is_steady = average is None or abs(average - rate) < rate / 100
        if is_steady and ticks_per_second <= _MAX_TICKS_PER_SECOND:
            tick, is_constant_rate = Fraction(1, ticks_per_second), True
    while tick * rate * _MIN_TICKS_PER_FRAME > 1 and tick.denominator < _MAX_TICKS_PER_SECOND:
        tick /= 2
    return tick, is_constant_rate


def _frame_rate(stream: Any) -> Fraction:
    """Frames per second, 24 if unknown; a microsecond clock without a rate yields an impossible one."""
    for rate in (stream.guessed_rate, stream.average_rate):
        if rate and 0 < rate <= _MAX_FRAME_RATE:
            return Fraction(rate)
    return Fraction(24)


def _frame_duration_ms(picture: Image.Image) -> int:
    """How long the current frame of a WebP is shown; browsers show one of 10 ms or less for 100 ms."""
    picture.load()
    duration = round(picture.info.get("duration", 0))
    return duration if duration > 10 else 100


def _start_time(container: Any, first: Fraction) -> Fraction:
    """Choose the time that becomes 0: the container's start, unless timestamps jump before the first frame."""
    if container.start_time is None:
        return first
    start = Fraction(container.start_time, 1_000_000)
    return start if 0 <= first - start <= _MAX_START_DELAY_S else first


def _missing_frame_notes(files: list[str]) -> list[str]:
    digits = [re.findall(r"\d+", Path(file).stem) for file in files]
    if not all(digits):
        return []
    numbers = [int(groups[-1]) for groups in digits]
    missing = numbers[-1] - numbers[0] + 1 - len(numbers)
    return [f"{missing} numbers between its first frame and its last are missing"] if missing > 0 else []
