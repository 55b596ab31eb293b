"""From image files to map files: every image once, nothing overwritten, the network never waiting for a disk."""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.data.image_headers import estimate_decode_cost
from depth_anything.data.sample import decode_image, image_warnings
from depth_anything.disk import atomic_write
from depth_anything.inference.formats import (
    ENDINGS,
    FORMAT_DESCRIPTIONS,
    GAP_PX,
    direction,
    display_name,
    display_values,
    encode_map,
    encode_picture,
    resolve_colormap,
    write_map,
)
from depth_anything.inference.image_list import ImageList, list_images
from depth_anything.inference.memory import check_image_memory, is_out_of_memory, lock_large_image
from depth_anything.inference.overwrite import FATAL_DISK_ERRNOS, build_record, check_overwrite, is_recorded
from depth_anything.inference.pointcloud import (
    MAX_POINTS,
    POINT_FORMATS,
    SATURATED_DEPTH_SHARE,
    choose_focal_length,
    encode_points,
    unproject,
)
from depth_anything.inference.predictor import Predictor, check_finite
from depth_anything.ingest.photographs import Photograph
from depth_anything.visualize import distance_colormap

__all__ = ["PredictResult", "PredictSettings", "predict_files", "write_map"]

WORKER_THREADS = 2
"""That decode ahead of the network, and as many that write behind it."""

COMMAND = "depth-anything predict"
"""In NAME.json: whose files they are."""

_LEGACY_RECORD_KEYS = frozenset(
    ("image", "height", "width", "quantity", "unit", "larger", "low", "high", "files", "model")
)
"""Of a NAME.json of the versions that kept no digests."""

RAW_DEPTH_SUFFIX = "_raw_depth_meter.npy"
"""The authors' name of what --save-numpy writes."""


@dataclass(frozen=True)
class PredictSettings:
    """What is made of an image.

    Attributes:
        formats: Files of values and of points, any of `ENDINGS` and `POINT_FORMATS`.
        pred_only: The picture shows the map alone.
        grayscale: The picture's map is grey.
        colormap: Of the picture; None: the authors', near in red.
        focal_px: Of every image, for points; None: see `choose_focal`.
        max_points: In a file of points.
        save_numpy: Also the authors' NAME_raw_depth_meter.npy.
    """

    formats: Sequence[str] = ("png16",)
    pred_only: bool = False
    grayscale: bool = False
    colormap: str | None = None
    focal_px: float | None = None
    max_points: int = MAX_POINTS
    save_numpy: bool = False

    @property
    def points(self) -> list[str]:
        """The formats that hold points."""
        return [format for format in self.formats if format in POINT_FORMATS]

    @property
    def values(self) -> list[str]:
        """The formats that hold values."""
        return [format for format in self.formats if format not in POINT_FORMATS]


@dataclass
class PredictResult:
    """What became of the files.

    Attributes:
        images: How many were mapped.
        written: The files written.
        skipped: Per file that was not mapped, why.
        failed: Those of the skipped that should have been mapped: images by their suffix, files that were named one by
            one, and images that the network or the disk refused. The rest are other files of a folder or tar.
        notes: Per mapped image, what a user may not expect, as that it is the first of an animation.
        focals: Whence focal lengths came.
    """

    images: int = 0
    written: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    focals: Counter[str] = field(default_factory=Counter)

    def fail(self, name: str, error: BaseException) -> None:
        """Note that an image could not be mapped."""
        why = "there is not enough memory for it: reduce it first" if is_out_of_memory(error) else str(error)
        self.skipped[name] = self.failed[name] = why


@dataclass(frozen=True)
class _PreparedImage:
    """An image, ready for the network."""

    name: str
    target: Path
    pixels: np.ndarray
    prepared: np.ndarray
    focal: tuple[float, str]
    notes: list[str]


