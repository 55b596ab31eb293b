"""Focal lengths of records, under resizing, and targets of a canonical camera."""

import json
from pathlib import Path

import numpy as np
import pytest

from depth_anything.data.codec import decode
from depth_anything.data.dataset import StreamDataset, to_canonical_depth
from depth_anything.data.intrinsics import focal_from_meta, resize_focal
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.data.transforms import crop_map, draw_crop
from depth_anything.ingest.sets import hypersim
from depth_anything.ingest.source import resize_intrinsics
from depth_anything.preprocess import resize_shape

HYPERSIM = np.diag([np.tan(np.pi / 6), 0.75 * np.tan(np.pi / 6), -1])


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"intrinsics": {"fx": 500.0, "fy": 320.0, "cx": 1, "cy": 2}}, 400.0),
        ({"intrinsics": {"fx": 480}}, 480.0),
        ({"intrinsics": [[0.5, 0, 0.5], [0, 2, 0.5], [0, 0, 1]]}, np.sqrt(0.5 * 640 * 2 * 480)),
        ({"M_cam_from_uv": HYPERSIM.tolist()}, 320 / np.tan(np.pi / 6)),
        ({"M_cam_from_uv": (-3 * HYPERSIM).tolist()}, 320 / np.tan(np.pi / 6)),
        ({}, None),
        ({"intrinsics": None}, None),
        ({"intrinsics": {}}, None),
        ({"intrinsics": {"fx": -5, "fy": 5}}, None),
        ({"intrinsics": {"fx": float("nan")}}, None),
        ({"intrinsics": {"fx": "wide"}}, None),
        ({"intrinsics": [1, 2]}, None),
        ({"intrinsics": "525"}, None),
        ({"M_cam_from_uv": np.zeros((3, 3)).tolist()}, None),
    ],
)
def test_focal_lengths_of_metadata(meta, expected):
    assert focal_from_meta(meta, (480, 640, 3)) == (expected and pytest.approx(expected, rel=1e-12))


def test_hypersim_matrix_agrees_with_the_intrinsics_of_the_reader():
    shifted = HYPERSIM.copy()
    shifted[0, 2], shifted[1, 2] = 0.1, -0.2  # the principal point is off the center
    known = hypersim._pixel_intrinsics(shifted, 768, 1024)
    assert known
    matrix_only = focal_from_meta({"M_cam_from_uv": shifted.tolist()}, (768, 1024))
    assert matrix_only == pytest.approx(focal_from_meta(known, (768, 1024)), rel=1e-9)


def test_a_tilted_camera_has_the_focal_length_of_its_center():
    tilted = HYPERSIM.copy()
    tilted[2, 1] = 0.2  # z changes along v, as for a tilted lens
    # Pixels per unit of the plane at depth 1, by finite differences around the center.
    step = 1e-5
    rays = [tilted @ [u, v, 1] for u, v in [(step, 0), (-step, 0), (0, step), (0, -step)]]
    plane = [ray[:2] / ray[2] for ray in rays]
    across, down = (plane[0] - plane[1]) / (2 * step), (plane[2] - plane[3]) / (2 * step)
    area = abs(across[0] * down[1] - across[1] * down[0])
    expected = np.sqrt(1024 / 2 * 768 / 2 / area)
    found = focal_from_meta({"M_cam_from_uv": tilted.tolist()}, (768, 1024))
    assert found == pytest.approx(expected, rel=1e-6)


def test_resizing_a_focal_length_agrees_with_resizing_intrinsics():
    camera = {"fx": 300.0, "fy": 310.0, "cx": 70.0, "cy": 50.0}
    before, after = (112, 144), resize_shape(112, 144, 70)
    smaller = resize_intrinsics(camera, before, after)
    expected = np.sqrt(smaller["fx"] * smaller["fy"])
    focal = focal_from_meta({"intrinsics": camera}, before)
    assert resize_focal(focal, before, after) == pytest.approx(expected, rel=1e-12)


