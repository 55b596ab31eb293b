"""BlendedMVS, all three parts (also known as BlendedMVG): reconstructed scenes, rendered and blended with photographs.

Layout: PID/blended_images/00000000.jpg (and 00000000_masked.jpg, which is not taken: the same picture, black where
the mesh has nothing), PID/rendered_depth_maps/00000000.pfm, PID/cams/00000000_cam.txt; PID is of 24 hexadecimal
digits. The low resolution, 576 x 768, of all parts; the high one of the first part lies alike.

Depth: PFM, float32, rows bottom-up; planar; in a unit of each scene's own, which no file says: the affine-invariant
losses do not need it, a metric model cannot learn from it. Where the mesh has nothing the depth is 0 (or negative, or
no number): missing, not sky, although the blended image often shows sky there. Nothing of this set is ever sky.
Intrinsics are those of cam.txt, in pixels.

Counts: 502 scenes (113 of BlendedMVS, 194 of BlendedMVS+, 195 of BlendedMVS++), over 110,000 frames; the paper says
115 K. Some depth maps are empty and are refused. A wrong projection in part ++ is reported (issue 30 of the
repository).

Licence: CC BY 4.0. Get it from https://github.com/YoYo000/BlendedMVS: 27.5 + 81.5 + 80 GB of zips, partly split
archives (.z01 …), which 7z unpacks. Facts from that repository.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from depth_anything.ingest.frame_files import (
    FilePattern,
    check_map_size,
    find_frames,
    join_parts,
    read_frame_file,
    split_fields,
)
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
_IMAGE = FilePattern("image", "blended_images", r"(\d+)\.jpg")
_DEPTH = FilePattern("depth", "rendered_depth_maps", r"(\d+)\.pfm")


def find(raw: Path) -> Iterator[str]:
    """List the frames, PID/number each, then the paths of image and depth.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, INFO, (_IMAGE, _DEPTH), sequence=lambda parts: join_parts(parts[:-1]))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If image or depth are missing or damaged, or differ in size.
    """
    _, image_path, depth_path = split_fields(line)
    image = read_frame_file(raw, _IMAGE, image_path)
    depth = read_pfm(read_frame_file(raw, _DEPTH, depth_path))
    check_map_size(image, depth, _DEPTH.what)
    meta = {"unit": "arbitrary", **_read_intrinsics((raw / image_path).parent.parent, Path(image_path).stem)}
    return RawSample(image, meta, depth=depth)


def _read_intrinsics(scene: Path, number: str) -> dict[str, dict[str, float]]:
    """What cam.txt has under the word intrinsic, three rows of three; nothing if there is no such file."""
    try:
        words = read_bytes(scene / "cams" / f"{number}_cam.txt").decode("ascii").split()
        start = words.index("intrinsic") + 1
        fx, _, cx, _, fy, cy = (float(word) for word in words[start : start + 6])
        if not all(map(math.isfinite, (fx, fy, cx, cy))):
            return {}
    except ValueError:  # the depth is as good without
        return {}
    return {"intrinsics": {"fx": fx, "fy": fy, "cx": cx, "cy": cy}}
