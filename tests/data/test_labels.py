import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from depth_anything.data.codec import decode, encode
from depth_anything.data.labels import (
    LabelSetWriter,
    finish_labels,
    open_labels,
    read_label_sidecar,
    write_label_sidecar,
)
from depth_anything.data.reader import JoinedRecords
from depth_anything.data.shards import open_set, verify_set, write_manifest
from depth_anything.data.store import FolderStore
from depth_anything.data.tars import ShardError, ShardInfo, write_shard

TEACHER = {"fingerprint": "sha256:" + "a" * 64, "file": "teacher/model.safetensors"}
COUNT = 4


def make_images(root, shards=("a", "b", "c"), text="picture"):
    infos = []
    for shard in shards:
        fields = {"jpg": f"{text} of {shard}".encode(), "json": b"{}"}
        infos.append(
            write_shard(Path(root, f"{shard}.tar"), [(f"set/{shard}/{i}", fields) for i in range(COUNT)])
        )
    return write_manifest(root, name="set", shards=infos, meta={})


def label_set(root, images, *, teacher=TEACHER, preprocessing="518", codec="q12"):
    return LabelSetWriter(root, images, teacher=teacher, preprocessing=preprocessing, codec=codec)


def values(shard, index):
    return np.float32(ord(shard[0]) + index) + np.arange(6, dtype=np.float32).reshape(2, 3)


def label(labels, shard, failed=()):
    backwards = reversed(range(COUNT))  # in another order, as in batches by shape
    made = {i: encode(values(shard, i), codec=labels.codec) for i in backwards if i not in failed}
    labels.publish(shard, made, [(i, "truncated jpeg") for i in failed])


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def finished(root, images, **failed):
    labels = label_set(root, images)
    for shard in images.shards:
        label(labels, shard.name, failed.get(shard.name, ()))
    assert labels.finish()
    return labels


def test_labels_from_start_to_finish(tmp_path, images):
    root = tmp_path / "labels" / "set"
    labels = label_set(root, images)
    assert labels.count_unlabeled_images() == 12 and not labels.finish()
    label(labels, "b", failed=[0, 2])
    assert labels.done("b") and not labels.done("a") and labels.count_unlabeled_images() == 8
    label(labels, "a")
    assert not labels.finish() and finish_labels(root, images) is None
    label(label_set(root, images), "c")
    assert labels.finish() and label_set(root, images).count_unlabeled_images() == 0
    opened = open_labels(root, images)
    assert opened == open_set(root) == finish_labels(root, images)
    renamed = open_set(images.root, name="other")
    assert JoinedRecords(renamed, open_labels(root, renamed)).shards[0] == ("other/a", 4)
    assert opened.name == "set" and opened.records == 10 and opened.meta["skipped"] == 2
    assert opened.meta["teacher"] == TEACHER and opened.meta["codec"] == "q12"
    assert verify_set(root, decode=True) == []
    joined = JoinedRecords(images, opened)
    assert joined.shards == [("set/a", 4), ("set/b", 2), ("set/c", 4)]
    for index, number in enumerate((1, 3)):
        key, fields = joined.read("set/b", index)
        assert key == f"set/b/{number}" and fields["jpg"] == b"picture of b"
        np.testing.assert_allclose(decode(fields["disparity.q12"]), values("b", number), atol=5 / 8190)


def test_sidecar_records_shard_images_teacher_and_skipped(tmp_path, images):
    finished(tmp_path / "labels", images, b=[3])
    content = json.loads((tmp_path / "labels" / "b.json").read_text())
    info = open_set(tmp_path / "labels").shards[1]
    assert (content["name"], content["records"], content["bytes"], content["hash"]) == (
        "b",
        3,
        info.bytes,
        info.hash,
    )
    assert content["image"] == {"set": "set", "records": 4, "hash": images.shards[1].hash}
    assert content["teacher"] == TEACHER and content["preprocessing"] == "518" and content["codec"] == "q12"
    assert content["values"] == [98.0, 105.0] and content["skipped"] == {"set/b/3": "truncated jpeg"}
    assert content == asdict(read_label_sidecar(tmp_path / "labels", "b"))


def test_same_labels_same_bytes(tmp_path, images):
    finished(tmp_path / "one", images, a=[1])
    labels = label_set(tmp_path / "other", images)
    for shard in "cba":
        label(labels, shard, [1] if shard == "a" else [])
    assert labels.finish()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_every_image_has_a_label_or_a_reason(tmp_path, images):
    labels = label_set(tmp_path / "labels", images)
    data = encode(values("a", 0), codec="q12")
    for made, failed in (
        ({0: data, 1: data, 2: data}, []),
        ({0: data, 1: data, 2: data, 3: data}, [(3, "twice")]),
        ({0: data, 1: data, 2: data, 4: data}, []),
        ({}, [(0, "x"), (0, "x"), (1, "x"), (2, "x")]),
    ):
        with pytest.raises(ShardError, match="labels/a: .* 4 images"):
            labels.publish("a", made, failed)
    assert not labels.done("a") and not (tmp_path / "labels").exists()
    with pytest.raises(ShardError, match="a: 4 images, but 2 labels and 1 skipped"):
        write_label_sidecar(
            tmp_path,
            ShardInfo("a", 2, 10240, "sha256:0"),
            image_set="set",
            image=images.shards[0],
            teacher=TEACHER,
            preprocessing="",
            codec="q12",
            values=(0, 1),
            skipped={"k": "reason"},
        )


