"""TartanAir V2: 65 rendered environments, twelve cameras each; not among the paper's sets.

Layout: ENV/Data_easy/P000/{image_lcam_front/000000_lcam_front.png, depth_lcam_front/000000_lcam_front_depth.png} and
Data_hard; 640 x 640. lcam and rcam, each of front, back, left, right, top, bottom; --camera chooses, lcam_front unless
told otherwise, "all" for the twelve. The set's fisheyes, panoramas and cameras of one's own are no pinholes of this
focal length, and are not taken.

Depth: float32 metres, planar, whose four bytes stand in the four channels of an 8-bit PNG in the order in which OpenCV
reads them, blue first. A reader that gives red first (Pillow, torchvision) has to swap red and blue, or gets numbers
that look like depths and are not. Sky: 1000 m and more, given disparity 0 unless told otherwise. Intrinsics: focal
length 320 px, principal point (320, 320).

Licence: CC BY 4.0. Get it from https://tartanair.org (a Python package downloads what one asks for). Facts from
tartanair.org/modalities.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import PngImagePlugin

from depth_anything.ingest.frame_files import (
    FilePattern,
    check_map_size,
    find_frames,
    join_parts,
    read_frame_file,
    split_fields,
)
from depth_anything.ingest.maps import MAX_PIXELS, check_png_checksums
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
    f"{side}cam_{way}" for side in "lr" for way in ("front", "back", "left", "right", "top", "bottom")
)
_INTRINSICS = {"fx": 320.0, "fy": 320.0, "cx": 320.0, "cy": 320.0}
_BIT_DEPTH_OFFSET = 24  # where a PNG's header has the bits of a channel
_IMAGE = FilePattern("image", "image_?cam_*", r"(\d+)_[lr]cam_[a-z]+\.png")
_DEPTH = FilePattern("depth", "depth_?cam_*", r"(\d+)_[lr]cam_[a-z]+_depth\.png")


def find(raw: Path, *, camera: str = "lcam_front") -> Iterator[str]:
    """List the frames, ENV/Data_easy/P000/lcam_front/number each, then the paths of image and depth.

    Args:
        raw: Folder of the set.
        camera: One of CAMERAS, or "all".

    Raises:
        ValueError: If there is no such camera, or as `find_frames`.
    """
    if camera not in (*CAMERAS, "all"):
        raise ValueError(f"camera={camera} is unknown: type all or one of {', '.join(CAMERAS)}")
    names = CAMERAS if camera == "all" else (camera,)  # fisheyes and panoramas lie in folders of like names
    kinds = (
        FilePattern(_IMAGE.what, "|".join(f"image_{name}" for name in names), _IMAGE.name),
        FilePattern(_DEPTH.what, "|".join(f"depth_{name}" for name in names), _DEPTH.name),
    )
    return find_frames(raw, INFO, kinds, sequence=_sequence_name)


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If image or depth are missing or damaged, or differ in size.
    """
    _, image_path, depth_path = split_fields(line)
    image = read_frame_file(raw, _IMAGE, image_path)
    depth = decode_depth(read_frame_file(raw, _DEPTH, depth_path))
    check_map_size(image, depth, _DEPTH.what)
    sky = (depth >= MIN_SKY_DEPTH_M) & np.isfinite(depth)
    return RawSample(image, {"unit": "m", "intrinsics": _INTRINSICS}, depth=depth, sky=sky)


def decode_depth(data: bytes) -> np.ndarray:
    """Decode the four bytes of each pixel of an RGBA PNG, blue, green, red, alpha, as a little-endian float32.

    Returns:
        float32 (H, W).

    Raises:
        ValueError: If it is no such PNG, damaged, or larger than a map may be.
    """
    try:
        picture = PngImagePlugin.PngImageFile(io.BytesIO(data))
        bits = data[_BIT_DEPTH_OFFSET]  # Pillow halves 16 without a word
        if picture.mode != "RGBA" or bits != 8 or picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.mode} of {bits} bits, {picture.width} x {picture.height} pixels")
        check_png_checksums(data)
        red_first = np.asarray(picture)
    except Exception as error:  # hostile bytes make Pillow raise a dozen types
        raise ValueError(f"its depth is no float32 in a PNG of four channels: {error}") from error
    return np.ascontiguousarray(red_first[..., [2, 1, 0, 3]]).view("<f4")[..., 0].astype(np.float32)


def _sequence_name(parts: tuple[str, ...]) -> str:
    camera = parts[-1].partition("_")[2]
    return join_parts([*parts[:-1][-3:], camera])
