"""Captions of procedural scenes: what is in front of the camera, in one sentence."""

import math
from collections import Counter

from depth_anything.scenes.layout import SceneLayout, random_layout
from depth_anything.scenes.raycast import Solid
from depth_anything.scenes.varied import varied_layout

CAPTION_VERSION = 1
"""Increase it when the caption of a seed changes; it is a setting of every captioned set."""

FARTHEST_M = 30.0
"""Solids farther than this are not named."""

# The role of a solid, and for furniture its shape → the noun and its plural.
_NOUNS = {
    "car": ("car", "cars"),
    "foliage": ("tree", "trees"),
    "facade": ("building", "buildings"),
    "lamp": ("lamp", "lamps"),
    "mirror": ("mirror", "mirrors"),
    "poster": ("picture", "pictures"),
    "glass": ("glass pane", "glass panes"),
    "ball": ("ball", "balls"),
    "tube": ("column", "columns"),
    "box": ("block", "blocks"),
}
MAX_NOUNS = 4
"""Kinds of things that are named. A sentence then has fewer letters than CLIP has tokens."""

_SOLIDS_PER_CAR = 2  # the body and the cabin have the role; wheels have another


def describe_scene(seed: int, *, layout: str = "classic") -> str:
    """Describe the scene of a seed: where it is, and how many of which things are in the camera's field of view.

    A thing counts if its center is in the field of view, even if another one hides it.

    Args:
        seed: As for `render_scene`; both looks have the same caption.
        layout: "classic" or "varied", as for `render_scene`.

    Returns:
        For example "a street with 2 cars, 11 buildings and a lamp".
    """
    placed = random_layout(seed) if layout == "classic" else varied_layout(seed)
    counts = Counter(_noun(solid) for solid in placed.solids if _is_in_view(solid, placed))
    counts["car"] = math.ceil(counts["car"] / _SOLIDS_PER_CAR)
    things = [_count_text(counts[noun], noun) for noun in _NOUNS if counts[noun]][:MAX_NOUNS]
    place = "a room" if placed.indoors else "a street"
    if not things:
        return place
    listed = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    return f"{place} with {listed}"


def _noun(solid: Solid) -> str:
    return solid.shape if solid.role == "furniture" else solid.role


def _is_in_view(solid: Solid, layout: SceneLayout) -> bool:
    if _noun(solid) not in _NOUNS:
        return False
    x, y, z = layout.rotation.T @ (solid.center - layout.origin)
    limit = math.tan(layout.field) * z
    return bool(0 < z < FARTHEST_M and max(abs(x), abs(y)) < limit)


def _count_text(count: int, noun: str) -> str:
    one, many = _NOUNS[noun]
    return f"a {one}" if count == 1 else f"{count} {many}"
