"""From clips to films of their depth: frame after frame, in memory that does not grow with the length."""

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
from depth_anything.inference.clips import VIDEO_SUFFIXES, Clip, ClipFrame, FrameFolder, list_clips
from depth_anything.inference.formats import (
    GAP_PX,
    direction,
    display_name,
    display_values,
    resolve_colormap,
    side_by_side,
)
from depth_anything.inference.memory import check_image_memory
from depth_anything.inference.naming import assign_unique_paths, relative_output_paths
from depth_anything.inference.overwrite import FATAL_DISK_ERRNOS
from depth_anything.inference.ownership import build_video_record, check_video_overwrite
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
)
from depth_anything.visualize import colorize_by_distance

FORMATS = ("mp4", *MAP_FORMATS)


@dataclass(frozen=True)
class VideoSettings:
    """How films are made.

    Attributes:
        range: which values the colours span: of the whole "clip" (two passes), "running", or of each "frame".
        smooth: share of the last map in the next where the picture holds still, 0 to below 1.
        formats: "mp4", and maps as files, a frame a file: "png16", "npy", "exr".
        pred_only: the film shows the map alone, not picture and map side by side.
        grayscale: grey levels in place of colours.
        colormap: a name matplotlib knows; None: near is red, far is blue.
        batch_size: frames that go through the network at once.
        rate: frames a second of folders of frames.
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
        """Refuse what cannot be.

        Raises:
            ValueError: a value is outside what the attributes say.
        """
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ValueError(
                f"format {' '.join(unknown) or 'of nothing'} is unknown; use {', '.join(FORMATS)}"
            )
        if self.range not in RANGE_MODES:
            raise ValueError(f"range={self.range!r} is unknown; use one of {', '.join(RANGE_MODES)}")
        resolve_colormap(grayscale=self.grayscale, colormap=self.colormap)
        if not 0 <= self.smooth < 1:
            raise ValueError(f"smooth={self.smooth} must be 0 or more and below 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more")

    @property
    def map_formats(self) -> tuple[str, ...]:
        """Those of the formats that are a file a frame."""
        return tuple(name for name in self.formats if name in MAP_FORMATS)


class FrameProgress(Protocol):
    """Shows how far a pass has come; gives the items on as they are."""

    def __call__(self, items: Iterable[Any], *, what: str, total: int | None) -> Iterable[Any]:
        """Pass items through."""


@dataclass
class VideoResult:
    """What became of the clips.

    Attributes:
        written: per clip its film, its folder of maps, or both.
        frames: per clip how many there were.
        skipped: per clip, or file, that gave nothing, why.
        notes: per clip what went otherwise than it should.
        failed: per clip, or file, that was to be mapped and gave nothing, or not all its pictures, why.
    """

    written: dict[str, list[Path]] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def fail(self, name: str, why: str) -> None:
        """Note that a clip could not be mapped."""
        self.skipped[name] = self.failed[name] = why


def predict_videos(
    predictor: Predictor,
    source: str | Path,
    output: str | Path,
    *,
    settings: VideoSettings | None = None,
    watch: FrameProgress = lambda items, what, total: items,
) -> VideoResult:
    """Map a video, every video of a folder (its tree is kept) or list, or folders of frames.

    Writes NAME.mp4, a folder NAME_disparity (of a metric model NAME_depth) of maps if `settings` ask for them,
    and NAME.json, which says what the values are. Where two clips differ in their ending only, it becomes part
    of the name: NAME_mov.mp4.

    Args:
        predictor: the model.
        source: what to map, as `list_clips` takes it.
        output: folder of what is written; made if need be. Below `source`, it is passed over.
        settings: how; the default ones unless given.
        watch: wraps each pass over a clip's frames; for progress bars.

    Returns:
        What was written and what was skipped; a clip that cannot be mapped does not stop the rest.

    Raises:
        ValueError: nothing at `source`, no video among it, or something that is read, or that others wrote, has the
            name of what is to be written.
    """
    settings = settings or VideoSettings()
    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"{output} is a file: give a folder for what is made")
    clips, skipped = list_clips(source, rate=settings.rate, leave_out=output)
    outcome = VideoResult(skipped=skipped)
    outcome.failed = {name: why for name, why in skipped.items() if _is_expected(name, Path(source))}
    if "mp4" in settings.formats:
        find_h264_encoder()
    targets = [Path(output) / target for target in _output_paths(clips, Path(source), predictor.quantity)]
    made = [_output_files(target, predictor, settings) for target in targets]
    replaced = check_video_overwrite(
        [(path, paths[-1]) for paths in made for path in paths],
        inputs=lambda: [Path(source), *(path for clip in clips for path in clip.files)],
    )
    for clip, target, paths in zip(clips, targets, made, strict=True):
        try:
            outcome.frames[clip.name] = predict_video(
                predictor, clip, target, settings=settings, replaced=replaced, watch=watch
            )
        except (OSError, av.FFmpegError) as error:
            if isinstance(error, OSError) and error.errno in FATAL_DISK_ERRNOS:
                raise
            outcome.fail(clip.name, error.strerror or str(error))
        except MemoryError:
            outcome.fail(clip.name, "there is not enough memory for it: reduce it first")
        except ValueError as error:
            outcome.fail(clip.name, str(error))
        else:
            outcome.written[clip.name] = [path for path in paths if path.suffix != ".json"]
            if clip.notes:
                outcome.notes[clip.name] = list(clip.notes)
            if clip.incomplete:
                outcome.failed[clip.name] = "; ".join(clip.notes)
    if not outcome.written:
        first = "; ".join(f"{name}: {why}" for name, why in list(outcome.skipped.items())[:3])
        raise ValueError(f"nothing could be made of {source} ({first})")
    return outcome


def predict_video(
    predictor: Predictor,
    clip: Clip,
    target: Path,
    *,
    settings: VideoSettings,
    replaced: Collection[Path] = (),
    watch: FrameProgress = lambda items, what, total: items,
) -> int:
    """Map one clip.

    With range="clip" there are two passes. The first keeps its maps, exact, in a file of at most 8 GiB beside the
    output; frames beyond that go through the network a second time.

    Args:
        predictor: the model.
        clip: what to map.
        target: what is written is called this, and an ending.
        settings: how.
        replaced: what of it exists and may be replaced, as `check_outputs` tells.
        watch: wraps each pass over the frames.

    Returns:
        The number of frames.

    Raises:
        ValueError: a frame cannot be read, the network gives no numbers for one, the film would be larger than H.264
            takes, or something that may not be replaced is in the way.
        OSError: the files cannot be written.
    """
    if "mp4" in settings.formats:
        check_video_size(clip.height, _video_width(clip, settings))
    check_image_memory(clip.height * clip.width * settings.batch_size)
    files = _output_files(target, predictor, settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in files:
        with suppress(FileNotFoundError):
            os.lstat(path)  # a name that the disk does not take is told before hours of work
    name = escape_unprintable(clip.name)
    flow = _MapPipeline(predictor, settings)
    seen, spool, count = _ClipRange(), None, 0
    with ExitStack() as stack:
        if settings.range == "clip" and not set(settings.formats) <= {"npy", "exr"}:
            spool = stack.enter_context(MapCache(target.parent, (clip.height, clip.width)))
            for _, map_ in flow.maps(watch(clip.read(), what=f"{name} (1 of 2)", total=clip.frames)):
                seen.add(map_, predictor)
                flow.keep(map_, spool)
        film, folder = _open_writers(stack, predictor, clip, target, settings, seen, replaced)
        scale = _DisplayRange(settings.range, seen, clip.time_base, predictor)
        what = f"{name} (2 of 2)" if spool else name
        for picture, map_ in flow.maps(watch(clip.read(film), what=what, total=clip.frames), spool):
            if not spool:
                seen.add(map_, predictor)
            shown, kept = scale(map_, picture.pts)
            if film:
                film.write(_paint_frame(picture.image, map_, shown, predictor, settings), picture.pts)
            if folder:
                folder.write(picture.name, map_, *kept)
            count += 1
        if not count:
            raise ValueError("it has no frame")
        # The record comes first: whoever is killed in between knows the files again the next time.
        digest = film.finish() if film else ""
        clip.notes += film.notes if film else []
        facts = _clip_record(predictor, clip, settings, seen, count) | build_video_record(
            files[-1],
            films={files[0].name: digest} if film else {},
            maps={files[-2].name: (folder.files, folder.bytes)} if folder else {},
        )
        appeared = [path for path in files if path not in replaced and os.path.lexists(path)]
        if appeared:
            raise ValueError(f"{appeared[0]} has appeared meanwhile and would be replaced")
        atomic_write(files[-1], json.dumps(facts, indent=1, ensure_ascii=False).encode())
    return count


@dataclass
class _ClipRange:
    """What a clip spans: most of the values that are painted (`shown_values`), and all values of its maps."""

    low: float = np.inf
    high: float = -np.inf
    least: float = np.inf
    most: float = -np.inf

    def add(self, map_: np.ndarray, predictor: Predictor) -> None:
        low, high = percentile_range(display_values(map_, predictor)[0])
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.least, self.most = min(self.least, float(map_.min())), max(self.most, float(map_.max()))


class _MapPipeline:
    """Frames to maps: through the network in batches, then through the smoother, one after the other."""

    def __init__(self, predictor: Predictor, settings: VideoSettings) -> None:
        self._predictor, self._batch_size = predictor, settings.batch_size
        self._precision = getattr(predictor, "precision", "fp32")  # what stands in for a network has none
        align = predictor.quantity == "disparity"
        self._smoother = TemporalSmoother(settings.smooth, align=align) if settings.smooth else None
        self._kept = copy.copy(self._smoother)

    def maps(
        self, pictures: Iterable[ClipFrame], spool: MapCache | None = None
    ) -> Iterator[tuple[ClipFrame, np.ndarray]]:
        """Yield each picture with its map: those that `spool` has from there."""
        left, smoother = iter(pictures), self._smoother
        if spool:
            smoother = self._kept
            for number, picture in enumerate(islice(left, spool.count)):
                yield picture, spool.read(number)
        while batch := list(islice(left, self._batch_size)):
            maps = self._predictor.predict_batch([picture.image for picture in batch])
            for picture, map_ in zip(batch, maps, strict=True):
                check_finite(map_, f"frame {picture.name}", precision=self._precision)
                yield picture, smoother(picture.image, map_) if smoother else map_

    def keep(self, map_: np.ndarray, spool: MapCache) -> None:
        """Keep a map, and how the smoother stood after the last one that found room."""
        if spool.append(map_):
            self._kept = copy.copy(self._smoother)


class _DisplayRange:
    """Which range a frame is shown in, and which it is written as integers in, which cuts nothing off."""

    def __init__(self, mode: str, seen: _ClipRange, time_base: Fraction, predictor: Predictor) -> None:
        self._mode, self._seen, self._time_base, self._predictor = mode, seen, time_base, predictor
        self._running, self._last = SmoothedRange(), 0

    def __call__(self, map_: np.ndarray, pts: int) -> tuple[tuple[float, float], tuple[float, float]]:
        if self._mode == "clip":
            return (self._seen.low, self._seen.high), (self._seen.least, self._seen.most)
        values = display_values(map_, self._predictor)[0]
        least, most = float(map_.min()), float(map_.max())
        if self._mode == "frame":
            return (float(values.min()), float(values.max())), (least, most)
        low, high = self._running.update(
            *percentile_range(values), float((pts - self._last) * self._time_base)
        )
        self._last = pts
        if values is not map_:  # other values are painted than are written
            return (low, high), (least, most)
        return (low, high), (min(low, least), max(high, most))


def _open_writers(
    stack: ExitStack,
    predictor: Predictor,
    clip: Clip,
    target: Path,
    settings: VideoSettings,
    seen: _ClipRange,
    replaced: Collection[Path],
) -> tuple[VideoWriter | None, MapFolderWriter | None]:
    film = folder = None
    if settings.map_formats:
        path = _add_ending(target, f"_{predictor.quantity}")
        folder = stack.enter_context(
            MapFolderWriter(
                path,
                formats=settings.map_formats,
                quantity=predictor.quantity,
                unit=predictor.unit,
                replace=path in replaced,
            )
        )
    if "mp4" in settings.formats:
        notes = {
            "comment": f"{predictor.quantity} ({predictor.unit}), larger is {direction(predictor.quantity)}"
        }
        if np.isfinite(seen.low):
            notes["comment"] += (
                f", colours of {display_name(predictor)} from {seen.low:.6g} to {seen.high:.6g}"
            )
        film = stack.enter_context(
            VideoWriter(
                _add_ending(target, ".mp4"),
                height=clip.height,
                width=_video_width(clip, settings),
                rate=clip.rate,
                time_base=clip.time_base,
                pixel_aspect=clip.pixel_aspect,
                notes=notes,
            )
        )
    return film, folder


def _paint_frame(
    image: np.ndarray,
    map_: np.ndarray,
    shown: tuple[float, float],
    predictor: Predictor,
    settings: VideoSettings,
) -> np.ndarray:
    values, quantity = display_values(map_, predictor)
    colormap = resolve_colormap(grayscale=settings.grayscale, colormap=settings.colormap)
    picture = colorize_by_distance(values, quantity=quantity, low=shown[0], high=shown[1], colormap=colormap)
    return picture if settings.pred_only else side_by_side(image, picture)


def _clip_record(
    predictor: Predictor, clip: Clip, settings: VideoSettings, seen: _ClipRange, count: int
) -> dict[str, Any]:
    """What NAME.json says."""
    span = {"of": display_name(predictor), "low": seen.low, "high": seen.high}
    return {
        "source": clip.path.name,
        "quantity": predictor.quantity,
        "unit": predictor.unit,
        "larger": direction(predictor.quantity),
        "frames": count,
        "rate": str(clip.rate),
        "height": clip.height,
        "width": clip.width,
        "range": settings.range,
        "smooth": settings.smooth,
        "colours": span if settings.range == "clip" else "differ by frame",
        "values": {"low": seen.least, "high": seen.most},
        "notes": clip.notes,
    }


def _video_width(clip: Clip, settings: VideoSettings) -> int:
    return clip.width if settings.pred_only else 2 * clip.width + GAP_PX


def _output_files(target: Path, predictor: Predictor, settings: VideoSettings) -> list[Path]:
    """List what is made of a clip."""
    return [
        *([_add_ending(target, ".mp4")] if "mp4" in settings.formats else []),
        *([_add_ending(target, f"_{predictor.quantity}")] if settings.map_formats else []),
        _add_ending(target, ".json"),
    ]


def _is_expected(name: str, source: Path) -> bool:
    """Tell a file that was meant to be mapped from what lies beside videos in a folder."""
    return not source.is_dir() or Path(name).suffix.lower() in VIDEO_SUFFIXES or (source / name).is_dir()


def _add_ending(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _output_paths(clips: list[Clip], source: Path, quantity: str) -> list[Path]:
    """Name what each clip becomes; a folder of frames has no ending to lose."""
    names = relative_output_paths([clip.name for clip in clips], source)
    folders = [isinstance(clip, FrameFolder) for clip in clips]
    stems = [name if folder else name.with_suffix("") for name, folder in zip(names, folders, strict=True)]
    marks = [
        "frames" if folder else name.suffix[1:] or "video"
        for name, folder in zip(names, folders, strict=True)
    ]
    return assign_unique_paths(stems, marks, endings=(".mp4", ".json", f"_{quantity}"))
