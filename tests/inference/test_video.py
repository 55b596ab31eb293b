"""Films as people hand them over: odd rates, odd sizes, odd files; and what comes out, read back with PyAV."""

import gc
import json
import math
import os
import struct
import subprocess
import sys
import textwrap
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depth_anything import DepthAnything, save_model
from depth_anything.cli import video as door
from depth_anything.inference import steady
from depth_anything.inference.steady import Running, Smoother, Spool, spread

av = pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")

from depth_anything.inference import films, video  # noqa: E402
from depth_anything.inference.clips import FrameFolder, VideoFile, list_clips, natural_key, parse_rate  # noqa: E402
from depth_anything.inference.video import Settings, predict_videos  # noqa: E402

NTSC = Fraction(30000, 1001)


class Brightness:
    """Stands for a network: what is bright is near."""

    quantity, unit = "disparity", "relative"

    def predict_batch(self, images):
        return [image.mean(axis=2, dtype=np.float32) / 25 for image in images]


class Metres(Brightness):
    quantity, unit = "depth", "m"


def frame(number, height, width):
    """Light grows to the right; the lower half brightens from frame to frame."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:] = np.linspace(30, 200, width).astype(np.uint8)[None, :, None]
    image[height // 2 :] //= 3
    image[height // 2 :] += np.uint8(number % 60)
    return image


def make_film(
    path,
    *,
    frames=24,
    size=(48, 64),
    rate=NTSC,
    sound="aac",
    codec="libx264",
    times=None,
    crf="18",
    **container,
):
    """Write a clip; `times` are milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", **container) as out:
        stream = out.add_stream(codec, rate=rate, options={"preset": "ultrafast", "crf": crf})
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        track = out.add_stream(sound, rate=48000) if sound else None
        if track:
            track.layout, track.bit_rate = "mono", 96_000
        sample = 0
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(frame(number, *size), format="rgb24")
            picture.pts = times[number] if times else number
            picture.time_base = Fraction(1, 1000) if times else 1 / rate
            out.mux(stream.encode(picture))
            while track and sample < (number + 1) / rate * 48000:
                wave = (8000 * np.sin(np.arange(sample, sample + 1024) * 0.05)).astype(np.int16)
                tone = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
                tone.sample_rate, tone.pts, tone.time_base = 48000, sample, Fraction(1, 48000)
                out.mux(track.encode(tone))
                sample += 1024
        out.mux(stream.encode(None))
        if track:
            out.mux(track.encode(None))
    return path


def map_film(source, output, **settings):
    return predict_videos(Brightness(), source, output, settings=Settings(**settings))


def read_film(path):
    """The frames of a film with their times in seconds."""
    with av.open(str(path)) as film:
        return [(Fraction(f.pts) * f.time_base, f.to_ndarray(format="rgb24")) for f in film.decode(video=0)]


def facts_of(path):
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        return {
            "codec": stream.codec_context.name,
            "pixels": stream.codec_context.format.name,
            "size": (stream.height, stream.width),
            "rate": Fraction(stream.average_rate),
            "frames": stream.frames,
            "sound": [audio.codec_context.name for audio in film.streams.audio],
            "colours": (stream.codec_context.colorspace, stream.codec_context.color_range),
        }


def packets(path):
    with av.open(str(path)) as film:
        return [bytes(packet) for packet in film.demux(film.streams.audio[0]) if packet.size]


def boxes(path):
    """The names of an MP4's outermost boxes, in order."""
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        names.append(name.decode())
        at += size if size != 1 else struct.unpack_from(">Q", data, at + 8)[0]
    return names


# What goes in comes out: rate, frames, sound, sizes


