"""`bench-data` times the same code that the loader runs."""

import json

import cv2
import numpy as np
import pytest

from depth_anything.cli import main
from depth_anything.cli.bench_command import STUDENT_GFLOPS, estimate_demand
from depth_anything.data import timing
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.labels import finish_labels, write_label_sidecar
from depth_anything.data.loader import build_stream_loader
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard

SIDE, RECORDS = 28, 24


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    kinds = {"photos": [], "deep": [], "labels": []}
    for i in range(RECORDS):
        image = cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (70, 50))
        depth, disparity = rng.random((50, 70), np.float32), rng.random((28, 42), np.float32)
        depth[0] = np.inf
        kinds["photos"].append((f"photos/0/{i}", encode_frame(Frame("", image), codec="q12")))
        kinds["deep"].append((f"deep/0/{i}", encode_frame(Frame("", image, depth=depth), codec="f32")))
        label = encode_frame(Frame("", image, disparity=disparity), codec="q12")["disparity.q12"]
        kinds["labels"].append((f"photos/0/{i}", {"disparity.q12": label}))
    infos = {name: write_shard(root / name / "0.tar", records) for name, records in kinds.items()}
    for name in ("photos", "deep"):
        write_manifest(root / name, name=name, shards=[infos[name]], meta={"sky_policy": "invalid"})
    write_label_sidecar(
        root / "labels",
        infos["labels"],
        image_set="photos",
        image=infos["photos"],
        teacher={"fingerprint": "sha256:0"},
        preprocessing="28",
        codec="q12",
        values=(0.0, 1.0),
        skipped={},
    )
    assert finish_labels(root / "labels", open_set(root / "photos"))
    return root


@pytest.mark.parametrize("joined", [False, True])
def test_timed_sample_equals_the_sample_of_the_loader(sets, joined):
    photos, deep, labels = (open_set(sets / name) for name in ("photos", "deep", "labels"))
    source = JoinedRecords(photos, labels) if joined else Records(deep)
    data = StreamDataset([source], seed=1, streams=4, image_size=SIDE, sky=None)
    timer = timing.StageTimer()
    for n in range(10):
        arrays, fields, size = timing.timed_sample(data, n, timer)
        timing.minimal_decode(fields, size, timer)
        batch = data[n]
        for name in ("image", "target", "valid"):
            np.testing.assert_array_equal(arrays[name][0], batch[name][0].numpy())
        assert size == ((28, 42) if joined else (28, 42))
    assert timer.cpu.keys() == {
        *timing.SAMPLE_STAGES,
        *(bare for bare in timing.SAMPLE_STAGES.values() if bare),
    }
    assert {len(values) for values in timer.cpu.values()} == {10}
    *rows, total = timer.rows()
    assert total == ("all", sum(row[1] for row in rows), sum(row[2] or 0 for row in rows))
    assert timer.mean_wait("read the record") >= 0


def test_loader_timer_counts_the_cpu_time_of_workers(sets):
    data = StreamDataset([Records(open_set(sets / "deep"))], seed=1, streams=4, image_size=SIDE)
    timer = timing.LoaderTimer(build_stream_loader(data, micro_batch=2, workers=2))
    assert len(timer._pids) == 2
    before = [timing.process_cpu_seconds(pid) for pid in timer._pids]
    cpu, clock = timer.measure(10)
    used = sum(timing.process_cpu_seconds(pid) for pid in timer._pids) - sum(before)
    assert 0 < used / 14 <= cpu and clock > 0
    timer.close()


def test_demand_follows_from_flops_and_cpu_time():
    rows = {row.student: row for row in estimate_demand(4.0, 518)}
    assert rows.keys() == STUDENT_GFLOPS.keys()
    assert rows["vits"].images_per_s == [717, 717] and rows["vits"].cores == [2.9, 2.9]
    assert rows["vitl"].images_per_s == [63, 101] and rows["vitl"].cores == [0.3, 0.4]
    assert estimate_demand(4.0, 259)[0].images_per_s[0] == 2867  # a quarter of the pixels


def test_bench_data(sets, capsys, tmp_path):
    small = ["--image-size", "28", "--samples", "4", "--batch-size", "2"]
    where = ["bench-data", str(sets / "photos"), "--labels", str(sets / "labels")]
    assert main([*where, *small, "--workers", "1", "2", "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    for text in (
        f"{RECORDS} records",
        "decode the label",
        "2 workers",
        "no GPU was measured",
        "vitl",
    ):
        assert text in out
    figures = json.loads((tmp_path / "x.json").read_text())
    assert [row["workers"] for row in figures["loader"]] == [1, 2]
    assert figures["image_bytes"] > 100 and figures["label_bytes"] > 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photos"], "--labels"),
        (["labels"], "--labels"),
        (["nowhere"], "nowhere"),
        (["deep", "--workers", "0"], "--workers must be a whole number"),
        (["deep", "--samples", "0"], "--samples must be a whole number"),
    ],
)
def test_bench_data_invalid_arguments(sets, capsys, arguments, said):
    assert main(["bench-data", str(sets / arguments[0]), *arguments[1:]]) == 2
    assert said in capsys.readouterr().err
