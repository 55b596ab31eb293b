"""MegaDepth v1: tourists' photographs of 196 places, depth from multi-view stereo; one of V1's sets.

Layout: phoenix/S6/zl548/MegaDepth_v1/0000/dense0/{imgs/NAME.jpg, depths/NAME.h5}; some pictures are
NAME.png or NAME.JPG.

Depth: HDF5, dataset "depth", planar, in a unit of each reconstruction's own: the affine-invariant losses do not need
it, a metric model cannot learn from it. 0 is invalid: people, sky and whatever was not matched. Sky is not marked.
Some files do not hold depth but an order, foreground and background as numbers of which some are negative (the makers'
own code knows them by that): these frames are refused.

Counts: some 130,000 images, about 30,000 of them with an order only; V1 says 128 K.

Licence: the photographs are Flickr users'; no name is known. Get it from https://www.cs.cornell.edu/projects/megadepth
(199 GB). Facts from https://github.com/zhengqili/MegaDepth and public readers; counts from memory.
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
from depth_anything.data.sources.maps import read_hdf5
from depth_anything.data.sources.source import Facts, Raw

FACTS = Facts(
    name="megadepth",
    title="MegaDepth v1",
    records=128_000,
    layout="0000/dense0/imgs/NAME.jpg with 0000/dense0/depths/NAME.h5",
    get="https://www.cs.cornell.edu/projects/megadepth (199 GB)",
    licence="LicenseRef-MegaDepth",
    sky="invalid",
)
_IMAGE = Kind("image", "imgs", r"(.+)\.(?i:jpe?g|png)")
_DEPTH = Kind("depth", "depths", r"(.+)\.h5")


def find(raw: Path) -> Iterator[str]:
    """List the frames, 0000/dense0/NAME each, then the paths of image and depth.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, FACTS, (_IMAGE, _DEPTH), sequence=lambda parts: relative_name(parts[:-1], 2))


def read(raw: Path, line: str) -> Raw:
    """Read one frame.

    Raises:
        ValueError: If image or depth are missing or damaged, or differ in size, or there is only an order.
    """
    _, image_path, depth_path = fields(line)
    image = read_kind(raw, _IMAGE, image_path)
    depth = read_hdf5(read_kind(raw, _DEPTH, depth_path), "depth")
    if np.nanmin(depth, initial=0) < 0:
        raise ValueError("its depth is an order of foreground and background only")
    check_size(image, depth, _DEPTH.what)
    return Raw(image, {"unit": "arbitrary"}, depth=depth)
