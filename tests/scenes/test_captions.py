"""Captions of procedural scenes: which solids are named, and how many."""

import math

import numpy as np
import pytest

from depth_anything.scenes import captions
from depth_anything.scenes.captions import describe_scene
from depth_anything.scenes.layout import Placement, SceneLayout, box, car
from depth_anything.scenes.materials import PhiloxRandom
from depth_anything.scenes.raycast import rotation_matrix


def thing(role, x=0.0, z=5.0, y=0.0, *, shape="box"):
    """Return a solid of 1 m around (x, z), its center y meters above the camera."""
    return box(x, y - 0.5, z, 1, 1, 1, role, shape=shape)


@pytest.fixture
def describe(monkeypatch):
    """Return the caption of solids seen by a camera at the origin that looks along z with 90 degrees."""

    def call(*solids, indoors=True, yaw=0.0, layout="classic"):
        turn = rotation_matrix(yaw, 0, 0)
        scene = SceneLayout(list(solids), np.zeros(3), turn, math.pi / 4, 3.0, indoors)
        name = "random_layout" if layout == "classic" else "varied_layout"
        monkeypatch.setattr(captions, name, lambda seed: scene)
        return describe_scene(0, layout=layout)

    return call


def test_things_are_counted_by_role_and_furniture_by_shape(describe):
    assert describe() == "a room" and describe(indoors=False) == "a street"
    assert describe(thing("lamp")) == "a room with a lamp"
    assert describe(thing("facade"), thing("facade", x=1), indoors=False) == "a street with 2 buildings"
    solids = [thing("furniture", shape=shape) for shape in ("tube", "ball", "ball")]
    assert describe(*solids, thing("foliage")) == "a room with a tree, 2 balls and a column"
    assert describe(thing("wall"), thing("thin"), thing("road")) == "a room"
    assert describe(thing("poster"), layout="varied") == "a room with a picture"


def test_at_most_four_kinds_are_named(describe):
    roles = ("glass", "poster", "mirror", "lamp", "facade", "foliage")
    found = describe(*map(thing, roles))
    assert found == "a room with a tree, a building, a lamp and a mirror"


def test_a_car_is_counted_once_and_half_of_it_as_one(describe):
    cars = [car(x, 15.0, PhiloxRandom(3)) for x in (-4.0, 4.0)]
    assert describe(*cars[0], *cars[1], indoors=False) == "a street with 2 cars"
    body, cabin = (part for part in cars[0] if part.role == "car")
    assert describe(body) == describe(cabin) == "a room with a car"


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        ({"x": 4.9}, True),
        ({"x": 5.1}, False),  # beside the field of view
        ({"x": -5.1}, False),
        ({"y": 4.9}, True),
        ({"y": 5.1}, False),  # above it
        ({"z": -5.0}, False),  # behind the camera
        ({"z": 29.0}, True),
        ({"z": 31.0}, False),  # too far
    ],
)
def test_a_thing_counts_if_its_center_is_in_view_and_near(describe, place, seen):
    assert describe(thing("lamp", **place)) == ("a room with a lamp" if seen else "a room")


def test_the_view_turns_with_the_camera(describe):
    right = Placement(5, 0, 0).put(0, 0, 0, 1, 1, 1, "lamp")
    assert describe(right) == "a room"
    assert describe(right, yaw=math.pi / 2) == "a room with a lamp"
