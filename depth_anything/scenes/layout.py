"""Random layouts of procedural scenes: furnished rooms and streets, and where the camera is.

A layout is a function of its seed. Depth, image and looks are added by render.py.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from depth_anything.scenes.materials import PhiloxRandom
from depth_anything.scenes.raycast import Solid, rotation_matrix


@dataclass(frozen=True, eq=False)
class SceneLayout:
    """The solids of a scene, the pose and field of view of the camera, and whether the scene is indoors."""

    solids: list[Solid]
    origin: np.ndarray
    rotation: np.ndarray
    field: float  # half of the horizontal field of view, radians
    height: float  # meters from the floor to the ceiling
    indoors: bool
    reach: float = 3.0  # meters to what the camera looks at
    detail: float = 1.0  # factor of the textures' frequency: above 1 for close-ups


def box(
    x: float,
    y: float,
    z: float,
    width: float,
    height: float,
    length: float,
    role: str,
    *,
    yaw: float = 0.0,
    pitch: float = 0.0,
    roll: float = 0.0,
    shape: str = "box",
) -> Solid:
    """Return a solid whose lower side is y meters above the floor."""
    center, half = np.array([x, -y - height / 2, z]), np.array([width, height, length]) / 2
    return Solid(shape, center, half, rotation_matrix(yaw, pitch, roll).T, role)


class Placement:
    """Position and rotation of an object on the floor; adds its parts."""

    def __init__(self, x: float, z: float, yaw: float) -> None:
        """Set the position in meters and the rotation about the vertical axis in radians."""
        self.x, self.z, self.yaw = x, z, yaw

    def put(
        self,
        dx: float,
        y: float,
        dz: float,
        width: float,
        height: float,
        length: float,
        role: str,
        *,
        shape: str = "box",
    ) -> Solid:
        """Return a part at (dx, dz) in the axes of the object, its lower side y meters above the floor."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        x, z = self.x + c * dx + s * dz, self.z - s * dx + c * dz
        return box(x, y, z, width, height, length, role, yaw=self.yaw, shape=shape)


def _legs(
    place: Placement, width: float, length: float, height: float, thick: float, shape: str
) -> list[Solid]:
    x, z = width / 2 - thick, length / 2 - thick
    return [
        place.put(a * x, 0, b * z, thick, height, thick, "thin", shape=shape)
        for a in (-1, 1)
        for b in (-1, 1)
    ]


def table(place: Placement, draw: PhiloxRandom) -> list[Solid]:
    """Return a table with up to three things on it."""
    width, length, height = draw.uniform(0.8, 1.8), draw.uniform(0.6, 1.0), draw.uniform(0.45, 0.95)
    parts = [place.put(0, height, 0, width, 0.05, length, "furniture")]
    parts += _legs(place, width, length, height, draw.uniform(0.04, 0.08), draw.choice(("box", "tube")))
    for _ in range(draw.integer(4)):
        x, z = draw.uniform(-0.4, 0.4) * width, draw.uniform(-0.4, 0.4) * length
        size, shape = draw.uniform(0.1, 0.3), draw.choice(("box", "ball", "tube"))
        parts.append(
            place.put(x, height + 0.05, z, size, size * draw.uniform(0.6, 2), size, "furniture", shape=shape)
        )
    return parts


def chair(place: Placement, draw: PhiloxRandom) -> list[Solid]:
    """Return a chair with four legs."""
    side, height = draw.uniform(0.4, 0.55), draw.uniform(0.4, 0.5)
    back = place.put(0, height, side / 2, side, draw.uniform(0.35, 0.6), 0.05, "furniture")
    seat = place.put(0, height, 0, side, 0.06, side, "furniture")
    return [seat, back, *_legs(place, side, side, height, 0.05, draw.choice(("box", "tube")))]


def cabinet(place: Placement, draw: PhiloxRandom) -> list[Solid]:
    """Return a cabinet, or an open shelf."""
    width, length, height = draw.uniform(0.5, 1.6), draw.uniform(0.35, 0.6), draw.uniform(0.6, 2.1)
    if draw.bernoulli(0.5):
        return [place.put(0, 0, 0, width, height, length, "furniture")]
    boards = 2 + draw.integer(4)
    parts = [place.put(s * width / 2, 0, 0, 0.04, height, length, "furniture") for s in (-1, 1)]
    parts += [
        place.put(0, k * (height - 0.04) / boards, 0, width, 0.04, length, "furniture")
        for k in range(boards + 1)
    ]
    return parts


