"""Virtual KITTI 2: five drives of KITTI, rendered in ten variations.

Layout: Scene01/clone/frames/{rgb/Camera_0/rgb_00000.jpg, depth/Camera_0/depth_00000.png}; scenes 01, 02, 06, 18 and 20;
15-deg-left, 15-deg-right, 30-deg-left, 30-deg-right, clone, fog, morning, overcast, rain, sunset; cameras 0 (left) and
1; 375 x 1242. The two tars may be unpacked to one folder, or to two folders below the same one. --camera chooses, 0 by
default.

Depth: 16-bit PNG, centimeters, planar. 65535 (655.35 m) is the far plane and nearly always sky: it has disparity 0 by
default. Intrinsics: focal length 725.0087 px, principal point (620.5, 187), for all images.

Counts: 21,260 frames per camera, of 2,126 different views: the variations repeat the same drives. The paper says 20 K.

License: CC BY-NC-SA 3.0 (from memory). Get it from https://europe.naverlabs.com: vkitti_2.0.3_rgb.tar 7.5 GB,
vkitti_2.0.3_depth.tar 8.1 GB. Facts from that page.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.ingest.frame_files import FilePattern, find_frames, join_parts, read_pair, split_fields
from depth_anything.ingest.maps import read_png16
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="vkitti2",
    title="Virtual KITTI 2",
    records=21_260,
    layout="Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg with Scene01/clone/frames/depth/Camera_0/depth_00000.png",
    get="https://europe.naverlabs.com/proxy-virtual-worlds-vkitti-2 (15.6 GB)",
    licence="CC-BY-NC-SA-3.0",
)
CAMERAS = {"0": "Camera_0", "1": "Camera_1", "both": "Camera_?"}
SKY_VALUE = 65535
_INTRINSICS = {"fx": 725.0087, "fy": 725.0087, "cx": 620.5, "cy": 187.0}
_PATTERNS = (
    FilePattern("image", "frames/rgb/Camera_?", r"rgb_(\d+)\.jpg"),
    FilePattern("depth", "frames/depth/Camera_?", r"depth_(\d+)\.png"),
)


def find(raw: Path, *, camera: str = "0") -> Iterator[str]:
    """List the frames as Scene01/clone/Camera_0/number, then the paths of image and depth.

    Args:
        raw: Folder of the set.
        camera: "0", "1" or "both".

    Raises:
        ValueError: The camera is unknown, or as `find_frames`.
    """
    if camera not in CAMERAS:
        raise ValueError(f"camera={camera} is unknown: use {', '.join(CAMERAS)}")
    patterns = [
        FilePattern(pattern.content, pattern.folder.replace("Camera_?", CAMERAS[camera]), pattern.name)
        for pattern in _PATTERNS
    ]
    return find_frames(raw, INFO, patterns, sequence=_sequence_name)


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image or depth is missing or damaged, or the two differ in size.
    """
    _, *paths = split_fields(line)
    image, centimeters = read_pair(raw, _PATTERNS, paths, read_png16)
    depth = centimeters / np.float32(100)
    return RawSample(
        image, {"unit": "m", "intrinsics": _INTRINSICS}, depth=depth, sky=centimeters == SKY_VALUE
    )


def _sequence_name(parts: tuple[str, ...]) -> str:
    return join_parts([*parts[:-3][-2:], parts[-1]])
