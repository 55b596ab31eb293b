"""Servers on loopback for shards: nginx, moto's S3 server, and a server that fails on request."""

import http.client
import http.server
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

CONFIGURATION = """\
daemon off; worker_processes 1; pid {state}/pid; error_log {state}/error.log; {user}
events {{ worker_connections 256; }}
http {{
  client_body_temp_path {state}/1; proxy_temp_path {state}/2; fastcgi_temp_path {state}/3;
  uwsgi_temp_path {state}/4; scgi_temp_path {state}/5;
  log_format ours '$connection $status $body_bytes_sent $request_uri'; access_log {state}/access.log ours;
  keepalive_timeout 60; sendfile on;
  server {{ listen 127.0.0.1:{port}; root {root}; {more} }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int, process: subprocess.Popen, seconds: float = 120.0) -> None:
    """Wait until a server listens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail(f"{process.args} does not listen")


@contextmanager
def nginx(root: Path, state: Path, *, more: str = "", port: int | None = None) -> Iterator[str]:
    """Run nginx on a folder; yield its address. Its log is state/access.log."""
    program = shutil.which(
        "nginx", path=os.defpath + os.pathsep + "/usr/sbin" + os.pathsep + os.environ["PATH"]
    )
    if program is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    state.mkdir(exist_ok=True)
    port = port or free_port()
    user = "user root;" if os.getuid() == 0 else ""
    text = CONFIGURATION.format(state=state, port=port, root=root, more=more, user=user)
    (state / "nginx.conf").write_text(text)
    process = subprocess.Popen(
        [program, "-p", str(state), "-e", str(state / "error.log"), "-c", str(state / "nginx.conf")],
        stderr=subprocess.DEVNULL,
    )
    try:
        answers(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def s3(buckets: dict[str, Path]) -> Iterator[str]:
    """Run moto's S3 server in a process, with folders as buckets; yield its address."""
    pytest.importorskip("moto", reason="needs moto: pip install 'moto[server]'")
    pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        answers(port, process)
        address = f"http://127.0.0.1:{port}"
        for bucket, folder in buckets.items():
            put(f"{address}/{bucket}", b"")
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    put(f"{address}/{bucket}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        yield address
    finally:
        process.terminate()
        process.wait(60)


def put(address: str, data: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(address, data=data, headers=headers, method="PUT")
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).close()


def s3_environment(address: str) -> dict[str, str]:
    """Environment variables for clients of such a server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "made",
        "AWS_SECRET_ACCESS_KEY": "up-and-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


# Path of a request and number of earlier requests of it, to the way to fail.
Fault = Callable[[str, int], str | None]


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder, or forwards to another server, and fails as `fault` says.

    Attributes:
        fault: Path and number of earlier requests of it, to None or a way to fail: "500" (any status), "reset",
            "close", "cut", "stall", "drip", "slow", "corrupt", "whole" (ranges are ignored), "short" (half of the
            bytes, as if complete), "to:ADDRESS" (a redirect), "lost" (a write is done, its answer is not sent).
        seen: Path and Range of every request.
        connections: Number of connections.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, behind: Path | str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.fault: Fault = lambda path, times: None
        self.seen: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.writes: list[tuple[str, str]] = []  # method and path of every request but GET and HEAD
        self.write_fault: Fault = lambda request, times: (
            None
        )  # "METHOD path" and number of earlier such requests
        self.connections = 0
        self.over = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._lock = threading.Lock()
        self._times: dict[str, int] = {}

    def __enter__(self) -> "FaultyServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing when a client closes its connection."""

    def note(self, path: str, wanted: str | None) -> str | None:
        with self._lock:
            times = self._times.get(path, 0)
            self._times[path] = times + 1
            self.seen.append((path, wanted))
        return self.fault(path, times)

    def fetch(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the folder or of the other server."""
        if isinstance(self.behind, str):
            parts = urlsplit(self.behind)
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=120)
            connection.request("GET", path, headers={**headers, "connection": "close"})
            response = connection.getresponse()
            body, answered = response.read(), dict(response.getheaders())
            connection.close()
            return response.status, answered, body
        file = Path(self.behind, unquote(urlsplit(path).path).lstrip("/"))
        if not file.is_file():
            return 404, {}, b""
        data, wanted = file.read_bytes(), headers.get("range")
        if not wanted:
            return 200, {}, data
        first, last = (int(n or len(data)) for n in wanted.removeprefix("bytes=").split("-"))
        if first >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        part = data[first : last + 1]
        return 206, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}, part


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def setup(self) -> None:
        self.server.connections += 1
        super().setup()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802, the library's name
        self.forward(b"")

    def do_DELETE(self) -> None:  # noqa: N802
        self.write(b"")

    def do_PUT(self) -> None:  # noqa: N802
        self.write(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_POST = do_PUT  # noqa: N815

    def write(self, body: bytes) -> None:
        """Forward a request that changes something, or fail."""
        request = f"{self.command} {self.path}"
        with self.server._lock:
            times = self.server._times.get(request, 0)
            self.server._times[request] = times + 1
            self.server.writes.append((self.command, self.path))
        fault = self.server.write_fault(request, times) or ""
        if fault.isdecimal():
            return self.reply(int(fault), {"Retry-After": "0"}, b"")
        if fault in ("reset", "close"):
            return self.leave(reset=fault == "reset")
        self.forward(body, lost=fault == "lost")

    def forward(self, body: bytes, *, lost: bool = False) -> None:
        """Send the request to the other server as it is, and its answer back."""
        assert isinstance(self.server.behind, str)
        parts = urlsplit(self.server.behind)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=120)
        headers = {**dict(self.headers.items()), "Connection": "close"}
        connection.request(self.command, self.path, body=body, headers=headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if lost:
            return self.leave(reset=True)
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        if self.command != "HEAD" and response.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:  # noqa: N802, the library's name
        fault = self.server.note(self.path, self.headers.get("Range")) or ""
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.headers.append(headers)
        if fault.startswith("to:"):
            return self.reply(302, {"Location": fault.removeprefix("to:")}, b"")
        if fault.isdecimal():
            return self.reply(int(fault), {"Retry-After": "0"}, b"trouble")
        if fault in ("reset", "close"):
            return self.leave(reset=fault == "reset")
        if fault == "whole":
            headers.pop("range", None)
        status, answered, body = self.server.fetch(self.path, headers)
        if fault == "corrupt" and body:
            middle = 10 if status == 206 else len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault == "short":
            body = body[: len(body) // 2]
        kept = {name: value for name, value in answered.items() if name.lower() in FORWARDED_HEADERS}
        self.reply(status, kept, body, fault=fault)

    def reply(self, status: int, headers: dict[str, str], body: bytes, *, fault: str = "") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "slow":
            for start in range(0, len(body), -(-len(body) // 4) or 1):
                self.wfile.write(body[start : start + (-(-len(body) // 4) or 1)])
                time.sleep(0.005)
        elif fault == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                if self.server.over.wait(0.05):
                    return self.leave(reset=True)
        elif fault in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.over.wait(120)
            self.leave(reset=False)
        else:
            self.wfile.write(body)

    def leave(self, *, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True


FORWARDED_HEADERS = (
    "content-range",
    "content-type",
    "etag",
    "last-modified",
    "accept-ranges",
    "x-amz-request-id",
    "x-amz-version-id",
)
