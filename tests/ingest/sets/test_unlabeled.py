"""The eight sets of photographs as published: folders, plain and compressed tars, LMDB, videos."""

import errno
import gzip
import io
import os
import struct
import tarfile
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from depth_anything.data.reader import Records
from depth_anything.data.sample import decode_image, decode_record
from depth_anything.data.shards import verify_set
from depth_anything.ingest import archive_io, video_frames
from depth_anything.ingest.catalog import load_source
from depth_anything.ingest.file_list import FileList
from depth_anything.ingest.find_files import find_images
from depth_anything.ingest.writer import write_source


def picture(seed, kind="JPEG", size=(20, 30)):
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([x * 8 % 256, y * 9 % 256, (x + y + 7 * seed) % 256], -1).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def tar_of(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def written(name, raw, root, **options):
    """Write a set; return it, and each record's name with its image file."""
    shard_set = write_source(load_source(name), raw, root, **{"per_shard": 3, **options})
    assert verify_set(shard_set.root, decode=True) == []
    records, found = Records(shard_set), {}
    for shard, count in records.shards:
        for index in range(count):
            key, fields = records.read(shard, index)
            (image,) = (fields[field] for field in ("jpg", "png", "webp") if field in fields)
            found[decode_record(key, fields).meta["name"]] = image
    return shard_set, found


def sa1b(count=5):
    files = {}
    for k in range(count):
        files |= {f"./sa_{k}.jpg": picture(k), f"./sa_{k}.json": b"{}"}
    return files


@pytest.mark.parametrize("packed", [False, True])
def test_sa1b_tars_are_read_whatever_their_suffix(tmp_path, packed):
    # Some sources pack them and call them .tar all the same (segment-anything, issue 802).
    raw = tmp_path / "raw"
    tar_of(raw / "sa_000000.tar", sa1b(), "w:gz" if packed else "w")
    tar_of(raw / "sa_000001.tar.gz", {"./sa_9.jpg": picture(9)}, "w" if packed else "w:gz")
    shard_set, found = written("sa1b", raw, tmp_path / "sa1b")
    images = {name[2:]: data for name, data in sa1b().items() if name.endswith(".jpg")}
    assert found == {
        **{f"sa_000000.tar/{name}": data for name, data in images.items()},
        "sa_000001.tar.gz/sa_9.jpg": picture(9),
    }
    assert shard_set.meta["left_out"] == {".json": 5} and shard_set.meta["licence"] == "LicenseRef-SA-1B"
    part = [
        write_source(load_source("sa1b"), raw, tmp_path / "p", name="sa1b", per_shard=3, part=(k, 2))
        for k in (2, 1)
    ]
    assert part[1].digest == shard_set.digest, "a packed tar can be read backwards, too"


def test_a_plain_tar_is_read_only_at_its_members(tmp_path, monkeypatch):
    raw, reads = tmp_path / "raw", []
    tar_of(raw / "sa_000000.tar", {"a.jpg": picture(1), "b.jpg": picture(2, size=(300, 400))})
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda fd, count, offset: reads.append(count) or pread(fd, count, offset)
    )
    lines = list(load_source("sa1b").find(raw))
    assert not reads
    read = load_source("sa1b").read(raw, lines[1])
    assert read.image == picture(2, size=(300, 400)) and reads == [len(read.image)]


def test_a_damaged_tar_gives_its_complete_members_and_is_reported(tmp_path):
    raw = tmp_path / "raw"
    whole = tar_of(raw / "a.tar", {"1.jpg": picture(1), "2.jpg": picture(2, size=(200, 300))}).read_bytes()
    place = whole.index(b"2.jpg")
    (raw / "a.tar").write_bytes(whole[: place + 1000])
    (raw / "b.tar").write_bytes(whole[:place] + bytes([7]) * 1000)  # a header of garbage
    (raw / "c.tar").write_bytes(gzip.compress(whole)[:-1000])
    (raw / "d.tar").write_bytes(b"")
    (raw / "e.tar").write_bytes(whole)
    shard_set, found = written("landmarks", raw, tmp_path / "landmarks")
    assert {"a.tar/1.jpg", "b.tar/1.jpg", "e.tar/1.jpg", "e.tar/2.jpg"} <= set(found)
    reasons = dict(shard_set.meta["skipped"]["files"])
    assert "truncated" in reasons["a.tar/2.jpg"]
    for tar in ("a", "b", "c", "d"):
        assert "the tar is damaged, and nothing after" in reasons[f"{tar}.tar"]
    assert "nothing after 1.jpg can be found" in reasons["b.tar"]


