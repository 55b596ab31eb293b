"""Fixtures of all tests."""

import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fork_server import ForkServer
from local_servers import FaultyServer, s3, s3_environment

from depth_anything.data import address, local_copy, remote, retry, store


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A process that has imported torch and Lightning, and runs commands in forks of itself."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def clean_remote_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, an empty cache, a long timeout for busy machines, and no state of other tests."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "2")
    monkeypatch.setenv("DEPTH_ANYTHING_TIMEOUT", "60")
    reads = (remote._pools, remote._without_ranges, retry._reported, remote._announced)
    for state in (*reads, local_copy._copies, address._local_copies):
        state.clear()
    for cached in (remote._netrc_hosts, remote._proxy_url):
        cached.cache_clear()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server with an empty bucket named bucket, for all tests of a process."""
    with s3({"bucket": tmp_path_factory.mktemp("bucket")}) as address:
        yield address


@pytest.fixture
def faulty_s3(moto: str, clean_remote_state: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A server in front of `moto` that fails on request; this process and its children use it."""
    with FaultyServer(moto) as made:
        for name, value in s3_environment(made.address).items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        store._supports_conditions.cache_clear()
        monkeypatch.setattr(store, "_unchecked_tags", set())
        monkeypatch.setattr(retry, "sleep", lambda seconds: None)
        yield made


@pytest.fixture
def s3_prefix(faulty_s3: FaultyServer, request: pytest.FixtureRequest) -> str:
    """An address of its own for each test, behind `faulty_s3`."""
    return "s3://bucket/" + re.sub(
        r"[^a-z0-9-]+", "-", f"{request.node.path.stem}-{request.node.name}".lower()
    )
