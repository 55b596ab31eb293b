"""A map as bytes: the picture to look at, and the files that keep its values, their unit and their direction."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from depth_anything.disk import atomic_write
from depth_anything.inference.predictor import Predictor
from depth_anything.visualize import DEFAULT_COLORMAP, check_colormap, colorize_by_distance

GAP_PX = 50
"""White between picture and map, as in the authors' output."""

_ROWS_PER_BLOCK = 64

PNG_COMPRESSION = 1
"""Of PNGs: the usual 6 takes as long as a small network."""

ENDINGS = {"png8": "_8bit.png", "png16": ".png", "npy": ".npy", "npz": ".npz", "exr": ".exr"}
"""What follows NAME_disparity or NAME_depth."""

FORMAT_DESCRIPTIONS = {
    "png8": "8-bit PNG: value = low + level / 255 * (high - low); low and high in its text and here",
    "png16": "16-bit PNG: value = low + level / 65535 * (high - low); low and high in its text and here",
    "npy": "NumPy float32 (H, W): the values",
    "npz": "NumPy archive: `map` float32 (H, W), the values; `quantity`, `unit`, `larger` as here",
    "exr": "OpenEXR, channel Y float32: the values; quantity, unit and larger in its header",
}


def direction(quantity: str) -> str:
    """Say what larger values are: "nearer" for disparity, "farther" for depth."""
    return "nearer" if quantity == "disparity" else "farther"


def display_values(map: np.ndarray, predictor: Predictor) -> tuple[np.ndarray, str]:
    """Choose what a picture or film shows of a map: the map, but of a calibrated model one over its depth.

    The far of a calibrated model is guesswork, and would take all colors.

    Args:
        map: (H, W), as the predictor gave it.
        predictor: Which gave it.

    Returns:
        (H, W) values, and "disparity" or "depth": what they are for `paint`.
    """
    return (1 / map, "disparity") if _is_calibrated(predictor) else (map, predictor.quantity)


def display_name(predictor: Predictor) -> str:
    """Say what `shown_values` of a predictor are, in words."""
    return "1 / depth" if _is_calibrated(predictor) else predictor.quantity


def _is_calibrated(predictor: Predictor) -> bool:
    return getattr(predictor, "calibrated", False)  # what stands in for a network may have nothing but maps


def resolve_colormap(*, grayscale: bool, colormap: str | None) -> str:
    """Return the colormap that --grayscale and --colormap choose, as `paint` takes it.

    Raises:
        ValueError: If matplotlib knows no such colormap.
    """
    chosen = "gray" if grayscale else colormap or DEFAULT_COLORMAP
    check_colormap(chosen)
    return chosen


def side_by_side(image: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """Put the image and its painted map next to each other, white between, as in the authors' output."""
    gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
    return np.hstack([image, gap, painted])


def write_map(
    path: Path,
    map: np.ndarray,
    *,
    quantity: str,
    unit: str,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Write a map as a 16-bit PNG whose text says how to get the values back, their unit and their direction.

    value = low + level / 65535 · (high - low), with `low` and `high` from the PNG's text.

    Args:
        path: of the PNG.
        map: (H,W) finite float.
        quantity: "disparity" or "depth".
        unit: of the values.
        low: value of level 0, the smallest one unless given; what lies below has it too.
        high: value of level 65535, the largest one unless given; what lies above has it too.
    """
    atomic_write(path, encode_png(map, bits=16, quantity=quantity, unit=unit, low=low, high=high))


def encode_map(map: np.ndarray, format: str, *, quantity: str, unit: str) -> bytes:
    """Make the bytes of a file of values.

    Args:
        map: (H,W) float32, finite.
        format: a key of `ENDINGS`.
        quantity: "disparity" or "depth".
        unit: of the values.
    """
    notes = {"quantity": quantity, "unit": unit, "larger": direction(quantity)}
    if format == "exr":
        return _encode_exr(map, notes)
    if format in ("png8", "png16"):
        return encode_png(map, bits=int(format[3:]), quantity=quantity, unit=unit)
    out = io.BytesIO()
    if format == "npz":
        arrays = {"map": map, **{key: np.array(value) for key, value in notes.items()}}
        np.savez_compressed(out, allow_pickle=False, **arrays)
    else:
        np.save(out, map, allow_pickle=False)
    return out.getvalue()


def encode_png(
    map: np.ndarray,
    *,
    bits: int,
    quantity: str,
    unit: str,
    low: float | None = None,
    high: float | None = None,
) -> bytes:
    """Make a grey PNG of 8 or 16 bits, as `write_map` describes it."""
    low = float(map.min()) if low is None else low
    high = float(map.max()) if high is None else high
    top = 2**bits - 1
    levels = np.zeros(map.shape, np.uint8 if bits == 8 else np.uint16)
    for row in range(
        0, len(map) if high > low else 0, _ROWS_PER_BLOCK
    ):  # a large map in float64 takes gigabytes
        share = (map[row : row + _ROWS_PER_BLOCK].astype(np.float64) - low) / (high - low)
        levels[row : row + _ROWS_PER_BLOCK] = np.rint(share.clip(0, 1) * top)
    text = PngInfo()
    notes = {"quantity": quantity, "unit": unit, "larger": direction(quantity)}
    for key, value in {**notes, "low": repr(low), "high": repr(high)}.items():
        text.add_text(key, value)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG", pnginfo=text, compress_level=PNG_COMPRESSION)
    return out.getvalue()


def encode_picture(
    image: np.ndarray,
    map: np.ndarray,
    *,
    quantity: str,
    colormap: str = DEFAULT_COLORMAP,
    pred_only: bool = False,
) -> bytes:
    """Make the authors' picture, a PNG: the image, white, and the map between its own extremes in colours.

    Args:
        image: uint8 (H,W,3) RGB.
        map: (H,W).
        quantity: "disparity" or "depth", which decides what is near.
        colormap: as `paint` takes it.
        pred_only: the map alone.
    """
    painted = colorize_by_distance(map, quantity=quantity, colormap=colormap)
    out = io.BytesIO()
    whole = painted if pred_only else side_by_side(image, painted)
    Image.fromarray(whole).save(out, "PNG", compress_level=PNG_COMPRESSION)
    return out.getvalue()


def _encode_exr(map: np.ndarray, notes: dict[str, str]) -> bytes:
    import OpenEXR

    header: dict[str, Any] = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage, **notes}
    with tempfile.TemporaryDirectory() as folder:  # the library writes to a path only
        path = Path(folder, "map.exr")
        OpenEXR.File(header, {"Y": np.ascontiguousarray(map, np.float32)}).write(str(path))
        return path.read_bytes()
