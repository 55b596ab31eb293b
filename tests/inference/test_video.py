"""predict_videos: frame rates, sizes, audio and containers; the output is read back with PyAV."""

import gc
import json
import os
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depth_anything import DepthAnything
from depth_anything.cli import video_commands as command

av = pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")

from made_videos import (  # noqa: E402
    NTSC,
    Brightness,
    Metres,
    boxes,
    facts_of,
    frame,
    make_video,
    packets,
    predict_clip,
    read_video,
    write_frames,
)

from depth_anything.inference import video_writer  # noqa: E402
from depth_anything.inference.clips import FrameFolder  # noqa: E402
from depth_anything.inference.video import VideoSettings, predict_videos  # noqa: E402

# Rate, frames, audio and sizes are kept


def test_29_97_fps_stays_exact_and_the_audio_is_copied(tmp_path):
    source = make_video(tmp_path / "in.mp4")
    outcome = predict_clip(source, tmp_path / "out")
    film = tmp_path / "out/in.mp4"
    assert outcome.written == {"in.mp4": [film]} and outcome.frames == {"in.mp4": 24} and not outcome.notes
    facts = facts_of(film)
    assert facts["rate"] == NTSC and facts["frames"] == 24 and facts["sound"] == ["aac"]
    assert (facts["codec"], facts["pixels"], facts["size"]) == ("h264", "yuv420p", (48, 2 * 64 + 50))
    assert facts["colours"] == (1, 1)  # BT.709, limited
    assert [time for time, _ in read_video(film)] == [n / NTSC for n in range(24)]
    assert packets(film) == packets(source)
    assert boxes(film).index("moov") < boxes(film).index("mdat")  # plays before it is all there


def test_the_image_is_left_and_the_map_right(tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=3, sound=None)
    predict_clip(source, tmp_path / "out", grayscale=True)
    for number, (_, shown) in enumerate(read_video(tmp_path / "out/in.mp4")):
        assert np.abs(shown[:, :64].astype(int) - frame(number, 48, 64)).mean() < 4
        assert shown[:, 70:108].min() > 250
        assert np.diff(shown[4, 120:170].mean(axis=1)).mean() > 1  # lighter is nearer is whiter


@pytest.mark.parametrize(
    ("name", "options", "sound", "note"),
    [
        ("a.mov", {"sound": "pcm_s16le"}, None, None),
        ("a.mkv", {"sound": "flac"}, "flac", None),
        ("a.webm", {"sound": "libopus", "codec": "libvpx-vp9"}, "opus", None),
        ("a.avi", {"sound": "libmp3lame", "codec": "mjpeg"}, "mp3float", None),
        ("a.ts", {"sound": "aac", "format": "mpegts"}, "aac", None),
        ("b.wmv", {"sound": "wmav2", "codec": "msmpeg4v3", "format": "asf"}, "aac", "wmav2 to aac"),
        ("a.mp4", {"sound": None}, "", None),
    ],
)
def test_containers_and_audio_codecs(tmp_path, name, options, sound, note):
    source = make_video(tmp_path / name, **options)
    outcome = predict_clip(source, tmp_path / "out", pred_only=True)
    film = tmp_path / "out" / f"{name[0]}.mp4"
    facts, times = facts_of(film), [time for time, _ in read_video(film)]
    wanted = [time for time, _ in read_video(source)]
    assert facts["frames"] == len(times) == len(wanted) == 24
    for time, there in zip(times, wanted, strict=True):
        assert abs((time - times[0]) - (there - wanted[0])) <= Fraction(1, 1000)
    if name != "a.avi":  # FFmpeg's writer makes a hole after its first picture
        assert {b - a for a, b in zip(times, times[1:], strict=False)} == {1 / NTSC}, (
            "a coarse clock was kept"
        )
        assert facts["rate"] == NTSC
    if sound is not None:
        assert facts["sound"] == ([sound] if sound else [])
    assert [note in text for texts in outcome.notes.values() for text in texts] == ([True] if note else [])


def test_re_encoded_audio_keeps_its_duration(tmp_path):
    make_video(tmp_path / "a.wmv", sound="wmav2", codec="msmpeg4v3", format="asf", frames=60)
    predict_clip(tmp_path / "a.wmv", tmp_path / "out", pred_only=True)
    with av.open(str(tmp_path / "out/a.mp4")) as film:
        seconds = sum(f.samples for f in film.decode(audio=0)) / 48000
    assert abs(seconds - 60 / NTSC) < 0.1


