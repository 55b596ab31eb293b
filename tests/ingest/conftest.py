"""Fixtures of several tests of writers: the raw files of a toy source, and the set that they become."""

import pytest
from made_source import fill, write


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Return the folder of the raw files."""
    return fill(tmp_path_factory.mktemp("raw") / "toy")


@pytest.fixture(scope="session")
def whole(raw, tmp_path_factory):
    """Return the set, written without an interruption."""
    return write(raw, tmp_path_factory.mktemp("whole") / "toy")
