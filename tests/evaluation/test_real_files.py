"""Real files of public data sets, compared with known values.

They are in ../shared/real, not in the repository; tests that need them are skipped without them. Small synthetic files
of the same formats test the same properties everywhere.
"""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_raw import frames_of, jpeg, picture, png, room

from depth_anything.cli import main
from depth_anything.data.reader import Records
from depth_anything.data.sample import decode_record
from depth_anything.data.shards import open_set, verify_set
from depth_anything.evaluation.benchmarks import kitti
from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
from depth_anything.evaluation.benchmarks.sunrgbd import decode_millimeters
from depth_anything.evaluation.evaluate import crop_to_view, masked_truth
from depth_anything.evaluation.protocols import find_protocol
from depth_anything.ingest.maps import read_png16
from depth_anything.ingest.sets import hypersim, tartanair

REAL = Path(os.environ.get("DEPTH_ANYTHING_REAL", Path(__file__).parents[3] / "shared" / "real"))
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real files of ../shared/real")


def frames(name, root):
    """Every frame of a benchmark, or the message of its error."""
    benchmark = load_benchmark(name)
    for line in benchmark.find(root):
        try:
            yield benchmark.read(root, line)
        except ValueError as error:
            yield str(error)


def counted(name, frame, protocol):
    """The pixels that a protocol compares."""
    rules = find_protocol(protocol, benchmark=load_benchmark(name))
    return int(np.isfinite(masked_truth(crop_to_view(frame, rules), rules)).sum())


