"""Train from servers that fail in many ways.

If no record is lost, the weights equal those of a run from disk, to the byte; lost records are named.
"""

import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from fork_server import ForkServer
from local_servers import FaultyServer, nginx, s3, s3_environment

from depth_anything.data import codec
from depth_anything.data.labels import LabelSetWriter
from depth_anything.data.reader import ShardReader
from depth_anything.data.shards import open_set
from depth_anything.data.stream import Stream
from depth_anything.scenes.render import write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec

from .conftest import ROOT, SMALL, environment

STEPS, BATCH = 12, 4
# A minute: a busy machine is not an outage. tests/data/test_remote.py tests timeouts with a fake clock.
QUIET = {"DEPTH_ANYTHING_TIMEOUT": "60", "DEPTH_ANYTHING_RETRIES": "3", "no_proxy": "*"}
PASSING = ("500", "503", "cut", "close", "reset", "slow", "corrupt")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images, a validation set, and labels of the images as a teacher would."""
    root = tmp_path_factory.mktemp("served")
    data = root / "data"
    spec = SceneSetSpec(look="photographic", count=48, seed=2, height=42, width=56, labelled=False)
    images = write_scenes(data / "scenes-photographic", spec, per_shard=12)
    write_scenes(data / "scenes-validation", replace(spec, count=8, seed=3, labelled=True), per_shard=12)
    labels = LabelSetWriter(
        data / "labels-tiny" / images.name, images, teacher={"fingerprint": "sha256:0", "licence": "Apache-2.0"},
        preprocessing="none", codec="q12",
    )  # fmt: skip
    y, x = np.mgrid[:42, :56].astype(np.float32) / 56
    for number, shard in enumerate(images.shards):
        maps = {i: codec.encode(y + 0.1 * np.sin(9 * x + number * 12 + i), codec="q12") for i in range(12)}
        labels.publish(shard.name, maps, [])
    assert labels.finish()
    return root


class Run(NamedTuple):
    """Exit code, stderr and folder of a training."""

    code: int
    errors: str
    folder: Path

    @property
    def model(self) -> bytes:
        return (self.folder / "outputs" / "student-vitn-tiny" / "model.safetensors").read_bytes()

    @property
    def order(self) -> str:
        """Step, number and pixels of every sample, in the order they were trained on."""
        return (self.folder / "rank-0.txt").read_text()

    @property
    def lost(self) -> list[str]:
        paths = (self.folder / "outputs").rglob("failed-records-*.txt")
        return [line for path in paths for line in path.read_text().splitlines()]


Train = Callable[..., Run]


@pytest.fixture(scope="module")
def train(fork_server: ForkServer) -> Train:
    """Train a student in a folder, on the sets below a folder or an address."""
    script = ROOT / "tests" / "integration" / "recording_train.py"

    def run(folder: Path, data: str, *arguments: str, **extra: str) -> Run:
        folder.mkdir(exist_ok=True)
        given = [*SMALL, f"data_dir={data}", "output_dir=outputs", "stage=student", f"steps={STEPS}"]
        command = [sys.executable, str(script), *given, "trainer=cpu", *arguments]
        env = environment(**QUIET, SAMPLE_LOG=str(folder), **extra)
        done = fork_server.run(command, cwd=folder, env=env)
        return Run(done.returncode, done.stderr, folder)

    return run


@pytest.fixture(scope="module")
def disk(sets: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run from disk with which the others are compared."""
    run = train(tmp_path_factory.mktemp("disk"), str(sets / "data"))
    assert run.code == 0 and not run.lost, run.errors[-3000:]
    assert len(run.order.splitlines()) == STEPS * BATCH
    return run


def passing(path: str, times: int) -> str | None:
    """Fail the first two requests of each file, and some later ones of tars, in different ways."""
    if times in (1, 2) or (path.endswith(".tar") and times % 7 == 5):
        return PASSING[(zlib.crc32(path.encode()) + times) % len(PASSING)]
    return None


