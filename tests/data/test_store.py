"""Writing to object stores: moto's S3 server on loopback, behind a server that fails on request."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from depth_anything.data import object_lease, store
from depth_anything.data.object_lease import ObjectLease, process_identity
from depth_anything.data.store import FolderStore, ObjectStore, open_store
from depth_anything.data.tars import ShardError, StorageUnavailable


@pytest.fixture
def place(s3_prefix):
    return ObjectStore(s3_prefix)


def file_of(tmp_path, data, name="00000.tar"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("remote", [False, True])
def test_small_files(remote, place, tmp_path):
    files = place if remote else FolderStore(tmp_path / "set")
    (tmp_path / "set").mkdir()
    assert files.names() == set() and files.size("a.json") is None and not files.exists("a.json")
    with pytest.raises(FileNotFoundError):
        files.read("a.json")
    assert files.write_new("a.json", b"one") and not files.write_new("a.json", b"two")
    assert files.read("a.json") == b"one" and files.read("a.json", first_bytes=2) == b"on"
    files.write("a.json", b"three")
    files.write(".b", b"")
    assert files.size("a.json") == 5 and files.names() == {"a.json", ".b"} and files.names(".") == {".b"}
    files.delete("a.json")
    files.delete("a.json")
    assert files.names() == {".b"}


def test_open_store_refuses_addresses_that_cannot_be_written(tmp_path):
    assert isinstance(open_store(tmp_path), FolderStore) and isinstance(
        open_store("s3://bucket/a"), ObjectStore
    )
    for address in ("https://host/set?signature=hidden", "pipe:cat"):
        with pytest.raises(ShardError) as error:
            open_store(address)
        assert "hidden" not in str(error.value)


def test_one_of_many_writers_creates_an_object(place):
    assert place.conditional
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda n: place.write_new("claim", b"%d" % n), range(8)))
    assert sum(written) == 1 and place.read("claim") == b"%d" % written.index(True)


def test_an_answer_that_is_lost_does_not_make_a_writer_lose(place, faulty_s3):
    assert place.conditional
    faulty_s3.write_fault = lambda request, times: "lost" if times == 0 and "claim" in request else None
    assert place.write_new("claim", b"mine") and not place.write_new("claim", b"other")
    assert place.read("claim") == b"mine"


@pytest.mark.parametrize("answer", ["ignored", "501"])
def test_a_store_without_conditional_writes_is_recognized(place, faulty_s3, capfd, answer):
    """Some S3-compatible stores ignore If-None-Match, others answer 501."""
    behind = faulty_s3.RequestHandlerClass

    class Old(behind):
        def do_PUT(self):
            if "If-None-Match" in self.headers:
                del self.headers["If-None-Match"]
                if answer == "501":
                    self.rfile.read(int(self.headers["Content-Length"]))
                    return self.reply(501, {}, b"<Error><Code>NotImplemented</Code></Error>")
            return super().do_PUT()

    faulty_s3.RequestHandlerClass = Old
    assert not place.conditional and not place.conditional
    assert capfd.readouterr().err.count("no conditional writes") == 1
    assert place.write_new("a", b"1") and not place.write_new("a", b"2") and place.names() == {"a"}


@pytest.mark.parametrize("size", [0, 1 << 20, 11 << 20])
def test_files_are_uploaded_whole_or_in_parts_and_compared(place, tmp_path, monkeypatch, size):
    monkeypatch.setattr(store, "_PART_BYTES", 5 << 20)
    path = file_of(tmp_path, os.urandom(size))
    assert place.upload(path, "a/b.tar", new=True) and place.upload(path, "a/b.tar", new=True)
    info = place.list()["a/b.tar"]
    assert info.size == size and ("-3" in info.etag) == (size > 10 << 20)
    assert place.holds("a/b.tar", path) and not place.holds("none", path)
    place.download("a/b.tar", tmp_path / "copy" / "b.tar")
    assert (tmp_path / "copy" / "b.tar").read_bytes() == path.read_bytes()
    other = file_of(tmp_path, b"x" * size + b"y", "other")
    assert not place.holds("a/b.tar", other) and not place.upload(other, "a/b.tar", new=True)


def test_a_finished_object_is_never_replaced_unless_asked(place, tmp_path):
    place.publish(file_of(tmp_path, b"first"))
    place.publish(file_of(tmp_path, b"first"))  # the same bytes again
    with pytest.raises(ShardError, match="00000.tar .*aws s3 rm s3://bucket/"):
        place.publish(file_of(tmp_path, b"other"))
    assert place.read("00000.tar") == b"first"
    place.publish(file_of(tmp_path, b"other"), replace=True)
    assert place.read("00000.tar") == b"other"


def test_parts_are_compared_without_reading_them_back(place, faulty_s3, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_PART_BYTES", 5 << 20)
    path = file_of(tmp_path, os.urandom(11 << 20))
    faulty_s3.seen.clear()
    assert place.upload(path, "a") and place.holds("a", path)
    assert not faulty_s3.seen


def test_a_download_that_is_cut_short_is_repeated(place, faulty_s3, tmp_path):
    data = os.urandom(1000)
    place.write("a", data)
    faulty_s3.fault = lambda path, times: "short" if times == 0 else None
    place.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data and len(faulty_s3.seen) == 2


@pytest.mark.parametrize("size", [5, 6 << 20])
def test_an_object_that_appears_during_an_upload_is_not_replaced(place, tmp_path, monkeypatch, size):
    """As two processes see it that upload at the same time; in parts the last request has the condition."""
    monkeypatch.setattr(store, "_PART_BYTES", 5 << 20)
    assert place.upload(file_of(tmp_path, b"first"), "a", new=True)
    monkeypatch.setattr(ObjectStore, "exists", lambda self, name: False)
    assert not place.upload(file_of(tmp_path, bytes(size)), "a", new=True)
    assert place.read("a") == b"first"


def test_a_wrong_checksum_is_uploaded_again(place, faulty_s3, tmp_path, monkeypatch):
    """The store has other bytes than were sent: the upload is repeated, then reported."""
    path, real = file_of(tmp_path, b"0123456789"), store.ObjectStore.info
    asked = []

    def damaged(self, name):
        asked.append(name)
        info = real(self, name)
        return store.ObjectInfo(info.size - 1, info.etag) if len(asked) == 1 else info

    monkeypatch.setattr(store.ObjectStore, "info", damaged)
    assert place.upload(path, "a") and place.read("a") == b"0123456789"
    assert len([1 for method, at in faulty_s3.writes if method == "PUT" and at.endswith("/a")]) == 2
    monkeypatch.setattr(store.ObjectStore, "info", lambda self, name: store.ObjectInfo(1))
    with pytest.raises(StorageUnavailable, match="1 of 10 bytes arrived"):
        place.upload(path, "a")


def test_tags_that_are_no_checksums_are_recognized_once(place, tmp_path, monkeypatch):
    """With KMS keys S3's ETags are of the encrypted bytes."""
    path, real, read = file_of(tmp_path, b"0123456789"), store.ObjectStore.info, []
    monkeypatch.setattr(
        store.ObjectStore, "info", lambda self, name: store.ObjectInfo(real(self, name).size, "0" * 32)
    )
    equal = store.ObjectStore._equal_content
    monkeypatch.setattr(
        store.ObjectStore, "_equal_content", lambda *arguments: read.append(1) or equal(*arguments)
    )
    place.upload(path, "a")
    place.upload(path, "b")
    assert len(read) == 1


