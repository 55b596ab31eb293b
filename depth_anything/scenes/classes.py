"""Class maps of procedural scenes: the object that each pixel of a seed shows."""

import numpy as np

from depth_anything.classes import make_class_table
from depth_anything.scenes.layout import SceneLayout
from depth_anything.scenes.raycast import PinholeView, Solid

SCENE_CLASSES = make_class_table(
    [
        "sky",
        "wall",
        "ceiling",
        "floor",
        "ground",
        "road",
        "building",
        "table",
        "chair",
        "cabinet",
        "sofa",
        "lamp",
        "object",
        "stand",
        "picture",
        "mirror",
        "glass",
        "car",
        "tree",
        "person",
        "pole",
        "wire",
    ]
)
"""Classes of the class maps of scenes. An object is named after what its parts form, and else after its surface."""

CLASS_VERSIONS = {"classic": True, "varied": 2}
"""Layout to the version of its class maps, a setting of every set with classes; change it when a seed's map changes."""

_NUMBERS = {row.name: number for number, row in enumerate(SCENE_CLASSES)}
_ROLE_CLASSES = {
    "facade": "building",
    "poster": "picture",
    "furniture": "object",
    "thin": "wire",
    "foliage": "tree",
}
_SHELL_TOLERANCE_M = 1e-3


def solid_class(solid: Solid) -> int:
    """Return the class of a solid; that of a room's shell is "wall". Glass and mirrors are what they are."""
    name = solid.role if solid.role in ("glass", "mirror") or not solid.kind else solid.kind
    return _NUMBERS[_ROLE_CLASSES.get(name, name)]


def class_map(
    layout: SceneLayout, view: PinholeView, depth: np.ndarray, solids: list[Solid], number: np.ndarray
) -> np.ndarray:
    """Name the object that each pixel shows.

    Args:
        layout: The scene; the height of its room tells ceiling and floor from the walls.
        view: The rays.
        depth: (H, W) in meters, +inf for sky; that of glass and mirrors is their surface's.
        solids: All solids, glass last.
        number: int (H, W), the solid of each pixel, -1 for the sky.

    Returns:
        uint8 (H, W), numbers of `SCENE_CLASSES`.
    """
    table = np.array([*(solid_class(solid) for solid in solids), _NUMBERS["sky"]], np.uint8)
    classes = table[number]  # -1 is the last entry
    is_shell = np.array([*(solid.shape == "shell" for solid in solids), False])[number]
    if is_shell.any():
        m = view.rotation
        down = m[1, 0] * view.u[None, :] + (m[1, 1] * view.v[:, None] + m[1, 2])
        with np.errstate(invalid="ignore"):  # the sky
            y = (
                layout.origin[1] + np.where(is_shell, depth, 0) * down
            )  # 0 on the floor, -height below the ceiling
        tolerance = _SHELL_TOLERANCE_M * np.maximum(1, np.where(is_shell, depth, 1))
        classes[is_shell & (y > -tolerance)] = _NUMBERS["floor"]
        classes[is_shell & (y < -layout.height + tolerance)] = _NUMBERS["ceiling"]
    return classes
