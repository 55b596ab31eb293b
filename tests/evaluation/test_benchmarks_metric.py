"""SUN RGB-D, Hypersim and Virtual KITTI 2 read from their files, and ZoeDepth's limits on each set."""

import shutil

import benchmark_files_metric as made
import numpy as np
import pytest
from benchmark_files import read_all
from made_raw import TILTED, hypersim_rays, png

from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
from depth_anything.evaluation.evaluate import evaluate
from depth_anything.evaluation.protocols import CROPS, find_protocol
from depth_anything.evaluation.runner import MissingData, task_from_benchmark

# Set, then min_depth_eval, max_depth_eval, do_kb_crop, garg_crop, eigen_crop of DATASETS_CONFIG in
# zoedepth/utils/config.py: the same in isl-org/ZoeDepth and in metric_depth/ of Depth Anything V1.
ZOEDEPTH = (
    ("kitti", 1e-3, 80, True, True, False),
    ("nyu", 1e-3, 10, False, False, True),
    ("sunrgbd", 0, 8, False, False, True),
    ("sunrgbd_filled", 0, 8, False, False, True),
    ("sunrgbd_v1", 0, 8, False, False, True),
    ("diode_indoor", 1e-3, 10, False, False, True),
    ("diode_outdoor", 1e-3, 80, False, True, False),
    ("hypersim", 1e-3, 80, False, False, True),
    ("vkitti2", 1e-3, 80, True, True, False),
)
SIZES = {"kitti": (352, 1216), "nyu": (480, 640), "vkitti2": (352, 1216), "sunrgbd": (427, 561)}


def check(name, root, truth):
    """All of the truth in its order, nothing else, to the last bit of float32."""
    frames = read_all(load_benchmark(name), root)
    assert list(frames) == list(truth)
    for key, depth in truth.items():
        assert frames[key].depth.dtype == np.float32 and frames[key].key == f"{name}/{key}"
        np.testing.assert_array_equal(frames[key].depth, depth.astype(np.float32), err_msg=key)
    return frames


@pytest.mark.parametrize(("name", "low", "high", "kb", "garg", "eigen"), ZOEDEPTH)
def test_zoedepth_has_the_limits_of_its_code(name, low, high, kb, garg, eigen):
    rules = find_protocol("zoedepth", benchmark=load_benchmark(name))
    assert (rules.min_depth, rules.max_depth, rules.view_crop == "kb") == (low, high, kb)
    assert rules.flip and rules.open_interval and not rules.fitted
    height, width = SIZES.get(name.split("_")[0], (768, 1024))
    compared = np.zeros((height, width), bool)
    if garg:
        compared[
            int(0.40810811 * height) : int(0.99189189 * height),
            int(0.03594771 * width) : int(0.96405229 * width),
        ] = True
    elif eigen:  # counted in pixels, whatever the size
        compared[45:471, 41:601] = True
    ours = np.zeros_like(compared)
    ours[CROPS[rules.eval_crop](height, width)] = True
    np.testing.assert_array_equal(ours, compared)


@pytest.mark.parametrize("inside", [True, False])
def test_sunrgbd_measured_and_filled(tmp_path, inside):
    measured, filled = made.make_sunrgbd(tmp_path / "sunrgbd", inside=inside)
    for root in (tmp_path, tmp_path / "sunrgbd"):
        frames = check("sunrgbd", root, measured)
        assert np.isnan(frames[made.SUN_TEST[0]].depth).sum() == 12
        check("sunrgbd_filled", root, filled)


