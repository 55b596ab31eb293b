"""Files that `depth-anything predict` writes for a segmentation model: pictures, class maps, and their description."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from depth_anything.classes import ClassTable, paint_classes, palette, table_to_list
from depth_anything.data.class_maps import encode_classes
from depth_anything.errors import UserError
from depth_anything.inference.files import PredictionWriter, PredictSettings, PreparedImage
from depth_anything.inference.formats import GAP_PX, PNG_COMPRESSION
from depth_anything.inference.segmentation import SegmentationPredictor

OVERLAY_SHARE = 0.6
"""Share of the class colors in the overlay; the rest is the image."""

DEFAULT_FORMATS = ("png16",)
"""The default of --format, which is for depth; class maps are always written."""


class ClassWriter(PredictionWriter):
    """Writes NAME.png (image and overlay), NAME_classes.png (numbers), NAME_palette.png (in colors), and NAME.json."""

    def __init__(self, predictor: Any, settings: PredictSettings, model_info: Mapping[str, object]) -> None:
        """Store the settings.

        Raises:
            UserError: The settings ask for files of depth.
        """
        assert isinstance(predictor, SegmentationPredictor)
        check_class_settings(settings)
        self.predictor, self.settings = predictor, settings  # type: ignore[assignment]
        self.table: ClassTable = predictor.classes
        self.model_info = {
            **model_info,
            "input_size": predictor.input_size,
            "stride": predictor.stride,
            "short_side": predictor.short_side,
            "scales": list(predictor.scales),
            "flip": predictor.flip,
            "precision": predictor.precision,
        }
        self.endings = [".png", ".json", "_classes.png", "_palette.png"]

    def _encode(self, image: PreparedImage, map_: np.ndarray) -> dict[str, tuple[bytes, str]]:
        picture = overlay_picture(image.pixels, map_, self.table, pred_only=self.settings.pred_only)
        left = "" if self.settings.pred_only else f"the image, {GAP_PX} px of white and "
        return {
            ".png": (_encode_picture(picture), f"picture: {left}the image in the colors of its classes"),
            "_classes.png": (encode_classes(map_), "8-bit PNG: the number of each pixel's class, from 0"),
            "_palette.png": (
                encode_palette(map_, self.table),
                "PNG with a palette: numbers as in _classes.png, in colors",
            ),
        }

    def _describe(
        self, image: PreparedImage, map_: np.ndarray, descriptions: Mapping[str, str]
    ) -> dict[str, Any]:
        counts = np.bincount(map_.ravel(), minlength=len(self.table))
        present = [
            {"number": number, **row.to_dict(), "share": round(float(counts[number] / map_.size), 6)}
            for number, row in enumerate(self.table)
            if counts[number]
        ]
        return {
            "image": image.name,
            "height": map_.shape[0],
            "width": map_.shape[1],
            "quantity": "classes",
            "present": sorted(present, key=lambda row: -row["share"]),
            "classes": table_to_list(self.table),
            "files": {image.target.name + ending: text for ending, text in descriptions.items()},
            "model": self.model_info,
        }


def check_class_settings(settings: PredictSettings) -> None:
    """Raise UserError if settings ask for files of depth."""
    extra = [format for format in settings.formats if format not in DEFAULT_FORMATS]
    if extra or settings.save_numpy:
        flag = f"--format {extra[0]}" if extra else "--save-numpy"
        raise UserError(f"{flag} writes depth, and this model predicts classes", "leave it out")


def overlay_picture(
    image: np.ndarray, classes: np.ndarray, table: ClassTable, *, pred_only: bool = False
) -> np.ndarray:
    """Paint an image, a white gap, and the image blended with the colors of its classes.

    Args:
        image: uint8 (H, W, 3), RGB.
        classes: uint8 (H, W).
        table: The classes.
        pred_only: Only the blended image.

    Returns:
        uint8 (H, W', 3), RGB.
    """
    colors = paint_classes(classes, table)
    blended = (image * (1 - OVERLAY_SHARE) + colors * OVERLAY_SHARE + 0.5).astype(np.uint8)
    if pred_only:
        return blended
    return np.hstack([image, np.full((image.shape[0], GAP_PX, 3), 255, np.uint8), blended])


def encode_palette(classes: np.ndarray, table: ClassTable) -> bytes:
    """Encode a class map, uint8 (H, W), as a PNG of palette indices, with the names of the classes in its text."""
    indexed = Image.frombytes("P", classes.shape[::-1], np.ascontiguousarray(classes).tobytes())
    indexed.putpalette(palette(table).tobytes())
    text = PngInfo()
    text.add_itxt("classes", "\n".join(row.name for row in table))
    out = io.BytesIO()
    indexed.save(out, "PNG", pnginfo=text, compress_level=PNG_COMPRESSION)
    return out.getvalue()


def _encode_picture(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=PNG_COMPRESSION)
    return out.getvalue()