def test_faults_and_an_outage_over_http(sets: Path, disk: Run, train: Train, tmp_path: Path) -> None:
    """Faults all along, and in the middle the server falls silent: the run stops; the same command ends it."""
    with nginx(sets, tmp_path / "state") as behind, FaultyServer(behind) as server:
        down = threading.Event()

        def fault(path: str, times: int) -> str | None:
            if sum(seen.endswith(".tar") for seen, _ in server.seen) > 60:
                down.set()
            return "500" if down.is_set() else passing(path, times)

        server.fault = fault
        first = train(tmp_path, f"{server.address}/data")
        assert first.code == 1 and "Traceback" not in first.errors, first.errors[-3000:]
        stopped = first.errors.strip().splitlines()[-1]
        assert re.match(rf"error: {server.address}/\S+/\d+\.\w+ cannot be read for now: HTTP 500 ", stopped)
        assert (
            f"type  python train.py {SMALL[0]} " in stopped and f"data_dir={server.address}/data" in stopped
        )
        named = [line.split(": ")[0] for line in first.errors.splitlines() if line.endswith("retrying")]
        assert len(named) > 4 and len(set(named)) == len(named)  # each once
        done = first.order.splitlines()
        assert 0 < len(done) < STEPS * BATCH
        server.fault = passing
        second = train(tmp_path, f"{server.address}/data")
        assert second.code == 0, second.errors[-3000:]
    assert second.order == disk.order and second.model == disk.model and not second.lost
    assert " 206 " in (tmp_path / "state" / "access.log").read_text()


def test_lost_records_are_named(sets: Path, disk: Run, train: Train, tmp_path: Path) -> None:
    """A missing shard and a damaged record: exactly their records are named and replaced, as when a disk loses them."""
    images = open_set(sets / "data" / "scenes-photographic")
    missing, damaged = images.shards[1].name, (images.shards[2].name, 5)
    member = ShardReader().index(images.url(damaged[0])).members(damaged[1])[0]
    labelled = [(f"{images.name}/{shard.name}", shard.records) for shard in images.shards]
    stream = Stream(labelled, seed=0, streams=8 * BATCH)
    places = [stream.locate(n)[1:] for n in range(STEPS * BATCH)]
    lost = [(s, i) for s, i in places if s.endswith(missing) or (s.endswith(damaged[0]) and i == damaged[1])]
    assert len(lost) == 13  # a pass

    class Damaged(FaultyServer):
        def fetch(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            status, headers_back, body = super().fetch(path, headers)
            if path.endswith(f"photographic/{damaged[0]}.tar") and status == 206:
                start = int(headers_back["Content-Range"].split()[1].split("-")[0])
                at = member.offset + 40 - start
                if 0 <= at < len(body) and "labels" not in path:
                    body = body[:at] + bytes([body[at] ^ 255]) + body[at + 1 :]
            return status, headers_back, body

    with nginx(sets, tmp_path / "state") as behind, Damaged(behind) as server:
        gone = f"/data/scenes-photographic/{missing}.tar"
        server.fault = lambda path, times: "404" if path == gone else None
        run = train(tmp_path / "http", f"{server.address}/data")
    assert run.code == 0, run.errors[-3000:]
    reported = [re.match(r"(\S+)\[(\d+)\] (\S+): image: (.+)", line) for line in run.lost]
    assert [(match[1], int(match[2])) for match in reported if match] == lost
    reasons = {match[1]: match[4] for match in reported if match}
    assert (
        "HTTP 404" in reasons[f"{images.name}/{missing}"]
        and "checksum" in reasons[f"{images.name}/{damaged[0]}"]
    )
    assert run.errors.count("replaced a bad record: ") == 13 and "retrying" not in run.errors
    numbers = [line.split()[:2] for line in run.order.splitlines()]
    assert numbers == [line.split()[:2] for line in disk.order.splitlines()] and run.model != disk.model

    copy = tmp_path / "data"
    subprocess.run(["cp", "-r", str(sets / "data"), str(copy)], check=True)
    tar = copy / "scenes-photographic" / f"{missing}.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    with open(copy / "scenes-photographic" / f"{damaged[0]}.tar", "r+b") as file:
        file.seek(member.offset + 40)
        byte = file.read(1)[0]
        file.seek(member.offset + 40)
        file.write(bytes([byte ^ 255]))
    from_disk = train(tmp_path / "disk", str(copy))
    assert from_disk.code == 0 and from_disk.order == run.order and from_disk.model == run.model


def test_over_s3(sets: Path, disk: Run, train: Train, tmp_path: Path) -> None:
    """The same run from moto's S3 server, with faults on the way."""
    with s3({"bucket": sets}) as behind, FaultyServer(behind) as server:
        failing = ("500", "close", "503", "cut")
        server.fault = lambda path, times: failing[zlib.crc32(path.encode()) % 4] if times == 1 else None
        run = train(tmp_path, "s3://bucket/data", **s3_environment(server.address))
        asked = [wanted for path, wanted in server.seen if path.endswith(".tar")]
    assert run.code == 0, run.errors[-3000:]
    assert run.order == disk.order and run.model == disk.model and not run.lost
    assert all(asked) and "s3://bucket/data/" in run.errors and "retrying" in run.errors
