import json
import os
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest
from made_raw import CANONICAL, TILTED, frames_of, hdf5, hypersim_rays, make_hypersim

from depth_anything.ingest.maps import read_hdf5
from depth_anything.ingest.sets import hypersim

RGBD = Path(os.environ.get("DEPTH_ANYTHING_RGBD", Path(__file__).parents[4] / "shared" / "rgbd"))


def test_distance_becomes_planar_depth_with_the_camera_of_the_scene(tmp_path):
    truth = make_hypersim(tmp_path)
    found = frames_of(hypersim, tmp_path, split="all")
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        np.testing.assert_allclose(frame.depth, truth[name], rtol=2e-7)  # of a float32
        wall = frame.depth[:8]
        assert np.nanmax(np.abs(wall - 5)) < 5 * 2**-10  # a plane, but for the float16 that was stored
        assert np.isnan(frame.depth[2, 3:5]).all() and np.isnan(frame.depth).sum() == 2
        assert "sky" not in frame.meta and frame.meta["unit"] == "m"


def test_an_untilted_camera_gives_the_usual_formula():
    distance = np.ones((768, 1024))
    x, y = np.meshgrid(np.arange(1024) + 0.5 - 512, np.arange(768) + 0.5 - 384)
    focal = 512 / np.tan(np.pi / 6)
    assert focal == pytest.approx(886.81, abs=0.01)
    expected = focal / np.sqrt(x**2 + y**2 + focal**2)
    depth = hypersim.planar_depth(distance, CANONICAL)
    np.testing.assert_allclose(depth, expected, rtol=2e-7)
    assert depth[0, 0] == pytest.approx(0.811, abs=5e-4)
    tilted = hypersim.planar_depth(distance, TILTED)
    assert 0.02 < np.abs(tilted / expected - 1).max() < 0.1  # why the constant will not do


def test_intrinsics_match_the_rays():
    shifted = TILTED.copy()
    shifted[2] = [0, 0, -1]
    found = hypersim._pixel_intrinsics(shifted, 768, 1024)["intrinsics"]
    for row, column in ((0, 0), (100, 900), (767, 1023)):
        u, v = (column + 0.5) / 512 - 1, 1 - (row + 0.5) / 384
        x, y, z = shifted @ [u, v, 1]
        assert found["fx"] * x / -z + found["cx"] == pytest.approx(column, abs=1e-9)
        assert found["fy"] * y / z + found["cy"] == pytest.approx(row, abs=1e-9)
    assert hypersim._pixel_intrinsics(TILTED, 768, 1024) == {}  # a tilted one has no such numbers
    for factor in (1.0000000003832106, 0.9999999992490941, 1.013301778214287, 250.0):
        assert hypersim._pixel_intrinsics(shifted * factor, 768, 1024)["intrinsics"] == pytest.approx(found)
    nearly = shifted + 4e-7 * np.array([[0, 1, 0], [1, 0, 0], [1, -1, 0]])  # as far as numbers are rounded
    assert hypersim._pixel_intrinsics(nearly, 768, 1024)["intrinsics"] == pytest.approx(found)
    for place in ((0, 1), (1, 0), (2, 0), (2, 1)):
        turned = shifted.copy()
        turned[place] = 4e-5
        assert hypersim._pixel_intrinsics(turned, 768, 1024) == {}
    for wrong in (-shifted, shifted * 0, shifted * [[1], [-1], [1]], shifted * np.nan):
        assert hypersim._pixel_intrinsics(wrong, 768, 1024) == {}
    canonical = hypersim._pixel_intrinsics(CANONICAL, 768, 1024)["intrinsics"]
    assert canonical["cx"] == 511.5 and canonical["cy"] == 383.5
    assert canonical["fx"] == pytest.approx(886.81, abs=0.01) == canonical["fy"]


def test_the_camera_matrix_is_stored_in_the_record(tmp_path):
    make_hypersim(tmp_path)
    frame = frames_of(hypersim, tmp_path)["ai_037_002/cam_00/frame.0000"]
    assert frame.meta["M_cam_from_uv"] == TILTED.tolist()


def test_splits_follow_the_published_table(tmp_path):
    make_hypersim(tmp_path)
    names = {
        s: [line.partition("\t")[0] for line in hypersim.find(tmp_path, split=s)] for s in ("train", "val")
    }
    assert names["train"] == ["ai_001_001/cam_00/frame.0000", "ai_037_002/cam_00/frame.0000"]
    assert names["val"] == ["ai_001_001/cam_00/frame.0007", "ai_037_002/cam_00/frame.0007"]
    assert [*hypersim.find(tmp_path)] == [*hypersim.find(tmp_path, split="train")]
    with pytest.raises(ValueError, match="split test"):
        list(hypersim.find(tmp_path, split="test"))
    with pytest.raises(ValueError, match="split=trian .*train, val, test, all"):
        list(hypersim.find(tmp_path, split="trian"))
    (tmp_path / "metadata_images_split_scene_v1.csv").unlink()
    with pytest.raises(ValueError, match="metadata_images_split_scene_v1.csv.*--split all"):
        list(hypersim.find(tmp_path))
    assert len(list(hypersim.find(tmp_path, split="all"))) == 4


