"""Public benchmarks: each read from its real file format to the last bit; missing files are named."""

import os
import pickle
import shutil
from pathlib import Path

import benchmark_files as made
import numpy as np
import pytest
from made_raw import jpeg, picture, png, room
from PIL import Image

from depth_anything.evaluation.benchmarks import nyu as nyu_module
from depth_anything.evaluation.benchmarks.benchmark_catalog import BENCHMARKS, load_benchmark
from depth_anything.evaluation.benchmarks.kitti import EIGEN_FRAMES, frame_numbers
from depth_anything.evaluation.runner import task_from_benchmark

RGBD = Path(os.environ.get("DEPTH_ANYTHING_RGBD", Path(__file__).parents[3] / "shared" / "rgbd"))


def check(name, root, truth):
    """All of the truth, nothing else, to the last bit of float32; NaN where it is not known."""
    frames = made.read_all(load_benchmark(name), root)
    assert set(frames) == set(truth)
    for key, depth in truth.items():
        assert frames[key].depth.dtype == np.float32
        np.testing.assert_array_equal(frames[key].depth, depth.astype(np.float32), err_msg=key)
    return frames


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_facts_and_can_be_pickled(name):
    benchmark = load_benchmark(name)
    assert benchmark.name == name and (benchmark.images > 0 or name in ("moge_spring", "moge_hammer"))
    assert benchmark.title and benchmark.layout and benchmark.get.startswith("http") and benchmark.licence
    assert all(
        0 <= depth_limits.min_depth < depth_limits.max_depth
        for depth_limits in benchmark.depth_limits.values()
    )
    assert pickle.loads(pickle.dumps(benchmark)).find
    assert benchmark.protocol in (*benchmark.depth_limits, name)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_benchmark_names_where_to_get_it(name, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "none")):
        list(load_benchmark(name).find(tmp_path / "none"))
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(ValueError, match="http"):
        list(load_benchmark(name).find(tmp_path))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'kitty'.*kitti, nyu"):
        load_benchmark("kitty")


@pytest.mark.parametrize("apart", [True, False])
def test_kitti_in_one_tree_or_two(tmp_path, apart):
    frames = check("kitti", tmp_path, made.make_kitti(tmp_path, apart=apart))
    blue, red = made.blue_and_red(next(iter(frames.values())))
    assert red > blue * 1.5  # of the left camera's picture, in RGB
    assert list(frames) == sorted(frames)


def test_kitti_holds_652_frames_of_28_drives():
    assert len(EIGEN_FRAMES) == 28
    numbers = {drive: frame_numbers(drive) for drive in EIGEN_FRAMES}
    assert sum(len(set(found)) for found in numbers.values()) == 652
    assert all(found == sorted(found) for found in numbers.values())
    assert sum(len(found) for drive, found in numbers.items() if drive.startswith("2011_09_26")) == 487
    assert numbers["2011_09_26_drive_0013_sync"][:4] == [5, 10, 20, 30]
    assert numbers["2011_10_03_drive_0027_sync"][-1] == 4535
    assert frame_numbers("2011_09_26_drive_0001_sync") == []


def test_a_part_of_a_benchmark_is_marked_incomplete(tmp_path):
    made.make_kitti(tmp_path)
    trial = task_from_benchmark(load_benchmark("kitti"), tmp_path)
    assert trial.incomplete.startswith("only 2 of 652 images") and trial.facts["images"] == "2 of 652"
    made.make_nyu_matlab(tmp_path / "nyu")
    trial = task_from_benchmark(load_benchmark("nyu"), tmp_path)
    assert trial.incomplete == "" and len(trial.lines) == 654


def test_kitti_without_a_frame_of_the_list_and_a_frame_without_its_image(tmp_path):
    truth = made.make_kitti(tmp_path)
    name = next(iter(truth))
    drive, number = name.split("/")
    (tmp_path / "raw" / drive[:10] / drive / f"image_02/data/{number}.png").unlink()
    line = next(iter(load_benchmark("kitti").find(tmp_path)))
    with pytest.raises(ValueError, match=r"kitti/2011_09_26_drive_0002_sync/0000000069: .*image"):
        load_benchmark("kitti").read(tmp_path, line)
    for drive, _ in made.KITTI_FRAMES:
        for folder in tmp_path.rglob(drive):
            shutil.rmtree(folder)
    with pytest.raises(ValueError, match="652.*http"):
        list(load_benchmark("kitti").find(tmp_path))


@pytest.mark.skipif(not RGBD.is_dir(), reason="needs the real frames of ../shared/rgbd")
def test_the_real_frame_of_kitti(tmp_path):
    drive, number = made.KITTI_FRAMES[0]
    image = tmp_path / drive[:10] / drive / f"image_02/data/{number:010d}.png"
    depth = tmp_path / drive / f"proj_depth/groundtruth/image_02/{number:010d}.png"
    for path, source in ((image, "rgb"), (depth, "depth")):
        path.parent.mkdir(parents=True)
        shutil.copy(RGBD / f"kitti_demo_{source}_0000000050.png", path)
    (frame,) = made.read_all(load_benchmark("kitti"), tmp_path).values()
    known = np.isfinite(frame.depth)
    stored = made.crop_png16(depth, frame.depth.shape)
    assert 0.1 < known.mean() < 0.3 and np.array_equal(known, stored > 0)
    assert 3 < frame.depth[known].min() < 8 and 60 < frame.depth[known].max() < 90
    bottom, middle = (np.nanmedian(frame.depth[rows]) for rows in (slice(-40, None), slice(170, 210)))
    assert bottom < 12 < middle  # the road in front, and far objects