def test_29_97_stays_a_fraction_and_the_sound_is_the_same_bytes(tmp_path):
    source = make_film(tmp_path / "in.mp4")
    outcome = map_film(source, tmp_path / "out")
    film = tmp_path / "out/in.mp4"
    assert outcome.written == {"in.mp4": [film]} and outcome.frames == {"in.mp4": 24} and not outcome.notes
    facts = facts_of(film)
    assert facts["rate"] == NTSC and facts["frames"] == 24 and facts["sound"] == ["aac"]
    assert (facts["codec"], facts["pixels"], facts["size"]) == ("h264", "yuv420p", (48, 2 * 64 + 50))
    assert facts["colours"] == (1, 1)  # BT.709, limited
    assert [time for time, _ in read_film(film)] == [n / NTSC for n in range(24)]
    assert packets(film) == packets(source)
    assert boxes(film).index("moov") < boxes(film).index("mdat")  # plays before it is all there


def test_left_is_the_picture_and_right_the_map(tmp_path):
    source = make_film(tmp_path / "in.mp4", frames=3, sound=None)
    map_film(source, tmp_path / "out", grayscale=True)
    for number, (_, shown) in enumerate(read_film(tmp_path / "out/in.mp4")):
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
def test_any_container_and_its_sound(tmp_path, name, options, sound, note):
    source = make_film(tmp_path / name, **options)
    outcome = map_film(source, tmp_path / "out", pred_only=True)
    film = tmp_path / "out" / f"{name[0]}.mp4"
    facts, times = facts_of(film), [time for time, _ in read_film(film)]
    wanted = [time for time, _ in read_film(source)]
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


def test_sound_encoded_anew_is_as_long(tmp_path):
    make_film(tmp_path / "a.wmv", sound="wmav2", codec="msmpeg4v3", format="asf", frames=60)
    map_film(tmp_path / "a.wmv", tmp_path / "out", pred_only=True)
    with av.open(str(tmp_path / "out/a.mp4")) as film:
        seconds = sum(f.samples for f in film.decode(audio=0)) / 48000
    assert abs(seconds - 60 / NTSC) < 0.1


def test_odd_sides_get_one_more_row_or_column(tmp_path):
    make_film(tmp_path / "odd.mkv", size=(47, 63), codec="ffv1", sound=None, frames=3)
    map_film(tmp_path / "odd.mkv", tmp_path / "alone", pred_only=True, formats=("mp4", "npy"))
    map_film(tmp_path / "odd.mkv", tmp_path / "both")
    assert facts_of(tmp_path / "alone/odd.mp4")["size"] == (48, 64)
    assert facts_of(tmp_path / "both/odd.mp4")["size"] == (48, 63 + 50 + 63)
    last = read_film(tmp_path / "alone/odd.mp4")[-1][1].astype(int)
    assert np.abs(last[47] - last[46]).mean() < 3 and np.abs(last[:, 63] - last[:, 62]).mean() < 3
    assert np.load(tmp_path / "alone/odd_disparity/000001.npy").shape == (47, 63)  # maps keep the size


def test_a_variable_rate_keeps_every_time(tmp_path):
    times = [0, 40, 100, 500, 507, 900]
    make_film(tmp_path / "vfr.mkv", times=times, frames=6, sound=None, rate=Fraction(25))
    map_film(tmp_path / "vfr.mkv", tmp_path / "out")
    assert [time for time, _ in read_film(tmp_path / "out/vfr.mp4")] == [Fraction(t, 1000) for t in times]