def test_the_camera_table_is_searched_or_given(tmp_path):
    make_hypersim(tmp_path / "evermotion_dataset" / "scenes")
    table = tmp_path / "evermotion_dataset" / "scenes" / "metadata_camera_parameters.csv"
    above = tmp_path / "contrib" / "mikeroberts3000" / table.name
    above.parent.mkdir(parents=True)
    table.rename(above)
    scenes = [line.partition("\t")[0] for line in hypersim.find(tmp_path)]
    assert scenes == ["ai_001_001/cam_00/frame.0000", "ai_037_002/cam_00/frame.0000"]
    with pytest.raises(ValueError, match="metadata_camera_parameters.csv.*--cameras FILE"):
        list(hypersim.find(above.parents[2] / "evermotion_dataset"))
    named = [*hypersim.find(tmp_path / "evermotion_dataset", cameras=above)]
    assert [line.partition("\t")[0] for line in named] == scenes
    with pytest.raises(ValueError, match="scene_name, M_cam"):
        other = tmp_path / "other.csv"
        other.write_text("a,b\n1,2\n")
        list(hypersim.find(tmp_path, cameras=other))


def test_tables_behind_a_link_are_found_and_link_loops_end(tmp_path):
    make_hypersim(tmp_path / "disk")
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "hypersim").symlink_to(tmp_path / "disk")
    assert [*hypersim.find(raw)] == [
        line.replace("\tai_", "\thypersim/ai_") for line in hypersim.find(tmp_path / "disk")
    ]
    (tmp_path / "disk" / "metadata_camera_parameters.csv").unlink()
    (tmp_path / "disk" / "circle").symlink_to(raw)
    with pytest.raises(ValueError, match="metadata_camera_parameters.csv"):
        [*hypersim.find(raw)]


def test_a_single_scene_is_named_after_its_folder(tmp_path):
    make_hypersim(tmp_path)
    table = tmp_path / "metadata_camera_parameters.csv"
    lines = [*hypersim.find(tmp_path / "ai_037_002", cameras=table, split="train")]
    assert [line.partition("\t")[0] for line in lines] == ["ai_037_002/cam_00/frame.0000"]


def test_a_scene_without_a_row_in_the_table_is_rejected(tmp_path):
    make_hypersim(tmp_path)
    table = tmp_path / "metadata_camera_parameters.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))
    found = frames_of(hypersim, tmp_path)
    assert found["ai_037_002/cam_00/frame.0000"] == (
        "the camera of scene ai_037_002 is not in metadata_camera_parameters.csv"
    )
    assert found["ai_001_001/cam_00/frame.0000"].depth is not None


def test_an_incomplete_row_counts_as_missing(tmp_path):
    make_hypersim(tmp_path)
    table = tmp_path / "metadata_camera_parameters.csv"
    table.write_text(table.read_text().replace("-1.003909173803896", "nan"))
    assert "ai_037_002" in frames_of(hypersim, tmp_path)["ai_037_002/cam_00/frame.0000"]


def test_a_damaged_table_is_an_error(tmp_path):
    make_hypersim(tmp_path)
    with pytest.raises(ValueError, match="nowhere.csv .*No such file"):
        list(hypersim.find(tmp_path, cameras=tmp_path / "nowhere.csv"))
    table = tmp_path / "metadata_camera_parameters.csv"
    table.write_text(table.read_text() + 'ai_999_999,"' + "x" * 200_000)
    with pytest.raises(ValueError, match="field larger"):
        list(hypersim.find(tmp_path))
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="scene_name"):
        list(hypersim.find(tmp_path))


def test_a_camera_matrix_of_zeros_gives_no_valid_pixel(tmp_path):
    make_hypersim(tmp_path, scenes={"ai_001_001": CANONICAL})
    table = tmp_path / "metadata_camera_parameters.csv"
    head, row = table.read_text().splitlines()
    table.write_text(head + "\n" + ",".join([*row.split(",")[:2], *["0"] * 9]) + "\n")
    reasons = frames_of(hypersim, tmp_path)["ai_001_001/cam_00/frame.0000"]
    assert reasons == "no pixel of its label is valid: 1728 nan"


def test_the_preview_is_stored_unchanged(tmp_path):
    make_hypersim(tmp_path)
    for line in hypersim.find(tmp_path):
        image = line.split("\t")[1]
        assert image.endswith(".tonemap.jpg")
        assert hypersim.read(tmp_path, line).image == (tmp_path / image).read_bytes()