def sofa(place: Placement, draw: PhiloxRandom) -> list[Solid]:
    """Return a sofa."""
    width, length = draw.uniform(1.2, 2.2), draw.uniform(0.8, 1.0)
    parts = [
        place.put(0, 0, 0, width, 0.42, length, "furniture"),
        place.put(0, 0.3, 0.4, width, 0.55, 0.2, "furniture"),
    ]
    parts += [place.put(s * width / 2, 0, 0, 0.2, 0.62, length, "furniture") for s in (-1, 1)]
    return parts


def lamp(place: Placement, draw: PhiloxRandom) -> list[Solid]:
    """Return a floor lamp."""
    height, wide = draw.uniform(1.2, 1.8), draw.uniform(0.25, 0.45)
    shade = place.put(0, height, 0, wide, wide * 0.8, wide, "lamp", shape=draw.choice(("tube", "ball")))
    foot = place.put(0, 0, 0, 0.3, 0.03, 0.3, "thin", shape="tube")
    return [place.put(0, 0, 0, 0.04, height, 0.04, "thin", shape="tube"), shade, foot]


def loose_object(place: Placement, draw: PhiloxRandom) -> list[Solid]:
    """Return a box, ball or tube on the floor."""
    size, shape = draw.uniform(0.3, 1.1), draw.choice(("box", "ball", "tube"))
    return [place.put(0, 0, 0, size, size * draw.uniform(0.6, 1.6), size, "furniture", shape=shape)]


def glass_screen(place: Placement, draw: PhiloxRandom) -> list[Solid]:
    """Return a pane of glass between two posts."""
    width, height = draw.uniform(0.8, 1.6), draw.uniform(1.2, 2.0)
    posts = [place.put(s * width / 2, 0, 0, 0.05, height, 0.05, "thin") for s in (-1, 1)]
    return [*posts, place.put(0, 0.05, 0, width, height - 0.05, 0.02, "glass")]


def coat_stand(place: Placement, draw: PhiloxRandom) -> list[Solid]:
    """Return a coat stand or fence: thin posts in a row."""
    count, height = 2 + draw.integer(6), draw.uniform(0.8, 1.9)
    parts = [place.put(k * 0.18, 0, 0, 0.03, height, 0.03, "thin", shape="tube") for k in range(count)]
    return [*parts, place.put((count - 1) * 0.09, height * 0.9, 0, count * 0.18, 0.03, 0.03, "thin")]


def place_at_wall(width: float, length: float, gap: float, draw: PhiloxRandom) -> Placement:
    """Return a placement `gap` meters in front of a random wall of a room, its z axis pointing to the wall."""
    yaw = draw.integer(4) * math.pi / 2
    along = draw.uniform(-0.4, 0.4)
    x, z = math.sin(yaw), math.cos(yaw)
    return Placement(
        x * (width / 2 - gap) + abs(z) * along * width, z * (length / 2 - gap) + abs(x) * along * length, yaw
    )


def place_ahead(eye: np.ndarray, yaw: float, distance: float, draw: PhiloxRandom) -> Placement:
    """Return a placement on the floor within 0.5 rad of the viewing direction."""
    angle = yaw + draw.uniform(-0.5, 0.5)
    x, z = eye[0] + distance * math.sin(angle), eye[2] + distance * math.cos(angle)
    return Placement(float(x), float(z), draw.uniform(0, 2 * math.pi))


