"""Writers of video output: an H.264 MP4 that plays in browsers, with audio, and a folder of map files."""

import re
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from depth_anything.disk import atomic_folder, atomic_path, remove_stale
from depth_anything.errors import UserError
from depth_anything.inference.audio import AudioWriter
from depth_anything.inference.formats import ENDINGS, encode_map, encode_png
from depth_anything.inference.overwrite import file_sha256

MAP_FORMATS = ("png16", "npy", "exr")
"""Formats of maps, one file per frame."""

H264_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "preset": "medium"},
    "libopenh264": {"rc_mode": "quality"},
    "h264_videotoolbox": {},
}
"""H.264 encoders, the best first, and their options. PyAV's wheels contain the first."""

MAX_SIDE_PX = 16384
"""Maximum side of an H.264 video."""

_BITS_PER_PIXEL = 0.15  # for encoders without a constant-quality mode
_BT709, _LIMITED = 1, 1
_KEYFRAME_INTERVAL_S = 2
_DEPTH_COMMENT = re.compile(r"(disparity|depth) \(\w+\), larger is (nearer|farther)")


class VideoWriter:
    """Writes an MP4: H.264, yuv420p, BT.709, index at the front; the file appears under its name when complete.

    yuv420p needs even sides: the last row or column of an odd side is repeated.
    """

    def __init__(
        self,
        path: Path,
        *,
        height: int,
        width: int,
        rate: Fraction,
        time_base: Fraction,
        pixel_aspect: Fraction = Fraction(1),
        metadata: dict[str, str],
    ) -> None:
        """Open a video for writing.

        Args:
            path: Path of the .mp4; an existing file is replaced when the video is complete.
            height: Height of the frames, pixels.
            width: Width of the frames, pixels.
            rate: Nominal frames per second.
            time_base: Seconds per tick.
            pixel_aspect: Width of a pixel over its height.
            metadata: Metadata of the file.

        Raises:
            ValueError: PyAV has no H.264 encoder, or the encoder refuses the size.
        """
        self._output = ExitStack()
        self._temporary = self._output.enter_context(atomic_path(path))
        self._time_base, self._reformatter = time_base, VideoReformatter()
        name = find_h264_encoder()
        remove_stale(path.parent)
        self._container: Any = av.open(
            str(self._temporary), "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}
        )
        self._output.callback(self._close)
        self._container.metadata.update(metadata)
        stream: Any = self._container.add_stream(name, rate=rate, options=H264_ENCODERS[name])
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        context = stream.codec_context
        context.gop_size = max(1, round(rate * _KEYFRAME_INTERVAL_S))
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        if pixel_aspect != 1:
            context.sample_aspect_ratio = pixel_aspect
        if name != "libx264":
            context.bit_rate = round(stream.width * stream.height * rate * _BITS_PER_PIXEL)
        try:
            context.open()
        except av.FFmpegError as error:
            self.__exit__(type(error), error, None)
            raise ValueError(f"{name} refuses frames of {stream.width}×{stream.height}") from error
        self._stream, self._audio = stream, AudioWriter(self._container)
        self._frame_count, self._digest = 0, ""

    @property
    def notes(self) -> list[str]:
        """Remarks on the audio."""
        return self._audio.notes

    def __enter__(self) -> "VideoWriter":
        """Return itself; leaving completes the video, or removes it after an exception."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the video, or remove it after an exception."""
        if kind is not None:
            self._output.__exit__(kind, error, trace)
            return
        with self._output:
            self.finish()

    def _close(self) -> None:
        with suppress(av.FFmpegError, ValueError):  # an incomplete video is removed anyway
            self._container.close()

    def finish(self) -> str:
        """Write the end of the video, which has its temporary name until the context ends; return its sha256.

        Raises:
            ValueError: The file has fewer frames than were written.
        """
        if not self._digest:
            self._mux(self._stream.encode())
            self._audio.finish()
            self._container.close()
            with av.open(str(self._temporary)) as video:
                frames = video.streams.video[0].frames if video.streams.video else 0
            if frames != self._frame_count:
                raise ValueError(
                    f"the video would hold {frames} of {self._frame_count} frames and is removed"
                )
            self._digest = file_sha256(self._temporary)
        return self._digest

    def add_audio(self, stream: Any) -> None:
        """Add an audio stream; call it before the first frame."""
        self._audio.add(stream)

    def write_audio(self, packet: Any, start: Fraction) -> None:
        """Write an audio packet; the time `start`, in seconds, becomes 0."""
        self._audio.write(packet, start)

    def write(self, image: np.ndarray, pts: int) -> None:
        """Write a frame, uint8 (height, width, 3) RGB, at a time in ticks."""
        padding = [(0, side % 2) for side in image.shape[:2]]
        if any(after for _, after in padding):
            image = np.pad(image, [*padding, (0, 0)], mode="edge")
        frame: Any = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=1,  # starting more takes longer than they save
        )
        frame.pts, frame.time_base = pts, self._time_base
        self._mux(self._stream.encode(frame))
        self._frame_count += 1

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            self._container.mux(packet)


