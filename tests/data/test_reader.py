import functools
import http.server
import multiprocessing
import os
import pickle
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from depth_anything.data.reader import JoinedRecords, Records, ShardReader
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import BadRecord, ShardError, index_shard, write_shard


def records(shard, count=6, size=200):
    rng = random.Random(shard)
    return [
        (
            f"set/{shard}/{i:06d}",
            {"jpg": rng.randbytes(size), "json": b'{"i": %d}' % i, "depth.q12": b"truth"},
        )
        for i in range(count)
    ]


def make(root, shards=("a", "b", "c"), name="set", meta=None, **options):
    infos = [write_shard(Path(root, f"{shard}.tar"), records(shard, **options)) for shard in shards]
    return write_manifest(root, name=name, shards=infos, meta=meta or {})


def make_labels(root, images, *, skip=(), name=None):
    """Write a label for every image except those numbers in `skip`."""
    infos, hashes = [], {}
    for shard in images.shards:
        keys = ShardReader().keys(images.url(shard.name))
        kept = [(key, {"disparity.q12": key.encode()}) for i, key in enumerate(keys) if i not in skip]
        infos.append(write_shard(Path(root, f"{shard.name}.tar"), kept))
        hashes[shard.name] = shard.hash
    meta = {"images": {"set": images.name, "hashes": hashes}}
    return write_manifest(root, name=name or images.name, shards=infos, meta=meta)


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "a.tar", records("a"))
    return tmp_path / "a.tar"


def test_reads_any_record_in_any_order(shard):
    reader = ShardReader()
    for index in (3, 0, 5, 5, 1):
        assert reader.read(shard, index) == records("a")[index]
    assert reader.keys(shard) == [key for key, _ in records("a")]
    assert [reader.find(shard, key) for key, _ in records("a")] == list(range(6))
    for key in ("set/a/00000", "set/a/0000000", "set/a/000006", "", "000001", "set/a/000000\nset/a/000001"):
        with pytest.raises(KeyError):
            reader.find(shard, key)
    for index in (-1, 6):
        with pytest.raises(IndexError):
            reader.read(shard, index)


def test_keys_with_a_common_prefix(tmp_path):
    keys = ["k", "kk", "kkk", "k-1", "k-10", "k-100"]
    write_shard(tmp_path / "a.tar", [(key, {"txt": key.encode()}) for key in keys])
    reader = ShardReader()
    for index, key in enumerate(keys):
        assert reader.find(tmp_path / "a.tar", key) == index
        assert reader.read(tmp_path / "a.tar", index) == (key, {"txt": key.encode()})


def test_one_record_and_empty_fields(tmp_path):
    write_shard(tmp_path / "a.tar", [("alone", {"txt": b"", "jpg": b"x"})])
    assert ShardReader().read(tmp_path / "a.tar", 0) == ("alone", {"jpg": b"x", "txt": b""})


def test_missing_index_is_built_in_memory(shard):
    shard.with_suffix(".idx").unlink()
    assert ShardReader().read(shard, 4) == records("a")[4]
    assert not shard.with_suffix(".idx").exists()


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
def test_number_of_open_files_is_bounded(tmp_path):
    shards = [f"s{i:02d}" for i in range(20)]
    read = make(tmp_path, shards)
    before = open_files()
    reader = ShardReader(max_open=4, max_indexes=3)
    for _ in range(2):
        for name in shards:
            assert reader.read(read.url(name), 1) == records(name)[1]
            assert open_files() <= before + 4
    assert len(reader._indexes) == 3
    reader.close()
    assert open_files() == before
    assert reader.read(read.url("s03"), 0) == records("s03")[0]
    del reader
    assert open_files() == before


def test_pickled_and_forked_readers_open_their_own_files(tmp_path):
    made = make(tmp_path)
    read = Records(made)
    expected = [read.read("set/b", i) for i in range(6)]
    assert [pickle.loads(pickle.dumps(read)).read("set/b", i) for i in range(6)] == expected
    assert len(pickle.dumps(read)) < 2000
    context = multiprocessing.get_context("fork")
    ours = dict(read._reader._files)
    with context.Pool(2) as pool:
        assert pool.map(functools.partial(read.read, "set/b"), range(6)) == expected
    assert read._reader._files == ours and read.read("set/b", 2) == expected[2]


