"""Focal length of an image: given, from EXIF, or assumed. Point clouds and canonical metric models use it."""

import math
from typing import NamedTuple

from depth_anything.data.image_headers import open_image
from depth_anything.errors import Argument, UserError

DEFAULT_FOCAL_PX = 470.4
"""Focal length in the authors' depth_to_pointcloud.py, for images whose longer side is `DEFAULT_FOCAL_WIDTH_PX`."""

DEFAULT_FOCAL_WIDTH_PX = 640
"""The field of view is then `DEFAULT_FOV_DEG`."""

DEFAULT_FOV_DEG = 2 * math.degrees(math.atan(DEFAULT_FOCAL_WIDTH_PX / 2 / DEFAULT_FOCAL_PX))
"""68 degrees along the longer side."""

ASSUMED_SOURCE = "assumed"
"""First word of the source of a focal length that nobody stated."""

_FULL_FRAME_MM = math.hypot(36, 24)
_EXIF_IFD = 0x8769
_FOCAL_LENGTH, _FOCAL_35MM = 0x920A, 0xA405
_PLANE_X_RESOLUTION, _PLANE_UNIT = 0xA20E, 0xA210
_PIXEL_X, _PIXEL_Y = 0xA002, 0xA003
_UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 1e-3}


class FocalLength(NamedTuple):
    """A focal length in pixels, and in words where it comes from."""

    pixels: float
    source: str


def choose_focal_length(
    data: bytes, shape: tuple[int, ...], *, focal_px: float | None = None, fov_deg: float | None = None
) -> FocalLength:
    """Choose a focal length: the given one, else that of the image's EXIF, else the authors' default.

    Args:
        data: The image file.
        shape: (H, W, …) of the image.
        focal_px: Focal length given by the user, pixels.
        fov_deg: Horizontal field of view given by the user, degrees.
    """
    given = given_focal_length(shape, focal_px=focal_px, fov_deg=fov_deg)
    return given or _focal_from_exif(data, shape) or assume_focal_length(shape)


def given_focal_length(
    shape: tuple[int, ...], *, focal_px: float | None = None, fov_deg: float | None = None
) -> FocalLength | None:
    """Return the focal length that a user gave in pixels or as a field of view; None for neither.

    Args:
        shape: (H, W, …) of the image.
        focal_px: Pixels.
        fov_deg: Horizontal field of view, degrees.
    """
    if focal_px is not None:
        return FocalLength(focal_px, "given")
    if fov_deg is not None:
        return FocalLength(fov_to_focal(fov_deg, shape[1]), f"given: {fov_deg:g} degrees across")
    return None


def assume_focal_length(shape: tuple[int, ...]) -> FocalLength:
    """Return the authors' default for an image of shape (H, W, …)."""
    return FocalLength(
        DEFAULT_FOCAL_PX * max(shape[:2]) / DEFAULT_FOCAL_WIDTH_PX,
        f"{ASSUMED_SOURCE}: {DEFAULT_FOCAL_PX} px for a longer side of {DEFAULT_FOCAL_WIDTH_PX} px, not stated in EXIF",
    )


def fov_to_focal(fov_deg: float, width: int) -> float:
    """Convert a horizontal field of view in degrees to a focal length in pixels of an image `width` pixels wide.

    Example:
        >>> round(fov_to_focal(90, 640), 9)
        320.0
    """
    return width / 2 / math.tan(math.radians(fov_deg) / 2)


def check_camera(focal: float | None, fov: float | None) -> None:
    """Check a focal length in pixels and a field of view in degrees, of which at most one may be given.

    Raises:
        UserError: One is out of range, or both are given.
    """
    if focal is not None and not 0 < focal < math.inf:
        raise UserError([Argument("focal", focal), " must be pixels above 0"])
    if fov is not None and not 0 < fov < 180:
        raise UserError([Argument("fov", fov), " must be degrees between 0 and 180"])
    if focal is not None and fov is not None:
        raise UserError(
            [Argument("focal", focal), " and ", Argument("fov", fov), " say the same thing"], "give one"
        )


def _focal_from_exif(data: bytes, shape: tuple[int, ...]) -> FocalLength | None:
    try:
        exif = open_image(data).getexif().get_ifd(_EXIF_IFD)
        equivalent, length = (float(exif.get(tag, 0)) for tag in (_FOCAL_35MM, _FOCAL_LENGTH))
        resolution = float(exif.get(_PLANE_X_RESOLUTION, 0))
        sides = [int(exif.get(tag, 0)) for tag in (_PIXEL_X, _PIXEL_Y)]
        unit_mm = _UNIT_MM.get(int(exif.get(_PLANE_UNIT, 2)), 0.0)
    except Exception:  # damaged EXIF must not cost the image its map or its points
        return None
    if 0 < equivalent < math.inf:
        focal = equivalent / _FULL_FRAME_MM * math.hypot(*shape[:2])
        return FocalLength(focal, f"EXIF: {equivalent:g} mm on 35 mm film")
    if length > 0 and resolution > 0 and unit_mm > 0 and length * resolution < math.inf:
        original = max(sides) or max(shape[:2])  # the image may have been resized since it was taken
        focal = length * resolution / unit_mm * max(shape[:2]) / original
        return FocalLength(focal, f"EXIF: {length:g} mm, {resolution / unit_mm:.0f} px per mm of the sensor")
    return None
