"""Booster, DDAD and iBims-1: true file formats, known answers, damaged files."""

import json
import re
import shutil

import benchmark_files as made
import benchmark_files_booster_ddad_ibims as more
import numpy as np
import pytest
from made_raw import SIZE, picture, png, room

from depth_anything.evaluation.benchmarks.benchmark import MaskedFrame, read_label_image
from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
from depth_anything.evaluation.benchmarks.booster import read_calibration
from depth_anything.evaluation.benchmarks.ddad import (
    _pose_matrix,
    project_points,
    read_intrinsics,
    read_points,
)
from depth_anything.evaluation.evaluate import evaluate
from depth_anything.evaluation.predictions import PrecomputedMaps
from depth_anything.evaluation.protocols import find_protocol
from depth_anything.evaluation.runner import task_from_benchmark


def check(frames, truth, **tolerance):
    assert set(frames) == set(truth)
    for key, depth in truth.items():
        assert frames[key].depth.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(frames[key].depth), np.isnan(depth), err_msg=key)
        np.testing.assert_allclose(frames[key].depth, depth.astype(np.float32), err_msg=key, **tolerance)


def first(name, root):
    """A benchmark and the line of its first frame."""
    return load_benchmark(name), next(iter(load_benchmark(name).find(root)))


@pytest.mark.parametrize("below", ["", "train", "train/balanced"])
def test_booster(tmp_path, below):
    truth, _ = more.make_booster(tmp_path)
    frames = made.read_all(load_benchmark("booster"), tmp_path / below)
    check(frames, truth, rtol=0)
    assert not any(isinstance(frame, MaskedFrame) for frame in frames.values())
    blue, red = made.blue_and_red(frames["Bathroom/im0"])
    assert red > blue * 1.5 and red > 80  # the left camera's picture, in RGB


def test_booster_tom_evaluates_glass_and_mirrors_only(tmp_path):
    truth, tom = more.make_booster(tmp_path / "booster")  # found below the folder of all benchmarks
    frames = made.read_all(load_benchmark("booster_tom"), tmp_path)
    check(frames, truth, rtol=0)
    for key, part in tom.items():
        np.testing.assert_array_equal(frames[key].eval_mask, part)
    trial = task_from_benchmark(load_benchmark("booster_tom"), tmp_path / "booster")
    assert trial.incomplete.startswith("only 4 of 228 images")

    class Far:
        quantity = "depth"

        def predict_batch(self, images):
            return [np.full(image.shape[:2], 4.0, np.float32) for image in images]

    result = evaluate(Far(), map(trial.read, trial.lines), protocol=trial.protocol)
    known = tom["Bathroom/im0"] & (truth["Bathroom/im0"] <= 10)
    depth = truth["Bathroom/im0"][known]
    assert result.rows[0]["valid"] == known.sum() > 200
    assert result.rows[0]["abs_rel"] == pytest.approx(np.mean(np.abs(depth - 4) / depth), rel=1e-6)
    assert result.empty == ["booster/Mirror/im0"] and result.images == 3  # a scene without any is left out


