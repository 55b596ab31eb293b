"""From image files to map files: a 16-bit PNG that keeps the values, and a coloured picture to look at."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from depth_anything.data.sample import decode_image
from depth_anything.inference.predictor import Predictor
from depth_anything.visualize import colorize

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""What counts as an image in a folder."""

GAP_PX = 50
"""White between picture and map, as in the authors' output."""


@dataclass
class Outcome:
    """What became of the files: the pictures written, and per skipped file why."""

    written: list[Path] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)


def predict_files(
    predictor: Predictor,
    source: str | Path,
    output: str | Path,
    *,
    watch: Callable[[list[Path]], Iterable[Path]] = iter,
) -> Outcome:
    """Map an image, or every image of a folder with its tree kept.

    Writes NAME_disparity.png (16 bits, see `write_map`; NAME_depth.png for a metric model) and
    NAME_color.png.

    Args:
        predictor: the model.
        source: an image file or a folder.
        output: folder of the maps; made if need be.
        watch: wraps the pass over the files; for progress bars.

    Returns:
        What was written and what was skipped; in a folder, what is no image does not stop the rest.

    Raises:
        FileNotFoundError: no such source.
        ValueError: the one image cannot be read, or the folder holds none that can.
    """
    source, output = Path(source), Path(output)
    if not source.exists():
        raise FileNotFoundError(f"no image or folder {source}")
    root = source if source.is_dir() else source.parent
    files = _files(source, output) if source.is_dir() else [source]
    stems = Counter(file.with_suffix("") for file in files if file.suffix.lower() in SUFFIXES)
    outcome = Outcome()
    for file in watch(files):
        try:
            if source.is_dir() and file.suffix.lower() not in SUFFIXES:
                raise ValueError("not an image")
            image = decode_image(file.read_bytes())
        except ValueError as error:
            outcome.skipped[file] = str(error)
            continue
        stem = file.stem if stems[file.with_suffix("")] < 2 else f"{file.stem}_{file.suffix[1:]}"
        target = output / file.parent.relative_to(root) / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        outcome.written += _write(predictor, image, target)
    if not outcome.written:
        first, why = next(iter(outcome.skipped.items()), (source, "the folder is empty"))
        raise ValueError(f"no image in {source}: {first.name}: {why}")
    return outcome


def write_map(path: Path, map: np.ndarray, *, quantity: str, unit: str) -> None:
    """Write a map as a 16-bit PNG whose text says how to get the values back, their unit and their direction.

    value = low + level / 65535 · (high - low), with `low` and `high` from the PNG's text.

    Args:
        path: of the PNG.
        map: (H,W) finite float.
        quantity: "disparity" or "depth".
        unit: of the values.
    """
    low, high = float(map.min()), float(map.max())
    levels = np.rint((map.astype(np.float64) - low) * (65535 / (high - low) if high > low else 0)).astype(
        np.uint16
    )
    text = PngInfo()
    larger = "nearer" if quantity == "disparity" else "farther"
    notes = {"quantity": quantity, "unit": unit, "larger": larger, "low": repr(low), "high": repr(high)}
    for key, value in notes.items():
        text.add_text(key, value)
    Image.fromarray(levels).save(path, pnginfo=text)


def _write(predictor: Predictor, image: np.ndarray, target: Path) -> list[Path]:
    map_ = predictor.predict(image)
    raw, picture = (target.with_name(f"{target.name}_{end}.png") for end in (predictor.quantity, "color"))
    write_map(raw, map_, quantity=predictor.quantity, unit=predictor.unit)
    gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
    near_is_red = "Spectral_r" if predictor.quantity == "disparity" else "Spectral"
    Image.fromarray(np.hstack([image, gap, colorize(map_, colormap=near_is_red)])).save(picture)
    return [raw, picture]


def _files(folder: Path, output: Path) -> list[Path]:
    """The files below a folder, without what an earlier run wrote there."""
    inside = output.resolve()
    return sorted(f for f in folder.rglob("*") if f.is_file() and not f.resolve().is_relative_to(inside))
