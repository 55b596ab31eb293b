"""The sound of an MP4: copied where MP4 takes it, else encoded as AAC; what cannot be carried is left out, and said.

No fault of the sound is ever one of the pictures.
"""

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.audio.resampler import AudioResampler

_AAC_SAMPLE_RATES = (
    96000,
    88200,
    64000,
    48000,
    44100,
    32000,
    24000,
    22050,
    16000,
    12000,
    11025,
    8000,
)  # that AAC has
_DEFAULT_SAMPLE_RATE = 48000


@dataclass
class _AudioTrack:
    """One audio stream of the film.

    Attributes:
        target: the film's stream.
        decoded: whether packets are decoded and encoded anew.
        last: time of the last packet, ticks of the target.
        moved: packets that were out of order.
        lost: packets that could not be carried.
        resampler: of the last frame's kind, and that kind.
    """

    target: Any
    decoded: bool
    last: int | None = None
    moved: int = 0
    lost: int = 0
    resampler: Any = None
    kind: Any = None
    due: int = 0


class AudioWriter:
    """Takes the audio of a clip into an MP4."""

    def __init__(self, container: Any) -> None:
        """Begin without a stream; `container` is the film's, its header not yet written."""
        self._container = container
        self._tracks: dict[int, _AudioTrack] = {}
        self._notes: list[str] = []

    @property
    def notes(self) -> list[str]:
        """What went otherwise than it should."""
        told = list(self._notes)
        for track in self._tracks.values():
            if track.moved:
                told.append(f"sound: {track.moved} packets were out of order, and were put in order")
            if track.lost:
                told.append(f"sound: {track.lost} packets are damaged, and are left out")
        return told

    def add(self, stream: Any) -> None:
        """Make room for a stream; one that can be neither copied nor encoded is left out."""
        codec = stream.codec_context.codec.canonical_name
        if _can_copy_stream(stream, self._container.supported_codecs):
            target = self._container.add_stream_from_template(stream)
            self._tracks[stream.index] = _AudioTrack(target, decoded=False)
        elif stream.codec_context.sample_rate > 0 and stream.codec_context.channels > 0:
            rate = stream.codec_context.sample_rate
            target = self._container.add_stream(
                "aac", rate=rate if rate in _AAC_SAMPLE_RATES else _DEFAULT_SAMPLE_RATE
            )
            target.layout = "mono" if stream.codec_context.channels == 1 else "stereo"
            self._tracks[stream.index] = _AudioTrack(target, decoded=True)
            self._notes.append(f"sound encoded anew, {codec} to aac, since MP4 does not take {codec}")
        else:
            self._notes.append(
                f"sound left out: the file does not say the sample rate or channels of its {codec}"
            )

    def write(self, packet: Any, start: Fraction) -> None:
        """Take a packet, an empty one at the end; `start` seconds become 0.

        Raises:
            OSError, MemoryError: the film cannot be written.
        """
        track = self._tracks.get(packet.stream.index)
        if track is None:
            return
        self._container.start_encoding()
        try:
            if track.decoded:
                for frame in packet.decode():
                    self._encode(track, frame, start)
            elif packet.size:
                _rescale_packet(packet, track.target, start)
                self._mux(track, packet)
        except (av.FFmpegError, ValueError) as error:
            if isinstance(error, (OSError, MemoryError)):
                raise
            track.lost += 1

    def finish(self) -> None:
        """Write what the encoders still hold."""
        for track in self._tracks.values():
            if track.decoded and track.kind is not None:
                for frame in track.resampler.resample(None):
                    self._mux_all(track, track.target.encode(frame))
                self._mux_all(track, track.target.encode(None))

    def _encode(self, track: _AudioTrack, frame: Any, start: Fraction) -> None:
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        context = track.target.codec_context
        if kind != track.kind:  # the first, or one that changes midway
            for rest in track.resampler.resample(None) if track.resampler else ():
                self._mux_all(track, track.target.encode(rest))
            track.resampler = AudioResampler(
                format=context.format, layout=context.layout, rate=context.sample_rate
            )
            track.kind = kind
        base = Fraction(1, frame.sample_rate)
        if frame.pts is None:
            frame.pts = track.due
        else:
            frame.pts = round((frame.pts * Fraction(frame.time_base) - start) / base)
        frame.time_base = base
        track.due = frame.pts + frame.samples
        for ready in track.resampler.resample(frame):
            self._mux_all(track, track.target.encode(ready))

    def _mux_all(self, track: _AudioTrack, packets: list[Any]) -> None:
        for packet in packets:
            self._mux(track, packet)

    def _mux(self, track: _AudioTrack, packet: Any) -> None:
        """Write a packet, later than the one before: MP4 takes no other."""
        if packet.dts is None:
            packet.dts = packet.pts if packet.pts is not None else (track.last or -1) + 1
        if track.last is not None and packet.dts <= track.last:
            packet.dts = track.last + 1
            track.moved += 1
        packet.pts = packet.dts if packet.pts is None else max(packet.pts, packet.dts)
        packet.stream = track.target
        track.last = packet.dts
        self._container.mux(packet)


def _can_copy_stream(stream: Any, codecs: set[str]) -> bool:
    """Tell by writing the header of a film that has this stream alone."""
    if not {stream.codec_context.name, stream.codec_context.codec.canonical_name} & set(codecs):
        return False
    try:
        with av.open(io.BytesIO(), "w", format="mp4") as trial:
            trial.add_stream_from_template(stream)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def _rescale_packet(packet: Any, target: Any, start: Fraction) -> None:
    """Bring a packet to the ticks of its target."""
    base, ticks = Fraction(packet.time_base), Fraction(target.time_base)
    for name in ("pts", "dts"):
        if getattr(packet, name) is not None:
            setattr(packet, name, round((getattr(packet, name) * base - start) / ticks))
    packet.duration = round((packet.duration or 0) * base / ticks)
    packet.time_base = ticks
