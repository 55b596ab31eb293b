"""Sets of shards: manifests and their digests, opening, verifying."""

import json
import os

import numpy as np
import pytest
from shard_builders import make, names, plain_tar, records

from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import index_set, open_set, verify_set, write_manifest
from depth_anything.data.tars import ShardError, ShardInfo, write_shard


def test_index_set_refuses(tmp_path):
    with pytest.raises(ShardError, match=str(tmp_path)):
        index_set(tmp_path)
    plain_tar(tmp_path / "a b.tar", [("k.jpg", b"")])
    with pytest.raises(ShardError, match="a b"):
        index_set(tmp_path, name="x")


def test_open_set_errors_name_the_command_to_type(tmp_path):
    with pytest.raises(ShardError, match="absent .*depth-anything shard"):
        open_set(tmp_path / "absent")
    with pytest.raises(ShardError, match="manifest.json.*depth-anything shard index"):
        open_set(tmp_path)
    for damaged in ("", "{", "[]", '{"shards": 3}', '{"shards": [{"name": "a"}]}'):
        (tmp_path / "manifest.json").write_text(damaged)
        with pytest.raises(ShardError, match="manifest.json"):
            open_set(tmp_path)
    write_manifest(tmp_path, name="set", shards=[], meta={})
    with pytest.raises(ShardError, match="depth-anything shard"):
        open_set(tmp_path)


def test_open_set_checks_shards_against_the_manifest(tmp_path):
    make(tmp_path)
    path = tmp_path / "000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ShardError, match=r"000001\.tar has \d+79 bytes in place of \d+80.*verify"):
        open_set(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ShardError, match="has 0 bytes"):
        open_set(tmp_path)
    path.unlink()
    with pytest.raises(ShardError, match=r"000001\.tar"):
        open_set(tmp_path)
    assert open_set(tmp_path, check=False).records == 15
    path.write_bytes(data)
    assert open_set(f"file://{tmp_path}/", name="other").name == "other"


def test_an_edited_manifest_is_refused(tmp_path):
    make(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["records"] = 4
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="manifest.json"):
        open_set(tmp_path)
    content["shards"][0]["name"] = "../../etc/passwd"
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="etc/passwd"):
        open_set(tmp_path)


def test_manifest_refuses_names(tmp_path):
    info = ShardInfo("a", 1, 10240, "sha256:0")
    for name in ("", "a/b", "..", "a b"):
        with pytest.raises(ShardError, match=f'"{name}"'):
            write_manifest(tmp_path, name=name, shards=[info], meta={})
    with pytest.raises(ShardError, match=" a$"):
        write_manifest(tmp_path, name="set", shards=[info, info], meta={})
    assert names(tmp_path) == []


def test_digest_depends_only_on_the_shards(tmp_path):
    one = make(tmp_path / "one")
    assert write_manifest(tmp_path, name="set", shards=reversed(one.shards), meta={}).shards == one.shards
    other = make(tmp_path / "other", name="called-otherwise")
    assert one.digest == other.digest != make(tmp_path / "fewer", shards=2).digest
    assert one.digest != make(tmp_path / "larger", size=301).digest


def frames(shard="000000", count=3):
    rng = np.random.default_rng(0)
    for i in range(count):
        frame = Frame(
            "", rng.integers(0, 255, (20, 30, 3), dtype=np.uint8), depth=np.ones((20, 30), np.float32)
        )
        yield f"set/{shard}/{i:06d}", encode_frame(frame, codec="q12")


def test_verify_set_finds_everything(tmp_path):
    infos = [write_shard(tmp_path / f"{name}.tar", frames(name)) for name in "012345"]
    write_manifest(tmp_path, name="set", shards=infos, meta={})
    assert verify_set(tmp_path, decode=True) == []
    (tmp_path / "0.tar").unlink()
    (tmp_path / "1.idx").unlink()
    data = bytearray((tmp_path / "2.tar").read_bytes())
    data[513] ^= 1  # inside the first field
    (tmp_path / "2.tar").write_bytes(data)
    os.replace(tmp_path / "3.tar", tmp_path / "spare")
    os.replace(tmp_path / "4.tar", tmp_path / "3.tar")
    os.replace(tmp_path / "spare", tmp_path / "4.tar")
    (tmp_path / "5.tar").write_bytes((tmp_path / "5.tar").read_bytes()[:3000])
    (tmp_path / "6.tar").write_bytes(b"")
    problems = "\n".join(verify_set(tmp_path, decode=True))
    for expected in (
        r"0.tar is missing",
        r"1.idx is missing",
        r"2.idx is not the index of its tar",
        r"2.tar is not the tar",
        r"2.tar[0] set/2/000000: the checksum",
        r"3.tar is not the tar",
        r"4.tar is not the tar",
        r"5.tar has 3000 bytes",
        r"5.tar is truncated",
        r"6.tar is not in the manifest",
    ):
        assert expected in problems


def test_verify_set_decodes(tmp_path):
    good = dict(frames())
    bad = {**good["set/000000/000001"], "jpg": b"not a picture"}
    info = write_shard(tmp_path / "a.tar", [*list(good.items())[:1], ("set/000000/000001", bad)])
    write_manifest(tmp_path, name="set", shards=[info], meta={})
    assert verify_set(tmp_path) == []
    (problem,) = verify_set(tmp_path, decode=True)
    assert "a.tar[1] set/000000/000001: jpg: the image" in problem


def test_verify_set_finds_keys_in_two_shards(tmp_path):
    infos = [
        write_shard(tmp_path / f"{name}.tar", records(shard))
        for name, shard in (("a", "000000"), ("b", "000001"))
    ]
    infos.append(write_shard(tmp_path / "c.tar", records("000000", count=2)))
    write_manifest(tmp_path, name="set", shards=infos, meta={})
    assert verify_set(tmp_path) == [
        'the key "set/000000/000000" is in a and in c',
        'the key "set/000000/000001" is in a and in c',
    ]


def test_verify_set_without_a_set(tmp_path):
    (problem,) = verify_set(tmp_path)
    assert "manifest.json" in problem and str(tmp_path) in problem
