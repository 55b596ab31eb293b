"""Clips: damaged videos, folders of frames, lists, names, frame rates."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")

from made_videos import (  # noqa: E402
    NTSC,
    facts_of,
    frame,
    make_video,
    predict_clip,
    read_video,
    write_frames,
)

from depth_anything.inference.clip_list import list_clips  # noqa: E402
from depth_anything.inference.clips import natural_sort_key, parse_frame_rate  # noqa: E402

# Rotated videos


def turned(path, degrees):
    """Write a rotation into an MP4's track header, as telephones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 header
    c, s = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    struct.pack_into(">9i", data, at, c << 16, s << 16, 0, -s << 16, c << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_of_phone_videos_is_applied(tmp_path, degrees):
    source = make_video(tmp_path / "in.mp4", frames=2, sound=None)
    turned(source, degrees)
    (clip,), _ = list_clips(source)
    upright = next(clip.read()).image
    wanted = np.rot90(frame(0, 48, 64), -degrees // 90)  # clockwise
    assert upright.shape == wanted.shape == (clip.height, clip.width, 3)
    assert np.abs(upright.astype(int) - wanted).mean() < 4
    predict_clip(source, tmp_path / "out", pred_only=True)
    assert facts_of(tmp_path / "out/in.mp4")["size"] == wanted.shape[:2]


# Damaged files


def test_a_truncated_mp4_gives_its_remaining_frames(tmp_path):
    whole = make_video(tmp_path / "whole.mp4", frames=60, options={"movflags": "+faststart"}, crf="0")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    outcome = predict_clip(tmp_path / "cut.mp4", tmp_path / "out")
    frames = outcome.frames["cut.mp4"]
    assert 20 < frames < 60 and len(read_video(tmp_path / "out/cut.mp4")) == frames
    assert any(f"{frames} of 60 frames" in note for note in outcome.notes["cut.mp4"])
    whole_outcome = predict_clip(whole, tmp_path / "whole")
    assert whole_outcome.frames == {"whole.mp4": 60} and not whole_outcome.notes


def test_a_truncated_matroska_gives_its_remaining_frames(tmp_path):
    whole = make_video(tmp_path / "whole.mkv", frames=60, crf="0")
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    outcome = predict_clip(tmp_path / "cut.mkv", tmp_path / "out")
    assert 20 < outcome.frames["cut.mkv"] < 60
    assert len(read_video(tmp_path / "out/cut.mp4")) == outcome.frames["cut.mkv"]
    assert any(f"{outcome.frames['cut.mkv']} frames" in note for note in outcome.notes["cut.mkv"])


def refusals(folder):
    make_video(folder / "good.mp4", frames=4)
    whole = (folder / "good.mp4").read_bytes()
    (folder / "headless.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("a note\n")
    (folder / "noise.mov").write_bytes(np.random.default_rng(0).bytes(5000))
    Image.new("RGB", (40, 30)).save(folder / "picture.gif.mp4", "PNG")
    with av.open(str(folder / "sound.m4a"), "w") as out:
        track = out.add_stream("aac", rate=48000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 48000
        out.mux(track.encode(tone))
        out.mux(track.encode(None))
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n")
    return {
        "headless.mp4",
        "empty.mp4",
        "notes.txt",
        "noise.mov",
        "picture.gif.mp4",
        "sound.m4a",
        "list.m3u8",
    }


def test_files_that_are_not_videos_are_skipped_and_named(tmp_path):
    bad = refusals(tmp_path / "in")
    outcome = predict_clip(tmp_path / "in", tmp_path / "out")
    assert set(outcome.frames) == {"good.mp4"} and set(outcome.skipped) == bad
    for why in outcome.skipped.values():
        assert "\n" not in why and "Errno" not in why and str(tmp_path) not in why
    for name in bad - {"notes.txt"}:
        with pytest.raises(ValueError, match=name):
            predict_clip(tmp_path / "in" / name, tmp_path / "out")


def test_a_missing_or_empty_source_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="gone.mp4"):
        list_clips(tmp_path / "gone.mp4")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none"):
        list_clips(tmp_path / "none")


def test_a_video_without_frames_is_an_error(tmp_path):
    with av.open(str(tmp_path / "zero.mov"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        out.start_encoding()
    with pytest.raises(ValueError, match="zero.mov"):
        predict_clip(tmp_path / "zero.mov", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# Folders of frames, lists, names


def test_a_folder_of_frames_is_a_clip_in_natural_order(tmp_path):
    write_frames(tmp_path / "shot", ["f9.png", "f10.png", "f11.png", "f13.png"])
    outcome = predict_clip(
        tmp_path / "shot", tmp_path / "out", rate=parse_frame_rate("23.976"), formats=("mp4", "npy")
    )
    assert outcome.frames == {"shot": 4}
    assert len(outcome.notes["shot"]) == 1 and outcome.notes["shot"][0].startswith("1 ")
    assert facts_of(tmp_path / "out/shot.mp4")["rate"] == Fraction(24000, 1001)
    maps = {path.stem: np.load(path) for path in (tmp_path / "out/shot_disparity").iterdir()}
    for number, name in enumerate(["f9", "f10", "f11", "f13"]):  # the frames' own names
        np.testing.assert_allclose(maps[name], frame(9 * number, 30, 41).mean(axis=2) / 25, rtol=1e-5)


def test_a_frame_of_another_size_is_named(tmp_path):
    write_frames(tmp_path / "shot", ["1.png", "2.png"])
    Image.new("RGB", (9, 9)).save(tmp_path / "shot/3.png")
    with pytest.raises(ValueError, match="3.png .*9×9.*41×30"):
        predict_clip(tmp_path / "shot", tmp_path / "out")
    (tmp_path / "shot/3.png").write_bytes(b"\x89PNG no")
    with pytest.raises(ValueError, match="3.png"):
        predict_clip(tmp_path / "shot", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_tree_is_kept_and_equal_stems_get_different_names(tmp_path):
    tree = tmp_path / "in"
    for name in ("a.mp4", "a.mkv", "A.mov", "sub/a.mp4", "naïve clip.mp4"):
        make_video(tree / name, frames=2, sound=None)
    write_frames(tree / "a", ["1.png", "2.png"])
    Image.new("RGB", (9, 9)).save(tree / "sub/poster.jpg")
    outcome = predict_clip(tree, tree / "out")
    assert set(outcome.frames) == {"a", "A.mov", "a.mkv", "a.mp4", "sub/a.mp4", "naïve clip.mp4"}
    assert outcome.skipped == {"sub/poster.jpg": "a picture next to a video"}
    made = {path.relative_to(tree / "out").as_posix() for path in (tree / "out").rglob("*.mp4")}
    assert made == {"a_frames.mp4", "A_mov.mp4", "a_mkv.mp4", "a_mp4.mp4", "sub/a.mp4", "naïve clip.mp4"}
    assert set(predict_clip(tree, tree / "out").frames) == set(outcome.frames)  # does not read what it wrote


def test_a_list_may_name_files_and_folders_of_frames(tmp_path):
    make_video(tmp_path / "one/a.mp4", frames=2, sound=None)
    make_video(tmp_path / "two/a.mp4", frames=2, sound=None)
    write_frames(tmp_path / "shot", ["1.png"])
    lines = ["one/a.mp4", "", str(tmp_path / "two/a.mp4"), "shot", "gone.mp4"]
    (tmp_path / "clips.txt").write_text("\n".join(lines), encoding="utf-8")
    outcome = predict_clip(tmp_path / "clips.txt", tmp_path / "out")
    assert len(outcome.frames) == 3 and outcome.skipped == {"gone.mp4": "there is no such file"}
    written = [path for paths in outcome.written.values() for path in paths]
    assert len(set(written)) == 3 and all(path.exists() for path in written)
    assert all((tmp_path / "out") in path.parents for path in written)


def test_natural_order():
    assert sorted(["f10", "f9", "f009b", "F1", "a"], key=natural_sort_key) == [
        "F1",
        "a",
        "f009b",
        "f9",
        "f10",
    ]


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("24", 24),
        ("23.976", Fraction(24000, 1001)),
        ("29.97", NTSC),
        ("30000/1001", NTSC),
        ("12.5", Fraction(25, 2)),
    ],
)
def test_frame_rates_are_parsed(text, rate):
    assert parse_frame_rate(text) == rate


@pytest.mark.parametrize("text", ["0", "-3", "fast", "1/0", "nan", "1e9"])
def test_invalid_frame_rates_are_refused(text):
    with pytest.raises(ValueError, match=repr(text)):
        parse_frame_rate(text)
