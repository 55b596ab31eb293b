"""The da2 protocol against numpy; sky, empty images and broken models."""

import dataclasses
import math

import numpy as np
import pytest

from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import BadRecord, write_shard
from depth_anything.evaluation.evaluate import METRICS, evaluate
from depth_anything.evaluation.frames import (
    MeanMap,
    compute_mean_map,
    evenly_spaced,
    max_depth_from_manifest,
    read_frames,
)
from depth_anything.evaluation.protocols import PROTOCOLS, EvalProtocol
from depth_anything.metrics import depth_metrics


class Remembered:
    """Predicts a given map for each image, recognized by its first pixel."""

    def __init__(self, maps, quantity="disparity"):
        self.maps, self.quantity, self.batches = maps, quantity, []

    def predict_batch(self, images):
        self.batches.append(len(images))
        return [self.maps[int(image[0, 0, 0])] for image in images]


def make_frame(number, depth):
    image = np.full((*depth.shape, 3), number, np.uint8)
    return Frame(f"set/0/{number}", image, {}, depth=depth.astype(np.float32))


def make_depth(seed, shape=(24, 32), sky=False):
    rng = np.random.default_rng(seed)
    depth = (1 + 9 * rng.random(shape)).astype(np.float32)
    if sky:
        depth[:6] = np.inf
        depth[10, :5] = np.nan
    return depth


def reference_da2(prediction, depth, max_depth=80.0):
    """Fit by numpy's own least squares, then AbsRel and the share within 1.25."""
    valid = np.isfinite(depth) & (depth > 1e-3) & (depth <= max_depth)
    x, y = prediction[valid].astype(np.float64), 1 / depth[valid].astype(np.float64)
    scale, shift = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
    aligned = np.maximum(scale * x + shift, 1 / max_depth)
    meters, truth = np.clip(1 / aligned, 1e-3, max_depth), depth[valid].astype(np.float64)
    ratio = np.maximum(meters / truth, truth / meters)
    return np.mean(np.abs(meters - truth) / truth), np.mean(ratio < 1.25), scale, shift


def test_da2_equals_numpy():
    rng = np.random.default_rng(5)
    depths = [make_depth(number, sky=number % 2 == 1) for number in range(5)]
    maps = [rng.random(depth.shape, dtype=np.float32) * 3 + 0.3 / depth.clip(max=99) for depth in depths]
    maps = [np.nan_to_num(map_, nan=1.0).astype(np.float32) for map_ in maps]
    result = evaluate(Remembered(maps), map(make_frame, range(5), depths), name="m")
    expected = [reference_da2(*pair) for pair in zip(maps, depths, strict=True)]
    for row, (abs_rel, d1, scale, shift) in zip(result.rows, expected, strict=True):
        assert row["abs_rel"] == pytest.approx(abs_rel, rel=1e-6)
        assert row["d1"] == pytest.approx(d1, abs=1e-9)
        assert (row["scale"], row["shift"]) == pytest.approx((scale, shift), rel=1e-5, abs=1e-7)
    assert result.means["abs_rel"] == pytest.approx(np.mean([e[0] for e in expected]), rel=1e-6)
    assert result.images == 5 and not result.empty and not result.non_finite


def test_an_affine_disparity_is_perfect():
    depth = make_depth(0, sky=True)
    prediction = np.where(np.isfinite(depth), 7 / depth + 3, 3).astype(np.float32)
    result = evaluate(Remembered([prediction]), [make_frame(0, depth)])
    assert result.means["abs_rel"] < 1e-5 and result.means["d1"] == 1


def test_negative_fitted_disparity_is_far_and_not_near():
    depth = np.linspace(1, 60, 400, dtype=np.float32).reshape(20, 20)
    prediction = (1 / depth).astype(np.float32)
    prediction[-1, -1] = -2.0  # the fit puts it below zero: 80 m, an error of a third; 1 mm would be one of 1
    row = evaluate(Remembered([prediction]), [make_frame(0, depth)]).rows[0]
    abs_rel, d1, _, _ = reference_da2(prediction, depth)
    assert row["abs_rel"] == pytest.approx(abs_rel, rel=1e-6) and row["d1"] == pytest.approx(d1)


