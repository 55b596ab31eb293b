"""Decoding of videos: every frame that can be decoded, at its time, displayed as in players."""

import re
import shutil
import struct
import subprocess
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")

from made_videos import (  # noqa: E402
    facts_of,
    frame,
    make_video,
    packets,
    predict_clip,
    read_video,
    restamp_flv,
    restamp_ts,
)

from depth_anything.data.sample import decode_image  # noqa: E402
from depth_anything.inference.clip_list import list_clips  # noqa: E402
from depth_anything.ingest import video_frames  # noqa: E402

RATE = Fraction(25)


def times_of(source):
    """The times of a clip's frames in seconds from its first, and the clip."""
    (clip,), _ = list_clips(source)
    times = [picture.pts * clip.time_base for picture in clip.read()]
    return [float(time - times[0]) for time in times], clip


def assert_steady(times, count, *, within=0.001):
    assert len(times) == count
    np.testing.assert_allclose(times, np.arange(count) / 25, atol=within)


# Concatenated files, clocks that jump

JOINED = {
    "joined.ts": {"format": "mpegts", "sound": "aac"},
    "joined_mute.ts": {"format": "mpegts", "sound": None},
    "joined.m2ts": {"format": "mpegts", "sound": "ac3", "options": {"mpegts_m2ts_mode": "1"}},
    "joined.vob": {"format": "vob", "sound": "mp2", "codec": "mpeg2video"},
    "joined.mpg": {"format": "mpeg", "sound": None, "codec": "mpeg1video"},
}


@pytest.mark.parametrize("name", JOINED)
def test_concatenated_files_play_one_after_the_other(tmp_path, name):
    part = make_video(tmp_path / f"part_{name}", frames=50, rate=RATE, **JOINED[name])
    alone, _ = times_of(part)
    source = tmp_path / name
    source.write_bytes(3 * part.read_bytes())
    times, clip = times_of(source)
    assert len(alone) == 50
    lasts = Fraction(51, 25) if name == "joined.mpg" else 2  # PyAV's writer claims one frame more
    wanted = [part * lasts + time for part in range(3) for time in alone]
    np.testing.assert_allclose(times, np.array(wanted, float), atol=0.001)
    assert any("jump" in note for note in clip.notes) and not clip.incomplete
    predict_clip(source, tmp_path / "out", pred_only=True)
    out = tmp_path / "out" / source.with_suffix(".mp4").name
    assert len(read_video(out)) == 150
    if JOINED[name]["sound"]:
        assert len(packets(out)) == 3 * len(packets(part))


@pytest.mark.parametrize("starts", [(300, 0), (0, 300), (95442, 0), (95442, 95442), (50000, 50000)])
def test_parts_with_different_clocks_are_joined(tmp_path, starts):
    """300 s forward or back, across the 33-bit wrap of a transport stream's clock (95,443.7 s), or far from 0."""
    whole = b""
    for start in starts:
        part = make_video(tmp_path / "part.ts", frames=50, rate=RATE, sound="aac", format="mpegts")
        for kind in ("video", "audio"):
            restamp_ts(part, kind, lambda number, start=start: start)
        whole += part.read_bytes()
    (tmp_path / "whole.ts").write_bytes(whole)
    times, clip = times_of(tmp_path / "whole.ts")
    assert_steady(times, 100)
    assert not clip.incomplete and clip.time_base * next(clip.read()).pts < 1


GLITCHES = {
    "one packet": lambda number, seconds: seconds * (number == 41),
    "three packets": lambda number, seconds: seconds * (41 <= number < 44),
}


@pytest.mark.parametrize("name", ["a.ts", "a.flv"])
@pytest.mark.parametrize("kind", ["video", "audio"])
@pytest.mark.parametrize("glitch", GLITCHES)
@pytest.mark.parametrize("seconds", [5, -1, 20, -0.15])
def test_wrong_timestamps_of_a_few_packets_move_no_others(tmp_path, name, kind, glitch, seconds):
    source = make_video(
        tmp_path / name, frames=80, rate=RATE, sound="aac", **({"format": "mpegts"} if name == "a.ts" else {})
    )
    sound = len(packets(source))
    restamp = restamp_ts if name == "a.ts" else restamp_flv
    restamp(source, kind, lambda number: GLITCHES[glitch](number, seconds))
    times, clip = times_of(source)
    assert_steady(times, 80)
    assert not clip.incomplete
    predict_clip(source, tmp_path / "out", pred_only=True, range="frame")
    assert len(read_video(tmp_path / "out/a.mp4")) == 80
    assert len(packets(tmp_path / "out/a.mp4")) == sound