def their_tone_map(color, entities, path):
    """As scene_generate_images_tonemap.py describes itself, saved by matplotlib as there."""
    color = color.astype(np.float32)
    weights = np.array([0.3, 0.59, 0.11])
    level = np.percentile((color * weights).sum(-1)[entities != -1], 90)
    exposed = np.maximum(color * (0.8**2.2 / level), 0) ** (1 / 2.2)
    matplotlib.image.imsave(path, np.clip(exposed, 0, 1))
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.uint8)


def test_hdr_images_are_tone_mapped_as_by_the_authors(tmp_path):
    make_hypersim(tmp_path)
    for name, frame in frames_of(hypersim, tmp_path, images="hdr").items():
        scene, camera, number = name.split("/")
        images = tmp_path / scene / "images"
        with h5py.File(images / f"scene_{camera}_final_hdf5" / f"{number}.color.hdf5") as file:
            color = file["dataset"][()]
        entities = read_hdf5(images / f"scene_{camera}_geometry_hdf5" / f"{number}.render_entity_id.hdf5")
        theirs = their_tone_map(color, entities, tmp_path / "theirs.png")
        assert np.abs(frame.image.astype(int) - theirs).max() <= 1  # float32 against float64 at a step
        assert (frame.image == theirs).mean() > 0.99
        assert frame.image[5, 5].tolist() == [255, 255, 255] and frame.image[6, 6].tolist() == [0, 0, 0]


def test_tone_mapping_of_nan_infinite_and_dark_pixels():
    bright = np.full((4, 4, 3), 7, np.float16)
    everywhere = np.ones((4, 4), bool)
    assert np.unique(hypersim.tone_map(bright, everywhere)).tolist() == [204]  # 0.8
    assert np.unique(hypersim.tone_map(bright, ~everywhere)).tolist() == [255]  # nothing to go by
    assert not hypersim.tone_map(
        bright.astype(np.float32) / 1e5, everywhere
    ).any()  # too dark to be brightened
    bright[0, 0], bright[1, 1], bright[2, 2] = np.nan, np.inf, -1
    mapped = hypersim.tone_map(bright, everywhere)
    assert mapped[0, 0, 0] == 0 and mapped[1, 1, 0] == 255 and mapped[2, 2, 0] == 0 and mapped[3, 3, 0] == 204


@pytest.mark.parametrize("lack", ["color", "render_entity_id", "depth_meters"])
def test_hdr_with_a_missing_file_is_rejected(tmp_path, lack):
    make_hypersim(tmp_path)
    next((tmp_path / "ai_001_001").rglob(f"frame.0000.{lack}.hdf5")).unlink()
    reasons = frames_of(hypersim, tmp_path, images="hdr")["ai_001_001/cam_00/frame.0000"]
    what = {"color": "image", "render_entity_id": "segmentation", "depth_meters": "depth"}[lack]
    assert isinstance(reasons, str) and reasons.startswith(f"its {what} ")


@pytest.mark.parametrize(
    "values", [np.ones((36, 48)), np.ones((36, 48, 4)), np.ones((36, 48, 3), np.uint8), np.ones((18, 48, 3))]
)
def test_color_of_another_shape_is_rejected(tmp_path, values):
    make_hypersim(tmp_path)
    hdf5(next((tmp_path / "ai_001_001").rglob("frame.0000.color.hdf5")), values)
    assert isinstance(frames_of(hypersim, tmp_path, images="hdr")["ai_001_001/cam_00/frame.0000"], str)


def plane(depth, camera, rows, columns):
    """Fit a plane to the points of a part of a depth map; return its normal and the RMS distance in meters."""
    rays = hypersim_rays(camera, depth.shape)[rows, columns]
    points = (rays / -rays[..., 2:] * depth[rows, columns, None])[::3, ::3].reshape(-1, 3)
    _, spread, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
    return axes[2], spread[2] / np.sqrt(len(points))


@pytest.mark.skipif(not RGBD.is_dir(), reason="the real frame is not here")
def test_a_real_frame_has_a_flat_floor_and_vertical_walls_with_its_own_camera_only():
    (path,) = RGBD.glob("hypersim_ai_037_002*depth_meters.hdf5")
    facts = json.loads(next(RGBD.glob("hypersim_*camera.json")).read_text())
    own = np.array([[float(facts[f"M_cam_from_uv_{r}{c}"]) for c in range(3)] for r in range(3)])
    np.testing.assert_array_equal(own, TILTED)
    distance = read_hdf5(path, "dataset")
    assert distance.shape == (768, 1024) and distance.dtype == np.float16
    reasons = []
    for camera in (own, CANONICAL):
        depth = hypersim.planar_depth(distance, camera)
        floor, bumps = plane(depth, camera, slice(700, 768), slice(0, 1024))
        wall, _ = plane(depth, camera, slice(290, 480), slice(0, 110))
        reasons.append((bumps, 90 - np.degrees(np.arccos(abs(floor @ wall)))))
    (flat, upright), (bent, leaning) = reasons
    assert flat < 0.0005 < 0.0015 < bent  # metres, at 2.8 m
    assert upright < 0.4 < 1 < leaning  # degrees
