"""Memory of this machine and of the container (cgroup) that this process runs in."""

from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")


def free_memory() -> int | None:
    """Return the bytes that this process may still allocate on its machine and in its container; None if unknown."""
    known = [_meminfo("MemAvailable"), *(limit - used for limit, used in _container_limits())]
    return min((max(value, 0) for value in known if value is not None), default=None)


def total_memory() -> int | None:
    """Return the bytes of the machine, or the limit of the container if that is less; None if unknown."""
    known = [_meminfo("MemTotal"), *(limit for limit, _ in _container_limits())]
    return min((value for value in known if value is not None), default=None)


def count_oom_kills() -> int:
    """Return how many processes of this container the kernel has killed for lack of memory; 0 if it does not say."""
    counts = []
    for folder in _cgroup_folders(_CGROUP, "0::"):
        for line in _lines(folder / "memory.events"):
            if line.startswith("oom_kill "):
                counts.append(int(line.split()[1]))
    return max(counts, default=0)


def describe_memory() -> str:
    """Return "1.2 of 8.0 GiB of memory are free", or "" if that is unknown."""
    free, total = free_memory(), total_memory()
    return (
        ""
        if free is None or total is None
        else f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of memory are free"
    )


def _meminfo(name: str) -> int | None:
    for line in _lines(_MEMINFO):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return None


def _container_limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use of this process's cgroup and of those around it (v2, then v1).

    The page cache does not count as used, since the kernel can drop it.
    """
    for root, prefix, limit_file, key in (
        (_CGROUP, "0::", "memory.max", "anon"),
        (_CGROUP / "memory", "memory:", "memory.limit_in_bytes", "total_rss"),
    ):
        for folder in _cgroup_folders(root, prefix):
            try:
                limit = int((folder / limit_file).read_text())
                stat = dict(line.split() for line in _lines(folder / "memory.stat"))
                yield limit, int(stat[key])
            except (OSError, ValueError, KeyError):  # no such file, or no limit ("max")
                continue


def _cgroup_folders(root: Path, prefix: str) -> Iterator[Path]:
    """Yield the folder of this process's cgroup and its parents, up to the root; inside a container only the root."""
    lines = [line for line in _lines(_OWN_CGROUP) if prefix in line]
    own = root / lines[0].partition(prefix)[2].lstrip("/") if lines else root
    for folder in (own, *own.parents):
        yield folder
        if folder == root:
            return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