@real
def test_hypersim_has_the_intrinsics_of_each_scene_without_tilt():
    with open(REAL / "hypersim" / "metadata_camera_parameters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found, untilted = {}, set()
    matrices = hypersim._read_cameras(REAL / "hypersim" / "metadata_camera_parameters.csv")
    for row in rows:
        camera = np.array(matrices[row["scene_name"]].split(","), np.float64).reshape(3, 3)
        if np.abs(camera[2, :2]).max() < 1e-6:
            untilted.add(row["scene_name"])
        made = hypersim._pixel_intrinsics(camera, 768, 1024)
        if made:
            found[row["scene_name"]] = made["intrinsics"]
    assert (len(rows), len(found)) == (482, 208) and found.keys() == untilted
    for made in found.values():
        assert (made["fx"], made["fy"]) == pytest.approx((886.80998, 886.80998), abs=5e-6)
    first = found["ai_005_001"]
    assert (first["cx"], first["cy"]) == pytest.approx((511.5, 383.5))


@real
def test_tartanair_is_read_without_the_hidden_files_of_macos():
    found = frames_of(tartanair, REAL / "tartanair")
    (frame,) = found.values()
    assert list(found) == ["hospital/Easy/P008/000050"]
    stored = np.load(REAL / "tartanair/hospital/Easy/P008/depth_left/000050_left_depth.npy")
    assert (frame.depth == stored).all() and frame.image.shape == (480, 640, 3)
    assert "sky" not in frame.meta and frame.meta["intrinsics"]["fx"] == 320


@real
def test_the_sky_of_airsim_is_separated_from_far_depth(tmp_path):
    folder = tmp_path / "airsim" / "Easy" / "P000"
    for what, ending in (("image", "rgb.png"), ("depth", "depth.npy")):
        (folder / f"{what}_left").mkdir(parents=True)
        name = "000000_left.png" if what == "image" else "000000_left_depth.npy"
        shutil.copy(
            REAL / "tartanair/airsim_with_sky" / f"000000_887749_{ending}", folder / f"{what}_left" / name
        )
    (frame,) = frames_of(tartanair, tmp_path).values()
    assert np.isinf(frame.depth).mean() == pytest.approx(0.086, abs=5e-4) and frame.meta["sky"] == "inf"
    assert frame.depth[np.isfinite(frame.depth)].max() < 300


@real
@pytest.mark.parametrize("name", ["sunrgbd", "sunrgbd_filled"])
def test_sun_rgbd_is_read_though_the_list_has_two_slashes(tmp_path, name):
    shutil.copytree(REAL / "sunrgbd", tmp_path / "sunrgbd")
    (frame,) = frames(name, tmp_path / "sunrgbd")
    assert frame.image.shape == (530, 730, 3) and frame.key.endswith("2014-12-18_11-31-54_260595134347")
    assert np.nanmin(frame.depth) == np.float32(0.64) and np.nanmax(frame.depth) == np.float32(3.783)
    assert np.isfinite(frame.depth).all() == (name == "sunrgbd_filled")


@real
def test_sun_rgbd_values_are_rotated_by_three_bits():
    stored = read_png16(REAL / "sunrgbd" / "open3d" / "SUN_depth.png")
    millimeters = decode_millimeters(stored)
    assert (millimeters > 8191).sum() == 7149 and (stored & 7 > 0).sum() == 7149
    assert millimeters.max() < 10_000


@real
def test_ddad_is_projected_as_by_dgp(tmp_path):
    first, *others = frames("ddad", REAL / "ddad")
    known = first.depth[np.isfinite(first.depth)]
    assert first.key == "ddad/scene_01/15569195938415230" and first.image.shape == (1216, 1936, 3)
    assert len(known) == 4822 and counted("ddad", first, "da2") == 4804
    assert known.min() == pytest.approx(5.060877629660297, rel=1e-7)
    assert len(others) == 2 and all("No such file" in other for other in others)


@real
def test_kittis_pixels_are_those_of_each_protocol(tmp_path):
    drive = tmp_path / "2011_09_26_drive_0002_sync"
    for what, folder in (("rgb", "image_02/data"), ("depth", "proj_depth/groundtruth/image_02")):
        (drive / folder).mkdir(parents=True)
        shutil.copy(REAL / "kitti" / what / "0000000005.png", drive / folder / "0000000069.png")
    (frame,) = frames("kitti", tmp_path)
    wanted = {"da2": 87504, "marigold": 82453, "zoedepth": 82930}
    assert {protocol: counted("kitti", frame, protocol) for protocol in wanted} == wanted


@real
def test_nyus_pixels_are_those_of_eigens_crop(tmp_path):
    shutil.copy(REAL / "nyu" / "rgb" / "rgb_00000.jpg", tmp_path / "rgb_00000.jpg")
    shutil.copy(REAL / "nyu" / "depth" / "sync_depth_00000.png", tmp_path / "sync_depth_00000.png")
    (frame,) = frames("nyu", tmp_path)
    assert counted("nyu", frame, "da2") == 221809


@real
def test_kittis_frames_are_those_of_the_list():
    lines = (REAL / "lists" / "monodepth2_eigen_benchmark_test_files.txt").read_text().splitlines()
    theirs = {(words[0].split("/")[1], int(words[1])) for words in map(str.split, lines)}
    ours = {(drive, number) for drive in kitti.EIGEN_FRAMES for number in kitti.frame_numbers(drive)}
    assert ours == theirs and len(theirs) == 652


def miniature(root):
    """Sets of the shape of TUM's and Redwood's: 16-bit PNGs of 1/5000 m and of mm, 0 where nothing was seen."""
    depth = room((48, 64))
    depth[3:5] = 0
    png(root / "tum" / "img" / "TUM.png", picture(depth))
    png(root / "tum" / "depth" / "TUM.png", np.round(depth * 5000).astype(np.uint16))
    jpeg(root / "redwood" / "color" / "00000.jpg", picture(depth))
    png(root / "redwood" / "depth" / "00000.png", np.round(depth * 1000).astype(np.uint16))
    return root


@pytest.mark.parametrize("files", ["miniature", pytest.param("real", marks=real)])
@pytest.mark.parametrize(
    ("name", "declaration", "meters"),
    [
        ("tum", "images: img\ndepth: depth\nscale: 1/5000\n", 1 / 5000),
        ("redwood", "images: color\ndepth: depth\nunit: mm\n", 1 / 1000),
    ],
)
def test_frames_of_tum_and_redwood_become_meters(tmp_path, files, name, declaration, meters):
    root = miniature(tmp_path / "raw") if files == "miniature" else tmp_path / "raw"
    if files == "real":
        shutil.copytree(REAL / "custom", root)
    for path in root.rglob("*"):
        path.chmod(0o755)
    (root / name / "set.yaml").write_text(declaration)
    camera = "intrinsics: {fx: 525, fy: 525, cx: 319.5, cy: 239.5}\n"
    (root / name / "small.yaml").write_text(declaration + camera)
    assert main(["shard", "custom", str(root / name / "set.yaml"), str(tmp_path / "set")]) == 0
    assert verify_set(tmp_path / "set", decode=True) == []
    frame = decode_record(*Records(open_set(tmp_path / "set")).read("set/00000", 0))
    stored = read_png16(next((root / name / "depth").iterdir()))
    assert frame.depth.shape == stored.shape == frame.image.shape[:2]
    np.testing.assert_allclose(frame.depth[stored > 0], stored[stored > 0] * meters, rtol=1e-6)
    assert (np.isnan(frame.depth) == (stored == 0)).all()
    assert 0.3 < np.nanmedian(frame.depth) < 7
    arguments = [str(root / name / "small.yaml"), str(tmp_path / "small"), "--short-side", "28"]
    assert main(["shard", "custom", *arguments]) == 0
    small = decode_record(*Records(open_set(tmp_path / "small")).read("small/00000", 0))
    share = small.image.shape[1] / frame.image.shape[1]
    assert small.meta["intrinsics"]["fx"] == pytest.approx(525 * share)
