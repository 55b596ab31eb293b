"""`depth-anything predict` as a function: image files in, map files out.

Threads decode ahead of the network and write behind it. Nothing that this command did not write is overwritten.
"""

import hashlib
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
from depth_anything.errors import UserError
from depth_anything.inference.focal import FocalLength, choose_focal_length
from depth_anything.inference.formats import (
    DIRECTION,
    FORMAT_DESCRIPTIONS,
    encode_map,
    encode_picture,
    map_ending,
    resolve_colormap,
)
from depth_anything.inference.image_list import ImageList, list_images
from depth_anything.inference.memory import check_image_memory, is_out_of_memory, lock_large_image
from depth_anything.inference.overwrite import FATAL_DISK_ERRNOS, RecordedOutputs
from depth_anything.inference.pointcloud import (
    MAX_POINTS,
    POINT_FORMATS,
    SATURATED_DEPTH_SHARE,
    encode_points,
    unproject,
)
from depth_anything.inference.predictor import Predictor, check_finite
from depth_anything.ingest.photographs import Photograph

WORKER_THREADS = 2
"""Threads that decode ahead of the network, and as many that write behind it."""

OUTPUTS = RecordedOutputs(
    command="depth-anything predict",
    legacy_keys=frozenset(
        ("image", "height", "width", "quantity", "unit", "larger", "low", "high", "files", "model")
    ),
    is_legacy_output=lambda path, record: path.name in record["files"],
)

RAW_DEPTH_SUFFIX = "_raw_depth_meter.npy"
"""End of the file that --save-numpy writes, as in the authors' code."""


@dataclass(frozen=True)
class PredictSettings:
    """What is written for each image.

    Attributes:
        formats: Files of values and of points: any of `FORMAT_DESCRIPTIONS` and `POINT_FORMATS`.
        pred_only: The picture shows the map without the image.
        grayscale: The picture shows the map in gray.
        colormap: Colormap of the picture; None: the authors', near is red.
        focal_px: Focal length of all images, for points and for models with a canonical focal length; None: see
            `choose_focal_length`.
        fov_deg: The same as a horizontal field of view, degrees.
        max_points: Maximum number of points per file.
        save_numpy: Also write the authors' NAME_raw_depth_meter.npy.
    """

    formats: Sequence[str] = ("png16",)
    pred_only: bool = False
    grayscale: bool = False
    colormap: str | None = None
    focal_px: float | None = None
    fov_deg: float | None = None
    max_points: int = MAX_POINTS
    save_numpy: bool = False

    @property
    def point_formats(self) -> list[str]:
        """The formats that hold points."""
        return [format for format in self.formats if format in POINT_FORMATS]

    @property
    def map_formats(self) -> list[str]:
        """The formats that hold values."""
        return [format for format in self.formats if format not in POINT_FORMATS]


@dataclass
class PredictResult:
    """What was written and what was skipped.

    Attributes:
        images: Number of images predicted.
        written: The files written.
        skipped: Each file without a prediction, and the reason.
        failed: Those of the skipped files that should have one: files with an image's suffix, files named one by one,
            and images that the network or the disk refused. The rest are other files of a folder or tar.
        notes: Remarks on predicted images, such as that only the first frame of an animation was used.
        focal_sources: Where focal lengths come from, and for how many images.
    """

    images: int = 0
    written: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    focal_sources: Counter[str] = field(default_factory=Counter)

    def fail(self, name: str, error: BaseException, *, expected: bool = True) -> None:
        """Record why an image has no prediction; `expected`: it counts as failed."""
        reason = (
            "there is not enough memory for it: reduce it first" if is_out_of_memory(error) else str(error)
        )
        self.skipped[name] = reason
        if expected:
            self.failed[name] = reason


@dataclass(frozen=True)
class PreparedImage:
    """A decoded image, its input for the network, and what is known about it."""

    name: str
    target: Path
    pixels: np.ndarray
    prepared: np.ndarray
    focal: FocalLength | None
    notes: list[str]


