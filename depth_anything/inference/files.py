"""From image files to map files: every image once, nothing overwritten, the network never waiting for a disk."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from depth_anything.data.sample import decode_image
from depth_anything.data.sources.images import Photograph, list_photographs
from depth_anything.data.tars import write_atomically
from depth_anything.inference.formats import (
    ENDINGS,
    GAP_PX,
    MEANINGS,
    chosen_colormap,
    direction,
    encode,
    picture,
    shown_name,
    shown_values,
    write_map,
)
from depth_anything.inference.naming import name_apart, tree
from depth_anything.inference.pointcloud import (
    MAX_POINTS,
    POINT_FORMATS,
    SATURATED,
    choose_focal,
    encode_points,
    unproject,
)
from depth_anything.inference.predictor import Predictor
from depth_anything.visualize import colormap_for

__all__ = ["Outcome", "Products", "predict_files", "write_map"]

THREADS = 2
"""That decode ahead of the network, and as many that write behind it."""

RAW_METRES = "_raw_depth_meter.npy"
"""The authors' name of what --save-numpy writes."""


@dataclass(frozen=True)
class Products:
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
class Outcome:
    """What became of the files: the images mapped, the files written, per skipped file why, whence focal lengths."""

    images: int = 0
    written: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    focals: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Opened:
    """An image, ready for the network."""

    name: str
    target: Path
    pixels: np.ndarray
    prepared: np.ndarray
    focal: tuple[float, str]


def predict_files(
    predictor: Predictor,
    source: str | Path,
    output: str | Path,
    *,
    products: Products | None = None,
    batch_size: int = 1,
    facts: Mapping[str, Any] | None = None,
    watch: Callable[[list[Photograph]], Iterable[Photograph]] = iter,
) -> Outcome:
    """Map an image, or every image of a folder (its tree is kept), list file or tar.

    Writes NAME.png, the picture; NAME_disparity (of a model that gives metres NAME_depth) in each format; NAME_points
    in each format of points; and NAME.json, which says what they are. Where two images would share a name, their
    endings become part of it (NAME_jpg.png), else a number. Every file is seen whole or not at all.

    Args:
        predictor: the model.
        source: what to map.
        output: folder of the maps; made if need be. Below `source`, it is passed over.
        products: what to make.
        batch_size: images that the network sees at once, where their shapes agree.
        facts: about the model, for NAME.json.
        watch: wraps the pass over the files; for progress bars.

    Returns:
        What was written and what was skipped; what is no image does not stop the rest.

    Raises:
        ValueError: nothing at `source`, no image among it, or `output` is `source`; metres asked of disparity.
    """
    products = products or Products()
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output} holds the images: give another folder for the maps")
    if products.save_numpy and predictor.unit != "m":
        raise ValueError("--save-numpy writes metres, and this model gives disparity: take --format npy")
    photographs = list_photographs(source, leave_out=output)
    writer = _Writer(predictor, products, {**(facts or {}), **_how(predictor)})
    targets = _targets([photograph.name for photograph in photographs], Path(source), writer.endings)
    outcome = Outcome()
    opened = _opened(
        predictor,
        photographs,
        [Path(output) / target for target in targets],
        products,
        ahead=batch_size + THREADS,
        outcome=outcome,
        watch=watch,
    )
    with ThreadPoolExecutor(THREADS) as behind:
        pending: deque[Future[list[Path]]] = deque()
        for batch in _batches(opened, batch_size):
            maps = predictor.predict_batch(
                [image.pixels for image in batch], prepared=[image.prepared for image in batch]
            )
            for image, map_ in zip(batch, maps, strict=True):
                pending.append(behind.submit(writer.write, image, map_))
                outcome.images += 1
                if products.points:
                    outcome.focals[image.focal[1]] += 1
            while len(pending) > THREADS:
                outcome.written += pending.popleft().result()
        for future in pending:
            outcome.written += future.result()
    if not outcome.images:
        first = "; ".join(f"{name}: {why}" for name, why in list(outcome.skipped.items())[:3])
        raise ValueError(f"no image that can be read in {source} ({first or 'it is empty'})")
    return outcome


