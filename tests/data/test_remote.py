"""Shards over http, with all kinds of failures: which are retried, which are not, and what is reported."""

import functools
import itertools
import json
import multiprocessing
import pickle
import shutil
import sys
import threading
import traceback
from pathlib import Path

import pytest
import urllib3
from local_servers import FaultyServer, nginx
from shard_builders import make, records

from depth_anything.data import remote, retry
from depth_anything.data.reader import JoinedRecords, Records, ShardReader
from depth_anything.data.shards import open_set, verify_set, write_manifest
from depth_anything.data.tars import BadRecord, ShardError, StorageUnavailable, write_shard

TAR = "/set/000001.tar"


@pytest.fixture(autouse=True)
def environment(clean_remote_state, tmp_path, monkeypatch):
    """A home folder without ~/.netrc."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def waits(monkeypatch):
    """Record the waits instead of sleeping."""
    seconds = []
    monkeypatch.setattr(retry, "sleep", seconds.append)
    return seconds


def set_short_timeout(monkeypatch):
    """Treat 0.3 s of silence as a stall. A busy machine may be silent as long; then there is only one more retry."""
    monkeypatch.setenv("DEPTH_ANYTHING_TIMEOUT", "0.3")
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "20")


@pytest.fixture
def server(tmp_path):
    make(tmp_path / "set")
    with FaultyServer(tmp_path) as made:
        yield made


def faults(*kinds, path=TAR):
    """Let the first requests of a path fail in these ways; "*" repeats the one before it."""

    def fault(asked, times):
        if not asked.startswith(path):
            return None
        if times < len(kinds):
            return kinds[times] if kinds[times] != "*" else kinds[-2]
        return kinds[-2] if kinds and kinds[-1] == "*" else None

    return fault


def asked(server, path=TAR):
    return [seen for seen in server.seen if seen[0].startswith(path)]


def test_one_connection_serves_many_ranges(server):
    read = Records(open_set(f"{server.address}/set"))
    for index in (3, 0, 4, 1):
        assert read.read("set/000001", index) == records("000001")[index]
    assert server.connections == 1
    assert [path for path, _ in server.seen] == ["/set/manifest.json", "/set/000001.idx", *[TAR] * 4]
    assert all(wanted for path, wanted in server.seen if path == TAR)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("500", "HTTP 500"),
        ("503", "HTTP 503"),
        ("429", "HTTP 429"),
        ("cut", "cut short"),
        ("stall", "stalled"),
        ("drip", "stalled"),
    ],
)
@pytest.mark.parametrize("path", [TAR, "/set/000001.idx", "/set/manifest.json"])
def test_temporary_failures_are_reported_and_retried(server, waits, capfd, monkeypatch, kind, said, path):
    if said == "stalled":
        set_short_timeout(monkeypatch)
    server.fault = faults(kind, kind, path=path)
    read = Records(open_set(f"{server.address}/set"))
    assert [read.read("set/000001", i) for i in range(5)] == records("000001")
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith(f"{server.address}{path}: ")]
    assert said in line
    assert (0.5, 1.0) in itertools.pairwise(waits)
    if said != "stalled":
        assert len(lines) == 1 and waits == [0.5, 1.0]


@pytest.mark.parametrize("kind", ["reset", "close"])
def test_closed_idle_connection_is_retried_silently_once(server, waits, capfd, kind):
    server.fault = faults(kind)
    read = Records(open_set(f"{server.address}/set"))
    assert read.read("set/000001", 0) == records("000001")[0]
    assert not capfd.readouterr().err and not waits
    server.fault = faults(kind, kind, path="/set/000002.tar")
    assert read.read("set/000002", 0) == records("000002")[0]
    assert "/set/000002.tar" in capfd.readouterr().err and waits == [1.0]


class ResponseInPieces:
    """A response whose body arrives in four pieces, also on a busy machine."""

    def __init__(self, size):
        self.left = [bytes(size)] * 4

    def read1(self, most):
        return self.left.pop() if self.left else b""

    def release_conn(self):
        pass


@pytest.mark.parametrize(("size", "stalled"), [(100_000, False), (10_000, True)])
def test_slow_server_is_not_stalled(monkeypatch, size, stalled):
    """On a fake clock each piece takes a minute: pieces of 100 kB, or of less than 1 kB/s."""
    minutes = itertools.count(0, 61)
    monkeypatch.setattr(remote, "monotonic", lambda: next(minutes))
    if stalled:
        with pytest.raises(retry.RetryableError, match="10000 bytes in 61 s"):
            list(remote._read_chunks(ResponseInPieces(size)))
    else:
        assert b"".join(remote._read_chunks(ResponseInPieces(size))) == bytes(4 * size)


@pytest.mark.parametrize("kind", ["500", "reset", "close", "cut", "stall"])
def test_outage_is_not_a_bad_record(server, waits, monkeypatch, kind):
    read = Records(open_set(f"{server.address}/set"))
    read.read("set/000001", 1)
    server.seen.clear()
    if kind == "stall":
        monkeypatch.setenv("DEPTH_ANYTHING_TIMEOUT", "0.3")
        remote._pools.clear()
    server.fault = lambda path, times: kind
    with pytest.raises(StorageUnavailable, match="000001.tar ") as error:
        read.read("set/000001", 0)
    assert not isinstance(error.value, ValueError) and "\n" not in str(error.value)
    assert len(asked(server)) == 3 and waits == ([1.0] if kind in ("reset", "close") else [0.5, 1.0])
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    server.fault = faults()
    monkeypatch.setenv("DEPTH_ANYTHING_TIMEOUT", "60")
    remote._pools.clear()
    assert read.read("set/000001", 0) == records("000001")[0]  # the record is not marked as bad


def test_waits_double_up_to_a_minute(server, waits, monkeypatch):
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "9")
    server.fault = faults("500", "*")
    with pytest.raises(StorageUnavailable, match="10 times"):
        ShardReader().read(f"{server.address}{TAR}", 0)
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_server_that_does_not_run(tmp_path, waits):
    made = make(tmp_path / "set")
    with FaultyServer(tmp_path) as server:
        read = Records(open_set(f"{server.address}/set"))
        read.read("set/000000", 0)
    remote._pools.clear()  # the threads of the server run as long as its connections
    with pytest.raises(StorageUnavailable, match="000001.idx.*Connection refused"):
        read.read("set/000001", 0)
    with pytest.raises(StorageUnavailable, match="manifest.json.*host"):
        open_set("http://no-such-host.invalid/set")
    assert made.records == 15


@pytest.mark.parametrize("status", ["404", "403", "410", "400"])
def test_permanent_failure_is_a_bad_record(server, waits, capfd, status):
    server.fault = faults(status, "*")
    read = Records(open_set(f"{server.address}/set"))
    for index in range(4):
        with pytest.raises(BadRecord, match=f"HTTP {status}") as error:
            read.read("set/000001", index)
        assert (error.value.shard, error.value.key) == ("set/000001", f"set/000001/{index:06d}")
    assert len(asked(server)) == 2 and not waits and not capfd.readouterr().err
    assert read.read("set/000002", 0) == records("000002")[0]


def test_missing_authorization_is_not_retried(server, waits):
    server.fault = faults("401", "*")
    with pytest.raises(StorageUnavailable, match="HTTP 401"):
        Records(open_set(f"{server.address}/set")).read("set/000001", 0)
    assert len(asked(server)) == 1 and not waits


def test_missing_index_or_manifest(server, waits):
    server.fault = faults("404", "*", path="/set/000001.idx")
    read = Records(open_set(f"{server.address}/set"))
    with pytest.raises(BadRecord, match="000001.idx .*HTTP 404") as error:
        read.read("set/000001", 0)
    assert error.value.key == ""
    with pytest.raises(ShardError, match="manifest.json .*HTTP 404"):
        open_set(f"{server.address}/elsewhere")


def test_tar_of_another_size(tmp_path, server, waits):
    read = Records(open_set(f"{server.address}/set"))
    path = tmp_path / "set" / "000001.tar"
    data = path.read_bytes()
    for wrong in (data + bytes(512), data[:-512], data[:600]):
        path.write_bytes(wrong)
        with pytest.raises(BadRecord, match=f"{len(wrong)} bytes|truncated") as error:
            pickle.loads(pickle.dumps(read)).read("set/000001", 4)
        assert error.value.key == "set/000001/000004"
    server.fault = faults("short", "*", path="/set/000002.tar")  # with a matching Content-Length
    with pytest.raises(BadRecord, match="truncated"):
        read.read("set/000002", 4)
    assert not waits


@pytest.mark.parametrize("path", [TAR, "/set/000001.idx", "/set/manifest.json"])
def test_damaged_transfer_is_fetched_once_more(server, capfd, path):
    server.fault = faults("corrupt", path=path)
    read = Records(open_set(f"{server.address}/set"))
    assert [read.read("set/000001", i) for i in range(5)] == records("000001")
    assert len(asked(server, path)) == {TAR: 6}.get(path, 2)


def test_damaged_file_is_a_bad_record(server):
    server.fault = faults("corrupt", "*")
    read = Records(open_set(f"{server.address}/set"))
    for index in (1, 3):
        with pytest.raises(BadRecord, match="jpg") as error:
            read.read("set/000001", index)
        assert error.value.key == f"set/000001/{index:06d}"
    assert len(asked(server)) == 4  # other records of the shard are tried
    server.fault = faults("corrupt", "*", path="/set/manifest.json")
    with pytest.raises(ShardError, match="manifest.json"):
        open_set(f"{server.address}/set")


def test_joined_over_http(tmp_path, server):
    images = open_set(f"{server.address}/set")
    infos = []
    for shard in images.shards:
        rows = [(key, {"disparity.q12": key.encode()}) for key, _ in records(shard.name)]
        infos.append(write_shard(tmp_path / "labels" / f"{shard.name}.tar", rows))
    meta = {"images": {"set": "set", "hashes": {shard.name: shard.hash for shard in images.shards}}}
    write_manifest(tmp_path / "labels", name="set", shards=infos, meta=meta)
    joined = JoinedRecords(images, open_set(f"{server.address}/labels"))
    key, fields = joined.read("set/000001", 2)
    assert key == "set/000001/000002" and fields["jpg"] == records("000001")[2][1]["jpg"]

    class Flipped(FaultyServer):
        def fetch(self, path, headers):
            status, answered, body = super().fetch(path, headers)
            if path == "/set/000002.idx" and sum(seen == path for seen, _ in self.seen) == 1:
                body = body.replace(b"set/000002/000003", b"set/000002/00000Z")
            return status, answered, body

    with Flipped(tmp_path) as other:  # a key damaged in transfer, in an index without checksum
        joined = JoinedRecords(open_set(f"{other.address}/set"), open_set(f"{other.address}/labels"))
        assert joined.read("set/000002", 3)[1]["jpg"] == records("000002")[3][1]["jpg"]


def test_redirects_are_followed_to_http_only(tmp_path, server, waits):
    with FaultyServer(tmp_path) as other:
        server.fault = lambda path, times: f"to:{other.address}{path}"
        read = Records(open_set(f"{server.address}/set"))
        assert read.read("set/000001", 2) == records("000001")[2]
    for target in (f"file://{tmp_path}/set/manifest.json", "ftp://host/a", "//[", "gopher://x", "data:,x"):
        server.fault = lambda path, times, target=target: f"to:{target}"
        with pytest.raises(ShardError, match="manifest.json"):
            open_set(f"{server.address}/set")
    server.fault = lambda path, times: "to:/set/manifest.json"
    with pytest.raises(ShardError, match="manifest.json.*5 redirects"):
        open_set(f"{server.address}/set")
    assert not waits


def test_redirect_from_https_to_http_is_refused(monkeypatch):
    answer = urllib3.HTTPResponse(
        status=302, headers={"Location": "http://host/a.tar", "Content-Length": "0"}
    )
    monkeypatch.setattr(remote, "_send_request", lambda url, headers, trusted: answer)
    with pytest.raises(ShardError, match="https://host/a.tar .*http://host/a.tar"):
        remote.fetch("https://host/a.tar")


def test_credentials_are_sent_to_their_host_only(tmp_path, server, monkeypatch):
    named = server.address.replace("http://", "http://me:pass%20word@")
    with FaultyServer(tmp_path) as other:
        server.fault = lambda path, times: f"to:{other.address}{path}" if path.endswith(".tar") else None
        assert Records(open_set(f"{named}/set")).read("set/000001", 0) == records("000001")[0]
        assert {h.get("authorization") for h in server.headers} == {"Basic bWU6cGFzcyB3b3Jk"}
        assert other.headers and not any("authorization" in h for h in other.headers)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password word\ndefault login x password y\n")
    (tmp_path / ".netrc").chmod(0o600)
    remote._netrc_hosts.cache_clear()
    open_set(f"{server.address}/set")
    assert server.headers[-1]["authorization"] == "Basic bWU6d29yZA=="
    with pytest.raises(StorageUnavailable):
        open_set("http://no-such-host.invalid/set")
    assert remote._credentials(remote.urlsplit("http://elsewhere/set")) == {}


def test_secrets_are_redacted_in_messages(tmp_path, server, waits, capfd):
    root = server.address.replace("http://", "http://me:sesame@") + "/set/?signature=hush-hush"
    read = Records(open_set(root))
    assert read.read("set/000001", 0) == records("000001")[0]  # the signature is sent with every file
    assert all(path.endswith("?signature=hush-hush") for path, _ in server.seen)
    messages = []
    for kind in ("500", "404", "to:ftp://me:sesame@host/?hush-hush", "cut", "corrupt", "whole", "short"):
        server.fault = lambda path, times, kind=kind: kind
        for attempt in (
            lambda: open_set(root),
            lambda: pickle.loads(pickle.dumps(read)).read("set/000002", 1),
            lambda: ShardReader().read(read.set.url("000001"), 1),
        ):
            try:
                attempt()
            except (ShardError, BadRecord, StorageUnavailable) as error:
                messages += [str(error), repr(error), *traceback.format_exception(error)]
    assert len(messages) > 50
    everything = "".join(messages) + "".join(capfd.readouterr())
    assert "000002" in everything and "***@127.0.0.1" in everything
    assert "sesame" not in everything and "hush" not in everything


def read_there(read, index):
    return read.read("set/000001", index)


@pytest.mark.parametrize(("method", "processes"), [("fork", 2), ("spawn", 1)])  # a spawned one takes seconds
def test_other_processes_open_their_own_connections(server, method, processes):
    read = Records(open_set(f"{server.address}/set"))
    expected = [read.read("set/000001", i) for i in range(5)]
    assert server.connections == 1
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.apply(read_there, (read, 2)) == expected[2]
    assert server.connections == 2
    with context.Pool(processes) as pool:
        assert pool.map(functools.partial(read_there, read), [0, 1, 2, 3, 4] * 4) == expected * 4
    assert 3 <= server.connections <= 4
    assert read.read("set/000001", 3) == expected[3] and server.connections <= 4


def test_threads_read_in_parallel(server):
    made, errors = open_set(f"{server.address}/set"), []

    def work():
        read = Records(made)
        try:
            for index in (0, 4, 2):
                assert read.read("set/000001", index) == records("000001")[index]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_prefetched_records_are_fetched_in_parallel(server):
    """The server answers four requests only when all four have arrived."""
    read = Records(open_set(f"{server.address}/set"))
    read.read("set/000001", 0)
    meeting = threading.Barrier(4, timeout=120)
    server.fault = lambda path, times: meeting.wait() and None
    places = [("set/000001", index) for index in (3, 1, 4, 0)]
    read.prefetch(places)
    assert [read.read(*place) for place in places] == [records("000001")[index] for _, index in places]
    server.fault = faults("404", "*")
    read.prefetch([("set/000001", 2), ("set/000002", 2)])
    assert read.read("set/000002", 2) == records("000002")[2]
    with pytest.raises(BadRecord, match="HTTP 404"):
        read.read("set/000001", 2)
    read.prefetch([("set/000002", 1)])
    with multiprocessing.get_context("fork").Pool(
        1
    ) as pool:  # the child does not use the requests of its parent
        assert pool.apply(read.read, ("set/000002", 1)) == records("000002")[1]
    assert pickle.loads(pickle.dumps(read)).read("set/000002", 1) == records("000002")[1]


def test_verify_a_remote_set(tmp_path, server, waits):
    root = server.address.replace("http://", "http://me:sesame@") + "/set"
    assert verify_set(root) == [] and len(asked(server)) == 1
    server.fault = faults("404", "*")
    (problem,) = verify_set(root)
    assert "/set/000001.tar[4] set/000001/000004: " in problem and "HTTP 404" in problem
    assert "sesame" not in problem
    server.fault = faults("404", "*", path="/set/000002.idx")
    (problem,) = verify_set(root)
    assert "/set/000002.idx" in problem and "HTTP 404" in problem
    server.fault = faults()
    assert len(verify_set(root, decode=True)) == 15  # random bytes are not images
    write_shard(tmp_path / "set" / "000001.tar", records("000002"))
    (problem, *repeated) = verify_set(root)
    assert "/set/000001.tar" in problem and len(repeated) == 5
    assert 'the key "set/000002/000000" is in 000001 and in 000002' in repeated
    server.fault = faults("500", "*", path="/set/000000.tar")
    with pytest.raises(StorageUnavailable, match="HTTP 500"):
        verify_set(root)


def test_benchmark_runs(tmp_path, fork_server):
    if shutil.which("nginx") is None and shutil.which("nginx", path="/usr/sbin") is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    path = Path(__file__).parents[2] / "benchmarks" / "bench_remote.py"
    command = "--shards 1 --records 4 --count 4 --batch 2 --repeats 1 --latency 1 --json".split()
    done = fork_server.run([sys.executable, path, *command, tmp_path / "out.json"])
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results.keys() == {"disk", "http", "http, at once", "fsspec", "pipe:curl"}
    assert all(row["wall_ms"]["median"] > 0 and row["cpu_ms"]["iqr"] >= 0 for row in results.values())


def test_invalid_environment_variable(server, monkeypatch):
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "many")
    with pytest.raises(ValueError, match="DEPTH_ANYTHING_RETRIES=many "):
        open_set(f"{server.address}/set")


def test_nginx(tmp_path, capfd):
    make(tmp_path / "set")
    with nginx(tmp_path, tmp_path / "state") as address:
        read = Records(open_set(f"{address}/set"))
        for shard, index in (("000001", 3), ("000000", 0), ("000002", 4), ("000001", 1)):
            assert read.read(f"set/{shard}", index) == records(shard)[index]
        (tmp_path / "set" / "000001.tar").unlink()
        with pytest.raises(BadRecord, match="HTTP 404"):
            read.read("set/000001", 0)
    lines = (tmp_path / "state" / "access.log").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == 1  # one connection
    assert [line.split()[1] for line in lines if line.endswith(".tar")] == ["206"] * 4 + ["404"] * 2
    assert not capfd.readouterr().err
