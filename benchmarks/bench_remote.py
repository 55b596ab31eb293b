"""Compare reading records over http with reading them from a disk.

    python benchmarks/bench_remote.py [--latency MS] [--json FILE]

nginx on loopback serves shards of random bytes, as large as an image and its label; with --latency a relay delays each
response, as a network does. The sides take turns and read the same records:

    disk            Records of a folder, in random order
    http            Records of an address, one after the other, by range on one connection
    http, at once   the same, each micro-batch prefetched in parallel
    fsspec          the same ranges with fsspec's http file system, in place of urllib3
    pipe:curl       WebDataset: whole shards, sequentially

CPU time is that of the reading process and, for pipe:curl, of its commands, without nginx.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import urllib3
import webdataset

from depth_anything.data.reader import Records, ShardReader
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import ShardSet, write_shard

CONFIGURATION = """\
daemon off; worker_processes 1; pid {state}/pid; error_log {state}/error.log; {user}
events {{ worker_connections 256; }}
http {{
  client_body_temp_path {state}/1; proxy_temp_path {state}/2; fastcgi_temp_path {state}/3;
  uwsgi_temp_path {state}/4; scgi_temp_path {state}/5; access_log off; sendfile on; keepalive_requests 1000000;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@contextmanager
def served(root: Path, state: Path) -> Iterator[int]:
    """Run nginx on a folder; yield its port."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise SystemExit("bench_remote.py needs nginx: apt-get install nginx-light")
    state.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = "user root;" if os.getuid() == 0 else ""
    (state / "nginx.conf").write_text(CONFIGURATION.format(state=state, port=port, root=root, user=user))
    command = [program, "-p", str(state), "-e", str(state / "error.log"), "-c", str(state / "nginx.conf")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def relayed(port: int, milliseconds: float) -> Iterator[int]:
    """Run a relay to a port that delays each response, in a process of its own, because it uses CPU time."""
    if not milliseconds:
        yield port
        return
    listener = socket.create_server(("127.0.0.1", 0))
    relay = os.fork()
    if relay == 0:
        while True:
            threading.Thread(
                target=hold, args=(listener.accept()[0], port, milliseconds / 1e3), daemon=True
            ).start()
    try:
        yield listener.getsockname()[1]
    finally:
        os.kill(relay, 9)
        os.waitpid(relay, 0)
        listener.close()


def hold(client: socket.socket, port: int, seconds: float) -> None:
    """Forward the requests and responses of one connection in turn."""
    server = socket.create_connection(("127.0.0.1", port))
    for sock in (client, server):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=carry, args=(server, client), daemon=True).start()
    while data := client.recv(1 << 16):
        time.sleep(seconds)
        server.sendall(data)
    server.close()


def carry(source: socket.socket, sink: socket.socket) -> None:
    while data := source.recv(1 << 20):
        sink.sendall(data)


def write(root: Path, args: argparse.Namespace) -> ShardSet:
    """Write a set of random bytes, with the sizes of an image and a label."""
    rng, infos = random.Random(0), []
    for shard in range(args.shards):
        rows = (
            (
                f"set/{shard}/{i}",
                {"jpg": rng.randbytes(args.image), "disparity.q12": rng.randbytes(args.label)},
            )
            for i in range(args.records)
        )
        infos.append(write_shard(root / f"{shard:06d}.tar", rows))
    return write_manifest(root, name="set", shards=infos, meta={})


class Sides:
    """The ways to read `count` records; each method returns how many it has read."""

    def __init__(self, root: Path, address: str, args: argparse.Namespace) -> None:
        self.disk, self.http = Records(open_set(root)), Records(open_set(address))
        self.address, self.batch = address, args.batch
        rng = random.Random(1)
        names = [name for name, _ in self.disk.shards]
        self.places = [(rng.choice(names), rng.randrange(args.records)) for _ in range(args.count)]
        self.web, reader = fsspec.filesystem("http"), ShardReader()
        self.ranges = []
        for name, index in self.places:
            members = reader.index(self.disk.set.url(name.split("/")[1])).members(index)
            url = self.http.set.url(name.split("/")[1])
            self.ranges.append((url, members[0].offset, members[-1].offset + members[-1].size))

    def from_disk(self) -> int:
        return sum(1 for place in self.places if self.disk.read(*place))

    def over_http(self) -> int:
        return sum(1 for place in self.places if self.http.read(*place))

    def at_once(self) -> int:
        for start in range(0, len(self.places), self.batch):
            batch = self.places[start : start + self.batch]
            self.http.prefetch(batch)
            for place in batch:
                self.http.read(*place)
        return len(self.places)

    def by_fsspec(self) -> int:
        return sum(1 for url, start, end in self.ranges if self.web.cat_file(url, start=start, end=end))

    def by_pipe(self) -> int:
        urls = [f"pipe:curl -s -f {self.address}/{s.name}.tar" for s in self.http.set.shards]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))


def cpu() -> float:
    """Return the CPU seconds of this process and of its finished commands."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure(work: Callable[[], int]) -> tuple[float, float]:
    """Return wall and CPU milliseconds per record."""
    wall, own = time.perf_counter(), cpu()
    count = work()
    return 1e3 * (time.perf_counter() - wall) / count, 1e3 * (cpu() - own) / count


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 4), "iqr": round(float(high - low), 4)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latency", type=float, default=0.0, help="delay of each response, ms")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--records", type=int, default=100, help="per shard")
    parser.add_argument("--image", type=int, default=100_000, help="bytes: short side 518, quality 92")
    parser.add_argument("--label", type=int, default=200_000, help="bytes: q12 at 518 x 686")
    parser.add_argument("--count", type=int, default=200, help="records per turn")
    parser.add_argument("--batch", type=int, default=24, help="records prefetched at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all results to this file")
    args = parser.parse_args(argv)
    figures: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "set"), args)
        with served(Path(folder), Path(folder, "state")) as nginx, relayed(nginx, args.latency) as port:
            sides = Sides(Path(folder, "set"), f"http://127.0.0.1:{port}/set", args)
            ways = {
                "disk": sides.from_disk,
                "http": sides.over_http,
                "http, at once": sides.at_once,
                "fsspec": sides.by_fsspec,
                "pipe:curl": sides.by_pipe,
            }
            for repeat in range(args.repeats + 1):
                for name, work in ways.items():
                    figure = measure(work)
                    if repeat:  # the first turn warms up
                        figures[name].append(figure)
    results = {
        name: {"wall_ms": spread([wall for wall, _ in pairs]), "cpu_ms": spread([own for _, own in pairs])}
        for name, pairs in figures.items()
    }
    for name, row in results.items():
        wall, own = row["wall_ms"], row["cpu_ms"]
        print(
            f"{name:<14} {1e3 / wall['median']:8.0f} records/s   {wall['median']:7.3f} ms (IQR {wall['iqr']:.3f})"
            f"   CPU {own['median']:6.3f} ms (IQR {own['iqr']:.3f})"
        )
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    machine = {
        "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version(),
        "urllib3": urllib3.__version__, "fsspec": fsspec.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    record = {
        "benchmark": "remote",
        "version": 1,
        "machine": machine,
        "settings": settings,
        "results": results,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
