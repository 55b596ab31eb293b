"""Booster, its training scenes: rooms with glass, mirrors and other things that shine, seen by a pair of cameras.

Layout: train/balanced/Bathroom/camera_00/im0.png, an image for each light, with disp_00.npy, mask_cat.png and
calib_00-02.xml in train/balanced/Bathroom; 4112 x 3008 pixels. The truth of the test scenes, and of those of the
NTIRE challenges, is not public. What lies below a folder unbalanced (the same left images) or test is passed over.

Depth: disp_00.npy holds the disparity of the left, rectified image in pixels, 0 where it is not known. Depth is
focal length × distance of the cameras / disparity, by calib_00-02.xml, as OpenCV writes it: the first number of
proj_matL in pixels, baselineLR in millimetres. (CVLAB-Unibo/Depth4ToM-code, evaluate_mono.py and utils.py.)
mask_00.png, what the other camera does not see, is not used there, nor here.

Materials: mask_cat.png has four classes, 0 to 3; 2 and 3 are transparent or mirrors (ToM), 0 and 1 others (the
same evaluate_mono.py).

Two benchmarks: `booster` compares all that is known; `booster_tom` only what is transparent or a mirror, and
leaves out images without. Both are fitted over all that is known, as the makers do: a fit over a mirror alone
would forgive what is asked for, its place among the other things.

Rules: the makers' code fits disparity to disparity by least squares, compares depth from 1 mm to 10 m, and is
`da2` here but for two things: it compares every fourth pixel of every fourth row, and takes what the fit puts
behind infinity for near, not far. The NTIRE 2024 challenge (CVLAB-Unibo/booster-web, _includes/ntire_home24.html)
fits in depth, scale and shift, on images of its own, and ranks by the share of ToM within 1.05; how it fits is
not published. `marigold` fits models of depth so, by least squares.

Licence: not verified. Get booster_gt.zip from https://amsacta.unibo.it/id/eprint/6876; the makers' page is
https://cvlab-unibo.github.io/booster-web.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import Benchmark, DepthLimits
from depth_anything.evaluation.benchmarks.frames import (
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
_FACTS = DatasetInfo(
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
    lines = find_frames(resolve_root(root, "booster"), _FACTS, (_IMAGE,), sequence=_scene_name)
    listed = (line for line in lines if not _SKIPPED_FOLDERS & set(line.partition("\t")[0].split("/")[:-1]))
    return require_lines(
        listed, f"{root} holds no image of Booster's training scenes", f"get it from {_FACTS.get}"
    )


def read(root: Path, line: str, *, tom: bool = False) -> Frame:
    """Read a frame; ValueError if a file is missing or damaged, or sizes differ.

    Args:
        root: Folder of the benchmark, or one above it.
        line: Of `find`.
        tom: Whether only what is transparent or a mirror is compared.
    """
    name, image = split_fields(line)
    root = resolve_root(root, "booster")
    with prefix_errors(f"booster/{name}"):
        data = read_frame_file(root, _IMAGE, image)
        scene = Path(root, image).parent.parent
        pixels = read_npy(read_file(scene, "disp_00.npy")).astype(np.float64)
        focal, baseline = read_calibration(read_file(scene, "calib_00-02.xml"))
        with np.errstate(divide="ignore", invalid="ignore"):
            frame = make_frame(f"booster/{name}", data, focal * baseline / pixels)
        if not tom:
            return frame
        part = np.isin(_read_materials(scene), TRANSPARENT_OR_MIRROR)
        if part.shape != pixels.shape:
            raise ValueError("its materials and its disparity differ in size")
        return MaskedFrame(**vars(frame), part=part)


def read_calibration(data: bytes) -> tuple[float, float]:
    """Focal length in pixels and distance of the cameras in metres, of a calib_00-02.xml; ValueError if it has none."""
    try:
        tree = ElementTree.fromstring(data)
        focal = float(tree.findtext("proj_matL/data", "").split()[0])
        baseline = float(tree.findtext("baselineLR", "")) / 1000
    except (ElementTree.ParseError, ValueError, IndexError):
        raise ValueError("its calib_00-02.xml has no proj_matL and baselineLR") from None
    if not 0 < focal * baseline < float("inf"):
        raise ValueError(f"its calib_00-02.xml says {focal:g} pixels and {baseline:g} m")
    return focal, baseline


def _read_materials(scene: Path) -> np.ndarray:
    with prefix_errors("mask_cat.png"):
        return read_label_image(read_bytes(scene / "mask_cat.png"))


def _scene_name(parts: tuple[str, ...]) -> str:
    return "/".join(parts[:-1] if _SKIPPED_FOLDERS & set(parts) else parts[-2:-1])


def _make_benchmark(name: str, title: str, *, tom: bool) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        images=_FACTS.records,
        layout=_FACTS.layout,
        get=_FACTS.get,
        licence=_FACTS.licence,
        find=find,
        read=partial(read, tom=tom),
        depth_limits={"da2": DepthLimits(1e-3, 10), "marigold": DepthLimits(1e-3, 10)},
    )


BOOSTER = _make_benchmark(_FACTS.name, _FACTS.title, tom=False)
BOOSTER_TOM = _make_benchmark("booster_tom", f"{_FACTS.title}, transparent or mirror", tom=True)
