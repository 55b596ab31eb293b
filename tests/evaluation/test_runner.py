"""Evaluation in shares, after a kill and from files on disk: always the same rows to the last digit."""

import errno
import hashlib
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from benchmark_files import make_da2k, make_nyu_bts, make_sintel

from depth_anything import DepthAnything, Predictor
from depth_anything.data.sample import Frame
from depth_anything.errors import UserError
from depth_anything.evaluation import runner
from depth_anything.evaluation.benchmarks.benchmark_catalog import BENCHMARKS, load_benchmark
from depth_anything.evaluation.depth_task import DepthTask
from depth_anything.evaluation.evaluate import score_map
from depth_anything.evaluation.pairs_task import PairsTask
from depth_anything.evaluation.predictions import PrecomputedMaps
from depth_anything.evaluation.protocols import PROTOCOLS
from depth_anything.evaluation.runner import (
    EvalModel,
    cache_key,
    collect_results,
    evaluate_share,
    open_row_cache,
    task_from_benchmark,
    task_from_set,
)
from depth_anything.inference.formats import encode_map
from depth_anything.scenes.render import write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec

SHARP = replace(PROTOCOLS["da2"], sharp=True)


def a_frame(line):
    number = int(line)
    rng = np.random.default_rng(number)
    shape = (28, 42) if number % 3 else (42, 28)
    image = rng.integers(0, 255, (*shape, 3), np.uint8)
    depth = rng.uniform(1, 9, shape).astype(np.float32)
    return Frame(f"toy/{number:03d}", image, {"name": f"photos/{number}.jpg"}, depth=depth)


def a_task(count=29, protocol=PROTOCOLS["da2"], read=a_frame):
    lines = [str(number) for number in range(count)]
    return DepthTask("toy", lines, read, {"digest": f"sha256:{count}"}, protocol=protocol)


@pytest.fixture(scope="module")
def predictor():
    return Predictor(DepthAnything("vitn"), device="cpu", input_size=28)


@pytest.fixture(scope="module")
def whole(predictor, tmp_path_factory):
    return rows_of(predictor, a_task(), tmp_path_factory.mktemp("whole"), [(1, 1)])


def model_of(source, **facts):
    return EvalModel("m", source, {"fingerprint": "sha256:1", **facts})


def rows_of(source, task, folder, shares):
    for share in shares:
        evaluate_share(model_of(source), task, folder, share=share)
    return collect_results([model_of(source)], task, folder)[0].rows


@pytest.mark.parametrize(
    "shares", [[(1, 2), (2, 2)], [(3, 3), (1, 3), (2, 3)], [(k, 7) for k in range(1, 8)]]
)
def test_shares_give_the_same_rows_as_one_process(predictor, whole, tmp_path, shares):
    assert rows_of(predictor, a_task(), tmp_path, shares) == whole
    assert [row["key"] for row in whole] == [f"toy/{number:03d}" for number in range(29)]


def test_a_share_holds_only_its_own_batches(predictor, whole, tmp_path):
    rows = rows_of(predictor, a_task(), tmp_path, [(2, 2)])
    assert rows == whole[8:16] + whole[24:]


def test_a_stopped_evaluation_continues_with_the_images_that_have_no_row(predictor, whole, tmp_path):
    class Stopped(Exception):
        pass

    read = []

    def read_or_stop(line):
        if len(read) == 19:
            raise Stopped
        read.append(line)
        return a_frame(line)

    with pytest.raises(Stopped):
        evaluate_share(model_of(predictor), a_task(read=read_or_stop), tmp_path)
    (file,) = (tmp_path / runner.ROWS_FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-9])  # killed while it wrote the last row
    assert len(collect_results([model_of(predictor)], a_task(), tmp_path)[0].rows) == 15
    read.clear()
    assert (
        rows_of(predictor, a_task(read=lambda line: read.append(line) or a_frame(line)), tmp_path, [(1, 1)])
        == whole
    )
    assert read == [str(number) for number in range(8, 29)]


def test_cached_rows_of_other_models_images_or_protocols_are_not_used(predictor, tmp_path):
    rows_of(predictor, a_task(), tmp_path, [(1, 1)])
    same = model_of(predictor, device="cuda:1", weights="elsewhere")
    assert len(collect_results([same], a_task(), tmp_path)[0].rows) == 29
    others = (
        (a_task(), model_of(predictor, fingerprint="sha256:2")),
        (a_task(28), model_of(predictor)),
        (a_task(protocol=PROTOCOLS["moge"]), model_of(predictor)),
        (a_task(protocol=SHARP), model_of(predictor)),
    )
    for task, model in others:
        assert not collect_results([model], task, tmp_path)[0].rows


