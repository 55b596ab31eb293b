import itertools
import json
import pickle
import re
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as reference

from depth_anything.data.dataset import StreamDataset
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.sample import Frame, decode_record, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.stream import MicroBatchSampler
from depth_anything.data.tars import BadRecord, write_shard
from depth_anything.data.transforms import draw_crop, draw_cutmix_box, draw_perturbation

SIZES = {"0": 7, "1": 1, "2": 12}
OPTIONS = {"seed": 5, "streams": 6, "image_size": 28}


def frame(key, number, height=40, width=52):
    rng = np.random.default_rng(number)
    image = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (width, height))
    depth = rng.uniform(0.5, 20, (height, width)).astype(np.float32)
    depth[:5] = np.inf
    depth[5:8, ::3] = np.nan
    return Frame(key, image, {"sky": "inf", "number": number}, depth=depth)


def record(key, number, **size):
    made = frame(key, number, **size)
    png = cv2.imencode(".png", made.image[..., ::-1])[1].tobytes()
    return encode_frame(made, codec="f32", original=png)


def write_set(root, name, start, labels_of=None):
    rows, number = [], start
    for shard, count in SIZES.items():
        records = []
        for i in range(count):
            key = f"{name}/{shard}/{i}"
            fields = record(key, number + i, height=40 + 4 * (i % 3))
            if labels_of:  # labels are smaller than their images, of several shapes
                disparity = np.random.default_rng(number + i).random((28 + i % 2 * 14, 42), np.float32)
                fields = encode_frame(
                    Frame(key, np.zeros((1, 1, 3), np.uint8), disparity=disparity), codec="f32"
                )
                fields = {"disparity.f32": fields["disparity.f32"]}
            records.append((key, fields))
        rows.append(write_shard(root / f"{shard}.tar", records))
        number += count
    made_from = (
        {"images": {"hashes": {shard.name: shard.hash for shard in labels_of.shards}}} if labels_of else {}
    )
    return write_manifest(root, name=name, shards=rows, meta=made_from)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return {name: write_set(root / name, name, start) for name, start in (("a", 0), ("b", 100))}


class MemoryRecords:
    """A record source without files, some of whose records are bad."""

    name, digest = "m", "sha256:0"

    def __init__(self, sizes, bad=(), lost=(), cut=(), bare=()):
        self.shards = [(f"m/{name}", count) for name, count in sizes.items()]
        self.bad, self.lost, self.cut, self.bare, self.reads = set(bad), lost, cut, bare, Counter()

    def read(self, shard, index):
        self.reads[shard, index] += 1
        key = f"k{shard[2:]}-{index}"
        if shard in self.lost:
            raise BadRecord(shard, index, "", "the shard is gone")
        if (shard, index) in self.bad:
            raise BadRecord(shard, index, key, "crc")
        fields = record(key, index)
        if (shard, index) in self.cut:
            fields["png"] = fields["png"][:200]
        if shard in self.bare:
            del fields["depth.f32"]
        return key, fields


def plain_sample(source, n, stream, side=28, short=28):
    """Sample n with plain code: resize the frame with torchvision, convert all of it, then crop."""
    _, shard, index = stream.locate(n)
    made = decode_record(*source.read(shard, index))
    scale = short / min(made.image.shape[:2])
    height, width = (max(round(scale * s / 14) * 14, short) for s in made.image.shape[:2])
    image = torch.from_numpy(made.image).permute(2, 0, 1)
    image = reference.resize(image, [height, width], interpolation=3, antialias=True).permute(1, 2, 0)
    rows, columns = (
        ((np.arange(b) + 0.5) * a / b).astype(int)
        for a, b in zip(made.depth.shape, (height, width), strict=True)
    )
    depth = made.depth[rows][:, columns]
    view = draw_crop(height, width, side, seed=OPTIONS["seed"], n=n)
    cut = (slice(view.top, view.top + side), slice(view.left, view.left + side))
    image, depth = image.numpy()[cut], depth[cut]
    if view.flip:
        image, depth = image[:, ::-1], depth[:, ::-1]
    valid = ~np.isnan(depth)
    return image, np.where(valid, 1 / depth, 0), valid


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name] if name == "failed" else torch.equal(a[name], b[name]), name


