"""Checks for every labeled set: its entry in the catalog, its facts, and its conversion to verified shards."""

import errno
import inspect
from pathlib import Path

import made_raw
import numpy as np
import pytest

from depth_anything.data import retry
from depth_anything.data.reader import Records
from depth_anything.data.sample import decode_record
from depth_anything.data.shards import verify_set
from depth_anything.data.tars import StorageUnavailable
from depth_anything.ingest.catalog import SETS, load_source
from depth_anything.ingest.writer import write_source
from depth_anything.licenses import check_license

LABELED = [name for name, entry in SETS.items() if entry.labeled]


def test_the_catalog_has_the_five_labeled_sets_of_the_paper_and_four_more():
    paper = {"blendedmvs", "hypersim", "irs", "tartanair", "vkitti2"}
    assert set(LABELED) == paper | {"tartanair2", "diml", "hrwsi", "megadepth"}
    taken = sum(load_source(name).INFO.records for name in paper)
    assert taken == 605_756  # 604 K in the paper's table, whose rows are rounded


@pytest.mark.parametrize("name", LABELED)
def test_facts_and_options_are_complete(name):
    source, entry = load_source(name), SETS[name]
    assert source.INFO.name == name and source.INFO.sky in ("far", "invalid")
    check_license(source.INFO.licence)
    for word in ("Layout", "License:", "Get it from", "Facts from"):
        assert word in source.__doc__
    options = {
        option.name: option.default
        for option in inspect.signature(source.find).parameters.values()
        if option.kind is option.KEYWORD_ONLY
    }
    assert options == {option.name[2:]: option.default for option in entry.options}


@pytest.mark.parametrize("short_side", [None, 28])
@pytest.mark.parametrize("name", LABELED)
def test_raw_files_become_verified_shards(tmp_path, name, short_side):
    truth = getattr(made_raw, f"make_{name}")(tmp_path / "raw")
    lines = [*load_source(name).find(tmp_path / "raw")]
    shard_set = write_source(
        load_source(name), tmp_path / "raw", tmp_path / "set", per_shard=3, short_side=short_side
    )
    assert verify_set(tmp_path / "set", decode=True) == []
    records, pixels, names = Records(shard_set), 0, []
    for shard, count in records.shards:
        for index in range(count):
            frame = decode_record(*records.read(shard, index))
            label = frame.depth if frame.depth is not None else frame.disparity
            assert frame.image.shape[:2] == label.shape == ((36, 48) if short_side is None else (28, 42))
            assert frame.meta["original_size"] == [36, 48] and frame.meta["source"] == name
            if short_side is None:
                np.testing.assert_allclose(label, truth[frame.meta["name"]], rtol=2e-7)
            names.append(frame.meta["name"])
            pixels += 36 * 48
    left_out = shard_set.meta.get("left_out", {}).get("amusement/*", 0)
    refused = shard_set.meta.get("skipped", {}).get("count", 0)
    assert names == [n for n in sorted(truth) if n in names]  # in order
    assert len(names) + left_out + refused == len(lines)
    counted = dict(shard_set.meta["pixels"])
    assert counted.pop("all") == pixels == sum(counted.values())
    assert shard_set.meta["licence"] == load_source(name).INFO.licence
    assert shard_set.meta["sky_policy"] == load_source(name).INFO.sky
    assert ("amusement" in str(names)) is False


@pytest.mark.parametrize("name", LABELED)
def test_metadata_files_of_macos_are_ignored(tmp_path, name):
    getattr(made_raw, f"make_{name}")(tmp_path)
    before = [*load_source(name).find(tmp_path)]
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        path.with_name(".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert [*load_source(name).find(tmp_path)] == before


@pytest.mark.parametrize("name", ["blendedmvs", "irs"])
def test_a_failing_disk_rejects_no_record(tmp_path, name, monkeypatch):
    """Input and output errors are the disk's: the run stops, and goes on when the disk is there again."""
    getattr(made_raw, f"make_{name}")(tmp_path / "raw")
    plain = Path.read_bytes

    def failing(path):
        if path.suffix in (".pfm", ".exr"):
            raise OSError(errno.EIO, "Input/output error")
        return plain(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", failing)
        patched.setattr(retry, "sleep", lambda seconds: None)
        with pytest.raises(StorageUnavailable, match="Input/output error"):
            write_source(load_source(name), tmp_path / "raw", tmp_path / "set")
    shard_set = write_source(load_source(name), tmp_path / "raw", tmp_path / "set")
    assert shard_set.records and "Input/output error" not in str(shard_set.meta.get("skipped"))