def test_the_cache_key_of_a_task_is_that_of_earlier_versions():
    """Cached rows and best.json of earlier versions stay valid: their digests are over these names and values."""
    assert cache_key(a_task(protocol=SHARP)) == {
        "trial": "toy",
        "images": [
            "sha256:29",
            "sha256:" + hashlib.sha256("\n".join(map(str, range(29))).encode()).hexdigest(),
        ],
        "protocol": {
            "name": "da2",
            "fitted": ("disparity",),
            "min_depth": 0.001,
            "max_depth": 80.0,
            "strict": False,
            "floor": None,
            "floor_at_truth": False,
            "positive": False,
            "crop": None,
            "view": None,
            "flip": False,
            "sharp": True,
        },
    }
    assert cache_key(PairsTask("da2k", ["a"], a_frame, {"digest": "sha256:1"}))["protocol"] is None


def test_boundaries_are_scored_where_the_ground_truth_is_sharp(tmp_path):
    make_sintel(tmp_path / "sintel")
    make_nyu_bts(tmp_path / "nyu")
    sintel, nyu = (task_from_benchmark(load_benchmark(name), tmp_path) for name in ("sintel", "nyu"))
    assert sintel.protocol.sharp and not nyu.protocol.sharp
    true, flat = perfect_and_flat_rows(sintel)
    assert true["boundary_f1"] > 0.5 and flat["boundary_f1"] == 0 and true["abs_rel"] < 1e-6
    assert all("boundary_f1" not in row for row in perfect_and_flat_rows(nyu))
    assert {name for name in BENCHMARKS if load_benchmark(name).sharp} >= {
        "sintel",
        "sintel_clean",
        "moge_ibims",
        "moge_sintel",
        "moge_spring",
        "moge_hammer",
    }
    assert not any(
        load_benchmark(name).sharp for name in ("kitti", "nyu", "eth3d", "diode", "moge_nyu", "moge_diode")
    )


def perfect_and_flat_rows(task):
    frame = task.read(task.lines[0])
    maps = (np.nan_to_num(frame.depth, nan=3.0), np.full_like(frame.depth, 3.0))
    return [score_map(map_, frame, quantity="depth", protocol=task.protocol)[1] for map_ in maps]


def test_the_manifest_of_a_set_says_whether_its_depth_is_sharp(tmp_path):
    spec = SceneSetSpec(look="synthetic", count=1, seed=0, height=24, width=32)
    made = write_scenes(tmp_path / "s", spec)
    assert made.meta["sharp"] is True and task_from_set(made).protocol.sharp
    assert not task_from_set(replace(made, meta={})).protocol.sharp
    bare = write_scenes(tmp_path / "b", replace(spec, labelled=False))
    assert "sharp" not in bare.meta


def test_a_part_of_a_benchmark_is_marked_incomparable(tmp_path):
    make_sintel(tmp_path / "sintel")
    some = task_from_benchmark(load_benchmark("sintel"), tmp_path, limit=2)
    assert some.incomplete.startswith("only 4 of 1064 images")
    whole = task_from_benchmark(replace(load_benchmark("sintel"), images=4), tmp_path, limit=2)
    assert whole.incomplete.startswith("only 2 of 4 images")
    assert task_from_benchmark(replace(load_benchmark("sintel"), images=4), tmp_path).incomplete == ""


def test_nan_survives_the_cache(predictor, tmp_path):
    cache = open_row_cache(model_of(predictor), a_task(1), tmp_path)
    cache.add({"0": {"abs_rel": float("nan"), "d1": 0.1 + 0.2}})
    row = cache.load()["0"]
    assert np.isnan(row["abs_rel"]) and row["d1"] == 0.1 + 0.2


