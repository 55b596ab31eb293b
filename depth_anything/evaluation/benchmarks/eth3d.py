"""ETH3D, the high-resolution training scenes: thirteen places, laser scans.

Layout: office/images/dslr_images/DSC_0219.JPG with office/ground_truth_depth/dslr_images/DSC_0219.JPG, at any depth
below the root; 6048 x 4032 pixels.

Depth: the files of ground_truth_depth are not JPEGs: float32, little-endian, row by row, without a header, planar, in
meters; infinite where unknown, which is most pixels. They belong to the distorted images, not to
dslr_images_undistorted, and to their pixels as stored, without the EXIF orientation.

License: CC BY-NC-SA 4.0. Get it from https://www.eth3d.net/datasets: *_dslr_jpg.7z and *_dslr_depth.7z of the thirteen
scenes, some 22 GB.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.data.sample import Frame, decode_image
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    resolve_root,
)
from depth_anything.ingest.frame_files import FilePattern, find_frames, read_frame_file, split_fields
from depth_anything.ingest.source import DatasetInfo

_IMAGE = FilePattern("image", "images/dslr_images", r"(\w+)\.JPG")
_DEPTH = FilePattern("depth", "ground_truth_depth/dslr_images", r"(\w+)\.JPG")
_INFO = DatasetInfo(
    name="eth3d",
    title="ETH3D, high resolution",
    records=454,
    layout="office/images/dslr_images/DSC_0219.JPG with office/ground_truth_depth/dslr_images/DSC_0219.JPG",
    get="https://www.eth3d.net/datasets (dslr_jpg and dslr_depth of 13 scenes, 22 GB)",
    licence="CC-BY-NC-SA-4.0",
)


def find(root: Path) -> Iterator[str]:
    """List the frames scene by scene; ValueError if there is none."""
    return find_frames(resolve_root(root), _INFO, (_IMAGE, _DEPTH), sequence=_scene_name)


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if image or depth is missing, damaged or of another size."""
    name, image, depth = split_fields(line)
    with prefix_errors(f"eth3d/{name}"):
        pixels = decode_image(read_frame_file(Path(root), _IMAGE, image), upright=False)
        data = read_frame_file(Path(root), _DEPTH, depth)
        height, width = pixels.shape[:2]
        if len(data) != height * width * 4:
            raise ValueError(
                f"its depth has {len(data)} bytes, {height * width * 4} are needed for "
                f"{width} x {height} pixels of float32"
            )
        return make_frame(f"eth3d/{name}", pixels, np.frombuffer(data, "<f4").reshape(height, width))


def _scene_name(parts: tuple[str, ...]) -> str:
    """The scene's name, or "" if the root is the folder of a single scene."""
    return parts[-3] if len(parts) > 2 else ""


ETH3D = Benchmark.from_info(
    _INFO,
    find=find,
    read=read,
    depth_limits={"da2": DepthLimits(1e-3, 80), "marigold": DepthLimits(1e-5, float("inf"))},
)
