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

from depth_anything.ingest.frame_files import (
    FilePattern,
    check_map_size,
    find_frames,
    join_parts,
    read_frame_file,
    split_fields,
)
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
_IMAGE = FilePattern("image", "frames/rgb/Camera_?", r"rgb_(\d+)\.jpg")
_DEPTH = FilePattern("depth", "frames/depth/Camera_?", r"depth_(\d+)\.png")


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
        FilePattern(_IMAGE.what, f"frames/rgb/{CAMERAS[camera]}", _IMAGE.name),
        FilePattern(_DEPTH.what, f"frames/depth/{CAMERAS[camera]}", _DEPTH.name),
    )
    return find_frames(raw, INFO, kinds, sequence=_sequence_name)


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If image or depth are missing or damaged, or differ in size.
    """
    _, image_path, depth_path = split_fields(line)
    image = read_frame_file(raw, _IMAGE, image_path)
    centimeters = read_png16(read_frame_file(raw, _DEPTH, depth_path))
    check_map_size(image, centimeters, _DEPTH.what)
    depth = centimeters / np.float32(100)
    return RawSample(
        image, {"unit": "m", "intrinsics": _INTRINSICS}, depth=depth, sky=centimeters == SKY_VALUE
    )


def _sequence_name(parts: tuple[str, ...]) -> str:
    return join_parts([*parts[:-3][-2:], parts[-1]])