class _Writer:
    """Makes an image's files; any thread may."""

    def __init__(self, predictor: Predictor, products: Products, facts: Mapping[str, Any]) -> None:
        self.predictor, self.products, self.facts = predictor, products, facts
        self.colormap = chosen_colormap(grayscale=products.grayscale, colormap=products.colormap)
        self.endings = [".png", ".json", *([RAW_METRES] if products.save_numpy else [])]
        self.endings += [f"_{predictor.quantity}{ENDINGS[format]}" for format in products.values]
        self.endings += [f"_points.{format}" for format in products.points]

    def write(self, image: _Opened, map_: np.ndarray) -> list[Path]:
        image.target.parent.mkdir(parents=True, exist_ok=True)
        made = self._made(image, map_)
        paths = []
        for ending, (data, _) in made.items():
            paths.append(image.target.with_name(image.target.name + ending))
            write_atomically(paths[-1], data)
        notes = self._notes(image, map_, {ending: meaning for ending, (_, meaning) in made.items()})
        paths.append(image.target.with_name(f"{image.target.name}.json"))
        write_atomically(paths[-1], (json.dumps(notes, indent=1) + "\n").encode())
        return paths

    def _made(self, image: _Opened, map_: np.ndarray) -> dict[str, tuple[bytes, str]]:
        """Per ending of a file its bytes, and what they mean."""
        quantity, unit = self.predictor.quantity, self.predictor.unit
        made = {".png": self._picture(image, map_)}
        for format in self.products.values:
            data = encode(map_, format, quantity=quantity, unit=unit)
            made[f"_{quantity}{ENDINGS[format]}"] = data, MEANINGS[format]
        if self.products.save_numpy:
            made[RAW_METRES] = encode(map_, "npy", quantity=quantity, unit=unit), MEANINGS["npy"]
        return made | (self._points(image, map_) if self.products.points else {})

    def _picture(self, image: _Opened, map_: np.ndarray) -> tuple[bytes, str]:
        values, quantity = shown_values(map_, self.predictor)
        what, alone = shown_name(self.predictor), self.products.pred_only
        beside = "" if alone else f"the image, {GAP_PX} px of white and "
        data = picture(image.pixels, values, quantity=quantity, colormap=self.colormap, pred_only=alone)
        colors = colormap_for(quantity, self.colormap)
        return data, f"picture: {beside}{what} in {colors} from its smallest value to its largest"

    def _points(self, image: _Opened, map_: np.ndarray) -> dict[str, tuple[bytes, str]]:
        farthest = self.predictor.farthest
        cloud = unproject(
            image.pixels,
            map_,
            quantity=self.predictor.quantity,
            focal_px=image.focal[0],
            far=None if farthest is None else SATURATED * farthest,
            max_points=self.products.max_points,
        )
        made = {}
        for format in self.products.points if len(cloud.points) else ():  # of sky alone there are none
            axes = "y down, z forward" if format == "ply" else "y up, z back"
            scale = "metres" if cloud.unit == "m" else "up to scale: the median depth is 1"
            made[f"_points.{format}"] = encode_points(cloud, format), f"points, x right, {axes}; {scale}"
        return made

    def _notes(self, image: _Opened, map_: np.ndarray, meanings: Mapping[str, str]) -> dict[str, Any]:
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
        if self.products.points:
            notes |= {"focal_px": image.focal[0], "focal": image.focal[1]}
        return notes | {"model": self.facts}


def _how(predictor: Predictor) -> dict[str, Any]:
    """How the network was run."""
    return {
        "input_size": predictor.input_size,
        "resample": predictor.resample,
        "precision": predictor.precision,
        "tiles": predictor.tiles,
        "calibration": predictor.model.calibration,
    }


def _opened(
    predictor: Predictor,
    photographs: list[Photograph],
    targets: list[Path],
    products: Products,
    *,
    ahead: int,
    outcome: Outcome,
    watch: Callable[[list[Photograph]], Iterable[Photograph]],
) -> Iterator[_Opened]:
    """Yield the images among the files in order, read and prepared before they are asked for."""

    def open_one(name: str, target: Path, data: Future[bytes]) -> _Opened:
        pixels = decode_image(data.result())
        focal = (0.0, "")
        if products.points:
            focal = choose_focal(data.result(), pixels.shape, focal_px=products.focal_px)
        return _Opened(name, target, pixels, predictor.prepare(pixels), focal)

    # One reader, as a tar is read from the front; the waiting are few, as they may be large.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(THREADS) as openers:
        waiting: deque[Future[_Opened]] = deque()
        coming = zip(photographs, targets, strict=True)
        for photograph in watch(photographs):
            for file, target in islice(coming, ahead - len(waiting)):
                waiting.append(openers.submit(open_one, file.name, target, reader.submit(file.read)))
            try:
                image = waiting.popleft().result()
            except ValueError as error:
                outcome.skipped[photograph.name] = str(error)
                continue
            yield image


def _batches(images: Iterable[_Opened], size: int) -> Iterator[list[_Opened]]:
    images = iter(images)
    while batch := list(islice(images, size)):
        yield batch


def _targets(names: Sequence[str], source: Path, endings: Sequence[str]) -> list[Path]:
    """Name what is made of each file; what does not look like an image gives way."""
    paths = tree(names, source)
    minor = {i for i, path in enumerate(paths) if not _looks_like_image(path)}
    stems, marks = [path.parent / path.stem for path in paths], [path.suffix[1:] for path in paths]
    return name_apart(stems, marks, endings=endings, minor=minor)


def _looks_like_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
