"""Read video files with PyAV: safe opening, every frame decoded, rising timestamps, display orientation.

Timestamps jump in files that a camera joined, in streams that were cut, and where a clock wraps around. Each stream is
followed by its own packets: a jump of many packets shifts all packets after it, a jump of a single packet is an error
of that packet. So no frame is lost, and audio stays in sync.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.format import Flags
from av.stream import Disposition

from depth_anything.data.image_headers import MAX_PIXELS

PICTURE_MESSAGE = "a picture, not a video: for pictures type  depth-anything predict"

_STILL_IMAGE_BRANDS = ("heic", "heix", "mif1", "avif")  # of image files in the MP4 container format
_REFUSED_FORMATS = {"image2", "tty", "hls", "concat", "lrc", "srt", "webvtt"}
"""Formats that FFmpeg opens too: images, texts, and playlists, which would make it open other files."""

_TOLERANCE_S = Fraction(1, 10)  # between the end of a packet and the start of the next
_MAX_GAP_S = 10  # a longer gap is a jump in formats whose timestamps may jump, as in the ffmpeg program
_MAX_GAP_OTHER_FORMATS_S = 30 * 3600  # the same limit in all other formats
_MAX_WRONG_PACKETS = 16  # in a row
_MAX_WAITING_PACKETS = 1000  # until it is known whether there is a jump or an error


@dataclass
class VideoFaults:
    """Problems found while a video was read.

    Attributes:
        early: Packets before the first decodable frame that could not be decoded, because they need earlier frames.
        lost: Later packets that could not be decoded.
        end: Error that ended reading early, "" if there was none.
        jumps: Jumps of timestamps that were removed.
        repaired_packets: Packets with wrong timestamps that were corrected.
    """

    early: int = 0
    lost: int = 0
    end: str = ""
    jumps: int = 0
    repaired_packets: int = 0


def open_video(path: Path) -> Any:
    """Open a video file as a PyAV container; no other file is read.

    Raises:
        ValueError: There is no such file, or it cannot be read as video.
        OSError: The disk fails.
    """
    if not path.is_file():
        raise ValueError("there is no such file")
    with path.open("rb"):  # a disk error is not a damaged video
        pass
    try:
        # An absolute path cannot be mistaken for a URL, and the whitelist keeps FFmpeg from opening other files.
        container = av.open(os.path.abspath(path), options={"protocol_whitelist": "file"})
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"not a video, or cut off before its index ({ffmpeg_reason(error)})") from error
    if _is_picture(container):
        container.close()
        raise ValueError(PICTURE_MESSAGE)
    if container.format.name in _REFUSED_FORMATS:
        container.close()
        raise ValueError("it has no video stream")
    return container


def _is_picture(container: Any) -> bool:
    kind, videos = container.format.name, container.streams.video
    if kind == "gif":
        return bool(videos) and videos[0].frames == 1
    brand = container.metadata.get("major_brand", "")
    return kind in ("image2", "ico") or kind.endswith("_pipe") or brand in _STILL_IMAGE_BRANDS


def list_streams(container: Any) -> list[Any]:
    """List the video streams of a container that can be decoded; players show the first one.

    Cover images are left out. The default stream is before the rest, then larger before smaller, longer before shorter.

    Raises:
        ValueError: There is none, or its frames are larger than `MAX_PIXELS`.
    """
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise ValueError("it has no video stream")

    def rank(stream: Any) -> tuple[bool, int, int]:
        return bool(stream.disposition & Disposition.default), _frame_pixels(stream), stream.frames

    streams.sort(key=rank, reverse=True)  # stable: equal streams keep their order
    if _frame_pixels(streams[0]) > MAX_PIXELS:
        size = f"{streams[0].codec_context.width}×{streams[0].codec_context.height}"
        raise ValueError(f"its frames are {size}, over the limit of {MAX_PIXELS / 1e6:g} megapixels")
    return streams


def read_frames(
    container: Any,
    stream: Any,
    *,
    rate: Fraction,
    faults: VideoFaults,
    sound: Sequence[Any] = (),
    on_packet: Callable[[Any], None] = lambda packet: None,
) -> Iterator[tuple[Fraction, Any]]:
    """Yield every decodable frame with its time in seconds; the times rise.

    Args:
        container: From `open_video`.
        stream: One of its video streams.
        rate: Frames per second, for frames without a timestamp.
        faults: Filled while reading.
        sound: Audio streams whose packets are passed to `on_packet`.
        on_packet: Called with each such packet, its timestamps shifted like those of the video.
    """
    jumps = bool(container.format.flags & Flags.ts_discont.value)
    clock = PacketClock(jumps=jumps, step=1 / rate)
    packets = clock.follow(_demux_packets(container, [stream, *sound], faults))
    base, count = Fraction(stream.time_base), 0
    for time, frame in _with_rising_times(
        _decode_packets(stream, packets, faults, on_packet), base=base, step=1 / rate
    ):
        faults.jumps, faults.repaired_packets = len(clock.moves) - 1, clock.repaired_packets
        count += 1
        yield time, frame
    if container.format.name == "gif" and count < stream.frames and not faults.end:
        faults.end = f"FFmpeg reads {count} of its {stream.frames} frames, which have no durations"


def apply_display_matrix(image: np.ndarray, frame: Any) -> np.ndarray:
    """Rotate and flip an image by the display matrix of its frame, to the nearest quarter turn.

    Args:
        image: (H, W, ...), as stored.
        frame: PyAV frame.
    """
    across, flip_y, flip_x = display_orientation(frame)
    if across:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def display_orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Return whether to transpose a frame for display, then whether to flip y, then whether to flip x."""
    found = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if found is None:
        return False, False, False
    # the stored point (x, y) is displayed at (a x + c y, b x + d y)
    a, b, _, c, d, *_ = (int(value) for value in np.frombuffer(bytes(found), np.int32))
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def ffmpeg_reason(error: Exception) -> str:
    """Return the message of an FFmpeg error, without its number."""
    return getattr(error, "strerror", None) or type(error).__name__


