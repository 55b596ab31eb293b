"""Measure the flicker of a depth video for each color range and with smoothing: static camera, noise, varying light, a
passer-by.

    python benchmarks/flicker.py --weights outputs/student-vitn-tiny --photo photo.jpg

Flicker is the change of the map's gray level from frame to frame where the scene does not change, averaged over those
pixels and frames, in percent of the video's contrast (the standard deviation of its gray levels). The passer-by is a
dark post that crosses the image; the pixels it covers, and those near it, are excluded. The picture has a column per
mode: one row of the video over time.
"""

import argparse
import json
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image

from depth_anything import Predictor
from depth_anything.cli.options import load_weights
from depth_anything.inference.video import VideoSettings, predict_videos
from depth_anything.visualize import make_panel

HEIGHT, WIDTH, FRAMES = 252, 448, 96
NOISE_LEVELS, LIGHT_SHARE = 4.0, 0.04
POST_PX, MARGIN_PX = 110, 40
LINE = HEIGHT // 3
MODES = {
    "frame": {"range": "frame"},
    "running": {"range": "running"},
    "clip": {"range": "clip"},
    "clip, smooth 0.8": {"range": "clip", "smooth": 0.8},
}


class Truth:
    """Return the map of a perfect network: a floor that comes nearer downwards, and the passer-by, nearest of all."""

    quantity, unit = "disparity", "relative"

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The disparity of each frame."""
        floor = np.repeat(np.linspace(0.5, 2.5, HEIGHT, dtype=np.float32)[:, None], WIDTH, axis=1)
        maps = []
        for image in images:
            map_ = floor.copy()
            map_[HEIGHT // 8 :, np.median(image[HEIGHT // 8 :].max(axis=2), axis=0) < 45] = 5
            maps.append(map_)
        return maps


def post(number: int) -> slice:
    """Columns that the passer-by covers in a frame, none before a quarter of the film and after three."""
    left = round(WIDTH + POST_PX - (number - FRAMES / 4) / (FRAMES / 2) * (WIDTH + 2 * POST_PX))
    return slice(min(max(left, 0), WIDTH), min(max(left + POST_PX, 0), WIDTH))


def write_film(photo: np.ndarray, path: Path) -> None:
    """Film a photograph with a sensor's noise and lamps that waver while somebody passes."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(24), options={"crf": "14", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            seen = photo * (1 + LIGHT_SHARE * np.sin(2.1 * number))
            seen[HEIGHT // 8 :, post(number)] = (30, 26, 24)
            seen = seen + random.normal(0, NOISE_LEVELS, seen.shape)
            frame = np.ascontiguousarray(seen.clip(0, 255).astype(np.uint8))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))


def gray_of(path: Path) -> np.ndarray:
    """A film's gray levels, (frames, height, width)."""
    with av.open(str(path)) as film:
        return np.stack([frame.to_ndarray(format="gray") for frame in film.decode(video=0)]).astype(
            np.float32
        )


def uncovered(number: int) -> np.ndarray:
    """Which columns neither the passer-by nor its surroundings cover in a frame."""
    free, covered = np.ones(WIDTH, bool), post(number)
    if covered.stop > covered.start:
        free[max(covered.start - MARGIN_PX, 0) : covered.stop + MARGIN_PX] = False
    return free


def flicker(gray: np.ndarray) -> float:
    """Mean change between two frames where the scene stays, percent of the contrast."""
    changes = [
        np.abs(gray[n + 1] - gray[n])[:, uncovered(n) & uncovered(n + 1)].mean() for n in range(FRAMES - 1)
    ]
    return float(np.mean(changes) / gray.std() * 100)


def pumping(gray: np.ndarray) -> float:
    """How far the whole scene's gray level goes up and down in the film, percent of the contrast."""
    usual = gray[: FRAMES // 4].mean(axis=0)  # nobody is there yet
    away = [(gray[n] - usual)[:, uncovered(n)].mean() for n in range(FRAMES)]
    return float(np.ptp(away) / gray.std() * 100)


def strip(gray: np.ndarray) -> np.ndarray:
    """One line through time."""
    line = np.repeat(gray[:, LINE].astype(np.uint8)[..., None], 3, axis=2)
    return cv2.resize(line, None, fx=0.6, fy=2, interpolation=cv2.INTER_NEAREST)


def main() -> None:
    """Make the films, measure them, draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", help="of the model; without it the truth, in place of a network")
    parser.add_argument("--photo", required=True, type=Path)
    parser.add_argument("--input-size", type=int)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    predictor: Any = Truth()
    if options.weights:
        model, _ = load_weights(options.weights, input_size=options.input_size)
        predictor = Predictor(model, input_size=model.input_size)
    measure(predictor, options.photo, options.picture)


def measure(predictor: Any, photo: Path, picture: Path | None) -> None:
    """Print each mode's flicker as JSON; draw the strips."""
    with Image.open(photo) as opened:
        scene = opened.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    levels, strips = {}, []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "film.mp4")
        write_film(np.asarray(scene).astype(np.float32), source)
        for name, settings in MODES.items():
            output = Path(folder, name.replace(" ", "-"))
            predict_videos(
                predictor, source, output, settings=VideoSettings(**settings, pred_only=True, grayscale=True)
            )
            gray = gray_of(output / "film.mp4")
            levels[name] = {"flicker": round(flicker(gray), 2), "pumping": round(pumping(gray), 1)}
            strips.append(strip(gray))
    print(json.dumps({"% of contrast": levels, "photo": photo.name}, indent=1))
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_panel([strips], list(levels))).save(picture, quality=88)


if __name__ == "__main__":
    main()
