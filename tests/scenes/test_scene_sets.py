"""Sets of procedural scenes: written, continued, and refused for other settings."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depth_anything.data import codec
from depth_anything.data.reader import Records
from depth_anything.data.sample import decode_record
from depth_anything.data.shards import open_set, verify_set
from depth_anything.errors import UserError
from depth_anything.scenes import render
from depth_anything.scenes.render import render_scene, write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec

SPEC = SceneSetSpec(look="photographic", count=10, seed=3, height=24, width=32)
SMALL = {"height": 24, "width": 32}


def tars(root):
    return {path.name: path.read_bytes() for path in sorted(Path(root).glob("*.tar"))}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "photos"
    return write_scenes(root, SPEC, per_shard=4)


def test_a_written_set_reads_back_as_rendered(written):
    assert [shard.records for shard in written.shards] == [4, 4, 2]
    assert verify_set(written.root, decode=True) == []
    records = Records(open_set(written.root))
    key, fields = records.read("photos/00001", 2)
    frame, rendered = decode_record(key, fields), render_scene(30_000_006, look="photographic", **SMALL)
    assert key == "photos/00001/0000006"
    assert set(fields) == {"jpg", "json", "depth.f32"}
    assert (frame.depth == rendered.depth).all()
    assert frame.meta == rendered.meta
    assert (
        frame.meta["unit"] == "m" and frame.meta["sky"] == "inf" and frame.meta["original_size"] == [24, 32]
    )
    assert np.abs(frame.image.astype(int) - rendered.image).mean() < 20  # JPEG
    assert codec.decode(fields["depth.f32"]).dtype == np.float32


def test_synthetic_images_are_png_and_depth_is_optional(tmp_path):
    shard_set = write_scenes(tmp_path / "s", replace(SPEC, look="synthetic", count=2, labelled=False))
    key, fields = Records(shard_set).read("s/00000", 1)
    assert set(fields) == {"png", "json"}
    rendered = render_scene(30_000_001, look="synthetic", **SMALL)
    assert (decode_record(key, fields).image == rendered.image).all()


def test_a_finished_set_is_returned_unchanged(written, monkeypatch):
    monkeypatch.setattr(render, "render_scene", None)
    before = {path: path.stat().st_mtime_ns for path in Path(written.root).iterdir()}
    assert write_scenes(written.root, SPEC, per_shard=4) == written
    assert {path: path.stat().st_mtime_ns for path in Path(written.root).iterdir()} == before


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"count": 11},
        {"look": "synthetic"},
        {"height": 25},
        {"labelled": False},
        {},
    ],
)
def test_other_settings_are_rejected_with_the_command_to_type(written, other):
    per_shard = 4 if other else 5
    with pytest.raises(ValueError, match=f"{next(iter(other), 'per_shard')} .*rm -r"):
        write_scenes(written.root, replace(SPEC, **other), per_shard=per_shard)


def test_a_killed_writer_is_continued_to_the_same_bytes(written, tmp_path, monkeypatch):
    calls = []

    def dying(seed, **kwargs):
        calls.append(seed)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return render_scene(seed, **kwargs)

    monkeypatch.setattr(render, "render_scene", dying)
    root = tmp_path / "photos"
    with pytest.raises(KeyboardInterrupt):
        write_scenes(root, SPEC, per_shard=4)
    assert not (root / "manifest.json").exists() and list(tars(root)) == ["00000.tar"]
    with pytest.raises(ValueError, match="rm -r"):
        write_scenes(root, replace(SPEC, seed=4), per_shard=4)
    calls.clear()
    calls.extend([0] * 10)
    again = write_scenes(root, SPEC, per_shard=4)
    assert len(calls) == 10 + 6, "the finished shard must not be drawn again"
    assert again.digest == written.digest and tars(root) == tars(written.root)
    assert (root / "manifest.json").read_bytes() == Path(written.root, "manifest.json").read_bytes()


def test_processes_that_race_write_the_same_set(written, tmp_path):
    root = tmp_path / "photos"
    sets, threads = [], []
    for _ in range(3):
        threads.append(threading.Thread(target=lambda: sets.append(write_scenes(root, SPEC, per_shard=4))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert [one.digest for one in sets] == [written.digest] * 3
    assert tars(root) == tars(written.root) and verify_set(root) == []
    assert not list(root.glob(".tmp*"))


def test_settings_are_stored_in_the_manifest(written):
    meta = json.loads(Path(written.root, "manifest.json").read_text())["meta"]
    assert meta["unit"] == "m" and meta["sky"] == "inf"
    assert meta["settings"]["look"] == "photographic" and meta["settings"]["seed"] == 3


def test_shards_of_other_programs_are_not_overwritten(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.tar").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="another folder"):
        write_scenes(tmp_path / "x", SPEC)


def test_an_invalid_name_is_rejected_before_writing(tmp_path):
    with pytest.raises(ValueError, match="A-Z a-z 0-9"):
        write_scenes(tmp_path / "my scenes", SPEC)


def test_the_layout_is_a_setting_of_a_set_unless_it_is_classic(tmp_path, written):
    small = replace(SPEC, count=4, layout="varied")
    one = write_scenes(tmp_path / "v", small, per_shard=2)
    other = write_scenes(tmp_path / "w" / "v", small, per_shard=2, workers=2)
    assert one.digest == other.digest and tars(one.root) == tars(other.root)
    meta = json.loads(Path(one.root, "manifest.json").read_text())["meta"]
    assert meta["settings"]["layout"] == "varied"
    assert "layout" not in json.loads(Path(written.root, "manifest.json").read_text())["meta"]["settings"]
    with pytest.raises(ValueError, match="layout .*rm -r"):
        write_scenes(one.root, replace(small, layout="classic"), per_shard=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"look": "painted"}, "look.*synthetic or photographic"),
        ({"layout": "round"}, "layout.*classic or varied"),
        ({"count": 0}, "count=0"),
        ({"fov": (80.0, 40.0)}, "fov=80 40"),
        ({"fov": (0.5, 40.0)}, "fov=0.5 40"),
        ({"fov": (40.0, 180.0)}, "fov=40 180"),
    ],
)
def test_impossible_settings_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SPEC, **changes)
