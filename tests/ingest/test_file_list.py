"""What a set is made of, listed once by one process while others wait."""

import errno
import os
import socket
import subprocess
import sys
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
def test_each_shard_has_its_lines(tmp_path, monkeypatch, per_shard, chunk):
    monkeypatch.setattr(file_list, "_CHUNK", chunk)
    lines = [f"{'x' * (k % 4)}ä{k}\t{k}" for k in range(7)]
    write_file_list(tmp_path, lines)
    made = FileList(tmp_path, per_shard=per_shard)
    shards = [made.lines(shard) for shard in range(made.shards)]
    assert shards == [lines[k : k + per_shard] for k in range(0, 7, per_shard)]
    assert [len(made.numbers(shard)) for shard in range(made.shards)] == [len(shard) for shard in shards]
    assert (made.count, made.digest) == file_list_digest(lines)


def test_names_of_any_kind_come_through(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "tab\tbed", "line\nend\r", "back\\slash\\t", "日本", ""]
    for name in names:
        assert unescape_field(escape_field(name)) == name
    write_file_list(tmp_path, [escape_field(name) + "\tmore" for name in names])
    (first, *others) = FileList(tmp_path, per_shard=10).lines(0)
    assert display_name(first) == "caf\\udce9" and [display_name(line) for line in others] == names[1:]
    (other := tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="holds a line end"):
        write_file_list(other, ["a\nb"])


def test_a_listing_that_was_changed_is_refused(tmp_path):
    write_file_list(tmp_path, ["a", "b"])
    for data in (b"a\nc\n", b"a\n", b"a\nb", b""):
        (tmp_path / "listing.txt").write_bytes(data)
        with pytest.raises(ShardError, match="is not the listing that the set was begun with"):
            FileList(tmp_path, per_shard=1)
    (tmp_path / "listing.txt").unlink()
    with pytest.raises(ShardError, match="put it back"):
        FileList(tmp_path, per_shard=1)


def test_nothing_left_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing is left to take .passed over: {'b\\*': 1}"):
        write_file_list(tmp_path, ["b/1\tx"], leave_out=["b*"])
    assert not list(tmp_path.iterdir())


def test_many_at_once_list_once(tmp_path):
    listed, begun = [], threading.Barrier(4)

    def find():
        listed.append(1)
        for k in range(20):
            time.sleep(0.005)
            yield str(k)

    def run():
        begun.wait()
        write_file_list(tmp_path, find())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listed) == 1 and FileList(tmp_path, per_shard=9).count == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["listing.json", "listing.txt"]


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    (tmp_path / ".listing.lock").write_text(f"{socket.gethostname()} {done.stdout.strip()} abc")
    write_file_list(tmp_path, ["a"])
    assert FileList(tmp_path, per_shard=1).count == 1 and not (tmp_path / ".listing.lock").exists()


def test_the_lock_of_another_machine_holds_as_long_as_it_gives_signs_of_life(tmp_path, monkeypatch, capsys):
    """By a clock of ours: its holder changes the lock twelve times, each nearly a minute after the other."""
    lock, now, signs = tmp_path / ".listing.lock", [0.0], []
    lock.write_text("elsewhere 1 abc")

    def sleep(seconds):
        assert lock.exists(), "it must not be taken from the living"
        now[0] += 59 if len(signs) < 12 else seconds
        if len(signs) < 12:
            signs.append(now[0])
            os.utime(lock, ns=(len(signs), len(signs)))

    monkeypatch.setattr(file_list.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(file_list.time, "sleep", sleep)
    write_file_list(tmp_path, ["a"])
    assert len(signs) == 12 and signs[-1] + 60 < now[0] < signs[-1] + 65 and not lock.exists()
    assert "waiting for process 1 on elsewhere, which lists the set" in capsys.readouterr().err


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)
    write_file_list(tmp_path, ["a"])
    assert FileList(tmp_path, per_shard=1).lines(0) == ["a"]
    assert write_new(tmp_path / "x", b"1") and not write_new(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1"
    (tmp_path / "listing.json").write_text("{}")
    with pytest.raises(ShardError, match="listing.json is damaged"):
        FileList(tmp_path, per_shard=1)
