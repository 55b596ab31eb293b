"""Shards for tests: records of random bytes, sets of them, and plain tars."""

import io
import random
import tarfile
from pathlib import Path

from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import write_shard


def records(shard="000000", count=5, size=300):
    """Records of random bytes, determined by shard and number."""
    rng = random.Random(int(shard))  # Python promises the same bytes in all versions
    return [
        (f"set/{shard}/{i:06d}", {"jpg": rng.randbytes(size + i), "json": b'{"i": %d}' % i})
        for i in range(count)
    ]


def make(root, shards=3, name="set", **options):
    """Write a set of shards named 000000, 000001, …"""
    names = [f"{i:06d}" for i in range(shards)]
    infos = [write_shard(Path(root, f"{shard}.tar"), records(shard, **options)) for shard in names]
    return write_manifest(root, name=name, shards=infos, meta={"licence": "CC0"})


def plain_tar(path, members):
    """Write a tar as another program does, from (name or TarInfo, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(folder):
    """List the files of a folder."""
    return sorted(entry.name for entry in Path(folder).iterdir())
