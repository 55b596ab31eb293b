"""Wrong indexes: a label must never join the image of another record."""

import io
import random
import shutil
import tarfile
from pathlib import Path

import pytest
from local_servers import FaultyServer
from shard_builders import plain_tar
from shard_builders import records as made_records

from depth_anything.data import remote
from depth_anything.data.reader import JoinedRecords, Records, ShardReader
from depth_anything.data.shards import open_set, verify_set, write_manifest
from depth_anything.data.tars import (
    BadRecord,
    ShardError,
    index_shard,
    parse_index,
    read_shard_info,
    write_shard,
)


def to_format_1(path: Path) -> None:
    """Rewrite an index in format 1, which has no checksum of its own."""
    head, _, body = path.read_text().partition("\n")
    fields = head.replace("index 2", "index 1").split("\t")[:-1]
    path.write_text("\t".join(fields) + "\n" + body)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def pair(tmp_path):
    """Images, and labels that contain the key of their image; the fourth image has no label."""
    keys = [f"set/00000/{i:07d}" for i in range(6)]
    image = write_shard(tmp_path / "images" / "00000.tar", [(key, {"jpg": key.encode()}) for key in keys])
    images = write_manifest(tmp_path / "images", name="set", shards=[image], meta={})
    rows = [(key, {"disparity.q12": key.encode()}) for key in keys if not key.endswith("3")]
    label = write_shard(tmp_path / "labels" / "00000.tar", rows)
    meta = {"kind": "labels", "images": {"set": "set", "hashes": {"00000": image.hash}}}
    return images, write_manifest(tmp_path / "labels", name="set", shards=[label], meta=meta)


def read_pairs(images, labels):
    """Return for each label the last character of its key, or the reason why it cannot be read."""
    joined, found = JoinedRecords(images, labels), []
    for number in range(labels.records):
        try:
            key, fields = joined.read("set/00000", number)
            assert fields["jpg"] == fields["disparity.q12"] == key.encode()
            found.append(key[-1])
        except BadRecord as error:
            found.append(error.reason)
    return found


@pytest.mark.parametrize("older", [False, True], ids=["with a checksum", "of an earlier version"])
def test_label_with_a_changed_key_joins_no_other_image(pair, older):
    images, labels = pair
    index = Path(labels.root, "00000.idx")
    if older:
        to_format_1(index)
    assert read_pairs(images, labels) == ["0", "1", "2", "4", "5"]
    rewrite(index, "0000002\tdisparity", "0000003\tdisparity")  # the image without a label
    reasons = read_pairs(images, labels)
    if older:
        assert "disparity.q12" in reasons.pop(2) and reasons == ["0", "1", "4", "5"]
    else:
        assert all("00000.idx" in reason for reason in reasons)


def test_image_with_a_changed_key_joins_no_other_label(pair):
    images, labels = pair
    index = Path(images.root, "00000.idx")
    to_format_1(index)
    rewrite(index, "0000002\tjpg", "0000009\tjpg")
    rewrite(index, "0000003\tjpg", "0000002\tjpg")
    reasons = read_pairs(images, labels)
    assert "image: its jpg" in reasons.pop(2) and reasons == ["0", "1", "4", "5"]


def test_every_changed_character_of_an_index_is_detected(tmp_path):
    write_shard(tmp_path / "000000.tar", made_records("000000", count=2))
    text = (tmp_path / "000000.idx").read_text()
    rng = random.Random(4)
    for place in range(len(text)):
        other = rng.choice([letter for letter in "0123456789abc/\t\n" if letter != text[place]])
        with pytest.raises(ShardError, match="depth-anything shard index data"):
            parse_index(text[:place] + other + text[place + 1 :], where="data/a.idx")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("set/000000/000001\tjpg", "set/000000/000004\tjpg"),  # the key of another record
        ("set/000000/000001\tjpg", "set/000000/000009\tjpg"),  # a key that the tar does not have
        ("set/000000/000001\tjpg", "set/000000/000001\tpng"),
        ("set/000000/000001\tjpg", "seT/000000/000001\tjpg"),
    ],
)
def test_index_of_format_1_is_checked_against_the_names_in_the_tar(tmp_path, old, new):
    write_shard(tmp_path / "000000.tar", made_records("000000"))
    index = tmp_path / "000000.idx"
    to_format_1(index)
    rewrite(index, old, new)
    with pytest.raises(BadRecord):
        ShardReader().read(tmp_path / "000000.tar", 1)


def test_offsets_into_another_record_are_detected(tmp_path):
    """Records of equal bytes have equal checksums, but different names."""
    write_shard(tmp_path / "a.tar", [(f"k{i}", {"txt": b"the same"}) for i in range(4)])
    index = tmp_path / "a.idx"
    to_format_1(index)
    head, *lines = index.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    shifted = [row[:2] + rows[number - 1][2:] for number, row in enumerate(rows)]
    index.write_text("\n".join([head, *("\t".join(row) for row in shifted), ""]))
    for number in range(4):
        with pytest.raises(BadRecord, match="depth-anything shard index"):
            ShardReader().read(tmp_path / "a.tar", number)


