"""The commands `depth-anything shard custom` and `stats`."""

import numpy as np
import pytest
from made_custom import make_set, write_map
from typing_commands import complaint, read_png

from depth_anything.cli import custom_command as custom_command
from depth_anything.cli import main
from depth_anything.data.shards import open_set


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_check_only_writes_no_shards(tmp_path, capsys):
    make_set(tmp_path, yaml="unit: m\n")
    out = tmp_path / "out"
    assert main(["shard", "custom", str(tmp_path / "set.yaml"), str(out), "--check-only"]) == 0
    assert names(out) == ["check.png", "check.txt"]
    output = capsys.readouterr()
    assert "pairs:      3" in output.out and "with  unit: mm  it would be" in output.err
    assert read_png(out / "check.png")[0].shape[2] == 3
    text = (out / "check.txt").read_text()
    assert "pairs:      3" in text and "with  unit: mm  it would be" in text


def test_a_set_is_checked_and_written(tmp_path, capsys):
    make_set(tmp_path, names=tuple("abcdefgh"), yaml="name: yard\nunit: mm\nlicence: CC-BY-4.0\n")
    for name in "bcdefgh":
        (tmp_path / f"rgb/{name}.jpg").unlink()
    out = tmp_path / "out"
    assert main(["shard", "custom", str(tmp_path / "set.yaml"), str(out), "--sky", "invalid"]) == 0
    output = capsys.readouterr().out
    assert "not taken:  b: no image of this name in rgb" in output and "not taken:  2 more, see " in output
    assert "not taken:  7 (7 x no image of this name in rgb)" in output
    assert "not taken:  h: no image of this name in rgb" in (out / "check.txt").read_text()
    shard_set = open_set(out)
    assert (shard_set.name, shard_set.records, shard_set.meta["sky_policy"]) == ("yard", 1, "invalid")
    assert main(["verify", str(out), "--decode"]) == 0
    picture = tmp_path / "pictures/stats.png"
    assert main(["stats", str(out), "--output", str(picture)]) == 0
    assert "licence:    CC-BY-4.0" in capsys.readouterr().out and read_png(picture)[0].shape[1] > 1000


def test_a_set_that_was_started_is_continued_without_another_check(tmp_path, monkeypatch):
    make_set(tmp_path, yaml="name: yard\nunit: mm\n")
    typed = ["shard", "custom", str(tmp_path / "set.yaml"), str(tmp_path / "out"), "--per-shard", "2"]
    assert main([*typed, "--part", "1/2"]) == 0
    checked = []
    monkeypatch.setattr(custom_command, "_write_check_report", lambda *_: checked.append(1))
    assert main([*typed, "--part", "2/2"]) == 0 and not checked
    assert open_set(tmp_path / "out").records == 3


def test_short_side_resizes_large_images(tmp_path):
    make_set(tmp_path, names=("a",), size=(300, 400))
    typed = ["shard", "custom", str(tmp_path / "set.yaml"), str(tmp_path / "out")]
    assert main([*typed, "--short-side", "140"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--decode"]) == 0


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        ("unit: m\nunits: 2\n", "did you mean unit"),
        ("unit: mm\nkey: a\nname: a b\n", '"a b"'),
    ],
)
def test_an_error_is_one_line(tmp_path, yaml, reason, capsys):
    make_set(tmp_path, yaml=yaml)
    assert reason in complaint(capsys, "shard", "custom", tmp_path / "set.yaml", tmp_path / "out")


def test_other_settings_are_rejected(tmp_path, capsys):
    make_set(tmp_path)
    typed = ["shard", "custom", str(tmp_path / "set.yaml"), str(tmp_path / "out")]
    assert main(typed) == 0
    capsys.readouterr()
    make_set(tmp_path, yaml="unit: cm\n")
    assert "scale 0.001 in place of 0.01" in complaint(capsys, *typed)


def test_stats_reports_a_damaged_set(tmp_path, capsys):
    make_set(tmp_path)
    out = tmp_path / "out"
    assert main(["shard", "custom", str(tmp_path / "set.yaml"), str(out)]) == 0
    data = bytearray((out / "00000.tar").read_bytes())
    data[data.find(b"\xff\xd8\xff") + 99] ^= 255
    (out / "00000.tar").write_bytes(bytes(data))
    assert main(["stats", str(out), "--output", str(tmp_path / "stats.png")]) == 1
    assert "unreadable: 1 of the sample" in capsys.readouterr().out
    assert str(tmp_path / "nowhere") in complaint(capsys, "stats", tmp_path / "nowhere")
    assert "--count" in complaint(capsys, "stats", out, "--count", 0)


def test_maps_may_be_smaller_than_their_images(tmp_path):
    make_set(tmp_path, names=("a", "b"))
    write_map(tmp_path / "depth/a.png", np.full((18, 24), 3000))
    assert main(["shard", "custom", str(tmp_path / "set.yaml"), str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--decode"]) == 0
    assert open_set(tmp_path / "out").records == 2
