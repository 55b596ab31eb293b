"""Class maps of procedural scenes."""

from dataclasses import replace

import numpy as np
import pytest

from depth_anything.evaluation.frames import read_frames
from depth_anything.scenes.classes import SCENE_CLASSES
from depth_anything.scenes.layout import random_layout
from depth_anything.scenes.render import SceneSource, render_classes, render_scene, write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec
from depth_anything.scenes.varied import varied_layout

NUMBERS = {row.name: number for number, row in enumerate(SCENE_CLASSES)}


def test_class_maps_change_neither_images_nor_depth_and_agree_with_the_geometry(tmp_path):
    spec = SceneSetSpec(look="photographic", count=3, seed=6, height=42, width=56)
    plain = write_scenes(tmp_path / "plain" / "set", spec)
    with_classes = write_scenes(tmp_path / "classes" / "set", replace(spec, classes=True))
    assert "classes" not in plain.meta and len(with_classes.meta["classes"]) == len(SCENE_CLASSES)
    for before, after in zip(read_frames(plain), read_frames(with_classes), strict=True):
        assert before.classes is None and (before.image == after.image).all()
        np.testing.assert_array_equal(before.depth, after.depth)
        np.testing.assert_array_equal(after.classes == NUMBERS["sky"], np.isinf(after.depth))


INDOORS = ("wall", "ceiling", "floor", "table", "chair", "cabinet", "sofa", "stand")
OUTDOORS = ("sky", "ground", "road", "building", "car", "tree", "person", "pole")


def names_in(classes):
    return {SCENE_CLASSES[number].name for number in np.unique(classes)}


@pytest.mark.parametrize("layout", ["classic", "varied"])
def test_classes_agree_with_the_kind_of_scene_and_with_its_sky(layout):
    shown = set()
    for seed in range(24):
        scene = random_layout(seed) if layout == "classic" else varied_layout(seed)
        classes = render_classes(seed, height=28, width=42, layout=layout)
        depth = render_scene(seed, look="synthetic", height=28, width=42, layout=layout).depth
        np.testing.assert_array_equal(classes == NUMBERS["sky"], np.isinf(depth))
        assert names_in(classes).isdisjoint(OUTDOORS if scene.indoors else INDOORS)
        shown |= names_in(classes)
    assert shown > {"floor", "ceiling", "wall", "table", "cabinet", "object", "road", "sky", "building"}


@pytest.mark.parametrize("layout", ["classic", "varied"])
def test_floors_are_level_below_the_camera_and_ceilings_above_it(layout):
    floors = ceilings = 0
    for seed in range(24):
        scene = random_layout(seed) if layout == "classic" else varied_layout(seed)
        if not scene.indoors:
            continue
        frame = render_scene(seed, look="synthetic", height=28, width=42, layout=layout)
        classes = render_classes(seed, height=28, width=42, layout=layout)
        camera = frame.meta["intrinsics"]
        v, u = np.mgrid[:28, :42]
        rays = np.stack(
            [(u - camera["cx"]) / camera["fx"], (v - camera["cy"]) / camera["fy"], np.ones(u.shape)], -1
        )
        y = scene.origin[1] + (rays * frame.depth[..., None] @ scene.rotation.T)[..., 1]
        floor, ceiling = (classes == NUMBERS[name] for name in ("floor", "ceiling"))
        np.testing.assert_allclose(y[floor], 0, atol=0.02)
        np.testing.assert_allclose(y[ceiling], -scene.height, atol=0.02)
        walls = y[classes == NUMBERS["wall"]]
        assert ((walls < 0.02) & (walls > -scene.height - 0.02)).all()
        floors, ceilings = floors + floor.sum(), ceilings + ceiling.sum()
    assert floors and ceilings


def test_close_ups_show_objects_on_tables_and_in_shelves():
    shown = set()
    for seed in range(160):
        if varied_layout(seed).detail != 1:  # that of tabletops and shelves
            shown |= names_in(render_classes(seed, height=12, width=16, layout="varied"))
    things = {"wall", "floor", "table", "cabinet", "object"}
    assert things <= shown <= {*things, "ceiling", "sky"}  # some stand in no room


def test_varied_scenes_show_all_classes():
    shown = set()
    for seed in range(160):
        shown |= names_in(render_classes(seed, height=24, width=32, layout="varied"))
    assert shown == set(NUMBERS)


def test_the_version_of_class_maps_is_a_setting_of_their_sets():
    spec = SceneSetSpec(look="synthetic", count=1, seed=6, height=14, width=14, classes=True)
    assert SceneSource(spec).settings["classes"] is True  # as before there were versions
    assert SceneSource(replace(spec, layout="varied")).settings["classes"] == 2