def test_micro_batch_shapes_and_content(sets):
    data = StreamDataset([Records(sets["a"]), Records(sets["b"])], **OPTIONS)
    assert data.stream.records == 40
    numbers = [3, 77, 12, 13]
    batch = data.__getitems__(numbers)
    assert {name: (v.dtype, tuple(v.shape)) for name, v in batch.items() if name != "failed"} == {
        "image": (torch.uint8, (4, 28, 28, 3)),
        "target": (torch.float32, (4, 28, 28)),
        "valid": (torch.bool, (4, 28, 28)),
        "sample": (torch.int64, (4,)),
    }
    assert batch["sample"].tolist() == numbers and batch["failed"] == []
    seen = set()
    for i, n in enumerate(numbers):
        shard = data.stream.locate(n)[1]
        seen.add(shard[0])
        image, target, valid = plain_sample(Records(sets[shard[0]]), n, data.stream)
        assert (batch["image"][i].numpy() == image).all()
        assert (batch["valid"][i].numpy() == valid).all() and not valid.all()
        np.testing.assert_allclose(batch["target"][i], target, rtol=1e-6)
        assert (batch["target"][i][batch["valid"][i]] == 0).any()  # the sky, far and valid
    assert seen == {"a", "b"}


def test_sky_policy_and_short_side(sets):
    options = {**OPTIONS, "short_side": 42, "sky": "invalid"}
    data = StreamDataset([Records(sets["a"])], **options)
    batch = data.__getitems__(list(range(8)))
    assert (batch["target"][batch["valid"]] > 0).all() and (batch["target"][~batch["valid"]] == 0).all()
    far = StreamDataset([Records(sets["a"])], **{**options, "sky": "far"}).__getitems__(list(range(8)))
    assert far["valid"].sum() > batch["valid"].sum()
    for n in range(8):
        image, _, _ = plain_sample(Records(sets["a"]), n, data.stream, short=42)
        assert (batch["image"][n].numpy() == image).all()


def test_images_are_resized_to_their_labels(sets, tmp_path):
    labels = write_set(tmp_path / "a", "a", 500, labels_of=sets["a"])
    source = JoinedRecords(sets["a"], labels)
    data = StreamDataset([source], **OPTIONS)
    for n in range(20):
        _, shard, index = data.stream.locate(n)
        made = decode_record(*source.read(shard, index))
        height, width = made.disparity.shape
        assert (height, width) == (28 + index % 2 * 14, 42) and made.image.shape[0] > height - 3
        view = draw_crop(height, width, 28, seed=5, n=n)
        cut = (slice(view.top, view.top + 28), slice(view.left, view.left + 28))
        image = torch.from_numpy(made.image).permute(2, 0, 1)
        image = reference.resize(image, [height, width], interpolation=3, antialias=True).permute(1, 2, 0)
        turn = np.fliplr if view.flip else np.asarray
        batch = data[n]
        assert (batch["image"][0].numpy() == turn(image.numpy()[cut])).all()
        assert (batch["target"][0].numpy() == turn(made.disparity[cut])).all() and batch["valid"].all()
    with pytest.raises(ValueError, match="image_size=28"):
        StreamDataset([source], **{**OPTIONS, "image_size": 42}).__getitems__(list(range(20)))


def test_perturbation_and_box_by_number(sets):
    data = StreamDataset([Records(sets["a"])], **OPTIONS, perturb=True, cutmix=True)
    batch = data.__getitems__([8, 3])
    assert batch["perturbation"].dtype == batch["box"].dtype == torch.float32
    assert batch["perturbation"].numpy().tolist() == [draw_perturbation(5, n).tolist() for n in (8, 3)]
    assert batch["box"].numpy().tolist() == [draw_cutmix_box(5, n).tolist() for n in (8, 3)]


