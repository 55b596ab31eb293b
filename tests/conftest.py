"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest
from fork_server import ForkServer


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A process that has imported torch and Lightning, and runs commands in forks of itself."""
    server = ForkServer()
    yield server
    server.close()
