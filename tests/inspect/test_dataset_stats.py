"""Statistics of a set: counted correctly and drawn for any content."""

import numpy as np
import pytest

from depth_anything.data.codec import encode
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.inspect.dataset_stats import compute_stats, draw_stats, format_stats
from depth_anything.inspect.histogram import ValueHistogram
from depth_anything.scenes.render import write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec

IMAGE = np.zeros((20, 30, 3), np.uint8)


def write_set(root, frames, meta=None):
    records = [(frame.key, encode_frame(frame, codec="f32")) for frame in frames]
    return write_manifest(root, name="mine", shards=[write_shard(root / "000.tar", records)], meta=meta or {})


def test_a_histogram_has_the_quantiles_of_numpy():
    rng = np.random.Generator(np.random.PCG64(1))
    maps = [np.exp(rng.normal(1, 1, (40, 50))).astype(np.float32) for _ in range(3)]
    maps[0][:4] = np.nan
    maps[1][:2] = np.inf
    histogram = ValueHistogram("depth")
    for values in maps:
        histogram.add(values)
    whole = np.concatenate([values[np.isfinite(values)] for values in maps])
    assert dict(histogram.pixels) == {"all": 6000, "valid": 5700, "sky": 100, "unknown": 200}
    assert (histogram.low, histogram.high, histogram.counts.sum()) == (whole.min(), whole.max(), 5700)
    for share in (0.01, 0.25, 0.5, 0.9, 0.99):
        assert histogram.quantile(share) == pytest.approx(np.quantile(whole, share), rel=0.04)
    assert histogram.share("sky") == pytest.approx(100 / 6000)


def test_disparity_is_scaled_to_the_range_of_each_map():
    histogram = ValueHistogram("disparity")
    for factor in (1, 1000):
        histogram.add(np.linspace(3, 7, 1000, dtype=np.float32).reshape(10, 100) * factor)
    histogram.add(np.full((10, 100), 5, np.float32))
    assert (histogram.counts[1:] == 20).all() and histogram.counts[0] == 20 + 1000
    histogram = ValueHistogram("disparity")
    assert np.isnan(histogram.quantile(0.5))


def test_values_outside_of_the_bins_are_counted_in_the_outer_ones():
    histogram = ValueHistogram("depth")
    histogram.add(np.array([[1e-9, 1e9, 1]], np.float32))
    assert histogram.counts.sum() == 3 and histogram.counts[0] == 1 and histogram.counts[-1] == 1


def test_statistics_of_a_labeled_set(tmp_path):
    depth = np.full((20, 30), 3, np.float32)
    depth[0], depth[1] = np.inf, np.nan
    frames = [Frame(f"mine/000/{i}", IMAGE, {"unit": "m"}, depth=depth * (i + 1)) for i in range(5)]
    shard_set = write_set(tmp_path, frames, {"licence": "MIT", "pixels": {"all": 10, "valid": 7, "zero": 3}})
    stats = compute_stats(shard_set, sample=100)
    text = "\n".join(format_stats(shard_set, stats))
    assert stats.records == 5 and stats.images == [(20, 30)] * 5
    assert "licence:    MIT" in text and "images:     30 x 20 (5)" in text
    assert "valid 90.0%, sky 5.0%, unknown 5.0% (of the sample)" in text
    assert "3 to 15 m:" in text and "50% below 9" in text
    assert "valid 70.0%, zero 30.0% (of the whole set" in text
    assert sum(stats.field_bytes.values()) == sum(stats.record_bytes) and set(stats.field_bytes) == {
        "image",
        "json",
        "depth",
    }
    assert draw_stats(shard_set, stats).shape[2] == 3


def test_the_sample_is_spread_over_all_shards(tmp_path):
    spec = SceneSetSpec(look="synthetic", count=9, seed=0, height=28, width=28)
    shard_set = write_scenes(tmp_path / "s", spec, per_shard=2)
    stats = compute_stats(shard_set, sample=5)
    assert stats.records == stats.histograms["depth"].maps == 5


def test_sets_of_images_only_and_of_labels_only(tmp_path):
    alone = write_set(tmp_path / "a", [Frame("mine/000/1", IMAGE, {})])
    stats = compute_stats(alone, sample=3)
    assert "labels:     none" in format_stats(alone, stats) and draw_stats(alone, stats).any()
    records = [("mine/000/1", {"disparity.q12": encode(np.eye(20, 30, dtype=np.float32), codec="q12")})]
    labels = write_manifest(
        tmp_path / "b", name="mine", shards=[write_shard(tmp_path / "b/000.tar", records)], meta={}
    )
    stats = compute_stats(labels, sample=3)
    text = "\n".join(format_stats(labels, stats))
    assert "images:     none" in text and "maps:       30 x 20 (1)" in text and "disparity:  0 to 1;" in text


def test_empty_and_constant_maps_are_drawn(tmp_path):
    frames = [
        Frame("mine/000/1", IMAGE, {}, depth=np.full((20, 30), np.nan, np.float32)),
        Frame("mine/000/2", IMAGE, {}, disparity=np.full((20, 30), 4, np.float32)),
    ]
    for number, frame in enumerate(frames):
        shard_set = write_set(tmp_path / str(number), [frame])
        stats = compute_stats(shard_set, sample=3)
        assert format_stats(shard_set, stats) and draw_stats(shard_set, stats).any()


def test_damaged_records_are_counted_and_named(tmp_path):
    frames = [Frame(f"mine/000/{i}", IMAGE, {}, depth=np.ones((20, 30), np.float32)) for i in range(3)]
    shard_set = write_set(tmp_path, frames)
    path = tmp_path / "000.tar"
    data = bytearray(path.read_bytes())
    data[data.find(b"\xff\xd8\xff") + 99] ^= 255
    path.write_bytes(bytes(data))
    stats = compute_stats(open_set(tmp_path), sample=3)
    assert stats.records == 2 and "mine/000[0]" in stats.bad[0]
    assert "unreadable: 1 of the sample, for example mine/000[0]" in "\n".join(format_stats(shard_set, stats))


def test_depth_in_another_unit_is_printed_with_it(tmp_path):
    frame = Frame("mine/000/1", IMAGE, {}, depth=np.full((20, 30), 4, np.float32))
    shard_set = write_set(tmp_path, [frame], {"unit": "arbitrary"})
    assert "depth:      4 to 4 arbitrary:" in "\n".join(
        format_stats(shard_set, compute_stats(shard_set, sample=3))
    )
