"""Random layouts for training that carries over to photographs: many viewpoints, sizes of scene and amounts of clutter.

Rooms, corridors, tabletops, bins, shelves and streets are seen by cameras of any height, pitch, roll and field of
view. Lamps are many and the air is clear, because haze, from which networks learn depth easily, is rare indoors.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from depth_anything.scenes import layout as classic
from depth_anything.scenes.layout import Placement, SceneLayout, box
from depth_anything.scenes.materials import Atmosphere, Light, PhiloxRandom, color_temperature
from depth_anything.scenes.raycast import Solid, rotation_matrix

_FURNITURE = (
    classic.table,
    classic.table,
    classic.chair,
    classic.chair,
    classic.cabinet,
    classic.cabinet,
    classic.sofa,
    classic.lamp,
    classic.loose_object,
    classic.loose_object,
    classic.coat_stand,
)


def varied_layout(seed: int) -> SceneLayout:
    """Return the varied layout of a seed: 40 % rooms and corridors, 35 % close-ups, 25 % streets."""
    draw = PhiloxRandom(seed, 11)
    kind = draw.uniform()
    if kind < 0.4:
        return _room(draw)
    if kind < 0.65:
        return _tabletop(draw)
    if kind < 0.75:
        return _shelf(draw)
    return _street(draw)


def varied_atmosphere(layout: SceneLayout, draw: PhiloxRandom) -> Atmosphere:
    """Return random light: one to four lamps near what the camera sees, or a sun; hardly any haze."""
    tint = color_temperature(draw.uniform(-1, 1))
    ambient = draw.uniform(0.08, 0.6)
    warm = color_temperature(draw.uniform(-0.8, 0.8))
    above = (ambient * warm[0], ambient * warm[1], ambient * warm[2])
    share = draw.uniform(0.3, 0.95)
    below = (above[0] * share, above[1] * share, above[2] * share)
    gray = draw.color(hue=(0, 1), saturation=(0, 0.3), value=(0.4, 0.95))
    lights: list[Light] = []
    if layout.indoors:
        ahead = layout.rotation[:, 2]
        for _ in range(1 + draw.integer(4)):
            target = layout.origin + ahead * (layout.reach * draw.uniform(-0.3, 1.4))
            x, z = (float(target[k]) + draw.uniform(-1, 1) * layout.reach for k in (0, 2))
            y = float(layout.origin[1]) - draw.uniform(-0.1, 0.9) * layout.reach
            y = max(y, -layout.height + 0.1)
            power = draw.uniform(0.3, 1.4)
            color = (tint[0] * power, tint[1] * power, tint[2] * power)
            lights.append(Light((x, y, z), color, False, layout.reach * draw.uniform(0.6, 3)))
        density = draw.choice((0.0, 0.0, 0.01)) * draw.uniform(0.5, 1.5)
        return Atmosphere(above, below, tuple(lights), gray, density, gray)
    strength = draw.choice((0.0, 0.7, 1.2)) * draw.uniform(0.7, 1.2)
    if strength:
        sun = np.array([draw.uniform(-1, 1), -draw.uniform(0.25, 1.2), draw.uniform(-1, 1)])
        sun = sun / math.sqrt(float((sun * sun).sum()))
        color = (tint[0] * strength, tint[1] * strength, tint[2] * strength)
        lights.append(Light((float(sun[0]), float(sun[1]), float(sun[2])), color, True))
    zenith = draw.color(hue=(0.55, 0.65), saturation=(0.0, 0.7), value=(0.15, 0.95))
    density = draw.choice((0.0, 0.003, 0.01)) * draw.uniform(0.5, 1.5)
    return Atmosphere(above, below, tuple(lights), gray, density, zenith, draw.uniform(0, 1))


# Indoors


def _bell(draw: PhiloxRandom, mean: float, deviation: float, low: float, high: float) -> float:
    """Return an approximately normal number, clipped to a range."""
    total = draw.uniform() + draw.uniform() + draw.uniform() + draw.uniform() - 2
    return min(max(mean + deviation * math.sqrt(3) * total, low), high)


def _log_uniform(draw: PhiloxRandom, low: float, high: float) -> float:
    return float(low * (high / low) ** draw.uniform())


def _room(draw: PhiloxRandom) -> SceneLayout:
    """Return a room or corridor, empty to crowded, seen from anywhere inside it."""
    corridor = draw.bernoulli(0.15)
    width = draw.uniform(1.2, 2.6) if corridor else _log_uniform(draw, 2.2, 10)
    length = _log_uniform(draw, 4, 25) if corridor else _log_uniform(draw, 2.5, 12)
    height = draw.uniform(2.2, 4.0)
    solids = [box(0, 0, 0, width, height, length, "wall", shape="shell")]
    eye = np.array(
        [
            draw.uniform(-0.5, 0.5) * (width - 0.8),
            -min(_bell(draw, 1.35, 0.4, 0.25, 2.6), height - 0.2),
            draw.uniform(-0.5, 0.5) * (length - 0.8),
        ]
    )
    if corridor:
        yaw = draw.choice((0.0, math.pi)) + _bell(draw, 0, 0.5, -1.5, 1.5)
    else:  # of three directions the one with the most room ahead, most of the time
        yaws = [draw.uniform(0, 2 * math.pi) for _ in range(3)]
        yaw = min(yaws, key=lambda a: eye[0] * math.sin(a) + eye[2] * math.cos(a))
        yaw = yaws[0] if draw.bernoulli(0.3) else yaw

    def spot() -> Placement:
        x, z = draw.uniform(-0.45, 0.45) * width, draw.uniform(-0.45, 0.45) * length
        return Placement(x, z, draw.uniform(0, 2 * math.pi))

    def inside(place: Placement, margin: float = 0.3) -> Placement:
        w, d = max(width / 2 - margin, 0.1), max(length / 2 - margin, 0.1)
        return Placement(min(max(place.x, -w), w), min(max(place.z, -d), d), place.yaw)

    crowd = draw.choice((0.0, 0.4, 1.0, 1.0, 1.6))
    if not corridor:
        for _ in range(int(draw.uniform(1, 9) * crowd)):
            solids += draw.choice(_FURNITURE)(spot(), draw)
        for _ in range(int(draw.uniform(0, 5) * crowd)):
            place = inside(classic.place_ahead(eye, yaw, _log_uniform(draw, 0.9, 4.5), draw))
            solids += draw.choice(_FURNITURE)(place, draw)
    for _ in range(int(draw.uniform(0, 5) * crowd)):
        solids += classic.cabinet(classic.place_at_wall(width, length, 0.3, draw), draw)
    for _ in range(int(draw.uniform(0, 12) * crowd)):  # small things on the floor
        place = inside(classic.place_ahead(eye, yaw, _log_uniform(draw, 0.6, 5), draw), 0.1)
        solids += _object(place, 0.0, _log_uniform(draw, 0.08, 0.5), draw)
    for _ in range(draw.integer(9)):  # pictures, doors and windows on the walls
        place, role = classic.place_at_wall(width, length, 0.02, draw), draw.choice(("poster", "furniture"))
        if draw.bernoulli(0.3):
            solids.append(place.put(0, 0, 0, draw.uniform(0.7, 1.1), min(2.05, height - 0.1), 0.06, role))
        else:
            y = draw.uniform(0.5, height - 1.1)
            solids.append(place.put(0, y, 0, draw.uniform(0.3, 1.8), draw.uniform(0.3, 1.1), 0.05, role))
    if draw.bernoulli(0.4):
        solids.append(spot().put(0, 0, 0, draw.uniform(0.8, 3), 0.01, draw.uniform(0.8, 3), "poster"))
    pitch = _bell(draw, 0.2, 0.3, -0.6, 1.3)
    turn = rotation_matrix(yaw, pitch, _bell(draw, 0, 0.12, -0.6, 0.6))
    solids = [s for s in solids if classic.is_clear_of_camera(s, eye, 0.45)]
    reach = min(3.5, 0.5 * max(width, length))
    return SceneLayout(solids, eye, turn, draw.uniform(0.38, 0.75), height, True, reach)


def _of_kind(kind: str, solids: list[Solid]) -> list[Solid]:
    """Return the parts of an object with its kind, for class maps."""
    return [replace(solid, kind=kind) for solid in solids]


def _object(place: Placement, y: float, size: float, draw: PhiloxRandom) -> list[Solid]:
    """Return a household object of a size in meters, standing y meters above the floor."""
    return _of_kind("object", _object_parts(place, y, size, draw))


def _object_parts(place: Placement, y: float, size: float, draw: PhiloxRandom) -> list[Solid]:
    kind = draw.integer(8)
    tall = size * draw.uniform(0.3, 2.2)
    if kind == 0:  # a bottle
        neck = size * 0.2
        return [
            place.put(0, y, 0, size * 0.5, tall, size * 0.5, "furniture", shape="tube"),
            place.put(0, y + tall, 0, neck, size * 0.6, neck, "furniture", shape="tube"),
        ]
    if kind == 1:  # a stack
        parts, at = [], y
        for _ in range(2 + draw.integer(4)):
            thick, wide = size * draw.uniform(0.1, 0.35), size * draw.uniform(0.7, 1.1)
            parts.append(place.put(0, at, 0, wide, thick, wide * 0.75, "furniture"))
            at += thick
        return parts
    if kind == 2:  # an open box
        side, thick = size * draw.uniform(0.8, 1.5), size * 0.05
        walls = [place.put(s * side / 2, y, 0, thick, tall, side, "furniture") for s in (-1, 1)]
        walls += [place.put(0, y, s * side / 2, side, tall, thick, "furniture") for s in (-1, 1)]
        return [*walls, place.put(0, y, 0, side, thick, side, "furniture")]
    if kind == 3:  # a flat thing
        return [place.put(0, y, 0, size * 1.2, size * 0.08, size * 0.9, "poster")]
    if kind == 4:  # lying on its side
        return [
            box(
                place.x,
                y + size * 0.25 - tall / 2,
                place.z,
                size * 0.5,
                tall,
                size * 0.5,
                "furniture",
                yaw=place.yaw,
                roll=math.pi / 2,
                shape="tube",
            )
        ]
    shape = draw.choice(("box", "box", "ball", "tube"))
    return [place.put(0, y, 0, size, tall, size * draw.uniform(0.5, 1.2), "furniture", shape=shape)]


def _tabletop(draw: PhiloxRandom) -> SceneLayout:
    """Return objects on a table, in a bin or on the floor, seen from close by and from above."""
    top = draw.choice((0.0, 0.75, 0.75)) * draw.uniform(0.6, 1.3)
    distance, pitch = _log_uniform(draw, 0.4, 1.8), draw.uniform(0.25, 1.5)
    yaw, field = draw.uniform(0, 2 * math.pi), draw.uniform(0.3, 0.62)
    turn = rotation_matrix(yaw, pitch, _bell(draw, 0, 0.12, -0.5, 0.5))
    target = np.array([0.0, -top - draw.uniform(0, 0.1), 0.0])
    eye = target - turn[:, 2] * distance
    wide = distance * math.tan(field)
    room = [draw.uniform(2.5, 8), draw.uniform(2.5, 8)]
    shift = [draw.uniform(-0.4, 0.4) * side for side in room]
    height = max(2.4, float(-eye[1]) + 0.3)
    solids = [box(shift[0], 0, shift[1], room[0], height, room[1], "wall", shape="shell")]
    place = Placement(draw.uniform(-0.3, 0.3) * wide, draw.uniform(-0.3, 0.3) * wide, draw.uniform(0, 6.3))
    if top:
        width, length = wide * draw.uniform(1.2, 5), wide * draw.uniform(1.2, 4)
        solids += _of_kind("table", [place.put(0, top - 0.04, 0, width, 0.04, length, "furniture")])
    if draw.bernoulli(0.25):  # a bin
        side, other, tall = (
            wide * draw.uniform(0.8, 2),
            wide * draw.uniform(0.8, 2),
            wide * draw.uniform(0.2, 1),
        )
        thick = wide * 0.04
        solids += [place.put(s * side / 2, top, 0, thick, tall, other, "furniture") for s in (-1, 1)]
        solids += [place.put(0, top, s * other / 2, side, tall, thick, "furniture") for s in (-1, 1)]
    if draw.bernoulli(0.4):  # a box, a monitor or a wall behind
        away = distance * draw.uniform(0.3, 1)
        x, z = math.sin(yaw) * away, math.cos(yaw) * away
        back = Placement(x, z, yaw + draw.uniform(-0.5, 0.5))
        size = wide * draw.uniform(0.4, 3)
        solids.append(back.put(0, top, 0, size, wide * draw.uniform(0.3, 2), 0.05 + wide * 0.1, "furniture"))
    for _ in range(int(_log_uniform(draw, 1, 22))):
        radius = wide * 1.5 * math.sqrt(draw.uniform())
        angle = draw.uniform(0, 2 * math.pi)
        at = Placement(radius * math.cos(angle), radius * math.sin(angle), draw.uniform(0, 2 * math.pi))
        solids += _object(at, top, wide * _log_uniform(draw, 0.1, 0.7), draw)
    solids = [s for s in solids if classic.is_clear_of_camera(s, eye, 0.12)]
    return SceneLayout(solids, eye, turn, field, height, True, distance, 0.7 / distance + 0.5)


def _shelf(draw: PhiloxRandom) -> SceneLayout:
    """Return a shelf, or a heap of boxes in front of a wall, seen from the front."""
    distance, field = _log_uniform(draw, 0.6, 2.5), draw.uniform(0.35, 0.65)
    yaw, pitch = _bell(draw, 0, 0.4, -1.1, 1.1), _bell(draw, 0.1, 0.25, -0.4, 0.8)
    turn = rotation_matrix(yaw, pitch, _bell(draw, 0, 0.1, -0.4, 0.4))
    wide = distance * math.tan(field)
    middle = wide * draw.uniform(0.8, 1.6)
    target = np.array([0.0, -middle, 0.0])
    eye = target - turn[:, 2] * distance
    height = max(2.4, float(-eye[1]) + 0.3)
    deep = distance * draw.uniform(0.15, 0.5)
    far = draw.choice((0.0, 0.0, 1.0)) * draw.uniform(0.3, 3)
    length = distance + deep + far + 2
    solids = [box(0, 0, deep + far - length / 2, 8, height, length, "wall", shape="shell")]
    rows, columns = 2 + draw.integer(3), 1 + draw.integer(4)
    tall, side = 2 * middle / rows, wide * draw.uniform(1, 2.5)
    place = Placement(0.0, deep / 2, 0.0)
    shelf = draw.bernoulli(0.7)
    if shelf:
        boards = [
            place.put(0, k * tall, 0, side, 0.02 * wide + 0.01, deep, "furniture") for k in range(rows + 1)
        ]
        boards += [
            place.put((k / columns - 0.5) * side, 0, 0, 0.02 * wide + 0.01, rows * tall, deep, "furniture")
            for k in range(columns + 1)
        ]
        if draw.bernoulli(0.6):
            boards.append(place.put(0, 0, deep / 2, side, rows * tall, 0.02, "furniture"))
        solids += _of_kind("cabinet", boards)
    for row in range(rows):
        for _ in range(draw.integer(5)):
            x, z = draw.uniform(-0.5, 0.5) * side, deep * draw.uniform(0.25, 0.75)
            size = min(tall, deep, side) * draw.uniform(0.25, 0.8)
            y = row * tall + 0.02 * wide + 0.01 if shelf else 0.0
            solids += _object(Placement(x, z, draw.uniform(0, 6.3)), y, size, draw)
    solids = [s for s in solids if classic.is_clear_of_camera(s, eye, 0.12)]
    return SceneLayout(solids, eye, turn, field, height, True, distance, 0.6 / distance + 0.5)


# Outdoors


def _street(draw: PhiloxRandom) -> SceneLayout:
    """Return a street, with or without buildings, seen by a pedestrian, from a car or from a window."""
    base = classic.random_street(draw)
    keep: Callable[[Solid], bool] = lambda s: True  # noqa: E731
    bare = draw.choice((0, 0, 0, 1, 1, 2))
    if bare == 1:
        side = draw.choice((-1, 1))
        keep = lambda s: s.role not in ("facade", "mirror", "glass") or s.center[0] * side > 0  # noqa: E731
    if bare == 2:
        keep = lambda s: s.role not in ("facade", "mirror", "glass")  # noqa: E731
    solids = [s for s in base.solids if keep(s)]
    eye = np.array([base.origin[0], -_log_uniform(draw, 0.8, 4.5), 0.0])
    yaw = _bell(draw, 0, 0.6, -1.6, 1.6)
    for _ in range(draw.integer(5)):
        place = classic.place_ahead(eye, yaw, _log_uniform(draw, 2, 40), draw)
        thing = draw.choice((classic.car, classic.car, classic.person, classic.tree, classic.trash_bin))
        solids += thing(place.x, place.z, draw)
    turn = rotation_matrix(yaw, _bell(draw, 0.05, 0.15, -0.4, 0.6), _bell(draw, 0, 0.07, -0.4, 0.4))
    solids = [s for s in solids if classic.is_clear_of_camera(s, eye, 0.9)]
    return SceneLayout(solids, eye, turn, draw.uniform(0.35, 0.85), 6.0, False, 12.0)
