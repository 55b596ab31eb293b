"""DIODE, its validation split: indoor and outdoor scenes, a laser scanner.

Layout: val/indoors/scene_00019/scan_00183/00019_00183_indoors_000_010.png with …_depth.npy and …_depth_mask.npy, and
outdoor has the same layout; 1024 x 768 pixels.

Depth: float32 (H, W, 1), meters; the mask is 1 where it is reliable.

Three benchmarks: `diode` is all 771 images, `diode_indoor` 325, `diode_outdoor` 446. The published figures of Depth
Anything are close to those of the indoor images alone: see docs/evaluation.md.

ZoeDepth's code, which made the published metric figures (zoedepth/utils/config.py and utils/misc.py in metric_depth/ of
Depth Anything V1), compares rows 45 to 471 and columns 41 to 601 of the indoor images, which is their upper left part,
and Garg's crop of the outdoor ones. Its reader loads the mask without using it, and shrinks the image to 480 rows for
the network; here the mask is used and the image is not shrunk.

License: MIT. Get it from https://diode-dataset.org (val.tar.gz, 2.6 GB).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    require_lines,
    resolve_root,
)
from depth_anything.ingest.frame_files import FilePattern, find_frames, read_frame_file, split_fields
from depth_anything.ingest.maps import read_npy
from depth_anything.ingest.source import DatasetInfo

_NAME = r"(\d{5}_\d{5}_(?:indoors|outdoor)_\d{3}_\d{3})"
_IMAGE = FilePattern("image", "scan_*", _NAME + r"\.png")
_DEPTH = FilePattern("depth", "scan_*", _NAME + r"_depth\.npy")
_MASK = FilePattern("mask", "scan_*", _NAME + r"_depth_mask\.npy")
_INFO = DatasetInfo(
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
        root: folder of the split, or one above it; folders named train are ignored.
        part: "indoors" or "outdoor"; "": both.

    Raises:
        ValueError: there is none.
    """
    lines = find_frames(resolve_root(root, "diode"), _INFO, (_IMAGE, _DEPTH, _MASK), sequence="/".join)
    listed = (
        line
        for line in lines
        for folders, _, name in [line.partition("\t")[0].rpartition("/")]
        if "train" not in folders.split("/") and (not part or f"_{part}_" in name)
    )
    return require_lines(
        listed, f"{root} holds no frame of DIODE's validation split {part}", f"get it from {_INFO.get}"
    )


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if a file is missing or damaged, or sizes differ."""
    name, image, depth, mask = split_fields(line)
    root = resolve_root(root, "diode")
    with prefix_errors(f"diode/{name}"):
        meters = read_npy(read_frame_file(root, _DEPTH, depth))
        known = read_npy(read_frame_file(root, _MASK, mask)) > 0
        return make_frame(
            f"diode/{name.rpartition('/')[2]}", read_frame_file(root, _IMAGE, image), meters, known=known
        )


def _make_benchmark(part: str, images: int, depth_limits: dict[str, DepthLimits]) -> Benchmark:
    word = part.rstrip("s")
    return Benchmark.from_info(
        _INFO,
        name=f"{_INFO.name}_{word}" if part else _INFO.name,
        title=f"{_INFO.title}, {word}" if part else _INFO.title,
        images=images,
        find=partial(find, part=part),
        read=read,
        depth_limits=depth_limits,
    )


_DA2_LIMITS = DepthLimits(1e-3, 50)
DIODE = _make_benchmark("", 771, {"da2": _DA2_LIMITS, "marigold": DepthLimits(0.6, 350)})
DIODE_INDOOR = _make_benchmark(
    "indoors", 325, {"da2": _DA2_LIMITS, "zoedepth": DepthLimits(1e-3, 10, eval_crop="eigen_pixels")}
)
DIODE_OUTDOOR = _make_benchmark(
    "outdoor", 446, {"da2": _DA2_LIMITS, "zoedepth": DepthLimits(1e-3, 80, eval_crop="garg")}
)