def test_nyu_in_the_original_matlab_file(tmp_path):
    raw, filled = made.make_nyu_matlab(tmp_path)
    for name, truth in (("nyu", raw), ("nyu_filled", filled)):
        benchmark = load_benchmark(name)
        lines = {line.partition("\t")[0]: line for line in benchmark.find(tmp_path)}
        assert len(lines) == 654 and set(truth) <= set(lines)
        for key, depth in truth.items():
            frame = benchmark.read(tmp_path, lines[key])
            np.testing.assert_array_equal(frame.depth, depth.astype(np.float32))
            np.testing.assert_array_equal(
                frame.image, picture(made.nyu_depths(int(key) % 7)[1], seed=int(key))
            )
    nyu_module._open_matlab.cache_clear()


def test_nyu_as_bts_extracts_it(tmp_path):
    frames = check("nyu", tmp_path, made.make_nyu_bts(tmp_path))
    assert all(np.isnan(frame.depth).sum() == 15 for frame in frames.values())
    with pytest.raises(ValueError, match=r"filled_0046\.png or 00046\.h5"):
        list(load_benchmark("nyu_filled").find(tmp_path))


def test_nyu_as_marigold_extracts_it(tmp_path):
    raw, filled = made.make_nyu_marigold(tmp_path)
    check("nyu", tmp_path, raw)
    check("nyu_filled", tmp_path, filled)
    folder = tmp_path / "test/bathroom_0001"
    shutil.copy(folder / "depth_0046.png", folder / "filled_0046.png")  # as its download has it
    with pytest.raises(ValueError, match=r"filled_0046\.png\).* nyu$"):
        made.read_all(load_benchmark("nyu_filled"), tmp_path)


def test_marigold_is_defined_on_the_measured_depth_only():
    assert "marigold" in load_benchmark("nyu").depth_limits and list(
        load_benchmark("nyu_filled").depth_limits
    ) == ["da2"]


def test_nyu_with_one_file_per_frame(tmp_path):
    frames = check("nyu_filled", tmp_path, made.make_nyu_h5(tmp_path))
    blue, red = made.blue_and_red(frames["00045"])
    assert red != blue
    path = tmp_path / "val/official/00001.h5"
    path.write_bytes(path.read_bytes()[:700])
    benchmark = load_benchmark("nyu_filled")
    with pytest.raises(ValueError, match=r"00001\.h5"):
        benchmark.read(tmp_path, next(iter(benchmark.find(tmp_path))))


def test_nyu_holds_the_654_frames_of_the_split():
    frames = nyu_module.eigen_test_frames()
    assert len(frames) == len(set(frames)) == 654 and list(frames) == sorted(frames)
    assert frames[:6] == (0, 1, 8, 13, 14, 15) and frames[-1] == 1448 and 44 not in frames and 45 in frames


@pytest.mark.skipif(not RGBD.is_dir(), reason="needs the real frames of ../shared/rgbd")
def test_the_real_frame_of_nyu(tmp_path):
    folder = tmp_path / "test/office"
    folder.mkdir(parents=True)
    shutil.copy(RGBD / "nyu_demo_rgb_rgb_00050.jpg", folder / "rgb_00055.jpg")
    shutil.copy(RGBD / "nyu_demo_depth_sync_depth_00050.png", folder / "sync_depth_00055.png")
    (frame,) = made.read_all(load_benchmark("nyu"), tmp_path).values()
    known = np.isfinite(frame.depth)
    assert frame.depth.shape == (480, 640) and known.mean() > 0.7
    assert (
        0.4 < frame.depth[known].min()
        and 1 < np.median(frame.depth[known]) < 5
        and frame.depth[known].max() <= 10
    )


def test_eth3d(tmp_path):
    frames = check("eth3d", tmp_path, made.make_eth3d(tmp_path))
    assert frames["office/DSC_0219"].image.mean() > 50  # not the darker undistorted one
    path = tmp_path / "office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG"
    path.write_bytes(path.read_bytes()[:-4])
    benchmark = load_benchmark("eth3d")
    with pytest.raises(ValueError, match=r"eth3d/office/DSC_0219: .*6908 .*6912"):
        benchmark.read(tmp_path, next(iter(benchmark.find(tmp_path))))