def test_exchanged_indexes_are_detected(tmp_path):
    infos = []
    for name in "ab":
        rows = [(f"set/{name}/{i}", {"txt": b"the same"}) for i in range(3)]
        infos.append(write_shard(tmp_path / f"{name}.tar", rows))
    made = write_manifest(tmp_path, name="set", shards=infos, meta={})
    for older in (False, True):
        for name, other in ("ab", "ba"):
            shutil.copy(tmp_path / f"{name}.idx", tmp_path / f"{other}.kept")
        for name in "ab":
            (tmp_path / f"{name}.kept").rename(tmp_path / f"{name}.idx")
            if older:
                to_format_1(tmp_path / f"{name}.idx")
        for name in "ab":
            with pytest.raises(BadRecord):
                ShardReader().read(tmp_path / f"{name}.tar", 0)
            with pytest.raises(BadRecord, match=r"\.tar"):
                Records(made).read(f"set/{name}", 0)
        for name in "ab":
            index_shard(tmp_path / f"{name}.tar")


@pytest.mark.parametrize("older", [False, True])
def test_duplicate_keys_and_missing_lines_are_refused(tmp_path, older):
    write_shard(tmp_path / "a.tar", [(f"k{i}", {"txt": b"%d" % i}) for i in range(4)])
    index = tmp_path / "a.idx"
    if older:
        to_format_1(index)
    text = index.read_text()
    for wrong in (text.replace("k3\t", "k0\t"), text.replace("k3\t", "k2\t"), text[: text.index("k3\t")]):
        index.write_text(wrong)
        with pytest.raises(ShardError, match="a.idx.*depth-anything shard index"):
            ShardReader().keys(tmp_path / "a.tar")


def test_sets_with_format_1_indexes_are_read_verified_and_indexed_again(pair):
    images, labels = pair
    for made in pair:
        to_format_1(Path(made.root, "00000.idx"))
    assert read_pairs(images, labels) == ["0", "1", "2", "4", "5"]
    assert verify_set(images.root) == []
    assert read_shard_info(Path(images.root, "00000.tar")) == images.shards[0]
    tar = Path(images.root, "00000.tar")
    again = [(key, ShardReader().read(tar, i)[1]) for i, key in enumerate(ShardReader().keys(tar))]
    before = tar.stat().st_ino
    write_shard(tar, again)
    assert tar.stat().st_ino == before  # an identical shard is not replaced
    index_shard(tar)
    assert tar.with_suffix(".idx").read_text().startswith("depth-anything-index 2\t")
    assert open_set(images.root).digest == images.digest


def test_damaged_index_does_not_get_into_a_manifest(tmp_path):
    info = write_shard(tmp_path / "a.tar", [("k", {"txt": b"1"})])
    digit = "0" if info.hash[-1] != "0" else "1"
    rewrite(tmp_path / "a.idx", info.hash, info.hash[:-1] + digit)
    with pytest.raises(ShardError, match="a.idx.*depth-anything shard index"):
        read_shard_info(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "a/" * 20, "./" + "b" * 90 + "/"])
def test_names_of_other_programs_are_checked_against_their_headers(tmp_path, kind, folder):
    path = tmp_path / "a.tar"
    members = [(f"{folder}{name}", name.encode()) for name in ("one.JPG", "one.json", f"{'x' * 95}.jpg")]
    if kind == tarfile.USTAR_FORMAT and folder.startswith("./b"):
        members.pop()  # too long for a header
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    info = index_shard(path)
    assert [list(ShardReader().read(path, i)[1].values())[0] for i in range(info.records)] == [
        data for _, data in members if not data.endswith(b"json")
    ]
    to_format_1(path.with_suffix(".idx"))
    rewrite(path.with_suffix(".idx"), "one\t", "onf\t")
    with pytest.raises(BadRecord, match="depth-anything shard index"):
        ShardReader().read(path, 0)
    if info.records > 1:
        rewrite(path.with_suffix(".idx"), "x" * 95, "x" * 94 + "y")
        with pytest.raises(BadRecord, match="depth-anything shard index"):
            ShardReader().read(path, 1)


def test_record_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    path = plain_tar(tmp_path / "a.tar", [("k.txt", b"1")])
    with open(path, "r+b") as file:
        file.truncate(5 << 30)  # a sparse file
    size = path.stat().st_size
    path.with_suffix(".idx").write_text(
        f"depth-anything-index 1\t{size}\tsha256:0\t1\t1\nk\ttxt\t512\t{4 << 30}\t00000000\n"
    )
    with pytest.raises(BadRecord, match=str(1 << 30)):
        ShardReader().read(path, 0)


def test_names_are_checked_in_remote_tars(pair, tmp_path, monkeypatch):
    """A wrong remote index of format 1 is fetched once more, then the record is bad."""
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    remote._proxy_url.cache_clear()
    images, labels = pair
    index = Path(labels.root, "00000.idx")
    to_format_1(index)
    with FaultyServer(tmp_path) as server:
        there = [open_set(f"{server.address}/{name}") for name in ("images", "labels")]
        assert read_pairs(*there) == ["0", "1", "2", "4", "5"]
        rewrite(index, "0000002\tdisparity", "0000003\tdisparity")
        server.seen.clear()
        reasons = read_pairs(*there)
        assert "label: its disparity.q12" in reasons.pop(2)
        assert reasons == ["0", "1", "4", "5"]
        assert [path for path, _ in server.seen].count("/labels/00000.idx") == 2