def test_odd_sides_are_padded_to_even_ones(tmp_path):
    make_video(tmp_path / "odd.mkv", size=(47, 63), codec="ffv1", sound=None, frames=3)
    predict_clip(tmp_path / "odd.mkv", tmp_path / "alone", pred_only=True, formats=("mp4", "npy"))
    predict_clip(tmp_path / "odd.mkv", tmp_path / "both")
    assert facts_of(tmp_path / "alone/odd.mp4")["size"] == (48, 64)
    assert facts_of(tmp_path / "both/odd.mp4")["size"] == (48, 63 + 50 + 63)
    last = read_video(tmp_path / "alone/odd.mp4")[-1][1].astype(int)
    assert np.abs(last[47] - last[46]).mean() < 3 and np.abs(last[:, 63] - last[:, 62]).mean() < 3
    assert np.load(tmp_path / "alone/odd_disparity/000001.npy").shape == (47, 63)  # maps keep the size


def test_a_variable_frame_rate_keeps_every_time(tmp_path):
    times = [0, 40, 100, 500, 507, 900]
    make_video(tmp_path / "vfr.mkv", times=times, frames=6, sound=None, rate=Fraction(25))
    predict_clip(tmp_path / "vfr.mkv", tmp_path / "out")
    assert [time for time, _ in read_video(tmp_path / "out/vfr.mp4")] == [Fraction(t, 1000) for t in times]


def test_the_pixel_aspect_ratio_is_kept(tmp_path):
    path = tmp_path / "in.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for number in range(2):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number, 48, 64), format="rgb24")))
        out.mux(stream.encode(None))
    predict_clip(path, tmp_path / "out")
    with av.open(str(tmp_path / "out/in.mp4")) as film:
        assert film.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


# Ranges


def read_level(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.float64), {k: picture.text[k] for k in picture.text}


@pytest.mark.parametrize("mode", ["clip", "running", "frame"])
def test_16_bit_pngs_restore_the_values(tmp_path, mode):
    source = make_video(tmp_path / "in.mp4", frames=8, sound=None)
    predict_clip(source, tmp_path / "out", range=mode, formats=("png16", "npy", "exr"))
    folder = tmp_path / "out/in_disparity"
    assert sorted(path.stem for path in folder.glob("*.png")) == [f"{n:06d}" for n in range(1, 9)]
    ranges = set()
    for path in folder.glob("*.png"):
        levels, text = read_level(path)
        low, high = float(text["low"]), float(text["high"])
        values = np.load(path.with_suffix(".npy"))
        assert np.abs(low + levels / 65535 * (high - low) - values).max() <= (high - low) / 65535 * 0.51
        assert (text["quantity"], text["unit"], text["larger"]) == ("disparity", "relative", "nearer")
        assert path.with_suffix(".exr").exists()
        ranges.add((low, high))
    assert (len(ranges) == 1) == (mode == "clip")
    facts = json.loads((tmp_path / "out/in.json").read_text())
    assert (facts["quantity"], facts["larger"], facts["frames"], facts["rate"]) == (
        "disparity",
        "nearer",
        8,
        "30000/1001",
    )
    if mode == "clip":
        assert ranges == {(facts["values"]["low"], facts["values"]["high"])}


# Damaged files and interrupted runs


class Failing(Brightness):
    def __init__(self, after, error):
        self.left, self.error = after, error

    def predict_batch(self, images):
        self.left -= len(images)
        if self.left < 0:
            raise self.error
        return super().predict_batch(images)


