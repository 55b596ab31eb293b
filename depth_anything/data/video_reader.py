"""Video files through PyAV: opened safely, every picture decoded, at one rising time, turned as players show it.

Files of a camera that were joined, streams that were cut and clocks that wrap have timestamps that jump. Here each
stream follows its own packets: a jump of many packets moves everything behind it, a jump of a single packet is an
error of that packet. So no picture is lost, and sound stays beside its pictures.
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

MAX_PIXELS = 200_000_000
"""Of a frame, as of an image: what a header says is checked before anything is decoded."""

PICTURE_MESSAGE = "a picture, not a video: for pictures type  depth-anything predict"

_STILL_IMAGE_BRANDS = ("heic", "heix", "mif1", "avif")  # of files built as MP4 that hold a picture
_REFUSED_FORMATS = {"image2", "tty", "hls", "concat", "lrc", "srt", "webvtt"}
"""What FFmpeg opens too: pictures and texts, and playlists, which would lead it to other files."""

_TOLERANCE_S = Fraction(1, 10)  # by which a packet's time may be before or behind the end of the one before
_MAX_GAP_S = (
    10  # more than this is a jump in formats whose timestamps may jump, as FFmpeg's own program has it
)
_MAX_GAP_OTHER_FORMATS_S = 30 * 3600  # and this in all others
_MAX_WRONG_PACKETS = 16  # packets in a row whose times may be wrong
_MAX_WAITING_PACKETS = 1000  # packets that may wait for the one that tells a jump from an error


@dataclass
class VideoFaults:
    """What went wrong while a video was read.

    Attributes:
        early: packets that could not be decoded before the first picture: they need one before the beginning.
        lost: packets that could not be decoded from then on.
        end: what ended it early, "" if nothing did.
        jumps: of its timestamps, which were taken out.
        strays: packets whose times were wrong, and were put right.
    """

    early: int = 0
    lost: int = 0
    end: str = ""
    jumps: int = 0
    repaired_packets: int = 0


def open_video(path: Path) -> Any:
    """Open a video file as a PyAV container; only that file is read.

    Raises:
        ValueError: there is no such file, or it is none that can be read as video.
        OSError: its disk does not give it.
    """
    if not path.is_file():
        raise ValueError("there is no such file")
    with path.open("rb"):  # what a disk refuses to give is no damaged video
        pass
    try:
        # an absolute path is never taken for an address; and nothing a file names is fetched
        container = av.open(os.path.abspath(path), options={"protocol_whitelist": "file"})
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"not a video, or cut off before its index ({ffmpeg_reason(error)})") from error
    if _is_picture(container):
        container.close()
        raise ValueError(PICTURE_MESSAGE)
    if container.format.name in _REFUSED_FORMATS:
        container.close()
        raise ValueError("there is no video in it")
    return container


def _is_picture(container: Any) -> bool:
    kind, videos = container.format.name, container.streams.video
    if kind == "gif":
        return bool(videos) and videos[0].frames == 1
    brand = container.metadata.get("major_brand", "")
    return kind in ("image2", "ico") or kind.endswith("_pipe") or brand in _STILL_IMAGE_BRANDS


def list_streams(container: Any) -> list[Any]:
    """List the video streams of a container that can be decoded, the one that players show first.

    Cover pictures are left out; what is marked as default goes before the rest, the larger before the smaller, and
    the longer before the shorter.

    Raises:
        ValueError: there is none, or its frames are larger than `MAX_PIXELS`.
    """
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise ValueError("there is no video in it")

    def rank(stream: Any) -> tuple[bool, int, int]:
        return bool(stream.disposition & Disposition.default), _frame_pixels(stream), stream.frames

    streams.sort(key=rank, reverse=True)  # stable: of equals the first
    if _frame_pixels(streams[0]) > MAX_PIXELS:
        size = f"{streams[0].codec_context.width}×{streams[0].codec_context.height}"
        raise ValueError(f"its frames are {size}, more than {MAX_PIXELS / 1e6:g} megapixels")
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
    """Yield every frame that can be decoded, with its time in seconds; times rise.

    Args:
        container: of `open_video`.
        stream: of its video streams.
        rate: frames a second, for frames without a time.
        faults: filled on the way.
        sound: audio streams whose packets are wanted, too.
        hand_on: takes such a packet, its times moved as those of the pictures.
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
        faults.end = f"FFmpeg reads {count} of its {stream.frames} pictures, which have no durations"


