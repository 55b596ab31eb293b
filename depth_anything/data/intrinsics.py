"""Focal lengths from the metadata of records, and how resizing changes them.

A focal length is one number, sqrt(fx · fy) in pixels of an image. Cropping and flipping do not change it; resizing
multiplies it by sqrt(area after / area before).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def focal_from_meta(meta: Mapping[str, Any], shape: Sequence[int]) -> float | None:
    """Return the focal length of a record's image, pixels; None if the metadata does not say a usable one.

    Args:
        meta: The record's json. "intrinsics" is {fx, fy, …} in pixels of the stored image, or a 3 × 3 matrix in
            fractions of its width and height (as MoGe's benchmarks). Without it, Hypersim's "M_cam_from_uv" is used:
            it maps u, v from -1 to 1 to a ray, also for tilted cameras. Their focal length, the square root of the
            image area per area of the plane at depth 1, is taken at the image's center.
        shape: (H, W, …) of the stored image, uncropped.
    """
    height, width = shape[:2]
    intrinsics = meta.get("intrinsics")
    try:
        if isinstance(intrinsics, Mapping):
            fx = float(intrinsics["fx"])
            fy = float(intrinsics.get("fy", fx))
            focal = math.sqrt(fx) * math.sqrt(fy)
        elif intrinsics is not None:
            matrix = np.array(intrinsics, np.float64)
            focal = math.sqrt(matrix[0, 0] * width * matrix[1, 1] * height)
        else:
            matrix = np.array(meta["M_cam_from_uv"], np.float64)
            stretch = abs(float(matrix[2, 2]) ** 3 / float(np.linalg.det(matrix)))
            focal = math.sqrt(width * height / 4 * stretch)
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, np.linalg.LinAlgError):
        return None
    return focal if 0 < focal < math.inf else None


def resize_focal(focal: float, before: Sequence[int], after: Sequence[int]) -> float:
    """Convert a focal length in pixels to that of the resized image.

    Args:
        focal: In pixels of the image before resizing.
        before: (H, W, …) before resizing.
        after: (H, W, …) after resizing.

    Example:
        >>> resize_focal(500.0, (480, 640), (240, 320))
        250.0
    """
    return focal * math.sqrt((after[0] * after[1]) / (before[0] * before[1]))
