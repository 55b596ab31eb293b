"""The commands `depth-anything shard`, `verify`, `view` and `merge`."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typing_commands import complaint, read_png

from depth_anything.cli import main
from depth_anything.data.codec import encode
from depth_anything.data.labels import LabelSetWriter
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.ingest.photographs import write_images


def test_shard_scenes_writes_a_set(scenes):
    shard_set = open_set(scenes)
    assert shard_set.records == 6 and len(shard_set.shards) == 2 and shard_set.name == "scenes"


def test_shard_images_writes_a_set(tmp_path, capsys):
    for name in ("a.png", "deep/b.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    assert main(["shard", "images", str(tmp_path / "photos"), str(tmp_path / "set"), "--name", "mine"]) == 0
    assert re.search(r"set: +mine\n.*records: +2\n", capsys.readouterr().out, re.DOTALL)
    assert open_set(tmp_path / "set").name == "mine"
    assert str(tmp_path / "nowhere") in complaint(
        capsys, "shard", "images", tmp_path / "nowhere", tmp_path / "other"
    )


def test_tars_of_other_programs_are_indexed(tmp_path, scenes, capsys):
    tar = tmp_path / "others" / "x.tar"
    tar.parent.mkdir()
    tar.write_bytes((scenes / "00000.tar").read_bytes())
    assert main(["shard", "index", str(tar.parent), "--name", "theirs"]) == 0
    assert re.search(r"set: +theirs\n.*records: +4\n", capsys.readouterr().out, re.DOTALL)
    assert main(["verify", str(tar.parent)]) == 0
    assert "no .tar" in complaint(capsys, "shard", "index", tmp_path)


def test_verify_reports_a_damaged_shard(tmp_path, scenes, capsys):
    assert main(["verify", str(scenes), "--decode"]) == 0
    assert capsys.readouterr().out == f"{scenes}: sound\n"
    for file in scenes.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "00001.tar").read_bytes())
    data[2000] ^= 1
    (tmp_path / "00001.tar").write_bytes(data)
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "00001.tar" in out and "00000.tar" not in out and "problems" in out


def test_view_draws_a_contact_sheet_and_prints_ranges(tmp_path, scenes, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    assert main(["view", str(scenes), "--count", "4", "--output", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert (
        re.search(r"set: +scenes\n.*records: +6\nshards: +2\n", out, re.DOTALL)
        and open_set(scenes).digest in out
    )
    assert re.search(r"settings: +.*look photographic", out)
    assert out.count("70 x 56, depth ") == 4 and "median" in out
    picture, _ = read_png(sheet)
    assert picture.shape[1] > 3 * 2 * 224 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 500


def test_view_joins_labels_and_images(tmp_path, scenes, capsys):
    images = open_set(scenes)
    shard = images.shards[0]
    maps = [Frame(f"scenes/{shard.name}/{i:07d}", np.zeros((1, 1, 3), np.uint8)) for i in range(4)]
    fields = []
    for frame in maps:
        frame.disparity = np.linspace(1, 9, 28 * 42, dtype=np.float32).reshape(28, 42)
        fields.append((frame.key, {"disparity.q12": encode_frame(frame, codec="q12")["disparity.q12"]}))
    info = write_shard(tmp_path / f"{shard.name}.tar", fields)
    meta = {"images": {"name": images.name, "hashes": {shard.name: shard.hash}}}
    write_manifest(tmp_path, name="labels", shards=[info], meta=meta)
    assert main(["view", str(tmp_path), "--images", str(scenes), "--output", str(tmp_path / "s.png")]) == 0
    assert capsys.readouterr().out.count("70 x 56 (target 42 x 28), disparity 1 to 9, median 5") == 4
    assert "add --images" in complaint(capsys, "view", tmp_path)


@pytest.fixture
def pair(tmp_path):
    """Photographs and their labels, of which one is missing, as the stages leave them."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.fromarray(np.full((40, 60, 3), 50 + number, np.uint8)).save(photos / f"{number}.jpg")
    images = write_images(photos, tmp_path / "images")
    teacher = {"fingerprint": "sha256:" + "a" * 64, "file": "teacher/model.safetensors"}
    labels = LabelSetWriter(tmp_path / "labels", images, teacher=teacher, preprocessing="518", codec="q12")
    maps = np.random.default_rng(1).random((2, 28, 42), np.float32)
    labels.publish("00000", {i: encode(maps[i], codec="q12") for i in (0, 1)}, [(2, "truncated jpeg")])
    labels.finish()
    return tmp_path / "images", tmp_path / "labels"


