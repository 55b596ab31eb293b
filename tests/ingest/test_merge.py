"""Merging the parts of a set from several folders."""

import errno
import os
import shutil

import made_source
import pytest
from made_source import Stopped, fill, stop_at

from depth_anything.cli import main
from depth_anything.data.shards import open_set, verify_set
from depth_anything.data.tars import ShardError
from depth_anything.ingest.merge import merge_parts
from depth_anything.ingest.writer import write_source


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("raw") / "toy")


def write(raw, root, **options):
    return write_source(made_source, raw, root, **{"per_shard": 4, "name": "toy", **options})


@pytest.fixture(scope="module")
def three(raw, tmp_path_factory):
    """The whole, and three parts of it, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("parts")
    whole = write(raw, folder / "whole")
    for k in (1, 2, 3):
        assert write(raw, folder / str(k), part=(k, 3)) is None
    return whole, [folder / str(k) for k in (1, 2, 3)]


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.fixture(params=["linked", "copied"])
def disk(request, monkeypatch):
    """One disk, or several: then nothing can be linked from one to another."""
    if request.param == "copied":
        link = os.link

        def refuse(source, target):
            if os.path.dirname(source) == os.path.dirname(target):
                return link(source, target)
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)


def test_merged_parts_equal_the_whole_set(three, tmp_path, disk):
    whole, parts = three
    before = [contents(part) for part in parts]
    shard_set = merge_parts(tmp_path / "toy", parts)
    assert shard_set.digest == whole.digest and shard_set.meta == whole.meta
    assert contents(tmp_path / "toy") == contents(parts[0].parent / "whole")
    assert verify_set(shard_set.root, decode=True) == [] and [contents(part) for part in parts] == before
    assert merge_parts(tmp_path / "toy") == shard_set, "a second merge changes nothing"


def test_parts_can_be_merged_into_the_folder_of_a_part(three, tmp_path):
    whole, parts = three
    shutil.copytree(parts[1], tmp_path / "toy")
    assert merge_parts(tmp_path / "toy", [parts[0], parts[2]]).digest == whole.digest


def test_files_copied_into_one_folder_are_finished_without_parts(three, tmp_path, capsys):
    whole, parts = three
    for part in parts:
        shutil.copytree(part, tmp_path / "toy", dirs_exist_ok=True)
    assert main(["merge", str(tmp_path / "toy")]) == 0
    out = capsys.readouterr().out
    assert whole.digest in out and "5 (5 x its depth is missing)" in out
    assert open_set(tmp_path / "toy").digest == whole.digest


def test_missing_shards_are_named_and_can_be_merged_later(three, tmp_path):
    whole, parts = three
    with pytest.raises(ShardError, match=r"2 of 6 .*\(00004, 00005\)"):
        merge_parts(tmp_path / "toy", parts[:2])
    with pytest.raises(ShardError, match="2 of 6"):
        merge_parts(tmp_path / "toy")
    assert merge_parts(tmp_path / "toy", parts[2:]).digest == whole.digest


def test_missing_shards_can_be_written_in_the_merged_folder(raw, three, tmp_path):
    whole, parts = three
    with pytest.raises(ShardError, match="2 of 6"):
        merge_parts(tmp_path / "toy", parts[:2])
    assert write(raw, tmp_path / "toy").digest == whole.digest


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"per_shard": 5}, "per_shard 5 in place of 4"),
        ({"short_side": 6}, "short_side 6 in place of None"),
        ({"licence": "MIT"}, "licence MIT in place of CC0-1.0"),
        ({"sky": "invalid"}, "sky_policy invalid in place of far"),
    ],
)
def test_parts_with_other_settings_are_rejected(raw, three, tmp_path, options, named):
    write(raw, tmp_path / "2", part=(2, 3), **options)
    with pytest.raises(ShardError, match=named):
        merge_parts(tmp_path / "toy", [three[1][0], tmp_path / "2"])
    assert not (tmp_path / "toy").exists()


def test_license_and_sky_of_a_part_can_be_corrected(raw, three, tmp_path):
    write(raw, tmp_path / "2", part=(2, 3), sky="invalid")
    parts = [three[1][0], tmp_path / "2", three[1][2]]
    with pytest.raises(ShardError, match="--licence and --sky"):
        merge_parts(tmp_path / "toy", parts)
    write(raw, tmp_path / "2", part=(2, 3), sky="far")
    assert merge_parts(tmp_path / "toy", parts).digest == three[0].digest


def test_parts_of_other_raw_data_are_rejected(three, tmp_path):
    other = fill(tmp_path / "raw", count=24)
    write(other, tmp_path / "2", part=(2, 3))
    with pytest.raises(ShardError, match="hash .*lines 24 in place of 23"):
        merge_parts(tmp_path / "toy", [three[1][0], tmp_path / "2"])


def test_shards_of_one_name_must_be_equal(three, tmp_path):
    whole, parts = three
    shutil.copytree(parts[0], tmp_path / "1")
    assert merge_parts(tmp_path / "fine", [*parts, tmp_path / "1"]).digest == whole.digest
    shutil.copy(parts[1] / "00003.tar", tmp_path / "1" / "00000.tar")
    shutil.copy(parts[1] / "00003.idx", tmp_path / "1" / "00000.idx")
    with pytest.raises(ShardError, match=f"00000 in .*{tmp_path / '1'}"):
        merge_parts(tmp_path / "toy", [*parts, tmp_path / "1"])


@pytest.mark.parametrize("disk", ["copied"], indirect=True)
def test_the_hash_of_a_copied_tar_is_checked(three, tmp_path, disk):
    whole, parts = three
    shutil.copytree(parts[0], tmp_path / "1")
    data = bytearray((tmp_path / "1" / "00000.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "1" / "00000.tar").write_bytes(data)
    with pytest.raises(ShardError, match=str(tmp_path / "1" / "00000.tar")):
        merge_parts(tmp_path / "toy", [tmp_path / "1", *parts[1:]])
    assert not (tmp_path / "toy" / "00000.tar").exists()
    assert merge_parts(tmp_path / "toy", parts).digest == whole.digest


def test_a_truncated_tar_is_rejected(three, tmp_path):
    whole, parts = three
    shutil.copytree(parts[0], tmp_path / "1")
    os.truncate(tmp_path / "1" / "00000.tar", 1024)
    with pytest.raises(ShardError, match=str(tmp_path / "1" / "00000.tar")):
        merge_parts(tmp_path / "toy", [tmp_path / "1", *parts[1:]])


def test_folders_without_parts_are_rejected(three, tmp_path):
    with pytest.raises(ShardError, match="toy .*settings.json.*merge OUT FOLDER"):
        merge_parts(tmp_path / "toy")
    with pytest.raises(ShardError, match=f"{tmp_path} .*settings.json"):
        merge_parts(tmp_path / "toy", [three[1][0], tmp_path])


def test_an_interruption_between_any_two_steps_of_a_merge_changes_no_byte(three, tmp_path, monkeypatch):
    whole, parts = three
    wanted, call = contents(parts[0].parent / "whole"), 0
    while True:
        root = tmp_path / f"{call}" / "toy"
        try:
            with monkeypatch.context() as patch:
                stop_at(patch, call)
                merge_parts(root, parts)
        except Stopped:
            assert merge_parts(root, parts).digest == whole.digest and contents(root) == wanted
        else:
            break
        call += 1
    assert call > 30