def _random_room(draw: PhiloxRandom) -> SceneLayout:
    """Return a furnished room with the camera near one end, looking roughly toward the other."""
    width, length, height = draw.uniform(4, 9), draw.uniform(6, 14), draw.uniform(2.4, 3.6)
    eye = np.array(
        [draw.uniform(-0.42, 0.42) * width, -draw.uniform(0.7, 2.0), draw.uniform(-0.46, -0.25) * length]
    )

    def spot() -> Placement:
        x, z = draw.uniform(-0.43, 0.43) * width, draw.uniform(-0.43, 0.43) * length
        return Placement(x, z, draw.uniform(0, 2 * math.pi))

    solids = [box(0, 0, 0, width, height, length, "wall", shape="shell")]
    things = (
        table,
        table,
        chair,
        chair,
        chair,
        cabinet,
        sofa,
        lamp,
        loose_object,
        loose_object,
        glass_screen,
        coat_stand,
    )
    for _ in range(3 + draw.integer(6)):
        solids += draw.choice(things)(spot(), draw)
    inward = math.atan2(-eye[0], -eye[2]) + draw.uniform(-0.5, 0.5)
    for _ in range(1 + draw.integer(4)):  # near the camera, large in the image
        place = place_ahead(eye, inward, draw.uniform(1.6, 3.6), draw)
        x, z = (
            min(max(p, 0.5 - side / 2), side / 2 - 0.5) for p, side in ((place.x, width), (place.z, length))
        )
        solids += draw.choice((cabinet, sofa, loose_object, loose_object, table, chair))(
            Placement(x, z, place.yaw), draw
        )
    for _ in range(2 + draw.integer(3)):
        solids += cabinet(place_at_wall(width, length, 0.3, draw), draw)
    for _ in range(2 + draw.integer(7)):
        role = draw.choice(("poster", "poster", "poster", "mirror"))
        place, y = place_at_wall(width, length, 0.02, draw), draw.uniform(0.8, height - 1.1)
        solids.append(place.put(0, y, 0, draw.uniform(0.3, 1.5), draw.uniform(0.3, 1.1), 0.04, role))
    if draw.bernoulli(0.5):  # a rug
        solids.append(spot().put(0, 0, 0, draw.uniform(1, 2.5), 0.01, draw.uniform(1, 2), "poster"))
    for _ in range(draw.integer(3)):  # hanging lamps
        place, drop, wide = spot(), draw.uniform(0.4, 1.0), draw.uniform(0.2, 0.5)
        solids.append(place.put(0, height - drop, 0, 0.02, drop, 0.02, "thin", shape="tube"))
        solids.append(place.put(0, height - drop - wide / 2, 0, wide, wide, wide, "lamp", shape="ball"))
    turn = rotation_matrix(inward, draw.uniform(-0.25, 0.55), draw.uniform(-0.12, 0.12))
    return SceneLayout(solids, eye, turn, draw.uniform(0.5, 0.75), height, True)


def car(x: float, z: float, draw: PhiloxRandom) -> list[Solid]:
    """Return a car along the street."""
    place, length = Placement(x, z, draw.uniform(-0.05, 0.05)), draw.uniform(3.6, 4.8)
    tall = draw.uniform(0.5, 1.2)
    wheels = [
        box(x + a * 0.8, 0, z + b * length * 0.3, 0.64, 0.2, 0.64, "road", roll=math.pi / 2, shape="tube")
        for a in (-1, 1)
        for b in (-1, 1)
    ]
    wheels = [replace(w, center=w.center + np.array([0, -0.22, 0])) for w in wheels]
    cabin = place.put(0, 0.9, 0.1, 1.5, tall, length * 0.5, "car")
    return [*wheels, place.put(0, 0.3, 0, 1.8, 0.65, length, "car"), cabin]


def tree(x: float, z: float, draw: PhiloxRandom) -> list[Solid]:
    """Return a tree."""
    trunk, wide = draw.uniform(1.5, 3), draw.uniform(1.5, 3.5)
    crown = box(x, trunk * 0.9, z, wide, wide * draw.uniform(0.8, 1.6), wide, "foliage", shape="ball")
    return [box(x, 0, z, 0.3, trunk, 0.3, "furniture", shape="tube"), crown]


def person(x: float, z: float, draw: PhiloxRandom) -> list[Solid]:
    """Return a standing person: a tube with a head."""
    tall = draw.uniform(1.2, 1.6)
    return [
        box(x, 0, z, 0.45, tall, 0.35, "furniture", shape="tube"),
        box(x, tall - 0.02, z, 0.24, 0.28, 0.24, "furniture", shape="ball"),
    ]


def trash_bin(x: float, z: float, draw: PhiloxRandom) -> list[Solid]:
    """Return a bin: a box, tube or ball."""
    size, shape = draw.uniform(0.7, 1.8), draw.choice(("box", "box", "tube", "ball"))
    tall, yaw = size * draw.uniform(0.7, 1.4), draw.uniform(0, math.pi)
    return [box(x, 0, z, size, tall, size, "furniture", yaw=yaw, shape=shape)]


