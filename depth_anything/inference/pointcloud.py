"""Point clouds: unproject an image with its depth map, write PLY and GLB.

Camera axes are those of OpenCV and of the authors' depth_to_pointcloud.py: x right, y down, z forward; a PLY keeps
them. glTF has y up and looks along -z, so a GLB has y and z negated.
"""

import math
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 1_000_000
POINT_FORMATS = ("ply", "glb")

MAX_DEPTH_MEDIANS = 10.0
"""Depth known up to scale: pixels beyond so many times the median depth count as sky."""

SATURATED_DEPTH_SHARE = 0.99
"""A metric network predicts nearly its maximum depth for the sky: pixels beyond this share of it count as sky."""


@dataclass(frozen=True)
class PointCloud:
    """Colored points in camera coordinates.

    Attributes:
        points: float32 (N, 3): x right, y down, z forward.
        colors: uint8 (N, 3), RGB.
        unit: "m", or "relative" if depth is known up to scale only.
        focal_px: Focal length used to unproject, pixels.
    """

    points: np.ndarray
    colors: np.ndarray
    unit: str
    focal_px: float


def unproject(
    image: np.ndarray,
    map: np.ndarray,
    *,
    quantity: str,
    focal_px: float,
    far: float | None = None,
    max_points: int = MAX_POINTS,
) -> PointCloud:
    """Unproject every pixel with a pinhole camera whose principal point is the image's center.

    x = (u + 0.5 - W/2) / f · z, y = (v + 0.5 - H/2) / f · z.

    Disparity determines ratios of depths only, and only if zero disparity is infinitely far. The networks are trained
    that way but do not guarantee it; it is assumed here. Depth is scaled such that its median is 1.

    Args:
        image: uint8 (H, W, 3), RGB.
        map: float (H, W).
        quantity: "depth" (meters) or "disparity".
        focal_px: Focal length, pixels.
        far: Leave out farther pixels: meters for depth, median depths for disparity (None: `MAX_DEPTH_MEDIANS`).
        max_points: Maximum number of points; every 2nd, 3rd, … row and column is kept to stay below it.

    Raises:
        ValueError: The focal length or the number of points is not above 0.
    """
    if not focal_px > 0 or max_points < 1:
        raise ValueError(f"focal={focal_px} and max_points={max_points} must be above 0")
    depth, unit = _to_depth(map, quantity)
    limit = MAX_DEPTH_MEDIANS if far is None and unit == "relative" else far or math.inf
    valid = np.isfinite(depth) & (depth > 0) & (depth <= limit)
    step = max(1, math.ceil(math.sqrt(valid.sum() / max_points)))
    while valid[::step, ::step].sum() > max_points:
        step += 1
    valid, depth = valid[::step, ::step], depth[::step, ::step]
    v, u = np.nonzero(valid)
    z = depth[valid]
    height, width = map.shape
    x = (u * step + 0.5 - width / 2) / focal_px * z
    y = (v * step + 0.5 - height / 2) / focal_px * z
    points = np.stack([x, y, z], axis=1).astype(np.float32)
    return PointCloud(points, image[::step, ::step][valid], unit, focal_px)


def encode_points(cloud: PointCloud, format: str) -> bytes:
    """Encode points as a binary PLY or a GLB; both state their unit and axes.

    Args:
        cloud: The points.
        format: "ply" or "glb".

    Raises:
        ValueError: There are no points.
    """
    import trimesh

    if not len(cloud.points):
        raise ValueError("no pixel is near enough for a point: the whole map counts as sky")
    if format == "glb":
        turned = cloud.points * np.array([1, -1, -1], np.float32)
        scene = trimesh.Scene(trimesh.PointCloud(turned, colors=_srgb_to_linear(cloud.colors)))
        scene.metadata.update(unit=cloud.unit, axes="x right, y up, z back", focal_px=cloud.focal_px)
        return bytes(scene.export(file_type="glb"))
    data = bytes(trimesh.PointCloud(cloud.points, colors=cloud.colors).export(file_type="ply"))
    comment = f"comment unit {cloud.unit}; x right, y down, z forward; focal {cloud.focal_px:g} px\n"
    end = data.index(b"\nelement") + 1
    return data[:end] + comment.encode() + data[end:]


def _srgb_to_linear(colors: np.ndarray) -> np.ndarray:
    """Convert sRGB bytes to linear ones: glTF 2.0 defines COLOR_0 as linear, and viewers show sRGB too pale."""
    share = np.arange(256) / 255
    light = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.rint(light * 255).astype(np.uint8)[colors]


def _to_depth(map: np.ndarray, quantity: str) -> tuple[np.ndarray, str]:
    """Return depth and its unit; the median depth of a disparity map becomes 1."""
    values = map.astype(np.float64)
    if quantity == "depth":
        return values, "m"
    positive = values[values > 1e-6 * max(float(values.max()), 1e-12)]
    scale = float(np.median(positive)) if positive.size else 1.0
    with np.errstate(divide="ignore"):
        return np.where(values > 0, scale / np.where(values > 0, values, 1), np.inf), "relative"