@pytest.mark.parametrize("seconds", [-1, 5])
def test_an_audio_jump_does_not_move_the_frames(tmp_path, seconds):
    source = make_video(tmp_path / "a.flv", frames=80, rate=RATE, sound="aac")
    restamp_flv(source, "audio", lambda number: seconds * (number >= 41))
    assert_steady(times_of(source)[0], 80)


def test_a_pause_in_the_recording_is_kept(tmp_path):
    source = make_video(tmp_path / "a.flv", frames=80, rate=RATE, sound="aac")
    for kind, first in (("video", 40), ("audio", 75)):
        restamp_flv(source, kind, lambda number, first=first: 7 * (number >= first))
    times, clip = times_of(source)
    pauses = np.diff(times).round(3)
    assert sorted(set(pauses)) == [0.04, 7.04] and (pauses == 7.04).sum() == 1 and not clip.notes


def one_sound_packet_out_of_order(source, target, number):
    """As shared/cases/one_audio_packet.py does."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        streams = {stream.index: writer.add_stream_from_template(stream) for stream in reader.streams}
        last, count = None, 0
        for packet in reader.demux():
            if packet.dts is None:
                continue
            if packet.stream.type == "audio":
                count += 1
                if count == number:
                    packet.dts = packet.pts = last
                last = packet.dts
            packet.stream = streams[packet.stream.index]
            writer.mux(packet)


@pytest.mark.parametrize("number", [2, 41])
def test_an_audio_packet_out_of_order_is_reordered(tmp_path, number):
    plain = make_video(tmp_path / "in.mp4", frames=100, rate=RATE)
    one_sound_packet_out_of_order(plain, tmp_path / "a.mkv", number)
    outcome = predict_clip(tmp_path / "a.mkv", tmp_path / "out", pred_only=True)
    assert outcome.frames == {"a.mkv": 100} and not outcome.failed
    assert_steady([float(time) for time, _ in read_video(tmp_path / "out/a.mp4")], 100, within=0.03)
    assert packets(tmp_path / "out/a.mp4") == packets(plain)
    assert any("audio" in note for note in outcome.notes["a.mkv"])


@pytest.mark.parametrize("sound", ["aac", "wmav2"])
def test_damaged_audio_loses_no_frame(tmp_path, sound):
    options = {"codec": "msmpeg4v3", "format": "asf"} if sound == "wmav2" else {"format": "mpegts"}
    source = make_video(tmp_path / "a.dat", frames=50, rate=RATE, sound=sound, **options)
    data = bytearray(source.read_bytes())
    kept = len(times_of(source)[0])
    for packet in packets(source)[10:13]:  # the packets' own bytes, wherever they lie
        at = data.find(packet[8:40])
        if at >= 0:
            data[at : at + 24] = bytes(24)
    source.write_bytes(data)
    outcome = predict_clip(source, tmp_path / "out", pred_only=True)
    assert kept == 50 == outcome.frames["a.dat"] == len(read_video(tmp_path / "out/a.mp4"))


# Damage, sizes, streams


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
@pytest.mark.parametrize("seed", [0, 1])
def test_damage_loses_only_the_frames_that_cannot_be_decoded(tmp_path, name, seed):
    options = {"a.ts": {"format": "mpegts"}, "a.avi": {"codec": "mpeg4", "sound": "libmp3lame"}}.get(name, {})
    source = make_video(tmp_path / name, frames=80, rate=RATE, **options)
    data, rng = bytearray(source.read_bytes()), np.random.default_rng(seed)
    for at in rng.integers(len(data) // 3, len(data) * 2 // 3, 2):
        data[at : at + 150] = rng.bytes(150)
    source.write_bytes(data)
    decodable = 0
    with av.open(str(source)) as film:
        for packet in film.demux(video=0):
            try:
                decodable += len(packet.decode())
            except av.FFmpegError:
                continue
    times, _ = times_of(source)
    assert len(times) == decodable > 20
    assert all(a < b for a, b in zip(times, times[1:], strict=False))


def test_frames_that_change_size_are_scaled_and_noted(tmp_path):
    first = make_video(tmp_path / "1.ts", frames=10, rate=RATE, sound=None, format="mpegts", size=(48, 64))
    second = make_video(tmp_path / "2.ts", frames=10, rate=RATE, sound=None, format="mpegts", size=(96, 32))
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    (clip,), _ = list_clips(tmp_path / "both.ts")
    assert [picture.image.shape for picture in clip.read()] == 20 * [(48, 64, 3)]
    assert any("64×48" in note and "32×96" in note for note in clip.notes)


def test_cover_pictures_are_ignored_and_other_streams_noted(tmp_path):
    plain = make_video(tmp_path / "in.mp4", frames=10, rate=RATE)
    with av.open(str(plain)) as reader, av.open(str(tmp_path / "two.mkv"), "w") as writer:
        small = writer.add_stream("mjpeg", rate=1)
        small.height, small.width, small.pix_fmt = 24, 32, "yuvj420p"
        streams = {stream.index: writer.add_stream_from_template(stream) for stream in reader.streams}
        writer.mux(small.encode(av.VideoFrame.from_ndarray(frame(0, 24, 32), format="rgb24")))
        writer.mux(small.encode(None))
        for packet in reader.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                writer.mux(packet)
    times, clip = times_of(tmp_path / "two.mkv")
    assert_steady(times, 10)
    assert (clip.height, clip.width) == (48, 64), "players show the larger stream"
    assert any("1 more video" in note for note in clip.notes)


# The eight display orientations

MATRICES = {  # a, b, c, d of the header: stored (x, y) is shown at (a x + c y, b x + d y)
    "as it is": ((1, 0, 0, 1), lambda image: image),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "upside down, mirrored": ((1, 0, 0, -1), lambda image: image[::-1]),
    "turned 180": ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
    "turned 90": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "turned 270": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "turned 90, mirrored": ((0, 1, 1, 0), lambda image: np.rot90(image, -1)[:, ::-1]),
    "turned 270, mirrored": ((0, -1, -1, 0), lambda image: np.rot90(image, 1)[:, ::-1]),
}


def set_matrix(path, a, b, c, d):
    """Write a display matrix into an MP4's track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # of a version 0 header
    struct.pack_into(">9i", data, at, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("way", MATRICES)
def test_display_matrices_are_applied(tmp_path, way):
    matrix, shown = MATRICES[way]
    source = make_video(tmp_path / "a.mp4", frames=3, rate=RATE, sound=None, size=(48, 80))
    set_matrix(source, *matrix)
    (clip,), _ = list_clips(source)
    wanted = shown(frame(0, 48, 80)).astype(int)
    seen = next(clip.read()).image
    assert seen.shape == wanted.shape == (clip.height, clip.width, 3)
    assert np.abs(seen - wanted).mean() < 4
    of_shard = decode_image(video_frames.read_frame(source, 0))  # what `shard` reads from a video
    assert of_shard.shape == wanted.shape and np.abs(of_shard - wanted).mean() < 5
    predict_clip(source, tmp_path / "out", pred_only=True)
    assert facts_of(tmp_path / "out/a.mp4")["size"] == wanted.shape[:2]


# FFmpeg's own program as the reference

MADE_BY_FFMPEG = {
    "base.mp4": "{v} {a} -c:v libx264 -bf 3 -c:a aac",
    "cut.mp4": "-ss 0.5 -i base.mp4 -c copy",  # an edit list leaves out what comes before
    "late.mp4": "-itsoffset 1 -i base.mp4 -i base.mp4 -map 0:v -map 1:a -c copy",
    "vfr.mkv": "-i base.mp4 -vf select='not(mod(n\\,3))' -vsync vfr -c:v libx264 -c:a copy",
    "raw.h264": "{v} -c:v libx264",
    "a.gif": "{v} -c:v gif",
    "a.avi": "{v} {a} -c:v mpeg4 -bf 2 -c:a mp3",
    "a.flv": "{v} {a} -c:v libx264 -c:a aac",
    "wrap.ts": "{v} {a} -c:v libx264 -c:a aac -output_ts_offset 95442",
    "a.vob": "{v} {a} -c:v mpeg2video -c:a mp2",
}


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the program ffmpeg")
def test_frames_and_times_equal_those_of_ffmpeg(tmp_path):
    lavfi = {
        "v": "-f lavfi -i testsrc2=size=96x64:rate=25:duration=2",
        "a": "-f lavfi -i sine=440:duration=2",
    }
    for name, how in MADE_BY_FFMPEG.items():
        command = f"ffmpeg -v error -y {how.format(**lavfi)} {name}".split()
        subprocess.run([part.replace("'", "") for part in command], check=True, cwd=tmp_path)
    for name in ("wrap.ts", "a.vob"):
        (tmp_path / f"joined_{name}").write_bytes(2 * (tmp_path / name).read_bytes())
    for source in sorted(tmp_path.iterdir()):
        told = subprocess.run(
            ["ffmpeg", "-nostdin", "-i", source, "-map", "0:V:0", "-vf", "showinfo", "-vsync", "0"]
            + ["-f", "null", "-"],
            capture_output=True,
            text=True,
        ).stderr
        theirs = [float(time) for time in re.findall(r"showinfo.* n: *\d+ pts: *\S+ pts_time:(\S+)", told)]
        ours, clip = times_of(source)
        assert len(ours) == len(theirs) > 15, source.name
        np.testing.assert_allclose(ours, np.array(theirs) - theirs[0], atol=0.025, err_msg=source.name)
        assert not clip.incomplete, (source.name, clip.notes)
