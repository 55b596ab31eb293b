"""What a set is made of, a line a record, listed once and kept in the set's folder.

listing.txt holds the lines that the source's `find` gave, listing.json their number and hash. Whoever goes on
with a set, or makes another part of it, reads the lines of a shard from there: raw folders of millions of files
are walked once, and what was found then is what the set is made of, whatever happens to the folder.
"""

import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.data.tars import ShardError
from depth_anything.disk import atomic_path, atomic_write, remove_stale, write_new
from depth_anything.locks import FileWatch
from depth_anything.progress import ProgressLine

FILE_LIST, FILE_LIST_INFO = "listing.txt", "listing.json"

_CHUNK = 1 << 22
_STALE_LOCK_S = 60.0  # a lister that gives no sign of life for so long is taken for dead
_HEARTBEAT_S = 5.0
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def escape_field(text: str) -> str:
    """Write a name so that it can stand in a line: tabs, line ends and backslashes are escaped."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def unescape_field(text: str) -> str:
    """Read what `as_field` has written."""
    if "\\" not in text:
        return text
    out, rest = [], iter(text)
    for letter in rest:
        escape = letter + next(rest, "") if letter == "\\" else letter
        out.append(next((plain for plain, written in _ESCAPES.items() if written == escape), escape))
    return "".join(out)


def display_name(line: str) -> str:
    """Return the name of a line's record as it can be printed: what stands before the first tab."""
    return unescape_field(line.partition("\t")[0]).encode("utf-8", "backslashreplace").decode()


class FileList:
    """The lines of a set.

    Attributes:
        count: Lines.
        digest: "sha256:…" of them.
        left_out: What `find` passed over, by kind, and names that `leave_out` holds back: how many.
    """

    def __init__(self, root: Path, *, per_shard: int) -> None:
        """Open a listing; it is read through once, to see that it is whole and where each shard begins.

        Raises:
            ShardError: It is damaged.
        """
        self._path, self._per_shard = root / FILE_LIST, per_shard
        try:
            about = json.loads((root / FILE_LIST_INFO).read_bytes())
            self.count, self.digest = int(about["lines"]), str(about["hash"])
            self.left_out: dict[str, int] = about["left_out"]
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(
                f"{root / FILE_LIST_INFO} is damaged ({error!r}): put it back, or begin anew with  rm -r {root}"
            ) from error
        starts, digest, lines, place = [0], hashlib.sha256(), 0, 0
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
                first = (-lines - 1) % per_shard  # of the line ends here, the first that ends a shard
                starts += (place + 1 + ends[first::per_shard]).tolist()
                lines, place = lines + len(ends), place + len(chunk)
        if (lines, f"sha256:{digest.hexdigest()}") != (self.count, self.digest):
            raise ShardError(
                f"{self._path} is not the listing that the set was begun with: put it back, "
                f"or begin anew with  rm -r {root}"
            )
        self._starts = [*starts[: self.shards], place]

    @property
    def shards(self) -> int:
        """How many shards the lines make, those included of which nothing can be taken."""
        return -(-self.count // self._per_shard)

    def lines(self, shard: int) -> list[str]:
        """Return the lines of a shard."""
        start, end = self._starts[shard], self._starts[shard + 1]
        with open(self._path, "rb") as file:
            data = os.pread(file.fileno(), end - start, start)
        return data.decode("utf-8", "surrogateescape").split("\n")[:-1]

    def numbers(self, shard: int) -> range:
        """Return the numbers of a shard's lines."""
        return range(shard * self._per_shard, min((shard + 1) * self._per_shard, self.count))


def write_file_list(root: Path, found: Iterable[str], *, leave_out: Iterable[str] = ()) -> None:
    """List what a set will be made of, unless that is done, or another process is at it, which is waited for.

    Args:
        root: Folder of the set.
        found: The lines; a generator may return how many names of which kind it has passed over.
        leave_out: Glob patterns of names that are not taken.

    Raises:
        ValueError: There are none, or one holds a line end.
    """
    with _exclusive(root) as sign:
        if (root / FILE_LIST_INFO).exists():
            return
        remove_stale(root)
        digest, left_out, count = hashlib.sha256(), Counter[str](), 0
        with atomic_path(root / FILE_LIST) as temporary:
            with open(temporary, "xb") as file, ProgressLine(f"listing {root}", unit="record") as progress:
                for line in _filter_lines(found, tuple(leave_out), left_out):
                    if "\n" in line:
                        raise ValueError(f"{line!r} holds a line end: no name of a record may")
                    data = line.encode("utf-8", "surrogateescape") + b"\n"
                    file.write(data)
                    digest.update(data)
                    count += 1
                    progress.update()
                    sign()
            if not count:
                raise ValueError(f"nothing is left to take (passed over: {dict(left_out) or 'nothing'})")
        about = {"lines": count, "hash": f"sha256:{digest.hexdigest()}", "left_out": dict(left_out)}
        atomic_write(root / FILE_LIST_INFO, json.dumps(about, indent=1, sort_keys=True).encode())


def file_list_digest(found: Iterable[str], *, leave_out: Iterable[str] = ()) -> tuple[int, str]:
    """Return number and hash of the lines that a listing of these would hold, without keeping them."""
    digest, count = hashlib.sha256(), 0
    for line in _filter_lines(found, tuple(leave_out), Counter()):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        count += 1
    return count, f"sha256:{digest.hexdigest()}"


def _filter_lines(found: Iterable[str], leave_out: tuple[str, ...], left_out: Counter[str]) -> Iterator[str]:
    lines = iter(found)
    while True:
        try:
            line = next(lines)
        except StopIteration as end:
            passed_over: Mapping[str, int] = end.value or {}
            left_out.update(passed_over)
            return
        name = display_name(line) if leave_out else ""
        pattern = next((pattern for pattern in leave_out if fnmatchcase(name, pattern)), None)
        if pattern is None:
            yield line
        else:
            left_out[pattern] += 1


@contextmanager
def _exclusive(root: Path) -> Iterator[Any]:
    """Keep other processes from listing the same; yields what is to be called now and then as a sign of life.

    Two that list at once do no harm but to the disk, so that a doubt lets both go on.
    """
    lock, mine = root / ".listing.lock", f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
    last = time.monotonic()

    def sign() -> None:
        nonlocal last
        if time.monotonic() - last > _HEARTBEAT_S:
            last = time.monotonic()
            with suppress(OSError):
                os.utime(lock)

    try:
        while not write_new(lock, mine.encode()):  # seen with its holder's name, or not at all
            _wait_for_lock(lock)
        yield sign
    finally:
        with suppress(OSError):
            if lock.read_text() == mine:
                lock.unlink()


def _wait_for_lock(lock: Path) -> None:
    """Wait until nobody holds the lock; that of a dead holder, or one untouched for a minute, is removed."""
    watch, told, pause = FileWatch(), False, 0.02
    while True:
        try:
            host, pid, _ = (lock.read_text().split() + ["another machine", "0", ""])[:3]
        except FileNotFoundError:
            return
        if watch.is_dead(lock, host=host, pid=int(pid), timeout_s=_STALE_LOCK_S):
            lock.unlink(missing_ok=True)
            return
        if not told and pause > 0.5:
            told = True
            print(f"waiting for process {pid} on {host}, which lists the set", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(pause * 1.5, 2.0)
