"""`verify_set` on pairs: labels and images, listed files and records."""

import json
import re
import shutil

import numpy as np
import pytest

from depth_anything.data.labels import LabelSetWriter
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import index_set, open_set, verify_set, write_manifest
from depth_anything.data.tars import ShardError, write_shard
from depth_anything.preprocess import resize_shape

SIZE = (30, 40)


def fields(*, label=SIZE, quantity="depth", **meta):
    values = np.linspace(1, 2, label[0] * label[1], dtype=np.float32).reshape(label) if label else None
    image = np.full((*SIZE, 3), 99, np.uint8)
    return encode_frame(Frame("", image, meta, **({quantity: values} if label else {})), codec="f32")


def make(root, records, **meta):
    rows = [(f"set/00000/{k:07d}", record) for k, record in enumerate(records)]
    return write_manifest(root, name="set", shards=[write_shard(root / "00000.tar", rows)], meta=meta)


def test_label_size_equals_image_size_or_label_size_of_the_json(tmp_path):
    good = [fields(), fields(label=(15, 20), label_size=[15, 20]), fields(label=None)]
    assert verify_set(make(tmp_path / "a", good).root, decode=True) == []
    bad = [*good, fields(label=(15, 20)), fields(label=(15, 20), label_size=[15, 21])]
    made = make(tmp_path / "b", bad)
    assert verify_set(made.root) == [], "sizes are seen by decoding"
    problems = verify_set(made.root, decode=True)
    assert len(problems) == 2
    for number, problem in zip((3, 4), problems, strict=True):
        assert (
            f"[{number}] set/00000/000000{number}: " in problem
            and "15 x 20" in problem
            and "30 x 40" in problem
        )


def test_listed_files_are_records_or_skipped(tmp_path):
    skipped = {"count": 2, "reasons": {"x": 2}, "files": []}
    assert verify_set(make(tmp_path / "a", [fields()] * 3, settings={"count": 5}, skipped=skipped).root) == []
    assert verify_set(make(tmp_path / "b", [fields()] * 3, settings={"count": 3}).root) == []
    problems = verify_set(make(tmp_path / "c", [fields()] * 2, settings={"count": 5}, skipped=skipped).root)
    assert len(problems) == 1 and all(number in problems[0] for number in ("5 ", "2 records", "2 skipped"))


@pytest.fixture
def pair(tmp_path):
    """Images and their labels: shard 00000 has three images, the second without a label."""
    images = make(tmp_path / "images", [fields(label=None)] * 3)
    return images, label(
        tmp_path / "labels", images, {0: resize_shape(*SIZE, 28), 2: resize_shape(*SIZE, 28)}
    )


def label(root, images, sizes):
    teacher = {"fingerprint": "sha256:0", "file": "t"}
    labels = LabelSetWriter(root, images, teacher=teacher, preprocessing="p", codec="f32")
    maps = {k: fields(label=size, quantity="disparity")["disparity.f32"] for k, size in sizes.items()}
    missing = [(k, "dark") for k in range(3) if k not in sizes]
    labels.publish("00000", maps, missing)
    assert labels.finish()
    return open_set(root)


def test_labels_are_checked_against_their_images(pair):
    images, labels = pair
    assert verify_set(labels.root, decode=True, images=images.root) == []


def test_label_with_an_impossible_aspect_ratio_is_reported(tmp_path, pair):
    images, _ = pair
    labels = label(tmp_path / "bad", images, {0: (28, 42), 1: (28, 28), 2: (42, 28)})
    assert resize_shape(*SIZE, 28) == (28, 42)
    assert verify_set(labels.root, images=images.root) == []
    problems = verify_set(labels.root, decode=True, images=images.root)
    assert len(problems) == 2
    assert re.search(r"\[1\] set/00000/0000001: .* 28 x 28 .* 30 x 40", problems[0])


def test_labels_of_other_images_are_reported(tmp_path, pair):
    images, labels = pair
    other = make(tmp_path / "other", [fields(label=None), *[fields(label=None, x=1)] * 2])
    problems = verify_set(labels.root, images=other.root)
    assert len(problems) == 2 and all("image: the shard set/00000" in problem for problem in problems)
    assert images.root in verify_set(images.root, images=images.root)[0]
    assert str(tmp_path / "nowhere") in verify_set(labels.root, images=tmp_path / "nowhere")[0]


def test_damaged_image_is_reported_with_its_label(tmp_path, pair):
    images, labels = pair
    path = tmp_path / "images" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    (problem,) = verify_set(labels.root, images=images.root)
    assert "[0] set/00000/0000000: image: the checksum" in problem


def test_threads_find_the_same_problems_and_report_progress(tmp_path):
    infos = []
    for k in range(5):
        rows = [(f"set/{k}/{i}", fields(label=(15, 20))) for i in range(k + 1)]
        infos.append(write_shard(tmp_path / f"{k:05d}.tar", rows))
    write_manifest(tmp_path, name="set", shards=infos, meta={})
    told = []
    one = verify_set(tmp_path, decode=True)
    assert verify_set(tmp_path, decode=True, workers=3, tick=told.append) == one and len(one) == 15
    assert sorted(told) == [1, 2, 3, 4, 5]


def test_indexing_again_keeps_the_metadata_of_the_manifest(tmp_path):
    made = make(tmp_path, [fields()], licence="CC0-1.0", pixels={"all": 3})
    (tmp_path / "00000.idx").unlink()
    again = index_set(tmp_path, meta={"licence": "MIT"})
    assert (again.name, again.digest) == (made.name, made.digest)
    assert again.meta == {"licence": "MIT", "pixels": {"all": 3}}


def test_set_that_is_being_written_cannot_be_indexed(tmp_path):
    make(tmp_path, [fields()])
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "settings.json").write_text(json.dumps({}))
    for act in (index_set, open_set):
        with pytest.raises(ShardError, match=f"{tmp_path} .*depth-anything merge"):
            act(tmp_path)
    shutil.rmtree(tmp_path)
