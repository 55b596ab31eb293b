"""Class maps of procedural scenes."""

from dataclasses import replace

import numpy as np

from depth_anything.evaluation.frames import read_frames
from depth_anything.scenes.classes import SCENE_CLASSES
from depth_anything.scenes.layout import random_layout
from depth_anything.scenes.render import render_classes, write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec


def test_class_maps_change_neither_images_nor_depth_and_agree_with_the_geometry(tmp_path):
    spec = SceneSetSpec(look="photographic", count=3, seed=6, height=42, width=56)
    plain = write_scenes(tmp_path / "plain" / "set", spec)
    with_classes = write_scenes(tmp_path / "classes" / "set", replace(spec, classes=True))
    assert "classes" not in plain.meta and len(with_classes.meta["classes"]) == len(SCENE_CLASSES)
    numbers = {row.name: number for number, row in enumerate(SCENE_CLASSES)}
    for before, after in zip(read_frames(plain), read_frames(with_classes), strict=True):
        assert before.classes is None and (before.image == after.image).all()
        np.testing.assert_array_equal(before.depth, after.depth)
        np.testing.assert_array_equal(after.classes == numbers["sky"], np.isinf(after.depth))
    floors = ceilings = 0
    for seed in range(8):
        layout = random_layout(seed)
        classes = render_classes(seed, height=28, width=42)
        assert classes.max() < len(SCENE_CLASSES)
        if not layout.indoors:
            assert not np.isin(
                classes, [numbers[name] for name in ("wall", "ceiling", "floor", "table")]
            ).any()
            continue
        floors += int((classes == numbers["floor"]).sum())
        ceilings += int((classes == numbers["ceiling"]).sum())
        # The floor is below, the ceiling above the middle of what shows both.
        rows = [np.nonzero(classes == numbers[name])[0] for name in ("ceiling", "floor")]
        if all(map(len, rows)):
            assert rows[0].mean() < rows[1].mean()
    assert floors and ceilings