def test_a_single_eth3d_scene_and_a_rotated_camera(tmp_path):
    truth = made.make_eth3d(tmp_path)
    scene = tmp_path / "office"
    shutil.move(tmp_path / "office_dslr_depth/office/ground_truth_depth", scene)
    path = scene / "images/dslr_images/DSC_0219.JPG"
    picture_ = Image.open(path)
    exif = picture_.getexif()
    exif[0x0112] = 6  # a quarter turn; the depth's rows are the sensor's all the same
    picture_.save(path, exif=exif)
    frames = made.read_all(load_benchmark("eth3d"), scene)
    assert list(frames) == ["DSC_0219", "DSC_0220"]
    np.testing.assert_array_equal(frames["DSC_0219"].depth, truth["office/DSC_0219"].astype(np.float32))
    assert frames["DSC_0219"].image.shape[:2] == truth["office/DSC_0219"].shape


def test_diode_indoor_and_outdoor(tmp_path):
    truth = made.make_diode(tmp_path)

    def last(frames):
        return {key.rpartition("/")[2]: frame.depth for key, frame in frames.items()}

    for name, part in (("diode", ""), ("diode_indoor", "indoors"), ("diode_outdoor", "outdoor")):
        found = last(made.read_all(load_benchmark(name), tmp_path))
        wanted = {key: depth for key, depth in truth.items() if part in key}
        assert set(found) == set(wanted) and len(wanted) == (1 if part else 2)
        for key, depth in wanted.items():
            np.testing.assert_array_equal(found[key], depth.astype(np.float32))
            assert np.isnan(found[key]).sum() == 3
    mask = next(tmp_path.glob("val/indoors/*/*/*_mask.npy"))
    mask.unlink()
    with pytest.raises(ValueError, match=r"mask.*\*_depth_mask\.npy.*scan_\*$"):
        made.read_all(load_benchmark("diode_indoor"), tmp_path)
    shutil.rmtree(tmp_path / "val/outdoor")
    with pytest.raises(ValueError, match="outdoor.*http"):
        list(load_benchmark("diode_outdoor").find(tmp_path))


@pytest.mark.parametrize("render", ["final", "clean"])
def test_sintel(tmp_path, render):
    name = "sintel" if render == "final" else "sintel_clean"
    check(name, tmp_path, made.make_sintel(tmp_path, render=render))
    check(name, tmp_path / "training", made.make_sintel(tmp_path, render=render))
    other = "sintel_clean" if render == "final" else "sintel"
    with pytest.raises(ValueError, match="clean pass|final pass"):
        list(load_benchmark(other).find(tmp_path))


def test_a_damaged_sintel_depth_is_refused(tmp_path):
    made.make_sintel(tmp_path)
    path = tmp_path / "training/depth/alley_1/frame_0001.dpt"
    benchmark, data = load_benchmark("sintel"), path.read_bytes()
    line = next(iter(benchmark.find(tmp_path)))
    for damaged in (
        data[:-1],
        data + b"\0",
        b"PIEG" + data[4:],
        data[:5],
        data[:4] + b"\xff" * 8 + data[12:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="sintel/final/alley_1/frame_0001: "):
            benchmark.read(tmp_path, line)


def test_scannet_reads_its_list_and_keeps_the_depths_size(tmp_path):
    frames = check("scannet", tmp_path, made.make_scannet(tmp_path))
    assert list(frames) == ["scene0406_02/000300", "scene0406_02/000000"]
    assert frames["scene0406_02/000300"].image.shape[:2] == (72, 96)
    (tmp_path / "scene0406_02/depth/000300.png").unlink()
    with pytest.raises(
        ValueError, match=r"scannet/scene0406_02/000300: scene0406_02/depth/000300\.png: No such file"
    ):
        load_benchmark("scannet").read(tmp_path, next(iter(load_benchmark("scannet").find(tmp_path))))
    (tmp_path / "scannet_val_sampled_list_800_1.txt").write_text("one\n")
    with pytest.raises(ValueError, match="line 1"):
        list(load_benchmark("scannet").find(tmp_path))


def test_benchmarks_of_the_same_files_are_found_below_the_folder_of_all(tmp_path):
    made.make_nyu_marigold(tmp_path / "nyu")
    made.make_diode(tmp_path / "diode")
    made.make_sintel(tmp_path / "sintel", render="clean")
    for name, count in (("nyu_filled", 2), ("diode_outdoor", 1), ("sintel_clean", 4)):
        assert len(made.read_all(load_benchmark(name), tmp_path)) == count


def test_an_image_of_another_size_is_refused(tmp_path):
    made.make_nyu_bts(tmp_path)
    jpeg(tmp_path / "official_splits/test/bathroom/rgb_00045.jpg", picture(room((20, 30))))
    benchmark = load_benchmark("nyu")
    with pytest.raises(ValueError, match="30 x 20 .*48 x 36"):
        benchmark.read(tmp_path, next(iter(benchmark.find(tmp_path))))
    png(tmp_path / "official_splits/test/bathroom/sync_depth_00045.png", picture(room())[..., 0])
    with pytest.raises(ValueError, match=r"sync_depth_00045\.png\): .* 8 bits"):
        benchmark.read(tmp_path, next(iter(benchmark.find(tmp_path))))
