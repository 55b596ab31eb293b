"""Draw docs/pictures/photos.jpg: two photographs above the disparity that a model predicts for them.

    python docs/make_photos_picture.py --weights outputs/readme

docs/pictures/README.md has the commands that train this model.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from depth_anything import Predictor, load_model
from depth_anything.visualize import colorize

PICTURES = Path(__file__).resolve().parent / "pictures"
PHOTOS = ("camera.jpg", "coffee.jpg")
HEIGHT, GAP = 360, 8


def draw(weights: Path, input_size: int) -> np.ndarray:
    """Return the picture, uint8 RGB: a column per photograph, its disparity below it."""
    predictor = Predictor(load_model(weights), device="cpu", input_size=input_size)
    columns = []
    for name in PHOTOS:
        with Image.open(PICTURES / name) as file:
            width = round(file.width * HEIGHT / file.height)
            image = np.asarray(file.convert("RGB").resize((width, HEIGHT), Image.Resampling.LANCZOS))
        gap = np.full((GAP, width, 3), 255, np.uint8)
        columns.append(np.concatenate([image, gap, colorize(predictor.predict(image))]))
    space = np.full((len(columns[0]), GAP, 3), 255, np.uint8)
    return np.concatenate([columns[0], *(part for column in columns[1:] for part in (space, column))], axis=1)


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="a run folder or a model file")
    parser.add_argument("--input-size", type=int, default=168, help="short side of the network's input (168)")
    parser.add_argument("--output", type=Path, default=PICTURES / "photos.jpg")
    options = parser.parse_args()
    weights = options.weights / "model.safetensors" if options.weights.is_dir() else options.weights
    Image.fromarray(draw(weights, options.input_size)).save(options.output, quality=88)


if __name__ == "__main__":
    main()
