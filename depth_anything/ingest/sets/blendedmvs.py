"""BlendedMVS, all three parts (also known as BlendedMVG): reconstructed scenes, rendered and blended with photographs.

Layout: PID/blended_images/00000000.jpg, PID/rendered_depth_maps/00000000.pfm, PID/cams/00000000_cam.txt, where PID has
24 hexadecimal digits. 00000000_masked.jpg, the same image with black pixels where the mesh has a hole, is not read. All
parts have a low resolution of 576 x 768; the high resolution of the first part has the same layout.

Depth: PFM, float32, planar, in an arbitrary unit that differs between scenes and is not documented. The
affine-invariant losses do not need a unit; a metric model cannot be trained on this set. Where the mesh has a hole, the
depth is 0, negative or NaN: invalid, not sky, although the blended image often shows sky there. No pixel of this set
counts as sky. Intrinsics in pixels are those of cam.txt.

Counts: 502 scenes (113 of BlendedMVS, 194 of BlendedMVS+, 195 of BlendedMVS++), more than 110,000 frames; the paper
says 115 K. Some depth maps are empty and are rejected. Issue 30 of the repository reports a wrong projection in
BlendedMVS++.

License: CC BY 4.0. Get it from https://github.com/YoYo000/BlendedMVS: 27.5 + 81.5 + 80 GB of zips, some of them split
archives (.z01 …), which 7z unpacks. Facts from that repository.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from depth_anything.ingest.frame_files import FilePattern, find_frames, join_parts, read_pair, split_fields
from depth_anything.ingest.maps import read_bytes, read_pfm
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="blendedmvs",
    title="BlendedMVS, BlendedMVS+ and BlendedMVS++",
    records=115_000,
    layout="PID/blended_images/00000000.jpg with PID/rendered_depth_maps/00000000.pfm",
    get="https://github.com/YoYo000/BlendedMVS (189 GB)",
    licence="CC-BY-4.0",
    sky="invalid",
)
_PATTERNS = (
    FilePattern("image", "blended_images", r"(\d+)\.jpg"),
    FilePattern("depth", "rendered_depth_maps", r"(\d+)\.pfm"),
)


def find(raw: Path) -> Iterator[str]:
    """List the frames as PID/number, then the paths of image and depth.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, INFO, _PATTERNS, sequence=lambda parts: join_parts(parts[:-1]))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image or depth is missing or damaged, or the two differ in size.
    """
    _, *paths = split_fields(line)
    image, depth = read_pair(raw, _PATTERNS, paths, read_pfm)
    path = raw / paths[0]
    meta = {"unit": "arbitrary", **_read_intrinsics(path.parent.parent / "cams" / f"{path.stem}_cam.txt")}
    return RawSample(image, meta, depth=depth)


def _read_intrinsics(path: Path) -> dict[str, dict[str, float]]:
    """Read the 3 x 3 matrix after the word "intrinsic" of cam.txt; return {} if it is missing or damaged."""
    try:
        words = read_bytes(path).decode("ascii").split()
        start = words.index("intrinsic") + 1
        fx, _, cx, _, fy, cy = (float(word) for word in words[start : start + 6])
        if not all(map(math.isfinite, (fx, fy, cx, cy))):
            return {}
    except ValueError:  # the depth is usable without intrinsics
        return {}
    return {"intrinsics": {"fx": fx, "fy": fy, "cx": cx, "cy": cy}}
