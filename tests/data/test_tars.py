"""One shard: atomic writing, the index, detection of damage."""

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from shard_builders import make, names, plain_tar, records

from depth_anything.data.reader import Records
from depth_anything.data.shards import index_set, open_set, verify_set, write_manifest
from depth_anything.data.tars import BadRecord, ShardError, ShardInfo, index_shard, parse_index, write_shard
from depth_anything.disk import remove_stale, temporary_path


def test_write_and_read_back(tmp_path):
    made = make(tmp_path / "set")
    assert made == open_set(tmp_path / "set")
    assert (made.name, made.records, made.meta) == ("set", 15, {"licence": "CC0"})
    assert [shard.name for shard in made.shards] == ["000000", "000001", "000002"]
    read = Records(made)
    assert read.shards == [("set/000000", 5), ("set/000001", 5), ("set/000002", 5)]
    for shard in ("000000", "000001", "000002"):
        for index in random.Random(0).sample(range(5), 5):
            assert read.read(f"set/{shard}", index) == records(shard)[index]
    assert verify_set(tmp_path / "set") == []
    assert names(tmp_path / "set") == sorted(
        ["manifest.json", *(f"{i:06d}.{end}" for i in range(3) for end in ("tar", "idx"))]
    )


@pytest.mark.filterwarnings("ignore")  # WebDataset leaves the file open
def test_tarfile_and_webdataset_read_the_same(tmp_path):
    import webdataset

    write_shard(tmp_path / "a.tar", records())
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [
            f"{key}.{end}" for key, _ in records() for end in ("jpg", "json")
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, 0, "", "", 0o644)
        }
        assert tar.extractfile(members[0]).read() == records()[0][1]["jpg"]
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(s["__key__"], s["jpg"], s["json"]) for s in samples] == [
        (key, fields["jpg"], fields["json"]) for key, fields in records()
    ]