def turned(path, degrees):
    """Write a rotation into an MP4's track header, as telephones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 header
    c, s = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    struct.pack_into(">9i", data, at, c << 16, s << 16, 0, -s << 16, c << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_telephone_held_upright(tmp_path, degrees):
    source = make_film(tmp_path / "in.mp4", frames=2, sound=None)
    turned(source, degrees)
    (clip,), _ = list_clips(source)
    upright = next(clip.read()).image
    wanted = np.rot90(frame(0, 48, 64), -degrees // 90)  # clockwise
    assert upright.shape == wanted.shape == (clip.height, clip.width, 3)
    assert np.abs(upright.astype(int) - wanted).mean() < 4
    map_film(source, tmp_path / "out", pred_only=True)
    assert facts_of(tmp_path / "out/in.mp4")["size"] == wanted.shape[:2]


def test_wide_pixels_stay_wide(tmp_path):
    path = tmp_path / "in.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for number in range(2):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number, 48, 64), format="rgb24")))
        out.mux(stream.encode(None))
    map_film(path, tmp_path / "out")
    with av.open(str(tmp_path / "out/in.mp4")) as film:
        assert film.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


# Ranges


def read_level(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.float64), {k: picture.text[k] for k in picture.text}


@pytest.mark.parametrize("mode", ["clip", "running", "frame"])
def test_16_bit_frames_give_the_values_back(tmp_path, mode):
    source = make_film(tmp_path / "in.mp4", frames=8, sound=None)
    map_film(source, tmp_path / "out", range=mode, formats=("png16", "npy", "exr"))
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


def swing(path):
    """How much the grey of the upper half, which never changes, changes."""
    shown = np.stack([image[4:20].mean(axis=2) for _, image in read_film(path)])
    return np.abs(np.diff(shown, axis=0)).mean()


class Brightening(Brightness):
    """The same values at the same places, and one bright spot that grows, which sets the frame's range."""

    def predict_batch(self, images):
        maps = super().predict_batch(images)
        for image, map_ in zip(images, maps, strict=True):
            map_[-8:, -8:] = 10 + image[-1, 0, 0] / 4
        return maps


def test_one_range_does_not_flicker(tmp_path):
    source = make_film(tmp_path / "in.mp4", frames=20, sound=None)
    swings = {}
    for mode in ("clip", "running", "frame"):
        predict_videos(
            Brightening(),
            source,
            tmp_path / mode,
            settings=Settings(range=mode, pred_only=True, grayscale=True),
        )
        swings[mode] = swing(tmp_path / mode / "in.mp4")
    assert swings["clip"] < 0.3 * swings["frame"]
    assert swings["clip"] < swings["running"] < swings["frame"]


def test_the_range_of_a_clip_is_that_of_all_its_frames(tmp_path):
    source = make_film(tmp_path / "in.mp4", frames=10, sound=None)
    map_film(source, tmp_path / "out")
    maps = [Brightness().predict_batch([picture.image])[0] for picture in VideoFile("in.mp4", source).read()]
    facts = json.loads((tmp_path / "out/in.json").read_text())
    assert facts["values"] == {"low": float(np.min(maps)), "high": float(np.max(maps))}
    wanted = [np.percentile(map_, (0.1, 99.9)) for map_ in maps]
    assert facts["colours"]["low"] == pytest.approx(min(low for low, _ in wanted), rel=1e-6)
    assert facts["colours"]["high"] == pytest.approx(max(high for _, high in wanted), rel=1e-6)


def test_a_running_range_opens_fast_and_closes_slowly():
    running = Running()
    assert running.update(0.0, 1.0, 0.0) == (0.0, 1.0)
    low, high = running.update(-1.0, 2.0, 0.1)
    assert (low, high) == pytest.approx((-(1 - math.exp(-1)), 2 - math.exp(-1)))
    low_then, high_then = running.update(0.0, 1.0, 0.1)
    assert high_then == pytest.approx(1 + (high - 1) * math.exp(-0.1 / 2)) and low_then > low


def test_a_speck_does_not_set_the_colours():
    map_ = np.zeros((100, 100), np.float32)
    map_[:50] = 1
    map_[7, 7] = 1000
    assert spread(map_) == (0.0, 1.0)
    assert spread(np.full((3, 3), 2.5, np.float32)) == (2.5, 2.5)


# Smoothing


def still_scene(seed=0, height=60, width=80):
    random = np.random.default_rng(seed)
    return random.integers(0, 255, (height, width, 3), np.uint8), random.random(
        (height, width), np.float32
    ) * 5