def test_sunrgbd_by_the_other_list_and_in_part(tmp_path):
    measured, _ = made.make_sunrgbd(tmp_path)
    path = tmp_path / "sunrgbd_testing_images.txt"
    pairs = [f"{line} {line.replace('image', 'depth')[:-3]}png" for line in path.read_text().splitlines()]
    path.unlink()
    with pytest.raises(MissingData, match=r"sunrgbd_testing_images\.txt.*github\.com/ankurhanda"):
        task_from_benchmark(load_benchmark("sunrgbd"), tmp_path)
    (tmp_path / "SUNRGBD_val_splits.txt").write_text("\n".join(pairs))
    shutil.rmtree(tmp_path / "SUNRGBD/kv1")
    check("sunrgbd", tmp_path, {name: depth for name, depth in measured.items() if "kv1" not in name})
    assert task_from_benchmark(load_benchmark("sunrgbd"), tmp_path).incomplete.startswith("only 3 of 5050")


def test_sunrgbd_names_missing_and_damaged_files(tmp_path):
    made.make_sunrgbd(tmp_path)
    benchmark, folder = load_benchmark("sunrgbd"), tmp_path / "SUNRGBD" / made.SUN_TEST[0]
    path = tmp_path / "sunrgbd_testing_images.txt"
    line = next(iter(benchmark.find(tmp_path)))
    png(folder / "depth/0000000.png", np.zeros((36, 48), np.uint8))
    with pytest.raises(ValueError, match=f"sunrgbd/{made.SUN_TEST[0]}: .* 8 bits"):
        benchmark.read(tmp_path, line)
    for stems, gone in ((["a", "b"], "0000000"), (["a"], "b"), ([], "a")):
        for stem in stems:
            png(folder / f"depth/{stem}.png", np.ones((36, 48), np.uint16))
        (folder / f"depth/{gone}.png").unlink()
        line = next(iter(benchmark.find(tmp_path)))
        if stems == ["a"]:  # the only one, whatever its name
            assert np.isfinite(benchmark.read(tmp_path, line).depth).all()
            continue
        with pytest.raises(ValueError, match="folder depth "):
            benchmark.read(tmp_path, line)
    for text in (
        "kv1/image/a.jpg",
        "SUNRGBD/kv1/NYU0001/a.jpg",
        "SUNRGBD/../../image/a.jpg",
        "/SUNRGBD/image/a.jpg",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"line 1: .*SUNRGBD/…/image/….jpg"):
            list(benchmark.find(tmp_path))
    path.write_text("SUNRGBD/kv9/image/a.jpg\n")
    with pytest.raises(ValueError, match=r"sunrgbd_testing_images\.txt.*princeton"):
        list(benchmark.find(tmp_path))


def test_sunrgbd_as_v1_reads_it(tmp_path):
    check("sunrgbd_v1", tmp_path, made.make_sunrgbd_v1(tmp_path))
    (tmp_path / "depth/2.png").unlink()
    lines = list(load_benchmark("sunrgbd_v1").find(tmp_path))
    with pytest.raises(ValueError, match="sunrgbd_v1/000002: No such file"):
        load_benchmark("sunrgbd_v1").read(tmp_path, lines[1])


def test_hypersims_test_split_by_each_scenes_camera(tmp_path):
    truth = made.make_hypersim_test(tmp_path)
    frames = read_all(load_benchmark("hypersim"), tmp_path)
    assert list(frames) == list(truth) and len(truth) == 2
    for key, depth in truth.items():
        assert frames[key].key == f"hypersim/{key}" and frames[key].meta["M_cam_from_uv"] == TILTED.tolist()
        np.testing.assert_allclose(frames[key].depth, depth, rtol=2e-7)
        assert np.isnan(frames[key].depth).sum() == 2
    # By the constant focal length, as others read them, the same files give other meters.
    rays = hypersim_rays(TILTED, depth.shape)
    distance = depth / (-rays[..., 2] / np.linalg.norm(rays, axis=2))
    x, y = np.meshgrid(np.arange(48) - 23.5, np.arange(36) - 17.5)
    focal = 886.81 * 48 / 1024
    constant = distance * focal / np.sqrt(x**2 + y**2 + focal**2)
    assert 0.01 < np.nanmax(abs(constant / frames[key].depth - 1)) < 0.15


