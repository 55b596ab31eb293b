"""DIODE, its validation split: rooms and places, a laser scanner.

Layout: val/indoors/scene_00019/scan_00183/00019_00183_indoors_000_010.png with ….._depth.npy and
…_depth_mask.npy, and outdoor alike; 1024 x 768 pixels.

Depth: float32 (H, W, 1), metres; the mask is 1 where it can be trusted.

Three benchmarks: `diode` is all 771, `diode_indoor` 325, `diode_outdoor` 446. The figures of Depth Anything
are near those of the rooms alone: see docs/evaluation.md.

ZoeDepth's code crops as on NYU and KITTI: rooms to the very rows 45 to 471 and columns 41 to 601, the rest as
Garg (metric_depth/zoedepth/utils/config.py of Depth Anything V1). Unlike here, it looks at no mask.

Licence: MIT. Get it from https://diode-dataset.org (val.tar.gz, 2.6 GB).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from depth_anything.data.sample import Frame
from depth_anything.data.sources.folders import Kind, fields, find_frames, read_kind
from depth_anything.data.sources.maps import read_npy
from depth_anything.data.sources.source import Facts
from depth_anything.evaluation.benchmarks.benchmark import Benchmark, Caps
from depth_anything.evaluation.benchmarks.frames import about, make_frame, root_of, some

_NAME = r"(\d{5}_\d{5}_(?:indoors|outdoor)_\d{3}_\d{3})"
_IMAGE = Kind("image", "scan_*", _NAME + r"\.png")
_DEPTH = Kind("depth", "scan_*", _NAME + r"_depth\.npy")
_MASK = Kind("mask", "scan_*", _NAME + r"_depth_mask\.npy")
_FACTS = Facts(
    name="diode",
    title="DIODE, validation",
    records=771,
    layout="val/indoors/scene_00019/scan_00183/00019_00183_indoors_000_010.png with _depth.npy and _depth_mask.npy",
    get="https://diode-dataset.org (val.tar.gz, 2.6 GB)",
    licence="MIT",
)


def find(root: Path, *, part: str = "") -> Iterator[str]:
    """List the frames scan by scan.

    Args:
        root: Folder of the split, or one above it; what lies below a folder train is passed over.
        part: "indoors" or "outdoor"; "": both.

    Raises:
        ValueError: If there is none.
    """
    lines = find_frames(root_of(root, "diode"), _FACTS, (_IMAGE, _DEPTH, _MASK), sequence="/".join)
    listed = (
        line
        for line in lines
        for folders, _, name in [line.partition("\t")[0].rpartition("/")]
        if "train" not in folders.split("/") and (not part or f"_{part}_" in name)
    )
    return some(listed, f"{root} holds no frame of DIODE's validation split {part}: get it from {_FACTS.get}")


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if a file is missing or damaged, or sizes differ."""
    name, image, depth, mask = fields(line)
    root = root_of(root, "diode")
    with about(f"diode/{name}"):
        metres = read_npy(read_kind(root, _DEPTH, depth))
        known = read_npy(read_kind(root, _MASK, mask)) > 0
        return make_frame(
            f"diode/{name.rpartition('/')[2]}", read_kind(root, _IMAGE, image), metres, known=known
        )


def _benchmark(part: str, images: int, caps: dict[str, Caps]) -> Benchmark:
    word = part.rstrip("s")
    return Benchmark(
        name=f"{_FACTS.name}_{word}" if part else _FACTS.name,
        title=f"{_FACTS.title}, {word}" if part else _FACTS.title,
        images=images,
        layout=_FACTS.layout,
        get=_FACTS.get,
        licence=_FACTS.licence,
        find=partial(find, part=part),
        read=read,
        caps=caps,
    )


_RELATIVE = Caps(1e-3, 50)
DIODE = _benchmark("", 771, {"da2": _RELATIVE, "marigold": Caps(0.6, 350)})
DIODE_INDOOR = _benchmark("indoors", 325, {"da2": _RELATIVE, "zoedepth": Caps(1e-3, 10, crop="eigen_pixels")})
DIODE_OUTDOOR = _benchmark("outdoor", 446, {"da2": _RELATIVE, "zoedepth": Caps(1e-3, 80, crop="garg")})
