"""Writing a set: as a whole, in parts, after a kill, and in worker processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_source
import numpy as np
import pytest
from made_source import Stopped, fill, stop_at, write

from depth_anything.data import retry
from depth_anything.data.reader import Records
from depth_anything.data.sample import decode_record
from depth_anything.data.shards import open_set, verify_set
from depth_anything.data.tars import ShardError, StorageUnavailable
from depth_anything.ingest import catalog


def files(root, *, but=()):
    return {path.name: path.read_bytes() for path in Path(root).iterdir() if path.name not in but}


def test_records_are_the_lines_that_were_not_rejected(whole):
    assert [(shard.name, shard.records) for shard in whole.shards] == [
        ("00000", 4),
        ("00002", 3),
        ("00003", 4),
        ("00004", 4),
        ("00005", 3),
    ]
    assert verify_set(whole.root, decode=True) == []
    key, fields = Records(whole).read("toy/00002", 1)
    frame = decode_record(key, fields)
    assert key == "toy/00002/0000010" and (frame.image == 10).all()
    assert frame.meta == {
        "source": "toy",
        "name": "room/10",
        "unit": "m",
        "sky": "inf",
        "original_size": [12, 16],
    }
    sky, mirror = made_source.masks()
    expected = np.asarray(
        np.where(abs(made_source.depth_of(10)) < 1e30, made_source.depth_of(10), np.nan), np.float32
    )
    expected[~(expected > 0) | mirror] = np.nan
    expected[sky & ~mirror] = np.inf
    assert np.array_equal(frame.depth, expected, equal_nan=True)


def test_the_manifest_lists_rejected_records_and_counts_every_pixel(whole):
    meta = json.loads(Path(whole.root, "manifest.json").read_text())["meta"]
    assert meta["licence"] == "CC0-1.0" and meta["source"] == {"title": "a toy", "get": "made by its test"}
    assert meta["settings"] == {
        "source": "toy",
        "leave_out": ["dull/*"],
        "name": "toy",
        "per_shard": 4,
        "count": 23,
    }
    assert (meta["quantity"], meta["unit"], meta["sky"], meta["sky_policy"]) == ("depth", "m", "inf", "far")
    bad = [f"room/{k:02d}-bad" for k in (4, 5, 6, 7, 9)]
    reason = "its depth is missing"
    assert meta["skipped"] == {"count": 5, "reasons": {reason: 5}, "files": [[name, reason] for name in bad]}
    assert meta["left_out"] == {"dull/*": 2, ".txt": 3}
    assert json.loads(Path(whole.root, "00002.skipped.json").read_text()) == [[bad[-1], reason]]
    one = {"all": 192, "nan": 1, "infinite": 3, "negative": 1, "zero": 1, "mirror": 6, "sky": 13}
    one["valid"] = 192 - sum(count for name, count in one.items() if name != "all")
    assert meta["pixels"] == {name: 18 * count for name, count in one.items()}


def test_the_last_of_the_parts_in_one_folder_finishes_the_set(raw, whole, tmp_path):
    before = (raw / "found").read_text()
    assert write(raw, tmp_path / "toy", part=(3, 3)) is None
    with pytest.raises(ShardError, match="toy"):
        open_set(tmp_path / "toy")
    assert write(raw, tmp_path / "toy", part=(1, 3)) is None
    assert write(raw, tmp_path / "toy", part=(1, 3)) is None
    shard_set = write(raw, tmp_path / "toy", part=(2, 3))
    assert shard_set.digest == whole.digest and files(shard_set.root) == files(whole.root)
    assert len((raw / "found").read_text()) == len(before) + 1, "listed once"


def test_there_may_be_more_parts_than_shards(raw, whole, tmp_path):
    shard_set = [write(raw, tmp_path / "toy", part=(k, 9)) for k in range(1, 10)]
    assert [one for one in shard_set if one] == [open_set(tmp_path / "toy")] and shard_set[
        -1
    ].digest == whole.digest


def test_worker_processes_write_the_same_bytes(raw, whole, tmp_path):
    shard_set = write(raw, tmp_path / "toy", workers=2)
    assert files(shard_set.root) == files(whole.root)


def test_a_worker_that_dies_raises_an_error_that_names_the_folder(tmp_path):
    raw = fill(tmp_path / "raw")
    (raw / "toy.txt").write_text("a/1\nb/2-dies\n")
    with pytest.raises(ShardError, match=rf"worker .*{tmp_path / 'toy'}.* --workers"):
        write(raw, tmp_path / "toy", workers=1, per_shard=1)


def test_an_interruption_between_any_two_steps_changes_no_byte(raw, whole, tmp_path, monkeypatch):
    call, wanted = 0, files(whole.root)
    while True:
        root = tmp_path / f"{call}" / "toy"
        try:
            with monkeypatch.context() as patch:
                stop_at(patch, call)
                write(raw, root)
        except Stopped:
            there = {path.name for path in root.iterdir()} if root.exists() else set()
            assert "manifest.json" not in there or there >= set(wanted)
            for name in there & set(wanted):
                assert (root / name).read_bytes() == wanted[name], "every visible file is complete"
            write(raw, root)
            assert files(root) == wanted
        else:
            break
        call += 1
    assert call > 30


def run(raw, root, *flags):
    code = (
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(made_source.__file__).parent)!r})\n"
        "import made_source\nfrom depth_anything.ingest.writer import write_source\n"
        "if __name__ == '__main__':\n"
        f"    write_source(made_source, {str(raw)!r}, {str(root)!r}, per_shard=4, name='toy', {', '.join(flags)})\n"
    )
    script = root.parent / "run.py"
    script.write_text(code)
    return subprocess.Popen([sys.executable, str(script)], start_new_session=True)


def wait_for(condition):
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_writer_is_continued_to_the_same_bytes(raw, whole, tmp_path, workers):
    root = tmp_path / "toy"
    process = run(raw, root, "seconds='0.05'", f"workers={workers}")
    wait_for(lambda: list(root.glob("0*.tar")))
    group = os.getpgid(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(group))
    assert not (root / "manifest.json").exists()
    shard_set = write(raw, root, seconds="0.05")
    kept = (
        "settings.json",
        "listing.txt",
        "listing.json",
        "manifest.json",
    )  # which contain the option `seconds`
    assert files(root, but=kept) == files(whole.root, but=kept)
    assert shard_set.digest == whole.digest and not list(root.glob(".*"))


def alive(group):
    """Return whether a process of a group runs; orphaned workers must exit when their parent is dead."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = path.read_text().rpartition(") ")
        except OSError:
            continue
        state, _, its = rest.split()[:3]
        if int(its) == group and state != "Z":
            return True
    return False


