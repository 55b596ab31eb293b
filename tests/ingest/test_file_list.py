"""The file list of a set."""

import errno
import os
import threading
import time

import pytest

from depth_anything.data.tars import ShardError
from depth_anything.disk import write_new
from depth_anything.ingest import file_list
from depth_anything.ingest.file_list import (
    FileList,
    display_name,
    escape_field,
    file_list_digest,
    unescape_field,
    write_file_list,
)


@pytest.mark.parametrize("per_shard", [1, 3, 7, 8, 100])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_each_shard_has_its_lines_for_any_buffer_size(tmp_path, monkeypatch, per_shard, chunk):
    monkeypatch.setattr(file_list, "_CHUNK", chunk)
    lines = [f"{'x' * (k % 4)}ä{k}\t{k}" for k in range(7)]
    write_file_list(tmp_path, lines)
    listed = FileList(tmp_path, per_shard=per_shard)
    shards = [listed.lines(shard) for shard in range(listed.shards)]
    assert shards == [lines[k : k + per_shard] for k in range(0, 7, per_shard)]
    assert [len(listed.numbers(shard)) for shard in range(listed.shards)] == [len(shard) for shard in shards]
    assert (listed.count, listed.digest) == file_list_digest(lines)


def test_names_with_any_characters_are_escaped_and_restored(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "tab\tbed", "line\nend\r", "back\\slash\\t", "日本", ""]
    for name in names:
        assert unescape_field(escape_field(name)) == name
    write_file_list(tmp_path, [escape_field(name) + "\tmore" for name in names])
    (first, *others) = FileList(tmp_path, per_shard=10).lines(0)
    assert display_name(first) == "caf\\udce9" and [display_name(line) for line in others] == names[1:]
    (other := tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"'a\\nb'"):
        write_file_list(other, ["a\nb"])


def test_a_changed_list_is_rejected(tmp_path):
    write_file_list(tmp_path, ["a", "b"])
    for data in (b"a\nc\n", b"a\n", b"a\nb", b""):
        (tmp_path / "listing.txt").write_bytes(data)
        with pytest.raises(ShardError, match=f"listing.txt.*  rm -r {tmp_path}"):
            FileList(tmp_path, per_shard=1)
    (tmp_path / "listing.txt").unlink()
    with pytest.raises(ShardError, match=f"listing.txt.*  rm -r {tmp_path}"):
        FileList(tmp_path, per_shard=1)


def test_an_empty_list_is_an_error_and_leaves_no_files(tmp_path):
    with pytest.raises(ValueError, match=r"'b\*': 1"):
        write_file_list(tmp_path, ["b/1\tx"], leave_out=["b*"])
    assert not list(tmp_path.iterdir())


def test_processes_that_list_at_the_same_time_write_one_valid_list(tmp_path):
    started = threading.Barrier(4)

    def find():
        for k in range(20):
            time.sleep(0.005)
            yield str(k)

    def run():
        started.wait()
        write_file_list(tmp_path, find())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert FileList(tmp_path, per_shard=9).count == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["listing.json", "listing.txt"]


def test_a_finished_list_is_not_replaced_by_a_slower_process(tmp_path):
    def find():
        yield "a"
        write_file_list(tmp_path, ["b", "c"])

    write_file_list(tmp_path, find())
    assert FileList(tmp_path, per_shard=9).lines(0) == ["b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["listing.json", "listing.txt"]


def test_hard_links_are_not_required(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)
    write_file_list(tmp_path, ["a"])
    assert FileList(tmp_path, per_shard=1).lines(0) == ["a"]
    assert write_new(tmp_path / "x", b"1") and not write_new(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1"
    (tmp_path / "listing.json").write_text("{}")
    with pytest.raises(ShardError, match="listing.json.*lines"):
        FileList(tmp_path, per_shard=1)
