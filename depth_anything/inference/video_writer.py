"""What is made of clips: H.264 that plays in a browser, with the clip's sound; and folders of maps."""

from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from depth_anything.disk import atomic_folder, atomic_path, remove_stale
from depth_anything.inference.audio import AudioWriter
from depth_anything.inference.formats import ENDINGS, encode_map, encode_png
from depth_anything.inference.overwrite import file_sha256

MAP_FORMATS = ("png16", "npy", "exr")
"""What a map is written as, a file a frame."""

H264_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "preset": "medium"},
    "libopenh264": {"rc_mode": "quality"},
    "h264_videotoolbox": {},
}
"""H.264 encoders, the best first, and what each is told. PyAV's wheels have the first."""

MAX_SIDE_PX = 16384
"""A side of a picture that H.264's encoders take at most."""

_BITS_PER_PIXEL = 0.15  # of encoders that know no constant quality
_BT709, _LIMITED = 1, 1
_KEYFRAME_INTERVAL_S = 2  # seconds between frames one can jump to


class VideoWriter:
    """An MP4 in the making: H.264, yuv420p, BT.709, index in front; seen under its name only when whole.

    H.264 in yuv420p has even sides only: an odd one gets its last row or column twice.
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
        notes: dict[str, str],
    ) -> None:
        """Begin a film.

        Args:
            path: of the film, ending in .mp4; one of this name is replaced when this one is done.
            height: of its pictures, pixels.
            width: of its pictures, pixels.
            rate: frames a second, nominal.
            time_base: seconds a tick.
            pixel_aspect: width of a pixel over its height.
            notes: go into the file's metadata.

        Raises:
            ValueError: this PyAV has no H.264 encoder.
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
        self._container.metadata.update(notes)
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
            raise ValueError(f"{name} takes no pictures of {stream.width}×{stream.height}") from error
        self._stream, self._sound = stream, AudioWriter(self._container)
        self._written, self._digest = 0, ""

    @property
    def notes(self) -> list[str]:
        """What went otherwise than it should, of the sound."""
        return self._sound.notes

    def __enter__(self) -> "VideoWriter":
        """Return itself; leaving finishes the film, or removes it after an exception."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the film, or remove what there is of it."""
        if kind is not None:
            self._output.__exit__(kind, error, trace)
            return
        with self._output:
            self.finish()

    def _close(self) -> None:
        with suppress(av.FFmpegError, ValueError):  # an incomplete film is removed anyway
            self._container.close()

    def finish(self) -> str:
        """Write the end of the film, which is not yet seen under its name; return its sha256.

        Raises:
            ValueError: the film would not hold every picture.
        """
        if not self._digest:
            self._mux(self._stream.encode())
            self._sound.finish()
            self._container.close()
            with av.open(str(self._temporary)) as film:
                frames = film.streams.video[0].frames if film.streams.video else 0
            if frames != self._written:
                raise ValueError(
                    f"the film would hold {frames} of {self._written} pictures, so it is not kept"
                )
            self._digest = file_sha256(self._temporary)
        return self._digest

    def add_audio(self, stream: Any) -> None:
        """Make room for an audio stream, before the first picture."""
        self._sound.add(stream)

    def write_audio(self, packet: Any, start: Fraction) -> None:
        """Take a packet of audio; `start` seconds are its clip's zero."""
        self._sound.write(packet, start)

    def write(self, image: np.ndarray, pts: int) -> None:
        """Take a picture, uint8 (height, width, 3) RGB, of a time in ticks."""
        odd = [(0, side % 2) for side in image.shape[:2]]
        if any(more for _, more in odd):
            image = np.pad(image, [*odd, (0, 0)], mode="edge")
        frame: Any = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=1,  # to start more takes longer than they save
        )
        frame.pts, frame.time_base = pts, self._time_base
        self._mux(self._stream.encode(frame))
        self._written += 1

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            self._container.mux(packet)


class MapFolderWriter:
    """A folder of maps in the making, a file a frame; seen under its name only when whole."""

    def __init__(
        self, path: Path, *, formats: tuple[str, ...], quantity: str, unit: str, replace: bool
    ) -> None:
        """Begin a folder.

        Args:
            path: of the folder.
            formats: of `MAP_FORMATS`.
            quantity: "disparity" or "depth".
            unit: of the values.
            replace: a folder of this name is an earlier one of ours, and goes when this one is done.

        Raises:
            ValueError: there is a folder of this name that is not ours.
        """
        if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} is in the way and was not made by this command: move it")
        self._output = atomic_folder(path, sync=False)
        self._temporary = self._output.__enter__()
        self._formats, self._quantity, self._unit = formats, quantity, unit
        self.files = self.bytes = 0

    def __enter__(self) -> "MapFolderWriter":
        """Return itself; leaving finishes the folder, or removes it after an exception."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the folder, or remove what there is of it."""
        self._output.__exit__(kind, error, trace)

    def write(self, name: str, map: np.ndarray, low: float, high: float) -> None:
        """Write a frame's map; `low` and `high` become the first and last of a PNG's levels."""
        for format in self._formats:
            if format == "png16":
                data = encode_png(map, bits=16, quantity=self._quantity, unit=self._unit, low=low, high=high)
            else:
                data = encode_map(map, format, quantity=self._quantity, unit=self._unit)
            (self._temporary / f"{name}{ENDINGS[format]}").write_bytes(data)
            self.files, self.bytes = self.files + 1, self.bytes + len(data)


def check_video_size(height: int, width: int) -> None:
    """Refuse a film that the encoder does not take, before anything is computed.

    Raises:
        ValueError: a side is longer than `MOST_SIDE_PX`; the sentence says what to do.
    """
    if max(height, width) > MAX_SIDE_PX:
        raise ValueError(
            f"its film would be {width}×{height}, and H.264 takes {MAX_SIDE_PX} px a side: take --format png16, npy "
            f"or exr; --pred-only for a film up to {MAX_SIDE_PX} px wide; or reduce the video first"
        )


def find_h264_encoder() -> str:
    """Name the best H.264 encoder of this PyAV.

    Raises:
        ValueError: there is none.
    """
    for name in H264_ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except ValueError:  # av.codec.UnknownCodecError
            continue
        return name
    raise ValueError(
        "this PyAV has no H.264 encoder: type  pip install --force-reinstall --only-binary av av"
    )
