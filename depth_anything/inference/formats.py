"""File formats of a map: the picture for viewing, and files that keep its values, unit and direction."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from depth_anything.inference.predictor import Predictor
from depth_anything.visualize import (
    DEFAULT_COLORMAP,
    check_colormap,
    colorize_by_distance,
    conditioning_image,
    distance_colormap,
)

GAP_PX = 50
"""Width of the white gap between image and map, as in the authors' output."""

_ROWS_PER_BLOCK = 64

PNG_COMPRESSION = 1
"""zlib level of PNGs: the default, 6, takes as long as a small network."""

CONTROLNET = "controlnet"
"""The format for ControlNets: the image that conditions them, docs/controlnet.md."""

ENDINGS = {"png8": "_8bit.png", "png16": ".png", "npy": ".npy", "npz": ".npz", "exr": ".exr"}
"""Format to the end of its file name, after NAME_disparity or NAME_depth."""

FORMAT_DESCRIPTIONS = {
    "png8": "8-bit PNG: value = low + level / 255 * (high - low); low and high in its text and here",
    "png16": "16-bit PNG: value = low + level / 65535 * (high - low); low and high in its text and here",
    "npy": "NumPy float32 (H, W): the values",
    "npz": "NumPy archive: `map` float32 (H, W), the values; `quantity`, `unit`, `larger` as here",
    "exr": "OpenEXR, channel Y float32: the values; quantity, unit and larger in its header",
    CONTROLNET: "conditioning image of a ControlNet, 8-bit RGB PNG: near is white, over the range of this image",
}

DIRECTION = {"disparity": "nearer", "depth": "farther"}
"""Quantity to the meaning of larger values."""


def map_ending(format: str, quantity: str) -> str:
    """Return the end of the name of a map's file, after NAME: as _disparity.npy, or _controlnet.png."""
    return "_controlnet.png" if format == CONTROLNET else f"_{quantity}{ENDINGS[format]}"


def display_values(map: np.ndarray, predictor: Predictor) -> tuple[np.ndarray, str]:
    """Return the values that pictures and videos show: the map, or 1 / depth for a calibrated model.

    Large depths of a calibrated model are unreliable and would take up the whole colormap.

    Args:
        map: (H, W), as the predictor returned it.
        predictor: The predictor.

    Returns:
        (H, W) values, and their quantity for `colorize_by_distance`: "disparity" or "depth".
    """
    return (1 / map, "disparity") if predictor.calibrated else (map, predictor.quantity)


def display_name(predictor: Predictor) -> str:
    """Return the name of the values that `display_values` returns."""
    return "1 / depth" if predictor.calibrated else predictor.quantity


def resolve_colormap(*, grayscale: bool, colormap: str | None) -> str:
    """Return the colormap that --grayscale and --colormap select, for `colorize_by_distance`.

    Raises:
        ValueError: matplotlib has no such colormap.
    """
    chosen = "gray" if grayscale else colormap or DEFAULT_COLORMAP
    check_colormap(chosen)
    return chosen


def paint_picture(
    image: np.ndarray,
    map: np.ndarray,
    predictor: Predictor,
    *,
    colormap: str,
    pred_only: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """Paint the authors' picture: the image, a white gap, and the map in colors.

    Args:
        image: uint8 (H, W, 3), RGB.
        map: (H, W), as the predictor returned it.
        predictor: The predictor.
        colormap: As for `colorize_by_distance`.
        pred_only: Only the map.
        low: The value of `display_values` at one end of the colormap, by default the minimum.
        high: The value at the other end, by default the maximum.

    Returns:
        uint8 (H, W', 3), RGB.
    """
    values, quantity = display_values(map, predictor)
    painted = colorize_by_distance(values, quantity=quantity, colormap=colormap, low=low, high=high)
    if pred_only:
        return painted
    gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
    return np.hstack([image, gap, painted])


def encode_map(map: np.ndarray, format: str, *, quantity: str, unit: str) -> bytes:
    """Encode the values of a map.

    Args:
        map: (H, W) float32, finite.
        format: A key of `ENDINGS`, or `CONTROLNET`.
        quantity: "disparity" or "depth".
        unit: Unit of the values.
    """
    notes = {"quantity": quantity, "unit": unit, "larger": DIRECTION[quantity]}
    if format == CONTROLNET:
        return _encode_rgb(conditioning_image(map, quantity=quantity))
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
    """Encode a map as a gray PNG of 8 or 16 bits whose text chunks hold range, quantity, unit and direction.

    value = low + level / (2**bits - 1) · (high - low), with `low` and `high` from the PNG's text.

    Args:
        map: (H, W) finite float.
        bits: 8 or 16.
        quantity: "disparity" or "depth".
        unit: Unit of the values.
        low: Value of level 0, by default the minimum; smaller values are clipped to it.
        high: Value of the highest level, by default the maximum; larger values are clipped to it.
    """
    low = float(map.min()) if low is None else low
    high = float(map.max()) if high is None else high
    top = 2**bits - 1
    levels = np.zeros(map.shape, np.uint8 if bits == 8 else np.uint16)
    for row in range(0, len(map) if high > low else 0, _ROWS_PER_BLOCK):  # bounds the memory of float64
        share = (map[row : row + _ROWS_PER_BLOCK].astype(np.float64) - low) / (high - low)
        levels[row : row + _ROWS_PER_BLOCK] = np.rint(share.clip(0, 1) * top)
    text = PngInfo()
    notes = {"quantity": quantity, "unit": unit, "larger": DIRECTION[quantity]}
    for key, value in {**notes, "low": repr(low), "high": repr(high)}.items():
        text.add_text(key, value)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG", pnginfo=text, compress_level=PNG_COMPRESSION)
    return out.getvalue()


def encode_picture(
    image: np.ndarray, map: np.ndarray, predictor: Predictor, *, colormap: str, pred_only: bool = False
) -> tuple[bytes, str]:
    """Encode `paint_picture` as a PNG.

    Returns:
        The file and its description for the record.
    """
    picture = paint_picture(image, map, predictor, colormap=colormap, pred_only=pred_only)
    left = "" if pred_only else f"the image, {GAP_PX} px of white and "
    quantity = "disparity" if predictor.calibrated else predictor.quantity
    colors, name = distance_colormap(quantity, colormap), display_name(predictor)
    return _encode_rgb(picture), f"picture: {left}{name} in {colors} from its smallest value to its largest"


def _encode_rgb(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=PNG_COMPRESSION)
    return out.getvalue()


def _encode_exr(map: np.ndarray, notes: dict[str, str]) -> bytes:
    import OpenEXR

    header: dict[str, Any] = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage, **notes}
    with tempfile.TemporaryDirectory() as folder:  # the library writes to a path only
        path = Path(folder, "map.exr")
        OpenEXR.File(header, {"Y": np.ascontiguousarray(map, np.float32)}).write(str(path))
        return path.read_bytes()
