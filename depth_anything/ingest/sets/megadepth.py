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

from depth_anything.ingest.frame_files import (
    FilePattern,
    check_map_size,
    find_frames,
    join_parts,
    read_frame_file,
    split_fields,
)
from depth_anything.ingest.maps import read_hdf5
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="megadepth",
    title="MegaDepth v1",
    records=128_000,
    layout="0000/dense0/imgs/NAME.jpg with 0000/dense0/depths/NAME.h5",
    get="https://www.cs.cornell.edu/projects/megadepth (199 GB)",
    licence="LicenseRef-MegaDepth",
    sky="invalid",
)
_IMAGE = FilePattern("image", "imgs", r"(.+)\.(?i:jpe?g|png)")
_DEPTH = FilePattern("depth", "depths", r"(.+)\.h5")


def find(raw: Path) -> Iterator[str]:
    """List the frames, 0000/dense0/NAME each, then the paths of image and depth.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, INFO, (_IMAGE, _DEPTH), sequence=lambda parts: join_parts(parts[:-1], 2))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If image or depth are missing or damaged, or differ in size, or there is only an order.
    """
    _, image_path, depth_path = split_fields(line)
    image = read_frame_file(raw, _IMAGE, image_path)
    depth = read_hdf5(read_frame_file(raw, _DEPTH, depth_path), "depth")
    if np.nanmin(depth, initial=0) < 0:
        raise ValueError("its depth is an order of foreground and background only")
    check_map_size(image, depth, _DEPTH.what)
    return RawSample(image, {"unit": "arbitrary"}, depth=depth)