def predict_files(
    predictor: Predictor,
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    settings: PredictSettings | None = None,
    batch_size: int = 1,
    model_info: Mapping[str, object] | None = None,
    progress: Callable[[list[Photograph]], Iterable[Photograph]] = iter,
    fix: str = "give another folder for the maps",
    writer_class: "type[PredictionWriter] | None" = None,
) -> PredictResult:
    """Predict an image, every image of a folder (its tree is kept), list file or tar, or of several of these.

    Writes NAME.png, the picture; NAME_disparity (NAME_depth for meters) in each format; NAME_points in each point
    format; and NAME.json, which describes them. If two images would share a name, their suffixes become part of it
    (NAME_jpg.png), else a number. Files are written atomically. Only files that this command wrote are replaced;
    NAME.json holds their sha256.

    Args:
        predictor: The predictor.
        source: The images. Names of several sources start where their paths differ.
        output: Output folder; created if missing. If it lies below `source`, it is not searched.
        settings: What to write.
        batch_size: Maximum number of images of one input shape per forward pass.
        model_info: Facts about the model for NAME.json.
        progress: Wraps the iteration over the files, to display progress.
        fix: What the user can do if `output` cannot be used, for the error.
        writer_class: Writes the files of an image, in place of `PredictionWriter`.

    Returns:
        What was written and what was skipped. Files that are no images, or cannot be predicted or written, are skipped.

    Raises:
        ValueError: `source` does not exist, has no image, or is `output`; meters are requested of a model that predicts
            disparity; or a file that this command did not write would be replaced.
        OSError: The disk of `output` is full, fails or is read-only.
    """
    settings = settings or PredictSettings()
    sources = [source] if isinstance(source, str | Path) else list(source)
    if any(Path(one).resolve() == Path(output).resolve() for one in sources):
        raise UserError(f"{output} holds the images", fix)
    if os.path.lexists(output) and not Path(output).is_dir():
        raise UserError(f"{output} is not a folder", fix)
    if settings.save_numpy and predictor.unit != "m":
        raise UserError("--save-numpy writes meters, and this model predicts disparity", "use --format npy")
    writer = (writer_class or PredictionWriter)(predictor, settings, model_info or {})
    images = list_images(sources, leave_out=output, endings=writer.endings)
    targets = [Path(output) / target for target in images.targets]
    writer.check_overwrite(targets, images.paths, fix=f"{fix}, or move it")
    result = PredictResult(skipped=dict(images.missing), failed=dict(images.missing))
    loaded = _load_images(
        predictor,
        images,
        targets,
        settings,
        ahead=batch_size + WORKER_THREADS,
        result=result,
        progress=progress,
    )
    _predict_and_write(predictor, loaded, writer, result, batch_size=batch_size)
    if not result.images:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(result.skipped.items())[:3])
        where = ", ".join(map(str, sources[:3]))
        raise ValueError(f"no image that can be read in {where} ({reasons or 'it is empty'})")
    return result