class MapFolderWriter:
    """Writes a folder of maps, one file per frame and format; the folder appears under its name when complete."""

    def __init__(self, path: Path, *, formats: tuple[str, ...], quantity: str, unit: str) -> None:
        """Create the temporary folder.

        Args:
            path: Path of the folder; an existing folder is replaced when this one is complete.
            formats: Any of `MAP_FORMATS`.
            quantity: "disparity" or "depth".
            unit: Unit of the values.
        """
        self._output = atomic_folder(path, sync=False)
        self._temporary = self._output.__enter__()
        self._formats, self._quantity, self._unit = formats, quantity, unit
        self.files = self.bytes = 0

    def __enter__(self) -> "MapFolderWriter":
        """Return itself; leaving completes the folder, or removes it after an exception."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the folder, or remove it after an exception."""
        self._output.__exit__(kind, error, trace)

    def write(self, name: str, map: np.ndarray, low: float, high: float) -> None:
        """Write the map of a frame; `low` and `high` are the values of the lowest and highest level of a PNG."""
        for format in self._formats:
            if format == "png16":
                data = encode_png(map, bits=16, quantity=self._quantity, unit=self._unit, low=low, high=high)
            else:
                data = encode_map(map, format, quantity=self._quantity, unit=self._unit)
            (self._temporary / f"{name}{ENDINGS[format]}").write_bytes(data)
            self.files, self.bytes = self.files + 1, self.bytes + len(data)


def check_video_size(height: int, width: int) -> None:
    """Refuse a video that the encoder cannot write, before anything is computed.

    Raises:
        ValueError: A side is longer than `MAX_SIDE_PX`.
    """
    if max(height, width) > MAX_SIDE_PX:
        raise UserError(
            f"its video would be {width}×{height}, and H.264 allows {MAX_SIDE_PX} px per side",
            f"use --format png16, npy or exr; --pred-only for a video up to {MAX_SIDE_PX} px wide; or reduce the input",
        )


def find_h264_encoder() -> str:
    """Return the best H.264 encoder of the installed PyAV.

    Raises:
        ValueError: It has none.
    """
    for name in H264_ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except ValueError:  # av.codec.UnknownCodecError
            continue
        return name
    raise UserError(
        "this PyAV has no H.264 encoder", "type  pip install --force-reinstall --only-binary av av"
    )


def has_depth_comment(path: Path) -> bool:
    """Tell whether a video's metadata has the comment that `depth-anything video` writes."""
    try:
        with av.open(str(path.absolute()), options={"protocol_whitelist": "file"}) as video:
            return bool(_DEPTH_COMMENT.match(video.metadata.get("comment", "")))
    except (av.FFmpegError, ValueError):
        return False
