"""A user's own set: pairs are matched by name, values are converted, and bad pairs are rejected with a reason."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_custom import ENDINGS, SIZE, make_set, write_map
from made_raw import hdf5, jpeg, picture, room
from PIL import Image

from depth_anything.data.reader import Records
from depth_anything.data.sample import decode_record
from depth_anything.data.shards import open_set, verify_set
from depth_anything.ingest.custom import CustomSet
from depth_anything.ingest.declaration import load_declaration
from depth_anything.ingest.writer import write_source


def written(folder, output="out", **options):
    custom = load_declaration(folder / "set.yaml")
    shard_set = write_source(custom, custom.folder, folder / output, **options)
    records = Records(shard_set)
    ((shard, count),) = records.shards
    frames = [decode_record(*records.read(shard, index)) for index in range(count)]
    return shard_set, {frame.meta["name"]: frame for frame in frames}


def skipped(folder):
    return dict(json.loads((folder / "00000.skipped.json").read_text()))


@pytest.mark.parametrize("ending", ENDINGS)
def test_values_of_every_format_are_stored_unchanged(tmp_path, ending):
    scale, yaml = (0.001, "unit: mm\n") if ending == ".png" else (1.0, "unit: m\n")
    truth = make_set(tmp_path, ending=ending, scale=scale, yaml=yaml + "licence: CC-BY-4.0\n")
    shard_set, frames = written(tmp_path)
    assert set(frames) == {"a", "b", "c"} and not verify_set(shard_set.root, decode=True)
    for name, metres in truth.items():
        true = np.where(metres > 0, metres, np.nan).astype(np.float32)
        np.testing.assert_array_equal(frames[name].depth, true, strict=True)
        assert frames[name].meta["unit"] == "m" and frames[name].image.shape == (*SIZE, 3)
    pixels = sum(depth.size for depth in truth.values())
    assert shard_set.meta["pixels"] == {"all": pixels, "valid": pixels - 45, "zero": 45}
    assert (shard_set.meta["licence"], shard_set.meta["sky_policy"]) == ("CC-BY-4.0", "far")
    image = (tmp_path / "rgb/a.jpg").read_bytes()
    assert Records(shard_set).read("out/00000", 0)[1]["jpg"] == image


def test_images_without_a_map_and_maps_without_an_image_are_listed(tmp_path):
    make_set(tmp_path)
    shutil.copy(tmp_path / "rgb/a.jpg", tmp_path / "rgb/lonely.jpg")
    shutil.copy(tmp_path / "depth/a.png", tmp_path / "depth/d.png")
    (tmp_path / "rgb/notes.txt").write_text("hello")
    (tmp_path / "rgb/._a.jpg").write_bytes(b"a Mac's")
    pairs = load_declaration(tmp_path / "set.yaml").files.find()
    assert (list(pairs.matched), list(pairs.images), list(pairs.maps)) == (["a", "b", "c"], ["lonely"], ["d"])
    shard_set, frames = written(tmp_path)
    assert set(frames) == {"a", "b", "c"}
    assert skipped(tmp_path / "out") == {
        "lonely": "no depth of this name in depth",
        "d": "no image of this name in rgb",
    }
    assert shard_set.meta["skipped"]["count"] == 2 and shard_set.meta["left_out"] == {
        "other files in images": 1
    }


@pytest.mark.parametrize(("key", "copy"), [("images", "rgb/a.png"), ("depth", "depth/a.npy")])
def test_two_files_of_one_name_are_an_error(tmp_path, key, copy):
    make_set(tmp_path)
    first = "rgb/a.jpg" if key == "images" else "depth/a.npy and depth/a.png"
    shutil.copy(tmp_path / ("rgb/a.jpg" if key == "images" else "depth/a.png"), tmp_path / copy)
    with pytest.raises(ValueError, match=rf"{key}: 1 .*\({first}.*  {key}: "):
        load_declaration(tmp_path / "set.yaml").files.find()


@pytest.mark.parametrize(
    ("images", "depth", "files"),
    [
        ("rgb/img_{stem}.jpg", "d/depth_{stem}.png", [("rgb/img_7.jpg", "d/depth_7.png")]),
        ("{stem}.jpg", "{stem}_depth.png", [("7.jpg", "7_depth.png"), ("x/8.jpg", "x/8_depth.png")]),
        ("{scene}/rgb/{stem}", "{scene}/depth/{stem}", [("s1/rgb/7.jpg", "s1/depth/7.png")] * 2),
        ("rgb", "depth", [("rgb/x/y/7.jpg", "depth/x/y/7.png"), ("rgb/7.JPG", "depth/7.PNG")]),
        (".", "depth", [("7.png", "depth/7.png"), ("x/8.png", "depth/x/8.png")]),
        ("rgb/", "rgb/depth", [("rgb/7.png", "rgb/depth/7.png")]),
        ("rgb", "depth", [("rgb/a.b.c.jpg", "depth/a.b.c.npy"), ("rgb/ä ö.jpg", "depth/ä ö.npy")]),
        ("rgb", "depth", [("rgb/a\tb\nc.jpg", "depth/a\tb\nc.npy")]),
    ],
)
def test_patterns_of_paths(tmp_path, images, depth, files):
    metres = room(SIZE)
    for image, map_ in files:
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / image), picture(metres)[..., ::-1])
        write_map(tmp_path / map_, np.round(metres * 1000).astype(np.uint16))
        if map_.endswith(".PNG"):
            (tmp_path / map_).write_bytes((tmp_path / "depth/x/y/7.png").read_bytes())
    (tmp_path / "set.yaml").write_text(f'images: "{images}"\ndepth: "{depth}"\nunit: mm\n')
    pairs = load_declaration(tmp_path / "set.yaml").files.find()
    assert {pair for pair in pairs.matched.values()} == set(files) and not pairs.images and not pairs.maps
    _, frames = written(tmp_path)
    assert len(frames) == len(set(files))
    # again, with check.png and shards among the images: they do not belong to the set
    Image.new("RGB", (4, 4)).save(tmp_path / "out/check.png")
    custom = CustomSet(tmp_path, images, depth, leave_out=(tmp_path / "out").resolve())
    assert custom.files.find().matched == pairs.matched and not custom.files.find().images


def test_links_to_folders_are_followed_once(tmp_path):
    make_set(tmp_path / "real")
    (tmp_path / "rgb").mkdir()
    (tmp_path / "rgb/scene").symlink_to(tmp_path / "real/rgb")
    (tmp_path / "real/rgb/loop").symlink_to(tmp_path / "rgb")
    (tmp_path / "depth").symlink_to(tmp_path / "real/depth")
    pairs = CustomSet(tmp_path, "rgb/scene", "depth").files.find()
    assert list(pairs.matched) == ["a", "b", "c"] and not pairs.images
    assert list(CustomSet(tmp_path, "rgb", "depth").folder.glob("rgb/scene/*.jpg"))
    with pytest.raises(ValueError, match="3 images.*3 maps"):
        CustomSet(tmp_path, "rgb", "depth").files.find()


def test_a_name_that_is_not_unicode(tmp_path):
    truth = make_set(tmp_path, names=("a",))
    name = os.fsdecode(b"caf\xe9")
    os.rename(tmp_path / "rgb/a.jpg", tmp_path / f"rgb/{name}.jpg")
    os.rename(tmp_path / "depth/a.png", tmp_path / f"depth/{name}.png")
    _, frames = written(tmp_path)
    assert list(frames) == ["caf\\udce9"]
    assert np.nanmax(frames.popitem()[1].depth) == np.float32(truth["a"].max())


def test_missing_folders_and_wrong_patterns_are_errors(tmp_path):
    make_set(tmp_path)
    with pytest.raises(ValueError, match=f"images: {tmp_path}/photos"):
        CustomSet(tmp_path, "photos", "depth").files.find()
    with pytest.raises(ValueError, match=f"depth: {tmp_path}/set.yaml"):
        CustomSet(tmp_path, "rgb", "set.yaml").files.find()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"depth: empty .*\.png \.npy"):
        CustomSet(tmp_path, "rgb", "empty").files.find()
    with pytest.raises(ValueError, match="3 images.* rgb/a.jpg.* 3 maps.* depth/a.png"):
        CustomSet(tmp_path, "{stem}.jpg", "depth").files.find()
    for pattern in ("rgb/{name}.jpg", "rgb/{stem}/{stem}.jpg", "rgb/{", "rgb/{}"):
        with pytest.raises(ValueError, match=r"images: .*\{stem\}.*  images: folder/\{stem\}.jpg"):
            CustomSet(tmp_path, pattern, "depth").files.find()
    with pytest.raises(ValueError, match=r"images: \{scene\}/\{stem\}.jpg and depth: depth "):
        CustomSet(tmp_path, "{scene}/{stem}.jpg", "depth").files.find()


def test_invalid_and_sky_values_are_those_of_the_file(tmp_path):
    stored = np.full(SIZE, 2000, np.uint16)
    stored[0, :5] = [0, 65535, 65534, 60000, 59999]
    jpeg(tmp_path / "rgb/a.jpg", picture(np.ones(SIZE)))
    write_map(tmp_path / "depth/a.png", stored)
    yaml = "images: rgb\ndepth: depth\nunit: mm\n"
    for more, true in (
        ("invalid: [65535, 65534]\n", [np.nan, np.nan, np.nan, 60, 59.999]),
        ("sky: 65535\ninvalid: 65534\n", [np.nan, np.inf, np.nan, 60, 59.999]),
        ("sky_from: 60000\n", [np.nan, np.inf, np.inf, np.inf, 59.999]),
    ):
        (tmp_path / "set.yaml").write_text(yaml + more)
        shard_set, frames = written(tmp_path, output=f"out{len(more)}")
        np.testing.assert_array_equal(frames["a"].depth[0, :5], np.array(true, np.float32))
        assert ("sky" in shard_set.meta["pixels"]) == (np.inf in true)
        assert shard_set.meta["pixels"].get("declared invalid", 0) == more.count("6553") - ("sky: " in more)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_values_are_compared_in_the_type_of_the_file(tmp_path, dtype):
    """655.35 is 655.3499755859375 in 32 bits and 655.5 in 16."""
    stored = np.full(SIZE, 2.5, dtype)
    stored[0, :3] = [655.35, 654.5, np.inf]
    jpeg(tmp_path / "rgb/a.jpg", picture(np.ones(SIZE)))
    write_map(tmp_path / "depth/a.npy", stored)
    for key, sky in (("sky", [True, False, False]), ("sky_from", [True, False, True])):
        (tmp_path / "set.yaml").write_text(f"images: rgb\ndepth: depth\nunit: m\n{key}: 655.35\n")
        _, frames = written(tmp_path, output=key)
        assert np.isposinf(frames["a"].depth[0, :3]).tolist() == sky


def test_disparity_is_stored_unchanged(tmp_path):
    make_set(tmp_path, ending=".npy", scale=1, yaml="quantity: disparity\nsky: 0\n")
    stored = (48 / room(SIZE)).astype(np.float32)
    stored[0, :4] = [0, -1, np.inf, np.nan]
    write_map(tmp_path / "depth/a.npy", stored)
    shard_set, frames = written(tmp_path)
    assert frames["a"].depth is None and shard_set.meta["quantity"] == "disparity"
    np.testing.assert_array_equal(frames["a"].disparity[0, :4], np.array([0, *[np.nan] * 3], np.float32))
    np.testing.assert_array_equal(frames["a"].disparity[1:], stored[1:])
    (tmp_path / "set.yaml").write_text("images: rgb\ndepth: depth\nquantity: disparity\n")
    assert np.isnan(written(tmp_path, output="other")[1]["a"].disparity[0, 0])


@pytest.mark.parametrize("factor", [1, 2])
def test_distance_along_rays_becomes_planar_depth(tmp_path, factor):
    """A wall at z = 3 m, whose corners are farther away, seen by a map of a whole or half the image's size."""
    height, width = SIZE
    fx, fy, cx, cy = 40.0, 42.0, 20.25, 18.5
    rows, columns = height // factor, width // factor
    x = ((np.arange(columns) + 0.5) * factor - 0.5 - cx) / fx
    y = ((np.arange(rows) + 0.5) * factor - 0.5 - cy) / fy
    distance = 3 * np.sqrt(x[None, :] ** 2 + y[:, None] ** 2 + 1)
    jpeg(tmp_path / "rgb/a.jpg", picture(np.ones(SIZE)))
    hdf5(tmp_path / "depth/a.h5", distance)
    camera = f"intrinsics: {{fx: {fx}, fy: {fy}, cx: {cx}, cy: {cy}}}\n"
    (tmp_path / "set.yaml").write_text(
        f"images: rgb\ndepth: depth\nunit: m\nkey: dataset\ndistance: ray\n{camera}"
    )
    _, frames = written(tmp_path)
    assert abs(frames["a"].depth - 3).max() < 3e-7
    assert frames["a"].meta["intrinsics"] == {"fx": fx, "fy": fy, "cx": cx, "cy": cy}
    (tmp_path / "set.yaml").write_text(
        "images: rgb\ndepth: depth\nunit: m\ndistance: ray\nintrinsics: [500, 500, 320, 240]\n"
    )
    with pytest.raises(ValueError, match="320, 240 .*48 x 36"):
        written(tmp_path, output="other")