def test_canonical_depth_of_a_doubled_focal_length_is_half():
    draw = np.random.default_rng(0)
    depth = draw.uniform(0.5, 60, (9, 7)).astype(np.float32)
    results = []
    for focal in (40.0, 80.0):
        target, valid = depth.copy(), depth > 1
        to_canonical_depth(target, valid, focal=focal, canonical_focal=50.0, highest=80.0)
        expected = depth * np.float32(50.0 / focal)
        kept = (depth > 1) & (expected <= 80)
        assert (valid == kept).all() and not target[~kept].any()
        np.testing.assert_array_equal(target[kept], expected[kept])
        results.append((target, valid))
    both = results[0][1] & results[1][1]
    np.testing.assert_array_equal(results[0][0][both], 2 * results[1][0][both])
    assert not results[0][1].all()  # 60 m · 50 / 40 is beyond what the network can say


# --- the dataset ---------------------------------------------------------------------------------------------------

FOCALS = (60.0, 120.0, None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("cameras") / "cameras"
    records = []
    for i, focal in enumerate(FOCALS):
        draw = np.random.default_rng(i)
        image = draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        depth = draw.uniform(1, 30, (40, 60)).astype(np.float32)
        meta = {"unit": "m", **({"intrinsics": {"fx": focal, "fy": focal}} if focal else {})}
        records.append((f"cameras/0/{i}", encode_frame(Frame("", image, meta, depth=depth), codec="f32")))
    meta = {"quantity": "depth", "unit": "m"}
    return write_manifest(root, name="cameras", shards=[write_shard(root / "0.tar", records)], meta=meta)


def dataset(shards, **changes):
    given = {"seed": 3, "streams": 1, "image_size": 28, "sky": "invalid", "depth_range": (0.001, 80.0)}
    return StreamDataset([Records(shards)], **{**given, **changes})


def written(data, index, n):
    arrays = data.empty_batch(1)
    data.write_sample("cameras/0", index, n, arrays)
    return arrays


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("short_side", [28, 42])
def test_targets_follow_the_focal_length_after_the_resize_whatever_the_crop(shards, index, short_side):
    plain = dataset(shards, short_side=short_side)
    canonical = dataset(shards, short_side=short_side, canonical_focal=50.0)
    height, width = resize_shape(40, 60, short_side)
    _, fields = Records(shards).read("cameras/0", index)
    depth = decode(fields["depth.f32"])
    focal = np.sqrt((FOCALS[index] * height / 40) * (FOCALS[index] * width / 60))
    for n in range(4):  # crops and flips at random
        expected = crop_map(depth, draw_crop(height, width, 28, seed=3, n=n)) * np.float32(50.0 / focal)
        arrays = written(canonical, index, n)
        np.testing.assert_allclose(arrays["target"][0], np.where(expected <= 80, expected, 0), rtol=1e-6)
        before = written(plain, index, n)
        assert before["image"].tobytes() == arrays["image"].tobytes()


def test_without_the_option_records_need_no_intrinsics(shards):
    assert written(dataset(shards), 2, 0)["valid"].any()


def test_a_record_without_intrinsics_is_replaced_and_named(shards):
    data = dataset(shards, canonical_focal=50.0)
    batch = data.__getitems__([0, 1, 2])
    assert len(batch["failed"]) == 1 and "cameras/0/2" in batch["failed"][0]
    assert "intrinsics" in batch["failed"][0] and batch["valid"].flatten(1).any(1).all()


def test_replayed_disparity_is_not_scaled(shards):
    plain = dataset(shards, relative=["cameras"])
    canonical = dataset(shards, relative=["cameras"], canonical_focal=50.0)
    for index in range(3):  # also without intrinsics
        for name, values in written(plain, index, 0).items():
            assert values.tobytes() == written(canonical, index, 0)[name].tobytes() or name == "sample"


def test_a_real_camera_of_hypersim():
    """One of the tilted and shifted cameras; a level one of that lens has 886.81 px."""
    path = Path(__file__).parents[3] / "shared" / "rgbd" / "hypersim_ai_037_002_camera.json"
    if not path.exists():
        pytest.skip("the camera file is not here")
    camera = json.loads(path.read_text())
    matrix = [[float(camera[f"M_cam_from_uv_{i}{j}"]) for j in range(3)] for i in range(3)]
    assert focal_from_meta({"M_cam_from_uv": matrix}, (768, 1024)) == pytest.approx(886.81, rel=1e-3)