@pytest.mark.parametrize("kind", ["500", "503", "close", "reset", "lost"])
def test_temporary_failures_are_retried(place, faulty_s3, tmp_path, monkeypatch, capfd, kind):
    monkeypatch.setattr(store, "_PART_BYTES", 5 << 20)
    path = file_of(tmp_path, os.urandom(11 << 20))
    failed = []

    def fault(request, times):
        part = re.search(r"partNumber=(\d)", request)
        if "00000.tar" in request and len(failed) < 2 and (kind != "lost" or not part):
            failed.append(request)
            return kind
        return None

    faulty_s3.write_fault = fault
    place.publish(path)
    assert len(failed) == 2 and place.holds("00000.tar", path)
    assert "00000.tar: " in capfd.readouterr().err
    faulty_s3.write_fault = lambda request, times: "503"
    with pytest.raises(StorageUnavailable, match="00001.tar cannot be written for now: .*3 times"):
        place.publish(file_of(tmp_path, b"next", "00001.tar"))


UPLOAD = """
import sys
from pathlib import Path
from depth_anything.data import store
store._PART_BYTES = 5 << 20
store._PARALLEL_PARTS = 1
store.ObjectStore(sys.argv[1]).upload(Path(sys.argv[2]), "00000.tar")
"""


def test_an_upload_that_is_killed_between_parts_leaves_nothing_visible(place, faulty_s3, tmp_path):
    path = file_of(tmp_path, os.urandom(16 << 20))
    second, wait = threading.Event(), threading.Event()

    def fault(request, times):
        if "partNumber=2" in request and not wait.is_set():
            second.set()
            wait.wait(120)
        return None

    faulty_s3.write_fault = fault
    uploading = subprocess.Popen([sys.executable, "-c", UPLOAD, place.root, str(path)])
    try:
        assert second.wait(120)
    finally:
        uploading.kill()
        uploading.wait(60)
        wait.set()
    assert place.names() == set() and not place.exists("00000.tar")
    place.publish(path)
    assert place.names() == {"00000.tar"} and place.holds("00000.tar", path)