def test_a_compressed_tar_with_a_wrong_checksum_is_reported(tmp_path):
    files = {f"{k}.bmp": picture(k, "BMP", size=(60, 80)) for k in range(9)}
    path = tar_of(tmp_path / "raw" / "a.tar", files)
    packed = bytearray(gzip.compress(path.read_bytes(), 0))  # stored: a flipped bit is a flipped pixel
    packed[len(packed) // 2] ^= 64
    path.write_bytes(packed)
    shard_set, found = written("landmarks", path.parent, tmp_path / "landmarks")
    assert len(found) == len(files)
    (row,) = shard_set.meta["skipped"]["files"]
    assert row[0] == "a.tar" and row[1].startswith("the tar is damaged, nobody can tell where: CRC check")


def test_a_damaged_block_rejects_its_members_only(tmp_path):
    noise = np.random.Generator(np.random.Philox(1)).integers(0, 256, (300, 300, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "BMP")
    path = tar_of(tmp_path / "a.tar", {f"{k}.bmp": out.getvalue() for k in range(8)}, "w:bz2")
    members = [*archive_io.list_tar_members(path)]
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 64
    path.write_bytes(packed)
    archive_io._cached_tar.cache_clear()
    seen = []
    for _ in range(2):  # the second time, too: what was unpacked behind the damage is not taken for whole
        for member in members:
            try:
                seen.append(archive_io.read_tar_member(path, member.offset, member.size) == out.getvalue())
            except ValueError as error:
                assert "damaged" in str(error)
                seen.append(False)
                break
    assert seen.count(True) and seen[: len(seen) // 2] == seen[len(seen) // 2 :] and not seen[-1]


def test_a_disk_that_fails_while_a_tar_is_listed_stops_the_run(tmp_path, monkeypatch):
    path = tar_of(tmp_path / "raw" / "a.tar", {"1.jpg": picture(1)})

    def fail(self, size):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(archive_io._TailRecorder, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(find_images(path.parent))


def test_metadata_files_of_macos_are_skipped(tmp_path):
    """In folders and in the tars that macOS writes, where each file has such a shadow before it."""
    tar_of(tmp_path / "raw" / "a.tar", {"x/._1.jpg": b"\0\5\x16\7", "x/1.jpg": picture(1)})
    (tmp_path / "raw" / "2.jpg").write_bytes(picture(2))
    (tmp_path / "raw" / "._2.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / "raw" / "._a.tar").write_bytes(b"\0\5\x16\7")
    shard_set, found = written("landmarks", tmp_path / "raw", tmp_path / "landmarks")
    assert list(found) == ["2.jpg", "a.tar/x/1.jpg"]
    assert shard_set.meta["left_out"] == {"._*": 3} and "skipped" not in shard_set.meta


def test_tars_that_are_not_regular_files_are_rejected(tmp_path):
    path = tar_of(tmp_path / "raw" / "a.tar", {"1.jpg": picture(1)})
    os.mkfifo(path.with_name("b.tar"))  # to open it is to wait for ever
    path.with_name("c.tar").symlink_to("nowhere.tar")
    shard_set, found = written("landmarks", path.parent, tmp_path / "landmarks")
    assert list(found) == ["a.tar/1.jpg"]
    assert shard_set.meta["skipped"]["files"] == [
        ["b.tar", "not a regular file"],
        ["c.tar", "No such file or directory"],
    ]


def test_members_that_are_not_regular_files_are_rejected(tmp_path):
    path = tar_of(tmp_path / "raw" / "a.tar", {"1.jpg": picture(1)})
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("p.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    shard_set, found = written("landmarks", path.parent, tmp_path / "landmarks")
    assert list(found) == ["a.tar/1.jpg"]
    assert {reason for _, reason in shard_set.meta["skipped"]["files"]} == {"not a regular file"}


def test_members_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_io, "MAX_FILE_BYTES", 2000)
    tar_of(tmp_path / "raw" / "a.tar", {"1.jpg": picture(1), "2.jpg": picture(2) + bytes(2000)})
    shard_set, found = written("landmarks", tmp_path / "raw", tmp_path / "landmarks")
    assert list(found) == ["a.tar/1.jpg"] and "MiB" in shard_set.meta["skipped"]["files"][0][1]


def test_a_single_tar_is_accepted_as_the_raw_folder(tmp_path):
    path = tar_of(tmp_path / "train_large.tar", {"data_large/a/abbey/1.jpg": picture(1)})
    assert list(written("places365", path, tmp_path / "places365")[1]) == ["data_large/a/abbey/1.jpg"]


def test_folders_are_listed_in_order_and_links_are_followed_once(tmp_path):
    raw, other = tmp_path / "raw", tmp_path / "disk2"
    files = ["a/2.jpg", "a/b/1.JPG", "a.b/1.jpeg", "a-b.png", "odd\tname\n.jpg"]
    for name in files:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(picture(1))
    (raw / "zhiyuan_objv2_train.json").write_text("{}")
    other.mkdir()
    (other / "3.jpg").write_bytes(picture(3))
    (raw / "patch9").symlink_to(other)
    (other / "loop").symlink_to(raw)
    shard_set, found = written("objects365", raw, tmp_path / "objects365")
    assert list(found) == sorted([*files, "patch9/3.jpg"], key=os.fsencode)
    assert shard_set.meta["left_out"] == {".json": 1}


def test_lsun_is_read_from_its_databases(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="pip install 'depth-anything-train[lsun]'")
    raw, values = tmp_path / "raw", {}
    for category in ("bedroom", "tower"):
        (raw / f"{category}_train_lmdb").mkdir(parents=True)
        with lmdb.open(str(raw / f"{category}_train_lmdb"), map_size=1 << 20) as environment:
            with environment.begin(write=True) as transaction:
                for k in range(4):
                    key = f"{k:040x}" if k else "odd/ключ"
                    values[f"{category}_train_lmdb/{key}"] = picture(k, "WEBP", size=(256, 341))
                    transaction.put(key.encode(), values[f"{category}_train_lmdb/{key}"])
    (raw / "category_indices.txt").write_text("")
    shard_set, found = written("lsun", raw, tmp_path / "lsun")
    assert found == values and list(found) == sorted(found)
    assert shard_set.meta["left_out"] == {".mdb": 2, ".txt": 1}  # lock.mdb
    with pytest.raises(ValueError, match="'gone'"):
        load_source("lsun").read(raw, "bedroom_train_lmdb/gone\tlmdb\tbedroom_train_lmdb")
    (tmp_path / "bad" / "x_train_lmdb").mkdir(parents=True)
    (tmp_path / "bad" / "x_train_lmdb" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match=str(tmp_path / "bad" / "x_train_lmdb")):
        list(load_source("lsun").find(tmp_path / "bad"))
    half = raw / "tower_train_lmdb" / "data.mdb"
    os.truncate(half, half.stat().st_size // 2)  # to read on would kill the process
    archive_io._open_lmdb.cache_clear()
    with pytest.raises(ValueError, match="tower_train_lmdb .* [0-9]+ of [0-9]+ bytes"):
        list(load_source("lsun").find(raw))


def test_bdd100k_videos_give_two_frames_per_second(tmp_path):
    pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")
    import made_videos

    raw = tmp_path / "raw"
    made_videos.make_video(raw / "videos" / "train" / "a.mov", frames=90)  # 3.003 s
    made_videos.make_video(raw / "videos" / "train" / "b.mov", frames=20)
    (raw / "videos" / "train" / "c.mov").write_bytes(b"no film")
    shard_set, found = written("bdd100k", raw, tmp_path / "bdd100k")
    names = [f"videos/train/a.mov/{k:06d}" for k in range(6)]
    assert list(found) == [*names, "videos/train/b.mov/000000"]
    for k, name in enumerate(names):
        shown = decode_image(found[name]).astype(int)
        expected = made_videos.frame(int(k / 2 * 30000 / 1001), 48, 64).astype(int)
        assert abs((shown - expected)[30:].mean()) < 1, "the frame on the screen at this time"
    assert shard_set.meta["skipped"]["files"][0][0] == "videos/train/c.mov"
    source = load_source("bdd100k")
    line = "x\tfilm\tvideos/train/a.mov\t"
    backwards = [source.read(raw, f"{line}{k}").image for k in (4, 1)]
    assert backwards == [found[names[4]], found[names[1]]]
    with pytest.raises(ValueError, match=" 50 s"):
        source.read(raw, f"{line}100")


def test_videos_with_a_low_frame_rate_or_a_wrong_duration(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")
    import made_videos

    path = made_videos.make_video(tmp_path / "slow.mp4", frames=3, rate=Fraction(1), sound=None)
    assert video_frames.count_frames(path) == 6
    shown = [video_frames.read_frame(path, k) for k in range(6)]
    assert shown[::2] == shown[1::2], "the last one stays for its second, too"
    assert len(set(shown)) == 3
    monkeypatch.setattr(video_frames, "MAX_HOURS", 2 / 3600)
    with pytest.raises(ValueError, match="hours"):
        video_frames.count_frames(path)


def test_frames_of_videos_are_upright(tmp_path):
    pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")
    import made_videos

    path = made_videos.make_video(tmp_path / "turned.mp4", frames=2, sound=None)
    data = bytearray(path.read_bytes())
    quarter = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # as telephones write it, clockwise
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *quarter)
    path.write_bytes(data)
    shown, wanted = decode_image(video_frames.read_frame(path, 0)), np.rot90(made_videos.frame(0, 48, 64), -1)
    assert shown.shape == wanted.shape and np.abs(shown.astype(int) - wanted).mean() < 4


def test_a_truncated_video_gives_its_frames_and_rejects_the_others(tmp_path):
    pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")
    import made_videos

    whole = made_videos.make_video(
        tmp_path / "raw" / "a.mp4", frames=90, sound=None, options={"movflags": "+faststart"}, crf="0"
    )
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * 6 // 10])
    shard_set, found = written("bdd100k", tmp_path / "raw", tmp_path / "bdd100k")
    skipped = dict(shard_set.meta["skipped"]["files"])
    assert 1 <= len(found) < 6 and len(found) + len(skipped) == 6
    assert all("ends before" in reason or "damaged" in reason for reason in skipped.values())


def test_bdd100k_images_are_stored_unchanged(tmp_path):
    path = tmp_path / "raw" / "images" / "100k" / "train" / "x.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(picture(1))
    assert written("bdd100k", tmp_path / "raw", tmp_path / "bdd100k")[1] == {
        "images/100k/train/x.jpg": picture(1)
    }


def test_short_side_uses_the_resize_rule_of_training(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, size in {"large": (150, 203), "wide": (28, 45), "fits": (28, 42), "small": (20, 200)}.items():
        (raw / f"{name}.png").write_bytes(picture(1, "PNG", size=size))
    shard_set, found = written("places365", raw, tmp_path / "places365", short_side=28)
    sizes = {name: decode_image(data).shape[:2] for name, data in found.items()}
    assert sizes == {
        "large.png": (28, 42),
        "wide.png": (28, 42),
        "fits.png": (28, 42),
        "small.png": (20, 200),
    }
    for name in ("fits.png", "small.png"):
        assert found[name] == (raw / name).read_bytes()
    assert found["large.png"].startswith(b"\xff\xd8")


def test_an_empty_folder_is_an_error_with_the_expected_layout(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "readme.txt").write_text("")
    with pytest.raises(ValueError, match="SA-1B: .*sa_000000.tar"):
        write_source(load_source("sa1b"), tmp_path / "raw", tmp_path / "sa1b")
    with pytest.raises(ValueError, match=str(tmp_path / "typo")):
        write_source(load_source("sa1b"), tmp_path / "typo", tmp_path / "sa1b")


def test_listing_a_tar_keeps_one_member_in_memory(tmp_path):
    path = tar_of(tmp_path / "a.tar", {f"{k}.jpg": b"" for k in range(300)})
    kept, members = [], archive_io.list_tar_members(path)
    first = next(members)
    tar = members.gi_frame.f_locals["tar"]
    for _ in members:
        kept.append(len(tar.members))
    assert first.name == "0.jpg" and len(kept) == 299 and max(kept) == 0


def test_names_with_special_characters_survive_the_file_list(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    name = os.fsdecode(b"caf\xe9\t\\t\r\n.jpg")
    (raw / name).write_bytes(picture(1))
    (line,) = find_images(raw)
    assert "\n" not in line and "\t" not in line
    shard_set, found = written("objects365", raw, tmp_path / "objects365")
    assert list(found) == ["caf\\udce9\t\\t\r\n.jpg"]
    assert FileList(tmp_path / "objects365", per_shard=3).lines(0) == [line]


def test_tars_next_to_image_files_are_reported(tmp_path, capsys):
    raw = tmp_path / "raw"
    tar_of(raw / "images_000.tar", {"0/1.jpg": picture(1)})
    (raw / "0").mkdir()
    (raw / "0" / "1.jpg").write_bytes(picture(1))
    shard_set, found = written("landmarks", raw, tmp_path / "both")
    assert list(found) == ["0/1.jpg", "images_000.tar/0/1.jpg"]
    assert "1 image files and 1 tars" in capsys.readouterr().err
    shard_set, found = written("landmarks", raw, tmp_path / "one", leave_out=["*.tar/*"])
    assert list(found) == ["0/1.jpg"] and shard_set.meta["left_out"] == {"*.tar/*": 1}
