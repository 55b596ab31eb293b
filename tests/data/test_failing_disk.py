"""Disks of ours that fail for a moment, or for good: no record's fault, and no change of what is learnt from."""

import errno
import os
import shutil
import tarfile
from pathlib import Path

import made_source
import numpy as np
import pytest
from PIL import Image
from shard_builders import make, records

from depth_anything.data import dataset, retry
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.reader import JoinedRecords, Records, ShardReader
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, verify_set, write_manifest
from depth_anything.data.tars import BadRecord, StorageUnavailable, write_shard
from depth_anything.ingest import archive_io, maps, video_frames
from depth_anything.ingest.custom import CustomSet, read_image_size
from depth_anything.ingest.find_files import file_line
from depth_anything.ingest.photographs import list_photographs, write_images
from depth_anything.ingest.writer import write_source
from depth_anything.inspect.dataset_check import check_dataset

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
    """The seconds that would have been waited."""
    told = []
    monkeypatch.setattr(retry, "sleep", told.append)
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "2")
    retry._reported.clear()
    return told


def failing(monkeypatch, number, *, times, name="pread", of=""):
    """Let a function of os fail so many times, of paths that end so."""
    plain, left = getattr(os, name), [times]

    def fail(first, *arguments, **options):
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
        if left[0] and path.endswith(of):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return plain(first, *arguments, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_a_moment_of_a_failing_disk_is_survived(tmp_path, monkeypatch, waits, capfd, number):
    read = Records(make(tmp_path))
    failing(monkeypatch, number, times=2)
    assert [read.read("set/000001", i) for i in range(5)] == records("000001")
    assert waits == [0.5, 1.0]
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "000001.tar" in said and os.strerror(number) in said


@pytest.mark.parametrize("number", [*PASSING, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["pread", "open"])
def test_a_disk_that_goes_on_failing_is_an_outage_and_no_bad_record(tmp_path, monkeypatch, number, name):
    read = Records(make(tmp_path))
    with monkeypatch.context() as patched:
        failing(patched, number, times=100, name=name, of=".tar")
        with pytest.raises(StorageUnavailable, match="000001.tar cannot be read for now"):
            read.read("set/000001", 2)
    assert read.read("set/000001", 2) == records("000001")[2]  # nothing of it is remembered


def test_a_stale_handle_is_opened_anew(tmp_path, monkeypatch):
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


def test_a_read_that_gives_less_than_asked_is_gone_on_with(tmp_path, monkeypatch):
    read, plain = Records(make(tmp_path)), os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, start: plain(file, min(count, 100), start))
    assert read.read("set/000001", 3) == records("000001")[3]


@pytest.mark.parametrize("name", ["stat", "read_text"])
def test_an_index_that_cannot_be_read_for_now_is_no_bad_record(tmp_path, monkeypatch, name):
    make(tmp_path)

    def fail(path, *arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, name, fail)
    with pytest.raises(StorageUnavailable, match="000001.tar cannot be read for now"):
        ShardReader().read(tmp_path / "000001.tar", 0)


def test_a_manifest_that_cannot_be_read_for_now_is_read_again(tmp_path, monkeypatch, waits):
    made, plain, left = make(tmp_path), Path.read_bytes, [2]

    def fail(path):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert open_set(tmp_path) == made and waits == [0.5, 1.0]


def test_a_folder_that_cannot_be_looked_at_for_now_is_not_called_missing(tmp_path, monkeypatch, waits):
    made = make(tmp_path)
    failing(monkeypatch, errno.ESTALE, times=2, name="stat", of=tmp_path.name)
    assert open_set(tmp_path) == made and waits == [0.5, 1.0]
    failing(monkeypatch, errno.EIO, times=100, name="stat", of=tmp_path.name)
    with pytest.raises(StorageUnavailable, match="cannot be read for now"):
        open_set(tmp_path)


def test_a_shard_that_is_gone_is_lost_but_a_set_that_is_gone_is_an_outage(tmp_path):
    read = Records(make(tmp_path / "set"))
    (tmp_path / "set" / "000001.tar").unlink()
    with pytest.raises(BadRecord, match="is missing"):
        read.read("set/000001", 0)
    read.read("set/000002", 0)
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "set").mkdir()  # where a disk was mounted
    with pytest.raises(StorageUnavailable, match="set is gone"):
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


def test_training_data_is_the_same_after_a_moment_and_stops_after_more(tmp_path, monkeypatch):
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


def test_labels_are_no_more_lost_than_images(tmp_path, monkeypatch):
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


def test_a_full_memory_stops_training_and_is_no_bad_record(tmp_path, monkeypatch):
    data = samples([Records(labelled(tmp_path))])

    def fail(fields):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(dataset, "decode_image_and_meta", fail)
        with pytest.raises(StorageUnavailable, match="set/00000.*memory"):
            data[0]
    assert not data[0]["failed"]


def test_verify_names_a_shard_that_cannot_be_read_and_goes_on(tmp_path, monkeypatch):
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