def test_a_scale_and_shift_that_wobble_are_taken_out():
    image, scene = still_scene()
    random = np.random.default_rng(1)
    smoother = Smoother(0.5, align=True)
    maps = [random.uniform(0.8, 1.25) * scene + random.uniform(-0.5, 0.5) for _ in range(50)]
    smooth = [smoother(image, map_.astype(np.float32)) for map_ in maps]
    rough = np.mean([np.abs(b - a).mean() for a, b in zip(maps, maps[1:], strict=False)])
    left = np.mean([np.abs(b - a).mean() for a, b in zip(smooth, smooth[1:], strict=False)])
    assert left < 0.05 * rough


def test_noise_does_not_wear_the_map_down():
    image, scene = still_scene()
    random = np.random.default_rng(2)
    smoother = Smoother(0.8, align=True)
    for _ in range(600):
        smooth = smoother(image, scene + random.normal(0, 0.5, scene.shape).astype(np.float32))
    assert 0.9 < smooth.std() / scene.std() < 1.1
    assert abs(float(smooth.mean() - scene.mean())) < 0.1


def test_metres_are_not_rescaled():
    image, scene = still_scene()
    smoother = Smoother(0.5, align=False)
    smoother(image, scene)
    np.testing.assert_allclose(smoother(image, 2 * scene), 1.5 * scene, rtol=1e-5)


