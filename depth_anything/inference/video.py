"""`depth-anything video` as a function: videos and folders of frames in, depth videos and map folders out.

Frames are processed one after the other, so memory does not grow with the length of a clip.
"""

import copy
import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np

from depth_anything.data.address import escape_unprintable
from depth_anything.disk import atomic_write
from depth_anything.errors import UserError
from depth_anything.inference.clip_list import VIDEO_SUFFIXES, list_clips
from depth_anything.inference.clips import Clip, ClipFrame, FrameFolder
from depth_anything.inference.formats import (
    DIRECTION,
    ENDINGS,
    GAP_PX,
    display_name,
    display_values,
    paint_picture,
    resolve_colormap,
)
from depth_anything.inference.memory import check_image_memory
from depth_anything.inference.naming import assign_unique_paths, relative_output_paths
from depth_anything.inference.overwrite import FATAL_DISK_ERRNOS, RecordedOutputs
from depth_anything.inference.predictor import Predictor, check_finite
from depth_anything.inference.temporal import (
    RANGE_MODES,
    MapCache,
    SmoothedRange,
    TemporalSmoother,
    percentile_range,
)
from depth_anything.inference.video_writer import (
    MAP_FORMATS,
    MapFolderWriter,
    VideoWriter,
    check_video_size,
    find_h264_encoder,
    has_depth_comment,
)

FORMATS = ("mp4", *MAP_FORMATS)


def _is_legacy_output(path: Path, record: dict[str, Any]) -> bool:
    """Recognize a video by its comment, and a folder by a number of files that fits the number of frames."""
    if not path.is_dir():
        return has_depth_comment(path)
    frames = record["frames"]
    return isinstance(frames, int) and frames > 0 and len(list(path.iterdir())) % frames == 0


OUTPUTS = RecordedOutputs(
    command="depth-anything video",
    legacy_keys=frozenset(("source", "quantity", "unit", "larger", "frames", "range", "smooth")),
    is_legacy_output=_is_legacy_output,
    folder_endings=tuple(ENDINGS.values()),
)


@dataclass(frozen=True)
class VideoSettings:
    """What is written for each clip.

    Attributes:
        range: What the colors span: the values of the whole "clip" (two passes), of each "frame", or a "running" range.
        smooth: Weight of the previous map in the next one where the image does not move, 0 to below 1.
        formats: "mp4", and formats of maps, one file per frame: "png16", "npy", "exr".
        pred_only: The video shows the map without the image.
        grayscale: The video shows the map in gray.
        colormap: A matplotlib colormap; None: near is red, far is blue.
        batch_size: Frames per forward pass.
        rate: Frames per second of folders of frames.
    """

    range: str = "clip"
    smooth: float = 0.0
    formats: tuple[str, ...] = ("mp4",)
    pred_only: bool = False
    grayscale: bool = False
    colormap: str | None = None
    batch_size: int = 4
    rate: Fraction = Fraction(24)

    def __post_init__(self) -> None:
        """Validate the values.

        Raises:
            ValueError: A value is not among those listed above.
        """
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise UserError(f"format {' '.join(unknown) or '()'} is unknown", f"use {', '.join(FORMATS)}")
        if self.range not in RANGE_MODES:
            raise UserError(f"range={self.range!r} is unknown", f"use one of {', '.join(RANGE_MODES)}")
        resolve_colormap(grayscale=self.grayscale, colormap=self.colormap)
        if not 0 <= self.smooth < 1:
            raise ValueError(f"smooth={self.smooth} must be 0 or more and below 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more")

    @property
    def map_formats(self) -> tuple[str, ...]:
        """The formats with one file per frame."""
        return tuple(name for name in self.formats if name in MAP_FORMATS)


class FrameProgress(Protocol):
    """Wraps an iteration to display its progress."""

    def __call__(self, items: Iterable[Any], *, what: str, total: int | None) -> Iterable[Any]:
        """Return the items unchanged."""


@dataclass
class VideoResult:
    """What was written and what was skipped.

    Attributes:
        written: Each clip's video, folder of maps, or both.
        frames: Each clip's number of frames.
        skipped: Each clip or file without output, and the reason.
        notes: Remarks on each clip.
        failed: Each clip or file that should have output and has none, or lacks frames, and the reason.
    """

    written: dict[str, list[Path]] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def fail(self, name: str, reason: str) -> None:
        """Record why a clip has no output."""
        self.skipped[name] = self.failed[name] = reason


