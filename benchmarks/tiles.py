"""Measure the effect of tiles on a map: seams, detail, memory; and the difference between the two preprocessings.

    python benchmarks/tiles.py --weights outputs/student-vitn-tiny --images PHOTOS

Each value is a median over the images. The gradient at tile borders is the mean absolute difference of neighboring
pixels across the lines where tiles end or have equal weights, relative to all lines; the untiled map has its own at
the same lines. Memory is the rise of peak resident memory above the model's, with one process per variant.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from depth_anything import Predictor
from depth_anything.cli.options import load_weights
from depth_anything.inference.tiles import tile_spans
from depth_anything.ingest.photographs import iterate_images

TILES, FINER = 3, 7 / 3  # 3 x 3 tiles that share a third see 7 / 3 of the input size along each side
LARGE, LARGE_TILES = (4320, 7680), (8, 16)
_ALONE = "--memory-of"  # this script, started by itself


def lines(length: int) -> list[int]:
    """Where tiles end along a side, and where neighbours weigh the same."""
    parts = tile_spans(length, TILES)
    ends = [edge for part in parts for edge in (part.start, part.stop) if 0 < edge < length]
    middles = [(a.stop + b.start) // 2 for a, b in zip(parts, parts[1:], strict=False)]
    return sorted(set(ends + middles))


def steepness(map_: np.ndarray) -> float:
    """Mean step across the tiles' lines over the mean step across all lines."""
    shares = []
    for values in (map_, map_.T):
        step = np.abs(np.diff(values, axis=0)).mean(axis=1)
        shares.append(step[[edge - 1 for edge in lines(len(values))]].mean() / step.mean())
    return float(np.mean(shares))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, over all pixels."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def apart(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """How far two maps differ, in shares of the first one's range."""
    share = np.abs(a - b) / (a.max() - a.min())
    return {
        "mean": float(share.mean()),
        "99th percentile": float(np.percentile(share, 99)),
        "worst": float(share.max()),
    }


def memory(weights: str, tiled: bool) -> float:
    """MiB that a map of a large image takes above the model, in a process of its own."""
    command = [sys.executable, __file__, "--weights", weights, _ALONE, "tiled" if tiled else "untiled"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(weights: str, how: str) -> None:
    """Print what `memory` asks for; the image itself and the model do not count."""
    model, _ = load_weights(weights, input_size=None)
    image = np.random.default_rng(0).integers(0, 255, (*LARGE, 3), np.uint8)
    predictor = Predictor(model, tiles=LARGE_TILES if how == "tiled" else None)
    predictor.predict(image[:64, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    predictor.predict(image)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument(_ALONE, dest="alone", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if args.alone:
        return measure_memory(args.weights, args.alone)
    if args.images is None:
        parser.error("--images is needed: a folder of photographs")
    model, _ = load_weights(args.weights, input_size=None)
    size = model.input_size
    plain, tiled = Predictor(model), Predictor(model, tiles=TILES)
    finer = Predictor(model, input_size=round(size * FINER / model.multiple) * model.multiple)
    theirs = Predictor(model, resample="transformers")
    rows: dict[str, list[float]] = {}
    for _, image in iterate_images(args.images):
        whole, joined, fine = plain.predict(image), tiled.predict(image), finer.predict(image)
        figures = {
            "steepness, tiled": steepness(joined),
            "steepness, untiled": steepness(whole),
            "correlation with the finer pass, tiled": correlation(joined, fine),
            "correlation with the finer pass, untiled": correlation(whole, fine),
            "correlation with the untiled pass, tiled": correlation(joined, whole),
        }
        ways = apart(whole, theirs.predict(image))
        figures |= {f"official to transformers, {name}": value for name, value in ways.items()}
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
    medians = {name: round(float(np.median(values)), 4) for name, values in rows.items()}
    medians |= {
        f"MiB at {LARGE[1]} x {LARGE[0]}, {way}": round(memory(args.weights, way == "tiled"))
        for way in ("tiled", "untiled")
    }
    print(f"{len(next(iter(rows.values())))} images, input size {size}, finer pass at {finer.input_size}")
    for name, value in medians.items():
        print(f"{name:45} {value:.4g}")
    if args.json:
        args.json.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
