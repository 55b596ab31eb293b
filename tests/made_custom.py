"""A small user's set of images and maps, in any of the formats, with analytic depth."""

from pathlib import Path

import cv2
import numpy as np
from made_raw import exr, hdf5, jpeg, picture, png, room

SIZE = (36, 48)
ENDINGS = (".png", ".npy", ".exr", ".pfm", ".h5")


def write_map(path, stored):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".png":
            png(path, stored.astype(np.uint16))
        case ".npy":
            np.save(path, stored)
        case ".pfm":
            assert cv2.imwrite(str(path), stored.astype(np.float32))
        case ".exr":
            exr(path, {"Y": stored.astype(np.float32)})
        case ".h5":
            hdf5(path, stored)


def make_set(
    root, *, names=("a", "b", "c"), ending=".png", scale=0.001, size=SIZE, yaml="unit: mm\n", lowest=0
):
    """Write rgb/NAME.jpg, depth/NAME.* and set.yaml; return depth in meters by name, float64 (H, W)."""
    truth = {}
    for number, name in enumerate(names):
        metres = room(size, seed=number % 3)
        stored = np.round(metres / scale) if ending == ".png" else (metres / scale).astype(np.float32)
        if lowest is not None:
            stored[:3, :5] = lowest
        jpeg(Path(root, f"rgb/{name}.jpg"), picture(metres, seed=number % 3))
        write_map(Path(root, f"depth/{name}{ending}"), stored)
        truth[name] = stored.astype(np.float64) * scale
    Path(root, "set.yaml").write_text(f"images: rgb\ndepth: depth\n{yaml}")
    return truth