@dataclass
class _StreamClock:
    """State of a stream: when its next packet is due, and the number of jumps that it has passed."""

    due: Fraction | None = None
    passed: int = 0


class PacketClock:
    """Shifts the timestamps of packets so that each stream continues without jumps.

    `moves` has the seconds that are added after each jump. The first stream that reaches a jump sets them; another
    stream passes the same jump when its own timestamps show that it has reached it. `repaired_packets` counts packets
    with wrong timestamps that were followed by correct ones.
    """

    def __init__(self, *, jumps: bool, step: Fraction) -> None:
        """Start before the first packet.

        Args:
            jumps: Whether a long gap is a jump: in transport and program streams, not in MP4 or Matroska.
            step: Duration of a frame whose packet has none, seconds.
        """
        self.moves, self.repaired_packets = [Fraction(0)], 0
        self._longest_gap, self._step = _MAX_GAP_S if jumps else _MAX_GAP_OTHER_FORMATS_S, step
        self._tracks: dict[int, _StreamClock] = {}

    def follow(self, packets: Iterable[Any]) -> Iterator[Any]:
        """Yield the packets of a container in their order, with shifted timestamps."""
        waiting: deque[Any] = deque()
        for packet in packets:
            waiting.append(packet)
            yield from self._emit_ready(waiting, end=False)
        yield from self._emit_ready(waiting, end=True)

    def _emit_ready(self, waiting: deque[Any], *, end: bool) -> Iterator[Any]:
        """Yield the packets whose shift is known; a jump is only known after the next packets of the stream."""
        while waiting:
            first = waiting[0]
            rest = islice(waiting, 1, None)
            same = (packet for packet in rest if packet.stream.index == first.stream.index)
            if not self._shift_if_known(first, same, decided=end or len(waiting) >= _MAX_WAITING_PACKETS):
                return
            yield waiting.popleft()

    def _shift_if_known(self, packet: Any, following: Iterator[Any], *, decided: bool) -> bool:
        """Shift the timestamps of a packet; False if more `following` packets are needed, unless `decided`."""
        track = self._tracks.setdefault(packet.stream.index, _StreamClock(passed=len(self.moves) - 1))
        move = self.moves[track.passed]
        if packet.dts is None:
            _shift_packet(packet, move)
            return True
        stamp, duration = packet.dts * packet.time_base, self._duration(packet)
        late = Fraction(0) if track.due is None else stamp + move - track.due
        if track.due is not None and abs(late) > _TOLERANCE_S:
            outlier = self._is_outlier(packet, following, late)
            if outlier is None and not decided:
                return False
            if outlier:
                _shift_packet(packet, move - late)
                track.due += duration
                self.repaired_packets += 1
                return True
            if not 0 < late <= self._longest_gap:
                self._pass_jump(track, track.due, stamp, video=packet.stream.type == "video")
        move = self.moves[track.passed]
        _shift_packet(packet, move)
        end = stamp + move + duration
        track.due = end if track.due is None else max(track.due, end)
        return True

    def _is_outlier(self, packet: Any, following: Iterator[Any], late: Fraction) -> bool | None:
        """Tell whether a stream soon continues as if there were no jump of `late` seconds; None if not known yet."""
        end, expected = Fraction(0), -late  # seconds after the end of the packet
        begin, seen = packet.dts * packet.time_base + self._duration(packet), 0
        for other in following:
            if other.dts is None:
                continue
            stamp = other.dts * other.time_base - begin
            if abs(stamp - expected) <= _TOLERANCE_S and abs(stamp - end + late) <= _TOLERANCE_S:
                return True
            seen += 1
            if seen == _MAX_WRONG_PACKETS:
                return False
            end, expected = stamp + self._duration(other), expected + self._duration(other)
        return None

    def _pass_jump(self, track: _StreamClock, due: Fraction, stamp: Fraction, *, video: bool) -> None:
        for number in range(track.passed + 1, len(self.moves)):  # jumps that another stream has passed
            early = due - stamp - self.moves[number]
            if abs(early) <= _MAX_GAP_S:
                # Frames continue without a gap; a stream with more data before the jump delays the others.
                if early > _TOLERANCE_S or (video and early >= -_TOLERANCE_S):
                    self.moves[number] += early
                track.passed = number
                return
        back = [move for move in self.moves if abs(stamp + move - due) <= _TOLERANCE_S]
        self.moves.append(back[-1] if back else due - stamp)
        track.passed = len(self.moves) - 1

    def _duration(self, packet: Any) -> Fraction:
        if packet.duration:
            return packet.duration * Fraction(packet.time_base)
        return self._step if packet.stream.type == "video" else Fraction(0)


