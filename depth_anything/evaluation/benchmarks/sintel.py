"""MPI Sintel, its training sequences: a rendered film with depth.

Layout: training/final/alley_1/frame_0001.png (or clean) with training/depth/alley_1/frame_0001.dpt; 1024 x 436 pixels.

Depth: a .dpt file has the float32 202021.25, width and height as int32, then float32 row by row, all little-endian;
meters. The sky has a huge depth, too: only depth below 70 m is compared.

Two benchmarks: `sintel` has the final pass with motion blur and haze, `sintel_clean` the pass without.

Counts: 1,064 frames of 23 sequences. License: none stated; the film is CC BY 3.0 (Blender Foundation). Get it from
http://sintel.is.tue.mpg.de/depth: the images of MPI-Sintel-complete.zip (5.3 GB) and MPI-Sintel-depth-training.zip.
"""

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    resolve_root,
)
from depth_anything.ingest.frame_files import FilePattern, find_frames, read_frame_file, split_fields
from depth_anything.ingest.source import DatasetInfo

_IMAGES = {name: FilePattern("image", f"{name}/*", r"(frame_\d{4})\.png") for name in ("final", "clean")}
_DEPTH = FilePattern("depth", "depth/*", r"(frame_\d{4})\.dpt")
_DPT_TAG = 202021.25
_INFO = DatasetInfo(
    name="sintel",
    title="MPI Sintel",
    records=1064,
    layout="training/final/alley_1/frame_0001.png with training/depth/alley_1/frame_0001.dpt",
    get="http://sintel.is.tue.mpg.de/depth (images and depth, 6 GB)",
    licence="LicenseRef-MPI-Sintel",
)


def find(root: Path, *, render: str) -> Iterator[str]:
    """List the frames of a pass, "final" or "clean", sequence by sequence; ValueError if there is none."""
    lines = find_frames(
        resolve_root(root, "sintel"), _INFO, (_IMAGES[render], _DEPTH), sequence=_sequence_name
    )
    listed = [line for line in lines if not line.startswith("test/")]
    if not any(split_fields(line)[1] for line in listed):
        looked = _INFO.layout.replace("final", render)
        raise UserError(
            f"{root} holds no {render} pass with depth: looked for {looked}", f"get it from {_INFO.get}"
        )
    return iter(listed)


def read(root: Path, line: str, *, render: str) -> Frame:
    """Read a frame; ValueError if image or depth is missing or damaged."""
    name, image, depth = split_fields(line)
    root = resolve_root(root, "sintel")
    with prefix_errors(f"sintel/{render}/{name}"):
        data = read_frame_file(root, _IMAGES[render], image)
        return make_frame(f"sintel/{render}/{name}", data, read_dpt(read_frame_file(root, _DEPTH, depth)))


def read_dpt(data: bytes) -> np.ndarray:
    """Decode a .dpt file to float32 (H,W); ValueError if it is another file, or damaged."""
    tag, width, height = struct.unpack_from("<fii", data) if len(data) >= 12 else (0.0, 0, 0)
    if tag != _DPT_TAG:
        raise ValueError("its depth is not a .dpt file: it does not begin with 202021.25")
    if min(width, height) < 1 or len(data) != 12 + 4 * width * height:
        raise ValueError(f"its depth is damaged: {len(data) - 12} bytes for {width} x {height} pixels")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width)


def _sequence_name(parts: tuple[str, ...]) -> str:
    """The sequence's name; test sequences, which have no depth, get a prefix."""
    return f"test/{parts[-1]}" if "test" in parts[:-2] else parts[-1]


def _make_benchmark(name: str, render: str) -> Benchmark:
    return Benchmark.from_info(
        _INFO,
        name=name,
        title=f"{_INFO.title}, {render} pass",
        layout=_INFO.layout.replace("final", render),
        find=partial(find, render=render),
        read=partial(read, render=render),
        depth_limits={"da2": DepthLimits(1e-3, 70)},
        sharp=True,
    )


SINTEL = _make_benchmark("sintel", "final")
SINTEL_CLEAN = _make_benchmark("sintel_clean", "clean")
