"""A failing disk below the raw data: no record is rejected for it."""

import errno
import os
import tarfile
from pathlib import Path

import made_source
import numpy as np
import pytest
from PIL import Image

from depth_anything.data import retry
from depth_anything.data.tars import StorageUnavailable
from depth_anything.ingest import archive_io, maps, video_frames
from depth_anything.ingest.custom import CustomSet, read_image_size
from depth_anything.ingest.find_files import file_line
from depth_anything.ingest.photographs import list_photographs, write_images
from depth_anything.ingest.writer import write_source
from depth_anything.inspect.dataset_check import check_dataset


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waiting times between retries, in seconds; nothing waits."""
    seconds = []
    monkeypatch.setattr(retry, "sleep", seconds.append)
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "2")
    retry._reported.clear()
    return seconds


def test_raw_files_on_a_failing_disk_are_not_rejected(tmp_path, monkeypatch):
    """Every reader of raw files raises the error of the disk instead of reporting a damaged file."""
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


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match="rgb/b .*Input/output error"):
        CustomSet(tmp_path, "rgb", "depth").files.find()


def test_a_record_that_exceeds_the_memory_is_rejected_alone(tmp_path, monkeypatch):
    raw, plain = made_source.fill(tmp_path / "raw"), made_source.read

    def read(folder, line):
        if line.startswith("room/02\t"):
            raise MemoryError
        return plain(folder, line)

    monkeypatch.setattr(made_source, "read", read)
    shard_set = write_source(made_source, raw, tmp_path / "set")
    assert shard_set is not None
    assert "room/02" in dict(shard_set.meta["skipped"]["files"])
    assert shard_set.records == 23 - 5 - 1


def toy(folder, lines="a/1\na/2\na/3"):
    raw = made_source.fill(folder)
    (raw / "toy.txt").write_text(lines)
    return raw


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT], ids=errno.errorcode.get)
def test_a_raw_file_is_read_again_after_a_temporary_disk_error(tmp_path, monkeypatch, waits, number):
    raw, plain, left = toy(tmp_path / "raw"), made_source.read, [2]
    whole = write_source(made_source, raw, tmp_path / "whole", name="toy")

    def read(folder, line):
        if line.startswith("a/2") and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), line)
        return plain(folder, line)

    monkeypatch.setattr(made_source, "read", read)
    shard_set = write_source(made_source, raw, tmp_path / "set", name="toy")
    assert shard_set.shards == whole.shards and "skipped" not in shard_set.meta and waits == [0.5, 1.0]
    left[0] = 100
    with pytest.raises(StorageUnavailable, match="a/2 of .*raw "):
        write_source(made_source, raw, tmp_path / "other", name="toy")
    left[0] = 0
    again = write_source(made_source, raw, tmp_path / "other", name="toy")
    assert again.shards == whole.shards and "skipped" not in again.meta


def test_a_tar_with_a_stale_handle_is_opened_again(tmp_path, monkeypatch, waits):
    for k in range(2):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(2):
            tar.add(tmp_path / f"{k}.png", f"{k}.png")
    pread, left = os.pread, [1]

    def fail_once(file, *arguments):
        if left[0] and os.readlink(f"/proc/self/fd/{file}").endswith("a.tar"):
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(file, *arguments)

    monkeypatch.setattr(os, "pread", fail_once)
    opened, plain = [], archive_io.open_tar
    monkeypatch.setattr(archive_io, "open_tar", lambda path: opened.append(path) or plain(path))
    shard_set = write_images(tmp_path / "a.tar", tmp_path / "set")
    assert shard_set.records == 2 and "skipped" not in shard_set.meta and waits == [0.5]
    assert len(opened) == 4  # listed before and after writing, one stale handle, and its replacement


@pytest.mark.parametrize("times", [1, 100])
def test_a_video_on_a_failing_disk_is_not_reported_as_damaged(tmp_path, monkeypatch, times):
    pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")
    import av
    import made_videos

    from depth_anything.data import video_reader

    path, left = made_videos.make_video(tmp_path / "a.mp4", frames=60, sound=None), [times]
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


def test_the_disk_of_a_truncated_video_is_checked_once(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")
    import made_videos

    path, checked = made_videos.make_video(tmp_path / "a.mp4", frames=20, sound=None), []
    monkeypatch.setattr(video_frames, "_check_disk_readable", checked.append)
    for number in range(3, 8):
        with pytest.raises(ValueError, match=f" {number / 2:g} s"):
            video_frames.read_frame(path, number)
    assert checked == [path]
