"""Virtual KITTI 2: five drives of KITTI, rendered in ten variations.

Layout: Scene01/clone/frames/{rgb/Camera_0/rgb_00000.jpg, depth/Camera_0/depth_00000.png}; scenes 01, 02, 06, 18 and 20;
15-deg-left, 15-deg-right, 30-deg-left, 30-deg-right, clone, fog, morning, overcast, rain, sunset; cameras 0 (left) and
1; 375 x 1242. The two tars may be unpacked to one folder or to two below the same one. Camera 0 is taken unless
--camera says 1 or both.

Depth: 16-bit PNG, centimetres, planar. 65535 (655.35 m) is the far plane, and as good as always sky: it is given
disparity 0 unless told otherwise. Intrinsics: focal length 725.0087 px, principal point (620.5, 187), the same for all.

Counts: 21,260 frames a camera, of 2,126 different places: the variations repeat the same drives. The paper says 20 K.

Licence: CC BY-NC-SA 3.0 (from memory). Get it from https://europe.naverlabs.com: vkitti_2.0.3_rgb.tar 7.5 GB,
vkitti_2.0.3_depth.tar 8.1 GB. Facts from that page.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.data.sources.folders import (
    Kind,
    check_size,
    fields,
    find_frames,
    read_kind,
    relative_name,
)
from depth_anything.data.sources.maps import read_png16
from depth_anything.data.sources.source import Facts, Raw

FACTS = Facts(
    name="vkitti2",
    title="Virtual KITTI 2",
    records=21_260,
    layout="Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg with Scene01/clone/frames/depth/Camera_0/depth_00000.png",
    get="https://europe.naverlabs.com/proxy-virtual-worlds-vkitti-2 (15.6 GB)",
    licence="CC-BY-NC-SA-3.0",
)
CAMERAS = {"0": "Camera_0", "1": "Camera_1", "both": "Camera_?"}
SKY = 65535
_INTRINSICS = {"fx": 725.0087, "fy": 725.0087, "cx": 620.5, "cy": 187.0}
_IMAGE = Kind("image", "frames/rgb/Camera_?", r"rgb_(\d+)\.jpg")
_DEPTH = Kind("depth", "frames/depth/Camera_?", r"depth_(\d+)\.png")


def find(raw: Path, *, camera: str = "0") -> Iterator[str]:
    """List the frames, Scene01/clone/Camera_0/number each, then the paths of image and depth.

    Args:
        raw: Folder of the set.
        camera: "0", "1" or "both".

    Raises:
        ValueError: If there is no such camera, or as `find_frames`.
    """
    if camera not in CAMERAS:
        raise ValueError(f"camera={camera} is unknown: type {', '.join(CAMERAS)}")
    kinds = (
        Kind(_IMAGE.what, f"frames/rgb/{CAMERAS[camera]}", _IMAGE.name),
        Kind(_DEPTH.what, f"frames/depth/{CAMERAS[camera]}", _DEPTH.name),
    )
    return find_frames(raw, FACTS, kinds, sequence=_sequence)


def read(raw: Path, line: str) -> Raw:
    """Read one frame.

    Raises:
        ValueError: If image or depth are missing or damaged, or differ in size.
    """
    _, image_path, depth_path = fields(line)
    image = read_kind(raw, _IMAGE, image_path)
    centimetres = read_png16(read_kind(raw, _DEPTH, depth_path))
    check_size(image, centimetres, _DEPTH.what)
    depth = centimetres / np.float32(100)
    return Raw(image, {"unit": "m", "intrinsics": _INTRINSICS}, depth=depth, sky=centimetres == SKY)


def _sequence(parts: tuple[str, ...]) -> str:
    return relative_name([*parts[:-3][-2:], parts[-1]])