def test_every_command_accepts_labels_and_images_or_names_the_missing_flag(tmp_path, pair, capsys):
    images, labels = map(str, pair)
    picture, sheet = (["--output", str(tmp_path / name)] for name in ("stats.png", "sheet.png"))
    assert main(["stats", labels, *picture]) == 0
    output = capsys.readouterr().out
    assert (
        "no label:   1 images: see NAME.json" in output and "labels of:  images, by teacher/model" in output
    )
    assert "images:     none" in output and "maps:       42 x 28 (2)" in output
    assert main(["stats", images, *picture]) == 0 and "labels:     none" in capsys.readouterr().out
    for arguments in ((labels,), (labels, "--images", images), (images,)):
        assert main(["verify", *arguments]) == 0
    assert main(["view", labels, "--images", images, *sheet]) == 0
    quick = ["--samples", "1", "--workers", "1", "--batch-size", "1", "--image-size", "28"]
    assert main(["bench-data", images, "--labels", labels, *quick]) == 0
    capsys.readouterr()
    assert "--images" in complaint(capsys, "view", labels, *sheet)
    assert "--labels" in complaint(capsys, "bench-data", labels, *quick)
    assert "--labels" in complaint(capsys, "bench-data", images, *quick)
    assert "not a label set" in complaint(capsys, "bench-data", images, "--labels", images, *quick)
    assert "settings.json" in complaint(capsys, "merge", tmp_path / "whole", labels)


@pytest.mark.parametrize("what", ["empty", "file", "manifest", "absent"])
def test_every_command_names_a_path_that_is_not_a_set(tmp_path, scenes, capsys, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    place = scenes / "manifest.json" if what == "manifest" else tmp_path / what
    for command in ("stats", "view", "bench-data"):
        assert str(place) in complaint(capsys, command, place)
    assert str(place) in complaint(capsys, "merge", tmp_path / "whole", place)
    assert main(["verify", str(place)]) == 1
    assert str(place) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["stats", "SET", "--count", "0"], "--count must be"),
        (["view", "SET", "--count", "-3"], "--count must be"),
        (["verify", "SET", "--workers", "0"], "--workers must be"),
        (["bench-data", "SET", "--workers", "2", "-1"], "--workers"),
        (["bench-data", "SET", "--image-size", "-5"], "--image-size"),
        (["shard", "images", "SET", "OUT", "--per-shard", "0"], "--per-shard must be"),
        (["shard", "images", "SET", "OUT", "--short-side", "-518"], "--short-side must be"),
        (["shard", "irs", "SET", "OUT", "--workers", "-1"], "--workers must be"),
        (["shard", "scenes", "OUT", "--size", "0", "5"], "--size must be"),
        (["shard", "scenes", "OUT", "--count", "0"], "--count must be"),
        (["shard", "scenes", "OUT", "--per-shard", "0"], "--per-shard must be"),
        (["stats", "SET", "--output", "SET"], "--output"),
        (["stats", "SET", "--output", "OUT.xyz"], "--output"),
        (["view", "SET", "--output", "OUT"], "--output"),
        (["view", "SET", "--output", "SET/manifest.json/a.png"], "--output"),
    ],
)
def test_an_invalid_number_or_picture_is_reported_by_its_flag(tmp_path, scenes, capsys, typed, named):
    places = {"SET": str(scenes), "OUT": str(tmp_path / "out")}
    typed = [word.replace("SET", places["SET"]).replace("OUT", places["OUT"]) for word in typed]
    assert named in complaint(capsys, *typed)
    assert not (tmp_path / "out").exists()


def test_a_published_set_is_written_in_parts_and_merged(tmp_path, capsys):
    for k in range(5):
        path = tmp_path / "raw" / "train" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 60, 3), 9 * k, np.uint8)).save(path)
    (tmp_path / "raw" / "train" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "raw" / "train.csv").write_text("id,url")
    typed = ["shard", "landmarks", str(tmp_path / "raw"), "--per-shard", "2"]
    for k in ("1", "2"):
        assert main([*typed[:3], str(tmp_path / k), *typed[3:], "--part", f"{k}/2"]) == 0
        assert f"part {k} of 2 is written" in capsys.readouterr().out
    assert str(tmp_path / "1") in complaint(capsys, "view", tmp_path / "1")
    assert main(["merge", str(tmp_path / "all"), str(tmp_path / "1"), str(tmp_path / "2")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"set: +landmarks\n.*records: +5\n.*settings: +.*count 6\b", out, re.DOTALL)
    assert "not taken:  1 (1 x the image cannot be decoded" in out and "left out:   1 .csv" in out
    assert main([*typed[:3], str(tmp_path / "whole"), *typed[3:]]) == 0
    assert open_set(tmp_path / "whole") == replace(open_set(tmp_path / "all"), root=str(tmp_path / "whole"))
    assert main(["verify", str(tmp_path / "all"), "--decode", "--workers", "2"]) == 0
    assert "per_shard 2 in place of 3" in complaint(
        capsys, *typed[:3], tmp_path / "whole", "--per-shard", "3"
    )


def test_a_part_is_typed_as_k_of_n(tmp_path, capsys):
    for part in ("3", "a/b", "1/", "-1/3"):
        with pytest.raises(SystemExit):
            main(["shard", "sa1b", str(tmp_path), str(tmp_path / "out"), f"--part={part}"])
        assert "3/8" in capsys.readouterr().err
