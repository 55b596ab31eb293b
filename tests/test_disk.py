"""A full disk is one sentence that names the file and the folder, whatever is being written."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from depth_anything.data.tars import atomic_write, write_new, write_shard
from depth_anything.disk import name_write_errors, write_error

RECORDS = [(f"k{i}", {"txt": bytes(2000)}) for i in range(20)]
WRITERS: dict[str, Callable[[Path], object]] = {
    "000000.tar": lambda path: write_shard(path, RECORDS),
    "manifest.json": lambda path: atomic_write(path, bytes(40_000)),
    "000000.json": lambda path: write_new(path, bytes(40_000)),
}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let files grow to so many bytes: a write ends halfway, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_ends_halfway_names_the_file_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    with largest_file(9000), pytest.raises(OSError) as raised:
        WRITERS[name](tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name} cannot be written (")
    assert not list(tmp_path.iterdir())
    WRITERS[name](tmp_path / name)  # with space again


@pytest.mark.parametrize("name", WRITERS)
def test_an_older_file_stays_where_the_disk_is_full(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b"older")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as raised:
        WRITERS[name](path)
    assert f"make space in {tmp_path} and start the same command again" in str(raised.value)
    assert raised.value.errno == errno.ENOSPC and path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_errors_of_reading_are_left_alone(tmp_path: Path) -> None:
    """What is written may be read from a failing disk meanwhile."""
    failing = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(OSError) as raised, name_write_errors(tmp_path / "a.tar"):
        raise failing
    assert raised.value is failing


def test_an_error_is_named_once(tmp_path: Path) -> None:
    inner = write_error(tmp_path / "a.tar", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError) as raised, name_write_errors(tmp_path / "manifest.json"):
        raise inner
    assert raised.value is inner