def _pole(x: float, z: float, draw: PhiloxRandom) -> list[Solid]:
    tall, side = draw.uniform(3, 8), -1 if x > 0 else 1
    parts = [box(x, 0, z, 0.14, tall, 0.14, "thin", shape="tube")]
    if draw.bernoulli(0.5):
        return [
            *parts,
            box(x + side * 0.7, tall - 0.1, z, 1.4, 0.08, 0.1, "thin"),
            box(x + side * 1.3, tall - 0.25, z, 0.5, 0.15, 0.25, "lamp"),
        ]
    return [*parts, box(x, min(tall, 2.5) - 0.6, z - 0.1, 0.6, 0.6, 0.03, "poster")]


def random_street(draw: PhiloxRandom) -> SceneLayout:
    """Return a road between two rows of buildings, with the camera on the road."""
    half = draw.uniform(3, 6)
    walk = half + draw.uniform(1.5, 4)
    eye = np.array([draw.uniform(-0.8, 0.8) * half, -draw.uniform(1.2, 2.4), 0.0])
    solids = [box(0, -1, 0, 400, 1, 400, "ground"), box(0, 0, 60, 2 * half, 0.01, 200, "road")]
    for side in (-1, 1):
        solids.append(box(side * (half + walk) / 2, 0, 60, walk - half, 0.15, 200, "ground"))
        z = draw.uniform(-6, 4)
        while z < 110:
            long, deep, tall = draw.uniform(5, 16), draw.uniform(6, 12), draw.uniform(3.5, 18)
            front = walk + draw.choice((0.0, 0.0, draw.uniform(0, 4)))
            solids.append(box(side * (front + deep / 2), 0, z + long / 2, deep, tall, long, "facade"))
            if draw.bernoulli(0.25):  # a shop window
                role = draw.choice(("glass", "mirror"))
                solids.append(box(side * (front - 0.03), 0.5, z + long / 2, 0.06, 2.2, long * 0.7, role))
            z += long + draw.choice((0.0, 0.0, 2.0, 8.0))
        for _ in range(2 + draw.integer(5)):
            z, x = draw.uniform(4, 45), side * draw.uniform(half + 0.3, walk - 0.2)
            solids += draw.choice((tree, _pole, _pole, person, person))(x, z, draw)
        for _ in range(draw.integer(4)):
            solids += car(side * (half - draw.uniform(1, 1.6)), draw.uniform(5, 40), draw)
    if draw.bernoulli(0.4):
        z = draw.uniform(50, 120)
        solids.append(box(0, 0, z + 6, 60, draw.uniform(5, 25), 12, "facade"))
    for _ in range(draw.integer(4)):  # wires across the street
        solids.append(box(0, draw.uniform(3.5, 6), draw.uniform(6, 25), 2 * walk, 0.06, 0.06, "thin"))
    if draw.bernoulli(0.3):  # a wet patch
        solids.append(
            box(
                draw.uniform(-1, 1) * half,
                0.011,
                draw.uniform(5, 14),
                draw.uniform(1.5, 4),
                0.005,
                draw.uniform(2, 6),
                "mirror",
            )
        )
    ahead = draw.uniform(-0.8, 0.8)
    for _ in range(1 + draw.integer(3)):  # near the camera, large in the image
        place = place_ahead(eye, ahead, draw.uniform(3, 9), draw)
        x = min(max(place.x, 1 - walk), walk - 1)
        solids += draw.choice((car, car, person, tree, trash_bin))(x, place.z, draw)
    turn = rotation_matrix(ahead, draw.uniform(-0.25, 0.35), draw.uniform(-0.1, 0.1))
    return SceneLayout(solids, eye, turn, draw.uniform(0.45, 0.75), 6.0, False)


def is_clear_of_camera(solid: Solid, eye: np.ndarray, distance: float = 0.9) -> bool:
    """Return whether a solid is far enough from the camera; the room's shell always is."""
    if solid.shape == "shell":
        return True
    away = np.abs(solid.axes @ (eye - solid.center)) - solid.half
    return float(away.max()) > (distance if solid.role not in ("ground", "road") else 0.1)


def random_layout(seed: int) -> SceneLayout:
    """Return the layout of a seed: a room or a street with equal probability, nothing within 0.9 m of the camera."""
    draw = PhiloxRandom(seed, 1)
    layout = _random_room(draw) if draw.bernoulli(0.5) else random_street(draw)
    return replace(layout, solids=[s for s in layout.solids if is_clear_of_camera(s, layout.origin)])