def _shift_packet(packet: Any, seconds: Fraction) -> None:
    ticks = round(seconds / packet.time_base)
    if ticks and packet.dts is not None:
        packet.dts += ticks
    if ticks and packet.pts is not None:
        packet.pts += ticks


def _demux_packets(container: Any, streams: list[Any], faults: VideoFaults) -> Iterator[Any]:
    try:
        yield from container.demux(streams)
    except av.FFmpegError as error:
        faults.end = ffmpeg_reason(error)


def _decode_packets(
    stream: Any, packets: Iterable[Any], faults: VideoFaults, on_packet: Callable[[Any], None]
) -> Iterator[Any]:
    begun = flushed = False

    def decoded(packet: Any) -> Iterator[Any]:
        nonlocal begun
        try:
            for frame in stream.codec_context.decode(packet):
                begun = True
                yield frame
        except av.FFmpegError:
            faults.lost += begun
            faults.early += not begun

    for packet in packets:
        if packet.stream.index != stream.index:
            on_packet(packet)
        else:
            flushed = flushed or packet.size == 0
            yield from decoded(packet)
    if not flushed:  # the frames in the decoder when reading ends early
        yield from decoded(None)


def _with_rising_times(
    frames: Iterable[Any], *, base: Fraction, step: Fraction
) -> Iterator[tuple[Fraction, Any]]:
    """Yield each frame with its time; a time out of order is moved between its neighbors."""
    before: Fraction | None = None
    held: tuple[Fraction, Any] | None = None
    for frame in frames:
        if frame.pts is not None:
            time = frame.pts * Fraction(frame.time_base or base)
        else:
            time = held[0] + step if held else Fraction(0)
        if held:
            before = _time_between(before, held[0], time, step)
            yield before, held[1]
        held = (time, frame)
    if held:
        yield _time_between(before, held[0], None, step), held[1]


def _time_between(
    before: Fraction | None, time: Fraction, after: Fraction | None, step: Fraction
) -> Fraction:
    """Choose the time of a frame from its own and those of its neighbors."""
    if before is None:
        return time if after is None or after > time else after - step
    if after is not None and after > before:
        return time if before < time < after else before + min(step, (after - before) / 2)
    return time if time > before else before + step / 1000


def _frame_pixels(stream: Any) -> int:
    return int(stream.codec_context.width or 0) * int(stream.codec_context.height or 0)
