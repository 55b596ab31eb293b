"""Degraded depth equals a hand computation for each fault, and a degraded copy keeps everything but the depth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depth_anything.cli import main
from depth_anything.data.reader import Records
from depth_anything.data.sample import IMAGE_FIELDS, decode_record
from depth_anything.data.shards import open_set
from depth_anything.data.tars import ShardError
from depth_anything.errors import UserError
from depth_anything.ingest.degrade import DegradedSource, DepthSensor, degrade, write_degraded
from depth_anything.scenes.render import write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec

SCENES = SceneSetSpec(look="synthetic", count=3, seed=5, height=28, width=42)
PERFECT = {"cell": 1, "disparity_step": 1e-12, "noise": 0.0, "base": 0.0, "hole_share": 0.0, "max_depth": 1e4}


def sensor(**faults: float) -> DepthSensor:
    return DepthSensor(**{**PERFECT, **faults})  # type: ignore[arg-type]


def test_a_perfect_sensor_changes_nothing() -> None:
    depth = np.random.default_rng(0).uniform(1, 50, (9, 13)).astype(np.float32)
    before = depth.copy()
    np.testing.assert_allclose(degrade(depth, seed=1, sensor=sensor()), depth, rtol=1e-6)
    np.testing.assert_array_equal(depth, before)


def test_a_cell_has_the_mean_of_its_known_pixels_also_at_the_border() -> None:
    depth = np.array([[2, 4, 6, 6, 8], [2, np.nan, 6, np.inf, 8], [1, 1, np.nan, np.nan, 3]], np.float32)
    expected = np.array([[8 / 3, 8 / 3, 6, 6, 8], [8 / 3, 8 / 3, 6, 6, 8], [1, 1, np.nan, np.nan, 3]])
    np.testing.assert_allclose(degrade(depth, seed=0, sensor=sensor(cell=2)), expected, rtol=1e-6)


def test_far_points_and_the_sky_have_no_depth() -> None:
    depth = np.array([[5.0, 79.0, 81.0, np.inf, np.nan, 0.0, -1.0]])
    known = np.isfinite(degrade(depth, seed=0, sensor=sensor(max_depth=80)))
    assert known.tolist() == [[True, True, False, False, False, False, False]]


def test_disparity_is_quantized_and_the_error_grows_with_the_square_of_the_distance() -> None:
    depth = np.linspace(1, 10, 500)[None]
    step = 0.02
    measured = degrade(depth, seed=0, sensor=sensor(disparity_step=step)).astype(np.float64)
    np.testing.assert_allclose(1 / measured, np.round(1 / depth / step) * step, rtol=1e-5)
    error = np.abs(measured - depth)[0]
    assert error[depth[0] < 2].max() < 2**2 * step / 2 * 1.05 < error[depth[0] > 8].max()


def test_noise_is_that_of_disparity_in_steps() -> None:
    depth = np.full((200, 200), 2.0)
    steps = 1 / degrade(depth, seed=3, sensor=sensor(disparity_step=0.001, noise=4)) / 0.001
    assert steps.mean() == pytest.approx(500, abs=0.1) and steps.std() == pytest.approx(4, abs=0.1)


def test_the_background_left_of_a_near_object_is_hidden_from_the_projector() -> None:
    """Base 0.5 m at a width of 8: 4 px / depth. The shift is 1 px at 4 m and 4 px at 1 m, so 3 columns are hidden."""
    depth = np.full((2, 8), 4.0)
    depth[:, 5:7] = 1.0
    known = np.isfinite(degrade(depth, seed=0, sensor=sensor(base=0.5)))
    assert known[0].tolist() == [True, True, False, False, False, True, True, True]


def test_holes_cover_the_share_of_the_area_and_depend_on_the_seed() -> None:
    depth = np.full((90, 120), 3.0)
    holes = [np.isnan(degrade(depth, seed=seed, sensor=sensor(hole_share=0.2))) for seed in (1, 1, 2)]
    assert holes[0].mean() == pytest.approx(0.2, abs=0.01)
    assert (holes[0] == holes[1]).all() and (holes[0] != holes[2]).any()
    edges = (holes[0][:, 1:] != holes[0][:, :-1]).mean()
    assert edges < 0.1  # blobs; single pixels would have 0.32


@pytest.mark.parametrize("depth", [np.ones(3), np.ones((0, 4)), np.ones((2, 2), np.uint16)])
def test_what_is_no_depth_map_is_refused(depth: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        degrade(depth, seed=0)


@pytest.mark.parametrize("wrong", [{"cell": 0}, {"disparity_step": 0.0}, {"hole_share": 1.0}, {"noise": -1}])
def test_an_impossible_sensor_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        DepthSensor(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("sets") / "exact"
    write_scenes(root, SCENES, per_shard=2)
    return str(root)


def test_a_degraded_copy_has_the_same_images_and_degraded_depth(scenes: str, tmp_path: Path) -> None:
    assert main(["shard", "degraded", scenes, str(tmp_path / "copy"), "--seed", "4"]) == 0
    exact, copy = Records(open_set(scenes)), Records(open_set(str(tmp_path / "copy")))
    assert copy.set.meta["sky_policy"] == "invalid" and not copy.set.meta.get("sharp")
    assert copy.set.meta["licence"] == exact.set.meta["licence"]
    pairs = [exact.read(shard, index) for shard, count in exact.shards for index in range(count)]
    for number, (key, fields) in enumerate(pairs):
        _, copied = copy.read("copy/00000", number)
        name = next(name for name in IMAGE_FIELDS if name in fields)
        assert copied[name] == fields[name]
        before, after = decode_record(key, fields), decode_record("", copied)
        assert before.depth is not None and after.depth is not None
        np.testing.assert_array_equal(after.depth, degrade(before.depth, seed=40_000_000_000 + number))
        assert after.meta["intrinsics"] == before.meta["intrinsics"]
        shard, _, index = key.rpartition("/")
        assert after.meta["name"] == f"{shard}/{int(index) % 2}"  # two records a shard
    digest = copy.set.digest
    assert write_degraded(scenes, tmp_path / "copy", seed=4).digest == digest
    with pytest.raises(ShardError):
        write_degraded(scenes, tmp_path / "copy", seed=5)


def test_a_set_without_meters_is_refused(tmp_path: Path) -> None:
    write_scenes(tmp_path / "images", replace(SCENES, count=1, labelled=False))
    with pytest.raises(UserError, match="quantity=None"):
        write_degraded(str(tmp_path / "images"), tmp_path / "copy")


def test_scenes_are_written_with_degraded_depth(scenes: str, tmp_path: Path) -> None:
    poor = Records(write_scenes(tmp_path / "poor", replace(SCENES, degraded=True)))
    exact = Records(open_set(scenes))
    before, after = (decode_record(*records.read(f"{records.name}/00000", 1)) for records in (exact, poor))
    np.testing.assert_array_equal(before.image, after.image)
    assert before.depth is not None and after.depth is not None
    np.testing.assert_array_equal(after.depth, degrade(before.depth, seed=50_000_001))
    assert poor.set.meta["sky_policy"] == "invalid" and not poor.set.meta.get("sharp")


def test_a_source_names_the_set_in_its_settings(scenes: str) -> None:
    shard_set = open_set(scenes)
    source = DegradedSource(Records(shard_set), 0, DepthSensor(), None)  # type: ignore[arg-type]
    assert source.settings["of"] == shard_set.digest and source.settings["sensor"]["cell"] == 4
    assert [line.partition("\t")[0] for line in source.find(Path())] == [
        "exact/00000/0", "exact/00000/1", "exact/00001/0",
    ]  # fmt: skip