def test_shard_without_labels_is_left_out_of_the_manifest(tmp_path, images):
    finished(tmp_path / "labels", images, b=[0, 1, 2, 3])
    opened = open_labels(tmp_path / "labels", images)
    assert [shard.name for shard in opened.shards] == ["a", "c"] and opened.meta["skipped"] == 4
    assert JoinedRecords(images, opened).read("set/c", 0)[0] == "set/c/0"
    assert verify_set(tmp_path / "labels", decode=True) == []


def test_images_of_an_unreadable_shard_are_skipped(tmp_path, images):
    labels = label_set(tmp_path / "labels", images)
    (tmp_path / "images" / "a.tar").write_bytes(b"")
    labels.publish("a", {}, [(i, "a.tar is empty") for i in range(COUNT)])
    assert len(read_label_sidecar(tmp_path / "labels", "a").skipped) == COUNT and labels.done("a")


def test_unfinished_sets_need_allow_partial(tmp_path, images):
    root = tmp_path / "labels"
    with pytest.raises(ShardError, match="labels .*stage=pseudolabel"):
        open_labels(root, images)
    root.mkdir()
    for count, shard in enumerate("ca"):
        with pytest.raises(ShardError, match=f"{count} of 3 .*stage=pseudolabel.*allow_partial=true"):
            open_labels(root, images)
        label(label_set(root, images), shard)
    partial = open_labels(root, images, allow_partial=True)
    assert [shard.name for shard in partial.shards] == ["a", "c"]
    assert JoinedRecords(images, partial).read("set/c", 2)[0] == "set/c/2"
    label(label_set(root, images), "b")
    frozen = open_labels(root, images, allow_partial=True, only=["a", "c"])
    assert frozen == partial and JoinedRecords(images, frozen).digest == JoinedRecords(images, partial).digest
    assert open_labels(root, images, allow_partial=True).records == 12
    label_set(root, images).finish()
    assert open_labels(root, images, allow_partial=True, only=["a", "c"]) == partial
    (root / "a.json").unlink()
    with pytest.raises(ShardError, match="shard a, .*stage=pseudolabel"):
        open_labels(root, images, allow_partial=True, only=["a", "c"])


def test_allow_partial_needs_one_finished_shard(tmp_path, images):
    (tmp_path / "labels").mkdir()
    with pytest.raises(ShardError, match="labels .*stage=pseudolabel"):
        open_labels(tmp_path / "labels", images, allow_partial=True)


OTHER = {"fingerprint": "sha256:" + "b" * 64, "file": "other.safetensors"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": OTHER},
            r"teacher/model.safetensors \(sha256:a+\), not by other.safetensors \(sha256:b+\)",
        ),
        ({"preprocessing": "700"}, "preprocessing '518', not '700'"),
        ({"codec": "f32"}, "codec 'q12', not 'f32'"),
    ],
)
def test_labels_of_another_teacher_are_refused(tmp_path, images, change, message):
    root = tmp_path / "labels"
    label(label_set(root, images), "b")
    with pytest.raises(ShardError, match=f"{message}.*labels=FOLDER"):
        label_set(root, images, **change)
    # A process with a second teacher that started before the first one had written a shard fails later.
    late = label_set(tmp_path / "elsewhere", images, **change)
    late.store = FolderStore(root)
    with pytest.raises(ShardError, match=message):
        late.done("b")
    label(late, "a")
    label(late, "c")
    with pytest.raises(ShardError, match="labels=FOLDER"):
        finish_labels(root, images)
    with pytest.raises(ShardError, match="labels=FOLDER"):
        open_labels(root, images, allow_partial=True)


def test_labels_of_other_images_are_refused(tmp_path, images):
    root = tmp_path / "labels"
    finished(root, images)
    others = make_images(tmp_path / "others", text="other picture")
    for call in (open_labels, finish_labels, label_set):
        with pytest.raises(ShardError, match="images.*labels=FOLDER"):
            call(root, others)
    (root / "manifest.json").unlink()
    for call in (finish_labels, label_set):
        with pytest.raises(ShardError, match="images.*labels=FOLDER"):
            call(root, others)
    with pytest.raises(ShardError, match="images.*labels=FOLDER"):
        open_labels(root, others, allow_partial=True)