def test_missing_booster_files_are_named(tmp_path):
    more.make_booster(tmp_path)
    scene = tmp_path / "train/balanced/Bathroom"
    benchmark, line = first("booster_tom", tmp_path)
    png(scene / "mask_cat.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match="booster/Bathroom/im0: "):
        benchmark.read(tmp_path, line)
    png(scene / "mask_cat.png", picture(room()))
    with pytest.raises(ValueError, match=r"mask_cat\.png: .*8 bits"):
        benchmark.read(tmp_path, line)
    (scene / "mask_cat.png").unlink()
    with pytest.raises(ValueError, match=r"booster/Bathroom/im0: mask_cat\.png: No such file"):
        benchmark.read(tmp_path, line)
    assert load_benchmark("booster").read(tmp_path, line).depth.shape == SIZE  # which needs no materials
    (scene / "disp_00.npy").write_bytes((scene / "disp_00.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"booster/Bathroom/im0: the NPY"):
        benchmark.read(tmp_path, line)
    shutil.rmtree(tmp_path / "train/balanced")
    with pytest.raises(ValueError, match="Booster.*http"):
        list(benchmark.find(tmp_path))


def test_boosters_calibration(tmp_path):
    path = tmp_path / "calib_00-02.xml"
    more.make_calibration(path)
    data = path.read_bytes()
    assert read_calibration(data) == (1500.0, 0.08)  # of the rectified image, not of the camera's own
    for damaged in (data[:-20], b"", data.replace(b"baselineLR", b"base"), data.replace(b"proj_matL", b"P")):
        with pytest.raises(ValueError, match="proj_matL.*baselineLR"):
            read_calibration(damaged)
    with pytest.raises(ValueError, match="1500 .*-0.08 m"):
        read_calibration(data.replace(b"<baselineLR>", b"<baselineLR>-"))


@pytest.mark.parametrize("below", ["", "ibims1_core_raw"])
def test_ibims(tmp_path, below):
    truth = more.make_ibims(tmp_path)
    frames = made.read_all(load_benchmark("ibims"), tmp_path / below)
    check(frames, truth, rtol=0)
    assert np.isnan(frames["corridor_01"].depth).sum() == 7 + 18 + 2 * SIZE[1]


def test_missing_ibims_files_are_named(tmp_path):
    more.make_ibims(tmp_path)
    benchmark, line = first("ibims", tmp_path)
    mask = tmp_path / "ibims1_core_raw/mask_transp/corridor_01.png"
    png(mask, np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match="ibims/corridor_01: .*masks"):
        benchmark.read(tmp_path, line)
    mask.write_bytes(mask.read_bytes()[:40])
    with pytest.raises(ValueError, match="ibims/corridor_01: the image"):
        benchmark.read(tmp_path, line)
    mask.unlink()
    with pytest.raises(ValueError, match="mask of transparent pixels.*mask_transp"):
        benchmark.read(tmp_path, next(iter(benchmark.find(tmp_path))))
    assert find_protocol("zoedepth", benchmark=benchmark).eval_crop == "eigen_nyu"


def test_masks_of_one_bit_and_classes_of_eight_are_read_as_they_are(tmp_path):
    path = tmp_path / "mask.png"
    classes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    png(path, classes)
    np.testing.assert_array_equal(read_label_image(path.read_bytes()), classes)
    png(path, classes.astype(np.uint16))
    with pytest.raises(ValueError, match="8 bits"):
        read_label_image(path.read_bytes())


@pytest.mark.parametrize("below", ["", "ddad_train_val"])
def test_ddad(tmp_path, below):
    """Points in two forms, poses of two times, farther points and those behind: each pixel's nearest."""
    truth = more.make_ddad(tmp_path)
    frames = made.read_all(load_benchmark("ddad"), tmp_path / below)
    assert list(frames) == list(truth)  # the validation split in its order
    check(frames, truth, rtol=1e-6)
    blue, red = made.blue_and_red(next(iter(frames.values())))
    assert red > blue * 1.5 and red > 80
    assert max(np.nanmax(depth) for depth in truth.values()) > 100


def test_projected_depth_is_that_of_the_nearest_point_in_view():
    camera = np.array([[10.0, 0, 2], [0, 10, 1], [0, 0, 1]])
    points = np.array(
        [
            [0.05, 0.05, 1],
            [0.1, 0.1, 2],
            [-0.21, 0, 1],
            [-0.31, 0, 1],
            [0.05, 0.05, -1],
            [0, 0, 0],
            [0.15, 0.2, 1],
        ]
    )
    for order in (points, points[::-1]):
        depth = project_points(order, camera, size=(3, 4))
        # Cut off towards zero, as dgp: column -0.1 is 0, column -1.1 is out; row 3 is out.
        assert depth.tolist() == [[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_a_pose_of_the_test_scene_of_dgp():
    """The car's pose and its camera's differ by what the calibration says: tests/data/dgp/test_scene of TRI-ML/dgp."""

    def pose(quaternion, place):
        rotation = dict(zip(("qw", "qx", "qy", "qz"), quaternion, strict=True))
        return _pose_matrix({"rotation": rotation, "translation": dict(zip("xyz", place, strict=True))})

    lidar = pose((0.2854539, -0.0045405, -0.0075921, 0.9583516), (400.859369, -259.6111708, 12.4990004))
    camera = pose((0.6131109, -0.6216371, -0.3486726, 0.3407194), (399.324935, -258.9284766, 13.8422181))
    mounted = pose((0.5070133, -0.5062291, 0.4993248, -0.4871800), (1.6520093, 0.2450428, 1.3548472))
    np.testing.assert_allclose(np.linalg.inv(lidar) @ camera, mounted, atol=2e-6)
    with pytest.raises(ValueError, match="quaternion"):
        _pose_matrix({"translation": {"x": 1}})


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_missing_ddad_files_are_named(tmp_path):
    more.make_ddad(tmp_path)
    benchmark, line = first("ddad", tmp_path)
    scene = tmp_path / "ddad_train_val/000150"
    cloud = next((scene / "point_cloud/LIDAR").iterdir())
    for path, what in (
        (scene / "calibration/c0e1.json", r"ddad/000150/.*/calibration/c0e1\.json: No such file"),
        (cloud, r"ddad/000150/.*\.npz: No such file"),
        (next((scene / "rgb/CAMERA_01").iterdir()), r"ddad/000150/.*rgb/CAMERA_01/.*: No such file"),
    ):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=what):
            for line in benchmark.find(tmp_path):
                benchmark.read(tmp_path, line)
        path.write_bytes(data)
    index = tmp_path / "ddad_train_val/ddad.json"
    shutil.rmtree(scene)
    assert len(list(benchmark.find(tmp_path))) == 2  # those of the other scene
    edit(index, lambda content: content["scene_splits"]["1"].update(filenames=["../scene.json"]))
    with pytest.raises(ValueError, match=r"ddad\.json"):
        list(benchmark.find(tmp_path))
    edit(index, lambda content: content["scene_splits"]["1"].update(filenames=["000150/scene.json"]))
    with pytest.raises(ValueError, match="DDAD.*http"):
        list(benchmark.find(tmp_path))


def test_ddads_damaged_scenes_and_samples_without_a_sensor(tmp_path):
    more.make_ddad(tmp_path, scenes=("000150",))
    benchmark, _ = first("ddad", tmp_path)
    (scene,) = (tmp_path / "ddad_train_val/000150").glob("scene_*.json")

    def without_lidar(content):
        del content["samples"][0]["datum_keys"][0]

    edit(scene, without_lidar)
    with pytest.raises(ValueError, match="ddad/000150/.*: .*LIDAR"):
        benchmark.read(tmp_path, next(iter(benchmark.find(tmp_path))))
    lines = list(benchmark.find(tmp_path))
    assert len(lines) == 2 and np.isfinite(benchmark.read(tmp_path, lines[1]).depth).any()

    def turned(content):
        content["data"][2]["datum"]["image"]["pose"]["rotation"]["qw"] = 2.0

    edit(scene, turned)
    with pytest.raises(ValueError, match=r"scene_0+\.json .*quaternion"):
        list(benchmark.find(tmp_path))
    scene.write_text("{}")
    with pytest.raises(ValueError, match="'data'"):
        list(benchmark.find(tmp_path))


def test_ddad_paths_outside_of_the_folder_are_refused(tmp_path):
    more.make_ddad(tmp_path, scenes=("000150",))
    (scene,) = (tmp_path / "ddad_train_val/000150").glob("scene_*.json")

    def outwards(content):
        content["data"][0]["datum"]["point_cloud"]["filename"] = "../../../elsewhere.npz"

    edit(scene, outwards)
    benchmark, line = first("ddad", tmp_path)
    with pytest.raises(ValueError, match="\\.\\./"):
        benchmark.read(tmp_path, line)


def test_damaged_ddad_clouds_and_calibrations_are_refused(tmp_path):
    def saved(**arrays):
        np.savez(tmp_path / "cloud.npz", **arrays)
        return (tmp_path / "cloud.npz").read_bytes()

    good = saved(data=np.array([[1, 2, 3, 9], [np.nan, 0, 0, 9]]))
    np.testing.assert_array_equal(read_points(good), [[1, 2, 3]])
    objects = saved(data=np.array([None, {}]))
    for damaged in (good[:60], b"", saved(points=np.zeros((2, 3))), saved(data=np.zeros(9)), objects):
        with pytest.raises(ValueError, match="point cloud"):
            read_points(damaged)
    for text in ("[]", "{", '{"names": ["LIDAR"], "intrinsics": [{}]}'):
        with pytest.raises(ValueError, match="CAMERA_01"):
            read_intrinsics(text.encode())
    with pytest.raises(ValueError, match="0 and 0"):
        read_intrinsics(b'{"names": ["camera_01"], "intrinsics": [{"fx": 0}]}')


@pytest.mark.parametrize(
    ("name", "make", "wanted"),
    [
        ("ddad", more.make_ddad, "15621787630031470.npy"),
        ("ibims", more.make_ibims, "corridor_01.npy"),
        ("booster_tom", more.make_booster, "im0.npy"),
    ],
)
def test_precomputed_maps_are_found_by_key_and_image(tmp_path, name, make, wanted):
    make(tmp_path / name)
    trial = task_from_benchmark(load_benchmark(name), tmp_path)
    frame = trial.read(trial.lines[0])
    for place in (f"{frame.key}.npy", wanted):
        maps = tmp_path / "maps" / place.replace("/", "_")
        (maps / place).parent.mkdir(parents=True)
        np.save(maps / place, np.full(SIZE, 4, np.float32))
        assert (PrecomputedMaps(maps, quantity="depth").load_map(frame) == 4).all()
    (tmp_path / "none").mkdir()
    np.save(tmp_path / "none/0.npy", np.ones(SIZE))
    with pytest.raises(ValueError, match=re.escape(f"{frame.key}.npy")):
        PrecomputedMaps(tmp_path / "none", quantity="depth").load_map(frame)