def test_rejected_pairs_are_listed_with_a_reason(tmp_path):
    make_set(tmp_path, names=("good", "flat", "wide", "eight", "cut", "broken", "turned"))
    write_map(tmp_path / "depth/flat.png", np.zeros(SIZE))
    write_map(tmp_path / "depth/wide.png", np.ones((36, 60)))
    assert cv2.imwrite(str(tmp_path / "depth/eight.png"), np.ones(SIZE, np.uint8))
    cut = (tmp_path / "depth/cut.png").read_bytes()
    (tmp_path / "depth/cut.png").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "rgb/broken.jpg").write_bytes(b"hello")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "rgb/turned.jpg").save(tmp_path / "rgb/turned.jpg", exif=exif)
    _, frames = written(tmp_path)
    assert list(frames) == ["good"]
    reasons = skipped(tmp_path / "out")
    values = {
        "flat": ["zero"],
        "wide": ["60 x 36", "48 x 36"],
        "eight": ["its depth: ", "8 bits"],
        "cut": ["its depth: ", "damaged"],
        "broken": ["its image "],
        "turned": ["48 x 36", "36 x 48", "EXIF tag Orientation"],
    }
    assert set(reasons) == set(values)
    for name, words in values.items():
        assert all(word in reasons[name] for word in words), reasons[name]