def test_other_settings_are_rejected_before_the_raw_folder_is_read(raw, whole, tmp_path):
    before = files(whole.root)
    for options, named in (
        ({"per_shard": 5}, "per_shard 4 in place of 5"),
        ({"short_side": 8}, "short_side None in place of 8"),
        ({"leave_out": []}, "leave_out .*dull"),
        ({"seconds": "1"}, "seconds None in place of 1"),
        ({"name": "other"}, "name toy in place of other"),
    ):
        with pytest.raises(ValueError, match=f"{named}.*rm -r"):
            write(tmp_path / "nowhere", whole.root, **options)
    assert files(whole.root) == before


def test_license_and_sky_can_be_changed_later(raw, tmp_path):
    shard_set = write(raw, tmp_path / "toy")
    again = write(raw, tmp_path / "toy", licence="MIT", sky="invalid")
    assert again.digest == shard_set.digest
    assert (again.meta["licence"], again.meta["sky_policy"]) == ("MIT", "invalid")
    assert write(raw, tmp_path / "toy") == again, "the changes persist"


def test_leave_out_patterns_are_applied_and_counted(raw, tmp_path):
    shard_set = write(raw, tmp_path / "toy", leave_out=["room/*0", "room/?[!0]*", "nothing"], per_shard=9)
    assert (
        shard_set.meta["left_out"] == {"room/*0": 3, "room/?[!0]*": 20, ".txt": 3} and shard_set.records == 2
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"part": (1, 3), "name": None}, "--name"),
        ({"part": (0, 3)}, "part 0/3"),
        ({"part": (4, 3)}, "part 4/3"),
        ({"per_shard": 0}, "per_shard=0"),
        ({"workers": -1}, "workers=-1"),
        ({"sky": "blue"}, 'sky="blue"'),
        ({"name": "a b"}, '"a b"'),
        ({"short_side": 0}, "short_side=0"),
        ({"licence": "do what you like!"}, "SPDX"),
    ],
)
def test_invalid_arguments_are_rejected_before_a_folder_is_created(raw, tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        write(raw, tmp_path / "toy", **options)
    assert not (tmp_path / "toy").exists()


def lines(tmp_path, *names):
    raw = fill(tmp_path / "raw")
    (raw / "toy.txt").write_text("\n".join(names))
    return raw


def test_a_missing_file_is_rejected_but_a_failing_disk_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    shard_set = write(lines(tmp_path, "a/1", "a/2-gone"), tmp_path / "toy")
    assert shard_set.meta["skipped"]["files"] == [["a/2-gone", "No such file or directory"]]
    with pytest.raises(StorageUnavailable, match=r"a/2-broken of .*Input/output error"):
        write(lines(tmp_path / "b", "a/1", "a/2-broken"), tmp_path / "b" / "toy")
    with pytest.raises(RuntimeError, match="a/2-bug: .*toy.*a bug"):
        write(lines(tmp_path / "c", "a/1", "a/2-bug"), tmp_path / "c" / "toy")
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "many")
    with pytest.raises(ValueError, match="DEPTH_ANYTHING_RETRIES=many"):  # not an error of the record
        write(lines(tmp_path / "d", "a/1"), tmp_path / "d" / "toy")


