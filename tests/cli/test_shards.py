"""`depth-anything shard`, `verify`, `view`."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typing_commands import complaint, read_png

from depth_anything.cli import main
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest, write_shard


def test_scenes_become_a_set(scenes):
    made = open_set(scenes)
    assert made.records == 6 and len(made.shards) == 2 and made.name == "scenes"


def test_images_become_a_set(tmp_path, capsys):
    for name in ("a.png", "deep/b.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    assert main(["shard", "images", str(tmp_path / "photos"), str(tmp_path / "set"), "--name", "mine"]) == 0
    assert re.search(r"set: +mine\n.*records: +2\n", capsys.readouterr().out, re.DOTALL)
    assert open_set(tmp_path / "set").name == "mine"
    assert "does not exist" in complaint(capsys, "shard", "images", tmp_path / "nowhere", tmp_path / "other")


def test_tars_made_elsewhere_are_indexed(tmp_path, scenes, capsys):
    tar = tmp_path / "others" / "x.tar"
    tar.parent.mkdir()
    tar.write_bytes((scenes / "00000.tar").read_bytes())
    assert main(["shard", "index", str(tar.parent), "--name", "theirs"]) == 0
    assert re.search(r"set: +theirs\n.*records: +4\n", capsys.readouterr().out, re.DOTALL)
    assert main(["verify", str(tar.parent)]) == 0
    assert "no .tar" in complaint(capsys, "shard", "index", tmp_path)


def test_verify_tells_a_sound_set_from_a_damaged_one(tmp_path, scenes, capsys):
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


def test_view_draws_a_sheet_and_tells_ranges(tmp_path, scenes, capsys):
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


def test_view_joins_labels_with_their_images(tmp_path, scenes, capsys):
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
    assert "go on writing it" in complaint(capsys, "view", tmp_path / "1")
    assert main(["merge", str(tmp_path / "all"), str(tmp_path / "1"), str(tmp_path / "2")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"set: +landmarks\n.*records: +5\n.*settings: +.*count 6\b", out, re.DOTALL)
    assert "not taken:  1 (1 x the image cannot be decoded" in out and "passed over: 1 .csv" in out
    assert main([*typed[:3], str(tmp_path / "whole"), *typed[3:]]) == 0
    assert open_set(tmp_path / "whole") == replace(open_set(tmp_path / "all"), root=str(tmp_path / "whole"))
    assert main(["verify", str(tmp_path / "all"), "--decode", "--workers", "2"]) == 0
    assert "other settings" in complaint(capsys, *typed[:3], tmp_path / "whole", "--per-shard", "3")


def test_a_part_is_typed_as_k_of_n(tmp_path, capsys):
    for part in ("3", "a/b", "1/", "-1/3"):
        with pytest.raises(SystemExit):
            main(["shard", "sa1b", str(tmp_path), str(tmp_path / "out"), f"--part={part}"])
        assert "is no part: the third of eight is 3/8" in capsys.readouterr().err