def test_a_rotated_image_with_a_rotated_map_is_accepted(tmp_path):
    make_set(tmp_path, names=("a",), lowest=None)
    turned = room((48, 36))
    write_map(tmp_path / "depth/a.png", turned * 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "rgb/a.jpg").save(tmp_path / "rgb/a.jpg", exif=exif)
    _, frames = written(tmp_path)
    assert frames["a"].image.shape[:2] == frames["a"].depth.shape == (48, 36)


def test_settings_contain_everything_that_determines_the_pixels(tmp_path):
    make_set(tmp_path)
    written(tmp_path)
    for more in ("invalid: 3\n", "sky: 3\n", "distance: planar\nintrinsics: [9, 9, 9, 9]\n"):
        make_set(tmp_path, yaml="unit: mm\n" + more)
        with pytest.raises(ValueError, match=f"  rm -r {tmp_path}/out"):
            written(tmp_path)
    make_set(tmp_path, yaml="unit: mm\n")
    with pytest.raises(ValueError, match="scale 0.001 in place of 0.01"):
        make_set(tmp_path, yaml="unit: cm\n")
        written(tmp_path)
    make_set(tmp_path, yaml="unit: mm\nlicence: MIT\n")
    assert written(tmp_path)[0].digest == open_set(tmp_path / "out").digest


