"""The audio of an MP4: streams that MP4 supports are copied, others are encoded as AAC or left out with a note.

An error in the audio never affects the video.
"""

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.audio.resampler import AudioResampler

_AAC_SAMPLE_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_DEFAULT_SAMPLE_RATE = 48000


@dataclass
class _AudioTrack:
    """One audio stream of the output.

    Attributes:
        target: The output stream.
        encodes: True if packets are decoded and encoded as AAC, False if they are copied.
        last_dts: Time of the last packet, ticks of the target.
        reordered: Number of packets that were out of order.
        lost: Number of packets that could not be written.
        resampler: Resampler for frames of `frame_kind`.
        frame_kind: Sample format, layout and rate of the last frame.
        next_pts: Time of the next frame, for frames without a time.
    """

    target: Any
    encodes: bool
    last_dts: int | None = None
    reordered: int = 0
    lost: int = 0
    resampler: Any = None
    frame_kind: Any = None
    next_pts: int = 0


class AudioWriter:
    """Writes the audio streams of a clip into an MP4."""

    def __init__(self, container: Any) -> None:
        """Start without a stream; `container` is the output, whose header is not written yet."""
        self._container = container
        self._tracks: dict[int, _AudioTrack] = {}
        self._notes: list[str] = []

    @property
    def notes(self) -> list[str]:
        """Remarks on streams that were re-encoded, repaired or left out."""
        notes = list(self._notes)
        for track in self._tracks.values():
            if track.reordered:
                notes.append(f"audio: {track.reordered} packets were out of order and were reordered")
            if track.lost:
                notes.append(f"audio: {track.lost} packets are damaged and were left out")
        return notes

    def add(self, stream: Any) -> None:
        """Add a stream, copied or re-encoded; one that allows neither is left out."""
        codec = stream.codec_context.codec.canonical_name
        if _can_copy_stream(stream, self._container.supported_codecs):
            target = self._container.add_stream_from_template(stream)
            self._tracks[stream.index] = _AudioTrack(target, encodes=False)
        elif stream.codec_context.sample_rate > 0 and stream.codec_context.channels > 0:
            rate = stream.codec_context.sample_rate
            target = self._container.add_stream(
                "aac", rate=rate if rate in _AAC_SAMPLE_RATES else _DEFAULT_SAMPLE_RATE
            )
            target.layout = "mono" if stream.codec_context.channels == 1 else "stereo"
            self._tracks[stream.index] = _AudioTrack(target, encodes=True)
            self._notes.append(f"audio re-encoded, {codec} to aac, since MP4 does not support {codec}")
        else:
            self._notes.append(
                f"audio left out: the file does not state the sample rate or channels of its {codec}"
            )

    def write(self, packet: Any, start: Fraction) -> None:
        """Write a packet, an empty one at the end; the time `start`, in seconds, becomes 0.

        Raises:
            OSError, MemoryError: The output cannot be written.
        """
        track = self._tracks.get(packet.stream.index)
        if track is None:
            return
        self._container.start_encoding()
        try:
            if track.encodes:
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
        """Flush the encoders."""
        for track in self._tracks.values():
            if track.encodes and track.frame_kind is not None:
                for frame in track.resampler.resample(None):
                    self._mux_all(track, track.target.encode(frame))
                self._mux_all(track, track.target.encode(None))

    def _encode(self, track: _AudioTrack, frame: Any, start: Fraction) -> None:
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        context = track.target.codec_context
        if kind != track.frame_kind:  # the first frame, or the format changes midway
            for rest in track.resampler.resample(None) if track.resampler else ():
                self._mux_all(track, track.target.encode(rest))
            track.resampler = AudioResampler(
                format=context.format, layout=context.layout, rate=context.sample_rate
            )
            track.frame_kind = kind
        base = Fraction(1, frame.sample_rate)
        if frame.pts is None:
            frame.pts = track.next_pts
        else:
            frame.pts = round((frame.pts * Fraction(frame.time_base) - start) / base)
        frame.time_base = base
        track.next_pts = frame.pts + frame.samples
        for resampled in track.resampler.resample(frame):
            self._mux_all(track, track.target.encode(resampled))

    def _mux_all(self, track: _AudioTrack, packets: list[Any]) -> None:
        for packet in packets:
            self._mux(track, packet)

    def _mux(self, track: _AudioTrack, packet: Any) -> None:
        """Write a packet; its time is moved after the previous one if need be, as MP4 requires."""
        if packet.dts is None:
            packet.dts = packet.pts if packet.pts is not None else (track.last_dts or -1) + 1
        if track.last_dts is not None and packet.dts <= track.last_dts:
            packet.dts = track.last_dts + 1
            track.reordered += 1
        packet.pts = packet.dts if packet.pts is None else max(packet.pts, packet.dts)
        packet.stream = track.target
        track.last_dts = packet.dts
        self._container.mux(packet)


def _can_copy_stream(stream: Any, codecs: set[str]) -> bool:
    """Try to write the header of an MP4 with this stream alone."""
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
    """Convert a packet's times to the ticks of its target."""
    base, tick = Fraction(packet.time_base), Fraction(target.time_base)
    for name in ("pts", "dts"):
        if getattr(packet, name) is not None:
            setattr(packet, name, round((getattr(packet, name) * base - start) / tick))
    packet.duration = round((packet.duration or 0) * base / tick)
    packet.time_base = tick