def test_errors_say_what_to_type(faulty_s3, tmp_path, monkeypatch):
    path = file_of(tmp_path, b"data")
    missing = ObjectStore("s3://no-such-bucket/set")
    for work in (missing.names, lambda: missing.write("a", b""), lambda: missing.upload(path, "a")):
        with pytest.raises(ShardError, match="no-such-bucket.*aws s3 mb s3://no-such-bucket"):
            work()
    faulty_s3.write_fault = lambda request, times: "403"
    with pytest.raises(ShardError, match="s3://bucket/set/a: access denied .*AWS_ACCESS_KEY_ID") as error:
        ObjectStore("s3://bucket/set").write("a", b"")
    assert "up-and-secret" not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StorageUnavailable, match="127.0.0.1:9.*AWS_ENDPOINT_URL"):
        ObjectStore("s3://bucket/set").write("a", b"")


def lease(place, **options):
    return ObjectLease(place, ".0.lease", stale_s=100, **options)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(object_lease.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(object_lease, "_seen", {})
    monkeypatch.setattr(object_lease, "_renewed", {})
    return now


def test_one_process_holds_a_lease(place, clock):
    first, second = lease(place), lease(place, pid=os.getppid())
    assert first.acquire() and not second.acquire() and not lease(place).acquire()
    second.release()  # it is not its own
    assert first.renew(force=True) and not second.acquire()
    first.release()
    assert second.acquire() and not first.renew(force=True)
    first.release()
    assert second.renew(force=True)


def test_the_lease_of_a_killed_process_of_this_machine_is_free(place, clock):
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert lease(place, pid=dead.pid).acquire() and not lease(place).acquire()
    dead.kill()
    dead.wait()
    assert lease(place).acquire()


def test_the_lease_of_another_machine_expires_when_it_is_not_renewed(place, clock):
    def elsewhere(beat):
        content = {"host": "elsewhere", "pid": 1, "process": "elsewhere/b/n/1.1", "beat": beat}
        place.write(".0.lease", json.dumps(content).encode())

    elsewhere("a")
    mine = lease(place)
    assert not mine.acquire()
    clock[0] += 99
    elsewhere("b")
    assert not mine.acquire()
    clock[0] += 99
    assert not mine.acquire()
    clock[0] += 2
    assert mine.acquire() and mine.renew(force=True)
    elsewhere("c")  # it wakes up and has not noticed: the next renewal of either tells
    assert not mine.renew(force=True)


def test_renewing_asks_the_store_only_now_and_then(place, faulty_s3, clock):
    mine = lease(place)
    assert mine.acquire()
    before = len(faulty_s3.writes)
    assert all(mine.renew() for _ in range(50)) and len(faulty_s3.writes) == before
    clock[0] += 26
    assert mine.renew() and len(faulty_s3.writes) == before + 1


def test_a_process_is_known_by_more_than_its_number():
    mine = process_identity(os.getpid())
    assert mine == process_identity(os.getpid()) != process_identity(os.getppid())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(process_identity, (os.getpid(),)) == mine
    assert Path("/proc/self").exists() is ("." in mine and not mine.endswith("."))