def test_ground_truth_outside_of_the_range_is_not_compared():
    depth = make_depth(1)
    depth[0] = 500.0
    depth[1] = 0.0
    frames = [make_frame(0, depth)]
    prediction = 1 / depth.clip(min=0.1)
    assert evaluate(Remembered([prediction]), frames).rows[0]["valid"] == 22 * 32
    assert evaluate(Remembered([prediction]), frames, max_depth=1000.0).rows[0]["valid"] == 23 * 32


def test_depth_is_aligned_only_if_the_protocol_fits_it():
    depth = make_depth(2)
    model = Remembered([2 * depth], quantity="depth")
    frames = [make_frame(0, depth)]
    plain = evaluate(model, frames).rows[0]
    assert plain["abs_rel"] == pytest.approx(1.0, rel=1e-6) and plain["scale"] == 1 and plain["shift"] == 0
    both = dataclasses.replace(PROTOCOLS["da2"], name="fitted", fitted=("disparity", "depth"))
    fitted = evaluate(model, frames, protocol=both).rows[0]
    assert fitted["abs_rel"] < 1e-5 and fitted["scale"] == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match="'raw'"):
        evaluate(Remembered([depth]), frames, protocol=EvalProtocol("raw", fitted=()))


def test_depth_is_clipped():
    depth = np.full((4, 4), 60.0)
    model = Remembered([np.full((4, 4), 1e9, np.float32)], quantity="depth")
    assert evaluate(model, [make_frame(0, depth)]).means["abs_rel"] == pytest.approx(20 / 60)


def test_images_without_a_valid_pixel_are_named_and_left_out():
    sky = np.full((24, 32), np.inf)
    depths = [make_depth(0), sky, make_depth(1)]
    maps = [np.random.default_rng(i).random((24, 32), dtype=np.float32) for i in range(3)]
    result = evaluate(Remembered(maps), map(make_frame, range(3), depths))
    assert result.empty == ["set/0/1"] and result.images == 2
    assert math.isnan(result.rows[1]["abs_rel"]) and result.rows[1]["valid"] == 0
    assert result.means["d1"] == pytest.approx((result.rows[0]["d1"] + result.rows[2]["d1"]) / 2)


def test_nan_in_a_map_makes_the_mean_nan():
    maps = [np.full((24, 32), np.nan, np.float32), make_depth(3)]
    result = evaluate(Remembered(maps), [make_frame(0, make_depth(0)), make_frame(1, make_depth(1))])
    assert result.non_finite == ["set/0/0"] and math.isnan(result.means["abs_rel"])


def test_a_constant_map_has_finite_metrics():
    result = evaluate(Remembered([np.zeros((24, 32), np.float32)]), [make_frame(0, make_depth(0))])
    assert 0 < result.means["abs_rel"] < 2 and result.rows[0]["scale"] == 0


def test_frames_are_streamed_in_batches():
    alive = 0

    def frames():
        nonlocal alive
        for number in range(40):
            alive = max(alive, number - sum(model.batches))
            yield make_frame(number, make_depth(number))

    model = Remembered([make_depth(number) for number in range(40)])
    evaluate(model, frames(), batch_size=8)
    assert model.batches == [8] * 5 and alive <= 8


def test_a_smaller_map_is_resized_to_the_ground_truth():
    depth = np.tile(np.linspace(1, 10, 64, dtype=np.float32), (32, 1))
    small = 1 / depth[::2, ::2]
    assert evaluate(Remembered([small]), [make_frame(0, depth)]).means["abs_rel"] < 0.02


def test_frames_without_depth_and_unknown_protocols_are_refused():
    unlabeled = Frame("a/b/c", np.zeros((4, 4, 3), np.uint8), {})
    with pytest.raises(ValueError, match="'a/b/c'"):
        evaluate(Remembered([np.ones((4, 4), np.float32)]), [unlabeled])
    with pytest.raises(ValueError, match="'x'.*da2, marigold, moge, zoedepth"):
        evaluate(Remembered([]), [], protocol="x")


def test_tables_have_all_metrics():
    import torch

    one = torch.ones(1, 2, 2)
    assert set(METRICS) == set(depth_metrics(one, one, one > 0))


