"""Reading shards from disks that fail for a moment or for good: no bad records, no change of the training data."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from shard_builders import make, records

from depth_anything.data import dataset, retry
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.reader import JoinedRecords, Records, ShardReader
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, verify_set, write_manifest
from depth_anything.data.tars import BadRecord, StorageUnavailable, write_shard

PASSING = [
    errno.ESTALE,
    errno.EIO,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENETUNREACH,
]


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Record the waits instead of sleeping."""
    seconds = []
    monkeypatch.setattr(retry, "sleep", seconds.append)
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "2")
    retry._reported.clear()
    return seconds


def failing(monkeypatch, number, *, times, name="pread", of=""):
    """Let a function of os fail `times` times for paths that end with `of`."""
    plain, left = getattr(os, name), [times]

    def fail(first, *arguments, **options):
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
        if left[0] and path.endswith(of):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return plain(first, *arguments, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_temporary_disk_errors_are_retried_and_reported_once(tmp_path, monkeypatch, waits, capfd, number):
    read = Records(make(tmp_path))
    failing(monkeypatch, number, times=2)
    assert [read.read("set/000001", i) for i in range(5)] == records("000001")
    assert waits == [0.5, 1.0]
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "000001.tar" in said and os.strerror(number) in said


@pytest.mark.parametrize("number", [*PASSING, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["pread", "open"])
def test_lasting_disk_errors_stop_the_run(tmp_path, monkeypatch, number, name):
    read = Records(make(tmp_path))
    with monkeypatch.context() as patched:
        failing(patched, number, times=100, name=name, of=".tar")
        with pytest.raises(StorageUnavailable, match="000001.tar"):
            read.read("set/000001", 2)
    assert read.read("set/000001", 2) == records("000001")[2]  # the record is not marked as bad


def test_stale_handle_is_opened_again(tmp_path, monkeypatch):
    made, read, opened = make(tmp_path), None, []
    read = Records(made)
    read.read("set/000001", 0)
    plain = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **more: opened.append(path) or plain(path, *rest, **more)
    )
    failing(monkeypatch, errno.ESTALE, times=1)
    assert read.read("set/000001", 1) == records("000001")[1]
    assert [str(path) for path in opened] == [made.url("000001")]


def test_short_reads_are_continued(tmp_path, monkeypatch):
    read, plain = Records(make(tmp_path)), os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, start: plain(file, min(count, 100), start))
    assert read.read("set/000001", 3) == records("000001")[3]


@pytest.mark.parametrize("name", ["stat", "read_text"])
def test_index_on_a_failing_disk_stops_the_run(tmp_path, monkeypatch, name):
    make(tmp_path)

    def fail(path, *arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, name, fail)
    with pytest.raises(StorageUnavailable, match="000001.tar"):
        ShardReader().read(tmp_path / "000001.tar", 0)


def test_manifest_on_a_failing_disk_is_read_again(tmp_path, monkeypatch, waits):
    made, plain, left = make(tmp_path), Path.read_bytes, [2]

    def fail(path):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert open_set(tmp_path) == made and waits == [0.5, 1.0]


def test_folder_on_a_failing_disk_is_not_reported_as_missing(tmp_path, monkeypatch, waits):
    made = make(tmp_path)
    failing(monkeypatch, errno.ESTALE, times=2, name="stat", of=tmp_path.name)
    assert open_set(tmp_path) == made and waits == [0.5, 1.0]
    failing(monkeypatch, errno.EIO, times=100, name="stat", of=tmp_path.name)
    with pytest.raises(StorageUnavailable, match=str(tmp_path)):
        open_set(tmp_path)


def test_missing_shard_is_a_bad_record_and_missing_set_stops_the_run(tmp_path):
    read = Records(make(tmp_path / "set"))
    (tmp_path / "set" / "000001.tar").unlink()
    with pytest.raises(BadRecord, match="000001.tar"):
        read.read("set/000001", 0)
    read.read("set/000002", 0)
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "set").mkdir()  # an empty mount point
    with pytest.raises(StorageUnavailable, match=f"{tmp_path}/set"):
        read.read("set/000001", 0)


def labelled(root, name="set", count=6):
    rows = []
    for i in range(count):
        image = np.full((32, 32, 3), 10 * i, np.uint8)
        frame = Frame("", image, {}, depth=np.full((32, 32), 1.0 + i, np.float32))
        rows.append((f"{name}/00000/{i:07d}", encode_frame(frame, codec="f32")))
    info = write_shard(root / "00000.tar", rows)
    return write_manifest(root, name=name, shards=[info], meta={})


def samples(sources):
    return StreamDataset(sources, seed=3, streams=2, image_size=28)


def test_batches_are_the_same_after_temporary_disk_errors(tmp_path, monkeypatch):
    one, other = labelled(tmp_path / "one", "one"), labelled(tmp_path / "other", "other")
    wanted = samples([Records(one), Records(other)]).__getitems__(range(12))
    data = samples([Records(one), Records(other)])
    with monkeypatch.context() as patched:
        failing(patched, errno.EIO, times=100, of="one/00000.tar")
        with pytest.raises(StorageUnavailable, match="one/00000.tar"):
            data.__getitems__(range(12))
    failing(monkeypatch, errno.ETIMEDOUT, times=2, of="one/00000.tar")
    got = data.__getitems__(range(12))
    assert not got["failed"] and (got["target"] == wanted["target"]).all()


def test_labels_on_a_failing_disk_stop_the_run(tmp_path, monkeypatch):
    images = labelled(tmp_path / "images")
    keys = ShardReader().keys(images.url("00000"))
    info = write_shard(tmp_path / "labels" / "00000.tar", [(key, {"disparity.q12": b"x"}) for key in keys])
    meta = {"images": {"set": "set", "hashes": {"00000": images.shards[0].hash}}}
    labels = write_manifest(tmp_path / "labels", name="set", shards=[info], meta=meta)
    for folder in ("images", "labels"):
        with monkeypatch.context() as patched:
            failing(patched, errno.ESTALE, times=100, of=f"{folder}/00000.tar")
            with pytest.raises(StorageUnavailable, match=f"{folder}/00000.tar"):
                JoinedRecords(images, labels).read("set/00000", 0)


def test_full_memory_stops_training(tmp_path, monkeypatch):
    data = samples([Records(labelled(tmp_path))])

    def fail(fields):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(dataset, "decode_image_and_meta", fail)
        with pytest.raises(StorageUnavailable, match="set/00000"):
            data[0]
    assert not data[0]["failed"]


def test_verify_reports_an_unreadable_shard_and_continues(tmp_path, monkeypatch):
    make(tmp_path)
    (tmp_path / "000002.idx").unlink()
    plain = open

    def fail(path, *arguments, **options):
        if str(path).endswith("000001.tar"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", fail)
    one, other = verify_set(tmp_path)
    assert "000001.tar" in one and "Input/output error" in one and "000002.idx is missing" in other