def test_forked_child_does_not_use_the_parents_file(shard):
    reader = ShardReader()
    reader.read(shard, 0)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child():
        reader.read(shard, 0)
        queue.put((reader._process, list(reader._files.values())))

    process = context.Process(target=child)
    process.start()
    process.join()
    assert queue.get()[0] == process.pid != reader._process


def bad(call):
    with pytest.raises(BadRecord) as error:
        call()
    assert error.value.reason
    return error.value


def test_truncated_empty_and_missing_shards(shard):
    data = shard.read_bytes()
    shard.write_bytes(data[:2000])
    error = bad(lambda: ShardReader().read(shard, 5))
    assert (error.shard, error.index) == (str(shard), 5) and "truncated" in error.reason
    shard.with_suffix(".idx").unlink()
    assert "truncated" in bad(lambda: ShardReader().read(shard, 0)).reason
    shard.write_bytes(b"")
    assert "empty" in bad(lambda: ShardReader().read(shard, 0)).reason
    shard.unlink()
    assert "missing" in bad(lambda: ShardReader().read(shard, 0)).reason


def test_truncated_while_it_is_read(shard):
    reader = ShardReader()
    reader.read(shard, 0)
    os.truncate(shard, 4000)
    error = bad(lambda: reader.read(shard, 5))
    assert "truncated" in error.reason and error.key == "set/a/000005"


