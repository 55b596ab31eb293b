"""Writing to gs:// through gcsfs, with a small server of Google's JSON API: objects in memory, generation 0 honored."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest

from depth_anything.data import retry, store
from depth_anything.data.object_lease import ObjectLease
from depth_anything.data.store import ObjectStore
from depth_anything.data.tars import ShardError, StorageUnavailable

pytest.importorskip("gcsfs", reason="needs gcsfs: pip install gcsfs")
from gcsfs.extended_gcsfs import BucketType, ExtendedGcsFileSystem  # noqa: E402


class GoogleServer(http.server.ThreadingHTTPServer):
    """The requests of Google's JSON API that a store sends.

    Attributes:
        objects: Name to content.
        fault: Method and path to a status that is answered instead; None for none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, tuple[str, bool, bytearray]] = {}
        self.fault: Any = lambda request: None
        self.lock = threading.Lock()
        self.requests: list[str] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GoogleServer

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def failed(self) -> bool:
        request = f"{self.command} {unquote(self.path)}"
        self.server.requests.append(request)
        status = self.server.fault(request)
        if status:
            self.answer(status, {"error": {"message": "trouble", "code": status}})
        return bool(status)

    def row(self, name: str) -> dict[str, Any]:
        data = self.server.objects[name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        return {"name": name, "bucket": "bucket", "size": str(len(data)), "md5Hash": md5, "generation": "1"}

    def create(self, name: str, data: bytes, *, new: bool) -> None:
        with self.server.lock:
            if new and name in self.server.objects:
                return self.answer(412, {"error": {"message": "conditionNotMet", "code": 412}})
            self.server.objects[name] = data
        self.answer(200, self.row(name))

    def do_GET(self) -> None:  # noqa: N802
        if self.failed():
            return
        parts = urlsplit(self.path)
        query, name = parse_qs(parts.query), unquote(parts.path).partition("/o/")[2]
        if not name:
            prefix = query.get("prefix", [""])[0]
            names = sorted(each for each in self.server.objects if each.startswith(prefix))
            return self.answer(200, {"items": [self.row(each) for each in names]})
        if name not in self.server.objects:
            return self.answer(404, {"error": {"message": "No such object", "code": 404}})
        if query.get("alt") != ["media"] and "download" not in parts.path:
            return self.answer(200, self.row(name))
        data, wanted = (
            self.server.objects[name],
            re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")),
        )
        if wanted:
            data = data[int(wanted[1]) : int(wanted[2] or len(data)) + 1]
        self.answer(206 if wanted else 200, data)

    def do_POST(self) -> None:  # noqa: N802
        body = self.body()
        if self.failed():
            return
        query = parse_qs(urlsplit(self.path).query)
        if "upload_id" in query:
            return self.add_part(query["upload_id"][0], body)
        new = query.get("ifGenerationMatch") == ["0"]
        if query["uploadType"] == ["multipart"]:
            _, meta, data, _ = re.split(rb"(?:^|\n)--==0==(?:--)?", body, maxsplit=3)
            name = json.loads(meta.partition(b"\n\n")[2])["name"]
            return self.create(name, data.partition(b"\n\n")[2], new=new)
        key = str(len(self.server.uploads))
        self.server.uploads[key] = (query["name"][0], new, bytearray())
        self.answer(200, b"", Location=f"{self.server.address}/upload/storage/v1/b/bucket/o?upload_id={key}")

    def add_part(self, key: str, body: bytes) -> None:
        name, new, data = self.server.uploads[key]
        data += body
        _, last, total = map(int, re.findall(r"\d+", self.headers["Content-Range"]))
        if last + 1 == total:
            return self.create(name, bytes(data), new=new)
        self.answer(308, b"", Range=f"bytes=0-{last}")

    def do_DELETE(self) -> None:  # noqa: N802
        if self.failed():
            return
        name = unquote(urlsplit(self.path).path).partition("/o/")[2]
        found = self.server.objects.pop(name, None)
        self.answer(204 if found is not None else 404, b"")


@pytest.fixture
def google(clean_remote_state: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleServer]:
    server = GoogleServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    store._supports_conditions.cache_clear()

    async def plain(self: Any, bucket: str) -> Any:
        return BucketType.NON_HIERARCHICAL

    # Neither look for keys, nor ask what kind of bucket it is: both leave this machine.
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setattr(ExtendedGcsFileSystem, "_get_bucket_type", plain)
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:Sending a large body")  # aiohttp's, about how gcsfs uses it
def test_objects_are_written_listed_created_once_and_deleted(google, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_PART_BYTES", 1 << 20)
    place = ObjectStore("gs://bucket/set")
    assert place.names() == set() and place.size("a") is None and place.conditional
    with pytest.raises(FileNotFoundError):
        place.read("a")
    assert place.write_new("a", b"one") and not place.write_new("a", b"two")
    assert place.read("a") == b"one" and place.read("a", first_bytes=2) == b"on"
    path = tmp_path / "b.tar"
    for size in (10, 6 << 20):  # gcsfs uploads more than 5 MB in parts
        path.write_bytes(b"x" * size)
        assert place.upload(path, "b.tar") and place.holds("b.tar", path)
        assert place.upload(path, "b.tar", new=True)
    with monkeypatch.context() as patched:
        asked, real = [], ObjectStore.exists

        def exists(self: ObjectStore, name: str) -> bool:
            """As if another process wrote it between the question and the upload."""
            asked.append(name)
            return len(asked) > 1 and real(self, name)

        patched.setattr(ObjectStore, "exists", exists)
        assert place.upload(path, "b.tar", new=True) and asked
    place.download("b.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    path.write_bytes(b"other")
    with pytest.raises(ShardError, match="gcloud storage rm gs://bucket/set/b.tar"):
        place.publish(path)
    place.delete("a")
    place.delete("a")
    place.write(".0.lease", b"")
    assert place.names(".") == {".0.lease"} and place.names("b") == {"b.tar"}
    place.delete(".0.lease")
    assert place.names() == {"b.tar"} and set(google.objects) == {"set/b.tar"}


def test_a_lease_is_held_by_one_process(google):
    place = ObjectStore("gs://bucket/set")
    first, second = (ObjectLease(place, ".0.lease", stale_s=100) for _ in range(2))
    assert first.acquire() and not second.acquire() and first.renew(force=True)
    first.release()
    assert second.acquire()


def test_errors_are_retried_or_say_what_to_type(google):
    place, failed = ObjectStore("gs://bucket/set"), []

    def once(request: str) -> int | None:
        if request.startswith("POST") and not failed:
            failed.append(request)
            return 503
        return None

    google.fault = once
    place.write("a", b"1")
    assert place.read("a") == b"1"
    google.fault = lambda request: 403 if request.startswith("POST") else None
    with pytest.raises(ShardError, match="access denied .*GOOGLE_APPLICATION_CREDENTIALS"):
        place.write("a", b"2")
    google.fault = lambda request: 400 if request.startswith("POST") else None
    with pytest.raises(StorageUnavailable, match="gs://bucket/set/a cannot be written"):
        place.write("a", b"2")
    assert place.read("a") == b"1"