def write_maps(folder, predictor, form, name):
    for number in range(29):
        frame = a_frame(number)
        path = folder / name.format(number=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        map_ = predictor.predict_batch([frame.image])[0]
        path.write_bytes(encode_map(map_, form, quantity="disparity", unit="relative"))


@pytest.mark.parametrize(
    ("form", "name", "near"),
    [
        ("npy", "toy/{number:03d}.npy", 1e-5),
        ("npy", "deep/photos/{number}_disparity.npy", 1e-5),
        ("exr", "{number}_disparity.exr", 1e-5),
        ("png16", "photos/{number}.png", 1e-3),
    ],
)
def test_maps_on_disk_have_the_scores_of_their_model(predictor, whole, tmp_path, form, name, near):
    write_maps(tmp_path / "maps", predictor, form, name)
    maps = PrecomputedMaps(tmp_path / "maps", quantity="disparity" if "_disparity" not in name else None)
    assert maps.quantity == "disparity" and len(maps) == 29
    rows = rows_of(maps, a_task(), tmp_path, [(1, 1)])
    assert [row["abs_rel"] for row in rows] == pytest.approx([row["abs_rel"] for row in whole], rel=near)


@pytest.mark.parametrize("quantity", ["disparity", "depth"])
def test_the_quantity_of_an_exr_is_read_from_its_header(tmp_path, quantity):
    map_ = np.ones((28, 42), np.float32)
    (tmp_path / "001.exr").write_bytes(encode_map(map_, "exr", quantity=quantity, unit="m"))
    (tmp_path / "002.exr").write_bytes(b"no EXR")
    assert PrecomputedMaps(tmp_path).quantity == quantity
    other = "depth" if quantity == "disparity" else "disparity"
    with pytest.raises(UserError, match=f"{quantity}.*not {other}.*quantity={other}"):
        PrecomputedMaps(tmp_path, quantity=other)


def test_folders_without_maps_or_with_unclear_quantity_are_refused(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "none")):
        PrecomputedMaps(tmp_path / "none")
    with pytest.raises(ValueError, match=str(tmp_path)):
        PrecomputedMaps(tmp_path)
    np.save(tmp_path / "7.npy", np.ones((28, 42), np.float32))
    with pytest.raises(UserError, match="quantity=disparity .*quantity=depth"):
        PrecomputedMaps(tmp_path)
    with pytest.raises(ValueError, match="'toy/001'.*toy/001.npy"):
        PrecomputedMaps(tmp_path, quantity="depth").load_map(a_frame(1))
    np.save(tmp_path / "1_depth.npy", np.ones((28, 42), np.float32))
    with pytest.raises(ValueError, match="depth.*not disparity"):
        PrecomputedMaps(tmp_path, quantity="disparity")
    np.save(tmp_path / "2_disparity.npy", np.ones((28, 42), np.float32))
    with pytest.raises(ValueError, match=str(tmp_path)):
        PrecomputedMaps(tmp_path)


def test_two_maps_with_the_name_of_a_frame_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "1_depth.npy", np.full((28, 42), 5.0, np.float32))
    with pytest.raises(ValueError, match="'toy/001'.*a/1_depth.npy.*b/1_depth.npy"):
        PrecomputedMaps(tmp_path).load_map(a_frame(1))


def a_kitti_frame(drive):
    """Every drive counts its frames from 0."""
    files = [f"raw/2011_09_26/{drive}/image_02/data/0000000032.png"]
    return Frame(f"kitti/{drive}/0000000032", np.zeros((28, 42, 3), np.uint8), {"files": files})


def test_a_map_is_used_for_one_frame_of_a_set_only(tmp_path):
    np.save(tmp_path / "0000000032.npy", np.full((28, 42), 5.0, np.float32))
    maps = PrecomputedMaps(tmp_path, quantity="depth")
    assert maps.load_map(a_kitti_frame("drive_0036")).max() == 5
    assert maps.load_map(a_kitti_frame("drive_0036")).max() == 5  # again, for the page
    with pytest.raises(ValueError, match="0000000032.npy .*'kitti/drive_0036/.*'kitti/drive_0047/"):
        maps.load_map(a_kitti_frame("drive_0047"))


@pytest.mark.parametrize(
    "below", ["", "image_02/data/", "2011_09_26/{0}/image_02/data/", "kitti/{0}/", "{0}/"]
)
def test_a_map_is_found_by_the_path_of_its_image(tmp_path, below):
    for value, drive in enumerate(("drive_0036", "drive_0047")):
        path = tmp_path / f"of_{drive}" / below.format(drive) / "0000000032.npy"
        path.parent.mkdir(parents=True)
        np.save(path, np.full((28, 42), value, np.float32))
    maps = PrecomputedMaps(tmp_path, quantity="depth")
    if "{0}" in below:
        assert [maps.load_map(a_kitti_frame(d)).max() for d in ("drive_0036", "drive_0047")] == [0, 1]
    else:
        with pytest.raises(ValueError, match="'kitti/drive_0047/0000000032'"):
            maps.load_map(a_kitti_frame("drive_0047"))