def test_raw_files_of_a_failing_disk_are_not_left_out(tmp_path, monkeypatch):
    """Each way to read a raw file says that the disk fails; none takes it for a broken file."""
    for folder in ("rgb", "depth"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb" / "1.png")
    np.save(tmp_path / "depth" / "1.npy", np.ones((8, 8), np.float32))
    custom = CustomSet(tmp_path, "rgb", "depth")
    photograph = list_photographs(tmp_path / "rgb")[0]

    def fail(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "1")

    for act in (
        lambda: read_image_size(tmp_path / "rgb" / "1.png"),
        lambda: maps.read_map_size(tmp_path / "depth" / "1.npy"),
        lambda: maps.read_npy(tmp_path / "depth" / "1.npy"),
        lambda: file_line("1.png", tmp_path / "rgb" / "1.png"),
        photograph.read,
        lambda: check_dataset(custom),
    ):
        with monkeypatch.context() as patched:
            patched.setattr("builtins.open", fail)
            patched.setattr(Path, "stat", fail)
            patched.setattr(os, "stat", fail)
            patched.setattr(Path, "read_bytes", fail)
            with pytest.raises(OSError, match="Input/output error"):
                act()


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    for folder in ("rgb/a", "rgb/b", "depth/a", "depth/b"):
        (tmp_path / folder).mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / "rgb" / name / "1.png")
        np.save(tmp_path / "depth" / name / "1.npy", np.ones((8, 8), np.float32))
    plain = os.scandir

    def fail(path):
        if str(path).endswith("rgb/b"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(ValueError, match="rgb/b cannot be listed: Input/output error"):
        CustomSet(tmp_path, "rgb", "depth").pair()


def test_a_raw_file_that_fills_the_memory_is_left_out_alone(tmp_path, monkeypatch):
    raw, plain = made_source.fill(tmp_path / "raw"), made_source.read

    def read(folder, line):
        if line.startswith("room/02\t"):
            raise MemoryError
        return plain(folder, line)

    monkeypatch.setattr(made_source, "read", read)
    made = write_source(made_source, raw, tmp_path / "set")
    assert made is not None
    assert ["room/02", "it needs more memory than there is"] in made.meta["skipped"]["files"]
    assert made.records == 23 - 5 - 1


def toy(folder, lines="a/1\na/2\na/3"):
    raw = made_source.fill(folder)
    (raw / "toy.txt").write_text(lines)
    return raw


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT], ids=errno.errorcode.get)
def test_a_raw_folder_on_a_disk_that_fails_for_a_moment_is_read_again(tmp_path, monkeypatch, waits, number):
    raw, plain, left = toy(tmp_path / "raw"), made_source.read, [2]
    whole = write_source(made_source, raw, tmp_path / "whole", name="toy")

    def read(folder, line):
        if line.startswith("a/2") and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), line)
        return plain(folder, line)

    monkeypatch.setattr(made_source, "read", read)
    made = write_source(made_source, raw, tmp_path / "set", name="toy")
    assert made.shards == whole.shards and "skipped" not in made.meta and waits == [0.5, 1.0]
    left[0] = 100
    with pytest.raises(StorageUnavailable, match="a/2 of .*raw cannot be read for now"):
        write_source(made_source, raw, tmp_path / "other", name="toy")
    left[0] = 0
    again = write_source(made_source, raw, tmp_path / "other", name="toy")
    assert again.shards == whole.shards and "skipped" not in again.meta


def test_a_tar_of_photographs_with_a_stale_handle_is_opened_anew(tmp_path, monkeypatch, waits):
    for k in range(2):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(2):
            tar.add(tmp_path / f"{k}.png", f"{k}.png")
    failing(monkeypatch, errno.ESTALE, times=1, of="a.tar")
    opened, plain = [], archive_io.open_tar
    monkeypatch.setattr(archive_io, "open_tar", lambda path: opened.append(path) or plain(path))
    made = write_images(tmp_path / "a.tar", tmp_path / "set")
    assert made.records == 2 and "skipped" not in made.meta and waits == [0.5]
    assert len(opened) == 4  # listed before and after, one that is stale, and one in its place


@pytest.mark.parametrize("times", [1, 100])
def test_a_film_on_a_failing_disk_is_no_broken_film(tmp_path, monkeypatch, times):
    made_films = pytest.importorskip("made_films", reason="pip install 'depth-anything-train[video]'")
    import av

    from depth_anything.data import video_reader

    path, left = made_films.make_film(tmp_path / "a.mp4", frames=60, sound=None), [times]
    wanted, plain, plain_open = video_frames.read_frame(path, 1), video_reader._demux_packets, open
    video_frames._cached_decoder.cache_clear()

    def packets(container, streams, faults):
        for place, packet in enumerate(plain(container, streams, faults)):
            if place == 5 and left[0]:
                left[0] -= 1
                faults.end = "Input/output error"
                return
            yield packet

    def fail(file, *arguments, **options):
        if times > 1 and str(file) == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain_open(file, *arguments, **options)

    monkeypatch.setattr(video_reader, "_demux_packets", packets)
    monkeypatch.setattr(video_frames, "open", fail, raising=False)
    if times == 1:
        assert video_frames.read_frame(path, 1) == wanted
    else:
        with pytest.raises(OSError, match="Input/output error"):
            video_frames.read_frame(path, 1)

    def refuse(*arguments, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise av.error.OSError(errno.EIO, "Input/output error")
        return plain_container(*arguments, **options)

    plain_container, left[0] = av.open, times
    monkeypatch.setattr(av, "open", refuse)
    if times == 1:
        assert video_frames.count_frames(path) == 4
    else:
        with pytest.raises(OSError, match="Input/output error"):
            video_frames.count_frames(path)
    video_frames._cached_decoder.cache_clear()


def test_a_film_that_is_cut_is_read_through_once(tmp_path, monkeypatch):
    made_films = pytest.importorskip("made_films", reason="pip install 'depth-anything-train[video]'")
    path, checked = made_films.make_film(tmp_path / "a.mp4", frames=20, sound=None), []
    monkeypatch.setattr(video_frames, "_check_disk_readable", checked.append)
    for number in range(3, 8):
        with pytest.raises(ValueError, match="the film ends before"):
            video_frames.read_frame(path, number)
    assert checked == [path]
