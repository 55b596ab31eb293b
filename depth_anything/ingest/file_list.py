"""The file list of a set: one line per record, written once and stored in the folder of the set.

listing.txt holds the lines that the source's `find` returned; listing.json holds their number and hash. A process that
continues a set, or writes another part of it, reads the lines of a shard from there. So a raw folder of millions of
files is scanned once, and later changes of that folder do not change the set.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from depth_anything.data.tars import ShardError
from depth_anything.disk import atomic_write, remove_stale, temporary_path
from depth_anything.progress import ProgressLine

FILE_LIST, FILE_LIST_INFO = "listing.txt", "listing.json"

_CHUNK = 1 << 22
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def escape_field(text: str) -> str:
    """Escape tabs, line ends and backslashes, so that a text can be a field of a line."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def unescape_field(text: str) -> str:
    """Invert `escape_field`."""
    if "\\" not in text:
        return text
    out, rest = [], iter(text)
    for letter in rest:
        escape = letter + next(rest, "") if letter == "\\" else letter
        out.append(next((plain for plain, escaped in _ESCAPES.items() if escaped == escape), escape))
    return "".join(out)


def display_name(line: str) -> str:
    """Return the record name of a line, the text before the first tab, as valid Unicode."""
    return unescape_field(line.partition("\t")[0]).encode("utf-8", "backslashreplace").decode()


class FileList:
    """The lines of a set.

    Attributes:
        count: Number of lines.
        digest: "sha256:…" of the lines.
        left_out: Number of files that `find` skipped, by kind, and of names that match `leave_out`, by pattern.
    """

    def __init__(self, root: Path, *, per_shard: int) -> None:
        """Open the file list of a set. Reads it once to check its hash and to find where each shard begins.

        Raises:
            ShardError: The list is damaged.
        """
        self._path, self._per_shard = root / FILE_LIST, per_shard
        try:
            about = json.loads((root / FILE_LIST_INFO).read_bytes())
            self.count, self.digest = int(about["lines"]), str(about["hash"])
            self.left_out: dict[str, int] = about["left_out"]
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(
                f"{root / FILE_LIST_INFO} is damaged ({error!r})",
                f"restore it, or start again with  rm -r {root}",
            ) from error
        starts, digest, lines, place = [0], hashlib.sha256(), 0, 0
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
                first = (-lines - 1) % per_shard  # index of the first line end in `ends` that ends a shard
                starts += (place + 1 + ends[first::per_shard]).tolist()
                lines, place = lines + len(ends), place + len(chunk)
        if (lines, f"sha256:{digest.hexdigest()}") != (self.count, self.digest):
            raise ShardError(
                f"{self._path} does not match {FILE_LIST_INFO}",
                f"restore it, or start again with  rm -r {root}",
            )
        self._starts = [*starts[: self.shards], place]

    @property
    def shards(self) -> int:
        """Number of shards, including those of which every record is rejected."""
        return -(-self.count // self._per_shard)

    def part(self, k: int, n: int) -> range:
        """Return the shards of the k-th of n parts, starting at 1."""
        return range((k - 1) * self.shards // n, k * self.shards // n)

    def lines(self, shard: int) -> list[str]:
        """Return the lines of a shard."""
        start, end = self._starts[shard], self._starts[shard + 1]
        with open(self._path, "rb") as file:
            data = os.pread(file.fileno(), end - start, start)
        return data.decode("utf-8", "surrogateescape").split("\n")[:-1]

    def numbers(self, shard: int) -> range:
        """Return the numbers of the lines of a shard."""
        return range(shard * self._per_shard, min((shard + 1) * self._per_shard, self.count))


def write_file_list(root: Path, found: Iterable[str], *, leave_out: Iterable[str] = ()) -> None:
    """Write the file list of a set, unless it exists.

    Several processes may do this at the same time. They list the same raw folder and write the same bytes, and the
    list counts as written only when listing.json exists; so no lock is needed.

    Args:
        root: Folder of the set.
        found: The lines. A generator may return a mapping from a kind of file to the number of skipped files.
        leave_out: Glob patterns of names that are left out.

    Raises:
        ValueError: There are no lines, or one contains a line end.
    """
    if (root / FILE_LIST_INFO).exists():
        return
    remove_stale(root)
    temporary = temporary_path(root / FILE_LIST)
    digest, left_out, count = hashlib.sha256(), Counter[str](), 0
    try:
        with open(temporary, "xb") as file, ProgressLine(f"listing {root}", total=None) as progress:
            for line in _filter_lines(found, tuple(leave_out), left_out):
                if "\n" in line:
                    raise ValueError(f"{line!r} contains a line end, which a record's name must not")
                data = line.encode("utf-8", "surrogateescape") + b"\n"
                file.write(data)
                digest.update(data)
                count += 1
                progress.update()
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise ValueError(f"no record is left (left out: {dict(left_out) or 'none'})")
        if (root / FILE_LIST_INFO).exists():  # another process was faster and may be reading its list
            return
        os.replace(temporary, root / FILE_LIST)
    finally:
        temporary.unlink(missing_ok=True)
    about = {"lines": count, "hash": f"sha256:{digest.hexdigest()}", "left_out": dict(left_out)}
    atomic_write(root / FILE_LIST_INFO, json.dumps(about, indent=1, sort_keys=True).encode())


def file_list_digest(found: Iterable[str], *, leave_out: Iterable[str] = ()) -> tuple[int, str]:
    """Return the number and the hash of the lines that `write_file_list` would write."""
    digest, count = hashlib.sha256(), 0
    for line in _filter_lines(found, tuple(leave_out), Counter()):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        count += 1
    return count, f"sha256:{digest.hexdigest()}"


def _filter_lines(found: Iterable[str], leave_out: tuple[str, ...], left_out: Counter[str]) -> Iterator[str]:
    """Yield the lines whose names match no pattern of `leave_out`; count the others in `left_out`."""
    lines = iter(found)
    while True:
        try:
            line = next(lines)
        except StopIteration as end:
            skipped: Mapping[str, int] = end.value or {}
            left_out.update(skipped)
            return
        name = display_name(line) if leave_out else ""
        pattern = next((pattern for pattern in leave_out if fnmatchcase(name, pattern)), None)
        if pattern is None:
            yield line
        else:
            left_out[pattern] += 1
