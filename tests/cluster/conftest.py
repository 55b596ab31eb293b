"""Fixtures of the tests on a real Slurm: the cluster, a project folder to submit jobs from, and a server of Python."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .project import Project, SharedForkServer
from .slurm_cluster import SlurmCluster, missing_packages


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Start a cluster for all tests; skip them where its programs or root's rights are missing."""
    if missing := missing_packages():
        pytest.skip(f"apt-get install --no-install-recommends {' '.join(missing)}")
    if os.geteuid():
        pytest.skip("slurmd starts jobs only as root")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedForkServer]:
    """Start a server from which jobs fork Python."""
    server = SharedForkServer(tmp_path_factory.mktemp("server"))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the scenes, which the first job renders."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def project(slurm: SlurmCluster, server: SharedForkServer, tmp_path: Path) -> Iterator[Project]:
    """Return a project folder; its jobs are killed at the end."""
    project = Project(slurm, tmp_path / "project", server)
    yield project
    project.close()