@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, "fork"), (2, "fork"), (1, "spawn")])
def test_sample_depends_only_on_its_number(sets, workers, start):
    data = StreamDataset([Records(sets["a"]), Records(sets["b"])], **OPTIONS, perturb=True)
    expected = {n: data[n] for n in range(36, 60)}  # into pass 2
    fresh = StreamDataset([Records(sets["b"]), Records(sets["a"])], **OPTIONS, perturb=True)
    seen = []
    world = 1 if start == "spawn" else 2  # each start of spawned workers takes seconds
    for rank in range(world):
        batches = MicroBatchSampler(rank=rank, world=world, size=6 // world, start=6)
        loader = DataLoader(
            fresh, batch_sampler=batches, collate_fn=dict, num_workers=workers, multiprocessing_context=start
        )
        for batch in itertools.islice(loader, 4):
            for i, n in enumerate(batch["sample"].tolist()):
                alone = {name: v if name == "failed" else v[i : i + 1] for name, v in batch.items()}
                same(alone, expected[n])
                seen.append(n)
    assert sorted(seen) == list(range(36, 60))


def test_workers_leave_cv2_one_thread(sets):
    class Told(StreamDataset):
        def __getitems__(self, numbers):
            super().__getitems__(numbers)
            return {"cv2": cv2.getNumThreads(), "torch": torch.get_num_threads()}

    before = cv2.getNumThreads()
    data = Told([Records(sets["a"])], **OPTIONS)
    batches = MicroBatchSampler(rank=0, world=1, size=1)
    loader = DataLoader(
        data, batch_sampler=batches, collate_fn=dict, num_workers=1, multiprocessing_context="fork"
    )
    assert next(iter(loader)) == {"cv2": 1, "torch": 1}
    assert data[0] == {"cv2": before, "torch": torch.get_num_threads()}


def test_dataset_pickles(sets):
    data = StreamDataset([Records(sets["a"])], **OPTIONS)
    first = data[7]
    same(pickle.loads(pickle.dumps(data))[7], first)


def test_bad_records_are_replaced_and_keep_their_numbers():
    bad = [("m/0", 2), ("m/0", 3), ("m/1", 0), ("m/2", 11)]
    cut = [("m/2", 4)]
    source = MemoryRecords(SIZES, bad=bad, cut=cut)
    data = StreamDataset([source], **OPTIONS)
    place = {data.stream.locate(n)[1:]: n for n in range(20)}
    batch = data.__getitems__(list(range(20)))
    assert batch["sample"].tolist() == list(range(20))
    named = [re.fullmatch(r"(.+)\[(\d+)\] (.+?): (.+)", failure).groups() for failure in batch["failed"]]
    assert sorted((shard, int(index)) for shard, index, _, _ in named) == sorted(bad + cut)  # each once
    assert {key for _, _, key, _ in named} == {"k0-2", "k0-3", "k1-0", "k2-11", "k2-4"}
    assert [reason for *_, key, reason in named if key == "k0-2"] == ["crc"]
    assert [failure for failure in batch["failed"] if "k2-4: png" in failure]
    replacement = {("m/0", 2): 4, ("m/0", 3): 4, ("m/2", 11): 0, ("m/2", 4): 5}
    for (shard, index), n in place.items():
        if shard == "m/1":
            continue
        wanted = replacement.get((shard, index), index)
        made = frame("", wanted)  # content of the replacement, crop of sample n
        view = draw_crop(28, 42, 28, seed=5, n=n)
        image = torch.from_numpy(np.ascontiguousarray(made.image)).permute(2, 0, 1)
        image = reference.resize(image, [28, 42], interpolation=3, antialias=True).permute(1, 2, 0).numpy()
        image = image[:, view.left : view.left + 28]
        assert (batch["image"][n].numpy() == (image[:, ::-1] if view.flip else image)).all(), (shard, index)
    n = place["m/1", 0]  # no other record in its shard: the next shard of the pass
    following = next(p for p in data.stream.replacements(n) if p not in bad + cut)
    assert source.reads[following] >= 2


def test_replacements_do_not_depend_on_what_was_read_before():
    options = {"bad": [("m/0", i) for i in range(1, 6)], "lost": ["m/2"]}
    together = StreamDataset([MemoryRecords(SIZES, **options)], **OPTIONS)
    for n in (*range(20, 0, -3), *range(20)):
        same(together[n], StreamDataset([MemoryRecords(SIZES, **options)], **OPTIONS)[n])
    assert all(
        failure.endswith("] ?: the shard is gone") for failure in together[0]["failed"] if "m/2" in failure
    )


def test_each_sample_tries_a_lost_shard_once():
    source = MemoryRecords({"0": 50, "1": 2000}, lost=["m/1"])
    data = StreamDataset([source], **OPTIONS)
    batch = data.__getitems__(list(range(100)))
    assert 90 < len(batch["failed"]) <= 100
    assert sum(count for (shard, _), count in source.reads.items() if shard == "m/1") == len(batch["failed"])


def test_bad_records_are_tried_twice_at_most():
    bad = [("m/0", i) for i in range(20)]
    source = MemoryRecords({"0": 30}, bad=bad)
    batch = StreamDataset([source], **OPTIONS).__getitems__(list(range(30)))
    assert len(batch["failed"]) == 20
    assert max(source.reads[place] for place in bad) == 2  # under its own number, and as a replacement


def test_all_sets_share_one_reader(sets):
    sources = [Records(sets["a"]), Records(sets["b"])]
    data = StreamDataset(sources, **{**OPTIONS, "streams": 2000})
    first, second = (source._reader for source in sources)
    assert first is second and first.max_open == 64 and first.max_indexes > 2 * 2000
    assert first.total_bytes == sets["a"].bytes + sets["b"].bytes
    data.__getitems__(range(40))
    assert len(first._files) == len(first._indexes) == 6
    first, second = (source._reader for source in pickle.loads(pickle.dumps(data)).sources)
    assert first is second


def test_repeat(sets):
    source = Records(sets["a"])
    assert StreamDataset([source], **OPTIONS, repeat={"a": 3}).stream.records == 3 * 20


def test_benchmark_runs(tmp_path, fork_server):
    path = Path(__file__).parents[2] / "benchmarks" / "bench_data.py"
    command = "--count 2 --height 60 --width 80 --side 28 --batch 2 --repeats 1 --windows 1 --workers 1 --json".split()
    done = fork_server.run([sys.executable, path, *command, tmp_path / "out.json"])
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record.keys() == {"benchmark", "version", "machine", "settings", "results"}
    results = record["results"]
    assert results.keys() == {"stages", "workers"} and results["workers"].keys() == {"1"}
    found = results["workers"]["1"]
    sides = {
        f"{side}{ending}" for side in ("ours", "bare", "bare, image") for ending in ("", ", pre-resized")
    }
    assert found["cpu_ms"].keys() == found["images_per_second"].keys() == sides | {"theirs"}
    assert all(cost["median"] > 0 for cost in found["cpu_ms"].values())
    assert found["ratios"].keys() == found["ratios_by_the_clock"].keys() and len(found["ratios"]) == 6
    assert [name for name, *_ in results["stages"]["ours"]][-3:] == [
        "decode the label",
        "make target and mask",
        "all",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lost": ["m/0", "m/1", "m/2"]}, "the shard is gone"),
        ({"bad": [(f"m/{s}", i) for s, count in SIZES.items() for i in range(count)]}, "crc"),
        ({"bare": ["m/0", "m/1", "m/2"]}, "neither depth nor disparity"),
    ],
)
def test_error_when_no_record_can_be_read(options, reason):
    source = MemoryRecords(SIZES, **options)
    with pytest.raises(ValueError, match=f"sample 4: .*{reason}.*depth-anything verify"):
        StreamDataset([source], **OPTIONS)[4]
    assert max(source.reads.values()) == 1  # each record was tried once


def test_damage_on_disk_is_named(tmp_path):
    made = write_set(tmp_path / "a", "a", 0)
    path = tmp_path / "a" / "2.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b"\x89PNG", len(data) // 2) + 300
    data[place] ^= 0xFF
    path.write_bytes(data)
    dataset = StreamDataset([Records(open_set(tmp_path / "a"))], **OPTIONS)
    (failure,) = dataset.__getitems__(list(range(20)))["failed"]
    assert re.fullmatch(r"a/2\[\d+\] a/2/\d+: .+", failure)
    assert made.records == 20


def test_invalid_arguments(sets):
    source = Records(sets["a"])
    with pytest.raises(ValueError, match="name a;"):
        StreamDataset([source, source], **OPTIONS)
    with pytest.raises(ValueError, match="image_size=28 exceeds short_side=14"):
        StreamDataset([source], **OPTIONS, short_side=14)
    with pytest.raises(ValueError, match="0 shards"):
        StreamDataset([], **OPTIONS)
