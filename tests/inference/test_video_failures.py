"""Errors of predict_videos: failing clips are named and do not stop the rest; no file of others is replaced."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from depth_anything.cli import video_commands as command

av = pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")

from made_videos import Brightness, facts_of, frame, make_video, predict_clip, read_video, write_frames  # noqa: E402

from depth_anything.data import video_reader as opened_video  # noqa: E402
from depth_anything.inference import video_writer  # noqa: E402
from depth_anything.inference.clip_list import list_clips  # noqa: E402
from depth_anything.inference.video import VideoSettings, predict_videos  # noqa: E402


class Untouched(Brightness):
    """A network that must not run."""

    def predict_batch(self, images):
        raise AssertionError("the network ran")


# Overwrite protection


def tree_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def mark(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


FOREIGN = {
    "a film": lambda out: make_video(out / "a.mp4", frames=2, sound=None),
    "a text called like a film": lambda out: mark(out / "a.mp4"),
    "a json": lambda out: (out / "a.json").write_text('{"mine": 1}'),
    "a json of predict": lambda out: (out / "a.json").write_text('{"image": "a.jpg", "quantity": "depth"}'),
    "a broken json": lambda out: mark(out / "a.json"),
    "a folder called like the json": lambda out: (out / "a.json").mkdir(),
    "a folder called like the film": lambda out: (out / "a.mp4").mkdir(),
    "a folder of maps": lambda out: mark(out / "a_disparity/000001.npy"),
    "a file called like the folder of maps": lambda out: mark(out / "a_disparity"),
    "a link to nowhere": lambda out: (out / "a.mp4").symlink_to("gone.mp4"),
    "a link to a folder": lambda out: (out / "a_disparity").symlink_to(out.parent / "in"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_other_programs_are_refused_before_the_network_runs(tmp_path, what):
    make_video(tmp_path / "in/a.mov", frames=2, sound=None)
    make_video(tmp_path / "in/b.mov", frames=2, sound=None)
    (tmp_path / "out").mkdir()
    FOREIGN[what](tmp_path / "out")
    before = tree_of(tmp_path)
    with pytest.raises(ValueError, match=r"out/a(\.mp4|\.json|_disparity)"):
        settings = VideoSettings(formats=("mp4", "npy"))
        predict_videos(Untouched(), tmp_path / "in", tmp_path / "out", settings=settings)
    assert tree_of(tmp_path) == before


def of_its_own_name(tmp_path):
    return tmp_path / "out/a.mp4", tmp_path / "out"


def by_a_link(tmp_path):
    (tmp_path / "in").mkdir()
    os.link(tmp_path / "out/a.mp4", tmp_path / "in/a.mp4")
    return tmp_path / "in", tmp_path / "out"


def by_a_link_to_the_folder(tmp_path):
    (tmp_path / "in").symlink_to(tmp_path / "out")
    return tmp_path / "in/a.mp4", tmp_path / "out"


def as_another_films_output(tmp_path):
    out = tmp_path / "out"
    make_video(out / "a.mov", frames=2, sound=None)
    (out / "list.txt").write_text("a.mov\na.mp4\n")
    predict_clip(out / "list.txt", out)
    (out / "list.txt").write_text("a.mov\na.mp4\na_mov.mp4\n")
    return out / "list.txt", out


@pytest.mark.parametrize(
    "read", [of_its_own_name, by_a_link, by_a_link_to_the_folder, as_another_films_output]
)
def test_inputs_are_not_replaced(tmp_path, read):
    """Not even output of an earlier run, which is replaced otherwise."""
    make_video(tmp_path / "first/a.mov", frames=2, sound=None)
    predict_clip(tmp_path / "first", tmp_path / "out")
    source, output = read(tmp_path)
    before = tree_of(tmp_path)
    with pytest.raises(ValueError, match=r"out/a(_mov)?\.mp4"):
        predict_videos(Untouched(), source, output, settings=VideoSettings())
    assert tree_of(tmp_path) == before


def test_frames_that_are_inputs_are_not_replaced_by_maps(tmp_path):
    make_video(tmp_path / "in/shot.mov", frames=2, sound=None)
    predict_clip(tmp_path / "in", tmp_path, formats=("png16",))  # its maps are read as frames now
    (tmp_path / "list.txt").write_text("shot_disparity\n../in/shot.mov\n")
    (tmp_path / "list.txt").write_text("in/shot.mov\n")
    os.rename(tmp_path / "in/shot.mov", tmp_path / "shot.mov")
    (tmp_path / "list.txt").write_text("shot.mov\nshot_disparity\n")
    before = tree_of(tmp_path)
    with pytest.raises(ValueError, match="shot_disparity/00000"):
        predict_videos(
            Untouched(), tmp_path / "list.txt", tmp_path, settings=VideoSettings(formats=("png16",))
        )
    assert tree_of(tmp_path) == before


def test_output_of_an_earlier_run_is_replaced(tmp_path):
    for frames in (4, 2):
        make_video(tmp_path / "in/a.mp4", frames=frames)
        predict_clip(tmp_path / "in", tmp_path / "out", formats=("mp4", "png16", "exr"))
        assert len(read_video(tmp_path / "out/a.mp4")) == frames
        assert len(list((tmp_path / "out/a_disparity").iterdir())) == 2 * frames


def test_runs_with_other_formats_recognize_each_others_files(tmp_path):
    make_video(tmp_path / "in/a.mp4", frames=3)
    for formats in (("mp4",), ("npy",), ("mp4", "exr"), ("png16",), ("mp4",)):
        assert not predict_clip(tmp_path / "in", tmp_path / "out", formats=formats).failed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.mp4", "a.json", "a_disparity"}


CHANGES = {  # by hand, after the run
    "a note beside the maps": lambda out: mark(out / "a_disparity/notes.txt"),
    "a picture beside the maps": lambda out: mark(out / "a_disparity/cover.png"),
    "a map edited": lambda out: (out / "a_disparity/000001.npy").write_bytes(b"mine"),
    "the film edited": lambda out: (out / "a.mp4").write_bytes((out / "a.mp4").read_bytes() + b"\0"),
    "the record gone": lambda out: (out / "a.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_output_changed_by_the_user_is_not_replaced(tmp_path, change):
    make_video(tmp_path / "in/a.mp4", frames=2, sound=None)
    predict_clip(tmp_path / "in", tmp_path / "out", formats=("mp4", "npy"))
    CHANGES[change](tmp_path / "out")
    before = tree_of(tmp_path)
    with pytest.raises(ValueError, match="a_disparity|a.mp4"):
        predict_videos(
            Untouched(), tmp_path / "in", tmp_path / "out", settings=VideoSettings(formats=("mp4", "npy"))
        )
    assert tree_of(tmp_path) == before


def test_output_of_versions_without_digests_is_replaced(tmp_path):
    make_video(tmp_path / "in/a.mp4", frames=2, sound=None)
    predict_clip(tmp_path / "in", tmp_path / "out", formats=("mp4", "npy"))
    record = tmp_path / "out/a.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in facts.items() if k not in ("made_by", "sha256", "maps")}))
    assert not predict_clip(tmp_path / "in", tmp_path / "out", formats=("mp4", "npy")).failed
    assert json.loads(record.read_text()) == facts
    record.write_text(json.dumps({k: v for k, v in facts.items() if k not in ("made_by", "sha256", "maps")}))
    make_video(tmp_path / "out/a.mp4", frames=2, sound=None)  # not ours: it lacks our comment
    with pytest.raises(ValueError, match="out/a.mp4"):
        predict_clip(tmp_path / "in", tmp_path / "out", formats=("mp4",))


def test_an_output_path_that_is_a_file_is_refused(tmp_path):
    make_video(tmp_path / "a.mp4", frames=2, sound=None)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out"):
        predict_videos(Untouched(), tmp_path / "a.mp4", tmp_path / "out", settings=VideoSettings())


# One clip fails, the others are processed


@pytest.mark.parametrize(("alone", "width"), [(False, 8193), (True, 16386)])
def test_a_video_too_wide_for_h264_is_refused_before_the_network_runs(tmp_path, alone, width):
    with av.open(str(tmp_path / "wide.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, width, "yuv444p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(0, 16, width), format="rgb24")))
        out.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"16384.*--format"):
        predict_videos(
            Untouched(), tmp_path / "wide.mkv", tmp_path / "out", settings=VideoSettings(pred_only=alone)
        )
    make_video(tmp_path / "fits.mp4", frames=2)
    outcome = predict_clip(tmp_path, tmp_path / "out", pred_only=alone)
    assert set(outcome.written) == {"fits.mp4"} and list(outcome.failed) == ["wide.mkv"]
    outcome = predict_clip(tmp_path / "wide.mkv", tmp_path / "maps", formats=("npy",))
    assert not outcome.failed and np.load(tmp_path / "maps/wide_disparity/000001.npy").shape == (16, width)


class Broken(Brightness):
    """A network that outputs a nonfinite value for white images."""

    precision = "fp16"

    def __init__(self, value):
        self.value = value

    def predict_batch(self, images):
        maps = super().predict_batch(images)
        for image, map_ in zip(images, maps, strict=True):
            if image.mean() > 250:
                map_[0, 0] = self.value
        return maps


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", ["clip", "running", "frame"])
def test_nothing_is_written_for_a_clip_with_a_nonfinite_map(tmp_path, value, mode):
    folder = tmp_path / "in/white"
    write_frames(folder, [f"{number}.png" for number in range(6)])
    Image.new("RGB", (41, 30), "white").save(folder / "4.png")
    write_frames(tmp_path / "in/fine", ["1.png", "2.png"])
    settings = VideoSettings(range=mode, formats=("mp4", "png16", "npy"))
    outcome = predict_videos(Broken(value), tmp_path / "in", tmp_path / "out", settings=settings)
    assert list(outcome.failed) == ["white"] and set(outcome.written) == {"fine"}
    assert "frame 4" in outcome.skipped["white"] and "--precision fp32" in outcome.skipped["white"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fine.mp4", "fine.json", "fine_disparity"}


def test_a_name_too_long_for_the_disk_does_not_stop_the_rest(tmp_path):
    long = "x" * 249 + ".mp4"  # with what is added for maps it is over 255 bytes
    make_video(tmp_path / "in" / long, frames=2, sound=None)
    make_video(tmp_path / "in/y.mp4", frames=2, sound=None)
    outcome = predict_clip(tmp_path / "in", tmp_path / "out", formats=("npy",))
    assert "y.mp4" in outcome.written and list(outcome.failed) == [long]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"y_disparity", "y.json"}


def test_out_of_memory_for_one_clip_does_not_stop_the_rest(tmp_path):
    class Greedy(Brightness):
        def predict_batch(self, images):
            if images[0].shape[0] > 50:
                raise MemoryError
            return super().predict_batch(images)

    make_video(tmp_path / "in/large.mp4", frames=2, size=(64, 64))
    make_video(tmp_path / "in/small.mp4", frames=2)
    outcome = predict_videos(Greedy(), tmp_path / "in", tmp_path / "out", settings=VideoSettings())
    assert list(outcome.failed) == ["large.mp4"] and "memory" in outcome.skipped["large.mp4"]
    assert set(outcome.written) == {"small.mp4"}


def test_the_frame_size_is_checked_before_decoding(tmp_path, monkeypatch):
    make_video(tmp_path / "a.mp4", frames=2)
    monkeypatch.setattr(opened_video, "MAX_PIXELS", 64 * 48 - 1)
    monkeypatch.setattr(opened_video, "read_frames", None)
    with pytest.raises(ValueError, match="64×48"):
        list_clips(tmp_path / "a.mp4")


def test_a_video_with_missing_frames_is_removed(tmp_path, monkeypatch):
    def write_one_less(film, packets):
        for packet in packets[1:]:
            film._container.mux(packet)

    monkeypatch.setattr(video_writer.VideoWriter, "_mux", write_one_less)
    make_video(tmp_path / "a.mp4", frames=4)
    with pytest.raises(ValueError, match="of 4"):
        predict_clip(tmp_path / "a.mp4", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# The exit code


def type_video(weights, source, output):
    typed = ["--video-path", str(source), "--outdir", str(output), "--weights", weights, "--encoder", "vitn"]
    return command.run_video([*typed, "--input-size", "70", "--pred-only", "--range", "frame"])


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_the_exit_code_is_1_if_a_clip_failed(tmp_path, weights, capsys):
    make_video(tmp_path / "in/a.mp4", frames=2)
    (tmp_path / "in/notes.md").write_text("not a film, and not meant as one")
    Image.new("RGB", (9, 9)).save(tmp_path / "in/poster.jpg")
    assert type_video(weights, tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "in/bad.mp4").write_bytes(b"no film")
    assert type_video(weights, tmp_path / "in", tmp_path / "out") == 1
    assert "bad.mp4" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("in/a.mp4\nin/gone\n")
    assert type_video(weights, tmp_path / "list.txt", tmp_path / "out2") == 1
    make_video(tmp_path / "cut.mp4", frames=12, crf="0", options={"movflags": "+faststart"})
    cut(tmp_path / "cut.mp4", 0.6)
    assert type_video(weights, tmp_path / "cut.mp4", tmp_path / "cut") == 1
    assert facts_of(tmp_path / "cut/cut.mp4")["frames"] < 12
    assert type_video(weights, tmp_path / "in/bad.mp4", tmp_path / "out3") == 2


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.flv", "a.avi"])
def test_a_truncated_video_gives_its_frames_and_counts_as_failed(tmp_path, name):
    options = {
        "a.mp4": {"options": {"movflags": "+faststart"}},
        "a.avi": {"codec": "mpeg4", "sound": "libmp3lame"},
    }
    source = make_video(tmp_path / name, frames=100, crf="0", **options.get(name, {}))
    assert not predict_clip(source, tmp_path / "whole").failed
    cut(source, 0.6)
    outcome = predict_clip(source, tmp_path / "out")
    assert set(outcome.failed) == set(outcome.written) == {name}
    assert 20 < facts_of(tmp_path / "out/a.mp4")["frames"] < 100


def test_control_characters_in_names_are_escaped(tmp_path, weights, capsys):
    make_video(tmp_path / "in/a\x1b[2J\nb.mp4", frames=2)
    (tmp_path / "in/bad\x1b]0;x\x07.mp4").write_bytes(b"no film")
    assert type_video(weights, tmp_path / "in", tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and "\x07" not in told.err
    assert all("b.mp4" not in line[:6] for line in told.out.splitlines())


# Pictures and animations


def test_pictures_are_refused_with_the_command_for_them(tmp_path):
    picture = Image.fromarray(frame(0, 30, 41))
    for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.bmp", "a.ppm"):
        picture.save(tmp_path / name)
        with pytest.raises(ValueError, match="depth-anything predict"):
            list_clips(tmp_path / name)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animated_images_are_clips(tmp_path, name):
    pictures = [Image.fromarray(frame(9 * number, 30, 42)) for number in range(5)]
    options = {"lossless": True} if name == "a.webp" else {}
    pictures[0].save(
        tmp_path / name, save_all=True, append_images=pictures[1:], duration=[40, 40, 120, 40, 40], **options
    )
    (clip,), _ = list_clips(tmp_path / name)
    seen = list(clip.read())
    assert [float(picture.pts * clip.time_base) for picture in seen] == pytest.approx(
        [0, 0.04, 0.08, 0.2, 0.24]
    )
    for number, picture in enumerate(seen):
        assert np.abs(picture.image.astype(int) - frame(9 * number, 30, 42)).mean() < 8
    outcome = predict_clip(tmp_path / name, tmp_path / "out")
    assert outcome.frames == {name: 5} and not outcome.failed


def test_a_gif_with_undecodable_frames_counts_as_incomplete(tmp_path, weights, capsys):
    """FFmpeg reads a GIF without durations as one frame."""
    pictures = [Image.new("P", (42, 30), 60 * number) for number in range(3)]
    stored = (
        b"GIF87a"
        + (42).to_bytes(2, "little")
        + (30).to_bytes(2, "little")
        + b"\xf7\0\0"
        + bytes(range(256)) * 3
    )
    for picture in pictures:
        picture.save(tmp_path / "one.gif")
        one = (tmp_path / "one.gif").read_bytes()
        colors = 3 * 2 ** ((one[10] & 7) + 1) if one[10] & 0x80 else 0
        stored += one[one.index(b",", 13 + colors) : -1]
    (tmp_path / "one.gif").unlink()
    (tmp_path / "old.gif").write_bytes(stored + b";")
    with Image.open(tmp_path / "old.gif") as made:
        assert made.n_frames == 3
    assert type_video(weights, tmp_path / "old.gif", tmp_path / "out") == 1
    assert "old.gif" in capsys.readouterr().err


def test_a_truncated_animated_webp_gives_its_remaining_frames(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (30, 42, 3), np.uint8)) for _ in range(5)]
    path = tmp_path / "a.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    cut(path, 0.5)
    try:
        outcome = predict_clip(path, tmp_path / "out")
    except ValueError as error:
        assert "a.webp" in str(error)  # this Pillow reads none of it
    else:
        assert list(outcome.failed) == ["a.webp"] and outcome.frames["a.webp"] < 5