@pytest.mark.parametrize("mode", ["clip", "frame"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupted_run_leaves_no_files(tmp_path, mode, error):
    source = make_video(tmp_path / "in.mp4", frames=24)
    settings = VideoSettings(range=mode, formats=("mp4", "npy"))
    with pytest.raises(type(error)):
        predict_videos(Failing(12, error), source, tmp_path / "out", settings=settings)
    assert not list((tmp_path / "out").iterdir())


def test_temporary_files_of_a_killed_run_are_removed_by_the_next(tmp_path, fork_server):
    code = f"""
        import os
        from fractions import Fraction
        from pathlib import Path
        import numpy as np
        from depth_anything.inference.video_writer import VideoWriter
        rate = Fraction(25)
        options = dict(height=48, width=64, rate=rate, time_base=1 / rate, metadata={{}})
        film = VideoWriter(Path({str(tmp_path)!r}, "a.mp4"), **options)
        for number in range(100):
            film.write(np.full((48, 64, 3), number, np.uint8), number)
        os.kill(os.getpid(), 9)
    """
    done = fork_server.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "a.mp4").exists()
    make_video(tmp_path / "in/b.mp4", frames=2)
    predict_clip(tmp_path / "in/b.mp4", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "b.mp4", "b.json"}


def test_folders_of_other_programs_are_not_replaced(tmp_path):
    make_video(tmp_path / "in.mp4", frames=2, sound=None)
    (tmp_path / "out/in_disparity").mkdir(parents=True)
    (tmp_path / "out/in_disparity/precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="precious.txt"):
        predict_clip(tmp_path / "in.mp4", tmp_path / "out", formats=("npy",))
    assert (tmp_path / "out/in_disparity/precious.txt").read_text() == "mine"
    (tmp_path / "out/in_disparity/precious.txt").unlink()
    for frames in (3, 2):  # an earlier one of ours is replaced, whole
        make_video(tmp_path / "in.mp4", frames=frames, sound=None)
        predict_clip(tmp_path / "in.mp4", tmp_path / "out", formats=("npy",))
        assert len(list((tmp_path / "out/in_disparity").iterdir())) == frames


# Folders of frames, lists, names


def test_the_source_video_is_not_overwritten(tmp_path):
    source = make_video(tmp_path / "a.mp4", frames=2)
    before = source.read_bytes()
    with pytest.raises(ValueError, match="a.mp4"):
        predict_clip(source, tmp_path)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"range": "all"}, "range='all'"),
        ({"smooth": 1.0}, "smooth=1.0"),
        ({"formats": ("avi",)}, "avi"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_invalid_settings_are_refused(settings, value):
    with pytest.raises(ValueError, match=value):
        VideoSettings(**settings)


# Encoders


def test_the_next_best_h264_encoder_is_used(monkeypatch):
    def only(*names):
        def codec(name, mode):
            if name not in names:
                raise av.codec.codec.UnknownCodecError(name)

        monkeypatch.setattr(av.codec, "Codec", codec)

    only("libopenh264")
    assert video_writer.find_h264_encoder() == "libopenh264"
    only()
    with pytest.raises(ValueError, match="pip install"):
        video_writer.find_h264_encoder()


# Memory


def resident_mb():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_length(tmp_path):
    source = make_video(tmp_path / "long.mp4", frames=3_601, size=(64, 64), sound=None)
    seen = []

    def progress(items, *, what, total):
        for number, item in enumerate(items):
            if number % 360 == 0:
                seen.append(resident_mb())
            yield item

    outcome = predict_videos(
        Brightness(),
        source,
        tmp_path / "out",
        settings=VideoSettings(pred_only=True, batch_size=32),
        progress=progress,
    )
    assert outcome.frames == {"long.mp4": 3_601}
    assert facts_of(tmp_path / "out/long.mp4")["frames"] == 3_601
    assert len(seen) == 2 * 11
    assert max(seen[1:]) - min(seen[1:]) < 40  # the maps of all frames have 59 MB


# The command


def test_run_video_takes_the_authors_flags(tmp_path, weights, capsys):
    make_video(tmp_path / "in/a.mp4", frames=3)
    (tmp_path / "in/notes.md").write_text("not a film")
    theirs = ["--video-path", str(tmp_path / "in"), "--outdir", str(tmp_path / "out"), "--input-size", "70"]
    assert (
        command.run_video([*theirs, "--weights", weights, "--encoder", "vitn", "--pred-only", "--grayscale"])
        == 0
    )
    told = capsys.readouterr()
    assert "skipped notes.md: " in told.err
    assert "3 frames" in told.out and "larger is nearer" in told.out
    assert facts_of(tmp_path / "out/a.mp4")["size"] == (48, 64)


def test_a_missing_file_or_package_is_reported_in_one_line(tmp_path, weights, capsys, monkeypatch):
    assert command.run_video(["--video-path", str(tmp_path / "gone.mp4"), "--weights", weights]) == 2
    assert capsys.readouterr().err.startswith("run_video.py: ")
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.run_video(["--video-path", str(tmp_path), "--weights", weights]) == 2
    assert "pip install 'depth-anything-train[video]'" in capsys.readouterr().err


def test_a_metric_video_states_meters(tmp_path):
    source = make_video(tmp_path / "a.mp4", frames=2, sound=None)
    predict_videos(Metres(), source, tmp_path / "out", settings=VideoSettings(formats=("mp4", "png16")))
    facts = json.loads((tmp_path / "out/a.json").read_text())
    assert (facts["quantity"], facts["unit"], facts["larger"]) == ("depth", "m", "farther")
    assert (tmp_path / "out/a_depth").is_dir()
    with av.open(str(tmp_path / "out/a.mp4")) as film:
        assert film.metadata["comment"].startswith("depth (m), larger is farther")


def test_batches_of_frames_equal_single_predictions(tmp_path):
    """Batches and passes do not change the maps."""
    from depth_anything import Predictor

    predictor = Predictor(DepthAnything("vitn"), device="cpu", input_size=70)
    write_frames(tmp_path / "shot", [f"{n}.png" for n in range(5)])
    predict_videos(
        predictor, tmp_path / "shot", tmp_path / "out", settings=VideoSettings(formats=("npy",), batch_size=2)
    )
    clip = FrameFolder("shot", tmp_path / "shot", [f"{n}.png" for n in range(5)], rate=Fraction(24))
    for picture in clip.read():
        alone = predictor.predict(picture.image)
        made = np.load(tmp_path / f"out/shot_disparity/{picture.name}.npy")
        np.testing.assert_allclose(made, alone, atol=1e-5 * np.ptp(alone))
