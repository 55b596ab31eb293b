"""s3:// and gs:// through fsspec: S3 with moto's server, gs with a minimal server of these tests."""

import errno
import functools
import multiprocessing
import urllib.parse

import fsspec
import pytest
from local_servers import FaultyServer, s3, s3_environment
from shard_builders import make, records

from depth_anything.data import fsspec_io, remote, retry
from depth_anything.data.reader import Records
from depth_anything.data.shards import open_set
from depth_anything.data.tars import BadRecord, ShardError, StorageUnavailable

pytestmark = pytest.mark.usefixtures("clean_remote_state")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    root = tmp_path_factory.mktemp("bucket")
    make(root / "set")
    with s3({"shards": root}) as address:
        yield address


@pytest.fixture
def server(bucket, monkeypatch):
    with FaultyServer(bucket) as made:
        for name, value in s3_environment(made.address).items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        yield made


def read_there(read, index):
    return read.read("set/000001", index)


@pytest.mark.parametrize(("method", "processes"), [("fork", 2), ("spawn", 1)])  # a spawned one takes seconds
def test_s3_by_range_from_many_processes(server, tmp_path, method, processes):
    read = Records(open_set("s3://shards/set"))
    expected = records("000001")
    assert [read.read("set/000001", i) for i in (3, 0)] == [expected[3], expected[0]]
    with multiprocessing.get_context(method).Pool(processes) as pool:
        assert pool.map(functools.partial(read_there, read), range(5)) == expected
    assert read.read("set/000001", 4) == expected[4]
    tars = [wanted for path, wanted in server.seen if path.endswith(".tar")]
    # A busy machine may let a request time out; it is then sent again.
    assert len(tars) >= 8 and all(wanted and not wanted.endswith("-") for wanted in tars)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["500", "503", "cut", "close", "stall"])
def test_temporary_failures_of_s3_are_retried(server, monkeypatch, capfd, kind):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    read = Records(open_set("s3://shards/set"))
    read.read("set/000001", 1)
    times = []
    if kind == "stall":  # a busy machine may be as silent; then there are more retries
        monkeypatch.setenv("DEPTH_ANYTHING_TIMEOUT", "1")
        monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "20")

    def fault(path, asked):
        if path.endswith("000001.tar"):
            times.append(path)
            return kind if len(times) <= 2 else None
        return None

    server.fault = fault
    assert read.read("set/000001", 2) == records("000001")[2]
    assert len(times) == 3 or (kind == "stall" and len(times) > 3)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("s3://shards/set/000001.tar: ") and "retrying" in line
    server.fault = lambda path, times: kind if path.endswith("000001.tar") else None
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "1")
    with pytest.raises(StorageUnavailable, match="s3://shards/set/000001.tar .*2 times"):
        read.read("set/000001", 2)


def test_permanent_failures_of_s3(server):
    read = Records(open_set("s3://shards/set"))
    with pytest.raises(ShardError, match="s3://shards/nothing/manifest.json "):
        open_set("s3://shards/nothing")
    with pytest.raises(ShardError, match="s3://no-such-bucket/set/manifest.json"):
        open_set("s3://no-such-bucket/set")
    server.fault = lambda path, times: "404" if path.endswith("000001.tar") else None
    for index in (0, 1):
        with pytest.raises(BadRecord, match="000001.tar") as error:
            read.read("set/000001", index)
        assert error.value.key == f"set/000001/{index:06d}"
    assert len([path for path, _ in server.seen if path.endswith("000001.tar")]) == 2
    server.fault = lambda path, times: "short" if path.endswith("000002.tar") else None
    with pytest.raises(BadRecord, match="truncated"):
        read.read("set/000002", 0)
    table = remote.TarIndex([], bytes=1 << 30, hash="sha256:0")
    with pytest.raises(ShardError, match="000000.tar"):
        remote.fetch_range("s3://shards/set/000000.tar", 1 << 29, 10, table=table, total_bytes=None)


def s3_error(code):
    """An error as s3fs raises it: a Python error, with that of botocore as its cause."""
    cause = Exception(code)
    cause.response = {"Error": {"Code": code}}
    error = PermissionError(code) if code != "SlowDown" else OSError(errno.EBUSY, code)
    error.__cause__ = cause
    return error


def test_denied_access_is_permanent_and_expired_keys_stop_the_run():
    refused = fsspec_io.classify_read_error("s3://b/a.tar", s3_error("AccessDenied"))
    assert isinstance(refused, retry.PermanentError) and "AccessDenied" in str(refused)
    for code in ("ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed"):
        expired = fsspec_io.classify_read_error("s3://b/a.tar", s3_error(code))
        assert isinstance(expired, retry.RetryableError) and expired.fatal and code in expired.reason
    slow = fsspec_io.classify_read_error("s3://b/a.tar", s3_error("SlowDown"))
    assert isinstance(slow, retry.RetryableError) and not slow.fatal
    missing = type("NoCredentialsError", (Exception,), {})("Unable to locate credentials")
    assert fsspec_io.classify_read_error("s3://b/a.tar", missing).fatal
    assert isinstance(fsspec_io.classify_read_error("gs://b/a", Refused()), retry.PermanentError)


class Refused(Exception):
    """An error of gcsfs."""

    code = 404


def test_missing_package_is_named(monkeypatch):
    def missing(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ShardError, match=r"pip install 'depth-anything-train\[remote\]'"):
        open_set("s3://shards/set")


class Bucket(FaultyServer):
    """The one request of Google's JSON API that reading sends: the bytes of an object, by range."""

    def fetch(self, path, headers):
        name = urllib.parse.unquote(urllib.parse.urlsplit(path).path).rpartition("/o/")[2]
        status, answered, body = super().fetch(f"/{name}", headers)
        return status, {**answered, "content-type": "application/octet-stream"}, body


def test_gs_by_range(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gcsfs", reason="needs gcsfs: pip install gcsfs")
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    make(tmp_path / "set")
    with Bucket(tmp_path) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        read = Records(open_set("gs://shards/set"))
        assert [read.read("set/000001", i) for i in (4, 0)] == [records("000001")[4], records("000001")[0]]
        tars = [wanted for path, wanted in server.seen if ".tar" in path]
        assert len(tars) == 2 and all(wanted and not wanted.endswith("-") for wanted in tars)
        with pytest.raises(ShardError, match="gs://shards/nothing/manifest.json"):
            open_set("gs://shards/nothing")
        (tmp_path / "set" / "000002.tar").unlink()
        with pytest.raises(BadRecord, match="000002.tar"):
            read.read("set/000002", 0)
    assert not capfd.readouterr().err