def _predict_and_write(
    predictor: Predictor,
    images: Iterable[PreparedImage],
    writer: "PredictionWriter",
    result: PredictResult,
    *,
    batch_size: int,
) -> None:
    """Predict the images and write their files; errors of single images are recorded in `result`."""
    pending: deque[tuple[PreparedImage, Future[list[Path]]]] = deque()

    def collect() -> None:
        image, future = pending.popleft()
        try:
            result.written += future.result()
        except (ValueError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in FATAL_DISK_ERRNOS:
                raise
            result.fail(image.name, error)
            return
        result.images += 1
        if image.notes:
            result.notes[image.name] = image.notes
        if image.focal:
            result.focal_sources[image.focal.source] += 1

    images = iter(images)
    with ThreadPoolExecutor(WORKER_THREADS) as writers:
        while batch := list(islice(images, batch_size)):
            for image, map_ in _predict_batch(predictor, batch, result):
                pending.append((image, writers.submit(writer.write, image, map_)))
            while len(pending) > WORKER_THREADS:
                collect()
        while pending:
            collect()


def _predict_batch(
    predictor: Predictor, batch: list[PreparedImage], result: PredictResult
) -> Iterator[tuple[PreparedImage, np.ndarray]]:
    """Yield the images of a batch with their maps; a batch that fails is predicted image by image."""
    try:
        pixels, prepared = [image.pixels for image in batch], [image.prepared for image in batch]
        if predictor.canonical_focal is None:
            maps = predictor.predict_batch(pixels, prepared=prepared)
        else:
            focals = [image.focal.pixels if image.focal else None for image in batch]
            maps = predictor.predict_batch(pixels, prepared=prepared, focals=focals)
    except (MemoryError, RuntimeError, ValueError) as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            result.fail(batch[0].name, error)
            return
        for image in batch:
            yield from _predict_batch(predictor, [image], result)
        return
    for image, map_ in zip(batch, maps, strict=True):
        try:
            check_finite(map_, image.name, precision=predictor.precision)
        except ValueError as error:
            result.fail(image.name, error)
            continue
        yield image, map_


class PredictionWriter:
    """Encodes and writes the files of an image; thread-safe."""

    def __init__(
        self, predictor: Predictor, settings: PredictSettings, model_info: Mapping[str, object]
    ) -> None:
        """Store the settings and the facts about the model."""
        self.predictor, self.settings = predictor, settings
        self.model_info = {
            **model_info,
            "input_size": predictor.input_size,
            "resample": predictor.resample,
            "precision": predictor.precision,
            "tiles": predictor.tiles,
            "calibration": predictor.model.calibration,
        }
        if predictor.canonical_focal is not None:
            self.model_info["canonical_focal"] = predictor.canonical_focal
        self.colormap = resolve_colormap(grayscale=settings.grayscale, colormap=settings.colormap)
        self.endings = [".png", ".json", *([RAW_DEPTH_SUFFIX] if settings.save_numpy else [])]
        self.endings += [map_ending(format, predictor.quantity) for format in settings.map_formats]
        self.endings += [f"_points.{format}" for format in settings.point_formats]

    def check_overwrite(self, targets: Sequence[Path], inputs: Sequence[Path], *, fix: str) -> None:
        """Refuse to replace files of others, before the network runs; the ValueError names one."""
        records = {
            Path(f"{target}{ending}"): Path(f"{target}.json") for target in targets for ending in self.endings
        }
        self.replaceable = OUTPUTS.check(records, inputs=lambda: inputs, fix=fix)

    def write(self, image: PreparedImage, map_: np.ndarray) -> list[Path]:
        """Write the files of an image and return their paths; on an error none of its new files is left."""
        with lock_large_image(map_.size):
            encoded = self._encode(image, map_)
        record = self._describe(image, map_, {ending: text for ending, (_, text) in encoded.items()})
        files = {image.target.name + ending: data for ending, (data, _) in encoded.items()}
        record |= OUTPUTS.build({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        # The record is written first: after a kill in between, the next run still recognizes the files as its own.
        files = {f"{image.target.name}.json": (json.dumps(record, indent=1) + "\n").encode(), **files}
        image.target.parent.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        try:
            for name, data in files.items():
                path = image.target.with_name(name)
                if path not in self.replaceable and os.path.lexists(path):
                    raise ValueError(f"{path} was created by another process meanwhile and would be replaced")
                atomic_write(path, data)
                paths.append(path)
        except BaseException:
            for path in paths:  # an incomplete set of files would look complete
                if path not in self.replaceable:
                    path.unlink(missing_ok=True)
            raise
        return paths

    def _encode(self, image: PreparedImage, map_: np.ndarray) -> dict[str, tuple[bytes, str]]:
        """Return for each file's ending its bytes and its description for the record."""
        quantity, unit = self.predictor.quantity, self.predictor.unit
        picture = encode_picture(
            image.pixels,
            map_,
            self.predictor,
            colormap=self.colormap,
            pred_only=self.settings.pred_only,
        )
        encoded = {".png": picture}
        for format in self.settings.map_formats:
            data = encode_map(map_, format, quantity=quantity, unit=unit)
            encoded[map_ending(format, quantity)] = data, FORMAT_DESCRIPTIONS[format]
        if self.settings.save_numpy:
            data = encode_map(map_, "npy", quantity=quantity, unit=unit)
            encoded[RAW_DEPTH_SUFFIX] = data, FORMAT_DESCRIPTIONS["npy"]
        if image.focal and self.settings.point_formats:
            encoded |= self._encode_points(image.pixels, map_, image.focal.pixels)
        return encoded

    def _encode_points(
        self, pixels: np.ndarray, map_: np.ndarray, focal_px: float
    ) -> dict[str, tuple[bytes, str]]:
        farthest = self.predictor.farthest_of(pixels.shape, focal_px)
        cloud = unproject(
            pixels,
            map_,
            quantity=self.predictor.quantity,
            focal_px=focal_px,
            far=None if farthest is None else SATURATED_DEPTH_SHARE * farthest,
            max_points=self.settings.max_points,
        )
        encoded = {}
        for format in (
            self.settings.point_formats if len(cloud.points) else ()
        ):  # a map of only sky has no points
            axes = "y down, z forward" if format == "ply" else "y up, z back"
            scale = "meters" if cloud.unit == "m" else "up to scale: the median depth is 1"
            encoded[f"_points.{format}"] = encode_points(cloud, format), f"points, x right, {axes}; {scale}"
        return encoded

    def _describe(
        self, image: PreparedImage, map_: np.ndarray, descriptions: Mapping[str, str]
    ) -> dict[str, Any]:
        """Build the record of an image, without its digests."""
        record = {
            "image": image.name,
            "height": map_.shape[0],
            "width": map_.shape[1],
            "quantity": self.predictor.quantity,
            "unit": self.predictor.unit,
            "larger": DIRECTION[self.predictor.quantity],
            "low": float(map_.min()),
            "high": float(map_.max()),
            "files": {image.target.name + ending: text for ending, text in descriptions.items()},
        }
        if image.focal:
            record |= {"focal_px": image.focal.pixels, "focal": image.focal.source}
        return record | {"model": self.model_info}


def _load_images(
    predictor: Predictor,
    images: ImageList,
    targets: list[Path],
    settings: PredictSettings,
    *,
    ahead: int,
    result: PredictResult,
    progress: Callable[[list[Photograph]], Iterable[Photograph]],
) -> Iterator[PreparedImage]:
    """Yield the decoded images in order; up to `ahead` of them are read, decoded and prepared in advance."""

    def load(name: str, target: Path, reading: Future[bytes]) -> PreparedImage:
        data = reading.result()
        pixels = estimate_decode_cost(data).pixels
        check_image_memory(pixels)
        with lock_large_image(pixels):
            image = decode_image(data)
            prepared = predictor.prepare(image)
        focal = None
        if settings.point_formats or predictor.canonical_focal is not None:
            focal = choose_focal_length(
                data, image.shape, focal_px=settings.focal_px, fov_deg=settings.fov_deg
            )
        return PreparedImage(name, target, image, prepared, focal, image_warnings(data, image))

    # A single reader, since tars are read front to back. Few images wait, since they may be large.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(WORKER_THREADS) as decoders:
        waiting: deque[Future[PreparedImage]] = deque()
        upcoming = zip(images.photographs, targets, strict=True)
        for photograph in progress(images.photographs):
            for file, target in islice(upcoming, ahead - len(waiting)):
                waiting.append(decoders.submit(load, file.name, target, reader.submit(file.read)))
            try:
                image = waiting.popleft().result()
            except Exception as error:
                if not isinstance(error, ValueError | OSError) and not is_out_of_memory(error):
                    raise
                result.fail(photograph.name, error, expected=photograph.name in images.expected)
                continue
            yield image