def test_flipped_bytes(shard):
    lines = [line.split("\t") for line in shard.with_suffix(".idx").read_text().splitlines()[1:]]
    data = shard.read_bytes()
    for number, (key, extension, offset, size, _) in enumerate(lines):
        damaged = bytearray(data)
        damaged[int(offset) + int(size) - 1] ^= 0x80
        shard.write_bytes(damaged)
        reader = ShardReader()
        error = bad(lambda reader=reader, number=number: reader.read(shard, number // 3))
        assert error.key == key and extension in error.reason
        other = (number // 3 + 1) % 6
        assert reader.read(shard, other) == records("a")[other]


def test_index_of_another_tar(tmp_path):
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", records(name))
    write_shard(tmp_path / "longer.tar", records("a", size=3000))
    (tmp_path / "b.idx").write_bytes((tmp_path / "a.idx").read_bytes())
    assert "index" in bad(lambda: ShardReader().read(tmp_path / "b.tar", 0)).reason  # tars of equal size
    (tmp_path / "b.idx").write_bytes((tmp_path / "longer.idx").read_bytes())
    assert "b.tar has " in bad(lambda: ShardReader().read(tmp_path / "b.tar", 0)).reason
    (tmp_path / "b.idx").write_text("nonsense")
    assert "depth-anything shard index" in bad(lambda: ShardReader().read(tmp_path / "b.tar", 0)).reason
    index_shard(tmp_path / "b.tar")
    assert ShardReader().read(tmp_path / "b.tar", 0) == records("b")[0]


def test_records_name_the_shard(tmp_path):
    made = make(tmp_path)
    os.remove(tmp_path / "b.tar")
    error = bad(lambda: Records(made).read("set/b", 2))
    assert (error.shard, error.index) == ("set/b", 2)
    data = bytearray((tmp_path / "c.tar").read_bytes())
    data[512] ^= 1
    (tmp_path / "c.tar").write_bytes(data)
    error = bad(lambda: Records(made).read("set/c", 0))
    assert (error.shard, error.index, error.key) == ("set/c", 0, "set/c/000000")
    with pytest.raises(KeyError):
        Records(made).read("set/z", 0)


def test_swapped_shards_are_detected(tmp_path):
    made = make(tmp_path)
    for end in ("tar", "idx"):
        swap(tmp_path / f"a.{end}", tmp_path / f"b.{end}")
    assert open_set(tmp_path) == made  # the tars have equal sizes
    assert f"{tmp_path}/a.tar" in bad(lambda: Records(made).read("set/a", 0)).reason


def swap(one, other):
    spare = one.with_name("spare")
    os.replace(one, spare)
    os.replace(other, one)
    os.replace(spare, other)


def test_joined_by_key(tmp_path):
    images = make(tmp_path / "images")
    labels = make_labels(tmp_path / "labels", images, skip={1, 4})
    joined = JoinedRecords(images, labels)
    assert joined.shards == [("set/a", 4), ("set/b", 4), ("set/c", 4)]
    for index, number in enumerate([0, 2, 3, 5]):
        key, fields = joined.read("set/b", index)
        image_key, image = records("b")[number]
        assert key == image_key
        assert fields == {"jpg": image["jpg"], "json": image["json"], "disparity.q12": key.encode()}
    again = pickle.loads(pickle.dumps(joined))
    assert again.read("set/c", 3) == joined.read("set/c", 3) and again.digest == joined.digest


def test_joined_digest_covers_images_and_labels(tmp_path):
    images = make(tmp_path / "images")
    one = JoinedRecords(images, make_labels(tmp_path / "one", images))
    other_labels = JoinedRecords(images, make_labels(tmp_path / "two", images, skip={0}))
    other_images = make(tmp_path / "others", size=201)
    labels = make_labels(tmp_path / "three", other_images)
    assert len({one.digest, other_labels.digest, JoinedRecords(other_images, labels).digest}) == 3
    more = make(tmp_path / "images", ("a", "b", "c", "d"))  # "d" has no labels
    assert JoinedRecords(more, one.labels).digest == one.digest


def test_labels_never_join_other_images(tmp_path):
    images = make(tmp_path / "images")
    labels = make_labels(tmp_path / "labels", images)
    others = make(tmp_path / "others", size=201)  # the same keys, other images
    assert (
        "image: the shard set/a is not" in bad(lambda: JoinedRecords(others, labels).read("set/a", 0)).reason
    )
    fewer = make(tmp_path / "fewer", ("b", "c"))
    assert "set/a is missing" in bad(lambda: JoinedRecords(fewer, labels).read("set/a", 0)).reason
    for end in ("tar", "idx"):
        swap(tmp_path / "labels" / f"a.{end}", tmp_path / "labels" / f"b.{end}")
    assert "label: " in bad(lambda: JoinedRecords(images, labels).read("set/a", 0)).reason
    # A new manifest of the swapped files: the keys do not match.
    meta = labels.meta
    infos = [index_shard(tmp_path / "labels" / f"{name}.tar") for name in "abc"]
    swapped = write_manifest(tmp_path / "labels", name="set", shards=infos, meta=meta)
    assert "image: the shard set/a " in bad(lambda: JoinedRecords(images, swapped).read("set/a", 0)).reason
    assert JoinedRecords(images, swapped).read("set/c", 0)[0] == "set/c/000000"


def test_joined_names_the_damaged_side(tmp_path):
    images = make(tmp_path / "images")
    labels = make_labels(tmp_path / "labels", images)
    joined = JoinedRecords(images, labels)
    for folder, side in (("images", "image: "), ("labels", "label: ")):
        path = tmp_path / folder / "b.tar"
        data = path.read_bytes()
        path.write_bytes(data[:-512] + b"x" * 512)  # only the padding
        assert joined.read("set/b", 0)[0] == "set/b/000000"
        path.write_bytes(bytes(len(data)))
        error = bad(lambda: pickle.loads(pickle.dumps(joined)).read("set/b", 1))
        assert error.reason.startswith(side) and error.shard == "set/b"
        path.write_bytes(data)
    os.remove(tmp_path / "images" / "b.tar")
    assert "image: " in bad(lambda: pickle.loads(pickle.dumps(joined)).read("set/b", 1)).reason


def test_plain_sets_are_not_joined(tmp_path):
    images = make(tmp_path / "images")
    with pytest.raises(ShardError, match="images.*stage=pseudolabel"):
        JoinedRecords(images, images)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve files, by range if `ranges`; `seen` lists the requests."""

    ranges = True
    seen: list = []

    def do_GET(self):  # noqa: N802, the library's name
        self.seen.append((self.path, self.headers.get("Range")))
        path = Path(self.directory, self.path.lstrip("/"))
        if not path.is_file():
            return self.send_error(404)
        data, wanted = path.read_bytes(), self.headers.get("Range")
        if wanted and self.ranges:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Fresh", (Handler,), {"seen": []})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path))
    ) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,))
        thread.start()
        served.handler = handler
        served.address = f"http://127.0.0.1:{served.server_address[1]}"
        yield served
        served.shutdown()
        thread.join()


def test_http_by_range(tmp_path, server):
    make(tmp_path / "set")
    read = Records(open_set(f"{server.address}/set/"))
    assert read.read("set/b", 3) == records("b")[3] and read.read("set/b", 0) == records("b")[0]
    assert [path for path, _ in server.handler.seen] == [
        "/set/manifest.json",
        "/set/b.idx",
        *["/set/b.tar"] * 2,
    ]
    assert all(wanted for path, wanted in server.handler.seen if path.endswith(".tar"))
    assert not (tmp_path / "cache").exists()


def test_http_without_ranges_copies_whole_shards_and_reports_it(tmp_path, server, capfd):
    made = make(tmp_path / "set")
    server.handler.ranges = False
    read = Records(open_set(f"{server.address}/set"))
    for index in (3, 0, 5):
        assert read.read("set/b", index) == records("b")[index]
    assert read.read("set/a", 1) == records("a")[1]
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "cache") in error
    assert f"{made.bytes / 1e9:.3f} GB" in error
    assert sorted(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) == sorted(
        shard.bytes for shard in made.shards[:2]
    )
    asked = [path for path, _ in server.handler.seen if path.endswith(".tar")]
    assert asked == ["/set/b.tar", "/set/b.tar", "/set/a.tar"]  # one request by range, then whole copies


def test_http_failures_are_bad_records(tmp_path, server):
    made = make(tmp_path / "set")
    with pytest.raises(ShardError, match="404"):
        open_set(f"{server.address}/absent")
    read = Records(open_set(f"{server.address}/set"))
    (tmp_path / "set" / "b.tar").unlink()
    assert "404" in bad(lambda: read.read("set/b", 0)).reason
    (tmp_path / "set" / "c.idx").unlink()
    assert "404" in bad(lambda: read.read("set/c", 0)).reason
    data = (tmp_path / "set" / "a.tar").read_bytes()
    (tmp_path / "set" / "a.tar").write_bytes(data[:3000])
    assert "truncated" in bad(lambda: read.read("set/a", 5)).reason
    server.handler.ranges = False
    assert f"3000 of {made.shards[0].bytes}" in bad(lambda: read.read("set/a", 0)).reason
    assert not list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.filterwarnings("ignore")  # warnings of WebDataset's pipes
def test_pipes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE", str(tmp_path / "cache"))
    make(tmp_path / "set")
    read = Records(open_set(f"pipe:cat {tmp_path}/set"))
    assert read.read("set/a", 2) == records("a")[2] and read.read("set/a", 4) == records("a")[4]
    assert "DEPTH_ANYTHING_CACHE_GB=N" in capfd.readouterr().err


def test_fsspec_addresses(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("DEPTH_ANYTHING_CACHE", str(tmp_path / "cache"))
    make(tmp_path / "set")
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "set").iterdir():
        memory.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    read = Records(open_set("memory://bucket/set"))
    assert read.read("set/c", 5) == records("c")[5]
    assert "z.idx" in bad(lambda: ShardReader().read("memory://bucket/set/z.tar", 0)).reason


def test_index_stays_small(tmp_path):
    import tracemalloc

    keys = [f"a_set_of_photographs/000123/{i:06d}" for i in range(1000)]
    write_shard(tmp_path / "a.tar", [(key, {"jpg": b"", "json": b"", "depth.q12": b""}) for key in keys])
    reader = ShardReader()
    tracemalloc.start()
    reader.index(tmp_path / "a.tar")
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()
    assert reader.keys(tmp_path / "a.tar") == keys


def test_every_record_of_a_random_shard(tmp_path):
    rng = np.random.default_rng(11)
    given = []
    for i in range(50):
        fields = rng.choice(["jpg", "json", "txt", "depth.f32", "cls"], rng.integers(1, 6), replace=False)
        key = "/".join(rng.choice(list("abc_-9")) * int(rng.integers(1, 5)) for _ in range(2)) + f"{i}"
        given.append((key, {str(field): rng.bytes(int(rng.integers(0, 3000))) for field in fields}))
    write_shard(tmp_path / "a.tar", given)
    reader = ShardReader()
    assert [reader.read(tmp_path / "a.tar", i) for i in range(50)] == given
    assert [reader.find(tmp_path / "a.tar", key) for key, _ in given] == list(range(50))