def test_hypersim_names_missing_files_without_flags_of_another_command(tmp_path):
    made.make_hypersim_test(tmp_path)
    benchmark, cameras = load_benchmark("hypersim"), tmp_path / "metadata_camera_parameters.csv"
    split, line = tmp_path / "metadata_images_split_scene_v1.csv", next(iter(benchmark.find(tmp_path)))
    path = tmp_path / "ai_037_002/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="hypersim/ai_037_002/cam_00/frame.0000: "):
        benchmark.read(tmp_path, line)
    split.write_text(split.read_text().replace(",test", ",val"))
    with pytest.raises(ValueError, match=r"split test of .*_v1\.csv.*apple/ml-hypersim"):
        list(benchmark.find(tmp_path))
    for table in (split, cameras):
        table.unlink()
        with pytest.raises(ValueError, match=rf"{table.name}.*apple/ml-hypersim") as caught:
            list(benchmark.find(tmp_path))
        assert "--" not in str(caught.value)


def test_vkitti2_without_the_frames_of_the_list(tmp_path):
    truth = made.make_vkitti2_split(tmp_path)
    frames = check("vkitti2", tmp_path, truth)
    assert all(np.isnan(frame.depth).sum() == 5 * 48 + 1 for frame in frames.values())  # its sky, and a hole
    assert frames["Scene01/clone/Camera_0/00001"].meta["intrinsics"]["fx"] == 725.0087
    path = tmp_path / "train.txt"  # ZoeDepth's own has images only, and no line end behind the last
    path.write_text("\n".join(line.split()[0] for line in path.read_text().splitlines()))
    check("vkitti2", tmp_path, truth)


def test_vkitti2_names_missing_and_damaged_files(tmp_path):
    made.make_vkitti2_split(tmp_path)
    benchmark, path = load_benchmark("vkitti2"), tmp_path / "train.txt"
    lines = list(benchmark.find(tmp_path))
    depth = tmp_path / "Scene01/clone/frames/depth/Camera_0/depth_00001.png"
    depth.write_bytes(depth.read_bytes()[:200])
    with pytest.raises(ValueError, match="vkitti2/Scene01/clone/Camera_0/00001: the PNG"):
        benchmark.read(tmp_path, lines[0])
    names = path.read_text().splitlines()
    path.write_text(names[0] + "\nrgb_00000.jpg\n")
    with pytest.raises(ValueError, match="line 2: 'rgb_00000.jpg'"):
        list(benchmark.find(tmp_path))
    others = [line.partition("\t")[0].split("/") for line in lines]
    path.write_text("\n".join([*names, *(f"{s}/{v}/frames/rgb/{c}/rgb_{n}.jpg" for s, v, c, n in others)]))
    with pytest.raises(ValueError, match=r"train\.txt.*http"):
        list(benchmark.find(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match=r"train\.txt.*http"):
        list(benchmark.find(tmp_path))


class Far:
    """Takes everything for 20 m away."""

    quantity = "depth"

    def predict_batch(self, images):
        assert all(image.shape == (352, 1216, 3) for image in images)
        return [np.full(image.shape[:2], 20, np.float32) for image in images]


def test_vkitti2_by_the_protocol_of_zoedepth(tmp_path):
    truth = made.make_vkitti2_split(tmp_path, size=(375, 1242))
    trial = task_from_benchmark(load_benchmark("vkitti2"), tmp_path, protocol="zoedepth")
    result = evaluate(Far(), map(trial.read, trial.lines), protocol=trial.protocol)
    expected = []
    for depth in truth.values():
        t = depth[-352:, 13:1229][143:349, 43:1172]  # Garg's crop of 352 x 1216
        t = t[np.isfinite(t) & (t > 1e-3) & (t < 80)]
        expected.append(np.mean(abs(20 - t) / t))
    assert result.means["abs_rel"] == pytest.approx(np.mean(expected), rel=1e-6)