def test_the_source_can_be_pickled_for_worker_processes(tmp_path):
    make_set(tmp_path)
    custom = load_declaration(tmp_path / "set.yaml")
    assert pickle.loads(pickle.dumps(custom)) == custom


def test_records_are_sorted_by_name_whatever_the_order_on_disk(tmp_path, monkeypatch):
    make_set(tmp_path, names=("b", "a", "c10", "c9"))
    plain = list(load_declaration(tmp_path / "set.yaml").find(tmp_path))
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext(list(scandir(path))[::-1]))
    assert list(load_declaration(tmp_path / "set.yaml").find(tmp_path)) == plain
    assert [line.split("\t")[0] for line in plain] == ["a", "b", "c10", "c9"]


RGBD = Path(os.environ.get("DEPTH_ANYTHING_RGBD", Path(__file__).parents[3] / "shared" / "rgbd"))


@pytest.mark.skipif(not RGBD.is_dir(), reason="no real frames next to the repository")
@pytest.mark.parametrize(
    ("images", "depth", "unit", "median", "valid"),
    [
        ("{stem}_rgb_0000000050.png", "{stem}_depth_0000000050.png", "scale: 1/256", 13.4375, 0.2064),
        ("{stem}_rgb_rgb_00050.jpg", "{stem}_depth_sync_depth_00050.png", "unit: mm", 3.208, 0.75065),
    ],
)
def test_real_frames_of_a_lidar_and_a_kinect(tmp_path, images, depth, unit, median, valid):
    (tmp_path / "set.yaml").write_text(f"images: {RGBD}/{images}\ndepth: {RGBD}/{depth}\n{unit}\n")
    _, frames = written(tmp_path)
    ((_, frame),) = frames.items()
    assert np.nanmedian(frame.depth) == np.float32(median)
    assert np.isfinite(frame.depth).mean() == pytest.approx(valid, abs=1e-4)
