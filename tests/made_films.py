"""Clips made for the tests, and what films hold, read back with PyAV."""

import struct
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from depth_anything.inference.video import Settings, predict_videos

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


def write_frames(folder, names, size=(30, 41)):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(frame(9 * number, *size)).save(folder / name)