def apply_display_matrix(image: np.ndarray, frame: Any) -> np.ndarray:
    """Turn and mirror a picture as the display matrix of its frame says, to the next quarter turn.

    Args:
        image: (H, W, ...), of the frame as it is stored.
        frame: of PyAV.
    """
    across, flip_y, flip_x = display_orientation(frame)
    if across:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def display_orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Tell how a frame is to be shown: whether rows become columns, then whether y, then whether x is mirrored."""
    found = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if found is None:
        return False, False, False
    # a stored point (x, y) is shown at (a x + c y, b x + d y)
    a, b, _, c, d, *_ = (int(value) for value in np.frombuffer(bytes(found), np.int32))
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def ffmpeg_reason(error: Exception) -> str:
    """Say what FFmpeg says, without its number."""
    return getattr(error, "strerror", None) or type(error).__name__


@dataclass
class _StreamClock:
    """Where a stream stands: when its next packet is due, and which of the jumps it has passed."""

    due: Fraction | None = None
    passed: int = 0


class PacketClock:
    """Moves the times of packets so that each stream goes on where it was.

    `moves` has the seconds that are added behind each jump. The stream that comes to a jump first sets them; the
    others pass the same jump when their own times tell that they have come to it. `strays` counts packets whose
    times were wrong although those behind them were right again.
    """

    def __init__(self, *, jumps: bool, step: Fraction) -> None:
        """Begin with nothing seen.

        Args:
            jumps: whether a long gap is a jump: in transport and program streams, not in MP4 or Matroska.
            step: seconds a picture lasts if its packet does not say.
        """
        self.moves, self.repaired_packets = [Fraction(0)], 0
        self._longest_gap, self._step = _MAX_GAP_S if jumps else _MAX_GAP_OTHER_FORMATS_S, step
        self._tracks: dict[int, _StreamClock] = {}

    def follow(self, packets: Iterable[Any]) -> Iterator[Any]:
        """Yield the packets of a container in their order, moved."""
        waiting: deque[Any] = deque()
        for packet in packets:
            waiting.append(packet)
            yield from self._placed(waiting, end=False)
        yield from self._placed(waiting, end=True)

    def _placed(self, waiting: deque[Any], *, end: bool) -> Iterator[Any]:
        """Take out those whose times can be told by now: a jump shows by the next packets of the stream."""
        while waiting:
            first = waiting[0]
            rest = islice(waiting, 1, None)
            same = (packet for packet in rest if packet.stream.index == first.stream.index)
            if not self._place(first, same, decided=end or len(waiting) >= _MAX_WAITING_PACKETS):
                return
            yield waiting.popleft()

    def _place(self, packet: Any, following: Iterator[Any], *, decided: bool) -> bool:
        """Move a packet's times; False: more of the `following` ones of its stream are needed, unless `decided`."""
        track = self._tracks.setdefault(packet.stream.index, _StreamClock(passed=len(self.moves) - 1))
        move = self.moves[track.passed]
        if packet.dts is None:
            _shift_packet(packet, move)
            return True
        stamp, lasts = packet.dts * packet.time_base, self._lasts(packet)
        late = Fraction(0) if track.due is None else stamp + move - track.due
        if track.due is not None and abs(late) > _TOLERANCE_S:
            repaired_packets = self._comes_back(packet, following, late)
            if repaired_packets is None and not decided:
                return False
            if repaired_packets:
                _shift_packet(packet, move - late)
                track.due += lasts
                self.repaired_packets += 1
                return True
            if not 0 < late <= self._longest_gap:
                self._jump(track, track.due, stamp, video=packet.stream.type == "video")
        move = self.moves[track.passed]
        _shift_packet(packet, move)
        end = stamp + move + lasts
        track.due = end if track.due is None else max(track.due, end)
        return True

    def _comes_back(self, packet: Any, following: Iterator[Any], late: Fraction) -> bool | None:
        """Tell whether a stream is soon where it would be without a jump of `late` seconds; None: not known yet."""
        end, expected = Fraction(0), -late  # after the packet, from the end that it claims
        begin, seen = packet.dts * packet.time_base + self._lasts(packet), 0
        for other in following:
            if other.dts is None:
                continue
            stamp = other.dts * other.time_base - begin
            if abs(stamp - expected) <= _TOLERANCE_S and abs(stamp - end + late) <= _TOLERANCE_S:
                return True
            seen += 1
            if seen == _MAX_WRONG_PACKETS:
                return False
            end, expected = stamp + self._lasts(other), expected + self._lasts(other)
        return None

    def _jump(self, track: _StreamClock, due: Fraction, stamp: Fraction, *, video: bool) -> None:
        for number in range(track.passed + 1, len(self.moves)):  # a jump that another stream has passed
            early = due - stamp - self.moves[number]
            if abs(early) <= _MAX_GAP_S:
                # pictures go on without a gap; a stream that has much more before the jump makes the others wait
                if early > _TOLERANCE_S or (video and early >= -_TOLERANCE_S):
                    self.moves[number] += early
                track.passed = number
                return
        back = [move for move in self.moves if abs(stamp + move - due) <= _TOLERANCE_S]
        self.moves.append(back[-1] if back else due - stamp)
        track.passed = len(self.moves) - 1

    def _lasts(self, packet: Any) -> Fraction:
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
    if not flushed:  # what the decoder still holds when reading ends early
        yield from decoded(None)


def _with_rising_times(
    frames: Iterable[Any], *, base: Fraction, step: Fraction
) -> Iterator[tuple[Fraction, Any]]:
    """Give each frame its time; one that is out of order goes between its neighbors."""
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
    """Choose the time of a frame by its own and its neighbors'."""
    if before is None:
        return time if after is None or after > time else after - step
    if after is not None and after > before:
        return time if before < time < after else before + min(step, (after - before) / 2)
    return time if time > before else before + step / 1000


def _frame_pixels(stream: Any) -> int:
    return int(stream.codec_context.width or 0) * int(stream.codec_context.height or 0)