def predict_files(
    predictor: Predictor,
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    settings: PredictSettings | None = None,
    batch_size: int = 1,
    facts: Mapping[str, Any] | None = None,
    watch: Callable[[list[Photograph]], Iterable[Photograph]] = iter,
    way_out: str = "give another folder for the maps",
) -> PredictResult:
    """Map an image, or every image of a folder (its tree is kept), list file or tar, or of several of these.

    Writes NAME.png, the picture; NAME_disparity (of a model that gives metres NAME_depth) in each format; NAME_points
    in each format of points; and NAME.json, which says what they are. Where two images would share a name, their
    endings become part of it (NAME_jpg.png), else a number. Every file is seen whole or not at all. Only files that
    were written here are replaced, as NAME.json tells by their sha256.

    Args:
        predictor: the model.
        source: what to map. Names of several begin where their paths part.
        output: folder of the maps; made if need be. Below `source`, it is passed over.
        products: what to make.
        batch_size: images that the network sees at once, where their shapes agree.
        facts: about the model, for NAME.json.
        watch: wraps the pass over the files; for progress bars.
        way_out: what to do where `output` cannot be used, for the error.

    Returns:
        What was written and what was skipped; what is no image, or cannot be mapped or written, does not stop the rest.

    Raises:
        ValueError: nothing at `source`, no image among it, or `output` is `source`; metres asked of disparity; or a
            file that was not written here would be replaced.
        OSError: the disk of `output` is full, fails or is read-only.
    """
    settings = settings or PredictSettings()
    sources = [source] if isinstance(source, str | Path) else list(source)
    if any(Path(one).resolve() == Path(output).resolve() for one in sources):
        raise ValueError(f"{output} holds the images: {way_out}")
    if os.path.lexists(output) and not Path(output).is_dir():
        raise ValueError(f"{output} is no folder: {way_out}")
    if settings.save_numpy and predictor.unit != "m":
        raise ValueError("--save-numpy writes metres, and this model gives disparity: take --format npy")
    writer = _PredictionWriter(predictor, settings, {**(facts or {}), **_inference_settings(predictor)})
    listed = list_images(sources, leave_out=output, endings=writer.endings)
    targets = [Path(output) / target for target in listed.targets]
    writer.check_free(targets, listed.paths, way_out=f"{way_out}, or move it")
    outcome = PredictResult()
    for name, why in listed.missing.items():
        outcome.skipped[name] = outcome.failed[name] = why
    opened = _load_images(
        predictor,
        listed,
        targets,
        settings,
        ahead=batch_size + WORKER_THREADS,
        outcome=outcome,
        watch=watch,
    )
    _predict_and_write(predictor, opened, writer, outcome, batch_size=batch_size)
    if not outcome.images:
        first = "; ".join(f"{name}: {why}" for name, why in list(outcome.skipped.items())[:3])
        where = ", ".join(map(str, sources[:3]))
        raise ValueError(f"no image that can be read in {where} ({first or 'it is empty'})")
    return outcome