def test_images_added_later_need_labels(tmp_path, images):
    root = tmp_path / "labels"
    finished(root, images)
    more = make_images(tmp_path / "images", ("a", "b", "c", "d"))
    assert open_labels(root, more).records == 12
    assert finish_labels(root, more) is None
    labels = label_set(root, more)
    assert labels.count_unlabeled_images() == 4 and not labels.finish()
    label(labels, "d")
    assert labels.finish() and open_labels(root, more).records == 16


def swap(one, other):
    spare = one.with_name("spare")
    os.replace(one, spare)
    os.replace(other, one)
    os.replace(spare, other)


@pytest.mark.parametrize("ends", [("tar",), ("idx",), ("json",), ("tar", "idx"), ("tar", "idx", "json")])
def test_swapped_labels_are_refused(tmp_path, images, ends):
    root = tmp_path / "labels"
    finished(root, images)
    for end in ends:
        swap(root / f"a.{end}", root / f"b.{end}")
    joined = JoinedRecords(images, open_labels(root, images))
    pairs = set()
    for shard, count in joined.shards:
        for index in range(count):
            try:
                key, fields = joined.read(shard, index)
            except ValueError:
                continue
            number = int(key[-1])
            assert fields["jpg"] == f"picture of {key[4]}".encode()
            np.testing.assert_allclose(decode(fields["disparity.q12"]), values(key[4], number), atol=5 / 8190)
            pairs.add(key[:5])
    assert "set/c" in pairs and (ends == ("json",) or "set/a" not in pairs)
    assert verify_set(root)
    (root / "manifest.json").unlink()
    if ends != ("tar",):  # tars of equal size: the checksums differ when they are read
        assert finish_labels(root, images) is None
        with pytest.raises(ShardError, match=r"[ab]\.json .*stage=pseudolabel"):
            open_labels(root, images, allow_partial=True)


def test_damaged_sidecars_are_written_again(tmp_path, images):
    root = tmp_path / "labels"
    finished(root, images)
    (root / "manifest.json").unlink()
    for damage in (b"", b"{}", b"[]", b"\xff", b'{"name": "b"}'):
        (root / "b.json").write_bytes(damage)
        with pytest.raises(ShardError, match="b.json.*stage=pseudolabel"):
            open_labels(root, images)
        assert finish_labels(root, images) is None
        assert not label_set(root, images).done("b")
    label(label_set(root, images), "b")
    assert finish_labels(root, images).records == 12 and verify_set(root, decode=True) == []


def test_shard_without_sidecar_is_written_again(tmp_path, images):
    root = tmp_path / "labels"
    finished(root, images)
    (root / "manifest.json").unlink()
    write_shard(root / "b.tar", [("set/b/0", {"disparity.q12": b"another try"})])
    assert not label_set(root, images).done("b")
    label(label_set(root, images), "b")
    assert label_set(root, images).finish() and verify_set(root, decode=True) == []


def test_labeling_a_shard_again_unfinishes_the_set(tmp_path, images):
    root = tmp_path / "labels"
    labels = finished(root, images)
    before = open_labels(root, images)
    label(labels, "b", failed=[1])
    with pytest.raises(ShardError, match="3 of 3 "):
        open_labels(root, images)
    assert labels.finish() and open_labels(root, images).records == before.records - 1


WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_labels import *
images = open_set(sys.argv[1])
labels = label_set(sys.argv[2], images)
print("ready", flush=True)
while not labels.finish():
    for shard in images.shards:
        if not labels.done(shard.name):
            label(labels, shard.name, [1] if shard.name < "d" else [])
            break
"""


def test_killed_processes_label_every_image_once(tmp_path):
    """Kill two labeling processes and start them again; the set is the same as without the kill."""
    images = make_images(tmp_path / "images", [f"{chr(97 + i // 9)}{i % 9}" for i in range(40)])
    root = tmp_path / "labels"
    command = [sys.executable, "-c", WORKER.format(tests=str(Path(__file__).parent)), images.root, str(root)]
    for attempt in range(2):
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        for worker in workers:
            assert worker.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        for worker in workers:
            if attempt < 1:
                worker.send_signal(signal.SIGKILL)
            assert worker.wait() in (0, -signal.SIGKILL)
            worker.stdout.close()
    opened = open_labels(root, images)
    skipping = [shard.name for shard in images.shards if shard.name < "d"]
    assert opened.records == 40 * COUNT - len(skipping) and verify_set(root, decode=True) == []
    straight = label_set(tmp_path / "straight", images)
    for shard in images.shards:
        label(straight, shard.name, [1] if shard.name < "d" else [])
    assert straight.finish()
    visible = [path for path in root.iterdir() if not path.name.startswith(".")]
    assert {p.name: p.read_bytes() for p in visible} == {
        p.name: p.read_bytes() for p in (tmp_path / "straight").iterdir()
    }
    assert not list(root.glob(".tmp.*"))