def test_same_records_give_the_same_bytes(tmp_path):
    one = write_shard(tmp_path / "one" / "000000.tar", records())
    time.sleep(0.01)
    backwards = [(key, dict(reversed(fields.items()))) for key, fields in records()]
    other = write_shard(tmp_path / "other" / "000000.tar", iter(backwards))
    assert one == other
    for name in ("000000.tar", "000000.idx"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    # Golden value: the format must not change by accident.
    assert one.hash == "sha256:0c7c1ec87dd812e9d01f1ed088358c31ba63bf155a2d94926940cdc850e02e84"
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_index_holds_offsets_sizes_and_checksums(tmp_path):
    import zlib

    info = write_shard(tmp_path / "000000.tar", records())
    data = (tmp_path / "000000.tar").read_bytes()
    head, *lines = (tmp_path / "000000.idx").read_text().splitlines()
    *facts, checksum = head.split("\t")
    assert facts == ["depth-anything-index 2", str(len(data)), info.hash, "5", "10"]
    covered = "\n".join(["\t".join(facts), *lines, ""])
    assert int(checksum, 16) == zlib.crc32(covered.encode())
    for (key, extension), line in zip(
        [(key, end) for key, _ in records() for end in ("jpg", "json")], lines, strict=True
    ):
        found_key, found_extension, offset, size, crc = line.split("\t")
        assert (found_key, found_extension) == (key, extension)
        field = data[int(offset) : int(offset) + int(size)]
        assert field == dict(records())[key][extension] and zlib.crc32(field) == int(crc, 16)


@pytest.mark.parametrize(
    "key", ["", "../x", "a/../b", "/a", "a.b", "a b", "ä", "a\nb", "a\tb", "-" * 101, "a\0"]
)
def test_bad_keys_are_refused(tmp_path, key):
    with pytest.raises(ShardError):
        write_shard(tmp_path / "a.tar", [("good", {"txt": b""}), (key, {"txt": b""})])
    assert names(tmp_path) == []


@pytest.mark.parametrize("extension", ["", "JPG", ".jpg", "jpg.", "a/b", "__key__", "_x", "a b"])
def test_bad_fields_are_refused(tmp_path, extension):
    with pytest.raises(ShardError, match=r"a\.tar: "):
        write_shard(tmp_path / "a.tar", [("good", {extension: b""})])
    assert names(tmp_path) == []


def test_invalid_records_are_refused(tmp_path):
    with pytest.raises(ShardError, match=r"/a\.tar: .*\"k\""):
        write_shard(tmp_path / "a.tar", [("k", {"a": b""}), ("l", {"a": b""}), ("k", {"b": b""})])
    with pytest.raises(ShardError, match='"k"'):
        write_shard(tmp_path / "a.tar", [("k", {})])
    with pytest.raises(ShardError, match=r"a\.tar"):
        write_shard(tmp_path / "a.tar", [])
    with pytest.raises(ShardError, match=r"\.tar.*a\.zip"):
        write_shard(tmp_path / "a.zip", records())
    with pytest.raises(ShardError, match="over 100"):
        write_shard(tmp_path / "a.tar", [("k" * 98, {"jpg": b""})])
    assert write_shard(tmp_path / "a.tar", [("k" * 96, {"jpg": b""})]).records == 1
    assert names(tmp_path) == ["a.idx", "a.tar"]


def test_failing_record_iterator_leaves_no_files(tmp_path):
    def failing():
        yield from records()
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        write_shard(tmp_path / "a.tar", failing())
    assert names(tmp_path) == []


def test_a_shard_is_replaced(tmp_path):
    write_shard(tmp_path / "a.tar", records("000000"))
    info = write_shard(tmp_path / "a.tar", records("000001", count=2))
    made = write_manifest(tmp_path, name="set", shards=[info], meta={})
    assert Records(made).read("set/a", 1) == records("000001")[1] and verify_set(tmp_path) == []


def crash_at(monkeypatch, call):
    """Stop after the n-th rename or unlink of publishing a shard."""
    calls = []

    def stop(real):
        def counted(*arguments, **options):
            if len(calls) == call:
                raise KeyboardInterrupt
            calls.append(arguments)
            return real(*arguments, **options)

        return counted

    monkeypatch.setattr(os, "replace", stop(os.replace))
    monkeypatch.setattr(Path, "unlink", stop(Path.unlink))


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("call", range(5))
def test_crash_between_any_two_system_calls_leaves_whole_shards(tmp_path, monkeypatch, call, there_before):
    path = tmp_path / "a.tar"
    if there_before:
        old = write_shard(path, records("000000"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, call)
        write_shard(path, records("000001", count=3))
        raise KeyboardInterrupt  # it was not stopped
    visible = [name for name in names(tmp_path) if name.endswith(".tar") and not name.startswith(".")]
    if there_before:
        assert visible == ["a.tar"]
    for name in visible:
        found = index_shard_copy(tmp_path / name, tmp_path / "copy")
        assert not there_before or found.hash in (
            old.hash,
            write_shard(tmp_path / "n/a.tar", records("000001", count=3)).hash,
        )
        made = write_manifest(tmp_path, name="set", shards=[found], meta={})
        shard = "000000" if there_before and found.hash == old.hash else "000001"
        assert Records(made).read("set/a", 1) == records(shard)[1]
    info = write_shard(path, records("000001", count=3))
    write_manifest(tmp_path, name="set", shards=[info], meta={})
    assert verify_set(tmp_path) == []


def index_shard_copy(path, folder):
    """Index a copy of a tar, so that its own index is not changed."""
    folder.mkdir()
    (folder / path.name).write_bytes(path.read_bytes())
    return index_shard(folder / path.name)


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from shard_builders import records, write_shard
from pathlib import Path
root = Path(sys.argv[1])
print("ready", flush=True)
for number in range(10_000):
    shard = f"{{number % 40:06d}}"
    write_shard(root / f"{{shard}}.tar", records(shard, count=20, size=2000))
"""


def test_killed_writers_leave_whole_shards(tmp_path):
    """Kill a writer at random moments and continue; every shard is complete and has the same bytes."""
    root, rng = tmp_path / "set", random.Random(7)
    root.mkdir()
    for _ in range(4):
        script = WRITER.format(tests=str(Path(__file__).parents[1]))
        writer = subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.05, 0.4))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        for path in root.glob("[0-9]*.tar"):
            text = path.with_suffix(".idx").read_text() if path.with_suffix(".idx").exists() else None
            info = index_shard(path)  # raises if it is truncated
            assert text in (None, path.with_suffix(".idx").read_text())
            assert info.records == 20
    infos = [write_shard(root / f"{i:06d}.tar", records(f"{i:06d}", count=20, size=2000)) for i in range(40)]
    write_manifest(root, name="set", shards=infos, meta={})
    assert verify_set(root) == []
    assert not list(root.glob(".tmp.*"))
    again = [
        write_shard(tmp_path / f"{i:06d}.tar", records(f"{i:06d}", count=20, size=2000)) for i in range(40)
    ]
    assert again == infos


def test_stale_temporaries_are_removed_and_others_kept(tmp_path):
    mine = temporary_path(tmp_path / "a.tar")
    host, pid = mine.name.split(".")[-3:-1]
    dead = tmp_path / f".tmp.a.tar.{host}.999999999.aa"
    elsewhere = tmp_path / ".tmp.a.tar.another-host.999999999.aa"
    old = tmp_path / f".tmp.b.c.tar.another-host.{pid}.bb"
    for path in (mine, dead, elsewhere, old):
        path.touch()
    os.utime(old, (0, 0))
    remove_stale(tmp_path)
    assert names(tmp_path) == sorted([mine.name, elsewhere.name])


def foreign(tmp_path, members):
    return plain_tar(tmp_path / "f.tar", members)


def test_index_of_tars_of_other_programs(tmp_path):
    directory = tarfile.TarInfo("./some")
    directory.type = tarfile.DIRTYPE
    foreign(
        tmp_path,
        [
            (directory, b""),
            ("./some/img_0.JPG", b"one"),
            ("./some/img_0.seg.png", b"two"),
            ("./some/.hidden", b"no key"),
            ("README", b"no key either"),
            ("some/img-1.jpg", b"three" * 300),
        ],
    )
    made = index_set(tmp_path, name="foreign")
    assert made.records == 2
    read = Records(open_set(tmp_path))
    assert read.read("foreign/f", 0) == ("some/img_0", {"jpg": b"one", "seg.png": b"two"})
    assert read.read("foreign/f", 1) == ("some/img-1", {"jpg": b"three" * 300})
    assert verify_set(tmp_path) == []


def test_long_names_in_tars_of_other_programs(tmp_path):
    key = "/".join(["folder" * 10] * 3)
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=format) as tar:
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"long"))
        made = ShardInfo(str(format), 1, path.stat().st_size, index_shard(path).hash)
        assert index_shard(path) == made
    read = Records(index_set(tmp_path, name="long"))
    assert [read.read(name, 0)[1] for name, _ in read.shards] == [{"jpg": b"long"}] * 3


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../x.jpg", "is not a valid key"),
        ("/etc/x.jpg", "is not a valid key"),
        ("a b.jpg", "is not a valid key"),
        ("ä.jpg", "is not a valid key"),
        ("a.jp g", "field name"),
        ("k.jpg", "duplicated"),
        ("k.png", "duplicated"),
        ("l.jpg", "duplicated"),
    ],
)
def test_invalid_names_in_tars_of_other_programs_are_refused(tmp_path, member, message):
    foreign(tmp_path, [("k.jpg", b"1"), ("l.jpg", b"2"), (member, b"3")])
    with pytest.raises(ShardError, match=message) as error:
        index_shard(tmp_path / "f.tar")
    assert "f.tar" in str(error.value)
    assert names(tmp_path) == ["f.tar"]


def test_names_with_dots_that_give_one_key_are_refused(tmp_path):
    foreign(
        tmp_path,
        [("frame.0000.jpg", b"1"), ("frame.0001.jpg", b"2"), ("b.jpg", b"3"), ("frame.0002.jpg", b"4")],
    )
    with pytest.raises(ShardError, match='"frame"'):
        index_shard(tmp_path / "f.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_devices_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("k.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    foreign(tmp_path, [(info, b"")])
    with pytest.raises(ShardError, match=r"f\.tar"):
        index_shard(tmp_path / "f.tar")


def test_member_larger_than_the_file_is_refused(tmp_path):
    info = tarfile.TarInfo("k.jpg")
    info.size = 1 << 50
    header = info.tobuf(format=tarfile.GNU_FORMAT)
    (tmp_path / "f.tar").write_bytes(header + bytes(1024))
    with pytest.raises(ShardError, match="truncated"):
        index_shard(tmp_path / "f.tar")


def test_every_truncation_is_detected(tmp_path):
    write_shard(tmp_path / "w.tar", records(count=3, size=700))
    data = (tmp_path / "w.tar").read_bytes()
    last = int((tmp_path / "w.idx").read_text().splitlines()[-1].split("\t")[2])
    end = last + 512  # of the last member; zeros follow
    path = tmp_path / "t.tar"
    for length in [0, 1, 511, 512, 513, *range(1000, end + 512, 61), end - 512, end, end + 511]:
        path.write_bytes(data[:length])
        with pytest.raises(ShardError, match="t.tar"):
            index_shard(path)
    path.write_bytes(data[: end + 512])
    assert index_shard(path).records == 3


def test_garbage_is_refused(tmp_path):
    rng = np.random.default_rng(8)
    path = tmp_path / "g.tar"
    for data in (rng.bytes(4096), bytes(4096), b"\x1f\x8b" + rng.bytes(2000)):
        path.write_bytes(data)
        with pytest.raises(ShardError, match="g.tar"):
            index_shard(path)
    with pytest.raises(ShardError, match="missing"):
        index_shard(tmp_path / "absent.tar")


def test_flipped_header_bytes_are_detected(tmp_path):
    info = write_shard(tmp_path / "w.tar", records(count=4, size=600))
    data = bytearray((tmp_path / "w.tar").read_bytes())
    lines = (tmp_path / "w.idx").read_text().splitlines()[1:]
    rng = np.random.default_rng(9)
    for line in lines:
        header = int(line.split("\t")[2]) - 512
        damaged = data.copy()
        damaged[header + int(rng.integers(0, 156))] ^= 0x15
        (tmp_path / "d.tar").write_bytes(damaged)
        with pytest.raises(ShardError, match="d.tar"):
            assert index_shard(tmp_path / "d.tar").records == info.records


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "depth-anything-index 2\t10240\tsha256:0\t1\t1\nk\tjpg\t512\t4\t00000000\n",
        "depth-anything-index 1\t10240\tsha256:0\t1\t1\nk\tjpg\t512\t4\t00000000",  # cut after the last line
        "depth-anything-index 1\t10240\tsha256:0\t2\t2\nk\tjpg\t512\t4\t00000000\n",
        "depth-anything-index 1\t10240\tsha256:0\t1\t1\nk\tjpg\t512\t4\t00000000\nand more",
        "depth-anything-index 1\t10240\tsha256:0\t1\t1\nk\tjpg\t512\t99999\t00000000\n",
        "depth-anything-index 1\t10240\tsha256:0\t1\t1\nk\tjpg\t-512\t4\t00000000\n",
        "depth-anything-index 1\t10240\tsha256:0\t1\t1\nk\tjpg\t512\t-4\t00000000\n",
        "depth-anything-index 1\t10240\tsha256:0\t1\t1\nk\tjpg\t512\t4\t100000000\n",
        "depth-anything-index 1\t10240\tsha256:0\t1\t1\nk\tjpg\t99999999999999999999\t4\t00000000\n",
        "depth-anything-index 1\t10240\tsha256:0\t1\t1\nk\tjpg\t512\tfour\t00000000\n",
    ],
)
def test_damaged_indexes_are_refused(text):
    with pytest.raises(ShardError, match="depth-anything shard index data"):
        parse_index(text, where="data/a.idx")


def test_bad_record_is_a_value_error_that_pickles():
    import pickle

    error = pickle.loads(pickle.dumps(BadRecord("set/a", 3, "k", "damaged")))
    assert isinstance(error, ValueError) and str(error) == "set/a[3] k: damaged"
    assert (error.shard, error.index, error.key, error.reason) == ("set/a", 3, "k", "damaged")
