"""Booster, its training scenes: rooms with glass, mirrors and shiny objects, seen by a stereo camera.

Layout: train/balanced/Bathroom/camera_00/im0.png, an image for each light, with disp_00.npy, mask_cat.png and
calib_00-02.xml in train/balanced/Bathroom; 4112 x 3008 pixels. The ground truth of the test scenes and of the NTIRE
challenges is not public. Folders named unbalanced (the same left images) or test are ignored.

Depth: disp_00.npy holds the disparity of the left, rectified image in pixels, 0 where unknown. Depth is focal length ×
baseline / disparity; calib_00-02.xml, written by OpenCV, has the focal length (first number of proj_matL, pixels) and
the baseline (baselineLR, millimeters). Source: CVLAB-Unibo/Depth4ToM-code, evaluate_mono.py and utils.py. mask_00.png,
the pixels that the other camera does not see, is used neither there nor here.

Materials: mask_cat.png has the classes 0 to 3; 2 and 3 are transparent or mirrors (ToM), by the same evaluate_mono.py.

Two benchmarks: `booster` compares all known pixels, `booster_tom` only transparent objects and mirrors, and leaves out
images without any. Both are aligned over all known pixels, as the authors do: an alignment over a mirror alone would
hide that it is at the wrong place among the other objects.

Protocols: the authors' code fits disparity to disparity by least squares and compares depth from 1 mm to 10 m. `da2`
differs in two points: the authors compare every fourth pixel of every fourth row, and take fitted disparity below zero
for near, not far. The NTIRE 2024 challenge (CVLAB-Unibo/booster-web, _includes/ntire_home24.html) fits scale and shift
in depth, on images of its own, and ranks by the share of ToM within 1.05; its fit is not published. `marigold` fits
models of depth by least squares.

License: not verified. Get booster_gt.zip from https://amsacta.unibo.it/id/eprint/6876; the authors' page is
https://cvlab-unibo.github.io/booster-web.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    MaskedFrame,
    make_frame,
    prefix_errors,
    read_file,
    read_label_image,
    require_lines,
    resolve_root,
)
from depth_anything.ingest.frame_files import FilePattern, find_frames, read_frame_file, split_fields
from depth_anything.ingest.maps import read_bytes, read_npy
from depth_anything.ingest.source import DatasetInfo

TRANSPARENT_OR_MIRROR = (2, 3)
"""Classes of mask_cat.png."""

_SKIPPED_FOLDERS = {"unbalanced", "test"}
_IMAGE = FilePattern("image", "camera_00", r"(\w+)\.png")
_INFO = DatasetInfo(
    name="booster",
    title="Booster, training scenes",
    records=228,
    layout="train/balanced/Bathroom/camera_00/im0.png with disp_00.npy, mask_cat.png and calib_00-02.xml in "
    "train/balanced/Bathroom",
    get="https://amsacta.unibo.it/id/eprint/6876 (booster_gt.zip)",
    licence="LicenseRef-Booster",
)


def find(root: Path) -> Iterator[str]:
    """List the images scene by scene; ValueError if there is none."""
    lines = find_frames(resolve_root(root, "booster"), _INFO, (_IMAGE,), sequence=_scene_name)
    listed = (line for line in lines if not _SKIPPED_FOLDERS & set(line.partition("\t")[0].split("/")[:-1]))
    return require_lines(
        listed, f"{root} holds no image of Booster's training scenes", f"get it from {_INFO.get}"
    )


def read(root: Path, line: str, *, tom: bool = False) -> Frame:
    """Read a frame; ValueError if a file is missing or damaged, or sizes differ.

    Args:
        root: folder of the benchmark, or one above it.
        line: from `find`.
        tom: whether only transparent objects and mirrors are compared.
    """
    name, image = split_fields(line)
    root = resolve_root(root, "booster")
    with prefix_errors(f"booster/{name}"):
        data = read_frame_file(root, _IMAGE, image)
        scene = Path(root, image).parent.parent
        pixels = read_npy(read_file(scene, "disp_00.npy")).astype(np.float64)
        focal, baseline = read_calibration(read_file(scene, "calib_00-02.xml"))
        with np.errstate(divide="ignore", invalid="ignore"):
            meta = {"intrinsics": {"fx": focal, "fy": focal}}
            frame = make_frame(f"booster/{name}", data, focal * baseline / pixels, meta=meta)
        if not tom:
            return frame
        with prefix_errors("mask_cat.png"):
            materials = read_label_image(read_bytes(scene / "mask_cat.png"))
        if materials.shape != pixels.shape:
            raise ValueError("its materials and its disparity differ in size")
        return MaskedFrame(**vars(frame), eval_mask=np.isin(materials, TRANSPARENT_OR_MIRROR))


def read_calibration(data: bytes) -> tuple[float, float]:
    """Read focal length (pixels) and baseline (meters) from a calib_00-02.xml; ValueError if it has none."""
    try:
        tree = ElementTree.fromstring(data)
        focal = float(tree.findtext("proj_matL/data", "").split()[0])
        baseline = float(tree.findtext("baselineLR", "")) / 1000
    except (ElementTree.ParseError, ValueError, IndexError):
        raise ValueError("its calib_00-02.xml has no proj_matL and baselineLR") from None
    if not 0 < focal * baseline < float("inf"):
        raise ValueError(f"its calib_00-02.xml says {focal:g} pixels and {baseline:g} m")
    return focal, baseline


def _scene_name(parts: tuple[str, ...]) -> str:
    return "/".join(parts[:-1] if _SKIPPED_FOLDERS & set(parts) else parts[-2:-1])


def _make_benchmark(name: str, title: str, *, tom: bool) -> Benchmark:
    return Benchmark.from_info(
        _INFO,
        name=name,
        title=title,
        find=find,
        read=partial(read, tom=tom),
        depth_limits={"da2": DepthLimits(1e-3, 10), "marigold": DepthLimits(1e-3, 10)},
    )


BOOSTER = _make_benchmark(_INFO.name, _INFO.title, tom=False)
BOOSTER_TOM = _make_benchmark("booster_tom", f"{_INFO.title}, transparent or mirror", tom=True)
