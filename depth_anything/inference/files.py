"""From image files to map files: a 16-bit PNG that keeps the values, and a coloured picture to look at."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from depth_anything.data.sample import decode_image
from depth_anything.data.sources.images import Photograph, list_photographs
from depth_anything.inference.predictor import Predictor
from depth_anything.visualize import colorize

GAP_PX = 50
"""White between picture and map, as in the authors' output."""

COMPRESSION = 1
"""Of PNGs: the usual 6 takes as long as a small network."""


@dataclass
class Outcome:
    """What became of the files: the pictures written, and per skipped file why."""

    written: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def predict_files(
    predictor: Predictor,
    source: str | Path,
    output: str | Path,
    *,
    watch: Callable[[list[Photograph]], Iterable[Photograph]] = iter,
) -> Outcome:
    """Map an image, or every image of a folder (its tree is kept), list file or tar.

    Writes NAME_disparity.png (16 bits, see `write_map`; of a metric model NAME_depth.png) and NAME_color.png.
    Where two images differ in their ending only, it becomes part of the name: NAME_jpg_disparity.png.

    Args:
        predictor: the model.
        source: what to map.
        output: folder of the maps; made if need be. Below `source`, it is passed over.
        watch: wraps the pass over the files; for progress bars.

    Returns:
        What was written and what was skipped; what is no image does not stop the rest.

    Raises:
        ValueError: nothing at `source`, no image among it, or `output` is `source`.
    """
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output} holds the images: give another folder for the maps")
    photographs = list_photographs(source, leave_out=output)
    stems = Counter(_inside(photograph.name).with_suffix("") for photograph in photographs)
    outcome = Outcome()
    for photograph in watch(photographs):
        try:
            image = decode_image(photograph.read())
        except ValueError as error:
            outcome.skipped[photograph.name] = str(error)
            continue
        path = _inside(photograph.name)
        stem = path.stem if stems[path.with_suffix("")] == 1 else f"{path.stem}_{path.suffix[1:]}"
        target = Path(output, path.parent, stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        outcome.written += _write(predictor, image, target)
    if not outcome.written:
        first = "; ".join(f"{name}: {why}" for name, why in list(outcome.skipped.items())[:3])
        raise ValueError(f"no image that can be read in {source} ({first or 'it is empty'})")
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
    Image.fromarray(levels).save(path, pnginfo=text, compress_level=COMPRESSION)


def _write(predictor: Predictor, image: np.ndarray, target: Path) -> list[Path]:
    map_ = predictor.predict(image)
    raw, picture = (target.with_name(f"{target.name}_{end}.png") for end in (predictor.quantity, "color"))
    write_map(raw, map_, quantity=predictor.quantity, unit=predictor.unit)
    gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
    near_is_red = "Spectral_r" if predictor.quantity == "disparity" else "Spectral"
    Image.fromarray(np.hstack([image, gap, colorize(map_, colormap=near_is_red)])).save(
        picture, compress_level=COMPRESSION
    )
    return [raw, picture]


def _inside(name: str) -> PurePosixPath:
    """The name of a file as a path below the output, also where a list says /elsewhere/a.jpg or ../a.jpg."""
    return PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