def test_the_mean_map_is_the_mean_of_each_frame_in_its_own_range():
    rng = np.random.default_rng(0)
    depths = [make_depth(0), 100 * make_depth(1)]
    depths[0][5, :] = np.inf
    depths[1][:, 9] = np.nan
    frames = [
        Frame(str(i), rng.integers(0, 255, (32, 32, 3), np.uint8), {}, depth=d) for i, d in enumerate(depths)
    ]
    for frame in frames:
        frame.depth = np.resize(frame.depth, (32, 32))
    units = []
    for frame in frames:
        disparity = np.where(np.isinf(frame.depth), 0, 1 / frame.depth)
        low, high = np.nanmin(disparity), np.nanmax(disparity)
        units.append((disparity - low) / (high - low))
    baseline = compute_mean_map(frames, size=32)
    np.testing.assert_allclose(baseline.map, np.nanmean(units, axis=0), atol=1e-6)
    assert baseline.quantity == "disparity" and baseline.map.dtype == np.float32
    shapes = [
        map_.shape for map_ in baseline.predict_batch([np.zeros((20, 50, 3), np.uint8), frames[0].image])
    ]
    assert shapes == [(20, 50), (32, 32)]


def test_the_mean_map_of_nothing_is_refused():
    with pytest.raises(ValueError):
        compute_mean_map([make_frame(0, np.full((4, 4), np.nan))])


def test_the_mean_map_has_no_holes():
    depth = make_depth(0, shape=(64, 64))
    depth[:32] = np.nan
    baseline = compute_mean_map([make_frame(0, depth)])
    assert np.isfinite(baseline.map).all()
    assert baseline.map[:30] == pytest.approx(baseline.map[33:].mean(), abs=0.01)


def test_the_mean_map_ignores_the_image():
    baseline = MeanMap(np.eye(3, dtype=np.float32))
    first, second = baseline.predict_batch([np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 200, np.uint8)])
    assert (first == second).all()


def test_spaced_numbers():
    assert evenly_spaced(5, None) == evenly_spaced(5, 5) == evenly_spaced(5, 99) == [0, 1, 2, 3, 4]
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="limit.*0"):
        evenly_spaced(10, 0)


@pytest.fixture
def shard_set(tmp_path):
    infos = []
    for shard, count in (("a", 4), ("b", 1), ("c", 5)):
        frames = [make_frame(number, make_depth(number)) for number in range(count)]
        records = [(f"toy/{shard}/{i}", encode_frame(frame, codec="f32")) for i, frame in enumerate(frames)]
        infos.append(write_shard(tmp_path / f"{shard}.tar", records))
    return write_manifest(tmp_path, name="toy", shards=infos, meta={"max_depth": 6.5})


def keys_of(frames):
    return [frame.key for frame in frames]


def test_frames_are_read_in_order_evenly_and_by_rank(shard_set):
    everything = [f"toy/{shard}/{i}" for shard, count in (("a", 4), ("b", 1), ("c", 5)) for i in range(count)]
    assert keys_of(read_frames(shard_set.root)) == keys_of(read_frames(shard_set)) == everything
    assert keys_of(read_frames(shard_set, limit=4)) == [everything[i] for i in (0, 2, 5, 7)]
    shares = [keys_of(read_frames(shard_set, limit=7, rank=rank, ranks=3)) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(keys_of(read_frames(shard_set, limit=7)))
    assert all(shares)


def test_frames_hold_depth(shard_set):
    for number, frame in zip(range(4), read_frames(shard_set), strict=False):
        np.testing.assert_array_equal(frame.depth, make_depth(number))
        assert abs(int(frame.image[0, 0, 0]) - number) < 3


def test_the_manifest_has_the_largest_depth_compared(shard_set):
    assert max_depth_from_manifest(shard_set) == 6.5
    assert max_depth_from_manifest(dataclasses.replace(shard_set, meta={})) == 80


def test_a_damaged_record_stops_the_evaluation_and_is_named(shard_set):
    broken = [("toy/d/0", {"jpg": b"\xff\xd8\xff no image", "json": b"{}"})]
    info = write_shard(f"{shard_set.root}/d.tar", broken)
    grown = write_manifest(shard_set.root, name="toy", shards=[*shard_set.shards, info], meta={})
    with pytest.raises(BadRecord, match=r"toy/d\[0\] toy/d/0: jpg"):
        list(read_frames(grown))