def test_what_moves_is_not_smeared_and_a_cut_starts_anew():
    image, scene = still_scene()
    smoother = Smoother(0.9, align=False)
    smoother(image, scene)
    moved, changed = image.copy(), scene.copy()
    moved[:, 50:] = 255 - moved[:, 50:] // 4
    changed[:, 50:] += 3
    smooth = smoother(moved, changed)
    assert np.abs(smooth - changed)[:, 55:].max() < 0.05
    other, far = still_scene(seed=9)
    assert np.array_equal(Smoother(0.9, align=True)(255 - other, far), far)
    assert np.array_equal(smoother(255 - (other // 2), far), far)


# Two passes


def test_a_spool_keeps_maps_exactly_and_no_more_than_it_may(tmp_path):
    maps = np.random.default_rng(0).random((5, 7, 9), np.float32)
    with Spool(tmp_path, (7, 9), most_bytes=3 * 7 * 9 * 4) as spool:
        assert [spool.append(map_) for map_ in maps] == [True, True, True, False, False]
        assert all(np.array_equal(spool.read(n), maps[n]) for n in (2, 0, 1))
        assert not [path for path in tmp_path.iterdir() if os.name == "posix"]


@pytest.mark.parametrize("smooth", [0.0, 0.6])
def test_what_the_spool_has_no_room_for_is_computed_again(tmp_path, monkeypatch, smooth):
    source = make_film(tmp_path / "in.mp4", frames=13, sound=None)
    for room in (0, 5, 100):
        monkeypatch.setattr(video, "Spool", partial(steady.Spool, most_bytes=room * 48 * 64 * 4))
        map_film(source, tmp_path / str(room), smooth=smooth, formats=("png16",), batch_size=3)
    for path in (tmp_path / "100/in_disparity").iterdir():
        for room in (0, 5):
            assert (tmp_path / f"{room}/in_disparity" / path.name).read_bytes() == path.read_bytes()


# Bad files


def test_a_film_cut_short_gives_what_it_has(tmp_path):
    whole = make_film(tmp_path / "whole.mp4", frames=60, options={"movflags": "+faststart"}, crf="0")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    outcome = map_film(tmp_path / "cut.mp4", tmp_path / "out")
    frames = outcome.frames["cut.mp4"]
    assert 20 < frames < 60 and len(read_film(tmp_path / "out/cut.mp4")) == frames
    assert any(f"{frames} of 60 frames" in note for note in outcome.notes["cut.mp4"])
    whole_outcome = map_film(whole, tmp_path / "whole")
    assert whole_outcome.frames == {"whole.mp4": 60} and not whole_outcome.notes


def test_a_matroska_cut_short_gives_what_it_has(tmp_path):
    whole = make_film(tmp_path / "whole.mkv", frames=60, crf="0")
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    outcome = map_film(tmp_path / "cut.mkv", tmp_path / "out")
    assert 20 < outcome.frames["cut.mkv"] < 60
    assert len(read_film(tmp_path / "out/cut.mp4")) == outcome.frames["cut.mkv"]
    assert any("its pictures end early: " in note for note in outcome.notes["cut.mkv"])


def refusals(folder):
    make_film(folder / "good.mp4", frames=4)
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


def test_what_is_no_video_is_skipped_and_named(tmp_path):
    bad = refusals(tmp_path / "in")
    outcome = map_film(tmp_path / "in", tmp_path / "out")
    assert set(outcome.frames) == {"good.mp4"} and set(outcome.skipped) == bad
    for why in outcome.skipped.values():
        assert "\n" not in why and "Errno" not in why and str(tmp_path) not in why
    for name in bad - {"notes.txt"}:
        with pytest.raises(ValueError, match=f"no video in .*{name}"):
            map_film(tmp_path / "in" / name, tmp_path / "out")


def test_nothing_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list_clips(tmp_path / "gone.mp4")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="it is empty"):
        list_clips(tmp_path / "none")


def test_a_film_without_frames(tmp_path):
    with av.open(str(tmp_path / "zero.mov"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        out.start_encoding()
    with pytest.raises(ValueError, match="no video in .*zero.mov"):
        map_film(tmp_path / "zero.mov", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


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
def test_a_broken_off_run_leaves_nothing(tmp_path, mode, error):
    source = make_film(tmp_path / "in.mp4", frames=24)
    settings = Settings(range=mode, formats=("mp4", "npy"))
    with pytest.raises(type(error)):
        predict_videos(Failing(12, error), source, tmp_path / "out", settings=settings)
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_run_leaves_no_film_and_the_next_one_tidies_up(tmp_path):
    code = f"""
        import os
        from fractions import Fraction
        from pathlib import Path
        import numpy as np
        from depth_anything.inference.films import Film
        rate = Fraction(25)
        film = Film(Path({str(tmp_path)!r}, "a.mp4"), height=48, width=64, rate=rate, time_base=1 / rate, notes={{}})
        for number in range(100):
            film.write(np.full((48, 64, 3), number, np.uint8), number)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "a.mp4").exists()
    make_film(tmp_path / "in/b.mp4", frames=2)
    map_film(tmp_path / "in/b.mp4", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "b.mp4", "b.json"}


def test_folders_that_are_not_ours_are_left_alone(tmp_path):
    make_film(tmp_path / "in.mp4", frames=2, sound=None)
    (tmp_path / "out/in_disparity").mkdir(parents=True)
    (tmp_path / "out/in_disparity/precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="in the way"):
        map_film(tmp_path / "in.mp4", tmp_path / "out", formats=("npy",))
    assert (tmp_path / "out/in_disparity/precious.txt").read_text() == "mine"
    (tmp_path / "out/in_disparity/precious.txt").unlink()
    for frames in (3, 2):  # an earlier one of ours is replaced, whole
        make_film(tmp_path / "in.mp4", frames=frames, sound=None)
        map_film(tmp_path / "in.mp4", tmp_path / "out", formats=("npy",))
        assert len(list((tmp_path / "out/in_disparity").iterdir())) == frames


# Folders of frames, lists, names


def write_frames(folder, names, size=(30, 41)):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(frame(9 * number, *size)).save(folder / name)


def test_a_folder_of_frames_is_a_clip_in_natural_order(tmp_path):
    write_frames(tmp_path / "shot", ["f9.png", "f10.png", "f11.png", "f13.png"])
    outcome = map_film(tmp_path / "shot", tmp_path / "out", rate=parse_rate("23.976"), formats=("mp4", "npy"))
    assert outcome.frames == {"shot": 4}
    assert outcome.notes == {"shot": ["1 numbers between its first frame and its last are missing"]}
    assert facts_of(tmp_path / "out/shot.mp4")["rate"] == Fraction(24000, 1001)
    maps = {path.stem: np.load(path) for path in (tmp_path / "out/shot_disparity").iterdir()}
    for number, name in enumerate(["f9", "f10", "f11", "f13"]):  # the frames' own names
        np.testing.assert_allclose(maps[name], frame(9 * number, 30, 41).mean(axis=2) / 25, rtol=1e-5)


def test_a_frame_that_does_not_belong_is_named(tmp_path):
    write_frames(tmp_path / "shot", ["1.png", "2.png"])
    Image.new("RGB", (9, 9)).save(tmp_path / "shot/3.png")
    with pytest.raises(ValueError, match="its frame 3.png is 9×9, the first is 41×30"):
        map_film(tmp_path / "shot", tmp_path / "out")
    (tmp_path / "shot/3.png").write_bytes(b"\x89PNG no")
    with pytest.raises(ValueError, match="its frame 3.png cannot be read"):
        map_film(tmp_path / "shot", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_tree_keeps_its_shape_and_equal_stems_apart(tmp_path):
    tree = tmp_path / "in"
    for name in ("a.mp4", "a.mkv", "A.mov", "sub/a.mp4", "naïve clip.mp4"):
        make_film(tree / name, frames=2, sound=None)
    write_frames(tree / "a", ["1.png", "2.png"])
    Image.new("RGB", (9, 9)).save(tree / "sub/poster.jpg")
    outcome = map_film(tree, tree / "out")
    assert set(outcome.frames) == {"a", "A.mov", "a.mkv", "a.mp4", "sub/a.mp4", "naïve clip.mp4"}
    assert outcome.skipped == {"sub/poster.jpg": "a picture beside a video"}
    made = {path.relative_to(tree / "out").as_posix() for path in (tree / "out").rglob("*.mp4")}
    assert made == {"a_frames.mp4", "A_mov.mp4", "a_mkv.mp4", "a_mp4.mp4", "sub/a.mp4", "naïve clip.mp4"}
    assert set(map_film(tree, tree / "out").frames) == set(outcome.frames)  # does not read what it wrote


def test_a_list_names_files_and_folders_of_frames(tmp_path):
    make_film(tmp_path / "one/a.mp4", frames=2, sound=None)
    make_film(tmp_path / "two/a.mp4", frames=2, sound=None)
    write_frames(tmp_path / "shot", ["1.png"])
    lines = ["one/a.mp4", "", str(tmp_path / "two/a.mp4"), "shot", "gone.mp4"]
    (tmp_path / "clips.txt").write_text("\n".join(lines), encoding="utf-8")
    outcome = map_film(tmp_path / "clips.txt", tmp_path / "out")
    assert len(outcome.frames) == 3 and outcome.skipped == {"gone.mp4": "there is no such file"}
    written = [path for paths in outcome.written.values() for path in paths]
    assert len(set(written)) == 3 and all(path.exists() for path in written)
    assert all((tmp_path / "out") in path.parents for path in written)


def test_the_source_is_never_overwritten(tmp_path):
    source = make_film(tmp_path / "a.mp4", frames=2)
    before = source.read_bytes()
    with pytest.raises(ValueError, match="give another folder"):
        map_film(source, tmp_path)
    assert source.read_bytes() == before


def test_natural_order():
    assert sorted(["f10", "f9", "f009b", "F1", "a"], key=natural_key) == ["F1", "a", "f009b", "f9", "f10"]


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
def test_rates_are_read(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["0", "-3", "fast", "1/0", "nan", "1e9"])
def test_rates_that_are_none(text):
    with pytest.raises(ValueError, match="no number of frames a second"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"range": "all"}, "range"),
        ({"smooth": 1.0}, "smooth"),
        ({"formats": ("avi",)}, "avi"),
        ({"batch_size": 0}, "1 or"),
    ],
)
def test_settings_that_cannot_be(settings, word):
    with pytest.raises(ValueError, match=word):
        Settings(**settings)


# Encoders


def test_without_x264_the_next_best_is_taken_and_without_any_it_says_so(monkeypatch):
    def only(*names):
        def codec(name, mode):
            if name not in names:
                raise av.codec.codec.UnknownCodecError(name)

        monkeypatch.setattr(av.codec, "Codec", codec)

    only("libopenh264")
    assert films.encoder() == "libopenh264"
    only()
    with pytest.raises(ValueError, match="no H.264 encoder: type  pip install"):
        films.encoder()


# Ten minutes


def resident_mb():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_ten_minutes_take_no_more_memory_than_one(tmp_path):
    source = make_film(tmp_path / "long.mp4", frames=17_982, size=(16, 16), sound=None)
    seen = []

    def watch(items, *, what, total):
        for number, item in enumerate(items):
            if number % 1798 == 0:
                seen.append(resident_mb())
            yield item

    outcome = predict_videos(
        Brightness(), source, tmp_path / "out", settings=Settings(pred_only=True, batch_size=32), watch=watch
    )
    assert outcome.frames == {"long.mp4": 17_982}
    assert facts_of(tmp_path / "out/long.mp4")["frames"] == 17_982
    assert len(seen) == 2 * 11
    assert max(seen[1:]) - min(seen[1:]) < 100


# The doors


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_model(DepthAnything("vitn"), path)
    return str(path)


def test_run_video_with_their_flags(tmp_path, weights, capsys):
    make_film(tmp_path / "in/a.mp4", frames=3)
    (tmp_path / "in/notes.md").write_text("not a film")
    theirs = ["--video-path", str(tmp_path / "in"), "--outdir", str(tmp_path / "out"), "--input-size", "70"]
    assert (
        door.run_video([*theirs, "--weights", weights, "--encoder", "vitn", "--pred-only", "--grayscale"])
        == 0
    )
    told = capsys.readouterr()
    assert "skipped notes.md: " in told.err
    assert "3 frames" in told.out and "larger is nearer" in told.out
    assert facts_of(tmp_path / "out/a.mp4")["size"] == (48, 64)


def test_a_mistake_is_one_sentence(tmp_path, weights, capsys, monkeypatch):
    assert door.run_video(["--video-path", str(tmp_path / "gone.mp4"), "--weights", weights]) == 2
    assert capsys.readouterr().err.startswith("run_video.py: ")
    monkeypatch.setattr(door, "find_spec", lambda name: None)
    assert door.run_video(["--video-path", str(tmp_path), "--weights", weights]) == 2
    assert "pip install 'depth-anything-train[video]'" in capsys.readouterr().err


def test_a_metric_film_says_metres(tmp_path):
    source = make_film(tmp_path / "a.mp4", frames=2, sound=None)
    predict_videos(Metres(), source, tmp_path / "out", settings=Settings(formats=("mp4", "png16")))
    facts = json.loads((tmp_path / "out/a.json").read_text())
    assert (facts["quantity"], facts["unit"], facts["larger"]) == ("depth", "m", "farther")
    assert (tmp_path / "out/a_depth").is_dir()
    with av.open(str(tmp_path / "out/a.mp4")) as film:
        assert film.metadata["comment"].startswith("depth (m), larger is farther")


def test_frames_are_those_the_file_would_give_one_by_one(tmp_path):
    """Batches and passes change nothing: the maps are the network's own."""
    from depth_anything import Predictor

    predictor = Predictor(DepthAnything("vitn"), device="cpu", input_size=70)
    write_frames(tmp_path / "shot", [f"{n}.png" for n in range(5)])
    predict_videos(
        predictor, tmp_path / "shot", tmp_path / "out", settings=Settings(formats=("npy",), batch_size=2)
    )
    clip = FrameFolder("shot", tmp_path / "shot", [f"{n}.png" for n in range(5)], rate=Fraction(24))
    for picture in clip.read():
        alone = predictor.predict(picture.image)
        made = np.load(tmp_path / f"out/shot_disparity/{picture.name}.npy")
        np.testing.assert_allclose(made, alone, atol=1e-5 * np.ptp(alone))