def _predict_and_write(
    predictor: Predictor,
    opened: Iterable[_PreparedImage],
    writer: "_PredictionWriter",
    outcome: PredictResult,
    *,
    batch_size: int,
) -> None:
    """Send images through the network and to the writer; what is wrong with one is noted."""
    pending: deque[tuple[_PreparedImage, Future[list[Path]]]] = deque()

    def settle() -> None:
        image, future = pending.popleft()
        try:
            outcome.written += future.result()
        except (ValueError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in FATAL_DISK_ERRNOS:
                raise
            outcome.fail(image.name, error)
            return
        outcome.images += 1
        if image.notes:
            outcome.notes[image.name] = image.notes
        if writer.settings.points:
            outcome.focals[image.focal[1]] += 1

    with ThreadPoolExecutor(WORKER_THREADS) as behind:
        for batch in _batches(opened, batch_size):
            for image, map_ in _predict_batch(predictor, batch, outcome):
                pending.append((image, behind.submit(writer.write, image, map_)))
            while len(pending) > WORKER_THREADS:
                settle()
        while pending:
            settle()


def _predict_batch(
    predictor: Predictor, batch: list[_PreparedImage], outcome: PredictResult
) -> Iterator[tuple[_PreparedImage, np.ndarray]]:
    """Yield the images of a batch with their maps; without those that have none, or no memory."""
    try:
        maps = predictor.predict_batch(
            [image.pixels for image in batch], prepared=[image.prepared for image in batch]
        )
    except (MemoryError, RuntimeError, ValueError) as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            outcome.fail(batch[0].name, error)
            return
        for image in batch:
            yield from _predict_batch(predictor, [image], outcome)
        return
    for image, map_ in zip(batch, maps, strict=True):
        try:
            check_finite(map_, image.name, precision=predictor.precision)
        except ValueError as error:
            outcome.fail(image.name, error)
            continue
        yield image, map_


class _PredictionWriter:
    """Makes an image's files; any thread may."""

    def __init__(self, predictor: Predictor, settings: PredictSettings, facts: Mapping[str, Any]) -> None:
        self.predictor, self.settings, self.facts = predictor, settings, facts
        self.colormap = resolve_colormap(grayscale=settings.grayscale, colormap=settings.colormap)
        self.endings = [".png", ".json", *([RAW_DEPTH_SUFFIX] if settings.save_numpy else [])]
        self.endings += [f"_{predictor.quantity}{ENDINGS[format]}" for format in settings.values]
        self.endings += [f"_points.{format}" for format in settings.points]

    def check_free(self, targets: Sequence[Path], inputs: Sequence[Path], *, way_out: str) -> None:
        """Refuse to replace what was not written here, before the network runs; ValueError names it."""
        records = {
            _add_ending(target, ending): _add_ending(target, ".json")
            for target in targets
            for ending in self.endings
        }

        def own(path: Path) -> bool:
            return is_recorded(path, records[path], made_by=COMMAND, older=_LEGACY_RECORD_KEYS)

        self.replaced = check_overwrite(records, own=own, inputs=lambda: inputs, way_out=way_out)

    def write(self, image: _PreparedImage, map_: np.ndarray) -> list[Path]:
        with lock_large_image(map_.size):
            made = self._made(image, map_)
        files = {image.target.name + ending: data for ending, (data, _) in made.items()}
        notes = self._notes(image, map_, {ending: meaning for ending, (_, meaning) in made.items()})
        notes |= build_record(COMMAND, files)
        # The record comes first: whoever is killed in between knows the files again the next time.
        files = {f"{image.target.name}.json": (json.dumps(notes, indent=1) + "\n").encode(), **files}
        image.target.parent.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        try:
            for name, data in files.items():
                path = image.target.with_name(name)
                if path not in self.replaced and os.path.lexists(path):
                    raise ValueError(f"{path} has appeared meanwhile and would be replaced")
                atomic_write(path, data)
                paths.append(path)
        except BaseException:
            for path in paths:  # a part of an image's files looks like all of them
                if path not in self.replaced:
                    path.unlink(missing_ok=True)
            raise
        return paths

    def _made(self, image: _PreparedImage, map_: np.ndarray) -> dict[str, tuple[bytes, str]]:
        """Per ending of a file its bytes, and what they mean."""
        quantity, unit = self.predictor.quantity, self.predictor.unit
        made = {".png": self._picture(image, map_)}
        for format in self.settings.values:
            data = encode_map(map_, format, quantity=quantity, unit=unit)
            made[f"_{quantity}{ENDINGS[format]}"] = data, FORMAT_DESCRIPTIONS[format]
        if self.settings.save_numpy:
            made[RAW_DEPTH_SUFFIX] = (
                encode_map(map_, "npy", quantity=quantity, unit=unit),
                FORMAT_DESCRIPTIONS["npy"],
            )
        return made | (self._points(image, map_) if self.settings.points else {})

    def _picture(self, image: _PreparedImage, map_: np.ndarray) -> tuple[bytes, str]:
        values, quantity = display_values(map_, self.predictor)
        what, alone = display_name(self.predictor), self.settings.pred_only
        beside = "" if alone else f"the image, {GAP_PX} px of white and "
        data = encode_picture(
            image.pixels, values, quantity=quantity, colormap=self.colormap, pred_only=alone
        )
        colors = distance_colormap(quantity, self.colormap)
        return data, f"picture: {beside}{what} in {colors} from its smallest value to its largest"

    def _points(self, image: _PreparedImage, map_: np.ndarray) -> dict[str, tuple[bytes, str]]:
        farthest = self.predictor.farthest
        cloud = unproject(
            image.pixels,
            map_,
            quantity=self.predictor.quantity,
            focal_px=image.focal[0],
            far=None if farthest is None else SATURATED_DEPTH_SHARE * farthest,
            max_points=self.settings.max_points,
        )
        made = {}
        for format in self.settings.points if len(cloud.points) else ():  # of sky alone there are none
            axes = "y down, z forward" if format == "ply" else "y up, z back"
            scale = "metres" if cloud.unit == "m" else "up to scale: the median depth is 1"
            made[f"_points.{format}"] = encode_points(cloud, format), f"points, x right, {axes}; {scale}"
        return made

    def _notes(self, image: _PreparedImage, map_: np.ndarray, meanings: Mapping[str, str]) -> dict[str, Any]:
        notes = {
            "image": image.name,
            "height": map_.shape[0],
            "width": map_.shape[1],
            "quantity": self.predictor.quantity,
            "unit": self.predictor.unit,
            "larger": direction(self.predictor.quantity),
            "low": float(map_.min()),
            "high": float(map_.max()),
            "files": {image.target.name + ending: meaning for ending, meaning in meanings.items()},
        }
        if self.settings.points:
            notes |= {"focal_px": image.focal[0], "focal": image.focal[1]}
        return notes | {"model": self.facts}


def _inference_settings(predictor: Predictor) -> dict[str, Any]:
    """How the network was run."""
    return {
        "input_size": predictor.input_size,
        "resample": predictor.resample,
        "precision": predictor.precision,
        "tiles": predictor.tiles,
        "calibration": predictor.model.calibration,
    }


def _load_images(
    predictor: Predictor,
    listed: ImageList,
    targets: list[Path],
    settings: PredictSettings,
    *,
    ahead: int,
    outcome: PredictResult,
    watch: Callable[[list[Photograph]], Iterable[Photograph]],
) -> Iterator[_PreparedImage]:
    """Yield the images among the files in order, read and prepared before they are asked for."""

    def open_one(name: str, target: Path, coming: Future[bytes]) -> _PreparedImage:
        data = coming.result()
        pixels = estimate_decode_cost(data).pixels
        check_image_memory(pixels)
        with lock_large_image(pixels):
            image = decode_image(data)
            prepared = predictor.prepare(image)
        focal = (0.0, "")
        if settings.points:
            focal = choose_focal_length(data, image.shape, focal_px=settings.focal_px)
        return _PreparedImage(name, target, image, prepared, focal, image_warnings(data, image))

    # One reader, as a tar is read from the front; the waiting are few, as they may be large.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(WORKER_THREADS) as openers:
        waiting: deque[Future[_PreparedImage]] = deque()
        coming = zip(listed.photographs, targets, strict=True)
        for photograph in watch(listed.photographs):
            for file, target in islice(coming, ahead - len(waiting)):
                waiting.append(openers.submit(open_one, file.name, target, reader.submit(file.read)))
            try:
                image = waiting.popleft().result()
            except Exception as error:
                if not isinstance(error, ValueError | OSError) and not is_out_of_memory(error):
                    raise
                outcome.fail(photograph.name, error)
                if photograph.name not in listed.expected:
                    del outcome.failed[photograph.name]
                continue
            yield image


def _batches(images: Iterable[_PreparedImage], size: int) -> Iterator[list[_PreparedImage]]:
    images = iter(images)
    while batch := list(islice(images, size)):
        yield batch


def _add_ending(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)
