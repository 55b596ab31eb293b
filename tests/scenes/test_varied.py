"""The varied layout: ranges of its cameras and scenes, its depth, and the same image again."""

import math

import numpy as np
import pytest
from ray_marching import march

from depth_anything.scenes import render
from depth_anything.scenes.layout import random_layout
from depth_anything.scenes.raycast import PinholeView, cast_rays
from depth_anything.scenes.render import render_scene
from depth_anything.scenes.varied import varied_layout

SMALL = {"height": 24, "width": 32}
VARIED_SEEDS = range(160)


@pytest.fixture(scope="module")
def varied():
    return [varied_layout(seed) for seed in VARIED_SEEDS]


def pitch_of(one):
    return math.asin(one.rotation[1, 2])  # of the viewing direction; y points down


def test_varied_cameras_have_wider_ranges_than_classic_ones(varied):
    classic = [random_layout(seed) for seed in VARIED_SEEDS]
    for reach in (pitch_of, lambda one: one.field, lambda one: -one.origin[1]):
        wide, narrow = ([reach(one) for one in layouts] for layouts in (varied, classic))
        assert min(wide) < min(narrow) and max(wide) > max(narrow)
    assert max(map(pitch_of, varied)) > 1.2  # nearly straight down
    assert all(0.25 < one.field < 0.9 and -0.7 < pitch_of(one) < 1.55 for one in varied)
    roll = [math.asin(one.rotation[1, 0] / math.cos(pitch_of(one))) for one in varied]
    assert -0.65 < min(roll) < -0.15 and 0.15 < max(roll) < 0.65
    streets = np.mean([not one.indoors for one in varied])
    assert 0.15 < streets < 0.35


def test_varied_scenes_range_from_close_ups_to_streets(varied):
    medians = [
        np.median(render_scene(seed, look="synthetic", layout="varied", height=12, width=16).depth)
        for seed in VARIED_SEEDS
    ]
    assert np.mean(np.array(medians) < 1) > 0.1 and np.mean(np.array(medians) > 5) > 0.1
    counts = [len(one.solids) for one in varied]
    assert min(counts) <= 8 and max(counts) >= 60


@pytest.mark.parametrize("look", render.LOOKS)
def test_varied_depth_is_positive_and_finite_except_for_the_sky(look, varied):
    for seed in range(30):
        frame = render_scene(seed, look=look, layout="varied", **SMALL)
        assert frame.depth.min() > 0.05 and not np.isnan(frame.depth).any()
        assert np.isfinite(frame.depth).all() or not varied[seed].indoors
        assert frame.depth[np.isfinite(frame.depth)].max() <= 150
        assert frame.meta["layout"] == "varied"
        assert frame.image.std() > 0


def test_a_varied_seed_gives_the_same_image_again_and_the_looks_share_depth():
    for seed in (0, 3):
        frames = [render_scene(seed, look="photographic", layout="varied", **SMALL) for _ in range(2)]
        assert (frames[0].image == frames[1].image).all()
        plain = render_scene(seed, look="synthetic", layout="varied", **SMALL)
        assert (plain.depth == frames[0].depth).all() and (plain.image != frames[0].image).any()
        assert (render_scene(seed, look="synthetic", **SMALL).depth != plain.depth).any()


def test_varied_depth_equals_that_of_ray_marching(varied):
    layout = next(one for one in varied if one.indoors and one.reach < 1.5)
    u = ((np.arange(16) - 7.5) / 16).astype(np.float32)
    seen = PinholeView(layout.origin, layout.rotation, u, u[2:14])
    depth, _ = cast_rays(layout.solids, seen)
    walked = march(layout.solids, seen, step=0.005, far=9.0)
    assert np.mean(np.abs(depth - walked) < 0.006) > 0.97


def test_an_unknown_layout_is_rejected():
    with pytest.raises(ValueError, match="classic or varied"):
        render_scene(0, look="synthetic", layout="round", **SMALL)
