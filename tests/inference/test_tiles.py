"""Tiles: coverage, alignment, and blending without seams."""

import itertools

import cv2
import numpy as np
import pytest
import torch

from depth_anything.inference import tiles
from depth_anything.inference.predictor import Predictor
from depth_anything.inference.tiles import blend_tiles, blend_weights, fit_scale_shift, parse_grid, tile_spans
from depth_anything.model.depth_anything import DepthAnything


def landscape(height, width, seed=0):
    """A map with a floor, hills, and fine bumps that are lost at low resolution; float32, above 0."""
    rng = np.random.default_rng(seed)
    hills = cv2.resize(rng.random((5, 7)), (width, height), interpolation=cv2.INTER_CUBIC)
    bumps = cv2.resize(rng.random((height // 8, width // 8)), (width, height), interpolation=cv2.INTER_CUBIC)
    return (1 + np.linspace(0, 3, height)[:, None] + hills + 0.3 * bumps).astype(np.float32)


def small(map, shape=(70, 98)):
    return torch.from_numpy(cv2.resize(map, shape[::-1], interpolation=cv2.INTER_AREA))


def with_own_scales(map, seed=1):
    """A network that predicts parts of a map with random scale and shift."""
    rng = np.random.default_rng(seed)

    def tile_at(box):
        scale, shift = rng.uniform(0.3, 3), rng.uniform(-1, 5)
        return torch.from_numpy(map[box] * np.float32(scale) + np.float32(shift))

    return tile_at


def seams(map, columns):
    """Ratio of the slope at tile ends and in overlaps to the mean slope: 1 without seams."""
    steps = np.abs(np.diff(map, axis=1)).mean(0)
    parts = tile_spans(map.shape[1], columns)
    ends = [end for a, b in itertools.pairwise(parts) for end in (b.start, a.stop)]
    shared = np.zeros(len(steps), bool)
    for a, b in itertools.pairwise(parts):
        shared[b.start : a.stop - 1] = True
    at_ends = np.mean([steps[end - 1] for end in ends])
    return float(max(at_ends, steps[shared].mean()) / steps.mean())


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (1, 4), (7, 3), (100, 1), (640, 2), (641, 3), (4320, 7)]
)
def test_tiles_cover_a_side_and_weights_sum_to_one(length, count):
    parts = tile_spans(length, count)
    assert len(parts) == count and parts[0].start == 0 and parts[-1].stop == length
    assert len({part.stop - part.start for part in parts}) == 1
    total = np.zeros(length)
    for part, window in zip(parts, blend_weights(length, parts), strict=True):
        assert window.dtype == np.float32 and window.min() >= 0
        total[part] += window
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_weights_fall_smoothly_to_zero_at_the_end_of_a_tile():
    parts = tile_spans(600, 3)
    first, middle, _ = blend_weights(600, parts)
    assert first[0] == 1 and first[-1] < 1e-3 and middle[0] < 1e-3 and middle[-1] < 1e-3
    assert np.abs(np.diff(middle)).max() < 0.03
    overlap = parts[0].stop - parts[1].start
    assert 0.3 < overlap / (parts[0].stop - parts[0].start) < 0.36


def test_scale_and_shift_align_a_tile():
    map = landscape(280, 392)
    box = (slice(100, 240), slice(50, 250))
    scale, shift = fit_scale_shift(torch.from_numpy(map[box] * 2 - 3), small(map), box, map.shape)
    assert scale == pytest.approx(0.5, rel=0.05) and shift == pytest.approx(1.5, abs=0.1)
    assert fit_scale_shift(torch.ones(20, 20), small(map), box, map.shape)[0] == 0


def test_tiles_of_any_scale_and_shift_blend_to_the_map():
    map = landscape(560, 784)
    joined = blend_tiles(small(map), with_own_scales(map), map.shape, (3, 4))
    assert joined.dtype == np.float32 and joined.shape == map.shape
    error = np.abs(joined - map).mean() / np.ptp(map)
    coarse = cv2.resize(small(map).numpy(), map.shape[::-1], interpolation=cv2.INTER_LINEAR)
    assert error < 0.02 and error < 0.6 * np.abs(coarse - map).mean() / np.ptp(map)  # the bumps are there
    assert seams(joined, 4) < 1.1


def test_the_seam_measure_detects_seams(monkeypatch):
    """Without alignment, or without blending, the measure is far from 1."""
    map = landscape(560, 784)
    joined = blend_tiles(small(map), with_own_scales(map), map.shape, (1, 4))
    monkeypatch.setattr(tiles, "_align_tile", lambda tile, *_: tile)
    apart = blend_tiles(small(map), with_own_scales(map), map.shape, (1, 4))
    monkeypatch.setattr(tiles, "_raised_cosine", np.ones_like)
    hard = blend_tiles(small(map), with_own_scales(map), map.shape, (1, 4))
    assert np.abs(apart - map).mean() > 10 * np.abs(joined - map).mean()
    assert seams(hard, 4) > 3 * seams(joined, 4)


def test_a_tile_that_contradicts_the_whole_image_is_ignored():
    map = landscape(280, 392)
    coarse = blend_tiles(small(map), lambda box: torch.from_numpy(-map[box]), map.shape, (2, 2))
    np.testing.assert_allclose(coarse, map, atol=0.5)
    flat = blend_tiles(small(map), lambda box: torch.ones(28, 28), map.shape, (2, 2))
    np.testing.assert_array_equal(flat, coarse)


def test_disparity_is_never_negative():
    map = landscape(280, 392) - 1.2
    assert map.min() < 0
    joined = blend_tiles(small(map.clip(0)), lambda box: torch.from_numpy(map[box]), map.shape, (2, 2))
    assert joined.min() == 0


def test_only_one_tile_is_in_memory():
    map, alive, most = landscape(280, 392), [], []

    def tile_at(box):
        tile = torch.from_numpy(map[box].copy())
        alive.append(tile)
        most.append(len(alive))
        alive.clear()
        return tile

    blend_tiles(small(map), tile_at, map.shape, (3, 3))
    assert max(most) == 1 and len(most) == 9


@pytest.mark.parametrize("count", [0, 65, (0, 2), (2, -1)])
def test_invalid_grids_are_refused(count):
    with pytest.raises(ValueError, match="1 to 64"):
        parse_grid(count)
    assert parse_grid(3) == (3, 3) and parse_grid((2, 5)) == (2, 5)


# With a network


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DepthAnything("vitn")


def picture(height, width):
    rng = np.random.default_rng(0)
    return cv2.resize(
        rng.integers(0, 256, (6, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )


@pytest.mark.parametrize("max_depth", [None, 20.0])
def test_tiled_prediction_has_no_seams(model, max_depth):
    if max_depth:
        torch.manual_seed(0)
        model = DepthAnything("vitn", max_depth=max_depth)
    image = picture(300, 400)
    tiled = Predictor(model, device="cpu", input_size=70, tiles=(2, 3)).predict(image)
    whole = Predictor(model, device="cpu", input_size=70).predict(image)
    assert tiled.shape == (300, 400) and tiled.dtype == np.float32
    assert seams(tiled, 3) < 1.4
    assert tiled.mean() == pytest.approx(whole.mean(), rel=0.05)
    if max_depth:
        assert 0 < tiled.min() and tiled.max() <= max_depth


def test_one_tile_equals_the_whole_image(model):
    image = picture(60, 80)
    whole = Predictor(model, device="cpu", input_size=70).predict(image)
    tiled = Predictor(model, device="cpu", input_size=70, tiles=1).predict(image)
    np.testing.assert_allclose(tiled, whole, atol=0.02 * np.ptp(whole))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 9)])
def test_images_smaller_than_the_grid(model, shape):
    tiled = Predictor(model, device="cpu", input_size=28, tiles=4).predict(picture(*shape))
    assert tiled.shape == shape and np.isfinite(tiled).all()
