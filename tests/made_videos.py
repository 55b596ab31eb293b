"""Videos for the tests, and readers of their properties with PyAV."""

import struct
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from depth_anything.inference.video import VideoSettings, predict_videos

NTSC = Fraction(30000, 1001)


class Brightness:
    """A fake predictor: bright pixels are near."""

    quantity, unit, calibrated, precision = "disparity", "relative", False, "fp32"

    def predict_batch(self, images):
        return [image.mean(axis=2, dtype=np.float32) / 25 for image in images]


class Metres(Brightness):
    quantity, unit = "depth", "m"


def frame(number, height, width):
    """A frame that gets brighter to the right; its lower half gets brighter with the frame number."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:] = np.linspace(30, 200, width).astype(np.uint8)[None, :, None]
    image[height // 2 :] //= 3
    image[height // 2 :] += np.uint8(number % 60)
    return image


def make_video(
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
    """Write a video; `times` are in milliseconds."""
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


def predict_clip(source, output, **settings):
    return predict_videos(Brightness(), source, output, settings=VideoSettings(**settings))


def read_video(path):
    """The frames of a video with their times in seconds."""
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


def write_frames(folder, names, size=(30, 41)):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(frame(9 * number, *size)).save(folder / name)


def _stamp(data, at, ticks):
    """Write the 33 bits of a PES header's time, and keep its first four bits."""
    data[at] = (data[at] & 0xF0) | (ticks >> 29 & 0x0E) | 1
    data[at + 1], data[at + 2] = ticks >> 22 & 0xFF, ticks >> 14 & 0xFE | 1
    data[at + 3], data[at + 4] = ticks >> 7 & 0xFF, ticks << 1 & 0xFE | 1


def restamp_ts(path, kind, change):
    """Shift the times of a transport stream's packets by the seconds that `change` returns for a packet's number."""
    data, number = bytearray(path.read_bytes()), 0
    for start in range(0, len(data), 188):
        at = data.find(b"\x00\x00\x01", start, start + 188)
        if (
            not data[start + 1] & 0x40
            or at < 0
            or data[at + 3] & 0xF0 != {"video": 0xE0, "audio": 0xC0}[kind]
        ):
            continue
        ticks = round(change(number) * 90_000)
        number += 1
        for field in range(
            at + 9, at + 9 + (5 if data[at + 7] & 0x80 else 0) + (5 if data[at + 7] & 0x40 else 0), 5
        ):
            b = data[field : field + 5]
            old = (b[0] & 0x0E) << 29 | b[1] << 22 | (b[2] & 0xFE) << 14 | b[3] << 7 | b[4] >> 1
            _stamp(data, field, (old + ticks) % (1 << 33))
    path.write_bytes(data)
    return path


def restamp_flv(path, kind, change):
    """As `restamp_ts`, of a Flash video."""
    data, at, number = bytearray(path.read_bytes()), 13, 0
    while at + 11 <= len(data):
        size = int.from_bytes(data[at + 1 : at + 4], "big")
        if data[at] == {"video": 9, "audio": 8}[kind]:
            time = int.from_bytes(bytes([data[at + 7], *data[at + 4 : at + 7]]), "big")
            time = max(0, time + round(1000 * change(number))).to_bytes(4, "big")
            data[at + 4 : at + 8] = time[1:] + time[:1]
            number += 1
        at += 11 + size + 4
    path.write_bytes(data)
    return path