@dataclass(frozen=True)
class OutputFiles:
    """Paths of what is written for a clip; None for what is not requested."""

    video: Path | None
    maps: Path | None
    record: Path

    @classmethod
    def of(cls, target: Path, quantity: str, settings: VideoSettings) -> "OutputFiles":
        """Append the endings to `target`."""
        return cls(
            video=Path(f"{target}.mp4") if "mp4" in settings.formats else None,
            maps=Path(f"{target}_{quantity}") if settings.map_formats else None,
            record=Path(f"{target}.json"),
        )

    @property
    def products(self) -> list[Path]:
        """The video, the folder of maps, or both."""
        return [path for path in (self.video, self.maps) if path]


def predict_videos(
    predictor: Predictor,
    source: str | Path,
    output: str | Path,
    *,
    settings: VideoSettings | None = None,
    progress: FrameProgress = lambda items, what, total: items,
) -> VideoResult:
    """Predict a video, every video of a folder (its tree is kept) or list, or folders of frames.

    Writes NAME.mp4, a folder NAME_disparity (NAME_depth for meters) of maps if the settings ask for it, and NAME.json,
    which describes the values. If clips differ in their suffix only, it becomes part of the name: NAME_mov.mp4.

    Args:
        predictor: The predictor.
        source: The clips, as for `list_clips`.
        output: Output folder; created if missing. If it lies below `source`, it is not searched.
        settings: What to write.
        progress: Wraps each pass over a clip's frames, to display progress.

    Returns:
        What was written and what was skipped; a clip that fails does not stop the rest.

    Raises:
        ValueError: `source` does not exist or has no video, or an output would replace an input or a file that this
            command did not write.
    """
    settings = settings or VideoSettings()
    if Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"{output} is a file", "give a folder for the output")
    clips, skipped = list_clips(source, rate=settings.rate, leave_out=output)
    failed = {name: why for name, why in skipped.items() if _is_expected(name, Path(source))}
    result = VideoResult(skipped=skipped, failed=failed)
    if "mp4" in settings.formats:
        find_h264_encoder()
    targets = [Path(output) / target for target in _output_paths(clips, Path(source), predictor.quantity)]
    outputs = [OutputFiles.of(target, predictor.quantity, settings) for target in targets]
    replaceable = OUTPUTS.check(
        {path: files.record for files in outputs for path in (files.video, files.record) if path},
        {files.maps: files.record for files in outputs if files.maps},
        inputs=lambda: [Path(source), *(path for clip in clips for path in clip.files)],
    )
    for clip, files in zip(clips, outputs, strict=True):
        try:
            result.frames[clip.name] = predict_video(
                predictor, clip, files, settings=settings, replaceable=replaceable, progress=progress
            )
        except (OSError, av.FFmpegError) as error:
            if isinstance(error, OSError) and error.errno in FATAL_DISK_ERRNOS:
                raise
            result.fail(clip.name, error.strerror or str(error))
        except MemoryError:
            result.fail(clip.name, "there is not enough memory for it: reduce it first")
        except ValueError as error:
            result.fail(clip.name, str(error))
        else:
            result.written[clip.name] = files.products
            if clip.notes:
                result.notes[clip.name] = list(clip.notes)
            if clip.incomplete:
                result.failed[clip.name] = "; ".join(clip.notes)
    if not result.written:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(result.skipped.items())[:3])
        raise ValueError(f"no video of {source} could be processed ({reasons})")
    return result