def test_a_raw_folder_that_disappears_stops_the_run_without_rejecting_records(tmp_path, monkeypatch):
    raw, root = lines(tmp_path, "a/1", "a/2", "a/3-bad"), tmp_path / "toy"

    def vanish(folder, line):
        folder.rename(folder.with_name("unmounted"))
        raise ValueError("No such file or directory")

    with monkeypatch.context() as patch, pytest.raises(ShardError, match=str(raw)):
        patch.setattr(made_source, "read", vanish)
        write(raw, root)
    raw.with_name("unmounted").rename(raw)
    assert write(raw, root).records == 2


def test_a_set_without_any_accepted_record_is_an_error_with_the_reason(tmp_path):
    raw = lines(tmp_path, *(f"a/{k}-bad" for k in range(5)))
    for _ in range(2):
        with pytest.raises(ShardError, match="5 .*a/0-bad: its depth is missing"):
            write(raw, tmp_path / "toy")
    with pytest.raises(ShardError, match=r"  rm -r .*toy"):
        write(raw, tmp_path / "toy")


def test_shards_removed_from_a_finished_set_are_written_again_with_the_same_bytes(raw, whole, tmp_path):
    root = tmp_path / "toy"
    write(raw, root)
    write(raw, root, licence="MIT")
    (root / "00002.tar").unlink()
    (root / "00004.tar").unlink()
    again = write(raw, root)
    assert again.digest == whole.digest and again.meta["licence"] == "MIT"
    assert verify_set(root) == []
    changed = ("manifest.json", "about.json")
    assert files(root, but=changed) == files(whole.root, but=changed)


def test_an_empty_raw_folder_is_an_error_with_the_layout_and_creates_no_folder(tmp_path):
    with pytest.raises(ValueError, match="a toy: .*toy.txt with a name a line"):
        write(lines(tmp_path), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_every_entry_of_the_catalog_has_a_complete_source():
    for name in catalog.SETS:
        source = catalog.load_source(name)
        facts = source.INFO
        assert facts.name == name and facts.sky in ("far", "invalid")
        assert facts.title and facts.layout and facts.get and facts.licence
        assert callable(source.find) and callable(source.read)
