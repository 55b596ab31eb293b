"""TartanAir V2: 65 rendered environments, twelve cameras each; not among the paper's sets.

Layout: ENV/Data_easy/P000/{image_lcam_front/000000_lcam_front.png, depth_lcam_front/000000_lcam_front_depth.png} and
Data_hard; 640 x 640. lcam and rcam, each with front, back, left, right, top and bottom; --camera chooses, lcam_front by
default, "all" for the twelve. Fisheye, panorama and user-defined cameras of the set have other projections and are not
read.

Depth: float32 meters, planar, whose four bytes are the four channels of an 8-bit PNG in the order of OpenCV, blue
first. A reader that returns red first (Pillow, torchvision) must swap red and blue, or it gets plausible but wrong
depth. Sky: 1000 m and more, with disparity 0 by default. Intrinsics: focal length 320 px, principal point (320, 320).

License: CC BY 4.0. Get it from https://tartanair.org (a Python package downloads selected parts). Facts from
tartanair.org/modalities.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import PngImagePlugin

from depth_anything.ingest.frame_files import FilePattern, find_frames, join_parts, read_pair, split_fields
from depth_anything.ingest.maps import MAX_PIXELS, check_png_checksums, png_bit_depth
from depth_anything.ingest.sets.tartanair import MIN_SKY_DEPTH_M
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="tartanair2",
    title="TartanAir V2",
    records=0,
    layout="ENV/Data_easy/P000/image_lcam_front/000000_lcam_front.png with "
    "ENV/Data_easy/P000/depth_lcam_front/000000_lcam_front_depth.png",
    get="https://tartanair.org",
    licence="CC-BY-4.0",
)
CAMERAS = tuple(
    f"{side}cam_{view}" for side in "lr" for view in ("front", "back", "left", "right", "top", "bottom")
)
_INTRINSICS = {"fx": 320.0, "fy": 320.0, "cx": 320.0, "cy": 320.0}
_PATTERNS = (
    FilePattern("image", "image_?cam_*", r"(\d+)_[lr]cam_[a-z]+\.png"),
    FilePattern("depth", "depth_?cam_*", r"(\d+)_[lr]cam_[a-z]+_depth\.png"),
)


def find(raw: Path, *, camera: str = "lcam_front") -> Iterator[str]:
    """List the frames as ENV/Data_easy/P000/lcam_front/number, then the paths of image and depth.

    Args:
        raw: Folder of the set.
        camera: One of `CAMERAS`, or "all".

    Raises:
        ValueError: The camera is unknown, or as `find_frames`.
    """
    if camera not in (*CAMERAS, "all"):
        raise ValueError(f"camera={camera} is unknown: use all or one of {', '.join(CAMERAS)}")
    names = CAMERAS if camera == "all" else (camera,)  # no glob: fisheye folders have similar names
    patterns = [
        FilePattern(
            pattern.content,
            "|".join(f"{pattern.folder.partition('_')[0]}_{name}" for name in names),
            pattern.name,
        )
        for pattern in _PATTERNS
    ]
    return find_frames(raw, INFO, patterns, sequence=_sequence_name)


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image or depth is missing or damaged, or the two differ in size.
    """
    _, *paths = split_fields(line)
    image, depth = read_pair(raw, _PATTERNS, paths, decode_depth)
    sky = (depth >= MIN_SKY_DEPTH_M) & np.isfinite(depth)
    return RawSample(image, {"unit": "m", "intrinsics": _INTRINSICS}, depth=depth, sky=sky)


def decode_depth(data: bytes) -> np.ndarray:
    """Decode the four bytes of each pixel of an RGBA PNG, in the order BGRA, as a little-endian float32.

    Returns:
        float32 (H, W).

    Raises:
        ValueError: Another kind of file, damaged, or larger than a map may be.
    """
    try:
        picture = PngImagePlugin.PngImageFile(io.BytesIO(data))
        bits = png_bit_depth(data)  # Pillow reduces 16 bits to 8 without a warning
        if picture.mode != "RGBA" or bits != 8 or picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.mode} with {bits} bits, {picture.width} x {picture.height} pixels")
        check_png_checksums(data)
        rgba = np.asarray(picture)
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise ValueError(f"its depth is not a float32 in a PNG of four channels: {error}") from error
    return np.ascontiguousarray(rgba[..., [2, 1, 0, 3]]).view("<f4")[..., 0].astype(np.float32)


def _sequence_name(parts: tuple[str, ...]) -> str:
    camera = parts[-1].partition("_")[2]
    return join_parts([*parts[:-1][-3:], camera])