def predict_video(
    predictor: Predictor,
    clip: Clip,
    files: OutputFiles,
    *,
    settings: VideoSettings,
    replaceable: Collection[Path] = (),
    progress: FrameProgress = lambda items, what, total: items,
) -> int:
    """Predict one clip.

    range="clip" takes two passes. The first stores its maps exactly in a temporary file of at most 8 GiB in the output
    folder; frames beyond that are predicted a second time.

    Args:
        predictor: The predictor.
        clip: The clip.
        files: Paths of the output.
        settings: What to write.
        replaceable: Outputs that exist and may be replaced, as `RecordedOutputs.check` returns them.
        progress: Wraps each pass over the frames, to display progress.

    Returns:
        The number of frames.

    Raises:
        ValueError: A frame cannot be read or predicted, or an output is too large or may not be replaced.
        OSError: The output cannot be written.
    """
    if files.video:
        check_video_size(clip.height, _video_width(clip, settings))
    check_image_memory(clip.height * clip.width * settings.batch_size)
    files.record.parent.mkdir(parents=True, exist_ok=True)
    for path in (*files.products, files.record):
        with suppress(FileNotFoundError):
            os.lstat(path)  # fails now, not after hours of work, if the disk does not allow such a name
    name = escape_unprintable(clip.name)
    colormap = resolve_colormap(grayscale=settings.grayscale, colormap=settings.colormap)
    pipeline = _MapPipeline(predictor, settings)
    clip_range, cache, count = _ClipRange(), None, 0
    with ExitStack() as stack:
        if settings.range == "clip" and not set(settings.formats) <= {"npy", "exr"}:
            cache = stack.enter_context(MapCache(files.record.parent, (clip.height, clip.width)))
            for _, map_ in pipeline.maps(progress(clip.read(), what=f"{name} (1 of 2)", total=clip.frames)):
                clip_range.add(map_, predictor)
                pipeline.store(map_, cache)
        video, folder = _open_writers(stack, predictor, clip, files, settings, clip_range)
        display_range = _DisplayRange(settings.range, clip_range, clip.time_base, predictor)
        what = f"{name} (2 of 2)" if cache else name
        for frame, map_ in pipeline.maps(progress(clip.read(video), what=what, total=clip.frames), cache):
            if not cache:
                clip_range.add(map_, predictor)
            colors, levels = display_range.update(map_, frame.pts)
            if video:
                picture = paint_picture(
                    frame.image,
                    map_,
                    predictor,
                    colormap=colormap,
                    pred_only=settings.pred_only,
                    low=colors[0],
                    high=colors[1],
                )
                video.write(picture, frame.pts)
            if folder:
                folder.write(frame.name, map_, *levels)
            count += 1
        if not count:
            raise ValueError("it has no frame")
        # The record is written first: after a kill in between, the next run still recognizes the files as its own.
        digests = {files.video.name: video.finish()} if video and files.video else {}
        clip.notes += video.notes if video else []
        folders = {files.maps.name: (folder.files, folder.bytes)} if folder and files.maps else {}
        record = _clip_record(predictor, clip, settings, clip_range, count)
        record |= OUTPUTS.build(digests, folders, earlier=files.record)
        for path in (*files.products, files.record):
            if path not in replaceable and os.path.lexists(path):
                raise ValueError(f"{path} was created by another process meanwhile and would be replaced")
        atomic_write(files.record, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return count


@dataclass
class _ClipRange:
    """Ranges of a clip: percentiles of the values that are painted (`display_values`), and extremes of the maps."""

    low: float = np.inf
    high: float = -np.inf
    map_min: float = np.inf
    map_max: float = -np.inf

    def add(self, map_: np.ndarray, predictor: Predictor) -> None:
        low, high = percentile_range(display_values(map_, predictor)[0])
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.map_min = min(self.map_min, float(map_.min()))
        self.map_max = max(self.map_max, float(map_.max()))


class _MapPipeline:
    """Frames to maps: through the network in batches, then through the temporal smoother."""

    def __init__(self, predictor: Predictor, settings: VideoSettings) -> None:
        self._predictor, self._batch_size = predictor, settings.batch_size
        align = predictor.quantity == "disparity"
        self._smoother = TemporalSmoother(settings.smooth, align=align) if settings.smooth else None
        self._smoother_after_cache = copy.copy(self._smoother)

    def maps(
        self, frames: Iterable[ClipFrame], cache: MapCache | None = None
    ) -> Iterator[tuple[ClipFrame, np.ndarray]]:
        """Yield each frame with its map; the first ones from `cache`, the rest from the network."""
        remaining, smoother = iter(frames), self._smoother
        if cache:
            smoother = self._smoother_after_cache
            for index, frame in enumerate(islice(remaining, cache.count)):
                yield frame, cache.read(index)
        while batch := list(islice(remaining, self._batch_size)):
            maps = self._predictor.predict_batch([frame.image for frame in batch])
            for frame, map_ in zip(batch, maps, strict=True):
                check_finite(map_, f"frame {frame.name}", precision=self._predictor.precision)
                yield frame, smoother(frame.image, map_) if smoother else map_

    def store(self, map_: np.ndarray, cache: MapCache) -> None:
        """Store a map, and the state of the smoother after the last map for which there was room."""
        if cache.append(map_):
            self._smoother_after_cache = copy.copy(self._smoother)


class _DisplayRange:
    """The range of the colors of a frame, and the range of the levels of its PNG, which clips no value."""

    def __init__(self, mode: str, clip_range: _ClipRange, time_base: Fraction, predictor: Predictor) -> None:
        self._mode, self._clip, self._time_base, self._predictor = mode, clip_range, time_base, predictor
        self._running, self._last_pts = SmoothedRange(), 0

    def update(self, map_: np.ndarray, pts: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return both ranges, each as (low, high)."""
        if self._mode == "clip":
            return (self._clip.low, self._clip.high), (self._clip.map_min, self._clip.map_max)
        values = display_values(map_, self._predictor)[0]
        extremes = float(map_.min()), float(map_.max())
        if self._mode == "frame":
            return (float(values.min()), float(values.max())), extremes
        seconds = float((pts - self._last_pts) * self._time_base)
        low, high = self._running.update(*percentile_range(values), seconds)
        self._last_pts = pts
        if values is not map_:  # the values painted are not the values written
            return (low, high), extremes
        return (low, high), (min(low, extremes[0]), max(high, extremes[1]))


def _open_writers(
    stack: ExitStack,
    predictor: Predictor,
    clip: Clip,
    files: OutputFiles,
    settings: VideoSettings,
    clip_range: _ClipRange,
) -> tuple[VideoWriter | None, MapFolderWriter | None]:
    video = folder = None
    if files.maps:
        folder = stack.enter_context(
            MapFolderWriter(
                files.maps,
                formats=settings.map_formats,
                quantity=predictor.quantity,
                unit=predictor.unit,
            )
        )
    if files.video:
        comment = f"{predictor.quantity} ({predictor.unit}), larger is {DIRECTION[predictor.quantity]}"
        if np.isfinite(clip_range.low):
            comment += (
                f", colors of {display_name(predictor)} from {clip_range.low:.6g} to {clip_range.high:.6g}"
            )
        video = stack.enter_context(
            VideoWriter(
                files.video,
                height=clip.height,
                width=_video_width(clip, settings),
                rate=clip.rate,
                time_base=clip.time_base,
                pixel_aspect=clip.pixel_aspect,
                metadata={"comment": comment},
            )
        )
    return video, folder


def _clip_record(
    predictor: Predictor, clip: Clip, settings: VideoSettings, clip_range: _ClipRange, count: int
) -> dict[str, Any]:
    """Build NAME.json, without its digests."""
    colors = {"of": display_name(predictor), "low": clip_range.low, "high": clip_range.high}
    return {
        "source": clip.path.name,
        "quantity": predictor.quantity,
        "unit": predictor.unit,
        "larger": DIRECTION[predictor.quantity],
        "frames": count,
        "rate": str(clip.rate),
        "height": clip.height,
        "width": clip.width,
        "range": settings.range,
        "smooth": settings.smooth,
        "colours": colors if settings.range == "clip" else "differ by frame",
        "values": {"low": clip_range.map_min, "high": clip_range.map_max},
        "notes": clip.notes,
    }


def _video_width(clip: Clip, settings: VideoSettings) -> int:
    return clip.width if settings.pred_only else 2 * clip.width + GAP_PX


def _is_expected(name: str, source: Path) -> bool:
    """Tell a file that should be a video from other files in a folder of videos."""
    return not source.is_dir() or Path(name).suffix.lower() in VIDEO_SUFFIXES or (source / name).is_dir()


def _output_paths(clips: list[Clip], source: Path, quantity: str) -> list[Path]:
    """Assign output paths; the name of a folder of frames has no suffix to remove."""
    stems, marks = [], []
    for clip, path in zip(clips, relative_output_paths([clip.name for clip in clips], source), strict=True):
        is_folder = isinstance(clip, FrameFolder)
        stems.append(path if is_folder else path.with_suffix(""))
        marks.append("frames" if is_folder else path.suffix[1:] or "video")
    return assign_unique_paths(stems, marks, endings=(".mp4", ".json", f"_{quantity}"))
