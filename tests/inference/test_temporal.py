"""Temporal stability: the color range, the smoothing, the two passes."""

import json
import math
import os
from functools import partial

import numpy as np
import pytest

from depth_anything.inference import temporal
from depth_anything.inference.temporal import MapCache, SmoothedRange, TemporalSmoother, percentile_range

av = pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")

from made_videos import (  # noqa: E402
    Brightness,
    make_video,
    predict_clip,
    read_video,
)

from depth_anything.inference import video  # noqa: E402
from depth_anything.inference.clips import VideoFile  # noqa: E402
from depth_anything.inference.video import VideoSettings, predict_videos  # noqa: E402

# Ranges


def swing(path):
    """Mean change of gray in the upper half, which is static in the input."""
    shown = np.stack([image[4:20].mean(axis=2) for _, image in read_video(path)])
    return np.abs(np.diff(shown, axis=0)).mean()


class Brightening(Brightness):
    """Static values, and one growing bright spot that sets each frame's range."""

    def predict_batch(self, images):
        maps = super().predict_batch(images)
        for image, map_ in zip(images, maps, strict=True):
            map_[-8:, -8:] = 10 + image[-1, 0, 0] / 4
        return maps


def test_one_range_does_not_flicker(tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=20, sound=None)
    swings = {}
    for mode in ("clip", "running", "frame"):
        predict_videos(
            Brightening(),
            source,
            tmp_path / mode,
            settings=VideoSettings(range=mode, pred_only=True, grayscale=True),
        )
        swings[mode] = swing(tmp_path / mode / "in.mp4")
    assert swings["clip"] < 0.3 * swings["frame"]
    assert swings["clip"] < swings["running"] < swings["frame"]


def test_the_range_of_a_clip_is_that_of_all_its_frames(tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=10, sound=None)
    predict_clip(source, tmp_path / "out")
    maps = [Brightness().predict_batch([picture.image])[0] for picture in VideoFile("in.mp4", source).read()]
    facts = json.loads((tmp_path / "out/in.json").read_text())
    assert facts["values"] == {"low": float(np.min(maps)), "high": float(np.max(maps))}
    wanted = [np.percentile(map_, (0.1, 99.9)) for map_ in maps]
    assert facts["colours"]["low"] == pytest.approx(min(low for low, _ in wanted), rel=1e-6)
    assert facts["colours"]["high"] == pytest.approx(max(high for _, high in wanted), rel=1e-6)


def test_a_running_range_widens_fast_and_narrows_slowly():
    running = SmoothedRange()
    assert running.update(0.0, 1.0, 0.0) == (0.0, 1.0)
    low, high = running.update(-1.0, 2.0, 0.1)
    assert (low, high) == pytest.approx((-(1 - math.exp(-1)), 2 - math.exp(-1)))
    low_then, high_then = running.update(0.0, 1.0, 0.1)
    assert high_then == pytest.approx(1 + (high - 1) * math.exp(-0.1 / 2)) and low_then > low


def test_outliers_do_not_set_the_color_range():
    map_ = np.zeros((100, 100), np.float32)
    map_[:50] = 1
    map_[7, 7] = 1000
    assert percentile_range(map_) == (0.0, 1.0)
    assert percentile_range(np.full((3, 3), 2.5, np.float32)) == (2.5, 2.5)


# Smoothing


def still_scene(seed=0, height=60, width=80):
    random = np.random.default_rng(seed)
    return random.integers(0, 255, (height, width, 3), np.uint8), random.random(
        (height, width), np.float32
    ) * 5


def test_varying_scale_and_shift_are_removed():
    image, scene = still_scene()
    random = np.random.default_rng(1)
    smoother = TemporalSmoother(0.5, align=True)
    maps = [random.uniform(0.8, 1.25) * scene + random.uniform(-0.5, 0.5) for _ in range(50)]
    smooth = [smoother(image, map_.astype(np.float32)) for map_ in maps]
    rough = np.mean([np.abs(b - a).mean() for a, b in zip(maps, maps[1:], strict=False)])
    left = np.mean([np.abs(b - a).mean() for a, b in zip(smooth, smooth[1:], strict=False)])
    assert left < 0.05 * rough


def test_noise_does_not_shrink_the_map_over_time():
    image, scene = still_scene()
    random = np.random.default_rng(2)
    smoother = TemporalSmoother(0.8, align=True)
    for _ in range(600):
        smooth = smoother(image, scene + random.normal(0, 0.5, scene.shape).astype(np.float32))
    assert 0.9 < smooth.std() / scene.std() < 1.1
    assert abs(float(smooth.mean() - scene.mean())) < 0.1


def test_meters_are_not_rescaled():
    image, scene = still_scene()
    smoother = TemporalSmoother(0.5, align=False)
    smoother(image, scene)
    np.testing.assert_allclose(smoother(image, 2 * scene), 1.5 * scene, rtol=1e-5)


def test_motion_is_not_smeared_and_a_cut_resets():
    image, scene = still_scene()
    smoother = TemporalSmoother(0.9, align=False)
    smoother(image, scene)
    moved, changed = image.copy(), scene.copy()
    moved[:, 50:] = 255 - moved[:, 50:] // 4
    changed[:, 50:] += 3
    smooth = smoother(moved, changed)
    assert np.abs(smooth - changed)[:, 55:].max() < 0.05
    other, far = still_scene(seed=9)
    assert np.array_equal(TemporalSmoother(0.9, align=True)(255 - other, far), far)
    assert np.array_equal(smoother(255 - (other // 2), far), far)


# Two passes


def test_the_cache_is_exact_and_limited(tmp_path):
    maps = np.random.default_rng(0).random((5, 7, 9), np.float32)
    with MapCache(tmp_path, (7, 9), max_bytes=3 * 7 * 9 * 4) as spool:
        assert [spool.append(map_) for map_ in maps] == [True, True, True, False, False]
        assert all(np.array_equal(spool.read(n), maps[n]) for n in (2, 0, 1))
        assert not [path for path in tmp_path.iterdir() if os.name == "posix"]


@pytest.mark.parametrize("smooth", [0.0, 0.6])
def test_maps_beyond_the_cache_are_predicted_again(tmp_path, monkeypatch, smooth):
    source = make_video(tmp_path / "in.mp4", frames=13, sound=None)
    for room in (0, 5, 100):
        monkeypatch.setattr(video, "MapCache", partial(temporal.MapCache, max_bytes=room * 48 * 64 * 4))
        predict_clip(source, tmp_path / str(room), smooth=smooth, formats=("png16",), batch_size=3)
    for path in (tmp_path / "100/in_disparity").iterdir():
        for room in (0, 5):
            assert (tmp_path / f"{room}/in_disparity" / path.name).read_bytes() == path.read_bytes()
