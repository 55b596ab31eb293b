import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depth_anything.data.reader import Records
from depth_anything.data.sample import decode_record
from depth_anything.data.shards import verify_set
from depth_anything.errors import UserError
from depth_anything.ingest import archive_io, record
from depth_anything.ingest.photographs import iterate_images, list_photographs, write_images

PHOTOS = Path(os.environ.get("DEPTH_ANYTHING_PHOTOS", Path(__file__).parents[3] / "shared" / "photos"))


def picture(height=20, width=30, seed=0):
    """Return a smooth image, which JPEG changes little."""
    corners = np.random.Generator(np.random.Philox(seed)).random((2, 2, 3))
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    mixed = (corners[0, 0] * (1 - x) + corners[0, 1] * x) * (1 - y) + (
        corners[1, 0] * (1 - x) + corners[1, 1] * x
    ) * y
    return (mixed * 255).astype(np.uint8)


def file(image, kind, **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def bomb():
    """A PNG whose header promises ten gigapixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def frames(shard_set):
    """Every record of a set by its original name: (fields, frame)."""
    records, found = Records(shard_set), {}
    for shard, count in records.shards:
        for index in range(count):
            key, fields = records.read(shard, index)
            frame = decode_record(key, fields)
            found[frame.meta["name"]] = (fields, frame)
    return found


def fill(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


GOOD = {
    "b/plain.jpg": file(picture(), "JPEG", quality=95),
    "b/ärger 日本.jpeg": file(picture(seed=1), "JPEG", quality=95),
    "a.png": file(picture(seed=2), "PNG"),
    "web.webp": file(picture(seed=3), "WEBP", lossless=True),
}


def test_upright_rgb_files_are_stored_unchanged_in_the_order_of_their_names(tmp_path):
    shard_set = write_images(fill(tmp_path / "in", GOOD), tmp_path / "own")
    found = frames(shard_set)
    assert list(found) == sorted(GOOD, key=str.encode)
    for name, data in GOOD.items():
        fields, frame = found[name]
        assert data in fields.values()
        assert frame.meta == {"source": "images", "name": name, "original_size": [20, 30]}
        assert set(fields) - {"json"} <= {"jpg", "png", "webp"}
    assert [frame.key for _, frame in found.values()] == [f"own/00000/{k:07d}" for k in range(4)]
    assert verify_set(shard_set.root, decode=True) == []
    assert "skipped" not in shard_set.meta


def awkward():
    """Files that are not plain RGB, and the upright picture that each one shows."""
    color = picture(seed=5)
    gray = picture(seed=6)[..., 0]
    deep = gray.astype(np.uint16) * 257
    alpha = np.concatenate([color, np.full((20, 30, 1), 255, np.uint8)], 2)
    alpha[:10, :, 3] = 0
    shown = color.copy()
    shown[:10] = 255  # on white
    turned = np.rot90(color)  # stored so that orientation 6 (turn right to see it) gives `color`
    return {
        "gray.jpg": (file(gray, "JPEG", quality=95), np.repeat(gray[..., None], 3, 2), 3),
        "gray.png": (file(gray, "PNG"), np.repeat(gray[..., None], 3, 2), 0),
        "deep.png": (file(Image.fromarray(deep), "PNG"), np.repeat(gray[..., None], 3, 2), 0),
        "deep.tif": (file(Image.fromarray(deep), "TIFF"), np.repeat(gray[..., None], 3, 2), 0),
        "alpha.png": (file(alpha, "PNG"), shown, 0),
        "palette.gif": (file(Image.fromarray(color).quantize(8), "GIF"), None, 0),
        "cmyk.jpg": (file(Image.fromarray(color).convert("CMYK"), "JPEG", quality=95), color, 6),
        "turned.jpg": (file(turned, "JPEG", quality=95, subsampling=0, exif=exif(6)), color, 6),
        "turned.png": (file(turned, "PNG", exif=exif(6)), color, 0),
        "plain.bmp": (file(color, "BMP"), color, 0),
    }


def test_other_image_files_are_stored_as_png(tmp_path):
    files = awkward()
    shard_set = write_images(
        fill(tmp_path / "in", {name: row[0] for name, row in files.items()}), tmp_path / "own"
    )
    found = frames(shard_set)
    assert set(found) == set(files)
    for name, (_, shown, tolerance) in files.items():
        fields, frame = found[name]
        assert set(fields) == {"png", "json"}, name
        assert frame.image.shape == (20, 30, 3), name
        if shown is not None:
            assert np.abs(frame.image.astype(int) - shown).max() <= tolerance, name
    read = dict(iterate_images(tmp_path / "in"))
    for name, (_, frame) in found.items():
        assert (read[name] == frame.image).all(), "a record shows what the file shows"


BAD = {
    "cut.jpg": GOOD["b/plain.jpg"][:-200],
    "empty.jpg": b"",
    "bomb.png": bomb(),
    "notes.txt": b"not an image",
    "noise.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


def test_a_source_that_is_missing_or_a_device_is_rejected_as_such(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        list_photographs(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(UserError, match=f"{source} is not a regular file"):
            list_photographs(source)


def test_files_that_are_not_images_are_rejected_named_and_counted(tmp_path):
    source = fill(tmp_path / "in", {**GOOD, **BAD})
    (source / "gone.jpg").symlink_to(source / "nowhere.jpg")
    (source / "loop").symlink_to(source, target_is_directory=True)
    os.mkfifo(source / "pipe.jpg")
    shard_set = write_images(source, tmp_path / "own")
    assert set(frames(shard_set)) == set(GOOD)
    skipped = shard_set.meta["skipped"]
    reasons = dict(skipped["files"])
    assert set(reasons) == {*BAD, "gone.jpg", "loop", "pipe.jpg"}
    assert skipped["count"] == len(reasons) == sum(skipped["reasons"].values())
    assert "200 megapixels" in reasons["bomb.png"]
    assert "empty" in reasons["empty.jpg"]
    assert "JPEG, PNG" in reasons["notes.txt"]
    assert "No such file" in reasons["gone.jpg"]
    assert "not a regular file" in reasons["pipe.jpg"]
    assert "not followed" in reasons["loop"]
    assert json.loads(Path(shard_set.root, "manifest.json").read_text())["meta"]["skipped"] == skipped


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_io, "MAX_FILE_BYTES", 5000)
    source = fill(tmp_path / "in", {"a.png": GOOD["a.png"], "video.jpg": GOOD["b/plain.jpg"] + bytes(6000)})
    shard_set = write_images(source, tmp_path / "own")
    assert "MiB" in dict(shard_set.meta["skipped"]["files"])["video.jpg"]


def test_a_source_without_images_is_an_error_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="5 .*bomb.png: .*200 megapixels"):
        write_images(fill(tmp_path / "in", BAD), tmp_path / "own")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=str(tmp_path / "empty")):
        write_images(tmp_path / "empty", tmp_path / "own2")
    with pytest.raises(ValueError, match=str(tmp_path / "typo")):
        write_images(tmp_path / "typo", tmp_path / "own3")
    assert not (tmp_path / "own2").exists() and not (tmp_path / "own3").exists()


def test_paths_in_a_text_file_are_relative_to_it(tmp_path):
    fill(tmp_path / "in", GOOD)
    lines = ["in/web.webp", "", str(tmp_path / "in" / "a.png"), "in/b/ärger 日本.jpeg", "in/missing.jpg"]
    (tmp_path / "list.txt").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    shard_set = write_images(tmp_path / "list.txt", tmp_path / "own")
    assert set(frames(shard_set)) == {lines[0], lines[2], lines[3]}
    assert dict(shard_set.meta["skipped"]["files"]) == {"in/missing.jpg": "No such file or directory"}


def test_a_single_image_is_accepted_and_other_files_are_rejected(tmp_path):
    fill(tmp_path, {"a.png": GOOD["a.png"], "weights.bin": b"PK\0\0\0"})
    assert set(frames(write_images(tmp_path / "a.png", tmp_path / "own"))) == {"a.png"}
    with pytest.raises(ValueError, match=str(tmp_path / "weights.bin")):
        list_photographs(tmp_path / "weights.bin")


def make_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("dev", tarfile.CHRTYPE),
        ):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, "/etc/passwd"
            tar.addfile(about)
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_not_unpacked_and_its_names_write_no_files(tmp_path, mode):
    outside = {"../../evil.jpg": GOOD["b/plain.jpg"], "/etc/evil.png": GOOD["a.png"]}
    inside = {name: data for name, data in GOOD.items() if name not in ("b/plain.jpg", "a.png")}
    source = make_tar(tmp_path / "x.tar", {**inside, **outside, "notes.txt": b"no"}, mode)
    shard_set = write_images(source, tmp_path / "deep" / "er" / "own")
    found = frames(shard_set)
    assert set(found) == {*inside, *outside}
    if mode == "w":
        assert list(found) == sorted(found, key=str.encode)
    for name, data in {**inside, **outside}.items():
        assert data in found[name][0].values()
    assert set(dict(shard_set.meta["skipped"]["files"])) == {"link.jpg", "hard.jpg", "dev", "notes.txt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "x.tar"]


def test_a_truncated_tar_gives_its_complete_members(tmp_path):
    source = make_tar(tmp_path / "x.tar", {"a.png": GOOD["a.png"], "b.png": file(picture(200, 300), "PNG")})
    data = source.read_bytes()
    source.write_bytes(data[: data.index(b"b.png") + 512 + 600])
    shard_set = write_images(source, tmp_path / "own")
    assert set(frames(shard_set)) == {"a.png"}
    assert "b.png" in dict(shard_set.meta["skipped"]["files"])


def test_names_that_are_not_unicode_are_stored(tmp_path):
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.png")).write_bytes(GOOD["a.png"])
    assert set(frames(write_images(tmp_path / "in", tmp_path / "own"))) == {"caf\\udce9.png"}


def test_short_side_resizes_large_images_only(tmp_path):
    source = fill(
        tmp_path / "in",
        {"large.png": file(picture(60, 90), "PNG"), "small.png": file(picture(20, 30), "PNG")},
    )
    found = frames(write_images(source, tmp_path / "own", short_side=30))
    fields, frame = found["large.png"]
    assert frame.image.shape == (30, 45, 3) and frame.meta["original_size"] == [60, 90] and "jpg" in fields
    assert np.abs(frame.image.astype(int) - picture(30, 45)).mean() < 4
    assert found["small.png"][0]["png"] == (source / "small.png").read_bytes()


def many(folder):
    return fill(
        folder,
        {f"{k:02d}.png": file(picture(seed=k), "PNG") if k not in (2, 3, 5) else b"bad" for k in range(8)},
    )


def test_an_interrupted_set_is_continued_to_the_same_bytes(tmp_path, monkeypatch):
    source = many(tmp_path / "in")
    whole = write_images(source, tmp_path / "a" / "own", per_shard=2)
    assert [shard.name for shard in whole.shards] == ["00000", "00002", "00003"], "00001 has no readable file"
    assert [shard.records for shard in whole.shards] == [2, 1, 2]
    calls, decode = [], record.decode_image

    def dying(data):
        calls.append(data)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return decode(data)

    monkeypatch.setattr(record, "decode_image", dying)
    root = tmp_path / "b" / "own"
    with pytest.raises(KeyboardInterrupt):
        write_images(source, root, per_shard=2)
    again = write_images(source, root, per_shard=2)
    assert len(calls) == 6 + 4, "finished shards, the empty one too, must not be read again"
    assert again.digest == whole.digest
    for path in Path(whole.root).iterdir():
        assert (root / path.name).read_bytes() == path.read_bytes()


def test_a_finished_set_is_returned_and_other_settings_are_rejected(tmp_path):
    source = many(tmp_path / "in")
    shard_set = write_images(source, tmp_path / "own", per_shard=3)
    assert write_images(source, tmp_path / "own", per_shard=3) == shard_set
    with pytest.raises(ValueError, match="per_shard 3 in place of 4.*rm -r"):
        write_images(source, tmp_path / "own", per_shard=4)
    fill(source, {"new.png": GOOD["a.png"]})
    with pytest.raises(ValueError, match="count 8 in place of 9.*rm -r"):
        write_images(source, tmp_path / "own", per_shard=3)


def test_the_set_may_be_inside_its_raw_folder(tmp_path):
    source = many(tmp_path)
    shard_set = write_images(source, tmp_path / "shards", per_shard=4)
    assert write_images(source, tmp_path / "shards", per_shard=4) == shard_set
    assert len(frames(shard_set)) == 5


@pytest.mark.skipif(
    not PHOTOS.is_dir(), reason="no photographs; set DEPTH_ANYTHING_PHOTOS to a folder of some"
)
def test_real_photographs_are_stored_unchanged(tmp_path):
    shard_set = write_images(PHOTOS, tmp_path / "photos")
    found = frames(shard_set)
    assert set(found) == {path.name for path in PHOTOS.iterdir()}
    for name, (fields, frame) in found.items():
        assert fields["jpg"] == (PHOTOS / name).read_bytes()
        assert frame.meta["original_size"] == list(frame.image.shape[:2])


def test_hidden_pictures_and_dark_images_are_reported(tmp_path, capsys):
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "anim.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    Image.fromarray(picture()[..., 0].astype(np.uint16) * 16).save(tmp_path / "dark.png")
    for number in range(4):
        frames[0].save(tmp_path / f"plain{number}.png")
    shard_set = write_images(tmp_path, tmp_path / "set")
    output = capsys.readouterr().err
    assert shard_set.records == 7 and "plain" not in output
    for name, what in (("anim.gif", "3 pictures"), ("pages.tif", "3 pictures"), ("dark.png", "12-bit")):
        assert any(line.startswith(f"{name}: ") and what in line for line in output.splitlines())


def test_many_notes_are_summarized(tmp_path, capsys):
    frames = [Image.fromarray(picture(4, 4, seed)) for seed in range(2)]
    for number in range(9):
        frames[0].save(tmp_path / f"{number}.gif", save_all=True, append_images=frames[1:], duration=100)
    write_images(tmp_path, tmp_path / "set", per_shard=8)
    output = capsys.readouterr().err
    assert output.count("2 pictures") == 4 and "00000: 5 more" in output
