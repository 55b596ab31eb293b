"""Files and folders appear complete or not at all; a full disk names the file; stale temporaries are removed."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from depth_anything.data.tars import write_shard
from depth_anything.disk import (
    WriteError,
    atomic_files,
    atomic_folder,
    atomic_path,
    atomic_write,
    explain_write_error,
    name_write_errors,
    remove_stale,
    temporary_path,
    write_error,
    write_new,
)

RECORDS = [(f"k{i}", {"txt": bytes(2000)}) for i in range(20)]
WRITERS: dict[str, Callable[[Path], object]] = {
    "000000.tar": lambda path: write_shard(path, RECORDS),
    "manifest.json": lambda path: atomic_write(path, bytes(40_000)),
    "000000.json": lambda path: write_new(path, bytes(40_000)),
}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files, which interrupts a write like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", WRITERS)
def test_an_incomplete_write_names_the_file_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    with largest_file(9000), pytest.raises(OSError) as raised:
        WRITERS[name](tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name} cannot be written (")
    assert not list(tmp_path.iterdir())
    WRITERS[name](tmp_path / name)  # with space again


@pytest.mark.parametrize("name", WRITERS)
def test_an_existing_file_stays_if_the_disk_is_full(
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


@pytest.mark.parametrize(
    ("code", "also", "fix"),
    [
        (errno.EROFS, (), "make {} writable and start the same command again"),
        (errno.EACCES, (OSError,), "make {} writable and start the same command again"),
        (errno.ENOENT, (OSError,), "bring {} back and start the same command again"),
    ],
)
def test_an_error_says_what_to_do(tmp_path: Path, code: int, also: tuple[type[OSError]], fix: str) -> None:
    with pytest.raises(WriteError) as raised, name_write_errors(tmp_path / "a.tar", also):
        raise OSError(code, os.strerror(code))
    assert raised.value.errno == code and raised.value.fix == fix.format(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'a.tar'} cannot be written ({os.strerror(code)})")


def test_only_errors_of_writing_are_explained() -> None:
    raised = OSError(errno.EROFS, os.strerror(errno.EROFS), "sets/own")
    assert str(explain_write_error(raised)).startswith(
        "sets/own cannot be written (Read-only file system); make sets"
    )
    for other in (
        OSError(errno.EACCES, os.strerror(errno.EACCES), "sets/own"),  # may come from reading
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        ValueError("x"),
    ):
        assert explain_write_error(other) is other


def test_read_errors_are_not_changed(tmp_path: Path) -> None:
    """The written data may come from a disk that fails."""
    failing = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(OSError) as raised, name_write_errors(tmp_path / "a.tar"):
        raise failing
    assert raised.value is failing


def test_an_error_names_one_file(tmp_path: Path) -> None:
    inner = write_error(tmp_path / "a.tar", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError) as raised, name_write_errors(tmp_path / "manifest.json"):
        raise inner
    assert raised.value is inner


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path, make_folder=True) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("newer")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("keep_others", [True, False])
def test_a_folder_replaces_an_older_one_when_it_is_complete(tmp_path: Path, keep_others: bool) -> None:
    path = tmp_path / "maps"
    for name in ("a", "b"):
        with atomic_folder(path, keep_others=keep_others) as temporary:
            (temporary / name).write_text(name)
    assert sorted(file.name for file in path.iterdir()) == (["a", "b"] if keep_others else ["b"])
    with pytest.raises(ValueError), atomic_folder(path) as temporary:
        (temporary / "c").write_text("c")
        raise ValueError
    assert "c" not in os.listdir(path) and [file.name for file in tmp_path.iterdir()] == ["maps"]


def test_companions_appear_before_the_main_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, replace = [], os.replace

    def record(source: Path, target: Path) -> None:
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    with atomic_files(tmp_path / "a.onnx") as folder:
        for name in ("a.onnx", "a.onnx.json", "z.data"):
            (folder / name).write_text(name)
    assert moved[-1] == "a.onnx" and len(moved) == 3 and sorted(moved) == sorted(os.listdir(tmp_path))


def test_errors_of_a_library_name_the_final_path(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "a.pth", also=(RuntimeError,)):
        raise RuntimeError("unexpected pos 64 vs 0")
    assert str(tmp_path / "a.pth") in str(raised.value) and raised.value.errno is None
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.pth"):
        raise RuntimeError("a bug")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_temporaries_of_dead_writers_are_removed(tmp_path: Path) -> None:
    mine = temporary_path(tmp_path / "a.tar")
    host, pid = mine.name.split(".")[-3:-1]
    dead = tmp_path / f".tmp.b.c.tar.{host}.{dead_pid()}.aa"
    folder = tmp_path / f".tmp.maps.{host}.{dead_pid()}.bb"
    elsewhere = tmp_path / f".tmp.a.tar.another-host.{pid}.cc"
    others = [tmp_path / name for name in (".tmp.notes", ".a.tar.5.tmp", ".maps.5.old", "a.tar")]
    for path in (mine, dead, elsewhere, *others):
        path.touch()
        os.utime(path, (0, 0)) if path in others else None
    folder.mkdir()
    (folder / "frame.npy").touch()
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, elsewhere, *others}
    remove_stale(tmp_path, exclusive=True)  # nobody else can be writing here
    assert set(tmp_path.iterdir()) == {mine, *others} - {tmp_path / ".a.tar.5.tmp"}


def test_a_temporary_of_another_host_is_removed_after_a_day(tmp_path: Path) -> None:
    old = tmp_path / ".tmp.a.tar.another-host.1.aa"
    old.touch()
    os.utime(old, (0, 0))
    remove_stale(tmp_path)
    assert not old.exists()