def test_maps_of_da2k_are_found_by_the_path_of_the_image(tmp_path):
    benchmark = load_benchmark("da2k")
    make_da2k(tmp_path / "da2k")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "da2k").glob("images/*/*"):
        scene = elsewhere / path.parent.name
        scene.mkdir(exist_ok=True)
        np.save(scene / f"{path.stem}.npy", np.ones((36, 48), np.float32))
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps/linked").symlink_to(elsewhere)
    maps = PrecomputedMaps(tmp_path / "maps", quantity="depth")
    rows = rows_of(maps, task_from_benchmark(benchmark, tmp_path), tmp_path, [(1, 1)])
    assert len(maps) == len(rows) == 10 and all(row["right"] == row["pairs"] / 2 for row in rows)


def test_maps_of_the_authors_metric_script_are_depth(tmp_path):
    np.save(tmp_path / "1_raw_depth_meter.npy", np.full((28, 42), 5.0, np.float32))
    (tmp_path / "1.json").write_text(json.dumps({"quantity": "disparity"}))
    maps = PrecomputedMaps(tmp_path)
    assert maps.quantity == "depth" and (maps.load_map(a_frame(1)) == 5).all()


def test_maps_on_disk_are_evaluated_on_a_benchmark(tmp_path):
    truth = make_nyu_bts(tmp_path / "nyu")
    task = task_from_benchmark(load_benchmark("nyu"), tmp_path)
    assert task.protocol.eval_crop == "eigen_nyu" and task.protocol.max_depth == 10
    for name, depth in truth.items():
        np.save(tmp_path / f"rgb_{name.rpartition('/')[2]}.npy", np.nan_to_num(depth, nan=3.0))
    (maps := tmp_path / "maps").mkdir()
    for file in tmp_path.glob("*.npy"):
        file.rename(maps / file.name)
    predictions = PrecomputedMaps(maps, quantity="depth")
    rows = rows_of(predictions, task, tmp_path, [(1, 2), (2, 2)])
    assert len(rows) == len(truth) and all(row["valid"] and row["abs_rel"] < 1e-3 for row in rows)


def test_missing_data_names_where_to_get_it(tmp_path):
    with pytest.raises(runner.MissingData, match="^nyu: .*silberman"):
        task_from_benchmark(load_benchmark("nyu"), tmp_path)
    with pytest.raises(runner.MissingData) as caught:
        task_from_benchmark(load_benchmark("moge_hammer"), tmp_path)
    assert str(caught.value).count("https://") == 1
    make_nyu_bts(tmp_path)
    task = task_from_benchmark(load_benchmark("nyu"), tmp_path)
    for image in tmp_path.rglob("rgb_*"):
        image.unlink()
    with pytest.raises(runner.MissingData, match="rgb_.*silberman"):
        [task.read(line) for line in task.lines]
    for name, path in (("da2k", "annotations.json"), ("moge_gso", "GSO/.index.txt")):
        (tmp_path / name / path).parent.mkdir(parents=True)
        (tmp_path / name / path).write_text("{}" if path.endswith("json") else "\n")
        with pytest.raises(runner.MissingData, match=f"^{name}: .* .*huggingface"):
            task_from_benchmark(load_benchmark(name), tmp_path)
    with pytest.raises(ValueError, match="'moge'.*NYU.*da2, marigold, zoedepth"):
        task_from_benchmark(load_benchmark("nyu"), tmp_path, protocol="moge")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_failing_disk_is_not_missing_data(tmp_path, code, wrapped):
    make_nyu_bts(tmp_path)
    benchmark = load_benchmark("nyu")

    def fail(*arguments):
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            if wrapped:
                raise ValueError("its depth cannot be decoded") from error
            raise

    line = next(iter(benchmark.find(tmp_path)))
    task = task_from_benchmark(replace(benchmark, read=fail), tmp_path)
    for act, named in (
        (lambda: task_from_benchmark(replace(benchmark, find=fail), tmp_path), str(tmp_path)),
        (lambda: task.read(line), line.partition("\t")[0]),
    ):
        with pytest.raises(OSError, match=re.escape(named)) as caught:
            act()
        assert caught.value.errno == code and "nyu" in str(caught.value)
